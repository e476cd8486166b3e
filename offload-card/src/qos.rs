//! Limits of what a device does per second.
//!
//! A token bucket per limit, kept as one number: the time at which the bucket is empty (was, or will be, if it is in
//! debt). Tokens flow in because time passes, so nothing has to be filled by a tick, and the moment at which the next
//! request may go is known exactly.
//!
//! ```text
//!          now - depth          empty              now                      empty'
//!   ───────────┼─────────────────┼──────────────────┼─────────────────────────┼──────► time
//!              │                 │←─── tokens ─────→│←──── debt of a big ─────→│
//!              │←──── most: the burst ─────────────→│       request: all wait until then
//! ```
//!
//! A request goes as soon as there is one token, and takes what it costs: the bucket may owe, so a request larger than the
//! burst passes, and every byte is paid for. In any time `t` a device does no more than `rate * t + burst`, and the last
//! request of each of its queues beyond that; a device that always has requests does no less than `rate * t`, less
//! one request, as long as its threads are not late by more than the burst's worth of time.
//!
//! The queues of a device share its buckets without a lock ([`Throttle`]). New limits are a new throttle, which takes over
//! what the old one had or owed; queues notice by a counter ([`Limiter`], [`Tap`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use proto::error::Error;
use proto::limits::MAX_BURST_SECONDS;
use proto::v1::{self, DeviceLimits};

use crate::clock;

/// Ticks of a nanosecond, as a power of two: what a request costs is rounded up to ticks. 64 bits of them are 36 years.
const TICKS_LOG2: u32 = 4;
const TICKS_PER_SECOND: u64 = 1_000_000_000 << TICKS_LOG2;
/// Fraction bits of a token's cost.
const FRACTION: u32 = 24;
/// The clock begins with the boot, and a bucket may be full since before.
const EPOCH: u64 = MAX_BURST_SECONDS * TICKS_PER_SECOND;
/// Without another burst, this part of a second's worth: as much as a second may be off.
const DEFAULT_BURST: u64 = 100;
/// A rate, and what may be done at once after a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rate {
    per_second: u64,
    burst: u64,
}

/// What a device may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    operations: Option<Rate>,
    bytes: Option<Rate>,
}

impl Limits {
    /// As a request has them; absent: none.
    ///
    /// # Errors
    /// As [`DeviceLimits::check`].
    pub fn new(limits: Option<&DeviceLimits>) -> Result<Self, Error> {
        let Some(limits) = limits else { return Ok(Self::default()) };
        limits.check()?;
        Ok(Self {
            operations: rate(limits.operations_per_second, limits.operations_burst),
            bytes: rate(limits.bytes_per_second, limits.bytes_burst),
        })
    }

    /// There are none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// What a network device may do: its "operations" are packets, its "bytes" bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetLimits {
    /// From the guest.
    pub outgoing: Limits,
    /// To the guest.
    pub incoming: Limits,
}

impl NetLimits {
    /// As a request has them; absent: none.
    ///
    /// # Errors
    /// As [`v1::NetLimits::check`].
    pub fn new(limits: Option<&v1::NetLimits>) -> Result<Self, Error> {
        let Some(l) = limits else { return Ok(Self::default()) };
        l.check()?;
        Ok(Self {
            outgoing: Limits {
                operations: rate(l.packets_per_second_out, l.packets_burst_out),
                bytes: rate(l.bits_per_second_out, l.bits_burst_out),
            },
            incoming: Limits {
                operations: rate(l.packets_per_second_in, l.packets_burst_in),
                bytes: rate(l.bits_per_second_in, l.bits_burst_in),
            },
        })
    }

    /// There are none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

fn rate(per_second: u64, burst: u64) -> Option<Rate> {
    let burst = if burst == 0 { (per_second / DEFAULT_BURST).max(1) } else { burst };
    (per_second > 0).then_some(Rate { per_second, burst })
}

/// Time of a [`Bucket`], in ticks.
fn ticks(nanoseconds: u64) -> u64 {
    EPOCH.saturating_add(nanoseconds.saturating_mul(1 << TICKS_LOG2))
}

/// The nanosecond in or after which a time of a [`Bucket`] is.
fn nanoseconds(ticks: u64) -> u64 {
    ticks.saturating_sub(EPOCH).div_ceil(1 << TICKS_LOG2)
}

/// Tokens of one kind.
#[derive(Debug)]
struct Bucket {
    rate: Rate,
    /// Ticks of a token, with [`FRACTION`].
    token: u64,
    /// Ticks in which a burst's tokens come.
    depth: u64,
    /// Ticks of what must be there before a request goes.
    first: u64,
    /// When it is empty.
    empty: AtomicU64,
}

impl Bucket {
    /// One that has what `before` had or owed; full, if there was none.
    fn new(rate: Rate, before: Option<&Self>, now: u64) -> Self {
        let token = ((u128::from(TICKS_PER_SECOND) << FRACTION).div_ceil(u128::from(rate.per_second))) as u64;
        let mut bucket = Self { rate, token, depth: 0, first: 0, empty: AtomicU64::new(0) };
        bucket.depth = bucket.cost(rate.burst);
        bucket.first = bucket.cost(1);
        let empty = match before.map(|b| (b, b.empty.load(Ordering::Relaxed))) {
            None => now.saturating_sub(bucket.depth),
            Some((b, empty)) if empty > now => now.saturating_add(bucket.cost(b.tokens(empty - now))),
            Some((b, empty)) => now.saturating_sub(bucket.cost(b.tokens((now - empty).min(b.depth)))),
        };
        bucket.empty = AtomicU64::new(empty);
        bucket
    }

    /// Ticks in which `tokens` come; rounded up, so that no rate is exceeded.
    fn cost(&self, tokens: u64) -> u64 {
        let exact = u128::from(tokens) * u128::from(self.token);
        u64::try_from(exact.div_ceil(1 << FRACTION)).unwrap_or(u64::MAX)
    }

    /// Tokens that come in `ticks`.
    fn tokens(&self, ticks: u64) -> u64 {
        u64::try_from((u128::from(ticks) << FRACTION) / u128::from(self.token)).unwrap_or(u64::MAX)
    }

    /// When there is, or was, a token.
    fn ready(&self) -> u64 {
        self.empty.load(Ordering::Relaxed).saturating_add(self.first)
    }

    /// Takes tokens, there or not.
    fn take(&self, tokens: u64, now: u64) {
        let (full, cost) = (now.saturating_sub(self.depth), self.cost(tokens));
        let spent = |empty: u64| Some(empty.max(full).saturating_add(cost));
        // It is a number by itself: nothing else is ordered by it.
        let _ = self.empty.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spent);
    }
}

/// Which tokens there are none of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Requests, packets.
    Operations,
    /// Bytes, bits.
    Bytes,
}

/// A request may not go now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Short {
    /// Because there are none of these.
    pub of: Kind,
    /// When it may: a time of [`clock::now`], in the future.
    pub until: u64,
}

/// A device's limits and what is left of them. Shared by its queues.
#[derive(Debug, Default)]
pub struct Throttle {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Throttle {
    /// The throttle that `limits` ask for at `now`, a time of [`clock::now`]; `None` if they ask for none. It has what
    /// `before` had or owed.
    pub fn new(limits: Limits, before: Option<&Self>, now: u64) -> Option<Self> {
        let bucket = |rate: Option<Rate>, before: Option<&Bucket>| {
            rate.map(|rate| Bucket::new(rate, before, ticks(now)))
        };
        let throttle = Self {
            operations: bucket(limits.operations, before.and_then(|b| b.operations.as_ref())),
            bytes: bucket(limits.bytes, before.and_then(|b| b.bytes.as_ref())),
        };
        (!limits.is_none()).then_some(throttle)
    }

    fn buckets(&self) -> impl Iterator<Item = &Bucket> {
        self.operations.iter().chain(&self.bytes)
    }

    /// When the next request may go: a time of [`clock::now`], perhaps past.
    pub fn ready(&self) -> u64 {
        nanoseconds(self.buckets().map(Bucket::ready).max().unwrap_or(0))
    }

    /// Which of them does not allow the next request at `now`; if both do not, the one that does so for longer.
    pub fn short(&self, now: u64) -> Option<Short> {
        let ready = |bucket: &Option<Bucket>| bucket.as_ref().map_or(0, Bucket::ready);
        let (operations, bytes) = (ready(&self.operations), ready(&self.bytes));
        let latest = operations.max(bytes);
        let of = if bytes >= operations { Kind::Bytes } else { Kind::Operations };
        (nanoseconds(latest) > now).then(|| Short { of, until: nanoseconds(latest) })
    }

    /// Nanoseconds that a request may go later than it might, and nothing is lost: while tokens fit into the buckets.
    pub fn slack(&self) -> u64 {
        self.buckets().map(|b| b.depth.saturating_sub(b.first) >> TICKS_LOG2).min().unwrap_or(0)
    }

    /// A request of so many bytes goes at `now`, a time of [`clock::now`].
    pub fn take(&self, bytes: u64, now: u64) {
        self.take_many(1, bytes, now);
    }

    /// So many requests go at `now`, of so many bytes together.
    pub fn take_many(&self, operations: u64, bytes: u64, now: u64) {
        if let Some(bucket) = &self.operations {
            bucket.take(operations, ticks(now));
        }
        if let Some(bucket) = &self.bytes {
            bucket.take(bytes, ticks(now));
        }
    }

    fn limits(&self) -> Limits {
        let rate = |bucket: &Option<Bucket>| bucket.as_ref().map(|b| b.rate);
        Limits { operations: rate(&self.operations), bytes: rate(&self.bytes) }
    }
}

/// A device's limits, which can be changed at any time.
#[derive(Debug, Default)]
pub struct Limiter {
    current: Mutex<Option<Arc<Throttle>>>,
    changes: AtomicU64,
}

impl Limiter {
    /// From now on there are these limits. What has been used of the old ones, in tokens, stays used, so that setting
    /// limits again and again gives nothing away. True if they are others than before; then whoever waits for
    /// [`Throttle::ready`] is to be woken.
    pub fn set(&self, limits: Limits) -> bool {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().map(|c| c.limits()).unwrap_or_default() == limits {
            return false;
        }
        *current = Throttle::new(limits, current.as_deref(), clock::now()).map(Arc::new);
        self.changes.fetch_add(1, Ordering::Release);
        true
    }

    /// A queue's view of them.
    pub fn tap(self: &Arc<Self>) -> Tap {
        // Not yet seen.
        Tap { limiter: self.clone(), seen: u64::MAX, throttle: None }
    }
}

/// A queue's view of a device's limits.
#[derive(Debug)]
pub struct Tap {
    limiter: Arc<Limiter>,
    seen: u64,
    throttle: Option<Arc<Throttle>>,
}

impl Tap {
    /// The limits that are in force now, if any are. Costs a load and a comparison when nothing has changed.
    #[inline]
    pub fn throttle(&mut self) -> Option<&Arc<Throttle>> {
        if self.limiter.changes.load(Ordering::Acquire) != self.seen {
            self.look();
        }
        self.throttle.as_ref()
    }

    #[cold]
    fn look(&mut self) {
        let current = self.limiter.current.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock the two go together.
        self.seen = self.limiter.changes.load(Ordering::Acquire);
        self.throttle.clone_from(&current);
    }
}

#[cfg(test)]
mod tests;
