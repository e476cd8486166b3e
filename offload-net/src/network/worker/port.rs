//! Devices and their queues, as they come and go.

use std::sync::Arc;

use offload_card::ring::{Ring, RingState};
use proto::error::{Error, ErrorReason};
use tonic::Code;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};

use super::{FIRST_PORT, Taken, Worker};
use crate::capture::{Direction, Sink};
use crate::conntrack::Filter;
use crate::drops::Drops;
use crate::frame::Frame;
use crate::network::RX;
use crate::network::allowance::Allowance;
use crate::network::control::ControlQueue;
use crate::network::rx::RxQueue;
use crate::network::tx::TxQueue;
use crate::subnet::Interface;
use crate::switch::PortId;

/// A device in the network.
pub(in crate::network) struct Port {
    pub(in crate::network) interface: Interface,
    /// `None`: it has no security groups.
    pub(super) filter: Option<Box<Filter>>,
    pub(super) drops: Arc<Drops>,
    pub(super) pairs: Box<[Pair]>,
    control: Option<ControlQueue>,
    /// Queues that its driver has started and may not use, and where they stand.
    unused: Vec<(u16, RingState)>,
    /// What its driver accepted, when a queue was started last.
    features: u64,
    /// How many of its receive queues frames are spread over, from the first on; at least 1.
    pub(super) spread: usize,
    /// The pair whose transmit queue is the first in its next turn.
    pub(super) next: usize,
    /// It is among those that are looked at in every turn, or among those that wait for their limits.
    pub(super) listed: bool,
    /// `None`: no limits.
    pub(super) allowance: Option<Box<Allowance>>,
    pub(super) captures: Vec<Sink>,
}

/// Two queues of a device, as far as they have been started.
#[derive(Default)]
pub(super) struct Pair {
    pub(super) rx: Option<RxQueue>,
    pub(super) tx: Option<TxQueue>,
}

impl Port {
    /// How many receive queues frames are to be spread over. With a control queue it is as its driver says; else the
    /// front-end has the control queue, and starts and stops the pairs' queues as the driver says there.
    fn spread(&self) -> usize {
        let running = self.pairs.iter().take_while(|pair| pair.rx.is_some()).count();
        let used = match has(self.features, VIRTIO_NET_F_MQ) {
            false => 1,
            true if !has(self.features, VIRTIO_NET_F_CTRL_VQ) => running,
            true => self.control.as_ref().map_or(1, |control| control.pairs().into()),
        };
        used.min(running).max(1)
    }

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
        pairs: u16,
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
            pairs: (0..pairs.max(1)).map(|_| Pair::default()).collect(),
            control: None,
            unused: Vec::new(),
            features: 0,
            spread: 1,
            next: 0,
            listed: false,
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
        let (index, features) = (ring.index(), ring.features());
        let Some(role) = Role::of(index, features, port.pairs.len()) else {
            // The driver's business, and no reason to fail: the queue lies there.
            ring.shared().log.say(|left_out| {
                tracing::warn!(
                    "queue {index} is of no use with the features that the driver accepted{left_out}"
                );
            });
            port.unused.push((index, ring.stop()));
            return Ok(());
        };
        self.poller
            .add_edge(ring.kick(), token(id, index))
            .map_err(|e| failed(format!("the host cannot wait for the queue's kicks: {e}")))?;
        port.features = features;
        match role {
            Role::Receive(pair) => {
                if let Some(pair) = port.pairs.get_mut(pair) {
                    pair.rx = Some(RxQueue::new(ring));
                }
            }
            Role::Transmit(pair) => {
                if let Some(pair) = port.pairs.get_mut(pair) {
                    pair.tx = Some(TxQueue::new(ring));
                }
                if !port.listed {
                    port.listed = true;
                    self.active.push(id);
                }
            }
            Role::Control { max_pairs } => {
                let mut control = ControlQueue::new(ring, max_pairs);
                // Commands may wait, also those that a predecessor took and did not answer.
                control.serve(|used| retire(&mut port.pairs, used));
                port.control = Some(control);
            }
        }
        port.spread = port.spread();
        Ok(())
    }

    pub(super) fn stop(&mut self, id: PortId, index: u16) -> Option<RingState> {
        let port = self.ports.get_mut(id.0)?.as_mut()?;
        // If a kick stays watched, it finds no queue.
        if let Some(control) = port.control.take_if(|control| control.index() == index) {
            let _ = self.poller.remove(control.kick());
            port.spread = port.spread();
            return Some(control.stop());
        }
        if let Some(at) = port.unused.iter().position(|(unused, _)| *unused == index) {
            return Some(port.unused.swap_remove(at).1);
        }
        let pair = port.pairs.get_mut(usize::from(index / 2))?;
        if index % 2 == RX {
            let queue = pair.rx.take()?;
            let _ = self.poller.remove(queue.kick());
            port.spread = port.spread();
            return Some(queue.stop());
        }
        let queue = pair.tx.take()?;
        let _ = self.poller.remove(queue.ring.kick());
        if port.pairs.iter().all(|pair| pair.tx.is_none()) {
            port.listed = false;
            self.active.retain(|a| *a != id);
            let _ = self.waiting.remove(id);
        }
        Some(queue.stop())
    }

    pub(super) fn forget(&mut self, id: PortId) {
        self.active.retain(|a| *a != id);
        self.dirty.retain(|(d, _)| *d != id);
        let _ = self.waiting.remove(id);
    }

    pub(super) fn kicked(&mut self, token: u64) {
        let (id, index) = queue_of(token);
        let Some(port) = self.ports.get_mut(id.0).and_then(Option::as_mut) else { return };
        if let Some(control) = port.control.as_mut().filter(|control| control.index() == index) {
            control.kicked(|used| retire(&mut port.pairs, used));
            port.spread = port.spread();
            return;
        }
        let pair = usize::from(index / 2);
        if index % 2 == RX {
            self.with_rx(id, pair, RxQueue::kicked);
            return;
        }
        let Some(queue) = port.pairs.get_mut(pair).and_then(|pair| pair.tx.as_mut()) else { return };
        queue.ring.counters().kicks.add(1);
        if !queue.active {
            queue.active = true;
            queue.ring.disable_kicks();
            if !port.listed {
                port.listed = true;
                self.active.push(id);
            }
        } else if queue.ring.memory_changed() {
            // It may wait for its limits, for long.
            queue.chain.clear();
        }
    }

    pub(super) fn with_rx<T>(
        &mut self,
        id: PortId,
        pair: usize,
        f: impl FnOnce(&mut RxQueue) -> T,
    ) -> Option<T> {
        let queue = rx_of(&mut self.ports, id, pair)?;
        let was_listed = queue.needs_attention();
        let done = f(queue);
        if !was_listed && queue.needs_attention() {
            self.dirty.push((id, pair));
        }
        Some(done)
    }
}

/// What a queue of a device is for.
enum Role {
    /// The receive queue of this pair.
    Receive(usize),
    /// The transmit queue of this pair.
    Transmit(usize),
    /// The control queue, by which so many pairs can be asked for; 0: only one is used.
    Control { max_pairs: u16 },
}

impl Role {
    /// What queue `index` is for, in a device with so many pairs and a driver with these features (VirtIO 1.3 section 5.1.2).
    fn of(index: u16, features: u64, pairs: usize) -> Option<Self> {
        let multi = has(features, VIRTIO_NET_F_MQ);
        if has(features, VIRTIO_NET_F_CTRL_VQ) {
            let max_pairs = if multi { u16::try_from(pairs).ok()? } else { 0 };
            if usize::from(index) == 2 * usize::from(max_pairs.max(1)) {
                return Some(Self::Control { max_pairs });
            }
        }
        let pair = usize::from(index / 2);
        let role = if index % 2 == RX { Self::Receive(pair) } else { Self::Transmit(pair) };
        (pair < pairs).then_some(role)
    }
}

fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// The driver uses so many pairs from now on: nothing goes to the others' receive queues any more.
fn retire(pairs: &mut [Pair], used: u16) {
    pairs.iter_mut().skip(used.into()).filter_map(|pair| pair.rx.as_mut()).for_each(RxQueue::retire);
}

/// What the poller reports for a queue of a port.
fn token(id: PortId, queue: u16) -> u64 {
    FIRST_PORT + ((id.0 as u64) << 16 | u64::from(queue))
}

/// The other way round.
fn queue_of(token: u64) -> (PortId, u16) {
    let place = token - FIRST_PORT;
    (PortId((place >> 16) as usize), place as u16)
}

pub(super) fn tx_of(ports: &mut [Option<Port>], id: PortId, pair: usize) -> Option<&mut TxQueue> {
    ports.get_mut(id.0)?.as_mut()?.pairs.get_mut(pair)?.tx.as_mut()
}

pub(super) fn rx_of(ports: &mut [Option<Port>], id: PortId, pair: usize) -> Option<&mut RxQueue> {
    ports.get_mut(id.0)?.as_mut()?.pairs.get_mut(pair)?.rx.as_mut()
}
