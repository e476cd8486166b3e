//! The controller's memory across restarts: which VMs, networks and security groups exist, and what was being done to them.
//!
//! One redb database; every change is one durable transaction. Values are protobuf messages with a version, to which
//! later releases only add fields.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message;
use proto::error::{Error, ErrorReason};
use proto::v1::{NetworkSpec, SecurityGroupSpec, VmSpec};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use tonic::Code;

const VMS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("vms");
const NETWORKS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("networks");
const SECURITY_GROUPS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("security-groups");
// (card, id): devices and networks that could not be deleted because their card did not answer.
const LEFTOVERS: TableDefinition<'_, (&str, &str), ()> = TableDefinition::new("leftovers");

/// `version` of the records written now.
const VERSION: u32 = 1;

/// What was last known to be done with a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Phase {
    /// Never written.
    Unspecified = 0,
    /// Its creation has not been answered: after a crash it is undone.
    Creating = 1,
    /// It has no process.
    Stopped = 2,
    /// A process is being started for it.
    Starting = 3,
    /// It has a process.
    Running = 4,
    /// It has no process, because of a failure.
    Failed = 5,
}

/// A VM.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct VmRecord {
    /// Version of this record.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The VM's id.
    #[prost(string, tag = "2")]
    pub id: String,
    /// With every default filled in.
    #[prost(message, optional, tag = "3")]
    pub spec: Option<VmSpec>,
    /// What was being done.
    #[prost(enumeration = "Phase", tag = "4")]
    pub phase: i32,
    /// One sentence about it.
    #[prost(string, tag = "5")]
    pub detail: String,
    /// Unix time in microseconds.
    #[prost(int64, tag = "6")]
    pub created_us: i64,
    /// Unix time in microseconds; 0: never.
    #[prost(int64, tag = "7")]
    pub started_us: i64,
    /// The client's token; may be empty.
    #[prost(string, tag = "8")]
    pub client_token: String,
    /// The request the token came with, without the token.
    #[prost(bytes = "vec", tag = "9")]
    pub request: Vec<u8>,
    /// The boot of the host in which `phase` was written: no process outlives it.
    #[prost(string, tag = "10")]
    pub boot_id: String,
}

/// A network and the card it is on.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct NetworkEntry {
    /// Version of this record.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// With every default filled in.
    #[prost(message, optional, tag = "2")]
    pub spec: Option<NetworkSpec>,
    /// Name of the network card.
    #[prost(string, tag = "3")]
    pub card: String,
}

/// A security group and the card it is on.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SecurityGroupEntry {
    /// Version of this record.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// With every default filled in.
    #[prost(message, optional, tag = "2")]
    pub spec: Option<SecurityGroupSpec>,
    /// Name of the network card.
    #[prost(string, tag = "3")]
    pub card: String,
}

/// All there is.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// By id.
    pub vms: BTreeMap<String, VmRecord>,
    /// By id.
    pub networks: BTreeMap<String, NetworkEntry>,
    /// By id.
    pub security_groups: BTreeMap<String, SecurityGroupEntry>,
    /// Card and id of everything still to be deleted, as [`Card`](super::card::Card) names it.
    pub leftovers: Vec<(String, String)>,
}

/// The open database.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    db: Arc<Database>,
    path: PathBuf,
}

impl Store {
    /// Opens the database in `dir`, which is made if need be.
    ///
    /// # Errors
    /// It cannot be made or read, or another controller has it open.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("state.redb");
        std::fs::create_dir_all(dir).map_err(|e| broken(dir, &e))?;
        let db = Database::create(&path).map_err(|e| match e {
            DatabaseError::DatabaseAlreadyOpen => Error::new(
                Code::FailedPrecondition,
                ErrorReason::WrongState,
                format!("another controller has the database {} open", path.display()),
            )
            .resource(path.display().to_string())
            .remedy("stop the other outboard-mgmt, or give this one another --state-dir"),
            e => broken(&path, &e),
        })?;
        let store = Self { db: Arc::new(db), path };
        store.make_tables().map_err(|e| broken(&store.path, &e))?;
        Ok(store)
    }

    fn make_tables(&self) -> Result<(), redb::Error> {
        let tx = self.db.begin_write()?;
        tx.open_table(VMS)?;
        tx.open_table(NETWORKS)?;
        tx.open_table(SECURITY_GROUPS)?;
        tx.open_table(LEFTOVERS)?;
        tx.commit()?;
        Ok(())
    }

    /// Reads everything. A record that cannot be decoded is an error: nothing is dropped silently.
    ///
    /// # Errors
    /// The database or a record in it cannot be read.
    pub(crate) fn load(&self) -> Result<Contents, Error> {
        let failed = |e: redb::Error| broken(&self.path, &e);
        let mut contents = Contents::default();
        let read = || -> Result<_, redb::Error> {
            let tx = self.db.begin_read()?;
            let groups = tx.open_table(SECURITY_GROUPS)?;
            Ok((tx.open_table(VMS)?, tx.open_table(NETWORKS)?, groups, tx.open_table(LEFTOVERS)?))
        };
        let (vms, networks, groups, leftovers) = read().map_err(failed)?;
        for entry in vms.iter().map_err(|e| failed(e.into()))? {
            let (id, bytes) = entry.map_err(|e| failed(e.into()))?;
            let record = VmRecord::decode(bytes.value()).map_err(|e| broken(&self.path, &e))?;
            contents.vms.insert(id.value().to_owned(), record);
        }
        for entry in networks.iter().map_err(|e| failed(e.into()))? {
            let (id, bytes) = entry.map_err(|e| failed(e.into()))?;
            let record = NetworkEntry::decode(bytes.value()).map_err(|e| broken(&self.path, &e))?;
            contents.networks.insert(id.value().to_owned(), record);
        }
        for entry in groups.iter().map_err(|e| failed(e.into()))? {
            let (id, bytes) = entry.map_err(|e| failed(e.into()))?;
            let record = SecurityGroupEntry::decode(bytes.value()).map_err(|e| broken(&self.path, &e))?;
            contents.security_groups.insert(id.value().to_owned(), record);
        }
        for entry in leftovers.iter().map_err(|e| failed(e.into()))? {
            let (key, _) = entry.map_err(|e| failed(e.into()))?;
            let (card, id) = key.value();
            contents.leftovers.push((card.to_owned(), id.to_owned()));
        }
        Ok(contents)
    }

    /// Writes a VM.
    ///
    /// # Errors
    /// The database cannot be written.
    pub(crate) async fn put_vm(&self, mut record: VmRecord) -> Result<(), Error> {
        record.version = VERSION;
        self.write(move |tx| {
            tx.open_table(VMS)?.insert(record.id.as_str(), record.encode_to_vec().as_slice())?;
            Ok(())
        })
        .await
    }

    /// Forgets a VM.
    ///
    /// # Errors
    /// The database cannot be written.
    pub(crate) async fn delete_vm(&self, id: &str) -> Result<(), Error> {
        let id = id.to_owned();
        self.write(move |tx| {
            tx.open_table(VMS)?.remove(id.as_str())?;
            Ok(())
        })
        .await
    }

    /// Writes a network.
    ///
    /// # Errors
    /// The database cannot be written.
    pub(crate) async fn put_network(&self, spec: NetworkSpec, card: &str) -> Result<(), Error> {
        let id = spec.id.clone();
        let entry = NetworkEntry { version: VERSION, spec: Some(spec), card: card.to_owned() };
        self.write(move |tx| {
            tx.open_table(NETWORKS)?.insert(id.as_str(), entry.encode_to_vec().as_slice())?;
            Ok(())
        })
        .await
    }

    /// Forgets a network.
    ///
    /// # Errors
    /// The database cannot be written.
    pub(crate) async fn delete_network(&self, id: &str) -> Result<(), Error> {
        let id = id.to_owned();
        self.write(move |tx| {
            tx.open_table(NETWORKS)?.remove(id.as_str())?;
            Ok(())
        })
        .await
    }

    /// Writes a security group.
    ///
    /// # Errors
    /// The database cannot be written.
    pub(crate) async fn put_security_group(&self, spec: SecurityGroupSpec, card: &str) -> Result<(), Error> {
        let id = spec.id.clone();
        let entry = SecurityGroupEntry { version: VERSION, spec: Some(spec), card: card.to_owned() };
        self.write(move |tx| {
            tx.open_table(SECURITY_GROUPS)?.insert(id.as_str(), entry.encode_to_vec().as_slice())?;
            Ok(())
        })
        .await
    }

    /// Forgets a security group.
    ///
    /// # Errors
    /// The database cannot be written.
    pub(crate) async fn delete_security_group(&self, id: &str) -> Result<(), Error> {
        let id = id.to_owned();
        self.write(move |tx| {
            tx.open_table(SECURITY_GROUPS)?.remove(id.as_str())?;
            Ok(())
        })
        .await
    }

    /// Remembers something that must still be deleted from a card.
    ///
    /// # Errors
    /// The database cannot be written.
    pub(crate) async fn put_leftover(&self, card: &str, id: &str) -> Result<(), Error> {
        let (card, id) = (card.to_owned(), id.to_owned());
        self.write(move |tx| {
            tx.open_table(LEFTOVERS)?.insert((card.as_str(), id.as_str()), ())?;
            Ok(())
        })
        .await
    }

    /// Forgets what has been deleted.
    ///
    /// # Errors
    /// The database cannot be written.
    pub(crate) async fn delete_leftover(&self, card: &str, id: &str) -> Result<(), Error> {
        let (card, id) = (card.to_owned(), id.to_owned());
        self.write(move |tx| {
            tx.open_table(LEFTOVERS)?.remove((card.as_str(), id.as_str()))?;
            Ok(())
        })
        .await
    }

    /// One transaction, on a thread that may block: a commit waits for the disk.
    async fn write(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<(), redb::Error> + Send + 'static,
    ) -> Result<(), Error> {
        let db = Arc::clone(&self.db);
        let written = tokio::task::spawn_blocking(move || -> Result<(), redb::Error> {
            let tx = db.begin_write()?;
            change(&tx)?;
            tx.commit()?;
            Ok(())
        })
        .await;
        match written {
            Ok(result) => result.map_err(|e| broken(&self.path, &e)),
            Err(e) => Err(broken(&self.path, &e)),
        }
    }
}

fn broken(path: &Path, e: &dyn Display) -> Error {
    Error::new(
        Code::Internal,
        ErrorReason::Host,
        format!("the controller's database {} cannot be used: {e}", path.display()),
    )
    .resource(path.display().to_string())
    .remedy("check the file's permissions and the free space of its file system")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> VmRecord {
        VmRecord {
            id: id.into(),
            spec: Some(VmSpec { name: "web".into(), ..VmSpec::default() }),
            phase: Phase::Running.into(),
            ..VmRecord::default()
        }
    }

    #[tokio::test]
    async fn what_is_written_is_there_after_opening_again() {
        let dir = tempfile::tempdir().expect("directory");
        let store = Store::open(dir.path()).expect("open");
        store.put_vm(record("a")).await.expect("put");
        store.put_vm(record("b")).await.expect("put");
        store.delete_vm("a").await.expect("delete");
        store
            .put_network(NetworkSpec { id: "default".into(), ..NetworkSpec::default() }, "net")
            .await
            .expect("put");
        for id in ["web", "db"] {
            let spec = SecurityGroupSpec { id: id.into(), ..SecurityGroupSpec::default() };
            store.put_security_group(spec, "net").await.expect("put");
        }
        store.delete_security_group("db").await.expect("delete");
        store.put_leftover("blk", "x-disk0").await.expect("put");
        store.put_leftover("blk", "y-disk0").await.expect("put");
        store.delete_leftover("blk", "x-disk0").await.expect("delete");
        drop(store);

        let contents = Store::open(dir.path()).expect("open").load().expect("load");
        assert_eq!(contents.vms.keys().collect::<Vec<_>>(), ["b"]);
        assert_eq!(contents.vms["b"], VmRecord { version: VERSION, ..record("b") });
        assert_eq!(contents.networks["default"].card, "net");
        assert_eq!(contents.security_groups.keys().collect::<Vec<_>>(), ["web"]);
        assert_eq!(contents.security_groups["web"].card, "net");
        assert_eq!(contents.leftovers, [("blk".to_owned(), "y-disk0".to_owned())]);
    }

    #[tokio::test]
    async fn a_second_controller_is_told_what_to_do() {
        let dir = tempfile::tempdir().expect("directory");
        let _first = Store::open(dir.path()).expect("open");
        let error = Store::open(dir.path()).expect_err("open twice");
        assert!(error.fact("remedy").is_some_and(|r| r.contains("--state-dir")), "{error}");
    }
}
