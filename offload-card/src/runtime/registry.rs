//! The devices a card serves.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::error::Error;
use proto::socket;
use proto::v1::{self, DeviceLimits, DeviceSpec, DeviceStats, ErrorReason};
use tonic::Code;
use tracing::{info, warn};

use super::kept::KeptSockets;
use super::{host_error, records};
use crate::device::{ConfigNotifier, Device, Identity, not_limited};
use crate::factory::DeviceFactory;
use crate::qos::{Limits, NetLimits};
use crate::server::DeviceServer;

/// How long a delete waits for what is in flight. After that the device is gone for everybody, and what it holds is given
/// up when its last request is done.
const DELETE_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest pause between attempts to make a lost device again.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Threads that make devices again. A storage that does not answer holds one up for ever, and with it the devices that
/// fall to the same thread: only on a card of more devices than this are there any.
const RESTORE_THREADS: usize = 256;
const RESTORE_STACK_BYTES: usize = 512 * 1024;

/// A device id's place.
enum Place {
    /// Being created, changed or deleted by a call that runs now. One that was lost is for all others lost until then.
    Busy(Option<Lost>),
    /// Served.
    Live(Arc<Live>),
    /// In the records, but it could not be made again yet.
    Lost(Lost),
}

impl Place {
    fn is_attempt(&self, number: u64) -> bool {
        matches!(self, Self::Lost(lost) if lost.attempt == Some(number))
    }

    /// Makes it busy. What was lost, if it was.
    fn hold(&mut self) -> Option<Lost> {
        let lost = self.lost().cloned();
        *self = Self::Busy(lost.clone());
        lost
    }

    fn lost(&self) -> Option<&Lost> {
        match self {
            Self::Lost(lost) | Self::Busy(Some(lost)) => Some(lost),
            Self::Live(_) | Self::Busy(None) => None,
        }
    }
}

#[derive(Clone)]
struct Lost {
    spec: Box<DeviceSpec>,
    why: String,
    /// Names the attempt to make it that runs now, if one does. It may never end; the device can be deleted all the same,
    /// and whoever made it then finds his attempt forgotten.
    attempt: Option<u64>,
}

struct Live {
    id: String,
    spec: Mutex<DeviceSpec>,
    /// Held while its limits are set, and by its end.
    changing: Mutex<()>,
    device: Arc<dyn Device>,
    identity: Identity,
    socket: PathBuf,
    server: DeviceServer,
}

/// All devices, by id. The lock is only held to look and to note, never while anything is opened or waited for.
pub(super) struct Registry<F> {
    factory: F,
    directory: PathBuf,
    kept: KeptSockets,
    places: Mutex<BTreeMap<String, Place>>,
    attempts: AtomicU64,
}

impl<F: DeviceFactory> Registry<F> {
    pub(super) fn new(factory: F, directory: PathBuf, kept: KeptSockets) -> Self {
        Self { factory, directory, kept, places: Mutex::default(), attempts: AtomicU64::new(0) }
    }

    fn places(&self) -> MutexGuard<'_, BTreeMap<String, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Devices, served or lost.
    pub(super) fn len(&self) -> usize {
        self.places().len()
    }

    /// Makes the devices in the records again, and removes sockets nobody serves any more. Each has its own thread, up to
    /// [`RESTORE_THREADS`], which goes on trying until the device is there or deleted: what was missing may come, and what
    /// hangs holds nobody else up. Returns when each has been tried once, or at `deadline`.
    pub(super) fn restore(self: &Arc<Self>, deadline: Instant) {
        let specs = records::read_all(&self.directory);
        for entry in std::fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let known = specs.iter().any(|s| path.file_stem().is_some_and(|stem| stem == s.id.as_str()));
            if path.extension().is_some_and(|e| e == "sock") && !known {
                let _ = std::fs::remove_file(path);
            }
        }
        self.kept.retain(|id| specs.iter().any(|s| s.id == id));
        let ids: Vec<_> = specs.iter().map(|s| s.id.clone()).collect();
        for spec in specs {
            let lost =
                Lost { why: "it has not been made again yet".into(), attempt: None, spec: Box::new(spec) };
            self.places().insert(lost.spec.id.clone(), Place::Lost(lost));
        }
        let (tried, all_tried) = mpsc::channel();
        let threads = ids.len().min(RESTORE_THREADS);
        for first in 0..threads {
            let share: Vec<_> = ids.iter().skip(first).step_by(threads).cloned().collect();
            let (registry, tried) = (self.clone(), tried.clone());
            let spawned = std::thread::Builder::new()
                .name("restore".into())
                .stack_size(RESTORE_STACK_BYTES)
                .spawn(move || registry.make_again(share, tried));
            if let Err(e) = spawned {
                warn!("some devices will not be made again: no thread for it: {e}");
            }
        }
        drop(tried);
        // It ends when all senders are gone, as they are after the first round.
        let left = deadline.saturating_duration_since(Instant::now());
        if all_tried.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
            warn!("some devices take long to be made again, and the others are served meanwhile");
        }
    }

    /// Makes the devices `ids` again, as often as need be. `tried` goes when each has been tried once.
    fn make_again(&self, mut ids: Vec<String>, tried: mpsc::Sender<()>) {
        let mut pause = RETRY_MIN;
        ids.retain(|id| self.try_again(id));
        drop(tried);
        while !ids.is_empty() {
            std::thread::sleep(pause);
            pause = (pause * 2).min(RETRY_MAX);
            ids.retain(|id| self.try_again(id));
        }
    }

    /// Tries to make a lost device. True: it is to be tried again.
    fn try_again(&self, id: &str) -> bool {
        let (spec, attempt) = match self.places().get_mut(id) {
            // A call has it, and may leave it lost.
            Some(Place::Busy(_)) => return true,
            Some(Place::Lost(lost)) => {
                let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
                lost.attempt = Some(attempt);
                (lost.spec.clone(), attempt)
            }
            None | Some(Place::Live(_)) => return false,
        };
        let notifier = ConfigNotifier::default();
        // This may take for ever; the rest does not.
        let device = self.factory.create(&spec, notifier.clone());
        let held = self.places().get_mut(id).filter(|p| p.is_attempt(attempt)).and_then(Place::hold);
        let Some(before) = held else {
            self.give_up(id, device.ok());
            return false;
        };
        let place = match device.and_then(|device| self.serve(&spec, &device, &notifier)) {
            Ok(live) => {
                info!("device {id} is back");
                Place::Live(Arc::new(live))
            }
            Err(e) => {
                let why = e.to_string();
                if why != before.why {
                    warn!("device {id} cannot be made again, and is tried again: {why}");
                }
                Place::Lost(Lost { spec, why, attempt: None })
            }
        };
        let lost = matches!(place, Place::Lost(_));
        self.places().insert(id.to_owned(), place);
        lost
    }

    /// Undoes an attempt to make a device that has been deleted meanwhile.
    fn give_up(&self, id: &str, device: Option<Arc<dyn Device>>) {
        if let Some(device) = device {
            device.close();
        }
        // What it has left beside its record came after the deletion, so it goes now, unless there is another device of that
        // name, to which it belongs then. Nobody makes one as long as the place is taken.
        match self.places().entry(id.to_owned()) {
            Entry::Vacant(place) => place.insert(Place::Busy(None)),
            Entry::Occupied(_) => return,
        };
        self.factory.forget(id);
        self.places().remove(id);
    }

    fn socket(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.sock"))
    }

    fn make(&self, spec: &DeviceSpec) -> Result<Live, Error> {
        let notifier = ConfigNotifier::default();
        let device = self.factory.create(spec, notifier.clone())?;
        self.serve(spec, &device, &notifier)
    }

    fn serve(
        &self,
        spec: &DeviceSpec,
        device: &Arc<dyn Device>,
        notifier: &ConfigNotifier,
    ) -> Result<Live, Error> {
        let identity = device.identity().clone();
        let socket = self.socket(&spec.id);
        // Before anybody can use it.
        if let Err(e) = check_limits(spec).and_then(|limits| set(device.as_ref(), limits)) {
            device.close();
            return Err(e);
        }
        let started = self
            .listener(&spec.id, &socket)
            .and_then(|l| DeviceServer::start(&spec.id, device.clone(), l, notifier));
        match started {
            Ok(server) => Ok(Live {
                id: spec.id.clone(),
                spec: Mutex::new(spec.clone()),
                changing: Mutex::default(),
                device: device.clone(),
                identity,
                socket,
                server,
            }),
            Err(e) => {
                device.close();
                self.kept.forget(&spec.id);
                let _ = std::fs::remove_file(&socket);
                Err(host_error(&format!("cannot listen on device socket {}", socket.display()), &e)
                    .resource(socket.display().to_string())
                    .remedy("check the runtime directory, and that no other card uses it"))
            }
        }
    }

    /// The device's socket: the one that was kept, if its front-end can still find it.
    fn listener(&self, id: &str, path: &Path) -> io::Result<UnixListener> {
        if let Some(listener) = self.kept.take(id) {
            if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
                return Ok(listener);
            }
            self.kept.forget(id);
        }
        socket::listen(path, |_| {}).inspect(|listener| self.kept.keep(id, listener))
    }

    /// Checks a specification without changing anything.
    pub(super) fn validate(&self, spec: &DeviceSpec) -> Result<v1::Device, Error> {
        check_id(&spec.id)?;
        check_limits(spec)?;
        match self.places().get(&spec.id) {
            None | Some(Place::Lost(_)) => {}
            Some(Place::Busy(_)) => return Err(busy(&spec.id)),
            Some(Place::Live(live)) if same(&live.spec(), spec) => return Ok(live.describe()),
            Some(Place::Live(_)) => return Err(exists(&spec.id)),
        }
        let identity = self.factory.validate(spec)?;
        Ok(describe(spec, &identity, self.socket(&spec.id).display().to_string()))
    }

    /// Makes a device, unless it is there; then sets its limits. One that is lost is tried once more, and stays lost if that
    /// fails.
    pub(super) fn create(&self, spec: &DeviceSpec) -> Result<v1::Device, Error> {
        check_id(&spec.id)?;
        check_limits(spec)?;
        let was_lost = {
            let mut places = self.places();
            match places.get(&spec.id) {
                None => {}
                Some(Place::Busy(_) | Place::Lost(Lost { attempt: Some(_), .. })) => {
                    return Err(busy(&spec.id));
                }
                Some(Place::Live(live)) if same(&live.spec(), spec) => {
                    let live = live.clone();
                    drop(places);
                    return self.limit(&live, spec.limits, spec.net_limits);
                }
                // Perhaps what was missing is there now.
                Some(Place::Lost(lost)) if same(&lost.spec, spec) => {}
                Some(Place::Live(_) | Place::Lost(_)) => return Err(exists(&spec.id)),
            }
            places.entry(spec.id.clone()).or_insert(Place::Busy(None)).hold().is_some()
        };
        // The record comes first: from the moment anybody can know of the device, a crash does not lose it.
        let recorded = records::write(&self.directory, spec);
        let made = recorded.and_then(|()| {
            self.make(spec).inspect_err(|_| {
                if !was_lost {
                    if let Err(e) = records::remove(&self.directory, &spec.id) {
                        warn!("{e}");
                    }
                    // It may have been made, and not served.
                    self.factory.forget(&spec.id);
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
            Err(e) if was_lost => {
                let lost = Lost { spec: Box::new(spec.clone()), why: e.to_string(), attempt: None };
                places.insert(spec.id.clone(), Place::Lost(lost));
                Err(e)
            }
            Err(e) => {
                places.remove(&spec.id);
                Err(e)
            }
        }
    }

    /// Sets what a device may do; one that is lost has it when it is back.
    pub(super) fn set_limits(
        &self,
        id: &str,
        limits: Option<DeviceLimits>,
        net_limits: Option<v1::NetLimits>,
    ) -> Result<v1::Device, Error> {
        Limits::new(limits.as_ref())?;
        NetLimits::new(net_limits.as_ref())?;
        let mut lost = {
            let mut places = self.places();
            match places.get_mut(id) {
                None => return Err(not_found(id)),
                Some(Place::Live(live)) => {
                    let live = live.clone();
                    drop(places);
                    return self.limit(&live, limits, net_limits);
                }
                Some(Place::Busy(_) | Place::Lost(Lost { attempt: Some(_), .. })) => return Err(busy(id)),
                Some(place @ Place::Lost(_)) => place.hold().ok_or_else(|| busy(id))?,
            }
        };
        let spec = DeviceSpec { limits, net_limits, ..(*lost.spec).clone() };
        let written = records::write(&self.directory, &spec);
        if written.is_ok() {
            *lost.spec = spec;
        }
        let device = describe_lost(&lost);
        self.places().insert(id.to_owned(), Place::Lost(lost));
        written.map(|()| device)
    }

    /// Sets what a device may do. The record comes first, as in `create`.
    fn limit(
        &self,
        live: &Arc<Live>,
        limits: Option<DeviceLimits>,
        net_limits: Option<v1::NetLimits>,
    ) -> Result<v1::Device, Error> {
        let _changing = live.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let there = matches!(self.places().get(&live.id), Some(Place::Live(now)) if Arc::ptr_eq(now, live));
        if !there {
            return Err(not_found(&live.id));
        }
        let before = live.spec().clone();
        let spec = DeviceSpec { limits, net_limits, ..before.clone() };
        if spec != before {
            let checked = check_limits(&spec)?;
            records::write(&self.directory, &spec)?;
            if let Err(e) = set(live.device.as_ref(), checked) {
                records::write(&self.directory, &before)?;
                return Err(e);
            }
            *live.spec() = spec;
            info!("device {} has other limits", live.id);
        }
        Ok(live.describe())
    }

    /// Removes a device.
    pub(super) fn delete(&self, id: &str) -> Result<(), Error> {
        let live = {
            let mut places = self.places();
            let live = match places.get(id) {
                None => return Err(not_found(id)),
                Some(Place::Busy(_)) => return Err(busy(id)),
                Some(Place::Live(live)) => Some(live.clone()),
                Some(Place::Lost(_)) => None,
            };
            places.insert(id.to_owned(), Place::Busy(None));
            live
        };
        // Whoever sets its limits is done before its record goes, or finds it busy.
        let _changing = live.as_ref().map(|l| l.changing.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(live) = &live {
            let _ = std::fs::remove_file(&live.socket);
            if !live.server.stop(Instant::now() + DELETE_TIMEOUT) {
                warn!(
                    "device {id} is deleted with requests in flight: its resources stay in use until they are done"
                );
            }
        }
        self.kept.forget(id);
        let removed = records::remove(&self.directory, id);
        self.factory.forget(id);
        self.places().remove(id);
        info!("device {id} deleted");
        removed
    }

    /// All devices. Those that could not be made again are among them, broken.
    pub(super) fn list(&self) -> Vec<v1::Device> {
        self.places()
            .values()
            .filter_map(|place| match place {
                Place::Live(live) => Some(live.describe()),
                Place::Lost(_) | Place::Busy(_) => place.lost().map(describe_lost),
            })
            .collect()
    }

    /// Counters of one device, or of all if `id` is empty.
    pub(super) fn stats(&self, id: &str) -> Result<Vec<DeviceStats>, Error> {
        let places = self.places();
        let live = |place: &Place| match place {
            Place::Live(live) => Some(live.server.stats(&live.id)),
            Place::Busy(_) | Place::Lost(_) => None,
        };
        if id.is_empty() {
            return Ok(places.values().filter_map(live).collect());
        }
        let place = places.get(id).ok_or_else(|| not_found(id))?;
        Ok(live(place).into_iter().collect())
    }

    /// Counters of all devices that are served, and how many are not.
    pub(super) fn numbers(&self) -> (Vec<DeviceStats>, usize) {
        let places = self.places();
        let mut stats = Vec::with_capacity(places.len());
        let mut lost = 0;
        for place in places.values() {
            match place {
                Place::Live(live) => stats.push(live.server.stats(&live.id)),
                Place::Lost(_) | Place::Busy(_) => lost += usize::from(place.lost().is_some()),
            }
        }
        (stats, lost)
    }

    /// Stops all devices, at the same time, which may take as long as `patience`. Records stay.
    pub(super) fn stop_all(&self, patience: Duration) {
        let all = std::mem::take(&mut *self.places());
        let live: Vec<_> = all
            .into_values()
            .filter_map(|p| match p {
                Place::Live(live) => Some(live),
                Place::Busy(_) | Place::Lost(_) => None,
            })
            .collect();
        for device in &live {
            device.device.prepare_end();
        }
        let deadline = Instant::now() + patience;
        for device in &live {
            device.server.begin_stop();
        }
        for device in &live {
            if !device.server.stop(deadline) {
                warn!("device {} still has requests in flight; the next start does them again", device.id);
            }
            if !self.kept.outlive() {
                let _ = std::fs::remove_file(&device.socket);
            }
        }
    }
}

impl Live {
    fn spec(&self) -> MutexGuard<'_, DeviceSpec> {
        self.spec.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn describe(&self) -> v1::Device {
        let mut device = describe(&self.spec(), &self.identity, self.socket.display().to_string());
        device.connected = self.server.connected();
        device.broken = self.server.broken().unwrap_or_default();
        device
    }
}

fn check_limits(spec: &DeviceSpec) -> Result<(Limits, NetLimits), Error> {
    Ok((Limits::new(spec.limits.as_ref())?, NetLimits::new(spec.net_limits.as_ref())?))
}

fn set(device: &dyn Device, (limits, net_limits): (Limits, NetLimits)) -> Result<(), Error> {
    // A device has limits of one kind; those of the other are refused before anything has changed.
    match (limits.is_none(), net_limits.is_none()) {
        (false, false) => Err(not_limited()),
        (false, true) => device.set_limits(limits).and_then(|()| device.set_net_limits(net_limits)),
        (true, _) => device.set_net_limits(net_limits).and_then(|()| device.set_limits(limits)),
    }
}

/// They differ in their limits at most, which can be changed.
fn same(a: &DeviceSpec, b: &DeviceSpec) -> bool {
    a.id == b.id && a.kind == b.kind
}

fn describe_lost(lost: &Lost) -> v1::Device {
    v1::Device { spec: Some((*lost.spec).clone()), broken: lost.why.clone(), ..Default::default() }
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

#[cfg(test)]
mod tests;
