//! Specifications of networks and security groups as files: one record each, replaced atomically.

use std::fs::{self, File};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use prost::Message;
use proto::error::{Error, ErrorReason};
use proto::v1::{NetworkRecord, NetworkSpec, SecurityGroupRecord, SecurityGroupSpec};
use tonic::Code;

/// What we write, and the newest that is understood: it is raised by what a card must know to do it rightly, and not by a
/// field that may be overlooked.
const VERSION: u32 = 1;

/// What is kept of one thing.
pub trait Record: Message + Default {
    /// What it was asked for with.
    type Spec: Clone;
    /// What it is called.
    const WHAT: &'static str;

    /// A record of this version.
    fn new(version: u32, spec: Self::Spec) -> Self;
    /// Its version.
    fn version(&self) -> u32;
    /// Its specification, if it has one.
    fn spec(self) -> Option<Self::Spec>;
    /// The thing's id.
    fn id(spec: &Self::Spec) -> &str;
}

impl Record for NetworkRecord {
    type Spec = NetworkSpec;
    const WHAT: &'static str = "network";

    fn new(version: u32, spec: NetworkSpec) -> Self {
        Self { version, spec: Some(spec) }
    }

    fn version(&self) -> u32 {
        self.version
    }

    fn spec(self) -> Option<NetworkSpec> {
        self.spec
    }

    fn id(spec: &NetworkSpec) -> &str {
        &spec.id
    }
}

impl Record for SecurityGroupRecord {
    type Spec = SecurityGroupSpec;
    const WHAT: &'static str = "security group";

    fn new(version: u32, spec: SecurityGroupSpec) -> Self {
        Self { version, spec: Some(spec) }
    }

    fn version(&self) -> u32 {
        self.version
    }

    fn spec(self) -> Option<SecurityGroupSpec> {
        self.spec
    }

    fn id(spec: &SecurityGroupSpec) -> &str {
        &spec.id
    }
}

/// The directory with the records of one kind.
#[derive(Debug)]
pub struct Store<R> {
    directory: PathBuf,
    kind: PhantomData<fn() -> R>,
}

impl<R: Record> Store<R> {
    /// Makes the directory if need be.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(directory: PathBuf) -> Result<Self, Error> {
        fs::create_dir_all(&directory).map_err(|e| failed("make", &directory, &e))?;
        Ok(Self { directory, kind: PhantomData })
    }

    /// All records. One that cannot be read is logged and left out: the others are not to suffer from it.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn load(&self) -> Result<Vec<R::Spec>, Error> {
        let list = |e| failed("list", &self.directory, &e);
        let mut specs = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(list)? {
            let path = entry.map_err(list)?.path();
            if path.extension().is_none_or(|e| e != "pb") {
                continue;
            }
            match fs::read(&path).map(|bytes| R::decode(bytes.as_slice())) {
                Ok(Ok(record)) if record.version() > VERSION => tracing::error!(
                    "{} has version {}, and this card understands up to {VERSION}: upgrade the card",
                    path.display(),
                    record.version()
                ),
                Ok(Ok(record)) => match record.spec() {
                    Some(spec) => specs.push(spec),
                    None => tracing::error!("{} holds no {}", path.display(), R::WHAT),
                },
                Ok(Err(e)) => tracing::error!("{} is no {} record: {e}", path.display(), R::WHAT),
                Err(e) => tracing::error!("cannot read {}: {e}", path.display()),
            }
        }
        specs.sort_by(|a, b| R::id(a).cmp(R::id(b)));
        Ok(specs)
    }

    /// Writes a record, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, spec: &R::Spec) -> Result<(), Error> {
        let record = R::new(VERSION, spec.clone());
        let path = self.path(R::id(spec));
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
