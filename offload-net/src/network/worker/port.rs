//! Devices and their queues, as they come and go.

use std::sync::Arc;

use offload_card::ring::{Ring, RingState};
use proto::error::{Error, ErrorReason};
use tonic::Code;

use super::{FIRST_PORT, Taken, Worker};
use crate::capture::{Direction, Sink};
use crate::conntrack::Filter;
use crate::drops::Drops;
use crate::frame::Frame;
use crate::network::allowance::Allowance;
use crate::network::rx::RxQueue;
use crate::network::tx::TxQueue;
use crate::network::{RX, TX};
use crate::subnet::Interface;
use crate::switch::PortId;

/// A device in the network.
pub(in crate::network) struct Port {
    pub(in crate::network) interface: Interface,
    /// `None`: it has no security groups.
    pub(super) filter: Option<Box<Filter>>,
    pub(super) drops: Arc<Drops>,
    pub(super) rx: Option<RxQueue>,
    pub(super) tx: Option<TxQueue>,
    /// `None`: no limits.
    pub(super) allowance: Option<Box<Allowance>>,
    pub(super) captures: Vec<Sink>,
}

impl Port {
    /// A frame goes by.
    pub(super) fn capture(&mut self, frame: &Frame<'_>, direction: Direction) {
        if !self.captures.is_empty() {
            self.captures.iter_mut().for_each(|c| c.add(frame, direction));
        }
    }
}

impl Worker {
    pub(super) fn plug(
        &mut self,
        interface: Interface,
        filter: Option<Box<Filter>>,
    ) -> Result<(PortId, Arc<Drops>), Taken> {
        let free = self.ports.iter().position(Option::is_none).unwrap_or(self.ports.len());
        let id = PortId(free);
        if !self.switch.insert(interface.mac, id) {
            return Err(Taken::Mac(interface.mac));
        }
        if let Some(addressed) = &mut self.addressed
            && let Err(taken) = addressed.insert(&interface)
        {
            self.switch.remove(interface.mac);
            return Err(Taken::Address(taken));
        }
        if let Some(filter) = &filter {
            self.members.insert(&interface, filter.groups());
        }
        let drops = Arc::<Drops>::default();
        let port = Some(Port {
            interface,
            filter,
            drops: drops.clone(),
            rx: None,
            tx: None,
            allowance: None,
            captures: Vec::new(),
        });
        match self.ports.get_mut(free) {
            Some(slot) => *slot = port,
            None => self.ports.push(port),
        }
        Ok((id, drops))
    }

    pub(super) fn start(&mut self, id: PortId, ring: Ring) -> Result<(), Error> {
        let failed = |what: String| Error::new(Code::Internal, ErrorReason::Host, what);
        let Some(port) = self.ports.get_mut(id.0).and_then(Option::as_mut) else {
            return Err(failed("the device is not in the network any more".to_owned()));
        };
        let token = token(id, ring.index());
        self.poller
            .add_edge(ring.kick(), token)
            .map_err(|e| failed(format!("the host cannot wait for the queue's kicks: {e}")))?;
        match ring.index() {
            RX => port.rx = Some(RxQueue::new(ring)),
            TX => {
                port.tx = Some(TxQueue::new(ring));
                self.active.push(id);
            }
            other => return Err(failed(format!("network devices have no queue {other}"))),
        }
        Ok(())
    }

    pub(super) fn stop(&mut self, id: PortId, index: u16) -> Option<RingState> {
        let port = self.ports.get_mut(id.0)?.as_mut()?;
        // If a kick stays watched, it finds no queue.
        if index == RX {
            let queue = port.rx.take()?;
            let _ = self.poller.remove(queue.kick());
            return Some(queue.stop());
        }
        let queue = port.tx.take()?;
        let _ = self.poller.remove(queue.ring.kick());
        self.active.retain(|a| *a != id);
        let _ = self.waiting.remove(id);
        Some(queue.stop())
    }

    pub(super) fn forget(&mut self, id: PortId) {
        self.active.retain(|a| *a != id);
        self.dirty.retain(|d| *d != id);
        let _ = self.waiting.remove(id);
    }

    pub(super) fn kicked(&mut self, token: u64) {
        let id = PortId(((token - FIRST_PORT) / 2) as usize);
        if (token - FIRST_PORT) % 2 == u64::from(RX) {
            self.with_rx(id, RxQueue::kicked);
            return;
        }
        let Some(queue) = tx_of(&mut self.ports, id) else { return };
        queue.ring.counters().kicks.add(1);
        if !queue.active {
            queue.active = true;
            queue.ring.disable_kicks();
            self.active.push(id);
        } else if queue.ring.memory_changed() {
            // It may wait for its limits, for long.
            queue.chain.clear();
        }
    }

    pub(super) fn with_rx(&mut self, id: PortId, f: impl FnOnce(&mut RxQueue)) {
        let port = self.ports.get_mut(id.0).and_then(Option::as_mut);
        let Some(queue) = port.and_then(|p| p.rx.as_mut()) else { return };
        let was_listed = queue.needs_attention();
        f(queue);
        if !was_listed && queue.needs_attention() {
            self.dirty.push(id);
        }
    }
}

/// What the poller reports for a queue of a port.
fn token(id: PortId, queue: u16) -> u64 {
    FIRST_PORT + 2 * id.0 as u64 + u64::from(queue)
}

pub(super) fn tx_of(ports: &mut [Option<Port>], id: PortId) -> Option<&mut TxQueue> {
    ports.get_mut(id.0)?.as_mut()?.tx.as_mut()
}
