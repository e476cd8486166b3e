use std::collections::BTreeMap;
use std::sync::Condvar;

use super::*;
use crate::device::Busy;
use crate::ring::{Ring, RingState};

const PATIENCE: Duration = Duration::from_secs(10);

/// What making a device does, by id.
#[derive(Clone, Copy, PartialEq)]
enum Storage {
    Works,
    Missing,
    Hangs,
    /// It opens, and hangs as soon as something is wanted of it.
    HangsOpen,
}

#[derive(Default)]
struct Inner {
    storage: Mutex<BTreeMap<String, Storage>>,
    changed: Condvar,
    closed: Mutex<Vec<String>>,
    /// Told that the end is near, and not closed then.
    prepared: Mutex<Vec<String>>,
    /// What is kept of devices beside their records.
    kept: Mutex<Vec<String>>,
}

#[derive(Clone, Default)]
struct Storages(Arc<Inner>);

impl Storages {
    fn set(&self, id: &str, storage: Storage) {
        self.0.storage.lock().unwrap().insert(id.to_owned(), storage);
        self.0.changed.notify_all();
    }

    fn wait_while(&self, id: &str, storage: Storage) -> MutexGuard<'_, BTreeMap<String, Storage>> {
        let all = self.0.storage.lock().unwrap();
        self.0.changed.wait_while(all, |all| all.get(id) == Some(&storage)).unwrap()
    }

    fn closed(&self, id: &str) -> bool {
        self.0.closed.lock().unwrap().iter().any(|c| c == id)
    }

    fn kept(&self) -> Vec<String> {
        self.0.kept.lock().unwrap().clone()
    }
}

struct Nothing(Identity, String, Storages);

impl Device for Nothing {
    fn identity(&self) -> &Identity {
        &self.0
    }
    fn read_config(&self, _: u32, _: &mut [u8]) {}
    fn write_config(&self, _: u32, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }
    fn start_queue(&self, _: Ring) -> Result<(), Error> {
        Ok(())
    }
    fn stop_queue(&self, _: u16, _: Instant) -> Result<Option<RingState>, Busy> {
        Ok(None)
    }
    fn set_limits(&self, _: Limits) -> Result<(), Error> {
        drop(self.2.wait_while(&self.1, Storage::HangsOpen));
        Ok(())
    }
    fn reset(&self) {}
    fn prepare_end(&self) {
        assert!(!self.2.closed(&self.1));
        self.2.0.prepared.lock().unwrap().push(self.1.clone());
    }
    fn close(&self) {
        self.2.0.closed.lock().unwrap().push(self.1.clone());
    }
}

impl DeviceFactory for Storages {
    fn validate(&self, _: &DeviceSpec) -> Result<Identity, Error> {
        Ok(Identity { virtio_id: 42, features: 0, queues: 1, max_queue_size: 16, config_size: 0 })
    }

    fn create(&self, spec: &DeviceSpec, _: ConfigNotifier) -> Result<Arc<dyn Device>, Error> {
        let all = self.wait_while(&spec.id, Storage::Hangs);
        match all.get(&spec.id) {
            Some(Storage::Works | Storage::HangsOpen) => {
                let mut kept = self.0.kept.lock().unwrap();
                kept.retain(|k| *k != spec.id);
                kept.push(spec.id.clone());
                Ok(Arc::new(Nothing(self.validate(spec)?, spec.id.clone(), self.clone())))
            }
            _ => Err(Error::new(Code::NotFound, ErrorReason::Host, "the image is gone")),
        }
    }

    fn forget(&self, id: &str) {
        self.0.kept.lock().unwrap().retain(|k| k != id);
    }
}

fn spec(id: &str) -> DeviceSpec {
    DeviceSpec { id: id.into(), kind: None, limits: None, net_limits: None }
}

struct Setup {
    storages: Storages,
    dir: tempfile::TempDir,
}

impl Setup {
    /// With records of these devices.
    fn new(devices: &[(&str, Storage)]) -> Self {
        let (storages, dir) = (Storages::default(), tempfile::tempdir().unwrap());
        for (id, storage) in devices {
            storages.set(id, *storage);
            records::write(dir.path(), &spec(id)).unwrap();
        }
        Self { storages, dir }
    }

    fn start(&self, patience: Duration) -> Arc<Registry<Storages>> {
        let registry = Arc::new(Registry::new(
            self.storages.clone(),
            self.dir.path().to_owned(),
            KeptSockets::default(),
        ));
        registry.restore(Instant::now() + patience);
        registry
    }

    fn recorded(&self, id: &str) -> bool {
        records::read_all(self.dir.path()).contains(&spec(id))
    }
}

fn broken(registry: &Registry<Storages>, id: &str) -> Option<String> {
    let all = registry.list();
    all.iter().find(|d| d.spec.as_ref().is_some_and(|s| s.id == id)).map(|d| d.broken.clone())
}

fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is() {
        assert!(since.elapsed() < PATIENCE, "not {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_storage_that_hangs_holds_nobody_else_up() {
    let setup = Setup::new(&[("a", Storage::Hangs), ("b", Storage::Works), ("c", Storage::Missing)]);
    let registry = setup.start(Duration::from_millis(300));
    assert_eq!(registry.len(), 3);
    eventually("served", || broken(&registry, "b").as_deref() == Some(""));
    eventually("told why", || broken(&registry, "c").is_some_and(|why| why.contains("the image is gone")));
    assert!(broken(&registry, "a").is_some_and(|why| why.contains("not been made again yet")));
    // What was missing comes.
    setup.storages.set("c", Storage::Works);
    eventually("back", || broken(&registry, "c").as_deref() == Some(""));
    // Only the device that is being tried is busy, and even that can be deleted.
    assert_eq!(registry.create(&spec("a")).unwrap_err().reason(), ErrorReason::WrongState);
    registry.delete("a").unwrap();
    assert!(!setup.recorded("a") && broken(&registry, "a").is_none());
    // Its storage answers after all: nobody wants the device any more.
    setup.storages.set("a", Storage::Works);
    eventually("closed", || setup.storages.closed("a"));
    assert!(broken(&registry, "a").is_none() && !setup.dir.path().join("a.sock").exists());
}

#[test]
fn all_are_tried_before_the_card_is_ready_if_there_is_time() {
    let setup = Setup::new(&[("a", Storage::Works), ("b", Storage::Missing)]);
    let registry = setup.start(PATIENCE);
    assert_eq!(broken(&registry, "a").as_deref(), Some(""));
    assert!(broken(&registry, "b").is_some_and(|why| why.contains("the image is gone")));
}

#[test]
fn a_lost_device_stays_lost_when_it_is_created_in_vain() {
    let setup = Setup::new(&[("a", Storage::Missing)]);
    let registry = setup.start(PATIENCE);
    // At any moment it may be being tried.
    let mut failed = None;
    eventually("tried", || {
        failed = registry.create(&spec("a")).err().filter(|e| e.reason() != ErrorReason::WrongState);
        failed.is_some()
    });
    assert!(failed.unwrap().message().contains("the image is gone"));
    assert!(setup.recorded("a") && broken(&registry, "a").is_some());
    // It is still tried.
    setup.storages.set("a", Storage::Works);
    eventually("back", || broken(&registry, "a").as_deref() == Some(""));
    // One that never was leaves nothing behind.
    assert!(registry.create(&spec("b")).is_err());
    assert!(!setup.recorded("b") && broken(&registry, "b").is_none());
}

#[test]
fn a_lost_device_is_listed_while_it_comes_back() {
    let setup = Setup::new(&[("a", Storage::HangsOpen)]);
    let registry = setup.start(Duration::from_millis(10));
    eventually("being made", || registry.validate(&spec("a")).is_err());
    assert!(broken(&registry, "a").is_some_and(|why| why.contains("not been made again yet")));
    assert_eq!((registry.numbers().1, registry.len()), (1, 1));
    setup.storages.set("a", Storage::Works);
    eventually("back", || broken(&registry, "a").expect("it is listed").is_empty());
    assert_eq!(registry.numbers().1, 0);
}

#[test]
fn nothing_is_kept_of_a_device_that_is_deleted_while_it_is_made_again() {
    let setup = Setup::new(&[("a", Storage::Hangs), ("b", Storage::Works), ("c", Storage::Hangs)]);
    let registry = setup.start(Duration::from_millis(10));
    eventually("served", || broken(&registry, "b").as_deref() == Some(""));
    registry.delete("a").unwrap();
    setup.storages.set("a", Storage::Works);
    // The attempt made it all the same.
    eventually("closed", || setup.storages.closed("a"));
    eventually("forgotten", || setup.storages.kept() == ["b"]);
    eventually("free", || registry.create(&spec("a")).is_ok());
    assert_eq!(setup.storages.kept(), ["b", "a"]);

    // What another device of that name keeps is its own.
    registry.delete("c").unwrap();
    let (first, second) = (registry.clone(), setup.storages.clone());
    let creates = std::thread::spawn(move || first.create(&spec("c")).unwrap());
    eventually("being made", || registry.validate(&spec("c")).is_err());
    second.set("c", Storage::Works);
    creates.join().unwrap();
    eventually("closed", || setup.storages.closed("c"));
    assert_eq!(setup.storages.kept().iter().filter(|k| *k == "c").count(), 1);
    assert_eq!(broken(&registry, "c").as_deref(), Some(""));
}

#[test]
fn nothing_is_kept_of_a_device_that_cannot_be_served() {
    let setup = Setup::new(&[]);
    let registry = setup.start(PATIENCE);
    setup.storages.set("a", Storage::Works);
    // In the way of its socket.
    std::fs::create_dir(setup.dir.path().join("a.sock")).unwrap();
    assert!(registry.create(&spec("a")).is_err());
    assert!(setup.storages.closed("a") && setup.storages.kept().is_empty() && !setup.recorded("a"));
}

#[test]
fn devices_are_told_that_the_end_is_near() {
    let setup = Setup::new(&[("a", Storage::Works), ("b", Storage::Missing), ("c", Storage::Works)]);
    let registry = setup.start(PATIENCE);
    assert!(setup.storages.0.prepared.lock().unwrap().is_empty());
    registry.stop_all(PATIENCE);
    assert_eq!(*setup.storages.0.prepared.lock().unwrap(), ["a", "c"]);
}
