//! Device records: what a card must know to be whole again after a crash.
//!
//! One file per device, `devices/ID.pb`, a versioned protobuf, written beside and renamed into place before the device
//! is announced to anybody. A process that is killed keeps what it renamed, so nothing is synced to disk: the runtime
//! directory does not survive the host.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Group, chown, getegid};
use prost::Message;
use proto::error::Error;
use proto::v1::{DeviceRecord, DeviceSpec};
use tracing::warn;

use super::host_error;

/// Version of the records written, and the newest that is understood. It counts changes that a card must know of to serve
/// the device rightly; a field that may be overlooked changes nothing.
const VERSION: u32 = 1;
/// Members may connect to device sockets.
const VHOST_GROUP: &str = "outboard-vhost";

fn failed(what: &str, path: &Path, e: &io::Error) -> Error {
    host_error(&format!("cannot {what} {}", path.display()), e)
        .resource(path.display().to_string())
        .remedy("check the runtime directory and its permissions")
}

/// Makes `path` unless it is there.
pub(super) fn make_directory(path: &Path, mode: u32) -> Result<(), Error> {
    match fs::create_dir_all(path) {
        Ok(()) if path.is_dir() => {}
        Ok(()) => return Err(failed("use directory", path, &io::ErrorKind::NotADirectory.into())),
        Err(e) => return Err(failed("make directory", path, &e)),
    }
    // Not ours to change if systemd made it for another user; what matters is tried when it is used.
    let _ = fs::set_permissions(path, Permissions::from_mode(mode));
    Ok(())
}

/// Makes the directory of device sockets. If the host has the group `outboard-vhost`, its members may enter, and sockets
/// made inside belong to it (setgid).
pub(super) fn make_device_directory(path: &Path) -> Result<(), Error> {
    // A predecessor has done it all: guests wait, and to look a group up may take asking another process.
    let is_given = |m: fs::Metadata| m.mode() & 0o7777 == 0o2750 && m.gid() != getegid().as_raw();
    if fs::symlink_metadata(path).is_ok_and(|m| m.is_dir() && is_given(m)) {
        return Ok(());
    }
    make_directory(path, 0o750)?;
    match Group::from_name(VHOST_GROUP) {
        Ok(Some(group)) => {
            let owned = chown(path, None, Some(group.gid)).map_err(io::Error::from);
            if let Err(e) = owned.and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o2750))) {
                warn!(
                    "cannot give {} to group {VHOST_GROUP}: {e}; only this user can connect",
                    path.display()
                );
            }
        }
        Ok(None) => {}
        Err(e) => warn!("cannot look up group {VHOST_GROUP}: {e}"),
    }
    Ok(())
}

/// Where the record of device `id` is.
pub(super) fn path(directory: &Path, id: &str) -> PathBuf {
    directory.join(format!("{id}.pb"))
}

/// Writes a device's record, all or nothing.
pub(super) fn write(directory: &Path, spec: &DeviceSpec) -> Result<(), Error> {
    let record = DeviceRecord { version: VERSION, spec: Some(spec.clone()) };
    let path = path(directory, &spec.id);
    let new = directory.join(format!(".{}.new", spec.id));
    let written = File::create(&new)
        .and_then(|mut file| file.write_all(&record.encode_to_vec()))
        .and_then(|()| fs::rename(&new, &path));
    written.map_err(|e| {
        let _ = fs::remove_file(&new);
        failed("write", &path, &e)
    })
}

/// Removes a device's record; it is all right if there is none.
pub(super) fn remove(directory: &Path, id: &str) -> Result<(), Error> {
    let path = path(directory, id);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path, &e)),
        _ => Ok(()),
    }
}

/// All records, by id. What cannot be read is logged and left out.
pub(super) fn read_all(directory: &Path) -> Vec<DeviceSpec> {
    let mut specs = Vec::new();
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) => {
            warn!("cannot read {}: {e}", directory.display());
            return specs;
        }
    };
    for path in entries.filter_map(|e| Some(e.ok()?.path())) {
        let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if hidden {
            // A write that a crash interrupted.
            let _ = fs::remove_file(&path);
        } else if path.extension().is_some_and(|e| e == "pb") {
            match read(&path) {
                Ok(spec) => specs.push(spec),
                Err(e) => warn!("device record {} is unusable: {e}", path.display()),
            }
        }
    }
    specs.sort_by(|a, b| a.id.cmp(&b.id));
    specs
}

fn read(path: &Path) -> Result<DeviceSpec, String> {
    let bytes = fs::read(path).map_err(|e| e.to_string())?;
    let record = DeviceRecord::decode(bytes.as_slice()).map_err(|e| e.to_string())?;
    if record.version == 0 {
        return Err("it has no version".into());
    }
    if record.version > VERSION {
        let newer = record.version;
        return Err(format!(
            "its version is {newer}, and this card understands up to {VERSION}: upgrade the card"
        ));
    }
    let spec = record.spec.ok_or("it has no specification")?;
    if path.file_stem().is_none_or(|stem| stem != spec.id.as_str()) {
        return Err(format!("it is of device {:?}", spec.id));
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use proto::v1::BlockDeviceSpec;
    use proto::v1::device_spec::Kind;

    use super::*;

    #[test]
    fn records_survive_and_rubbish_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let spec = |id: &str| DeviceSpec { id: id.into(), kind: None, limits: None, net_limits: None };
        write(dir.path(), &spec("b")).unwrap();
        write(dir.path(), &spec("a")).unwrap();
        write(dir.path(), &spec("a")).unwrap();
        fs::write(dir.path().join("c.pb"), b"\xff\xff").unwrap();
        fs::write(dir.path().join(".d.new"), b"half").unwrap();
        fs::copy(dir.path().join("a.pb"), dir.path().join("e.pb")).unwrap();
        assert_eq!(read_all(dir.path()), [spec("a"), spec("b")]);
        assert!(!dir.path().join(".d.new").exists());
        remove(dir.path(), "a").unwrap();
        remove(dir.path(), "a").unwrap();
        assert_eq!(read_all(dir.path()), [spec("b")]);
    }

    /// A record as bytes, with what another version of the schema has or has not.
    fn record(version: Option<u8>, fields: &[&[u8]]) -> Vec<u8> {
        let mut bytes: Vec<u8> = version.map_or_else(Vec::new, |v| vec![0x08, v]);
        let spec = [&[0x0a, 1, b'a'][..], &fields.concat()].concat();
        bytes.extend([0x12, spec.len() as u8]);
        bytes.extend(spec);
        bytes
    }

    #[test]
    fn records_of_older_and_newer_cards_are_understood() {
        let dir = tempfile::tempdir().unwrap();
        let read = |bytes: &[u8]| {
            fs::write(dir.path().join("a.pb"), bytes).unwrap();
            read_all(dir.path())
        };
        let kind = |block| Some(Kind::Block(block));
        // block { path: "/i" }: what the first version had, no more.
        let old: &[u8] = &[0x12, 4, 0x0a, 2, b'/', b'i'];
        let block = BlockDeviceSpec { path: "/i".into(), ..Default::default() };
        assert_eq!(
            read(&record(Some(1), &[old])),
            [DeviceSpec { id: "a".into(), kind: kind(block.clone()), limits: None, net_limits: None }]
        );
        // The same with fields that nobody knows yet, in the block's specification, in the device's, and in the record:
        // 1000: 7, and 1001: "new".
        let unknown: &[u8] = &[0xc0, 0x3e, 7, 0xca, 0x3e, 3, b'n', b'e', b'w'];
        let newer_block = [&[0x12, 4 + unknown.len() as u8][..], &old[2..], unknown].concat();
        let mut newer = record(Some(1), &[&newer_block, unknown]);
        newer.extend(unknown);
        assert_eq!(
            read(&newer),
            [DeviceSpec { id: "a".into(), kind: kind(block), limits: None, net_limits: None }]
        );
        // What must not be overlooked, and what is no record.
        assert!(read(&record(Some(2), &[old])).is_empty());
        assert!(read(&record(None, &[old])).is_empty());
    }

    #[test]
    fn a_record_that_cannot_be_written_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let spec = DeviceSpec { id: "x".into(), kind: None, limits: None, net_limits: None };
        let e = write(&dir.path().join("none"), &spec).unwrap_err();
        assert!(e.message().contains("x.pb"), "{e}");
    }
}
