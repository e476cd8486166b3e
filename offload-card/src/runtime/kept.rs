//! Device sockets that the service manager keeps while the card is away: systemd's file descriptor store.
//!
//! Such a socket goes on listening when its card has died or is being replaced by the next version. A link that has lost its device
//! connects to it at once and says what it has to say, and the next process finds that waiting. Without a service manager
//! a socket ends with its process, and links connect when the next one has made it anew.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use listenfd::ListenFd;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tracing::warn;

/// What the store calls the socket of a device: this and its id. No other socket that a service manager passes is called so.
const PREFIX: &str = "device.";

/// The sockets that have been kept for this process, and the way to have more of them kept for the next.
#[derive(Debug, Default)]
pub(super) struct KeptSockets {
    /// Those that no device has taken yet, by its id.
    waiting: Mutex<BTreeMap<String, UnixListener>>,
    /// Where the service manager listens, if there is one.
    manager: Option<UnixDatagram>,
}

impl KeptSockets {
    /// What the service manager has passed (LISTEN_FDS): the control socket, if it is among them, and those of devices.
    ///
    /// # Errors
    /// The first that is no device's is no Unix socket that listens.
    pub(super) fn from_environment() -> io::Result<(Option<UnixListener>, Self)> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let mut passed = ListenFd::from_env();
        let (mut control, mut waiting) = (None, BTreeMap::new());
        for index in 0..passed.len() {
            match names.next().and_then(|name| name.strip_prefix(PREFIX)) {
                None if control.is_none() => control = passed.take_unix_listener(index)?,
                None => {}
                Some(id) => match passed.take_unix_listener(index) {
                    Ok(listener) => waiting.extend(listener.map(|l| (id.to_owned(), l))),
                    Err(e) => warn!("what was kept as the socket of device {id} is none: {e}"),
                },
            }
        }
        let manager = std::env::var_os("NOTIFY_SOCKET").and_then(|path| match connect(Path::new(&path)) {
            Ok(manager) => Some(manager),
            Err(e) => {
                warn!("device sockets are not kept, for the service manager cannot be reached: {e}");
                None
            }
        });
        Ok((control, Self { waiting: Mutex::new(waiting), manager }))
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<String, UnixListener>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sockets outlive this process.
    pub(super) fn outlive(&self) -> bool {
        self.manager.is_some()
    }

    /// The socket that was kept for a device.
    pub(super) fn take(&self, id: &str) -> Option<UnixListener> {
        self.waiting().remove(id)
    }

    /// Has a device's socket kept. That it cannot be is no reason not to serve the device.
    pub(super) fn keep(&self, id: &str, listener: &UnixListener) {
        let Some(manager) = &self.manager else { return };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [listener.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let message = format!("FDSTORE=1\nFDNAME={PREFIX}{id}\n");
        let parts = [IoSlice::new(message.as_bytes())];
        if let Err(e) = rustix::net::sendmsg(manager, &parts, &mut control, SendFlags::NOSIGNAL) {
            warn!("the socket of device {id} is not kept while the card is away: {e}");
        }
    }

    /// A device's socket is not needed any more.
    pub(super) fn forget(&self, id: &str) {
        self.waiting().remove(id);
        let Some(manager) = &self.manager else { return };
        if let Err(e) = manager.send(format!("FDSTOREREMOVE=1\nFDNAME={PREFIX}{id}\n").as_bytes()) {
            warn!("the socket of device {id} is kept although it is not needed: {e}");
        }
    }

    /// Gives those up that belong to none of these devices.
    pub(super) fn retain(&self, known: impl Fn(&str) -> bool) {
        let strays: Vec<_> = self.waiting().keys().filter(|id| !known(id)).cloned().collect();
        strays.iter().for_each(|id| self.forget(id));
    }
}

/// Connects to the service manager's socket, whose path may be an abstract one ("@...").
fn connect(path: &Path) -> io::Result<UnixDatagram> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    let manager = UnixDatagram::unbound()?;
    match path.as_os_str().as_bytes().strip_prefix(b"@") {
        Some(name) => {
            manager.connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name)?)?;
        }
        None => manager.connect(path)?,
    }
    Ok(manager)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_is_kept_is_told_and_what_is_not_needed_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let listener = UnixListener::bind(dir.path().join("a.sock")).unwrap();
        let kept = KeptSockets {
            waiting: Mutex::new([("a".to_owned(), listener)].into()),
            manager: Some(connect(&path).unwrap()),
        };
        let said = || {
            let mut buffer = [0; 100];
            let length = manager.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        let other = UnixListener::bind(dir.path().join("b.sock")).unwrap();
        kept.keep("b", &other);
        assert_eq!(said(), "FDSTORE=1\nFDNAME=device.b\n");
        kept.retain(|id| id == "b");
        assert_eq!(said(), "FDSTOREREMOVE=1\nFDNAME=device.a\n");
        assert!(kept.take("a").is_none());
        assert!(UnixStream::connect(dir.path().join("a.sock")).is_err());
        assert!(kept.outlive() && !KeptSockets::default().outlive());
        // Nobody listens any more, and that is all right.
        drop(manager);
        kept.keep("b", &other);
        kept.forget("b");
    }
}
