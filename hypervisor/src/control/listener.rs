//! The control socket: made here, or handed over by systemd.

use std::fmt;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// A listening control socket.
#[derive(Debug)]
pub struct Listener {
    pub(super) socket: UnixListener,
    /// To be removed at the end; `None` if it is somebody else's.
    pub(super) path: Option<PathBuf>,
}

/// Why there is no control socket.
#[derive(Debug)]
pub struct ListenError {
    what: String,
    remedy: &'static str,
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.remedy)
    }
}

impl std::error::Error for ListenError {}

impl Listener {
    /// The socket that the service manager passed (`LISTEN_FDS`), if it passed one. Must be called before there are other
    /// threads, as it clears the environment variables.
    ///
    /// # Errors
    /// If what was passed is no listening Unix socket, or more than one was.
    pub fn activated() -> Result<Option<Self>, ListenError> {
        let error = |what: String| ListenError {
            what,
            remedy: "check the socket unit: it needs one ListenStream= with a path",
        };
        let mut fds = sd_notify::listen_fds()
            .map_err(|e| error(format!("cannot take the socket from the service manager: {e}")))?;
        let Some(fd) = fds.next() else { return Ok(None) };
        if fds.next().is_some() {
            return Err(error("the service manager passed more than one socket".to_owned()));
        }
        if !is_listening_unix_socket(fd) {
            return Err(error("what the service manager passed is no listening Unix socket".to_owned()));
        }
        // SAFETY: the service manager passed the descriptor to this process for this purpose; nobody else takes it.
        Ok(Some(Self { socket: unsafe { UnixListener::from_raw_fd(fd) }, path: None }))
    }

    /// Makes a socket at `path` that its owner and group may connect to. A socket that a dead process left there is replaced.
    ///
    /// # Errors
    /// If there is something else, or somebody answers, or the host refuses.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        match proto::socket::listen(path, |_| {}) {
            Ok(socket) => Ok(Self { socket, path: Some(path.to_owned()) }),
            Err(e) => Err(ListenError {
                what: format!("cannot listen on {}: {e}", path.display()),
                remedy: match e.kind() {
                    io::ErrorKind::AddrInUse => "stop it or choose another path for --control",
                    io::ErrorKind::AlreadyExists => "choose another path for --control",
                    _ => "check that its directory exists and may be written",
                },
            }),
        }
    }
}

fn is_listening_unix_socket(fd: RawFd) -> bool {
    let option = |name| {
        let mut value: libc::c_int = 0;
        let mut length = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the buffer is as long as said; a descriptor that is no socket is refused.
        let r =
            unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut length) };
        (r == 0).then_some(value)
    };
    option(libc::SO_DOMAIN) == Some(libc::AF_UNIX)
        && option(libc::SO_TYPE) == Some(libc::SOCK_STREAM)
        && option(libc::SO_ACCEPTCONN) == Some(1)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_cannot_be_a_socket_is_said_with_its_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let listener = Listener::bind(&path).unwrap();
        assert!(is_listening_unix_socket(listener.socket.as_raw_fd()));
        assert!(
            Listener::bind(&path).unwrap_err().to_string().contains("another process serves it; stop it")
        );
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(Listener::bind(&file).unwrap_err().to_string().contains("is no socket; choose another"));
        assert!(Listener::bind(&dir.path().join("no/c.sock")).unwrap_err().to_string().contains("directory"));
    }

    #[test]
    fn other_descriptors_are_no_listeners() {
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(!is_listening_unix_socket(a.as_raw_fd()));
        assert!(!is_listening_unix_socket(tempfile::tempfile().unwrap().as_raw_fd()));
    }
}
