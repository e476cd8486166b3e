//! I/O by io_uring: a batch of transfers per system call ([`super::ring`]), and what is quicker without.
//!
//! The image is not registered with the ring. The kernel takes a ring down in its own time, tens of milliseconds after its
//! process was killed, and keeps registered files open, and locked, until then: guests would wait for that. An image that
//! is not registered is kept by the transfers under way, and no longer.
//!
//! What only the image's format can do, its own threads do, and say so by an eventfd that the ring polls.
//!
//! What needs no waiting is quicker without a ring: data in the page cache is copied from there if it was seen there
//! before ([`super::cached`]), or read by a preadv2 that must not block, and a small write goes into the page cache by
//! pwritev2, which io_uring would hand to a worker thread.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::opcode;
use io_uring::types::{Fd, FsyncFlags};
use offload_card::memory::View;

use super::cached::{Cached, Seen};
use super::ring::{Ended, Place};
use super::{Begun, Completion, Op, Target, Transfer, Wakers, calls};
use crate::image::Image;
use crate::qcow2::{Mailbox, Qcow2, Work};

// Tokens of what the ring polls.
const KICK: u16 = 0;
const ORDERS: u16 = 1;
const FORMATTED: u16 = 2;

/// Longest write into the page cache that the queue's thread does itself, in bytes.
const WRITE_HERE_BYTES: usize = 64 * 1024;

/// What the format's own threads do for this queue.
struct Formatted {
    qcow2: Arc<Qcow2>,
    mailbox: Arc<Mailbox>,
    /// Given to them and not yet seen again.
    pending: usize,
    done: Vec<Completion>,
}

/// I/O by io_uring.
pub(crate) struct Uring {
    // Goes before what it polls.
    place: Place,
    image: Arc<Image>,
    formatted: Option<Formatted>,
    /// Open as long as they are polled.
    _wakers: Wakers,
    /// Seen and not yet counted.
    pub(super) kicks: u64,
    /// Reads are tried here first, as long as the file system can say that it would have to wait.
    read_here: bool,
    write_here: bool,
    /// Direct writes are completed by a kernel thread on this processor, one by one.
    gathers: bool,
    pub(super) cached: Cached,
}

impl Uring {
    /// For up to `depth` transfers at a time; belongs to the calling thread, as the ring does. With `here`, what needs no waiting is
    /// done without the ring.
    pub(super) fn new(
        target: Target,
        mut place: Place,
        wakers: Wakers,
        depth: u16,
        here: bool,
        seen: &Arc<Seen>,
    ) -> io::Result<Self> {
        let Target { image, qcow2 } = target;
        let cached = here && !image.direct();
        let formatted = qcow2.map(|qcow2| -> io::Result<_> {
            let mailbox = Arc::new(Mailbox::new(depth)?);
            Ok(Formatted { qcow2, mailbox, pending: 0, done: Vec::with_capacity(depth.into()) })
        });
        let formatted = formatted.transpose()?;
        place.watch(KICK, wakers.kick.as_raw_fd())?;
        place.watch(ORDERS, wakers.orders.as_raw_fd())?;
        if let Some(formatted) = &formatted {
            place.watch(FORMATTED, formatted.mailbox.event.as_raw_fd())?;
        }
        place.begin()?;
        Ok(Self {
            place,
            cached: Cached::new(seen.clone()),
            gathers: image.direct() && !image.geometry().block_device,
            image,
            formatted,
            _wakers: wakers,
            kicks: 0,
            read_here: cached,
            write_here: cached,
        })
    }

    /// Begins a transfer.
    ///
    /// # Safety
    ///
    /// As [`super::Backend::begin`].
    pub(super) unsafe fn begin(&mut self, tag: u16, transfer: &Transfer<'_>) -> Begun {
        if transfer.formatted
            && let Some(formatted) = &mut self.formatted
        {
            formatted.pending += 1;
            // SAFETY: the caller's promise is ours.
            unsafe { formatted.qcow2.submit(tag, Work::new(transfer), &formatted.mailbox) };
            return Begun::Pending;
        }
        // SAFETY: the caller's promise is ours.
        if let Some(result) = unsafe { self.try_here(transfer) } {
            return Begun::Done(result);
        }
        let file = if transfer.unaligned { self.image.buffered() } else { self.image.file() };
        let file = Fd(file.as_raw_fd());
        let (offset, iovecs) = (transfer.offset, transfer.iovecs);
        let (first, count) = (iovecs.as_ptr(), iovecs.len() as u32);
        let flags = if transfer.op == Op::WriteThrough { libc::RWF_DSYNC } else { 0 };
        let entry = match (transfer.op, iovecs) {
            (Op::Read, [one]) => match self.place.buffer(one) {
                Some(buffer) => opcode::ReadFixed::new(file, one.iov_base.cast(), length(one), buffer)
                    .offset(offset)
                    .build(),
                None => opcode::Read::new(file, one.iov_base.cast(), length(one)).offset(offset).build(),
            },
            (Op::Read, _) => opcode::Readv::new(file, first, count).offset(offset).build(),
            (Op::Write | Op::WriteThrough, [one]) => match self.place.buffer(one) {
                Some(buffer) => opcode::WriteFixed::new(file, one.iov_base.cast(), length(one), buffer)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
                None => opcode::Write::new(file, one.iov_base.cast(), length(one))
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
            },
            (Op::Write | Op::WriteThrough, _) => {
                opcode::Writev::new(file, first, count).offset(offset).rw_flags(flags).build()
            }
            (Op::Punch | Op::Zero | Op::Discard, _) => opcode::Fallocate::new(file, transfer.length)
                .offset(offset)
                .mode(calls::fallocate_mode(transfer.op))
                .build(),
            (Op::Sync, _) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        };
        let gathered = self.gathers && transfer.op == Op::Write && !transfer.unaligned;
        // SAFETY: the caller keeps what the entry points to until the completion is taken, and `image` the file.
        if unsafe { self.place.transfer(entry, tag, gathered) } { Begun::Pending } else { Begun::Full }
    }

    /// Does a transfer at once if it needs no waiting.
    ///
    /// # Safety
    ///
    /// The memory that the iovecs name is valid.
    unsafe fn try_here(&mut self, transfer: &Transfer<'_>) -> Option<i32> {
        match transfer.op {
            Op::Read if self.read_here => {
                // SAFETY: the caller's promise is ours.
                let copied = unsafe { self.cached.read(transfer.offset, transfer.iovecs) };
                if copied.is_some() {
                    return copied;
                }
                // SAFETY: as above.
                match -unsafe { calls::transfer(&self.image, transfer, libc::RWF_NOWAIT) } {
                    libc::EAGAIN => None,
                    libc::EOPNOTSUPP => {
                        self.read_here = false;
                        None
                    }
                    // An end that is not there, or an error: the ring's word counts.
                    0.. => None,
                    moved => {
                        self.cached.saw(&self.image, transfer.offset, moved.unsigned_abs() as usize);
                        Some(-moved)
                    }
                }
            }
            Op::Write
                if self.write_here
                    && transfer.iovecs.iter().map(|v| v.iov_len).sum::<usize>() <= WRITE_HERE_BYTES =>
            {
                // SAFETY: as above.
                Some(unsafe { calls::transfer(&self.image, transfer, 0) })
            }
            Op::Read | Op::Write | Op::WriteThrough | Op::Sync | Op::Punch | Op::Zero | Op::Discard => None,
        }
    }

    /// As [`Place::poll`].
    pub(super) fn poll(&mut self, leave: bool) -> io::Result<bool> {
        self.place.poll(leave)
    }

    /// As [`Place::wait`].
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.place.wait(timeout)
    }

    /// The guest's memory, from now on.
    pub(super) fn use_memory(&mut self, view: &Arc<View>) {
        self.place.use_memory(view);
    }

    /// As [`Place::registered_bytes`].
    pub(super) fn registered_bytes(&self) -> u64 {
        self.place.registered_bytes()
    }

    /// The next completion of a transfer.
    pub(super) fn completion(&mut self) -> Option<Completion> {
        if let Some(formatted) = &mut self.formatted
            && formatted.pending > 0
        {
            if formatted.done.is_empty() {
                formatted.mailbox.take(&mut formatted.done);
            }
            if let Some(done) = formatted.done.pop() {
                formatted.pending -= 1;
                return Some(done);
            }
        }
        loop {
            match self.place.ended()? {
                Ended::Transfer(tag, result) => return Some((tag, result)),
                Ended::Signal(token) => self.kicks += u64::from(token == KICK),
            }
        }
    }
}

/// Length of a buffer; the kernel takes no more than this at a time, and the rest is asked for again.
fn length(iovec: &libc::iovec) -> u32 {
    u32::try_from(iovec.iov_len).unwrap_or(u32::MAX)
}
