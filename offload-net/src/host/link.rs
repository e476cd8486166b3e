//! What a network's frames to and from the host go through: a TAP, or an interface of the host's own.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use proto::error::Error;

use super::packet::PacketSocket;
use super::tap::Tap;
use crate::frame::Frame;

/// Most pieces of memory a frame may be in that is sent, two of them its headers. Drivers use about 20.
const PIECES_MAX: usize = 128;

/// A way to the host and beyond.
#[derive(Debug)]
pub enum Link {
    /// The card has made it.
    Tap(Tap),
    /// It is the host's.
    Interface(PacketSocket),
}

impl Link {
    /// Takes one frame, [`crate::frame::header::LEN`] bytes of vnet header first; the number of bytes read.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tap(tap) => tap.read(buf),
            Self::Interface(socket) => socket.read(buf),
        }
    }

    /// Sends one frame, its payload straight from the sender's memory.
    ///
    /// # Errors
    /// `WouldBlock` when the kernel's queue is full; `InvalidInput` for a frame in too many pieces or one that the
    /// kernel does not take.
    pub fn send(&self, frame: &Frame<'_>) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.send(frame),
            Self::Interface(socket) => socket.send(frame),
        }
    }

    /// What [`Link::send`] or [`Link::read`] failed with means that the interface is gone or down.
    pub fn is_lost(&self, e: &io::Error) -> bool {
        match self {
            Self::Tap(_) => e.raw_os_error() == Some(libc::EBADFD),
            Self::Interface(_) => {
                matches!(e.raw_os_error(), Some(libc::ENETDOWN | libc::ENODEV | libc::ENXIO))
            }
        }
    }

    /// Deletes what the card has made.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn remove(&self) -> Result<(), Error> {
        match self {
            Self::Tap(tap) => tap.remove(),
            Self::Interface(_) => Ok(()),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tap(tap) => tap.as_fd(),
            Self::Interface(socket) => socket.as_fd(),
        }
    }
}

/// Writes a vnet header and a frame as one.
pub(super) fn write(fd: BorrowedFd<'_>, header: &[u8], frame: &Frame<'_>) -> io::Result<()> {
    let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PIECES_MAX];
    let mut count = 0;
    let mut add = |base: *const u8, iov_len: usize| {
        if let Some(piece) = pieces.get_mut(count) {
            *piece = libc::iovec { iov_base: base.cast_mut().cast(), iov_len };
        }
        count += 1;
    };
    add(header.as_ptr(), header.len());
    add(frame.head.as_ptr(), frame.head.len());
    frame.tail.for_each(frame.tail_bytes, |part| add(part.ptr_guard().as_ptr(), part.len()));
    if count > PIECES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the first `count` pieces are the header, the head and parts of the tail, all of which live until the
    // end of this function, the tail because `frame` borrows what keeps it mapped. The kernel only reads them; that a
    // guest may write to the tail meanwhile concerns nobody but the frame's receiver.
    let n = unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), count as libc::c_int) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
