//! A network's thread: owns every ring of every device in the network, and the TAP.
//!
//! One thread means that a frame goes from the sender's ring straight into the receiver's, and no lock exists that
//! a stalled device could hold. A turn takes at most [`BUDGET`] frames or [`BUDGET_BYTES`] from each source, so that a
//! flood from one leaves the others their share.

mod security;

use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use offload_card::poll::{Awaited, Next, Order, Pacer, PollPolicy, Poller, Receiver};
use offload_card::qos::NetLimits;
use offload_card::ring::{Ring, RingState};
use proto::error::{Error, ErrorReason};
use tonic::Code;
use vm_memory::VolatileSlice;

use super::addressed::Addressed;
use super::allowance::{Allowance, Exceeded, Waiting};
use super::rx::RxQueue;
use super::tx::{self, TxHead, TxQueue};
use super::uplink::Uplink;
use super::{RX, TX};
use crate::capture::{self, Direction, Sink};
use crate::conntrack::Filter;
use crate::drops::{DropReason, Drops};
use crate::flow::{self, Action, Recorder};
use crate::frame::header::{LEN, VnetHeader};
use crate::frame::offload::{self, Allowed, Offloads};
use crate::frame::{Bytes, FRAME_MAX, Frame, HEAD_MAX, Memory};
use crate::guard::{Question, Verdict};
use crate::host::tap::Tap;
use crate::mac::MacAddr;
use crate::security::rules::{GroupId, Members, Rules};
use crate::subnet::{Interface, Subnet};
use crate::switch::{Egress, Ingress, PortId, Switch};

/// Frames taken from one source before the next has its turn.
const BUDGET: usize = 64;
/// And bytes: receivers are told at the end of a turn, and are to work on what they got while we go on.
const BUDGET_BYTES: usize = 256 << 10;

/// How many looks at the queues and frames from them come between two questions for events: tasks, kicks, the host.
const EVENTS_AFTER: usize = 32;

const ORDERS: u64 = 0;
const UPLINK: u64 = 1;
/// A new TAP has been made.
const NEW_TAP: u64 = 2;
const FIRST_PORT: u64 = 3;
/// A chain's descriptors cost its sender as much of [`BUDGET_BYTES`] as so many bytes each.
const DESCRIPTOR_BYTES: usize = 128;

/// What the network's thread is asked to do.
#[derive(Debug)]
pub(super) enum Task {
    /// Plug in a device that speaks as this interface, behind a filter if it has security groups.
    Plug(Interface, Option<Box<Filter>>, SyncSender<Result<(PortId, Arc<Drops>), Taken>>),
    /// Unplug it. Its queues have been stopped.
    Unplug(PortId),
    /// Other rules for a device with these security groups.
    SetRules(PortId, Vec<GroupId>, Arc<Rules>, SyncSender<()>),
    /// A queue of a device starts.
    Start(PortId, Box<Ring>, SyncSender<Result<(), Error>>),
    /// A queue of a device stops, if it was started.
    Stop(PortId, u16, SyncSender<Option<RingState>>),
    /// A device is to do no more than this from now on.
    Limit(PortId, NetLimits, Arc<Exceeded>),
    /// A device's frames are to be captured. False: it has enough captures.
    Capture(PortId, Box<Sink>, SyncSender<bool>),
    /// A capture's reader has room again.
    FlushCaptures,
    /// Frames are to be added up for the flow log.
    LogFlows(Box<Recorder>),
    /// Let go of the uplink: the network is about to go, and the TAP with it.
    TakeUplink(SyncSender<Option<Tap>>),
}

/// Another device has this address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    Mac(MacAddr),
    Address(IpAddr),
}

/// A device in the network.
pub(super) struct Port {
    pub(super) interface: Interface,
    /// `None`: it has no security groups.
    filter: Option<Box<Filter>>,
    drops: Arc<Drops>,
    rx: Option<RxQueue>,
    tx: Option<TxQueue>,
    /// `None`: no limits.
    allowance: Option<Box<Allowance>>,
    captures: Vec<Sink>,
}

impl Port {
    /// A frame goes by.
    fn capture(&mut self, frame: &Frame<'_>, direction: Direction) {
        if !self.captures.is_empty() {
            self.captures.iter_mut().for_each(|c| c.add(frame, direction));
        }
    }
}

/// The thread's state.
pub(super) struct Worker {
    name: String,
    mtu: usize,
    tasks: Receiver<Task>,
    poller: Poller,
    uplink: Uplink,
    pub(super) switch: Switch,
    /// `None`: a plain switch.
    pub(super) addressed: Option<Addressed>,
    /// Who has which security groups.
    members: Members,
    pub(super) ports: Vec<Option<Port>>,
    /// Ports whose transmit queue is looked at in every turn, and need not kick.
    active: Vec<PortId>,
    /// How long they are when there is nothing in them.
    pacer: Pacer,
    /// Ports with frames delivered and not yet shown to the guest.
    dirty: Vec<PortId>,
    /// Ports whose frames wait for their limits. They are not in `active` and are not asked to kick.
    waiting: Waiting,
    /// Some port may have captures.
    capturing: bool,
    /// `None`: there is no flow log.
    flows: Option<Box<Recorder>>,
    /// Where a frame from the host is read into.
    from_host: Vec<u8>,
}

impl Worker {
    /// A network without devices.
    ///
    /// # Errors
    /// No file descriptor to be had.
    pub(super) fn new(
        name: String,
        mtu: u32,
        subnet: Option<Subnet>,
        tasks: Receiver<Task>,
        uplink: Uplink,
        policy: PollPolicy,
    ) -> std::io::Result<Self> {
        let poller = Poller::new()?;
        poller.add_edge(tasks.event(), ORDERS)?;
        let mut worker = Self {
            name,
            mtu: mtu as usize,
            tasks,
            poller,
            uplink,
            switch: Switch::default(),
            addressed: subnet.map(Addressed::new),
            members: Members::default(),
            ports: Vec::new(),
            active: Vec::new(),
            pacer: Pacer::new(policy),
            dirty: Vec::new(),
            waiting: Waiting::default(),
            capturing: false,
            flows: None,
            from_host: vec![0; LEN + FRAME_MAX],
        };
        worker.uplink.watch(&worker.poller, UPLINK, NEW_TAP);
        Ok(worker)
    }

    /// Runs until nobody can send tasks any more.
    pub(super) fn run(mut self) {
        let mut tokens = Vec::new();
        // Looks and frames since events were asked for, which is a system call.
        let mut since_events = EVENTS_AFTER;
        loop {
            if !self.waiting.is_empty() {
                self.release();
            }
            if self.active.is_empty() || since_events >= EVENTS_AFTER {
                since_events = 0;
                let asleep = self.active.is_empty();
                let timeout = if asleep { self.next_moment() } else { Some(std::time::Duration::ZERO) };
                if asleep {
                    self.pacer.sleeps();
                }
                match self.poller.wait(timeout) {
                    Ok(reported) => tokens.extend(reported),
                    Err(e) => {
                        // Without waiting no network works; a new process may.
                        tracing::error!(network = self.name, "cannot wait for events: {e}");
                        std::process::exit(1);
                    }
                }
                if asleep {
                    self.pacer.woke();
                }
                let mut from_host = false;
                for token in tokens.drain(..) {
                    match token {
                        ORDERS if !self.take_tasks() => return,
                        ORDERS => {}
                        UPLINK => from_host = true,
                        NEW_TAP => self.uplink.made(&self.poller, UPLINK, NEW_TAP),
                        queue => self.kicked(queue),
                    }
                }
                if from_host {
                    self.receive();
                }
                self.tend();
            }
            let frames = self.look();
            since_events += 1 + frames;
            self.publish();
            if self.capturing {
                self.flush_captures();
            }
            if let Some(flows) = &mut self.flows {
                flows.settle();
            }
            if frames == 0 && !self.active.is_empty() && self.pacer.idle(Awaited::Driver) == Next::Sleep {
                self.rest();
            }
        }
    }

    /// Takes frames from the transmit queues that are looked at; how many.
    fn look(&mut self) -> usize {
        let mut all = 0;
        for i in 0..self.active.len() {
            let Some(id) = self.active.get(i).copied() else { break };
            let frames = self.transmit(id);
            if frames > 0
                && all == 0
                && self.pacer.worked()
                && let Some(queue) = tx_of(&mut self.ports, id)
            {
                queue.ring.counters().poll_hits.add(1);
            }
            all += frames;
        }
        if !self.waiting.is_empty() {
            self.active.retain(|id| !self.waiting.contains(*id));
        }
        all
    }

    /// How long the thread may sleep if nobody wakes it; `None`: for ever.
    fn next_moment(&self) -> Option<std::time::Duration> {
        let flows = self.flows.as_ref().and_then(|f| f.next());
        self.waiting.next().into_iter().chain(flows).chain(self.until_tending()).min()
    }

    /// Looks again at queues whose next frame may go now.
    fn release(&mut self) {
        let (ports, active) = (&mut self.ports, &mut self.active);
        self.waiting.release(|id, waited| {
            if let Some(queue) = tx_of(ports, id) {
                queue.ring.counters().throttled_ns.add(waited);
                active.push(id);
            }
        });
    }

    fn flush_captures(&mut self) {
        self.capturing = false;
        for port in self.ports.iter_mut().flatten().filter(|p| !p.captures.is_empty()) {
            port.captures.retain_mut(Sink::flush);
            self.capturing |= !port.captures.is_empty();
        }
    }

    /// Asks for kicks, before the thread sleeps. Queues in which there is something already are still looked at.
    fn rest(&mut self) {
        let ports = &mut self.ports;
        self.active.retain(|id| {
            let Some(queue) = tx_of(ports, *id) else { return false };
            queue.active = queue.ring.enable_kicks();
            if queue.active {
                queue.ring.disable_kicks();
            } else {
                queue.ring.counters().sleeps.add(1);
            }
            queue.active
        });
    }

    /// False: there will be no more tasks.
    fn take_tasks(&mut self) -> bool {
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
            Task::Plug(interface, filter, reply) => {
                let _ = reply.send(self.plug(interface, filter));
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
            Task::Limit(id, limits, exceeded) => {
                if let Some(port) = self.ports.get_mut(id.0).and_then(Option::as_mut) {
                    port.allowance = Allowance::new(limits, port.allowance.as_deref(), exceeded);
                }
                // What waits goes by these.
                if let Some(waited) = self.waiting.remove(id)
                    && let Some(queue) = tx_of(&mut self.ports, id)
                {
                    queue.ring.counters().throttled_ns.add(waited);
                    self.active.push(id);
                }
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
                let tap = std::mem::replace(&mut self.uplink, Uplink::None).take(&self.poller);
                let _ = reply.send(tap);
            }
        }
    }

    fn plug(
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

    fn start(&mut self, id: PortId, ring: Ring) -> Result<(), Error> {
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

    fn stop(&mut self, id: PortId, index: u16) -> Option<RingState> {
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

    fn forget(&mut self, id: PortId) {
        self.active.retain(|a| *a != id);
        self.dirty.retain(|d| *d != id);
        let _ = self.waiting.remove(id);
    }

    fn kicked(&mut self, token: u64) {
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

    /// Forwards frames that a device sends; how many.
    fn transmit(&mut self, id: PortId) -> usize {
        let Some(port) = self.ports.get(id.0).and_then(Option::as_ref) else { return 0 };
        let mac = port.interface.mac;
        let Some(queue) = tx_of(&mut self.ports, id) else { return 0 };
        let allowed = queue.allowed;
        let mut chain = std::mem::take(&mut queue.chain);
        // Made when there is a frame: most looks at a queue find none.
        let mut buf: Option<TxHead> = None;
        let mut frames = 0;
        let mut bytes = 0;
        let mut heads = 0;
        while frames < BUDGET && bytes <= BUDGET_BYTES {
            let port = self.ports.get_mut(id.0).and_then(Option::as_mut);
            let Some(Port { tx: Some(queue), allowance, .. }) = port else { return frames };
            if let Some(allowance) = allowance
                && let Some(held) = allowance.holds_back(&mut queue.ring)
            {
                self.waiting.add(id, held);
                break;
            }
            match queue.ring.pop(&mut chain) {
                Ok(true) => frames += 1,
                Ok(false) => break,
                Err(e) => {
                    queue.ring.shared().log.say(|left_out| {
                        tracing::warn!(network = self.name, device = %mac, "transmit queue broken: {e}{left_out}");
                    });
                    break;
                }
            }
            let buf = buf.get_or_insert_with(|| [0; LEN + HEAD_MAX]);
            let parsed = tx::parse(&chain, buf, allowed, self.mtu);
            if let Some(port) = self.ports.get_mut(id.0).and_then(Option::as_mut) {
                if let Ok(frame) = &parsed {
                    port.capture(frame, Direction::Outbound);
                }
                if let Some(allowance) = &port.allowance {
                    let malformed = (1, chain.readable_len().into());
                    allowance.sent(parsed.as_ref().map_or(malformed, Frame::on_wire));
                }
            }
            let outcome = match parsed {
                Ok(frame) => {
                    let outcome = self.forward(&frame, Ingress::Port(id, mac));
                    if let Some(flows) = &mut self.flows {
                        let action = outcome.map_or_else(Action::Reject, |()| Action::Accept);
                        flows.add(mac, flow::Direction::Out, action, &frame);
                    }
                    outcome.map(|()| frame.bytes())
                }
                Err(_) => Err(DropReason::Malformed),
            };
            heads += (chain.readable_len() as usize).clamp(LEN, LEN + HEAD_MAX) - LEN;
            bytes += chain.readable_len() as usize + DESCRIPTOR_BYTES * usize::from(chain.descriptors());
            let Some(Port { tx: Some(queue), drops, .. }) = self.ports.get_mut(id.0).and_then(Option::as_mut)
            else {
                return frames;
            };
            let counters = queue.ring.counters();
            match outcome {
                Ok(bytes) => counters.bytes_out.add(bytes as u64),
                Err(reason) => {
                    counters.dropped.add(1);
                    counters.errors.add(u64::from(reason.is_senders_fault()));
                    drops.add(reason);
                }
            }
            queue.ring.push(chain.head(), 0);
        }
        if let Some(queue) = tx_of(&mut self.ports, id) {
            queue.ring.counters().copied.add(heads as u64);
            queue.ring.publish();
            if queue.ring.memory_changed() {
                // It has been returned, and may be all that keeps what was removed.
                chain.clear();
            }
            queue.chain = chain;
        }
        frames
    }

    /// Forwards frames from the host.
    fn receive(&mut self) {
        let mut buf = std::mem::take(&mut self.from_host);
        let mut bytes = 0;
        for _ in 0..BUDGET {
            if bytes > BUDGET_BYTES {
                break;
            }
            let Uplink::Up(_, tap) = &self.uplink else { break };
            let n = match tap.read(&mut buf) {
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => {
                    self.uplink.lost(&self.poller, NEW_TAP, &e);
                    break;
                }
            };
            let Some((header, frame)) = buf.get_mut(..n).and_then(<[u8]>::split_first_chunk_mut) else {
                continue;
            };
            let header = VnetHeader::from_bytes(header);
            let len = frame.len();
            bytes += len;
            let (head, tail) = frame.split_at_mut(len.min(HEAD_MAX));
            // What the kernel gives us is well-formed, but nothing later would bear it if it were not.
            let Ok(offloads) = offload::check(&header, head, len, self.mtu, Allowed::HOST) else { continue };
            let tail_bytes = Bytes { start: 0, len: tail.len() };
            let tail = [VolatileSlice::from(tail)];
            // A frame that goes nowhere is the host's to count: it has no queue here.
            let _ = self
                .forward(&Frame { head, tail: Memory::Host(&tail), tail_bytes, offloads }, Ingress::Uplink);
        }
        self.from_host = buf;
    }

    /// Sends a frame where it goes. `Err`: it went nowhere.
    fn forward(&mut self, frame: &Frame<'_>, from: Ingress) -> Result<(), DropReason> {
        let egress = match &self.addressed {
            None => self.switch.forward(frame, from),
            Some(addressed) => {
                let verdict = match from {
                    Ingress::Uplink => addressed.judge(frame, None)?,
                    Ingress::Port(id, _) => match self.ports.get(id.0).and_then(Option::as_ref) {
                        Some(port) => addressed.judge(frame, Some(&port.interface))?,
                        None => return Err(DropReason::NoDestination),
                    },
                };
                match verdict {
                    Verdict::Forward => self.switch.forward(frame, from),
                    Verdict::Answer(question) => return self.answer(frame, from, question),
                }
            }
        };
        if !self.admit(frame, from, egress)? {
            return Ok(());
        }
        match egress {
            Egress::Port(to) => {
                self.deliver(frame, to);
                Ok(())
            }
            Egress::Uplink => self.send_up(frame),
            Egress::All => {
                let sender = match from {
                    Ingress::Port(id, _) => Some(id),
                    Ingress::Uplink => None,
                };
                for id in (0..self.ports.len()).map(PortId).filter(|id| Some(*id) != sender) {
                    self.deliver(frame, id);
                }
                // That the host did not take its copy is no loss to the others.
                let _ = if sender.is_some() { self.send_up(frame) } else { Ok(()) };
                Ok(())
            }
            Egress::Drop(reason) => Err(reason),
        }
    }

    /// Answers a frame, to where it came from.
    fn answer(&mut self, frame: &Frame<'_>, from: Ingress, question: Question) -> Result<(), DropReason> {
        let Some(mut addressed) = self.addressed.take() else { return Ok(()) };
        let interface = match from {
            Ingress::Port(id, _) => self.ports.get(id.0).and_then(Option::as_ref).map(|p| &p.interface),
            Ingress::Uplink => None,
        };
        let length = addressed.answer(frame, interface, question);
        if let Ok(Some(length)) = length
            && let Some(bytes) = addressed.answer_bytes(length)
        {
            match from {
                // It was paid for as a question.
                Ingress::Port(id, _) => self.deliver_bytes(bytes, id),
                // The host asks again.
                Ingress::Uplink => drop(with_frame(bytes, |answer| self.send_up(answer))),
            }
        }
        if let (Question::Metadata(_), Ingress::Port(id, mac)) = (question, from)
            && let Some(frames) = addressed.metadata.frames(mac)
        {
            frames.drain(|bytes| self.deliver_bytes(bytes, id));
        }
        self.addressed = Some(addressed);
        length.map(drop)
    }

    /// To a device, a frame of our own, whatever its limits.
    pub(super) fn deliver_bytes(&mut self, bytes: &mut [u8], to: PortId) {
        with_frame(bytes, |frame| self.give(frame, to));
    }

    /// To a device, as far as its limits admit it.
    fn deliver(&mut self, frame: &Frame<'_>, to: PortId) {
        let Some(port) = self.ports.get_mut(to.0).and_then(Option::as_mut) else { return };
        let mut action = Action::Accept;
        if let Port { rx: Some(queue), allowance: Some(allowance), .. } = port
            && !allowance.admits(frame)
        {
            queue.refuse();
            action = Action::Limited;
        }
        if let Some(flows) = &mut self.flows {
            flows.add(port.interface.mac, flow::Direction::In, action, frame);
        }
        if action == Action::Accept {
            self.give(frame, to);
        }
    }

    /// To a device. A device without a running queue is like a cable with nobody at its end.
    fn give(&mut self, frame: &Frame<'_>, to: PortId) {
        if let Some(port) = self.ports.get_mut(to.0).and_then(Option::as_mut) {
            port.capture(frame, Direction::Inbound);
        }
        self.with_rx(to, |queue| queue.deliver(frame));
    }

    fn with_rx(&mut self, id: PortId, f: impl FnOnce(&mut RxQueue)) {
        let port = self.ports.get_mut(id.0).and_then(Option::as_mut);
        let Some(queue) = port.and_then(|p| p.rx.as_mut()) else { return };
        let was_listed = queue.needs_attention();
        f(queue);
        if !was_listed && queue.needs_attention() {
            self.dirty.push(id);
        }
    }

    /// To the host.
    fn send_up(&mut self, frame: &Frame<'_>) -> Result<(), DropReason> {
        let tap = match &self.uplink {
            Uplink::Up(_, tap) => tap,
            Uplink::None => return Err(DropReason::NoDestination),
            Uplink::Down(_) | Uplink::Awaited(..) => return Err(DropReason::Uplink),
        };
        match tap.send(frame) {
            Ok(()) => Ok(()),
            Err(e) => {
                if e.raw_os_error() == Some(libc::EBADFD) {
                    self.uplink.lost(&self.poller, NEW_TAP, &e);
                }
                Err(DropReason::Uplink)
            }
        }
    }

    /// Shows guests what they have received in this turn: one interrupt each, at most.
    fn publish(&mut self) {
        while let Some(id) = self.dirty.pop() {
            if let Some(queue) = self.ports.get_mut(id.0).and_then(Option::as_mut).and_then(|p| p.rx.as_mut())
            {
                queue.settle();
            }
        }
    }
}

/// A frame of our own, which needs nothing more.
fn with_frame<T>(bytes: &mut [u8], f: impl FnOnce(&Frame<'_>) -> T) -> T {
    let (head, tail) = bytes.split_at_mut(bytes.len().min(HEAD_MAX));
    let tail_bytes = Bytes { start: 0, len: tail.len() };
    let tail = [VolatileSlice::from(tail)];
    f(&Frame { head, tail: Memory::Host(&tail), tail_bytes, offloads: Offloads::default() })
}

/// What the poller reports for a queue of a port.
fn token(id: PortId, queue: u16) -> u64 {
    FIRST_PORT + 2 * id.0 as u64 + u64::from(queue)
}

fn tx_of(ports: &mut [Option<Port>], id: PortId) -> Option<&mut TxQueue> {
    ports.get_mut(id.0)?.as_mut()?.tx.as_mut()
}
