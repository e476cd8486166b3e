//! Plain system calls, for hosts that do not permit io_uring. One transfer at a time.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use offload_card::poll::Poller;

use super::{Backend, Completion, Op, Transfer, Wakers};
use crate::image::Image;

const KICK: u64 = 0;
const ORDERS: u64 = 1;

/// I/O by preadv2, pwritev2 and fdatasync.
#[derive(Debug)]
pub(crate) struct SyncBackend {
    image: Arc<Image>,
    poller: Poller,
    /// Keeps what the poller watches open.
    _wakers: Wakers,
    done: Vec<Completion>,
}

impl Backend for SyncBackend {
    fn new(image: Arc<Image>, wakers: Wakers, depth: u16) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add_edge(&wakers.kick, KICK)?;
        poller.add_edge(&wakers.orders, ORDERS)?;
        Ok(Self { image, poller, _wakers: wakers, done: Vec::with_capacity(usize::from(depth)) })
    }

    unsafe fn submit(&mut self, tag: u16, transfer: &Transfer<'_>) {
        // SAFETY: the caller's promise is ours.
        let result = unsafe { transfer_now(self.image.file().as_raw_fd(), transfer) };
        self.done.push((tag, result));
    }

    fn wait(&mut self) -> io::Result<u64> {
        if !self.done.is_empty() {
            return Ok(0);
        }
        Ok(self.poller.wait(None)?.filter(|token| *token == KICK).count() as u64)
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.done);
    }
}

/// # Safety
///
/// The memory that the iovecs name is valid.
unsafe fn transfer_now(fd: i32, transfer: &Transfer<'_>) -> i32 {
    let (iovecs, offset) = (transfer.iovecs, transfer.offset as libc::off_t);
    let count = iovecs.len() as libc::c_int;
    loop {
        // SAFETY: `iovecs` is a slice, and what it names is valid as the caller promised.
        let result = unsafe {
            match transfer.op {
                Op::Read => libc::preadv2(fd, iovecs.as_ptr(), count, offset, 0),
                Op::Write => libc::pwritev2(fd, iovecs.as_ptr(), count, offset, 0),
                Op::WriteThrough => libc::pwritev2(fd, iovecs.as_ptr(), count, offset, libc::RWF_DSYNC),
                Op::Sync => libc::fdatasync(fd) as isize,
            }
        };
        if result >= 0 {
            // The kernel moves no more than 2 GiB - 4 KiB at a time.
            return i32::try_from(result).unwrap_or(i32::MAX);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return -error.raw_os_error().unwrap_or(libc::EIO);
        }
    }
}
