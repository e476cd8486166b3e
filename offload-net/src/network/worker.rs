//! A network's thread: owns every ring of every device in the network, and the TAP.
//!
//! One thread means that a frame goes from the sender's ring straight into the receiver's, and no lock exists that
//! a stalled device could hold. A turn takes at most so many frames or bytes from each source, so that a
//! flood from one leaves the others their share.

mod forward;
mod port;
mod security;
mod task;
mod transmit;

use std::time::Duration;

use offload_card::poll::{Awaited, Next, Pacer, PollPolicy, Poller, Receiver};

use super::addressed::Addressed;
use super::allowance::Waiting;
use super::steering::Steering;
use super::uplink::Uplink;
use crate::capture::Sink;
use crate::flow::Recorder;
use crate::frame::FRAME_MAX;
use crate::frame::header::LEN;
use crate::security::rules::Members;
use crate::subnet::Subnet;
use crate::switch::{PortId, Switch};
use port::Port;
pub(super) use task::{Taken, Task};

/// How many looks at the queues and frames from them come between two questions for events: tasks, kicks, the host.
const EVENTS_AFTER: usize = 32;

/// How long the thread rests at most when all it could do is pile up frames for receivers that have no buffers left.
const REST: Duration = Duration::from_micros(50);

const ORDERS: u64 = 0;
const UPLINK: u64 = 1;
/// A new TAP has been made.
const NEW_LINK: u64 = 2;
const FIRST_PORT: u64 = 3;

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
    /// Which receive queue a frame goes to, where there are several.
    steering: Steering,
    /// Ports of whose transmit queues one or more are looked at in every turn, and need not kick.
    active: Vec<PortId>,
    /// How long they are when there is nothing in them.
    pacer: Pacer,
    /// Ports and pairs with frames delivered and not yet shown to the guest.
    dirty: Vec<(PortId, usize)>,
    /// Frames of this turn that wait for their receivers.
    kept: usize,
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
            steering: Steering::default(),
            active: Vec::new(),
            pacer: Pacer::new(policy),
            dirty: Vec::new(),
            kept: 0,
            waiting: Waiting::default(),
            capturing: false,
            flows: None,
            from_host: vec![0; LEN + FRAME_MAX],
        };
        worker.uplink.watch(&worker.poller, UPLINK, NEW_LINK);
        Ok(worker)
    }

    /// Runs until nobody can send tasks any more.
    pub(super) fn run(mut self) {
        let mut tokens = Vec::new();
        // Looks and frames since events were asked for, which is a system call.
        let mut since_events = EVENTS_AFTER;
        // For their receivers, who may want the processor that this thread has.
        let mut rests = false;
        loop {
            if !self.waiting.is_empty() {
                self.release();
            }
            if self.active.is_empty() || since_events >= EVENTS_AFTER {
                since_events = 0;
                let asleep = self.active.is_empty();
                let timeout = match (asleep, rests) {
                    (true, _) => self.next_moment(),
                    (false, true) => Some(REST),
                    (false, false) => Some(Duration::ZERO),
                };
                if asleep || rests {
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
                if asleep || rests {
                    self.pacer.woke();
                }
                rests = false;
                let mut from_host = false;
                for token in tokens.drain(..) {
                    match token {
                        ORDERS if !self.take_tasks() => return,
                        ORDERS => {}
                        UPLINK => from_host = true,
                        NEW_LINK => self.uplink.made(&self.poller, UPLINK, NEW_LINK),
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
            if frames > 0 && self.kept == frames && self.pacer.may_rest() {
                (rests, since_events) = (true, EVENTS_AFTER);
            }
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

    /// How long the thread may sleep if nobody wakes it; `None`: for ever.
    fn next_moment(&self) -> Option<Duration> {
        let flows = self.flows.as_ref().and_then(|f| f.next());
        self.waiting.next().into_iter().chain(flows).chain(self.until_tending()).min()
    }

    fn flush_captures(&mut self) {
        self.capturing = false;
        for port in self.ports.iter_mut().flatten().filter(|p| !p.captures.is_empty()) {
            port.captures.retain_mut(Sink::flush);
            self.capturing |= !port.captures.is_empty();
        }
    }
}
