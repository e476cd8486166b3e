//! How a queue moves data between guest memory and the image, and what it waits with.

mod cached;
mod calls;
mod registered;
mod ring;
mod uring;
mod waiter;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use offload_card::event::Event;
use offload_card::memory::View;

pub use cached::MapLimit;
pub(crate) use cached::Seen;
pub use registered::Register;
pub(crate) use ring::IoRing;
use uring::Uring;
use waiter::Waiter;

use crate::image::Image;
use crate::qcow2::{Qcow2, Work};
use crate::store::{Qcow2Store, Store};
use crate::worker::IoEngine;

/// What is to be done with the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// From the image into memory.
    Read,
    /// From memory into the image.
    Write,
    /// As `Write`, and durable when complete.
    WriteThrough,
    /// Make everything written and completed durable.
    Sync,
    /// Give a range's space back; it reads as zeros from then on.
    Punch,
    /// Make a range zeros that keep their space.
    Zero,
    /// Forget what is in a range, as far as that costs nothing. Only of a [`Transfer::formatted`] one.
    Discard,
}

impl Op {
    /// It keeps the storage busy, and the CPU is better left to it.
    pub(crate) fn is_slow(self) -> bool {
        matches!(self, Self::Sync | Self::Punch | Self::Zero | Self::Discard)
    }
}

/// One transfer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transfer<'a> {
    pub(crate) op: Op,
    /// Byte offset in the file; on the disk, if it is formatted.
    pub(crate) offset: u64,
    /// Where that is in the file is up to the image's format.
    pub(crate) formatted: bool,
    /// Bytes of `Punch`, `Zero` and `Discard`.
    pub(crate) length: u64,
    /// Where in memory, for reads and writes; at most `IOV_MAX`.
    pub(crate) iovecs: &'a [libc::iovec],
    /// Offset, memory or a length is not aligned as O_DIRECT wants: go through the page cache.
    pub(crate) unaligned: bool,
}

/// How a transfer began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begun {
    /// It is over: bytes moved or a negative errno.
    Done(i32),
    /// It will be among the completions.
    Pending,
    /// There is no room. To be tried again after completions have been taken.
    Full,
}

/// A transfer that ended: its tag, and bytes moved or a negative errno.
pub(crate) type Completion = (u16, i32);

/// What a queue waits for beside completions.
#[derive(Debug)]
pub(crate) struct Wakers {
    /// The driver's kicks.
    pub(crate) kick: Event,
    /// Orders to the thread.
    pub(crate) orders: Event,
}

impl Wakers {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { kick: self.kick.try_clone()?, orders: self.orders.try_clone()? })
    }
}

/// What transfers go to.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// The file.
    image: Arc<Image>,
    /// What knows the format of it, if it has one.
    qcow2: Option<Arc<Qcow2>>,
}

impl Target {
    fn of(store: &Store) -> Option<Self> {
        match store {
            Store::Image(image) => Some(Self { image: image.clone(), qcow2: None }),
            Store::Qcow2(Qcow2Store(qcow2)) => {
                Some(Self { image: qcow2.image().clone(), qcow2: Some(qcow2.clone()) })
            }
            Store::Null(_) => None,
        }
    }

    /// Does a transfer here and now.
    ///
    /// # Safety
    ///
    /// The memory that the iovecs name is valid.
    unsafe fn transfer(&self, transfer: &Transfer<'_>) -> i32 {
        match &self.qcow2 {
            // SAFETY: the caller's promise is ours.
            Some(qcow2) if transfer.formatted => unsafe { qcow2.perform(&Work::new(transfer)) },
            // SAFETY: as above.
            _ => unsafe { calls::transfer(&self.image, transfer, 0) },
        }
    }
}

/// Punches or zeroes a range of a file here and now.
pub(crate) fn erase_now(image: &Image, op: Op, offset: u64, length: u64) -> io::Result<()> {
    let transfer = Transfer { op, offset, formatted: false, length, iovecs: &[], unaligned: true };
    // SAFETY: there is no memory.
    match unsafe { calls::transfer(image, &transfer, 0) } {
        0.. => Ok(()),
        e => Err(io::Error::from_raw_os_error(-e)),
    }
}

/// Which thread uses a [`Backend`].
pub(crate) enum Used<'a> {
    /// Any, one at a time.
    ByAny,
    /// The one that makes it, which waits by [`Backend::wait`].
    ByOne,
    /// The one that makes it, which has up to so many in all, in one ring, which the first of them makes. It waits for that, and if there
    /// is none, for all of them by [`Backend::waits_on`].
    AmongOthers(&'a mut Option<IoRing>, u16),
}

/// A way to do I/O. One per queue, used by its thread only.
pub(crate) enum Backend {
    /// Nothing to do.
    Null(Waiter),
    /// A system call per transfer, here and now.
    Calls(Waiter, Target),
    /// By io_uring, with what is quicker here and now.
    Uring(Box<Uring>),
}

impl Backend {
    /// For up to `depth` transfers at a time on `store`, of which `seen` knows what is in the page cache; guest memory is
    /// registered as `register` says, once it is known ([`Backend::use_memory`]). The error is of
    /// io_uring if that was what `engine` insisted on; the second value if io_uring was tried and given up.
    pub(crate) fn new(
        store: &Store,
        wakers: Wakers,
        depth: u16,
        engine: IoEngine,
        used: Used<'_>,
        seen: &Arc<Seen>,
        register: Register,
    ) -> io::Result<(Self, Option<io::Error>)> {
        let Some(target) = Target::of(store) else { return Ok((Self::Null(Waiter::new(wakers)?), None)) };
        let mut refused = None;
        if engine != IoEngine::Sync {
            let image = &target.image;
            // What is copied from or to the page cache costs the same either way.
            let register =
                if image.direct() || register == Register::AtOnce { register } else { Register::Never };
            // One entry per transfer and three for the polls.
            let ring = |queues: u16| IoRing::new((u32::from(depth) + 3) * u32::from(queues), register);
            let here = engine == IoEngine::Auto;
            let uring = |place| Uring::new(target.clone(), place, wakers.try_clone()?, depth, here, seen);
            let made = match used {
                Used::ByAny => None,
                Used::ByOne => Some(ring(1).and_then(|ring| uring(ring.place()))),
                // Its thread waits for the ring, so there is nothing to fall back to.
                Used::AmongOthers(Some(ring), _) => {
                    return Ok((Self::Uring(Box::new(uring(ring.place())?)), None));
                }
                Used::AmongOthers(none, queues) => Some(ring(queues).and_then(|ring| {
                    let uring = uring(ring.place())?;
                    *none = Some(ring);
                    Ok(uring)
                })),
            };
            match made {
                None => {}
                Some(Ok(uring)) => return Ok((Self::Uring(Box::new(uring)), None)),
                Some(Err(e)) if engine == IoEngine::IoUring => return Err(e),
                Some(Err(e)) => refused = Some(e),
            }
        }
        Ok((Self::Calls(Waiter::new(wakers)?, target), refused))
    }

    /// What transfers name is in `view` from now on.
    pub(crate) fn use_memory(&mut self, view: &Arc<View>) {
        if let Self::Uring(uring) = self {
            uring.use_memory(view);
        }
    }

    /// Bytes of guest memory that are registered with the kernel now.
    pub(crate) fn registered_bytes(&self) -> u64 {
        match self {
            Self::Null(_) | Self::Calls(..) => 0,
            Self::Uring(uring) => uring.registered_bytes(),
        }
    }

    /// A read at `offset` of the file is about to begin.
    pub(crate) fn expect_read(&self, offset: u64) {
        if let Self::Uring(uring) = self {
            uring.cached.prefetch(offset);
        }
    }

    /// Begins a transfer. It may be held back until the next [`Backend::poll`] or [`Backend::wait`].
    ///
    /// # Safety
    ///
    /// `iovecs` and the memory they name stay valid until the completion has been taken, if it is pending.
    pub(crate) unsafe fn begin(&mut self, tag: u16, transfer: &Transfer<'_>) -> Begun {
        match self {
            // There is nothing to move anything from or to.
            Self::Null(_) => Begun::Done(-libc::ENXIO),
            // SAFETY: the caller's promise is ours.
            Self::Calls(_, target) => Begun::Done(unsafe { target.transfer(transfer) }),
            // SAFETY: as above.
            Self::Uring(uring) => unsafe { uring.begin(tag, transfer) },
        }
    }

    /// Begins what was held back, without waiting; with `leave`, only if that costs nothing. True if some is left, for the next
    /// time or for [`Backend::wait`].
    pub(crate) fn poll(&mut self, leave: bool) -> io::Result<bool> {
        match self {
            Self::Null(_) | Self::Calls(..) => Ok(false),
            Self::Uring(uring) => uring.poll(leave),
        }
    }

    /// Begins what was held back, and waits until there is a completion, a kick or an order, for at most `timeout`.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Null(waiter) | Self::Calls(waiter, _) => waiter.wait(timeout),
            Self::Uring(uring) => uring.wait(timeout),
        }
    }

    /// Can be read when a [`Backend::wait`] would end, for who waits for several; who was told so calls [`Backend::woken`]. `None`: its
    /// ring is what there is to wait for.
    pub(crate) fn waits_on(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Null(waiter) | Self::Calls(waiter, _) => Some(waiter.as_fd()),
            Self::Uring(_) => None,
        }
    }

    /// Takes what has come, without waiting.
    pub(crate) fn woken(&mut self) -> io::Result<()> {
        match self {
            Self::Null(waiter) | Self::Calls(waiter, _) => waiter.wait(Some(Duration::ZERO)),
            Self::Uring(_) => Ok(()),
        }
    }

    /// Kicks seen since this was asked last.
    pub(crate) fn kicks(&mut self) -> u64 {
        std::mem::take(match self {
            Self::Null(waiter) | Self::Calls(waiter, _) => &mut waiter.kicks,
            Self::Uring(uring) => &mut uring.kicks,
        })
    }

    /// Bytes copied by our own instructions since this was asked last.
    pub(crate) fn copied(&mut self) -> u64 {
        match self {
            Self::Null(_) | Self::Calls(..) => 0,
            Self::Uring(uring) => std::mem::take(&mut uring.cached.copied),
        }
    }

    /// The next completion.
    pub(crate) fn completion(&mut self) -> Option<Completion> {
        match self {
            Self::Null(_) | Self::Calls(..) => None,
            Self::Uring(uring) => uring.completion(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    fn image() -> (tempfile::NamedTempFile, Store) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let image = Image::open(file.path().to_str().unwrap(), false, false).unwrap();
        (file, Store::Image(Arc::new(image)))
    }

    fn backend(
        store: &Store,
        wakers: Wakers,
        depth: u16,
        engine: IoEngine,
    ) -> io::Result<(Backend, Option<io::Error>)> {
        Backend::new(
            store,
            wakers,
            depth,
            engine,
            Used::ByOne,
            &Arc::new(Seen::new(Arc::default())),
            Register::Never,
        )
    }

    /// A read of the image's beginning.
    fn read(iovecs: &[libc::iovec]) -> Transfer<'_> {
        Transfer { op: Op::Read, offset: 0, formatted: false, length: 0, iovecs, unaligned: false }
    }

    fn wakers() -> Wakers {
        Wakers { kick: Event::new().unwrap(), orders: Event::new().unwrap() }
    }

    /// A kernel may have rings and refuse what is put into them: polls of a path-only descriptor, here.
    #[test]
    fn a_ring_that_cannot_wait_is_not_taken() {
        let (_file, store) = image();
        let path_only = std::fs::File::options().read(true).custom_flags(libc::O_PATH).open("/").unwrap();
        let refused = |engine| {
            let wakers = wakers();
            let kick = wakers.kick.as_raw_fd();
            // SAFETY: both are open, and the number stays `kick`'s, for something else now.
            assert_eq!(unsafe { libc::dup2(path_only.as_raw_fd(), kick) }, kick);
            backend(&store, wakers, 16, engine).map(|(_, refused)| refused)
        };
        // To wait by epoll is refused, too: nothing is left.
        for engine in [IoEngine::IoUring, IoEngine::Auto] {
            assert_eq!(refused(engine).unwrap_err().raw_os_error(), Some(libc::EBADF), "{engine:?}");
        }
    }

    /// A transfer that is held back when the guest's memory changes names what was registered then.
    #[test]
    fn what_is_held_back_outlives_a_change_of_memory() {
        use vm_memory::{GuestAddress, GuestMemoryBackend};
        let (_file, store) = image();
        let seen = Arc::new(Seen::new(Arc::default()));
        let made = Backend::new(&store, wakers(), 8, IoEngine::IoUring, Used::ByOne, &seen, Register::AtOnce);
        let mut backend = made.unwrap().0;
        let guests = [(); 3].map(|()| offload_card::testing::TestGuest::new(1 << 20));
        for guest in &guests {
            backend.use_memory(&guest.table().view());
            let iov_base = guest.memory.get_host_address(GuestAddress(0x1000)).unwrap().cast();
            let iovecs = [libc::iovec { iov_base, iov_len: 512 }];
            let transfer = read(&iovecs);
            // SAFETY: `guests` and `iovecs` are there until it is done.
            assert_eq!(unsafe { backend.begin(7, &transfer) }, Begun::Pending);
            assert_eq!(backend.registered_bytes(), 512 << 10);
            assert!(backend.poll(true).unwrap(), "it is left");
            backend.use_memory(&guests[0].table().view());
            assert_eq!(backend.registered_bytes(), 0);
            let mut done = None;
            while done.is_none() {
                backend.wait(None).unwrap();
                done = backend.completion();
            }
            assert_eq!(done, Some((7, 512)));
        }
    }

    /// More transfers than the ring has room for, before any completion is taken: some are told to come again, none fails.
    #[test]
    fn what_finds_no_room_is_told_so_and_nothing_gets_lost() {
        let (_file, store) = image();
        let (mut backend, refused) = backend(&store, wakers(), 2, IoEngine::IoUring).unwrap();
        assert!(refused.is_none());
        let mut memory = [0u8; 512];
        let iovecs = [libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: 512 }];
        let transfer = read(&iovecs);
        let (mut begun, mut done) = (0u16, 0);
        for tag in 0..200 {
            // SAFETY: `memory` and `iovecs` are there until all are done.
            match unsafe { backend.begin(tag, &transfer) } {
                Begun::Pending => begun += 1,
                Begun::Full => {}
                Begun::Done(result) => panic!("{result}"),
            }
        }
        while done < begun {
            backend.wait(None).unwrap();
            while let Some((_, result)) = backend.completion() {
                assert_eq!(result, 512);
                done += 1;
            }
        }
        assert!(begun >= 2);
    }

    /// A wait for limits ends when it is to, however the queue does its I/O.
    #[test]
    fn a_wait_ends_in_time() {
        let (_file, store) = image();
        for engine in [IoEngine::IoUring, IoEngine::Sync] {
            let (mut backend, _) = backend(&store, wakers(), 2, engine).unwrap();
            let wait = Duration::from_micros(300);
            // The machine may be busy, but not each time.
            let exact = (0..1000).any(|_| {
                let since = std::time::Instant::now();
                backend.wait(Some(wait)).unwrap();
                let waited = since.elapsed();
                assert!(waited >= wait, "{waited:?}");
                waited < Duration::from_millis(1)
            });
            assert!(exact, "{engine:?}");
        }
    }
}
