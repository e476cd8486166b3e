//! How long requests take.
//!
//! The clock is not read per request: once when a batch of requests or of completions is taken, and once when answers are
//! shown to the driver. What was done at once, between two readings, is counted by kind, and a kind's requests of one
//! batch get one latency.

use offload_card::{Ring, clock};

use crate::io::Op;
use crate::request::Status;

/// A kind of request, as counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    /// DISCARD and WRITE_ZEROES.
    Erase,
    /// GET_ID, and what is refused.
    Other,
}

const KINDS: [Kind; 5] = [Kind::Read, Kind::Write, Kind::Flush, Kind::Erase, Kind::Other];
const NAMES: [&str; 5] = ["read", "write", "flush", "erase", "other"];

impl Kind {
    pub(super) fn of(op: Op) -> Self {
        match op {
            Op::Read => Self::Read,
            Op::Write | Op::WriteThrough => Self::Write,
            Op::Sync => Self::Flush,
            Op::Discard | Op::Punch | Op::Zero => Self::Erase,
        }
    }
}

/// A queue's clock, and what it has not timed yet.
pub(super) struct Meter {
    /// When it was read last.
    now: u64,
    /// That was just now.
    fresh: bool,
    /// Answered since then, of what was taken since then; by kind.
    untimed: [u32; KINDS.len()],
    /// When the request was taken, by head.
    taken: Vec<u64>,
}

impl Meter {
    /// For a queue with so many slots.
    pub(super) fn new(slots: usize) -> Self {
        Self { now: 0, fresh: false, untimed: [0; KINDS.len()], taken: vec![0; slots] }
    }

    /// A batch is being taken: now.
    pub(super) fn begin(&mut self) -> u64 {
        if !self.fresh {
            (self.now, self.fresh) = (clock::now(), true);
        }
        self.now
    }

    /// Nothing happens now.
    pub(super) fn idle(&mut self) {
        self.fresh = false;
    }

    /// The request of this head was taken.
    pub(super) fn taken(&mut self, head: u16) {
        self.taken[usize::from(head)] = self.now;
    }

    /// How long ago the request of this head was taken, in nanoseconds.
    pub(super) fn since_taken(&self, head: u16) -> u64 {
        self.now.saturating_sub(self.taken[usize::from(head)])
    }

    /// The request of this head is answered.
    pub(super) fn done(&mut self, ring: &Ring, kind: Kind, head: u16, status: Status) {
        let taken = self.taken[usize::from(head)];
        if taken == self.now {
            return self.done_at_once(ring, kind, status);
        }
        count_error(ring, kind, status);
        let operations = ring.counters().operations(&NAMES);
        operations[kind as usize].latency.add(self.now.saturating_sub(taken), 1);
    }

    /// A request that was taken since the clock was read is answered.
    pub(super) fn done_at_once(&mut self, ring: &Ring, kind: Kind, status: Status) {
        count_error(ring, kind, status);
        self.untimed[kind as usize] += 1;
    }

    /// Answers have been shown to the driver.
    pub(super) fn settle(&mut self, ring: &Ring) {
        if self.untimed == [0; KINDS.len()] {
            return;
        }
        let now = clock::now();
        let took = now.saturating_sub(self.now);
        for (count, operation) in self.untimed.iter_mut().zip(ring.counters().operations(&NAMES)) {
            if *count > 0 {
                operation.latency.add(took, u64::from(std::mem::take(count)));
            }
        }
        (self.now, self.fresh) = (now, true);
    }
}

fn count_error(ring: &Ring, kind: Kind, status: Status) {
    if status != Status::Ok {
        ring.counters().operations(&NAMES)[kind as usize].errors.add(1);
    }
}
