//! Event file descriptors: kicks from a driver, calls to it, wake-ups between our own threads.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// A non-blocking eventfd.
#[derive(Debug)]
pub struct Event(File);

impl Event {
    /// A new one with count 0, closed on exec.
    pub fn new() -> io::Result<Self> {
        let fd = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self(File::from(OwnedFd::from(fd))))
    }

    /// One that a peer passed to us. Anything that is not an eventfd is refused: reading or writing it could block the
    /// data thread, or do worse. Non-blocking mode is switched on, which the peer's copy shares.
    pub fn from_peer(fd: OwnedFd) -> io::Result<Self> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if !link.as_os_str().as_encoded_bytes().starts_with(b"anon_inode:[eventfd") {
            let what = link.display();
            return Err(io::Error::new(ErrorKind::InvalidInput, format!("{what} is not an eventfd")));
        }
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(File::from(fd)))
    }

    /// Another handle on the same count.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Adds one to the count. A count that is full already says what we have to say, so nothing is reported.
    pub fn signal(&self) {
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// Takes the count and leaves 0; 0 if nothing was signalled.
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        match (&self.0).read(&mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl From<Event> for OwnedFd {
    fn from(event: Event) -> Self {
        event.0.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_never_blocks() {
        let event = Event::new().unwrap();
        assert_eq!(event.take(), 0);
        event.signal();
        event.try_clone().unwrap().signal();
        assert_eq!(event.take(), 2);
        assert_eq!(event.take(), 0);
    }

    #[test]
    fn a_peers_fd_must_be_an_eventfd() {
        assert!(Event::from_peer(File::open("/dev/null").unwrap().into()).is_err());
        let event = Event::from_peer(Event::new().unwrap().into()).unwrap();
        assert_eq!(event.take(), 0);
    }
}
