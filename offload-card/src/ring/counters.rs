//! Counters of one queue.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use proto::v1;

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

    /// Makes it `n`.
    pub fn set(&self, n: u64) {
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
    /// Bytes that the card's own instructions copied to or from guest memory, or kept for later, once for each time.
    pub copied: Counter,
    /// Bytes of guest memory that are registered with the kernel for this queue's transfers, now.
    pub registered: Counter,
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
    /// Batches of answers shown to the driver, by their size's power of two: 1, 2 to 3, 4 to 7, ...
    pub batches: [Counter; 16],
    /// Times that polling found work.
    pub poll_hits: Counter,
    /// Times that the thread slept.
    pub sleeps: Counter,
    /// Times that requests were waiting and the device's limits did not allow the next one.
    pub throttled: Counter,
    /// How long in all, in nanoseconds.
    pub throttled_ns: Counter,
    operations: OnceLock<Box<[Operation]>>,
}

impl QueueCounters {
    /// Counters of the kinds of requests that the engine knows; `names` are the same for all queues of a device, always.
    pub fn operations(&self, names: &[&'static str]) -> &[Operation] {
        self.operations.get_or_init(|| names.iter().map(|name| Operation::new(name)).collect())
    }

    /// A batch of `answers` has been shown to the driver.
    pub(super) fn batch(&self, answers: u16) {
        // 15 for 32768, the largest ring.
        if let Some(counter) = answers.checked_ilog2().and_then(|log| self.batches.get(log as usize)) {
            counter.add(1);
        }
    }

    /// All of them, for the outside.
    pub fn message(&self, index: u32) -> v1::QueueStats {
        let batches = (1..).zip(&self.batches).map(|(log, count)| (1 << log, count.get()));
        let batch_sizes: Vec<_> = buckets(batches);
        v1::QueueStats {
            index,
            requests: self.requests.get(),
            bytes_in: self.bytes_in.get(),
            bytes_out: self.bytes_out.get(),
            bytes_copied: self.copied.get(),
            bytes_registered: self.registered.get(),
            errors: self.errors.get(),
            dropped: self.dropped.get(),
            kicks: self.kicks.get(),
            calls: self.calls.get(),
            in_flight: self.in_flight.get(),
            resubmitted: self.resubmitted.get(),
            batches: batch_sizes.iter().map(|b| b.count).sum(),
            poll_hits: self.poll_hits.get(),
            sleeps: self.sleeps.get(),
            throttled: self.throttled.get(),
            throttled_ns: self.throttled_ns.get(),
            batch_sizes,
            operations: self.operations.get().into_iter().flatten().map(Operation::message).collect(),
        }
    }
}

/// Those that have counted something, as exclusive upper bounds and counts.
fn buckets(all: impl Iterator<Item = (u64, u64)>) -> Vec<v1::Bucket> {
    all.filter(|(_, count)| *count > 0).map(|(below, count)| v1::Bucket { below, count }).collect()
}

/// Requests of one kind.
#[derive(Debug)]
pub struct Operation {
    name: &'static str,
    /// Answered with an error.
    pub errors: Counter,
    /// From when a request was taken to when it was answered, in nanoseconds.
    pub latency: Histogram,
}

impl Operation {
    fn new(name: &'static str) -> Self {
        Self { name, errors: Counter::default(), latency: Histogram::default() }
    }

    fn message(&self) -> v1::OperationStats {
        v1::OperationStats {
            name: self.name.into(),
            errors: self.errors.get(),
            latency_sum_ns: self.latency.sum.get(),
            latency_ns: buckets((0..BUCKETS).map(|i| (below(i), self.latency.buckets[i].get()))),
        }
    }
}

/// Values below this many nanoseconds are one bucket, as a power of two.
const UNIT_LOG2: u32 = 6;
/// Buckets of an octave, as a power of two: a value is told from one a quarter larger.
const STEPS_LOG2: u32 = 2;
const STEPS: usize = 1 << STEPS_LOG2;
/// Up to 34 s; what is longer is in the last one.
const BUCKETS: usize = 112;

/// How long things took: counts in buckets whose width grows with the value. One writer, as [`Counter`].
#[derive(Debug)]
pub struct Histogram {
    sum: Counter,
    buckets: [Counter; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Self { sum: Counter::default(), buckets: std::array::from_fn(|_| Counter::default()) }
    }
}

impl Histogram {
    /// `count` things took so many nanoseconds each.
    #[inline]
    pub fn add(&self, nanoseconds: u64, count: u64) {
        self.buckets[bucket(nanoseconds)].add(count);
        self.sum.add(nanoseconds.wrapping_mul(count));
    }
}

/// Where a value is counted.
#[inline]
fn bucket(nanoseconds: u64) -> usize {
    let units = nanoseconds >> UNIT_LOG2;
    // The first octave with all its steps is the one of `STEPS`; below that, each unit has its own.
    let shift = (units | STEPS as u64).ilog2() - STEPS_LOG2;
    let step = (units >> shift) as usize;
    (shift as usize * STEPS + step).min(BUCKETS - 1)
}

/// The value from which on another bucket counts.
fn below(bucket: usize) -> u64 {
    if bucket == BUCKETS - 1 {
        return u64::MAX;
    }
    let shift = (bucket / STEPS).saturating_sub(1);
    let step = bucket - shift * STEPS + 1;
    (step as u64) << shift << UNIT_LOG2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_has_the_values_below_its_bound_and_a_quarter_is_told_apart() {
        let mut lower = 0;
        for i in 0..BUCKETS {
            assert_eq!((bucket(lower), bucket(below(i) - 1)), (i, i));
            if lower > 4 << UNIT_LOG2 && i < BUCKETS - 1 {
                assert!(below(i) - lower <= lower / 4, "{lower} {}", below(i));
            }
            lower = below(i);
        }
        assert_eq!((bucket(u64::MAX), below(BUCKETS - 2)), (BUCKETS - 1, 7 << 32));
    }

    #[test]
    fn what_is_shown_is_what_was_counted() {
        let counters = QueueCounters::default();
        counters.batch(1);
        counters.batch(3);
        counters.batch(32_768);
        counters.operations(&["read", "write"])[1].latency.add(100, 7);
        counters.operations(&["read", "write"])[1].errors.add(2);
        let message = counters.message(3);
        let bucket = |below, count| v1::Bucket { below, count };
        assert_eq!((message.index, message.batches), (3, 3));
        assert_eq!(message.batch_sizes, [bucket(2, 1), bucket(4, 1), bucket(65_536, 1)]);
        assert_eq!(
            (message.operations[0].name.as_str(), message.operations[0].latency_ns.len()),
            ("read", 0)
        );
        let write = &message.operations[1];
        assert_eq!((write.errors, write.latency_sum_ns), (2, 700));
        assert_eq!(write.latency_ns, [bucket(128, 7)]);
    }
}
