//! Reads from the page cache without a system call.
//!
//! A preadv2 that finds its page in the page cache spends more on getting there than on copying. So where that is done again and
//! again the image is mapped, and what has been seen to be in the page cache, by a preadv2 that must not block, is copied from
//! there the next time.
//!
//! The kernel may have dropped such a page since. Then the copy waits for the storage, as nothing here may do often: the thread's
//! major faults tell of it, whereupon the disk forgets what it has seen, and begins anew after a pause that gets longer as long as
//! this goes on.
//!
//! Mapped pages cost page tables while the card runs, and time to unmap: 14 ms per GiB. A card that is stopped does that first, but
//! the guests of one that is killed wait for it. Hence a limit for all disks of a card, [`MapLimit`].

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use nix::sys::resource::{UsageWho, getrusage};
use offload_card::memory::Window;
use tracing::debug;

use crate::image::Image;

const PAGE_LOG2: u32 = 12;
/// A block is what the kernel maps at a time if all of it is there: 16 pages.
const BLOCK_LOG2: u32 = PAGE_LOG2 + 4;
/// Reads of a block before it is copied from. To map its pages takes 5 us, and 1 us to unmap them: ten times what a copy saves.
const READS: u32 = 16;
/// One of them, in a block's word, above a bit for each of its pages that was seen.
const READ: u32 = 1 << 16;
/// What is seen is noted, and counts against the limit, in chunks of so many blocks: 16 MiB.
const CHUNK_BLOCKS: usize = 256;
const CHUNK_LOG2: u32 = BLOCK_LOG2 + CHUNK_BLOCKS.ilog2();
/// Most places for chunks of an image: of one larger than 256 GiB several have the same place, and the first takes it.
const MAX_PLACES: usize = 1 << 14;
/// Longest read that is worth it, in bytes: of longer ones most is copying.
const MAX_READ_BYTES: usize = 64 * 1024;
/// Copies of a queue between two looks at its thread's faults, which take a system call.
const LOOK: u64 = 8;
/// Shortest and longest pause after a fault, and how many copies of a queue there must be after one for the next to be the
/// shortest again: as many as save what it takes to map and unmap a few hundred MiB.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(60);
const PEACE: u64 = 1 << 17;
/// Reads of a queue that there was no room to note before it makes up its mind whether what there is room for is worth keeping.
const MISSED: u64 = 1 << 16;

/// How much of their images the disks of a card may map.
#[derive(Debug)]
pub struct MapLimit {
    /// Chunks that are left.
    chunks: AtomicUsize,
}

impl MapLimit {
    /// What is mapped if nobody says otherwise, in bytes.
    pub const DEFAULT_BYTES: u64 = 4 << 30;

    /// Up to `bytes`.
    pub fn new(bytes: u64) -> Self {
        Self { chunks: AtomicUsize::new(usize::try_from(bytes >> CHUNK_LOG2).unwrap_or(usize::MAX)) }
    }

    fn take(&self) -> bool {
        let one_less = |n: usize| n.checked_sub(1);
        self.chunks.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok()
    }

    fn give_back(&self, chunks: usize) {
        self.chunks.fetch_add(chunks, Ordering::Relaxed);
    }
}

impl Default for MapLimit {
    fn default() -> Self {
        Self::new(Self::DEFAULT_BYTES)
    }
}

/// What was seen of a part of an image.
#[derive(Debug)]
struct Chunk {
    number: usize,
    blocks: [AtomicU32; CHUNK_BLOCKS],
}

impl Chunk {
    fn new(number: usize) -> Box<Self> {
        Box::new(Self { number, blocks: [const { AtomicU32::new(0) }; CHUNK_BLOCKS] })
    }
}

/// A mapped image, and what of it was seen to be in the page cache.
#[derive(Debug)]
struct Map {
    window: Window,
    places: Box<[OnceLock<Box<Chunk>>]>,
    used: AtomicUsize,
    limit: Arc<MapLimit>,
}

/// The blocks that `bytes` at `offset` are in, each with the bits of its pages. `None`: there are no bytes, or they are far away.
fn blocks(offset: u64, bytes: usize) -> Option<impl Iterator<Item = (usize, u32)>> {
    let last = offset.checked_add(bytes as u64)?.checked_sub(1)?;
    let (from, to) = (offset >> PAGE_LOG2, last >> PAGE_LOG2);
    let (first, last) = (usize::try_from(from >> 4).ok()?, usize::try_from(to >> 4).ok()?);
    Some((first..=last).map(move |block| {
        let low = if block == first { from & 15 } else { 0 };
        let high = if block == last { to & 15 } else { 15 };
        (block, (2 << high) - (1 << low))
    }))
}

impl Map {
    fn new(image: &Image, limit: &Arc<MapLimit>) -> Option<Self> {
        let bytes = usize::try_from(image.length().ok()?).ok()?;
        let window = Window::new(image.file(), bytes)
            .inspect_err(|e| debug!("each read takes a system call, for the image cannot be mapped: {e}"))
            .ok()?;
        let places = bytes.div_ceil(1 << CHUNK_LOG2).min(MAX_PLACES);
        let places = (0..places).map(|_| OnceLock::new()).collect();
        Some(Self { window, places, used: AtomicUsize::new(0), limit: limit.clone() })
    }

    /// What was seen of a block, if anything near it was.
    fn word(&self, block: usize) -> Option<&AtomicU32> {
        let number = block / CHUNK_BLOCKS;
        let chunk = self.places[number % self.places.len()].get().filter(|chunk| chunk.number == number)?;
        Some(&chunk.blocks[block % CHUNK_BLOCKS])
    }

    /// As [`Map::word`]; makes room for it if there is some.
    fn room(&self, block: usize) -> Option<&AtomicU32> {
        let number = block / CHUNK_BLOCKS;
        let place = &self.places[number % self.places.len()];
        let beyond = block << BLOCK_LOG2 >= self.window.size();
        if !beyond && place.get().is_none() && self.limit.take() {
            let mut ours = false;
            place.get_or_init(|| {
                ours = true;
                Chunk::new(number)
            });
            if ours {
                self.used.fetch_add(1, Ordering::Relaxed);
            } else {
                self.limit.give_back(1);
            }
        }
        self.word(block)
    }

    /// All of it was seen, and often.
    fn has(&self, mut blocks: impl Iterator<Item = (usize, u32)>) -> bool {
        blocks.all(|(block, pages)| {
            self.word(block).is_some_and(|word| {
                let word = word.load(Ordering::Relaxed);
                word & pages == pages && word >= READS * READ
            })
        })
    }

    /// Notes that it was seen. False: there is no room for that.
    fn note(&self, mut blocks: impl Iterator<Item = (usize, u32)>) -> bool {
        blocks.all(|(block, pages)| {
            let Some(word) = self.room(block) else { return false };
            let before = word.load(Ordering::Relaxed) | pages;
            // What another queue notes at the same time may get lost, and is noted again.
            word.store(if before < READS * READ { before + READ } else { before }, Ordering::Relaxed);
            true
        })
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        self.limit.give_back(self.used.load(Ordering::Relaxed));
    }
}

/// When nothing is seen.
#[derive(Debug, Default)]
struct Pause {
    /// The last one's.
    length: Duration,
    until: Option<Instant>,
    /// For good.
    ended: bool,
}

impl Pause {
    fn begin(&mut self, length: Duration) {
        (self.length, self.until) = (length, Some(Instant::now() + length));
    }
}

/// What has been seen of an image in the page cache, by all queues of its disk.
#[derive(Debug)]
pub(crate) struct Seen {
    map: ArcSwapOption<Map>,
    limit: Arc<MapLimit>,
    pause: Mutex<Pause>,
}

impl Seen {
    /// Nothing yet; no more is going to be mapped than `limit` allows.
    pub(crate) fn new(limit: Arc<MapLimit>) -> Self {
        Self { map: ArcSwapOption::empty(), limit, pause: Mutex::default() }
    }

    /// Maps the image if there is no pause.
    #[cold]
    fn begin(&self, image: &Image) {
        // Whoever has it is doing the same.
        let Ok(mut pause) = self.pause.try_lock() else { return };
        if self.map.load().is_some() || pause.ended || pause.until.is_some_and(|until| Instant::now() < until)
        {
            return;
        }
        match Map::new(image, &self.limit) {
            Some(map) => self.map.store(Some(Arc::new(map))),
            None => pause.begin(PAUSE_MAX),
        }
    }

    /// Forgets everything, and sees nothing for a while. `peace`: it was worth it since the last pause.
    #[cold]
    fn begin_pause(&self, peace: bool) {
        let mut pause = self.pause();
        // Another queue may have come first.
        if self.forget() {
            let length = if peace { PAUSE_MIN } else { (pause.length * 2).clamp(PAUSE_MIN, PAUSE_MAX) };
            pause.begin(length);
        }
    }

    /// Forgets everything for good.
    pub(crate) fn end(&self) {
        self.pause().ended = true;
        if let Some(map) = self.map.swap(None) {
            unmap(map);
        }
    }

    fn pause(&self) -> MutexGuard<'_, Pause> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False if there was nothing to forget.
    fn forget(&self) -> bool {
        let Some(map) = self.map.swap(None) else { return false };
        // That takes time, and guests are not to wait for it. If there can be no thread, one does.
        let _ = std::thread::Builder::new().name("unmap".into()).spawn(move || unmap(map));
        true
    }
}

/// Unmaps an image in this thread and not in one that is just copying from it, unless that takes long.
fn unmap(mut map: Arc<Map>) {
    for _ in 0..100 {
        match Arc::try_unwrap(map) {
            Ok(unused) => return drop(unused),
            Err(used) => map = used,
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// A queue's use of what has been seen. For one thread.
#[derive(Debug)]
pub(super) struct Cached {
    seen: Arc<Seen>,
    /// Bytes copied and not yet counted.
    pub(super) copied: u64,
    /// Reads by copy so far, and how many there had been at the last pause.
    copies: u64,
    paused_at: u64,
    /// Reads that there was no room to note, and the copies that there had been when these were counted from 0.
    missed: u64,
    missed_at: u64,
    /// The thread's major faults so far.
    faults: i64,
}

impl Cached {
    pub(super) fn new(seen: Arc<Seen>) -> Self {
        Self { seen, copied: 0, copies: 0, paused_at: 0, missed: 0, missed_at: 0, faults: faults() }
    }

    /// Reads at `offset` by copying, and says how much. `None`: that is for others to do; memory may have been written.
    ///
    /// # Safety
    ///
    /// The memory that the iovecs name is valid.
    pub(super) unsafe fn read(&mut self, offset: u64, iovecs: &[libc::iovec]) -> Option<i32> {
        let map = self.seen.map.load();
        let map = map.as_ref()?;
        let bytes = iovecs.iter().map(|v| v.iov_len).sum();
        if bytes > MAX_READ_BYTES || !map.has(blocks(offset, bytes)?) {
            return None;
        }
        // SAFETY: the caller's promise is ours.
        if !unsafe { map.window.read(usize::try_from(offset).ok()?, iovecs) } {
            debug!("the image has been cut, or its storage has failed: what was mapped is given up");
            self.begin_pause();
            return None;
        }
        self.copied += bytes as u64;
        self.copies += 1;
        if self.copies.is_multiple_of(LOOK) {
            let now = faults();
            if std::mem::replace(&mut self.faults, now) != now {
                debug!("pages are dropped from the page cache: each read takes a system call for now");
                self.begin_pause();
            }
        }
        i32::try_from(bytes).ok()
    }

    fn begin_pause(&mut self) {
        self.seen.begin_pause(self.copies - self.paused_at >= PEACE);
        self.paused_at = self.copies;
    }

    /// A read at `offset` is to come soon.
    pub(super) fn prefetch(&self, offset: u64) {
        if let Some(map) = self.seen.map.load().as_ref()
            && blocks(offset, 1).is_some_and(|page| map.has(page))
            && let Ok(offset) = usize::try_from(offset)
        {
            map.window.prefetch(offset);
        }
    }

    /// `bytes` at `offset` have just been read from the page cache.
    pub(super) fn saw(&mut self, image: &Image, offset: u64, bytes: usize) {
        if bytes > MAX_READ_BYTES {
            return;
        }
        let map = self.seen.map.load();
        let Some(map) = map.as_ref() else {
            return self.seen.begin(image);
        };
        if blocks(offset, bytes).is_none_or(|blocks| map.note(blocks)) {
            return;
        }
        self.missed += 1;
        if self.missed == MISSED {
            // What there is room for is not what is read now.
            if self.copies - self.missed_at < MISSED {
                self.seen.forget();
            }
            (self.missed_at, self.missed) = (self.copies, 0);
        }
    }
}

/// How often this thread has waited for a page so far.
fn faults() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.major_page_faults())
}

#[cfg(test)]
mod tests;
