//! How much heavy disks may have in flight beside light ones.

use std::ops::AddAssign;

use super::DEEP;

/// As much is in flight at least, if it is wanted.
const LEAST: u32 = 1;
/// So many answers are an observation.
const ENOUGH: u64 = 32;
/// After so long it is noted anew what light disks' requests take at the smallest depth: the storage's other users, and what
/// the disks do, change. In nanoseconds.
const LEARN_AGAIN_NS: u64 = 5_000_000_000;
/// "Hardly longer": by one part in so many. A fifth is what a victim is to notice of a flood at most.
const TOLERANCE: u64 = 8;
/// After a depth was found too deep, so many observations pass before a larger one is tried again. There are a hundred per second at
/// most, and an attempt in vain lasts for one: less than one request in a hundred meets it, so that the 99th percentile does not
/// show it.
const PAUSE: u32 = 200;

/// What requests took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Latency {
    pub(super) answers: u64,
    /// All of them together.
    pub(super) ns: u64,
}

impl AddAssign for Latency {
    fn add_assign(&mut self, more: Self) {
        self.answers = self.answers.saturating_add(more.answers);
        self.ns = self.ns.saturating_add(more.ns);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// There are no two kinds of disks.
    Off,
    /// What was begun at another depth is still coming back.
    Settling,
    /// What comes back now is what it takes at the smallest depth.
    Learning,
    /// The depth follows; a request takes so long at the smallest.
    Following { base_ns: u64 },
}

/// A depth that follows the latency of those that are not to suffer from it.
#[derive(Debug)]
pub(super) struct Depth {
    depth: u32,
    phase: Phase,
    seen: Latency,
    learn_again_at: u64,
    /// Observations until a larger depth may be tried.
    pause: u32,
}

impl Default for Depth {
    fn default() -> Self {
        Self { depth: LEAST, phase: Phase::Off, seen: Latency::default(), learn_again_at: 0, pause: 0 }
    }
}

impl Depth {
    /// The depth from `now` on, when light disks' requests have taken so long since this was last asked.
    pub(super) fn follow(&mut self, now: u64, latency: Latency) -> u32 {
        if self.phase == Phase::Off || now >= self.learn_again_at {
            *self = Self {
                depth: LEAST,
                phase: Phase::Settling,
                seen: Latency::default(),
                learn_again_at: now.saturating_add(LEARN_AGAIN_NS),
                pause: 0,
            };
            return self.depth;
        }
        self.seen += latency;
        if self.seen.answers < ENOUGH {
            return self.depth;
        }
        let Latency { answers, ns } = std::mem::take(&mut self.seen);
        let mean = ns / answers;
        self.phase = match self.phase {
            Phase::Off | Phase::Settling => Phase::Learning,
            Phase::Learning => Phase::Following { base_ns: mean },
            Phase::Following { base_ns } => {
                self.adapt(mean > base_ns.saturating_add(base_ns / TOLERANCE));
                self.phase
            }
        };
        self.depth
    }

    fn adapt(&mut self, too_long: bool) {
        if too_long {
            self.depth = (self.depth - self.depth.div_ceil(4)).max(LEAST);
            self.pause = PAUSE;
        } else if self.pause > 0 {
            self.pause -= 1;
        } else {
            self.depth = (self.depth + self.depth.div_ceil(8)).min(DEEP);
        }
    }

    /// There is nobody to follow.
    pub(super) fn forget(&mut self) -> u32 {
        self.phase = Phase::Off;
        DEEP
    }
}
