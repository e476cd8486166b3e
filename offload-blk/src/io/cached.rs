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
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
    use offload_card::event::Event;

    use super::*;
    use crate::io::{Backend, Begun, Op, Transfer, Used, Wakers};
    use crate::store::Store;
    use crate::worker::IoEngine;

    const PAGE: u64 = 1 << PAGE_LOG2;
    const CHUNK: u64 = 1 << CHUNK_LOG2;

    /// An image, and a queue that reads it.
    struct Setup {
        file: tempfile::NamedTempFile,
        backend: Backend,
        memory: Vec<u8>,
    }

    impl Setup {
        /// Of `pages` pages, each full of its number.
        fn new(pages: u64, engine: IoEngine, limit: u64) -> Self {
            // Where the page cache can lose something: not in memory.
            let here: PathBuf = std::env::current_exe().unwrap().parent().unwrap().into();
            let file = tempfile::NamedTempFile::new_in(here).unwrap();
            for page in 0..pages {
                file.as_file().write_all_at(&[page as u8; PAGE as usize], page * PAGE).unwrap();
            }
            file.as_file().sync_all().unwrap();
            let store = Image::open(file.path().to_str().unwrap(), false, false).unwrap();
            let store = Store::Image(Arc::new(store));
            let wakers = Wakers { kick: Event::new().unwrap(), orders: Event::new().unwrap() };
            let seen = Arc::new(Seen::new(Arc::new(MapLimit::new(limit))));
            let (backend, refused) = Backend::new(&store, wakers, 16, engine, Used::ByOne, &seen).unwrap();
            assert!(refused.is_none());
            Self { file, backend, memory: vec![0; MAX_READ_BYTES + PAGE as usize] }
        }

        /// Reads, however that is done: bytes or a negative errno.
        fn read(&mut self, offset: u64, bytes: usize) -> i32 {
            self.memory.fill(0xee);
            let (first, second) = self.memory[..bytes].split_at_mut(bytes / 3);
            let iovecs =
                [first, second].map(|d| libc::iovec { iov_base: d.as_mut_ptr().cast(), iov_len: d.len() });
            let transfer = Transfer {
                op: Op::Read,
                offset,
                formatted: false,
                length: 0,
                iovecs: &iovecs,
                unaligned: false,
            };
            // SAFETY: both are there until it is done.
            match unsafe { self.backend.begin(0, &transfer) } {
                Begun::Done(result) => return result,
                begun => assert_eq!(begun, Begun::Pending),
            }
            loop {
                self.backend.wait(None).unwrap();
                if let Some((_, result)) = self.backend.completion() {
                    return result;
                }
            }
        }

        /// Reads a page that is there. True: by a copy.
        fn copies(&mut self, page: u64) -> bool {
            assert_eq!(self.read(page * PAGE, PAGE as usize), PAGE as i32);
            assert!(self.memory[..PAGE as usize].iter().all(|b| *b == page as u8), "page {page}");
            let copied = self.backend.copied();
            assert!(copied == 0 || copied == PAGE);
            copied > 0
        }

        fn image(&self) -> &File {
            self.file.as_file()
        }
    }

    #[test]
    fn what_is_read_often_is_copied() {
        let mut setup = Setup::new(40, IoEngine::Auto, 1 << 30);
        // The first read has the image mapped, and the second is the first that is noted.
        let copies: Vec<_> = (0..30).map(|_| setup.copies(3)).collect();
        let noted = 1 + READS as usize;
        assert_eq!(copies.iter().position(|c| *c), Some(noted));
        assert!(copies[noted..].iter().all(|c| *c));
        // Of a block, what was seen.
        assert_eq!([setup.copies(4), setup.copies(4), setup.copies(16)], [false, true, false]);
        // A write shows.
        setup.image().write_all_at(&[77; 10], 3 * PAGE + 1).unwrap();
        assert_eq!(setup.read(3 * PAGE, 512), 512);
        assert_eq!((setup.memory[0], &setup.memory[1..11], setup.memory[11]), (3, &[77; 10][..], 3));
        assert_eq!(setup.backend.copied(), 512);
        // Across blocks, and not beyond the end.
        for _ in 0..30 {
            assert_eq!(setup.read(15 * PAGE + 1, 2 * PAGE as usize), 2 * PAGE as i32);
        }
        assert_eq!(setup.memory[4095..4097], [15 + 1, 16]);
        assert!(setup.backend.copied() >= 10 * 2 * PAGE);
        for _ in 0..30 {
            assert_eq!(setup.read(39 * PAGE, 2 * PAGE as usize), PAGE as i32);
            assert_eq!(setup.read(38 * PAGE, 2 * PAGE as usize), 2 * PAGE as i32);
        }
        assert_eq!(setup.read(39 * PAGE, 2 * PAGE as usize), PAGE as i32);
        assert_eq!(setup.read(40 * PAGE, 512), 0);
        // Long reads are left to others.
        setup.backend.copied();
        for _ in 0..30 {
            assert_eq!(setup.read(0, MAX_READ_BYTES + 512), (MAX_READ_BYTES + 512) as i32);
        }
        assert_eq!(setup.backend.copied(), 0);
    }

    #[test]
    fn who_does_not_want_it_has_none() {
        for (engine, limit) in [(IoEngine::Auto, 0), (IoEngine::IoUring, 1 << 30), (IoEngine::Sync, 1 << 30)]
        {
            let mut setup = Setup::new(4, engine, limit);
            assert!((0..50).all(|_| !setup.copies(1)), "{engine:?} {limit}");
        }
    }

    #[test]
    fn an_image_that_is_cut_is_read_as_before() {
        let mut setup = Setup::new(40, IoEngine::Auto, 1 << 30);
        for page in [1, 33] {
            assert!((0..30).any(|_| setup.copies(page)));
        }
        setup.image().set_len(2 * PAGE).unwrap();
        // What the system call says, which knows.
        assert_eq!((setup.read(33 * PAGE, PAGE as usize), setup.backend.copied()), (0, 0));
        assert!(!setup.copies(1), "what was mapped has been given up");
        std::thread::sleep(2 * PAUSE_MIN);
        assert!((0..30).any(|_| setup.copies(1)));
    }

    #[test]
    fn pages_that_are_dropped_are_not_waited_for_time_and_again() {
        let mut setup = Setup::new(16 * 40, IoEngine::Auto, 1 << 30);
        // Seen, and not yet copied from. The very first has the image mapped.
        assert!(!setup.copies(0));
        for _ in 0..READS {
            assert!((0..40).all(|block| !setup.copies(block * 16)));
        }
        if fstatfs(setup.image()).unwrap().filesystem_type() == TMPFS_MAGIC {
            eprintln!("skipped: a file system in memory drops nothing");
            return;
        }
        let fd = setup.image().as_raw_fd();
        // SAFETY: it takes no pointers.
        assert_eq!(unsafe { libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED) }, 0);
        let copies = (0..40).filter(|block| setup.copies(block * 16)).count();
        assert_eq!(copies, LOOK as usize);
        // Pauses get longer until there is peace.
        let Backend::Uring(uring) = &setup.backend else { panic!("it has a ring") };
        let seen = uring.cached.seen.clone();
        let length = || seen.pause().length;
        assert_eq!(length(), PAUSE_MIN);
        let again = |after: Duration, peace| {
            std::thread::sleep(after);
            let image = Image::peek(setup.file.path().to_str().unwrap()).unwrap();
            seen.begin(&image);
            seen.begin_pause(peace);
            length()
        };
        assert_eq!(again(Duration::ZERO, false), PAUSE_MIN, "it is not mapped again yet");
        assert_eq!(again(PAUSE_MIN, false), 2 * PAUSE_MIN);
        assert_eq!(again(2 * PAUSE_MIN, false), 4 * PAUSE_MIN);
        assert_eq!(again(4 * PAUSE_MIN, true), PAUSE_MIN);
        // Nor is anything mapped again when the end is near.
        std::thread::sleep(PAUSE_MIN);
        assert!((0..30).any(|_| setup.copies(3)));
        seen.end();
        assert!((0..50).all(|_| !setup.copies(3)));
    }

    #[test]
    fn there_is_a_limit_and_room_for_what_is_read_now() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 * CHUNK).unwrap();
        let image = Image::open(file.path().to_str().unwrap(), false, false).unwrap();
        let limit = Arc::new(MapLimit::new(2 * CHUNK + 1));
        let left = || limit.chunks.load(Ordering::Relaxed);
        let queue = |limit: &Arc<MapLimit>| Cached::new(Arc::new(Seen::new(limit.clone())));
        let has = |queue: &Cached, offset: u64| {
            queue.seen.map.load().as_ref().is_some_and(|map| map.has(blocks(offset, 512).unwrap()))
        };
        let (mut first, mut second) = (queue(&limit), queue(&limit));
        let saw =
            |queue: &mut Cached, offset, times: u64| (0..times).for_each(|_| queue.saw(&image, offset, 512));
        saw(&mut first, 0, 1 + u64::from(READS));
        assert!(has(&first, 0) && !has(&first, PAGE) && left() == 1);
        saw(&mut second, CHUNK, 1 + u64::from(READS));
        assert!(has(&second, CHUNK) && left() == 0);
        // Neither what is there nor anybody else's makes room.
        saw(&mut first, CHUNK, MISSED - 1);
        assert!(has(&first, 0) && !has(&first, CHUNK));
        first.copies += MISSED;
        saw(&mut first, CHUNK, 1);
        assert!(has(&first, 0), "what there is is still read");
        saw(&mut first, CHUNK, MISSED);
        assert!(!has(&first, 0));
        let since = Instant::now();
        while left() == 0 {
            assert!(since.elapsed() < Duration::from_secs(10), "what is forgotten is not given back");
            std::thread::yield_now();
        }
        saw(&mut first, CHUNK, 1 + u64::from(READS));
        assert!(has(&first, CHUNK) && left() == 0);
        drop((first, second));
        assert_eq!(left(), 2);
        // Two that have the same place: the first.
        let mut far = queue(&limit);
        file.as_file().set_len((MAX_PLACES as u64 + 1) * CHUNK).unwrap();
        saw(&mut far, MAX_PLACES as u64 * CHUNK, 1 + u64::from(READS));
        saw(&mut far, 0, u64::from(READS));
        assert!(has(&far, MAX_PLACES as u64 * CHUNK) && !has(&far, 0));
        drop(far);
        file.as_file().set_len(3 * CHUNK).unwrap();
        // Beyond what was there when it was mapped.
        let mut queue = queue(&limit);
        saw(&mut queue, 0, 1);
        file.as_file().set_len(4 * CHUNK).unwrap();
        saw(&mut queue, 3 * CHUNK, u64::from(READS));
        assert!(!has(&queue, 3 * CHUNK));
        saw(&mut queue, 3 * CHUNK, MISSED + u64::from(READS));
        assert!(has(&queue, 3 * CHUNK));
    }

    proptest::proptest! {
        #[test]
        fn blocks_are_the_pages_that_are_touched(offset in 0u64..1 << 20, bytes in 0usize..1 << 17) {
            let touched = blocks(offset, bytes).into_iter().flatten().flat_map(|(block, pages)| {
                (0..16).filter(move |page| pages & 1 << page != 0).map(move |page| block * 16 + page)
            });
            let from = offset as usize / 4096;
            let to = (offset as usize + bytes).div_ceil(4096);
            let expected = if bytes == 0 { from..from } else { from..to };
            proptest::prop_assert!(touched.eq(expected));
            proptest::prop_assert!(blocks(u64::MAX, bytes.max(2)).is_none());
        }
    }
}
