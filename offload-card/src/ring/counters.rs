//! Counters of one queue.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer, the queue's thread, and any number of readers.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owner of the ring may: a plain load and store is enough then, and costs no locked instruction.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }
}

/// What happened on a queue since the device was created. They survive a ring's restart. The ring itself counts
/// requests, kicks, calls, in flight and resubmitted; the engine counts the rest.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Descriptor chains taken.
    pub requests: Counter,
    /// Payload bytes written into guest memory.
    pub bytes_in: Counter,
    /// Payload bytes read from guest memory.
    pub bytes_out: Counter,
    /// Requests answered with an error.
    pub errors: Counter,
    /// Frames dropped.
    pub dropped: Counter,
    /// Notifications from the driver: the engine counts a wake-up by the kick descriptor as one.
    pub kicks: Counter,
    /// Interrupts to the driver.
    pub calls: Counter,
    /// Chains taken and not yet returned, now.
    pub in_flight: Counter,
    /// Chains found in the inflight area after a crash and done again.
    pub resubmitted: Counter,
    /// Batches of answers shown to the driver.
    pub batches: Counter,
    /// Times that polling found work.
    pub poll_hits: Counter,
    /// Times that the thread slept.
    pub sleeps: Counter,
}
