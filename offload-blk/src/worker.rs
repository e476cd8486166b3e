//! A queue's work: takes requests from its ring, has them done, and answers.

mod answer;
mod erasing;
mod meter;
mod slot;
mod throttled;

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use offload_card::poll::{Order, Receiver};
use offload_card::qos::{Limiter, Tap};
use offload_card::{Chain, Ring, RingError, RingState, clock};
use tracing::{error, warn};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES};

use crate::config::Config;
use crate::erase::{MAX_RANGES, Range};
use crate::io::{Backend, Begun, Op, Register, Seen};
use crate::queue::Progress;
use crate::request::{ID_BYTES, Limits, NoStatus, Request, Status, parse};
use crate::share::{Share, cost};
use crate::store::Store;
use answer::answer;
use meter::{Kind, Meter};
use slot::Slot;
use throttled::Throttled;

/// Orders to a queue.
#[derive(Debug)]
pub(crate) enum QueueOrder {
    /// Take nothing more, and end.
    Stop,
    /// The disk's limits are others now.
    Limits,
}

/// Which way of doing I/O to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum IoEngine {
    /// Whichever is quicker, io_uring or a system call; system calls only where the host does not permit io_uring.
    #[default]
    Auto,
    /// io_uring for everything, and an error if it is not permitted.
    IoUring,
    /// One system call per request.
    Sync,
}

/// Answers are shown to the driver when they have cost about as much as this many requests of no bytes: so that it works
/// on the first of a batch while the rest of it is done.
const STEP: u32 = 8;
/// Bytes that cost as much as a request by itself, as a power of two, if this thread copies them.
const STEP_BYTES_LOG2: u32 = 11;
/// Requests begun between two looks at what has been completed, and at the thread's other queues: with two of 32 requests each,
/// 64 of them made p99 1.6 times as long as 16.
const MAX_TAKEN: u16 = 16;
/// Requests taken before their transfers begin, so that what one needs is fetched while the others are looked at.
const TOGETHER: usize = 4;
/// How often a transfer is put off by the host before it has failed.
const MAX_RETRIES: u8 = 100;

/// What the queues of a disk have in common. None of it is locked or written in the data path.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) store: Store,
    pub(crate) config: Config,
    pub(crate) serial: [u8; ID_BYTES],
    pub(crate) engine: IoEngine,
    pub(crate) register: Register,
    pub(crate) seen: Arc<Seen>,
    pub(crate) limiter: Arc<Limiter>,
    pub(crate) share: Arc<Share>,
}

/// How long a queue has nothing to do unless something comes; `None`: for ever.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sleep {
    pub(crate) timeout: Option<Duration>,
}

/// A queue's state.
pub(crate) struct Worker {
    disk: Arc<Disk>,
    ring: Ring,
    orders: Receiver<QueueOrder>,
    stopping: bool,
    /// Kicks are asked for.
    armed: bool,
    backend: Backend,
    /// Everything is done as it is begun, without a slot.
    null: bool,
    limits: Limits,
    /// Longest chain that is a request, in descriptors.
    descriptors: u16,
    /// Requests by head.
    slots: Vec<Slot>,
    /// Reads may be copied from where the image is mapped.
    mapped: bool,
    /// Requests taken, none of whose transfers has begun: empty between turns.
    begun: Vec<u16>,
    /// Filled by the next pop.
    spare: Chain,
    /// Filled with the ranges that are to be erased.
    spare_ranges: Vec<Range>,
    /// Requests with a slot.
    active: u16,
    /// Requests whose transfer found no room, or has to leave it to another disk's.
    full: VecDeque<u16>,
    /// Some transfers that have begun are not handed over yet.
    left: bool,
    /// What is under way at the storage: the slots' [`cost`].
    under_way: u32,
    /// Cost of the answers not yet shown to the driver.
    unpublished: u32,
    /// What a write is now.
    write: Op,
    /// Requests under way that take the storage long: flushes, and those that erase.
    slow: u16,
    tap: Tap,
    throttled: Option<Throttled>,
    meter: Meter,
}

impl Worker {
    pub(crate) fn new(
        disk: Arc<Disk>,
        mut ring: Ring,
        orders: Receiver<QueueOrder>,
        mut backend: Backend,
    ) -> Self {
        let null = matches!(disk.store, Store::Null(_));
        let mapped = disk.store.file().is_some_and(|image| !image.direct());
        if !null {
            ring.look_ahead();
        }
        backend.use_memory(ring.memory());
        let negotiated = |bit: u32| ring.features() & 1 << bit != 0;
        let erases = disk.store.erases();
        let limits = Limits {
            size_bytes: disk.config.size_bytes(),
            read_only: disk.store.read_only(),
            discard: erases.discard && negotiated(VIRTIO_BLK_F_DISCARD),
            write_zeroes: erases.write_zeroes && negotiated(VIRTIO_BLK_F_WRITE_ZEROES),
        };
        let size = if null { 0 } else { usize::from(ring.size()) };
        Self {
            descriptors: disk.config.segments() + 2,
            tap: disk.limiter.tap(),
            throttled: None,
            meter: Meter::new(size),
            disk,
            ring,
            orders,
            stopping: false,
            armed: true,
            backend,
            null,
            limits,
            slots: (0..size).map(|_| Slot::default()).collect(),
            mapped,
            begun: Vec::with_capacity(TOGETHER),
            spare: Chain::new(),
            spare_ranges: Vec::with_capacity(if null { 0 } else { MAX_RANGES }),
            active: 0,
            full: VecDeque::with_capacity(size),
            left: false,
            under_way: 0,
            unpublished: 0,
            write: Op::Write,
            slow: 0,
        }
    }

    pub(crate) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// One look at everything, without waiting. With `sleeps_next`, if it finds nothing and something is under way, a sleep
    /// follows.
    pub(crate) fn turn(&mut self, sleeps_next: bool) -> Progress {
        while !self.stopping && self.orders.pending() {
            match self.orders.take() {
                Order::Some(QueueOrder::Stop) | Order::Closed => self.stopping = true,
                Order::Some(QueueOrder::Limits) => {}
                Order::None => break,
            }
        }
        if self.armed {
            self.armed = false;
            self.ring.disable_kicks();
        }
        if self.ring.memory_changed() {
            // What the front-end removed is unmapped when nothing keeps it.
            self.backend.use_memory(self.ring.memory());
            self.spare.clear();
            self.slots.iter_mut().filter(|s| !s.active).for_each(|s| s.chain.clear());
        }
        let completed = self.take_completions();
        let taken = self.take_requests();
        // A request alone is left to the sleep's system call if nothing more comes: one call for it instead of two. Among others
        // that is not worth a delay.
        let leave = sleeps_next && self.active == 1 && !(self.left && (completed || taken));
        match self.backend.poll(leave) {
            Ok(left) => self.left = left,
            Err(e) => self.lost(&e),
        }
        self.publish();
        self.meter.settle(&self.ring);
        let kicks = self.backend.kicks();
        if kicks > 0 {
            self.ring.counters().kicks.add(kicks);
        }
        let copied = self.backend.copied();
        if copied > 0 {
            self.ring.counters().copied.add(copied);
        }
        let registered = self.backend.registered_bytes();
        if registered != self.ring.counters().registered.get() {
            self.ring.counters().registered.set(registered);
        }
        if self.stopping && self.active == 0 && self.ring.recovered() == 0 {
            Progress::Ended
        } else if completed || taken {
            Progress::Worked
        } else {
            self.meter.idle();
            if self.throttled.is_some() {
                Progress::Throttled
            } else if self.active > 0 {
                Progress::Waiting
            } else {
                Progress::Idle
            }
        }
    }

    /// It makes no sense to look again rather than to sleep: nothing can come, or what is under way needs this CPU.
    pub(crate) fn should_sleep(&self) -> bool {
        self.ring.is_broken() || self.slow > 0
    }

    /// Asks for kicks. True if there is work already.
    pub(crate) fn ask_for_kicks(&mut self) -> bool {
        if self.stopping {
            return false;
        }
        self.armed = true;
        self.ring.enable_kicks() || self.orders.pending()
    }

    /// Prepares to sleep: asks for kicks. `None`: there may be work already.
    pub(crate) fn prepare_sleep(&mut self) -> Option<Sleep> {
        // If requests wait, the driver has nothing to tell.
        let left = self.throttled.map(|t| t.until.saturating_sub(clock::now()));
        let needless = match left {
            Some(left) => left == 0 || self.orders.pending(),
            None => self.ask_for_kicks(),
        };
        (!needless).then(|| Sleep { timeout: left.map(Duration::from_nanos) })
    }

    /// Waits until there may be work; false if there is some already.
    pub(crate) fn sleep(&mut self) -> bool {
        let Some(Sleep { timeout }) = self.prepare_sleep() else { return false };
        self.ring.counters().sleeps.add(1);
        if let Err(e) = self.backend.wait(timeout) {
            self.lost(&e);
        }
        true
    }

    /// What a thread with several queues waits for: it can be read when there is something for this one. `None`: the thread's ring.
    pub(crate) fn waits_on(&self) -> Option<BorrowedFd<'_>> {
        self.backend.waits_on()
    }

    /// That could be read.
    pub(crate) fn woken(&mut self) {
        if let Err(e) = self.backend.woken() {
            self.lost(&e);
        }
    }

    /// From now on nothing more is taken.
    pub(crate) fn order_stop(&mut self) {
        self.stopping = true;
    }

    /// Gives the ring back, after [`Progress::Ended`].
    pub(crate) fn end(self) -> RingState {
        self.ring.counters().registered.set(0);
        self.ring.stop()
    }

    /// Nothing more can be known about what is in flight, so its memory must not be given up: the process dies, is started
    /// again, and does it again.
    pub(crate) fn lost(&self, e: &io::Error) -> ! {
        error!("queue {}: cannot wait for I/O: {e}", self.ring.index());
        std::process::abort();
    }

    /// Takes what waits in the ring; when stopping, only what a predecessor left. True if there was something.
    fn take_requests(&mut self) -> bool {
        if self.throttled.is_some() || self.tap.throttle().is_some() {
            return self.take_as_allowed();
        }
        let mut taken = 0;
        while taken < MAX_TAKEN && self.may_take() && self.pop() {
            if taken == 0 {
                self.begin_batch();
            }
            taken += 1;
            self.begin();
            // Requests may take long here, one after the other.
            if !self.stopping && self.orders.pending() {
                break;
            }
        }
        self.go_on_with_begun();
        taken > 0
    }

    fn may_take(&self) -> bool {
        !self.stopping || self.ring.recovered() > 0
    }

    /// Takes the next request into `spare`.
    fn pop(&mut self) -> bool {
        match self.ring.pop(&mut self.spare) {
            Ok(popped) => popped,
            Err(e) => {
                warn!("queue {} is broken: {e}", self.ring.index());
                false
            }
        }
    }

    /// Looks at what is the same for all requests taken in one go.
    fn begin_batch(&mut self) {
        let now = self.meter.begin();
        if !self.null {
            self.disk.share.busy(now);
            self.limits.size_bytes = self.disk.config.size_bytes();
            let through = self.disk.config.write_through(self.ring.features());
            self.write = if through { Op::WriteThrough } else { Op::Write };
        }
    }

    /// Begins the request in `spare`.
    fn begin(&mut self) {
        let parsed = if self.spare.descriptors() > self.descriptors && self.spare.writable_len() > 0 {
            Ok(Request::Done(Status::IoError))
        } else {
            parse(&self.spare, self.limits, &mut self.spare_ranges)
        };
        let (op, offset, length) = match parsed {
            Ok(Request::Read { offset, length }) => (Op::Read, offset, length),
            Ok(Request::Write { offset, length }) => (self.write, offset, length),
            Ok(Request::Flush) => (Op::Sync, 0, 0),
            Ok(Request::Erase) => return self.begin_erase(),
            Ok(Request::GetId) => {
                let room = self.spare.writable_len() as usize - 1;
                let written = self.spare.write_at(0, &self.disk.serial[..room.min(ID_BYTES)]);
                return self.answer_spare(Status::Ok, None, written as u32);
            }
            Ok(Request::Done(status)) => return self.answer_spare(status, None, 0),
            Err(NoStatus) => {
                let head = self.spare.head();
                self.ring.push(head, 0);
                self.unpublished += 1;
                let error = RingError::Request(format!("request {head} has no room for a status"));
                warn!("queue {} is broken: {error}", self.ring.index());
                return self.ring.fail(&error);
            }
        };
        if self.null {
            let written = if op == Op::Read { length } else { 0 };
            return self.answer_spare(Status::Ok, Some((op, length)), written);
        }
        let head = self.spare.head();
        let slot = &mut self.slots[usize::from(head)];
        // The slot's old chain becomes the next spare: no allocation.
        std::mem::swap(&mut slot.chain, &mut self.spare);
        slot.begin(op, offset, length, self.disk.store.geometry());
        self.active += 1;
        self.slow += u16::from(op.is_slow());
        self.meter.taken(head);
        if self.mapped
            && op == Op::Read
            && let Some(place) = self.disk.store.place(offset)
        {
            self.backend.expect_read(place);
        }
        self.begun.push(head);
        if self.begun.len() == TOGETHER {
            self.go_on_with_begun();
        }
    }

    /// Begins the first transfers of what has just been taken.
    fn go_on_with_begun(&mut self) {
        for at in 0..self.begun.len() {
            self.go_on(self.begun[at]);
        }
        self.begun.clear();
    }

    /// Begins the request in `spare` and `spare_ranges`.
    fn begin_erase(&mut self) {
        let head = self.spare.head();
        let slot = &mut self.slots[usize::from(head)];
        std::mem::swap(&mut slot.chain, &mut self.spare);
        std::mem::swap(&mut slot.erasing.ranges, &mut self.spare_ranges);
        let more = slot.begin_erase(self.write == Op::WriteThrough, &self.disk.store);
        self.active += 1;
        self.slow += 1;
        self.meter.taken(head);
        if more { self.go_on(head) } else { self.finish(head, Status::Ok) }
    }

    /// Begins the next transfer of a request, and those after it as far as they end at once.
    fn go_on(&mut self, head: u16) {
        loop {
            if !self.disk.share.allows(self.under_way) {
                return self.full.push_back(head);
            }
            let most = self.disk.share.most_bytes();
            let slot = &mut self.slots[usize::from(head)];
            slot.cost = cost(slot.left().min(most));
            // SAFETY: the slot keeps its iovecs and the chain they point into until the completion comes back; slots are
            // dropped only when none is active (`BlockQueue` sees to it), or with the whole process.
            match unsafe { self.backend.begin(head, &slot.transfer(&self.disk.store, most)) } {
                Begun::Done(result) => {
                    let copied = result.max(0).unsigned_abs() >> STEP_BYTES_LOG2;
                    self.unpublished = self.unpublished.saturating_add(copied);
                    if !self.moved(head, result) {
                        return;
                    }
                }
                Begun::Pending => {
                    let cost = self.slots[usize::from(head)].cost;
                    return self.set_under_way(self.under_way + cost);
                }
                Begun::Full => return self.full.push_back(head),
            }
        }
    }

    /// Takes completions and answers what is done. True if there were any.
    fn take_completions(&mut self) -> bool {
        if self.active == 0 && self.null {
            return false;
        }
        let mut any = false;
        while let Some((head, result)) = self.backend.completion() {
            if !any {
                self.meter.begin();
            }
            any = true;
            let cost = self.slots[usize::from(head)].cost;
            self.set_under_way(self.under_way.saturating_sub(cost));
            if self.disk.share.is_bounded() {
                self.disk.share.answered(self.ring.index(), cost, self.meter.since_taken(head));
            }
            if self.moved(head, result) {
                self.go_on(head);
            }
        }
        // Those that find no room again go to the end.
        for _ in 0..self.full.len() {
            if !self.disk.share.allows(self.under_way) {
                break;
            }
            if let Some(head) = self.full.pop_front() {
                self.go_on(head);
            }
        }
        any
    }

    fn set_under_way(&mut self, under_way: u32) {
        self.under_way = under_way;
        self.disk.share.set(self.ring.index(), under_way);
    }

    /// A transfer ended with `result`. True if the request needs another.
    fn moved(&mut self, head: u16, result: i32) -> bool {
        let slot = &mut self.slots[usize::from(head)];
        if (result == -libc::EAGAIN || result == -libc::EINTR) && slot.retries < MAX_RETRIES {
            // It was not even begun.
            slot.retries += 1;
            return true;
        }
        if slot.erases() {
            match slot.erased(result, &self.disk.store) {
                Ok(false) => return true,
                Ok(true) => self.finish(head, Status::Ok),
                Err(errno) => {
                    self.report(head, &io::Error::from_raw_os_error(errno));
                    self.finish(head, Status::IoError);
                }
            }
        } else if result > 0 || (result == 0 && slot.op() == Op::Sync) {
            if !slot.advance(result.unsigned_abs(), self.disk.store.geometry()) {
                return true;
            }
            self.finish(head, Status::Ok);
        } else {
            // 0: the image ends before its end; somebody has cut it.
            let why = if result == 0 { libc::EIO } else { -result };
            self.report(head, &io::Error::from_raw_os_error(why));
            self.finish(head, Status::IoError);
        }
        false
    }

    /// Answers the request of a slot.
    fn finish(&mut self, head: u16, status: Status) {
        let slot = &mut self.slots[usize::from(head)];
        let written = if slot.op() == Op::Read { slot.moved() } else { 0 };
        let payload = Some((slot.op(), slot.length()));
        self.active -= 1;
        self.slow -= u16::from(slot.op().is_slow());
        self.meter.done(&self.ring, Kind::of(slot.op()), head, status);
        self.unpublished += 1;
        answer(&mut self.ring, &slot.chain, status, payload, written);
        slot.active = false;
        if !self.ring.is_current(&slot.chain) {
            slot.chain.clear();
        }
        if self.unpublished >= STEP {
            self.publish();
        }
    }

    /// Answers the request in `spare`.
    fn answer_spare(&mut self, status: Status, payload: Option<(Op, u32)>, written: u32) {
        let kind = payload.map_or(Kind::Other, |(op, _)| Kind::of(op));
        self.meter.done_at_once(&self.ring, kind, status);
        self.unpublished += 1;
        answer(&mut self.ring, &self.spare, status, payload, written);
        if self.unpublished >= STEP {
            self.publish();
        }
    }

    /// Shows answers to the driver.
    fn publish(&mut self) {
        if self.unpublished > 0 {
            self.unpublished = 0;
            self.ring.publish();
            // Without storage that would cost more than the requests.
            if !self.null {
                self.meter.settle(&self.ring);
            }
        }
    }

    /// Logs a failed transfer; ever more rarely if there are many.
    fn report(&self, head: u16, e: &io::Error) {
        let before = self.ring.counters().errors.get();
        if (before + 1).is_power_of_two() {
            let slot = &self.slots[usize::from(head)];
            let (op, offset) = (slot.op(), slot.next_offset());
            error!(
                "queue {}: {op:?} at byte {offset} failed: {e} ({before} errors before)",
                self.ring.index()
            );
        }
    }
}
