//! What the network's thread is asked to do from outside.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use offload_card::poll::Order;
use offload_card::qos::NetLimits;
use offload_card::ring::{Ring, RingState};
use proto::error::Error;

use super::Worker;
use crate::capture::{self, Sink};
use crate::conntrack::Filter;
use crate::drops::Drops;
use crate::flow::Recorder;
use crate::host::link::Link;
use crate::mac::MacAddr;
use crate::network::allowance::{Allowance, Exceeded};
use crate::network::uplink::Uplink;
use crate::security::rules::{GroupId, Rules};
use crate::subnet::Interface;
use crate::switch::PortId;

/// What the network's thread is asked to do.
#[derive(Debug)]
pub(in crate::network) enum Task {
    /// Plug in a device that speaks as this interface, behind a filter if it has security groups, with so many queue pairs.
    Plug(Interface, Option<Box<Filter>>, u16, SyncSender<Result<(PortId, Arc<Drops>), Taken>>),
    /// Unplug it. Its queues have been stopped.
    Unplug(PortId),
    /// Other rules for a device with these security groups.
    SetRules(PortId, Vec<GroupId>, Arc<Rules>, SyncSender<()>),
    /// A queue of a device starts.
    Start(PortId, Box<Ring>, SyncSender<Result<(), Error>>),
    /// A queue of a device stops, if it was started.
    Stop(PortId, u16, SyncSender<Option<RingState>>),
    /// A device is to do no more than this from now on.
    Limit(PortId, NetLimits, Arc<Exceeded>, SyncSender<()>),
    /// A device's frames are to be captured. False: it has enough captures.
    Capture(PortId, Box<Sink>, SyncSender<bool>),
    /// A capture's reader has room again.
    FlushCaptures,
    /// Frames are to be added up for the flow log.
    LogFlows(Box<Recorder>),
    /// Let go of the uplink: the network is about to go, and the TAP with it.
    TakeUplink(SyncSender<Option<Link>>),
}

/// Another device has this address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::network) enum Taken {
    Mac(MacAddr),
    Address(IpAddr),
}

impl Worker {
    /// False: there will be no more tasks.
    pub(super) fn take_tasks(&mut self) -> bool {
        loop {
            match self.tasks.take() {
                Order::Some(task) => self.perform(task),
                Order::None => return true,
                Order::Closed => return false,
            }
        }
    }

    /// Whoever asked and has stopped waiting for the answer does not need it.
    fn perform(&mut self, task: Task) {
        match task {
            Task::Plug(interface, filter, pairs, reply) => {
                let _ = reply.send(self.plug(interface, filter, pairs));
            }
            Task::SetRules(id, groups, rules, reply) => {
                self.set_rules(id, &groups, rules);
                let _ = reply.send(());
            }
            Task::Unplug(id) => {
                if let Some(port) = self.ports.get_mut(id.0).and_then(Option::take) {
                    self.switch.remove(port.interface.mac);
                    if let Some(addressed) = &mut self.addressed {
                        addressed.remove(&port.interface);
                    }
                    if port.filter.is_some() {
                        self.members.remove(&port.interface);
                    }
                    self.forget(id);
                }
            }
            Task::Start(id, ring, reply) => {
                let _ = reply.send(self.start(id, *ring));
            }
            Task::Stop(id, index, reply) => {
                let _ = reply.send(self.stop(id, index));
            }
            Task::Limit(id, limits, exceeded, reply) => {
                if let Some(port) = self.ports.get_mut(id.0).and_then(Option::as_mut) {
                    port.allowance = Allowance::new(limits, port.allowance.as_deref(), exceeded);
                }
                // What waits goes by these.
                if let Some((queue, waited)) = self.waiting.remove(id) {
                    self.resume(id, queue, waited);
                }
                let _ = reply.send(());
            }
            Task::Capture(id, sink, reply) => {
                let port = self.ports.get_mut(id.0).and_then(Option::as_mut);
                let taken = port.is_some_and(|port| {
                    // Those whose readers have gone make room.
                    port.captures.retain_mut(Sink::flush);
                    let room = port.captures.len() < capture::PER_DEVICE;
                    port.captures.extend(room.then_some(*sink));
                    room
                });
                self.capturing |= taken;
                let _ = reply.send(taken);
            }
            Task::FlushCaptures => self.flush_captures(),
            Task::LogFlows(recorder) => self.flows = Some(recorder),
            Task::TakeUplink(reply) => {
                let link = std::mem::replace(&mut self.uplink, Uplink::None).take(&self.poller);
                let _ = reply.send(link);
            }
        }
    }
}
