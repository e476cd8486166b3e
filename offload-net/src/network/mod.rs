//! A network: one thread, and the handle that others have on it.

mod addressed;
pub mod allowance;
pub mod backlog;
pub mod control;
pub mod rx;
mod steering;
mod tending;
pub mod tx;
pub mod uplink;
mod worker;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use offload_card::poll::{PollPolicy, Sender, mailbox};
use offload_card::qos::NetLimits;
use offload_card::ring::{Ring, RingState};
use proto::error::{Error, ErrorReason};
use tonic::Code;

use crate::capture::Sink;
use crate::conntrack::Filter;
use crate::drops::Drops;
use crate::flow::FlowLog;
use crate::mac::MacAddr;
use crate::security::rules::{GroupId, Rules};
use crate::subnet::{Interface, Subnet};
use crate::switch::PortId;
use allowance::Exceeded;
use uplink::Uplink;
use worker::{Taken, Task, Worker};

/// Index of a device's first receive queue (VirtIO 1.3 section 5.1.2): those of pair n are 2n and 2n + 1.
pub const RX: u16 = 0;
/// Index of its first transmit queue.
pub const TX: u16 = 1;

/// How long the network's thread may take to answer. It never waits for anything, so this is about a host that is
/// out of breath.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running network. Dropping it ends the thread; the TAP stays, for the next card process.
#[derive(Debug)]
pub struct Network {
    /// `None` only while being dropped.
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
}

impl Network {
    /// Starts the network's thread. Without a `subnet` it is a plain switch.
    ///
    /// # Errors
    /// The host has no thread or file descriptor to give.
    pub fn start(
        id: &str,
        mtu: u32,
        subnet: Option<Subnet>,
        uplink: Uplink,
        policy: PollPolicy,
    ) -> Result<Self, Error> {
        let failed = |e: std::io::Error| {
            Error::new(Code::ResourceExhausted, ErrorReason::Host, format!("network {id} cannot start: {e}"))
                .resource(id)
                .remedy("raise the service's limits on tasks and open files")
        };
        let (tasks, receiver) = mailbox().map_err(failed)?;
        let worker = Worker::new(id.to_owned(), mtu, subnet, receiver, uplink, policy).map_err(failed)?;
        // The kernel shows 15 characters.
        let thread = std::thread::Builder::new()
            .name(format!("net-{id}"))
            .spawn(move || worker.run())
            .map_err(failed)?;
        Ok(Self { tasks: Some(tasks), thread: Some(thread) })
    }

    /// Plugs a device in; its place, and its counters of what the network does not take from it.
    ///
    /// # Errors
    /// An address is another device's.
    pub fn plug(&self, interface: Interface) -> Result<(PortId, Arc<Drops>), Error> {
        self.plug_behind(interface, None)
    }

    /// The same with a filter, which decides what goes to the device and comes from it.
    ///
    /// # Errors
    /// An address is another device's.
    pub fn plug_behind(
        &self,
        interface: Interface,
        filter: Option<Box<Filter>>,
    ) -> Result<(PortId, Arc<Drops>), Error> {
        self.plug_pairs(interface, filter, 1)
    }

    /// The same of a device with so many queue pairs, and with a control queue behind them if there are several.
    ///
    /// # Errors
    /// An address is another device's.
    pub fn plug_pairs(
        &self,
        interface: Interface,
        filter: Option<Box<Filter>>,
        pairs: u16,
    ) -> Result<(PortId, Arc<Drops>), Error> {
        let deadline = Instant::now() + PATIENCE;
        match self.ask(|reply| Task::Plug(interface, filter, pairs, reply), deadline) {
            Some(Ok(plugged)) => Ok(plugged),
            Some(Err(Taken::Mac(mac))) => Err(mac_taken(mac)),
            Some(Err(Taken::Address(address))) => Err(address_taken(address)),
            None => Err(no_answer()),
        }
    }

    /// Unplugs a device whose queues have been stopped.
    pub fn unplug(&self, port: PortId) {
        self.tell(Task::Unplug(port));
    }

    /// Gives the filter of a device that has these security groups other rules. They hold when this returns. If there is
    /// another device at `port` meanwhile, with other groups, it keeps its rules.
    ///
    /// # Errors
    /// The network's thread does not answer.
    pub fn set_rules(&self, port: PortId, groups: Vec<GroupId>, rules: Arc<Rules>) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        self.ask(|reply| Task::SetRules(port, groups, rules, reply), deadline).ok_or_else(no_answer)
    }

    /// Gives a queue of a device to the network's thread.
    ///
    /// # Errors
    /// The host cannot wait for its kicks; the ring is dropped, and what it has in flight stays recorded.
    pub fn start_queue(&self, port: PortId, ring: Ring) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        self.ask(|reply| Task::Start(port, Box::new(ring), reply), deadline)
            .unwrap_or_else(|| Err(no_answer()))
    }

    /// Takes it back. `None`: no answer before `deadline`. The inner `None`: it was not started.
    pub fn stop_queue(&self, port: PortId, index: u16, deadline: Instant) -> Option<Option<RingState>> {
        self.ask(|reply| Task::Stop(port, index, reply), deadline)
    }

    /// From now on a device does no more than `limits` allow; what they did is counted in `exceeded`.
    ///
    /// # Errors
    /// The network's thread has not come to it for long; it may yet.
    pub fn limit(&self, port: PortId, limits: NetLimits, exceeded: Arc<Exceeded>) -> Result<(), Error> {
        let task = |reply| Task::Limit(port, limits, exceeded, reply);
        self.ask(task, Instant::now() + PATIENCE).ok_or_else(no_answer)
    }

    /// Has a device's frames captured from now on.
    ///
    /// # Errors
    /// It has enough captures already.
    pub fn capture(&self, port: PortId, sink: Sink) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        match self.ask(|reply| Task::Capture(port, Box::new(sink), reply), deadline) {
            Some(true) => Ok(()),
            Some(false) => Err(Error::new(
                Code::ResourceExhausted,
                ErrorReason::WrongState,
                format!("the interface has {} captures already", crate::capture::PER_DEVICE),
            )
            .remedy("end one of them first")),
            None => Err(no_answer()),
        }
    }

    /// Has what its devices send and are sent logged, under this name.
    pub fn log_flows(&self, log: &FlowLog, id: &str) {
        self.tell(Task::LogFlows(Box::new(log.recorder(id))));
    }

    /// A capture's reader has room again.
    pub(crate) fn flush_captures(&self) {
        self.tell(Task::FlushCaptures);
    }

    /// Lets go of the network's uplink, and deletes its TAP.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn remove_uplink(&self) -> Result<(), Error> {
        // The network's thread only lets go of it: deleting an interface can take the kernel a while.
        match self.ask(Task::TakeUplink, Instant::now() + PATIENCE) {
            Some(Some(link)) => link.remove(),
            Some(None) => Ok(()),
            None => Err(no_answer()),
        }
    }

    fn tell(&self, task: Task) {
        // It fails only when the thread has ended, and that it does only when this handle is dropped.
        if let Some(tasks) = &self.tasks {
            let _ = tasks.send(task);
        }
    }

    fn ask<T>(&self, task: impl FnOnce(SyncSender<T>) -> Task, deadline: Instant) -> Option<T> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.tell(task(reply));
        answer.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Two devices cannot have one address.
pub(crate) fn mac_taken(mac: MacAddr) -> Error {
    Error::new(
        Code::AlreadyExists,
        ErrorReason::DeviceExists,
        format!("another device in the network has the MAC address {mac}"),
    )
    .resource(mac.to_string())
    .remedy("choose another MAC address")
}

/// Nor can they have one IP address.
pub(crate) fn address_taken(address: IpAddr) -> Error {
    Error::new(
        Code::AlreadyExists,
        ErrorReason::DeviceExists,
        format!("another device in the network has the address {address}"),
    )
    .resource(address.to_string())
    .remedy("choose another address")
}

fn no_answer() -> Error {
    Error::new(Code::DeadlineExceeded, ErrorReason::Internal, "the network's thread does not answer")
        .remedy("try again; if it stays so, restart the network card")
}
