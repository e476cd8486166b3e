//! Where services are reached on their host: Unix sockets, for owner and group.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Owner and group may connect.
const MODE: u32 = 0o660;

/// Listens at `path`, on which a dead predecessor may have left its socket, with mode 0660. Who sees the socket appear there
/// can connect to it: it gets its name when it listens and has its mode, and `own` has given it to whom it belongs. Until then it
/// has another name, and the mode that the umask leaves it.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] if somebody serves it, [`io::ErrorKind::AlreadyExists`] if something else has that name (which
/// stays), or what the host says.
pub fn listen(path: &Path, own: impl FnOnce(&Path)) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves it"));
        }
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut hidden = OsString::from(".");
    hidden.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    let new = path.with_file_name(hidden);
    // Somebody died in the middle of this.
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    own(&new);
    fs::set_permissions(&new, fs::Permissions::from_mode(MODE))
        .and_then(|()| fs::rename(&new, path))
        .inspect_err(|_| {
            let _ = fs::remove_file(&new);
        })?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

    use super::*;

    #[test]
    fn a_socket_has_its_owner_and_mode_before_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let changes = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        let all = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_MOVED_TO;
        changes.add_watch(dir.path(), all).unwrap();
        let _listener = listen(&path, |new| {
            assert!(new.exists() && !path.exists(), "{} is not to be seen yet", path.display());
        })
        .unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        let changes = changes.read_events().unwrap();
        let seen = changes.iter().filter(|e| e.name.as_deref() == path.file_name());
        assert_eq!(seen.map(|e| e.mask).collect::<Vec<_>>(), [AddWatchFlags::IN_MOVED_TO]);
    }

    #[test]
    fn a_socket_is_replaced_if_nobody_serves_it_and_a_file_never() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        fs::write(dir.path().join(".api.sock"), "left in the middle").unwrap();
        let _listener = listen(&path, |_| {}).unwrap();
        assert_eq!(listen(&path, |_| {}).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        UnixStream::connect(&path).unwrap();

        let file = dir.path().join("notes");
        fs::write(&file, "kept").unwrap();
        assert_eq!(listen(&file, |_| {}).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
    }
}
