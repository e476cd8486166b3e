//! io_uring: a batch of transfers per system call, and one place to wait for everything.
//!
//! Kicks and orders are multishot polls in the same ring, so that the thread sleeps in one `io_uring_enter` that also
//! submits what it has gathered. Nobody reads the eventfds: every signal is one completion.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::{Backend, Completion, Op, Transfer, Wakers};
use crate::image::Image;

// Above all tags.
const KICK: u64 = 1 << 32;
const ORDERS: u64 = 2 << 32;

/// I/O by io_uring.
pub(crate) struct UringBackend {
    ring: IoUring,
    image: Arc<Image>,
    wakers: Wakers,
    /// Completions of polls are seen by `wait`, those of transfers kept for `completions`.
    done: Vec<Completion>,
    kicks: u64,
}

impl UringBackend {
    /// A ring with room for `entries` transfers: what the kernel does not know yet is left out.
    fn build(entries: u32) -> io::Result<IoUring> {
        let newest =
            IoUring::builder().setup_clamp().setup_single_issuer().setup_defer_taskrun().build(entries);
        match newest {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_clamp().build(entries)
            }
            built => built,
        }
    }

    /// Puts an entry into the submission queue.
    ///
    /// # Safety
    ///
    /// What the entry points to stays valid until it is complete.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the caller's promise is ours.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return true;
        }
        // Full, which the queue's size makes rare: hand over what is there.
        let _ = self.ring.submit();
        // SAFETY: as above.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    fn watch(&mut self, token: u64) -> io::Result<()> {
        let event = if token == KICK { &self.wakers.kick } else { &self.wakers.orders };
        let poll = opcode::PollAdd::new(Fd(event.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
        // SAFETY: a poll points to nothing, and `wakers` keeps the descriptor as long as the ring.
        let pushed = unsafe { self.push(&poll.user_data(token)) };
        if pushed { Ok(()) } else { Err(io::Error::other("the submission queue is full")) }
    }

    /// Takes completions from the ring.
    fn reap(&mut self) -> io::Result<()> {
        let (mut watch_kick, mut watch_orders) = (false, false);
        for entry in self.ring.completion() {
            let ended = !cqueue::more(entry.flags());
            match entry.user_data() {
                KICK => {
                    self.kicks += 1;
                    watch_kick |= ended;
                }
                ORDERS => watch_orders |= ended,
                tag => self.done.push((tag as u16, entry.result())),
            }
        }
        // The kernel ends a multishot poll when it had to drop a completion of it.
        if watch_kick {
            self.watch(KICK)?;
        }
        if watch_orders {
            self.watch(ORDERS)?;
        }
        Ok(())
    }
}

impl Backend for UringBackend {
    fn new(image: Arc<Image>, wakers: Wakers, depth: u16) -> io::Result<Self> {
        // One entry per transfer and two for the polls: the queue is never full.
        let ring = Self::build(u32::from(depth) + 2)?;
        let mut backend =
            Self { ring, image, wakers, done: Vec::with_capacity(usize::from(depth)), kicks: 0 };
        backend.watch(KICK)?;
        backend.watch(ORDERS)?;
        // A kernel that has rings may still forbid operations: find out now.
        backend.ring.submit()?;
        Ok(backend)
    }

    unsafe fn submit(&mut self, tag: u16, transfer: &Transfer<'_>) {
        let fd = Fd(self.image.file().as_raw_fd());
        let (offset, iovecs) = (transfer.offset, transfer.iovecs);
        let (first, count) = (iovecs.as_ptr(), iovecs.len() as u32);
        let entry = match (transfer.op, iovecs) {
            (Op::Read, [one]) => {
                opcode::Read::new(fd, one.iov_base.cast(), length(one)).offset(offset).build()
            }
            (Op::Read, _) => opcode::Readv::new(fd, first, count).offset(offset).build(),
            (Op::Write, [one]) => {
                opcode::Write::new(fd, one.iov_base.cast(), length(one)).offset(offset).build()
            }
            (Op::Write, _) => opcode::Writev::new(fd, first, count).offset(offset).build(),
            (Op::WriteThrough, _) => {
                opcode::Writev::new(fd, first, count).offset(offset).rw_flags(libc::RWF_DSYNC).build()
            }
            (Op::Sync, _) => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        };
        // SAFETY: the caller keeps what the entry points to until the completion is taken, and `image` the file.
        if !unsafe { self.push(&entry.user_data(u64::from(tag))) } {
            self.done.push((tag, -libc::EBUSY));
        }
    }

    fn wait(&mut self) -> io::Result<u64> {
        let want = usize::from(self.done.is_empty());
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            // Interrupted, or the kernel wants completions taken first.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            Err(e) => return Err(e),
        }
        self.reap()?;
        Ok(std::mem::take(&mut self.kicks))
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.done);
    }
}

/// Length of a buffer; the kernel takes no more than this at a time, and the rest is asked for again.
fn length(iovec: &libc::iovec) -> u32 {
    u32::try_from(iovec.iov_len).unwrap_or(u32::MAX)
}
