use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use offload_card::event::Event;

use super::*;
use crate::io::{Backend, Begun, Op, Register, Transfer, Used, Wakers};
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
        let (backend, refused) =
            Backend::new(&store, wakers, 16, engine, Used::ByOne, &seen, Register::Never).unwrap();
        assert!(refused.is_none());
        Self { file, backend, memory: vec![0; MAX_READ_BYTES + PAGE as usize] }
    }

    /// Reads, however that is done: bytes or a negative errno.
    fn read(&mut self, offset: u64, bytes: usize) -> i32 {
        self.memory.fill(0xee);
        let (first, second) = self.memory[..bytes].split_at_mut(bytes / 3);
        let iovecs =
            [first, second].map(|d| libc::iovec { iov_base: d.as_mut_ptr().cast(), iov_len: d.len() });
        let transfer =
            Transfer { op: Op::Read, offset, formatted: false, length: 0, iovecs: &iovecs, unaligned: false };
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
    for (engine, limit) in [(IoEngine::Auto, 0), (IoEngine::IoUring, 1 << 30), (IoEngine::Sync, 1 << 30)] {
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
