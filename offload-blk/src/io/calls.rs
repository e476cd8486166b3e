//! Plain system calls: one transfer at a time, in the calling thread.

use std::io;
use std::os::fd::AsRawFd;

use super::{Op, Transfer};
use crate::image::Image;

/// How fallocate does [`Op::Punch`] and [`Op::Zero`]. The image keeps its size.
pub(super) fn fallocate_mode(op: Op) -> i32 {
    libc::FALLOC_FL_KEEP_SIZE
        | if op == Op::Zero { libc::FALLOC_FL_ZERO_RANGE } else { libc::FALLOC_FL_PUNCH_HOLE }
}

/// Does a transfer with preadv2, pwritev2, fdatasync or fallocate: bytes moved or a negative errno. `flags` are RWF_* for
/// reads and writes.
///
/// # Safety
///
/// The memory that the iovecs name is valid.
pub(super) unsafe fn transfer(image: &Image, transfer: &Transfer<'_>, flags: i32) -> i32 {
    let fd = (if transfer.unaligned { image.buffered() } else { image.file() }).as_raw_fd();
    let (iovecs, offset) = (transfer.iovecs, transfer.offset as libc::off_t);
    // Not by the functions of these names, where a thread can be cancelled: to say so costs them a sixtieth of what a read from
    // the page cache takes.
    let move_bytes = |number, flags: libc::c_int| {
        // SAFETY: `iovecs` is a slice, and what it names is valid as the caller promised. On 64-bit hosts the offset is one argument, and
        // the next one is not looked at.
        unsafe { libc::syscall(number, fd, iovecs.as_ptr(), iovecs.len(), offset, 0, flags) as isize }
    };
    loop {
        let result = match transfer.op {
            Op::Read => move_bytes(libc::SYS_preadv2, flags),
            Op::Write => move_bytes(libc::SYS_pwritev2, flags),
            Op::WriteThrough => move_bytes(libc::SYS_pwritev2, flags | libc::RWF_DSYNC),
            // SAFETY: it points to nothing.
            Op::Sync => unsafe { libc::fdatasync(fd) as isize },
            Op::Punch | Op::Zero | Op::Discard => {
                let length = transfer.length as libc::off_t;
                // SAFETY: as above.
                unsafe { libc::fallocate(fd, fallocate_mode(transfer.op), offset, length) as isize }
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
