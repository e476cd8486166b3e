//! The part of a service manager that keeps sockets for a process that comes back: what systemd does with `FDSTORE=1`.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// The first descriptor that is passed.
const LISTEN_FDS_START: RawFd = 3;
/// Where descriptors are meanwhile, so that none is overwritten before it is passed.
const ABOVE: RawFd = 512;

/// Keeps what a process wants kept.
pub struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    kept: Vec<(String, OwnedFd)>,
}

impl Manager {
    /// One that is told at a socket in `dir`.
    pub fn new(dir: &Path) -> Self {
        let path = dir.join("notify");
        let socket = UnixDatagram::bind(&path).expect("notification socket");
        socket.set_nonblocking(true).expect("notification socket");
        Self { socket, path, kept: Vec::new() }
    }

    /// Reads what has been told.
    fn listen(&mut self) {
        loop {
            let mut text = [0; 4096];
            let mut parts = [IoSliceMut::new(&mut text)];
            let mut space = cmsg_space!([RawFd; 4]);
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let (length, fds) =
                match recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
                    Ok(received) => {
                        let mut fds: Vec<OwnedFd> = Vec::new();
                        for message in received.cmsgs().expect("control messages") {
                            if let ControlMessageOwned::ScmRights(new) = message {
                                // SAFETY: the kernel has just made them for us.
                                fds.extend(new.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                            }
                        }
                        (received.bytes, fds)
                    }
                    Err(Errno::EAGAIN) => return,
                    Err(e) => panic!("notification: {e}"),
                };
            let text = String::from_utf8_lossy(&text[..length]).into_owned();
            let name = text.lines().find_map(|l| l.strip_prefix("FDNAME=")).unwrap_or_default().to_owned();
            if text.lines().any(|l| l == "FDSTOREREMOVE=1") {
                self.kept.retain(|(kept, _)| *kept != name);
            } else if text.lines().any(|l| l == "FDSTORE=1") {
                self.kept.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
            }
        }
    }

    /// The names of what is kept.
    pub fn names(&mut self) -> Vec<String> {
        self.listen();
        self.kept.iter().map(|(name, _)| name.clone()).collect()
    }

    /// `command` as a child of this manager: it is passed what is kept, and told where to say what is to be.
    pub fn child(&mut self, command: &Command) -> Command {
        let names = self.names().join(":");
        let fds: Vec<_> = self.kept.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        // Only the shell knows the process id that LISTEN_PID must have.
        let mut child = Command::new("sh");
        child.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""]);
        child.arg(command.get_program()).args(command.get_args());
        child.env("NOTIFY_SOCKET", &self.path);
        child.env("LISTEN_FDS", fds.len().to_string()).env("LISTEN_FDNAMES", names);
        let passed = move || {
            for (at, fd) in (ABOVE..).zip(&fds) {
                // SAFETY: dup3 is async-signal-safe.
                if unsafe { nix::libc::dup3(*fd, at, nix::libc::O_CLOEXEC) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            for (at, to) in (ABOVE..).zip(LISTEN_FDS_START..).take(fds.len()) {
                // SAFETY: dup2 is async-signal-safe.
                if unsafe { nix::libc::dup2(at, to) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: it makes system calls only.
        unsafe { child.pre_exec(passed) };
        child
    }
}
