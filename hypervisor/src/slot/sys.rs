//! The system calls of the slot's sockets that the standard library does not offer.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Most file descriptors taken from one message; vhost-user replies carry at most one.
const MAX_FDS: usize = 8;

/// Connects to the Unix stream socket at `path` without ever waiting: a listener whose queue is full (because its process
/// hangs) is `WouldBlock`. The stream is non-blocking.
///
/// # Errors
/// What the host says.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: all zeroes is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no path of a Unix socket"));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: a plain system call; the result is checked before use.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and belongs to nobody else.
    let stream = unsafe { UnixStream::from_raw_fd(fd) };
    let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: `address` is a sockaddr_un of `length` bytes that outlives the call.
    let r = unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), length) };
    if r == 0 { Ok(stream) } else { Err(io::Error::last_os_error()) }
}

/// Lets the calling thread run as soon as it is woken, for a short time, although vCPUs may keep every processor busy: each step of
/// a link that makes a device anew would wait for a tick. Linux from 6.12 on takes the slice that a thread asks for as a sign
/// of that; it needs no right, as a thread does not run longer for it.
///
/// # Errors
/// What the host says; nothing has changed.
pub(super) fn run_soon() -> io::Result<()> {
    /// The shortest slice that there is, in nanoseconds.
    const SLICE_NS: u64 = 100_000;
    let check = |r: libc::c_long| if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: all zeroes is a valid sched_attr.
    let mut attributes: libc::sched_attr = unsafe { mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: the call writes `size` bytes at most to the attributes, which have as many and outlive it.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) })?;
    (attributes.size, attributes.sched_flags) = (size, 0);
    if attributes.sched_policy == libc::SCHED_OTHER.unsigned_abs() {
        attributes.sched_runtime = SLICE_NS;
        // SAFETY: the call reads as many bytes of the attributes as they say, and they outlive it.
        check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })?;
    }
    Ok(())
}

/// Sees when a file is created, so that nobody has to look again and again.
#[derive(Debug)]
pub(super) struct Watch {
    inotify: File,
    name: OsString,
}

/// What a [`Watch`] has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing of interest.
    Nothing,
    /// The file was created or moved to its place.
    Created,
    /// The directory has gone, and nothing more will be seen.
    Gone,
}

impl Watch {
    /// Watches for `path`.
    ///
    /// # Errors
    /// What the host says: the directory may not exist (yet), and there may be too many watches.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = CString::new(directory.as_os_str().as_bytes())?;
        // SAFETY: a plain system call; the result is checked before use.
        let fd = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and belongs to nobody else.
        let inotify = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let events = libc::IN_CREATE | libc::IN_MOVED_TO | libc::IN_DELETE_SELF | libc::IN_MOVE_SELF;
        // SAFETY: the descriptor is open and the path a C string that outlives the call.
        let r = unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), directory.as_ptr(), events) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(Self { inotify, name }) }
    }

    /// For waiting until something happens.
    pub(super) fn fd(&self) -> &File {
        &self.inotify
    }

    /// What has happened since this was last asked.
    pub(super) fn take(&self) -> Seen {
        let mut seen = Seen::Nothing;
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = (&self.inotify).read(&mut buffer) {
            for (mask, name) in events(&buffer[..length]) {
                // Without a name it is about the directory itself, or too much has happened to tell.
                if mask & (libc::IN_DELETE_SELF | libc::IN_MOVE_SELF | libc::IN_IGNORED | libc::IN_Q_OVERFLOW)
                    != 0
                {
                    return Seen::Gone;
                }
                if name == self.name.as_bytes() {
                    seen = Seen::Created;
                }
            }
        }
        seen
    }
}

/// The events in what was read from inotify: mask and name.
fn events(mut bytes: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    /// Watch, mask, cookie and length of the name, 32 bits each.
    const HEADER: usize = 16;
    std::iter::from_fn(move || {
        let (header, rest) = bytes.split_at_checked(HEADER)?;
        let word = |at: usize| header[at..at + 4].try_into().map(u32::from_ne_bytes).ok();
        let (name, rest) = rest.split_at_checked(word(12)? as usize)?;
        bytes = rest;
        let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
        Some((word(4)?, &name[..end]))
    })
}

/// Something to wait for.
#[derive(Clone, Copy)]
pub(super) struct Wait<'a>(Option<BorrowedFd<'a>>, libc::c_short);

impl<'a> Wait<'a> {
    /// Until `fd` has something to read, or its peer has gone.
    pub(super) fn readable(fd: &'a impl AsFd) -> Self {
        Self(Some(fd.as_fd()), libc::POLLIN)
    }

    /// Until `fd` takes data, or its peer has gone.
    pub(super) fn writable(fd: &'a impl AsFd) -> Self {
        Self(Some(fd.as_fd()), libc::POLLOUT)
    }

    /// [`Wait::readable`] for an eventfd.
    pub(super) fn event(fd: &'a vmm_sys_util::eventfd::EventFd) -> Self {
        // SAFETY: the eventfd is open for as long as it is borrowed.
        Self(Some(unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }), libc::POLLIN)
    }

    /// Not at all.
    pub(super) fn nothing() -> Self {
        Self(None, 0)
    }

    /// [`Wait::readable`] if there is an `fd`.
    pub(super) fn optional(fd: Option<&'a impl AsFd>) -> Self {
        Self(fd.map(AsFd::as_fd), libc::POLLIN)
    }
}

/// Waits for the first of several things, or for `timeout` to pass (for ever without one). Says for each whether it happened;
/// none may have, if a signal came.
///
/// # Errors
/// What the host says.
pub(super) fn poll<const N: usize>(waits: [Wait<'_>; N], timeout: Option<Duration>) -> io::Result<[bool; N]> {
    let mut fds = waits.map(|Wait(fd, events)| libc::pollfd {
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events,
        revents: 0,
    });
    // Rounded up: a millisecond early would spin.
    let milliseconds = timeout
        .map_or(-1, |t| libc::c_int::try_from(t.as_micros().div_ceil(1000)).unwrap_or(libc::c_int::MAX));
    // SAFETY: `fds` is an array of N pollfd that outlives the call.
    let r = unsafe { libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, milliseconds) };
    if r < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok([false; N]) } else { Err(error) };
    }
    Ok(fds.map(|fd| fd.revents != 0))
}

/// Reads what is there, at most `buffer.len()` bytes, with the file descriptors that came along. 0: the peer has closed.
///
/// # Errors
/// What the host says; `ENOBUFS` if there were too many file descriptors (none of them stays open).
pub(super) fn receive(socket: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<File>)> {
    let mut fds = [-1; MAX_FDS];
    let mut parts = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    // SAFETY: the iovec describes `buffer`, which outlives the call and takes any bytes.
    let (bytes, count) = unsafe { socket.recv_with_fds(&mut parts, &mut fds) }?;
    let files = fds
        .iter()
        .take(count)
        // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
        .map(|&fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
        .collect();
    Ok((bytes, files))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_may_want_to_run_soon() {
        std::thread::spawn(run_soon).join().unwrap().unwrap();
    }

    #[test]
    fn a_watch_sees_its_file_only() {
        let dir = tempfile::tempdir().unwrap();
        let watch = Watch::new(&dir.path().join("a")).unwrap();
        assert_eq!(watch.take(), Seen::Nothing);
        File::create(dir.path().join("b")).unwrap();
        assert_eq!(poll([Wait::readable(watch.fd())], None).unwrap(), [true]);
        assert_eq!(watch.take(), Seen::Nothing);
        File::create(dir.path().join("c")).unwrap();
        File::create(dir.path().join("a")).unwrap();
        assert_eq!(watch.take(), Seen::Created);
        drop(dir);
        assert_eq!(watch.take(), Seen::Gone);
        assert!(Watch::new(Path::new("/nonexistent/a")).is_err());
    }

    #[test]
    fn a_listener_that_takes_nobody_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let streams: Vec<_> = std::iter::from_fn(|| connect(&path).ok()).take(10_000).collect();
        assert!(streams.len() < 10_000);
        assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let long = "x".repeat(108);
        assert_eq!(connect(Path::new(&long)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    proptest::proptest! {
        #[test]
        fn events_of_any_bytes_end(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            assert!(events(&bytes).count() <= 200);
        }
    }
}
