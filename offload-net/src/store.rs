//! Network specifications as files: one `NetworkRecord` per network, replaced atomically.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use prost::Message;
use proto::error::{Error, ErrorReason};
use proto::v1::{NetworkRecord, NetworkSpec};
use tonic::Code;

/// What we write. Newer versions only add fields, so newer records are read all the same.
const VERSION: u32 = 1;

/// The directory with the records.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// Makes the directory if need be.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(directory: PathBuf) -> Result<Self, Error> {
        fs::create_dir_all(&directory).map_err(|e| failed("make", &directory, &e))?;
        Ok(Self { directory })
    }

    /// All records. One that cannot be read is logged and left out: the other networks are not to suffer from it.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn load(&self) -> Result<Vec<NetworkSpec>, Error> {
        let list = |e| failed("list", &self.directory, &e);
        let mut specs = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(list)? {
            let path = entry.map_err(list)?.path();
            if path.extension().is_none_or(|e| e != "pb") {
                continue;
            }
            match fs::read(&path).map(|bytes| NetworkRecord::decode(bytes.as_slice())) {
                Ok(Ok(NetworkRecord { spec: Some(spec), .. })) => specs.push(spec),
                Ok(Ok(_)) => tracing::error!("{} holds no network", path.display()),
                Ok(Err(e)) => tracing::error!("{} is no network record: {e}", path.display()),
                Err(e) => tracing::error!("cannot read {}: {e}", path.display()),
            }
        }
        specs.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(specs)
    }

    /// Writes a record, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, spec: &NetworkSpec) -> Result<(), Error> {
        let record = NetworkRecord { version: VERSION, spec: Some(spec.clone()) };
        let path = self.path(&spec.id);
        replace(&path, &record.encode_to_vec()).map_err(|e| failed("write", &path, &e))
    }

    /// Removes a record; none is fine.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path, &e)),
            _ => Ok(()),
        }
    }

    fn path(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.pb"))
    }
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

fn failed(what: &str, path: &Path, e: &io::Error) -> Error {
    Error::new(Code::Internal, ErrorReason::Host, format!("cannot {what} {}: {e}", path.display()))
        .resource(path.display().to_string())
        .remedy("check the runtime directory's owner, mode and free space")
        .with("errno", e.raw_os_error().unwrap_or(0).to_string())
}
