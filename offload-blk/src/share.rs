//! How disks that lie on one storage share it.
//!
//! What a request waits for in a storage that is busy is what was there before it: a guest that keeps a thousand requests
//! in flight makes its neighbour's next one wait for a thousand. So while several disks of a card are in use on one
//! storage, what each may have in flight there is bounded:
//!
//! | in use | each heavy disk's bound |
//! | --- | --- |
//! | one disk | none |
//! | heavy ones only | its part of [`DEEP`], the same each |
//! | heavy ones and light ones | its part of a depth from 1 to [`DEEP`], which follows the light ones' latency |
//!
//! A disk is **light** that never has more than [`LIGHT`] in flight, and wants no more. Its requests are to find the storage
//! nearly as if it were alone. How much of others' does no harm there, nobody knows beforehand: nothing on a disk with one
//! head, very much on an SSD with many channels. So the depth begins at 1, where it is noted how long the light disks' small
//! requests take, and grows from there for as long as they take hardly longer.
//!
//! What counts is bytes, not only requests ([`cost`]), and a bounded disk's large requests go to the storage in pieces no larger
//! than its bound ([`Share::most_bytes`]), so that nobody has more there by asking for more at a time. A bound is in what is in flight *now*,
//! with nothing to be saved up or owed: whoever is back after a pause has his part, and no more.
//!
//! Nobody waits for somebody else's completion: a queue with nothing in flight may always begin a request, and one that
//! may not begins the next when one of its own comes back. There is no lock: each queue counts for itself, and the sums are
//! taken, and the bounds set, a hundred times per second by whoever comes by.

use std::collections::HashMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError, Weak};

mod depth;

use depth::{Depth, Latency};

/// Most in flight at a storage that several disks use, as [`cost`] counts: 4 MiB, enough to keep an SSD busy.
pub(crate) const DEEP: u32 = 256;
/// A disk that has more in flight is a heavy one.
const LIGHT: u32 = 8;
/// Bytes that count as a request, as a power of two.
const REQUEST_BYTES_LOG2: u32 = 14;
/// A bounded disk's transfers are not larger than this many requests, whatever its bound: 128 KiB.
const MAX_PIECE: u32 = 8;
/// A disk is in use for so long after it had a request under way, in nanoseconds: a guest that thinks between its requests is
/// to find them as quick as one that does not.
const IN_USE_NS: u64 = 100_000_000;
/// How often bounds are set, in nanoseconds.
const RECOUNT_NS: u64 = 10_000_000;
/// The bound of a disk that has none.
const UNBOUNDED: u32 = u32::MAX;

/// A place where images lie, a file system or a block device: what disks have in common if a request of one may have to
/// wait for those of another.
#[derive(Debug, Default)]
pub struct Storage {
    shares: Mutex<Shares>,
    recount_at: AtomicU64,
}

#[derive(Debug, Default)]
struct Shares {
    all: Vec<Weak<Share>>,
    depth: Depth,
}

/// The storages of a card, by device number.
#[derive(Debug, Default)]
pub(crate) struct Storages(Mutex<HashMap<u64, Weak<Storage>>>);

impl Storages {
    /// Where the image at `path` lies. One that does not say shares with nobody, and neither does a disk without any.
    pub(crate) fn of(&self, path: &str) -> Arc<Storage> {
        match std::fs::metadata(path) {
            Ok(m) if m.file_type().is_block_device() => self.get(m.rdev()),
            Ok(m) => self.get(m.dev()),
            Err(_) => Arc::default(),
        }
    }

    /// The storage with this device number.
    fn get(&self, device: u64) -> Arc<Storage> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, storage| storage.strong_count() > 0);
        if let Some(storage) = all.get(&device).and_then(Weak::upgrade) {
            return storage;
        }
        let storage = Arc::default();
        all.insert(device, Arc::downgrade(&storage));
        storage
    }
}

impl Storage {
    /// The share of one more disk, which has so many queues.
    pub(crate) fn share(self: &Arc<Self>, queues: u16) -> Arc<Share> {
        let share = Arc::new(Share {
            storage: self.clone(),
            busy_at: AtomicU64::new(0),
            used_at: AtomicU64::new(0),
            bound: AtomicU32::new(UNBOUNDED),
            held: AtomicBool::new(false),
            heavy_at: AtomicU64::new(0),
            seen: [const { AtomicU64::new(0) }; 2],
            queues: (0..queues).map(|_| Queue::default()).collect(),
        });
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        shares.all.retain(|s| s.strong_count() > 0);
        shares.all.push(Arc::downgrade(&share));
        share
    }

    /// Looks who is in use, and sets everybody's bound.
    #[cold]
    fn recount(&self, now: u64) {
        self.recount_at.store(now + RECOUNT_NS, Ordering::Relaxed);
        let mut shares = match self.shares.try_lock() {
            Ok(shares) => shares,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            // Somebody else is at it.
            Err(TryLockError::WouldBlock) => return,
        };
        let Shares { all, depth } = &mut *shares;
        let (mut heavy, mut light, mut latency) = (0, 0, Latency::default());
        for share in all.iter().filter_map(Weak::upgrade) {
            let answers = share.look(now);
            if !share.is_in_use(now) {
                continue;
            }
            if share.is_heavy(now) {
                heavy += 1;
            } else {
                light += 1;
                latency += answers;
            }
        }
        let mixed = heavy > 0 && light > 0;
        let deep = if mixed { depth.follow(now, latency) } else { depth.forget() };
        for share in all.iter().filter_map(Weak::upgrade) {
            let bound = match (heavy, light) {
                (0 | 1, 0) | (0, 1) => UNBOUNDED,
                (0, _) => (DEEP / light).max(LIGHT),
                _ if share.is_heavy(now) => (deep / heavy).max(1),
                _ => LIGHT,
            };
            share.bound.store(bound, Ordering::Relaxed);
        }
    }
}

/// A queue's counts: on cache lines of their own, as they are written for every request.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Queue {
    in_flight: AtomicU32,
    /// The most since bounds were set last.
    peak: AtomicU32,
    /// Small requests that have come back from the storage while it was shared, and how long they took in all.
    answers: AtomicU64,
    answers_ns: AtomicU64,
}

/// A disk's part of a storage.
#[derive(Debug)]
pub(crate) struct Share {
    storage: Arc<Storage>,
    /// When a queue was busy last.
    busy_at: AtomicU64,
    /// When it was seen last that it has something under way: what the page cache answers at once is in nobody's way.
    used_at: AtomicU64,
    /// As much it may have in flight.
    bound: AtomicU32,
    /// It wanted more, since bounds were set last.
    held: AtomicBool,
    /// When it was seen to be heavy last, and what was seen of its answers; of use to whoever sets bounds.
    heavy_at: AtomicU64,
    seen: [AtomicU64; 2],
    queues: Box<[Queue]>,
}

impl Share {
    /// Queue `index` is busy at `now`: a time of [`offload_card::clock::now`]. To be called once per batch.
    pub(crate) fn busy(&self, now: u64) {
        let before = self.busy_at.load(Ordering::Relaxed);
        self.busy_at.store(now, Ordering::Relaxed);
        let back = now.saturating_sub(before) >= IN_USE_NS;
        if back {
            // What it wants is to come.
            self.used_at.store(now, Ordering::Relaxed);
        }
        if back || now >= self.storage.recount_at.load(Ordering::Relaxed) {
            self.storage.recount(now);
        }
    }

    /// Other disks are in use, too.
    #[inline]
    pub(crate) fn is_bounded(&self) -> bool {
        self.bound.load(Ordering::Relaxed) != UNBOUNDED
    }

    /// How large its next transfer may be.
    #[inline]
    pub(crate) fn most_bytes(&self) -> u32 {
        match self.bound.load(Ordering::Relaxed) {
            UNBOUNDED => u32::MAX,
            bound => bound.clamp(1, MAX_PIECE) << REQUEST_BYTES_LOG2,
        }
    }

    /// A queue that has `own` in flight may begin another request.
    #[inline]
    pub(crate) fn allows(&self, own: u32) -> bool {
        let bound = self.bound.load(Ordering::Relaxed);
        bound == UNBOUNDED || own == 0 || self.has_room(bound)
    }

    #[cold]
    fn has_room(&self, bound: u32) -> bool {
        let in_flight: u32 = self.queues.iter().map(|q| q.in_flight.load(Ordering::Relaxed)).sum();
        let room = in_flight < bound;
        if !room {
            self.held.store(true, Ordering::Relaxed);
        }
        room
    }

    /// Queue `index` has so much in flight now.
    #[inline]
    pub(crate) fn set(&self, index: u16, in_flight: u32) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            queue.in_flight.store(in_flight, Ordering::Relaxed);
            if in_flight > queue.peak.load(Ordering::Relaxed) {
                queue.peak.store(in_flight, Ordering::Relaxed);
            }
        }
    }

    /// A request of queue `index`, which counted as `cost`, is back after so many nanoseconds. To be called by the queue's
    /// thread only, while the disk is bounded.
    pub(crate) fn answered(&self, index: u16, cost: u32, took_ns: u64) {
        if cost == 1
            && let Some(queue) = self.queues.get(usize::from(index))
        {
            // Nobody else writes them.
            queue.answers.store(queue.answers.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            let sum = queue.answers_ns.load(Ordering::Relaxed).wrapping_add(took_ns);
            queue.answers_ns.store(sum, Ordering::Relaxed);
        }
    }

    fn is_in_use(&self, now: u64) -> bool {
        now.saturating_sub(self.used_at.load(Ordering::Relaxed)) < IN_USE_NS
    }

    /// It was heavy a moment ago: a guest that thinks between its floods is no other than one that does not.
    fn is_heavy(&self, now: u64) -> bool {
        let at = self.heavy_at.load(Ordering::Relaxed);
        at != 0 && now.saturating_sub(at) < IN_USE_NS
    }

    /// Notes what it was since this was last asked; what its small requests took since then.
    fn look(&self, now: u64) -> Latency {
        let mut peak = 0;
        let mut sums = [0u64; 2];
        for queue in &self.queues {
            peak += queue.peak.swap(queue.in_flight.load(Ordering::Relaxed), Ordering::Relaxed);
            sums[0] = sums[0].wrapping_add(queue.answers.load(Ordering::Relaxed));
            sums[1] = sums[1].wrapping_add(queue.answers_ns.load(Ordering::Relaxed));
        }
        if peak > 0 {
            self.used_at.store(now, Ordering::Relaxed);
        }
        if self.held.swap(false, Ordering::Relaxed) || peak > LIGHT {
            self.heavy_at.store(now, Ordering::Relaxed);
        }
        let since = |i: usize| sums[i].wrapping_sub(self.seen[i].swap(sums[i], Ordering::Relaxed));
        Latency { answers: since(0), ns: since(1) }
    }
}

/// What a request of `length` bytes counts as.
pub(crate) fn cost(length: u32) -> u32 {
    1 + (length.saturating_sub(1) >> REQUEST_BYTES_LOG2)
}

#[cfg(test)]
mod tests;
