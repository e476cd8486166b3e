//! How disks that lie on one storage share it.
//!
//! What a request waits for in a storage that is busy is what was there before it: a guest that keeps a thousand requests
//! in flight makes its neighbour's next one wait for a thousand. So while several disks of a card are in use on one
//! storage, they have [`DEPTH`] in flight there together, the same share each. A disk that is alone is not held back.
//!
//! Nobody waits for somebody else's completion: a queue with nothing in flight may always begin a request, and one that
//! may not begins the next when one of its own comes back. There is no lock: each queue counts for itself, and the sum is
//! taken only while the storage is shared.

use std::collections::HashMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError, Weak};

/// Requests in flight at a storage that several disks use; one of more than 64 KiB counts as several. Enough to
/// keep an SSD busy, and few enough for the next request to be soon.
const DEPTH: u32 = 64;
/// Bytes that count as a request, as a power of two.
const REQUEST_BYTES_LOG2: u32 = 16;
/// A disk is in use for so long after its last request began, in nanoseconds: a guest that thinks between its requests is
/// to find them as quick as one that does not.
const IN_USE_NS: u64 = 100_000_000;
/// How often it is looked whether disks are in use still, in nanoseconds.
const RECOUNT_NS: u64 = 10_000_000;

/// A place where images lie, a file system or a block device: what disks have in common if a request of one may have to
/// wait for those of another.
#[derive(Debug, Default)]
pub struct Storage {
    shares: Mutex<Vec<Weak<Share>>>,
    /// Disks in use.
    users: AtomicU32,
    recount_at: AtomicU64,
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
        let counters = (0..queues).map(|_| InFlight::default()).collect();
        let share = Arc::new(Share { storage: self.clone(), used: AtomicU64::new(0), queues: counters });
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        shares.retain(|s| s.strong_count() > 0);
        shares.push(Arc::downgrade(&share));
        share
    }

    /// Counts the disks in use.
    #[cold]
    fn recount(&self, now: u64) {
        self.recount_at.store(now + RECOUNT_NS, Ordering::Relaxed);
        let shares = match self.shares.try_lock() {
            Ok(shares) => shares,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            // Somebody else is at it.
            Err(TryLockError::WouldBlock) => return,
        };
        let in_use = |s: &Weak<Share>| {
            s.upgrade().is_some_and(|s| now.saturating_sub(s.used.load(Ordering::Relaxed)) < IN_USE_NS)
        };
        let users = shares.iter().filter(|s| in_use(s)).count();
        self.users.store(u32::try_from(users).unwrap_or(u32::MAX), Ordering::Relaxed);
    }
}

/// A queue's count: on a cache line of its own, as it is written for every request.
#[derive(Debug, Default)]
#[repr(align(64))]
struct InFlight(AtomicU32);

/// A disk's part of a storage.
#[derive(Debug)]
pub(crate) struct Share {
    storage: Arc<Storage>,
    /// When a queue was busy last.
    used: AtomicU64,
    queues: Box<[InFlight]>,
}

impl Share {
    /// Queue `index` is busy at `now`: a time of [`offload_card::clock::now`]. To be called once per batch.
    pub(crate) fn busy(&self, now: u64) {
        let before = self.used.load(Ordering::Relaxed);
        self.used.store(now, Ordering::Relaxed);
        if now.saturating_sub(before) >= IN_USE_NS || now >= self.storage.recount_at.load(Ordering::Relaxed) {
            self.storage.recount(now);
        }
    }

    /// A queue that has `own` in flight may begin another request.
    #[inline]
    pub(crate) fn allows(&self, own: u32) -> bool {
        let users = self.storage.users.load(Ordering::Relaxed);
        users <= 1 || own == 0 || self.has_room(users)
    }

    #[cold]
    fn has_room(&self, users: u32) -> bool {
        let in_flight: u32 = self.queues.iter().map(|q| q.0.load(Ordering::Relaxed)).sum();
        in_flight < (DEPTH / users).max(1)
    }

    /// Queue `index` has so much in flight now.
    #[inline]
    pub(crate) fn set(&self, index: u16, in_flight: u32) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            queue.0.store(in_flight, Ordering::Relaxed);
        }
    }
}

/// What a request of `length` bytes counts as.
pub(crate) fn cost(length: u32) -> u32 {
    1 + (length.saturating_sub(1) >> REQUEST_BYTES_LOG2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Begins as many requests as it may.
    fn fill(share: &Share, index: u16) -> u32 {
        let mut own = 0;
        while own < 1000 && share.allows(own) {
            own += 1;
            share.set(index, own);
        }
        own
    }

    #[test]
    fn a_disk_alone_has_all_and_neighbours_the_same_each() {
        let storages = Storages::default();
        let now = 10 * IN_USE_NS;
        let alone = storages.get(2).share(1);
        let (a, b) = (storages.get(1).share(1), storages.get(1).share(2));
        alone.busy(now);
        a.busy(now);
        assert_eq!((fill(&alone, 0), fill(&a, 0)), (1000, 1000));
        // Noticed at once, not with the next count: nothing more until what was begun is back.
        b.busy(now + 1);
        assert!(a.allows(0) && !a.allows(1000));
        a.set(0, 0);
        assert_eq!((fill(&a, 0), fill(&b, 0)), (DEPTH / 2, DEPTH / 2));
        // Its other queue has its one request all the same.
        assert_eq!(fill(&b, 1), 1);
        assert_eq!(fill(&alone, 0), 1000);
    }

    #[test]
    fn a_disk_that_is_not_used_gives_its_share_back() {
        let storage = Arc::<Storage>::default();
        let (a, b) = (storage.share(1), storage.share(1));
        let now = 10 * IN_USE_NS;
        a.busy(now);
        b.busy(now);
        assert_eq!(fill(&a, 0), DEPTH / 2);
        a.busy(now + IN_USE_NS - 1);
        assert!(!a.allows(DEPTH / 2));
        a.busy(now + IN_USE_NS - 1 + RECOUNT_NS);
        assert_eq!(fill(&a, 0), 1000);
        // One that is deleted does at once, or by the next count.
        b.busy(now + 2 * IN_USE_NS);
        assert!(!a.allows(1000));
        drop(b);
        a.busy(now + 2 * IN_USE_NS + RECOUNT_NS);
        assert!(a.allows(1000));
    }

    #[test]
    fn a_large_request_counts_as_several() {
        assert_eq!([0, 1, 4096, 1 << 16, (1 << 16) + 1, 1 << 20].map(cost), [1, 1, 1, 1, 2, 16]);
        assert_eq!(cost(u32::MAX), 1 << 16);
    }
}
