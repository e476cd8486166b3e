//! A queue's thread: takes requests from its ring, has them done, and answers.

mod bounce;
mod slot;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use offload_card::poll::{Order, Receiver};
use offload_card::{Chain, Ring, RingError, RingState};
use tracing::{error, warn};

use crate::config::Config;
use crate::image::Image;
use crate::io::{Backend, Completion, Op, SyncBackend, Transfer, UringBackend, Wakers};
use crate::request::{ID_BYTES, Limits, NoStatus, Request, Status, parse};
use bounce::Pool;
use slot::Slot;

/// Orders to a queue's thread.
#[derive(Debug)]
pub(crate) struct Stop;

/// Which way of doing I/O to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum IoEngine {
    /// io_uring where the host permits it, system calls otherwise.
    #[default]
    Auto,
    /// io_uring, and an error if it is not permitted.
    IoUring,
    /// One system call per request.
    Sync,
}

/// What the queues of a disk have in common. None of it is locked or written in the data path.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) image: Arc<Image>,
    pub(crate) config: Config,
    pub(crate) serial: [u8; ID_BYTES],
    pub(crate) engine: IoEngine,
}

/// Serves `ring` until told to stop; the thread's main function.
pub(crate) fn serve(disk: &Disk, ring: Ring, orders: Receiver<Stop>) -> RingState {
    let wakers = || -> io::Result<Wakers> {
        Ok(Wakers { kick: ring.kick().try_clone()?, orders: orders.event().try_clone()? })
    };
    let depth = ring.size();
    let uring = || wakers().and_then(|w| UringBackend::new(disk.image.clone(), w, depth));
    let sync = || wakers().and_then(|w| SyncBackend::new(disk.image.clone(), w, depth));
    let (index, fail) = (ring.index(), |why: &io::Error| format!("no I/O is possible: {why}"));
    let uring = if disk.engine == IoEngine::Sync { None } else { Some(uring()) };
    match uring {
        Some(Ok(backend)) => Worker::new(disk, ring, orders, backend).run(),
        Some(Err(e)) if disk.engine == IoEngine::IoUring => idle(ring, &orders, fail(&e)),
        other => {
            if let Some(Err(e)) = other {
                warn!(
                    "queue {index}: io_uring is not available ({e}); falling back to system calls, which is slower"
                );
            }
            match sync() {
                Ok(backend) => Worker::new(disk, ring, orders, backend).run(),
                Err(e) => idle(ring, &orders, fail(&e)),
            }
        }
    }
}

/// Breaks the ring and waits to be told to stop.
fn idle(mut ring: Ring, orders: &Receiver<Stop>, why: String) -> RingState {
    error!("queue {}: {why}", ring.index());
    ring.fail(&RingError::Request(why));
    orders.wait();
    ring.stop()
}

struct Worker<'a, B> {
    disk: &'a Disk,
    ring: Ring,
    orders: Receiver<Stop>,
    backend: B,
    limits: Limits,
    /// Requests by head.
    slots: Vec<Slot>,
    /// Filled by the next pop.
    spare: Chain,
    /// Requests with a slot.
    active: u16,
    bounce: Pool,
    /// Requests that need a bounce buffer when there is none.
    waiting: VecDeque<u16>,
    done: Vec<Completion>,
    write: Op,
}

impl<'a, B: Backend> Worker<'a, B> {
    fn new(disk: &'a Disk, ring: Ring, orders: Receiver<Stop>, backend: B) -> Self {
        let size = usize::from(ring.size());
        let limits =
            Limits { size_bytes: disk.image.geometry().size_bytes, read_only: disk.image.read_only() };
        Self {
            disk,
            ring,
            orders,
            backend,
            limits,
            slots: (0..size).map(|_| Slot::default()).collect(),
            spare: Chain::new(),
            active: 0,
            bounce: Pool::default(),
            waiting: VecDeque::with_capacity(size),
            done: Vec::with_capacity(size),
            write: Op::Write,
        }
    }

    fn run(mut self) -> RingState {
        let mut stopping = false;
        loop {
            stopping |= !matches!(self.orders.take(), Order::None);
            self.take_requests(stopping);
            self.ring.publish();
            if stopping && self.active == 0 {
                return self.ring.stop();
            }
            if !stopping && self.ring.enable_kicks() {
                continue;
            }
            match self.backend.wait() {
                Ok(kicks) => self.ring.counters().kicks.add(kicks),
                Err(e) => {
                    // Nothing more can be known about what is in flight, so its memory must not be given up: the process
                    // dies, is started again, and does it again.
                    error!("queue {}: cannot wait for I/O: {e}", self.ring.index());
                    std::process::abort();
                }
            }
            self.complete();
        }
    }

    /// Takes what waits in the ring; when stopping, only what a predecessor left.
    fn take_requests(&mut self, stopping: bool) {
        if stopping && self.ring.recovered() == 0 {
            return;
        }
        self.ring.disable_kicks();
        let features = self.ring.features();
        self.write = if self.disk.config.write_through(features) { Op::WriteThrough } else { Op::Write };
        while !stopping || self.ring.recovered() > 0 {
            match self.ring.pop(&mut self.spare) {
                Ok(true) => self.begin(),
                Ok(false) => break,
                Err(e) => {
                    warn!("queue {} is broken: {e}", self.ring.index());
                    break;
                }
            }
        }
    }

    /// Begins the request in `spare`.
    fn begin(&mut self) {
        let head = self.spare.head();
        let parsed = parse(&self.spare, self.limits);
        let alignment = self.disk.image.geometry().memory_alignment;
        let slot = &mut self.slots[usize::from(head)];
        // The slot's old chain becomes the next spare: no allocation.
        std::mem::swap(&mut slot.chain, &mut self.spare);
        self.active += 1;
        match parsed {
            Ok(Request::Read { offset, length }) => {
                slot.begin(Op::Read, offset, length, alignment);
                self.go_on(head);
            }
            Ok(Request::Write { offset, length }) => {
                slot.begin(self.write, offset, length, alignment);
                self.go_on(head);
            }
            Ok(Request::Flush) => {
                slot.begin(Op::Sync, 0, 0, 1);
                self.go_on(head);
            }
            Ok(Request::GetId) => {
                let room = slot.chain.writable_len() as usize - 1;
                let serial = &self.disk.serial[..room.min(ID_BYTES)];
                slot.chain.write_at(0, serial);
                self.finish(head, Status::Ok);
            }
            Ok(Request::Done(status)) => self.finish(head, status),
            Err(NoStatus) => {
                self.active -= 1;
                self.ring.push(head, 0);
                let error = RingError::Request(format!("request {head} has no room for a status"));
                warn!("queue {} is broken: {error}", self.ring.index());
                self.ring.fail(&error);
            }
        }
    }

    /// Begins the next transfer of a request.
    fn go_on(&mut self, head: u16) {
        let slot = &mut self.slots[usize::from(head)];
        if slot.needs_bounce() {
            let Some(buffer) = slot.bounce.take().or_else(|| self.bounce.take()) else {
                self.waiting.push_back(head);
                return;
            };
            slot.fill_bounce(buffer);
        }
        let transfer = Transfer { op: slot.op(), offset: slot.next_offset(), iovecs: slot.next_iovecs() };
        // SAFETY: the slot keeps its iovecs and the chain or the bounce buffer they point into until the completion comes
        // back; slots are dropped only when none is active, or with the whole process.
        unsafe { self.backend.submit(head, &transfer) };
    }

    /// Takes completions and answers what is done.
    fn complete(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.backend.completions(&mut done);
        for (head, result) in done.drain(..) {
            let slot = &mut self.slots[usize::from(head)];
            match result {
                // It was not even begun.
                _ if result == -libc::EAGAIN || result == -libc::EINTR => self.go_on(head),
                moved if moved > 0 || (moved == 0 && slot.op() == Op::Sync) => {
                    if slot.advance(moved.unsigned_abs()) {
                        self.finish(head, Status::Ok);
                    } else {
                        self.go_on(head);
                    }
                }
                failed => {
                    // 0: the image ends before its end; somebody has cut it.
                    let why = if failed == 0 { libc::EIO } else { -failed };
                    self.report(head, &io::Error::from_raw_os_error(why));
                    self.finish(head, Status::IoError);
                }
            }
        }
        self.done = done;
        self.ring.publish();
    }

    /// Answers a request.
    fn finish(&mut self, head: u16, status: Status) {
        let slot = &mut self.slots[usize::from(head)];
        let counters = self.ring.counters();
        match (status, slot.op()) {
            (Status::Ok, Op::Read) => counters.bytes_in.add(u64::from(slot.length())),
            (Status::Ok, Op::Write | Op::WriteThrough) => counters.bytes_out.add(u64::from(slot.length())),
            (Status::Ok, Op::Sync) => {}
            (Status::IoError | Status::Unsupported, _) => counters.errors.add(1),
        }
        let written = slot.chain.writable_len();
        slot.chain.write_at(written.saturating_sub(1) as usize, &[status.byte()]);
        let freed = slot.end();
        self.active -= 1;
        self.ring.push(head, written);
        if let Some(buffer) = freed {
            self.bounce.put(buffer);
            if let Some(next) = self.waiting.pop_front() {
                self.go_on(next);
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
