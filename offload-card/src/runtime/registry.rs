//! The devices a card serves.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::error::Error;
use proto::v1::{self, DeviceSpec, DeviceStats, ErrorReason};
use tonic::Code;
use tracing::{info, warn};

use super::{bind, host_error, records};
use crate::device::{ConfigNotifier, Identity};
use crate::factory::DeviceFactory;
use crate::server::DeviceServer;

/// How long a delete waits for what is in flight. After that the device is gone for everybody, and what it holds is given
/// up when its last request is done.
const DELETE_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest pause between attempts to make a lost device again.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// A device id's place.
enum Place {
    /// Being created or deleted by a call that runs now, or being tried again after this error.
    Busy(Option<String>),
    /// Served.
    Live(Arc<Live>),
    /// In the records, but it could not be made again when the card started.
    Lost(DeviceSpec, String),
}

struct Live {
    spec: DeviceSpec,
    identity: Identity,
    socket: PathBuf,
    server: DeviceServer,
}

/// All devices, by id. The lock is only held to look and to note, never while anything is opened or waited for.
pub(super) struct Registry<F> {
    factory: F,
    directory: PathBuf,
    places: Mutex<BTreeMap<String, Place>>,
}

impl<F: DeviceFactory> Registry<F> {
    pub(super) fn new(factory: F, directory: PathBuf) -> Self {
        Self { factory, directory, places: Mutex::default() }
    }

    fn places(&self) -> MutexGuard<'_, BTreeMap<String, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Devices, served or lost.
    pub(super) fn len(&self) -> usize {
        self.places().len()
    }

    /// Makes the devices in the records again, and removes sockets nobody serves any more.
    /// Those that cannot be made now are tried again from time to time: what was missing may come.
    pub(super) fn restore(self: &Arc<Self>) {
        let specs = records::read_all(&self.directory);
        for entry in std::fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let known = specs.iter().any(|s| path.file_stem().is_some_and(|stem| stem == s.id.as_str()));
            if path.extension().is_some_and(|e| e == "sock") && !known {
                let _ = std::fs::remove_file(path);
            }
        }
        let mut lost = false;
        for spec in specs {
            lost |= !self.make_again(spec);
        }
        if lost {
            let registry = self.clone();
            let spawned =
                std::thread::Builder::new().name("restore".into()).spawn(move || registry.retry_lost());
            if let Err(e) = spawned {
                warn!("devices that could not be made again will not be tried again: {e}");
            }
        }
    }

    /// Makes a device from its record. False if that failed; then the device is lost.
    fn make_again(&self, spec: DeviceSpec) -> bool {
        let place = match self.make(&spec) {
            Ok(live) => {
                info!("device {} is back", spec.id);
                Place::Live(Arc::new(live))
            }
            Err(e) => {
                let why = e.to_string();
                let known =
                    matches!(self.places().get(&spec.id), Some(Place::Busy(Some(before))) if *before == why);
                if !known {
                    warn!("device {} cannot be made again, and is tried again: {why}", spec.id);
                }
                Place::Lost(spec.clone(), why)
            }
        };
        let back = matches!(place, Place::Live(_));
        self.places().insert(spec.id, place);
        back
    }

    /// Tries to make lost devices until there are none.
    fn retry_lost(&self) {
        let mut pause = RETRY_MIN;
        loop {
            std::thread::sleep(pause);
            pause = (pause * 2).min(RETRY_MAX);
            let mut lost = Vec::new();
            for place in self.places().values_mut() {
                if let Place::Lost(spec, why) = place {
                    let (spec, why) = (spec.clone(), std::mem::take(why));
                    *place = Place::Busy(Some(why));
                    lost.push(spec);
                }
            }
            if lost.is_empty() {
                return;
            }
            for spec in lost {
                self.make_again(spec);
            }
        }
    }

    fn socket(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.sock"))
    }

    fn make(&self, spec: &DeviceSpec) -> Result<Live, Error> {
        let notifier = ConfigNotifier::default();
        let device = self.factory.create(spec, notifier.clone())?;
        let identity = device.identity().clone();
        let socket = self.socket(&spec.id);
        let started = bind(&socket).and_then(|l| DeviceServer::start(&spec.id, device.clone(), l, &notifier));
        match started {
            Ok(server) => Ok(Live { spec: spec.clone(), identity, socket, server }),
            Err(e) => {
                device.close();
                let _ = std::fs::remove_file(&socket);
                Err(host_error(&format!("cannot listen on device socket {}", socket.display()), &e)
                    .resource(socket.display().to_string())
                    .remedy("check the runtime directory, and that no other card uses it"))
            }
        }
    }

    /// Checks a specification without changing anything.
    pub(super) fn validate(&self, spec: &DeviceSpec) -> Result<v1::Device, Error> {
        check_id(&spec.id)?;
        match self.places().get(&spec.id) {
            None | Some(Place::Lost(..)) => {}
            Some(Place::Busy(_)) => return Err(busy(&spec.id)),
            Some(Place::Live(live)) if live.spec == *spec => return Ok(live.describe()),
            Some(Place::Live(_)) => return Err(exists(&spec.id)),
        }
        let identity = self.factory.validate(spec)?;
        Ok(describe(spec, &identity, self.socket(&spec.id).display().to_string()))
    }

    /// Makes a device, unless it is there.
    pub(super) fn create(&self, spec: &DeviceSpec) -> Result<v1::Device, Error> {
        check_id(&spec.id)?;
        {
            let mut places = self.places();
            match places.get(&spec.id) {
                None => {}
                Some(Place::Busy(_)) => return Err(busy(&spec.id)),
                Some(Place::Live(live)) if live.spec == *spec => return Ok(live.describe()),
                // Perhaps what was missing is there now.
                Some(Place::Lost(lost, _)) if lost == spec => {}
                Some(Place::Live(_) | Place::Lost(..)) => return Err(exists(&spec.id)),
            }
            places.insert(spec.id.clone(), Place::Busy(None));
        }
        // The record comes first: from the moment anybody can know of the device, a crash does not lose it.
        let made = records::write(&self.directory, spec).and_then(|()| {
            self.make(spec).inspect_err(|_| {
                if let Err(e) = records::remove(&self.directory, &spec.id) {
                    warn!("{e}");
                }
            })
        });
        let mut places = self.places();
        match made {
            Ok(live) => {
                let device = live.describe();
                info!("device {} created, socket {}", spec.id, live.socket.display());
                places.insert(spec.id.clone(), Place::Live(Arc::new(live)));
                Ok(device)
            }
            Err(e) => {
                places.remove(&spec.id);
                Err(e)
            }
        }
    }

    /// Removes a device.
    pub(super) fn delete(&self, id: &str) -> Result<(), Error> {
        let live = {
            let mut places = self.places();
            let live = match places.get(id) {
                None => return Err(not_found(id)),
                Some(Place::Busy(_)) => return Err(busy(id)),
                Some(Place::Live(live)) => Some(live.clone()),
                Some(Place::Lost(..)) => None,
            };
            places.insert(id.to_owned(), Place::Busy(None));
            live
        };
        if let Some(live) = &live {
            let _ = std::fs::remove_file(&live.socket);
            if !live.server.stop(Instant::now() + DELETE_TIMEOUT) {
                warn!(
                    "device {id} is deleted with requests in flight: its resources stay in use until they are done"
                );
            }
        }
        let removed = records::remove(&self.directory, id);
        self.places().remove(id);
        info!("device {id} deleted");
        removed
    }

    /// All devices. Those that could not be made again are among them, broken.
    pub(super) fn list(&self) -> Vec<v1::Device> {
        self.places()
            .values()
            .filter_map(|place| match place {
                Place::Busy(_) => None,
                Place::Live(live) => Some(live.describe()),
                Place::Lost(spec, why) => {
                    Some(v1::Device { spec: Some(spec.clone()), broken: why.clone(), ..Default::default() })
                }
            })
            .collect()
    }

    /// Counters of one device, or of all if `id` is empty.
    pub(super) fn stats(&self, id: &str) -> Result<Vec<DeviceStats>, Error> {
        let places = self.places();
        let live = |place: &Place| match place {
            Place::Live(live) => Some(live.server.stats(&live.spec.id)),
            Place::Busy(_) | Place::Lost(..) => None,
        };
        if id.is_empty() {
            return Ok(places.values().filter_map(live).collect());
        }
        let place = places.get(id).ok_or_else(|| not_found(id))?;
        Ok(live(place).into_iter().collect())
    }

    /// Stops all devices, at the same time, by `deadline`. Records stay.
    pub(super) fn stop_all(&self, deadline: Instant) {
        let all = std::mem::take(&mut *self.places());
        let live: Vec<_> = all
            .into_values()
            .filter_map(|p| match p {
                Place::Live(live) => Some(live),
                Place::Busy(_) | Place::Lost(..) => None,
            })
            .collect();
        for device in &live {
            device.server.begin_stop();
        }
        for device in &live {
            if !device.server.stop(deadline) {
                warn!(
                    "device {} still has requests in flight; the next start does them again",
                    device.spec.id
                );
            }
            let _ = std::fs::remove_file(&device.socket);
        }
    }
}

impl Live {
    fn describe(&self) -> v1::Device {
        let mut device = describe(&self.spec, &self.identity, self.socket.display().to_string());
        device.connected = self.server.connected();
        device.broken = self.server.broken().unwrap_or_default();
        device
    }
}

fn describe(spec: &DeviceSpec, identity: &Identity, socket_path: String) -> v1::Device {
    v1::Device {
        spec: Some(spec.clone()),
        socket_path,
        virtio_device_id: identity.virtio_id,
        queues: u32::from(identity.queues),
        queue_size: u32::from(identity.max_queue_size),
        config_size: identity.config_size,
        connected: false,
        broken: String::new(),
    }
}

fn check_id(id: &str) -> Result<(), Error> {
    let valid = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if (1..=96).contains(&id.len()) && id.bytes().all(valid) {
        return Ok(());
    }
    Err(Error::invalid_field("id", format!("device id {id:?} is not 1 to 96 characters of a-z, 0-9 and -")))
}

fn not_found(id: &str) -> Error {
    Error::new(Code::NotFound, ErrorReason::DeviceNotFound, format!("there is no device {id:?} on this card"))
        .resource(id)
        .remedy("list the card's devices for what there is")
}

fn exists(id: &str) -> Error {
    Error::new(
        Code::AlreadyExists,
        ErrorReason::DeviceExists,
        format!("device {id:?} exists with another specification"),
    )
    .resource(id)
    .remedy("delete it first, or choose another id")
}

fn busy(id: &str) -> Error {
    Error::new(
        Code::Aborted,
        ErrorReason::WrongState,
        format!("device {id:?} is being created or deleted right now"),
    )
    .resource(id)
    .remedy("try again in a moment")
}
