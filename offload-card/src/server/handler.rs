//! What the messages of a vhost-user connection mean.
//!
//! A queue runs when everything is there: size, addresses, a kick descriptor, VIRTIO_F_VERSION_1, and it is enabled. It
//! is given to the engine then, and taken back when any of that goes: the engine never sees a disabled ring.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures as Protocol, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vhost::{VhostUserMemoryRegionBase, vhost_user::message::VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::wire;
use crate::device::Device;
use crate::event::Event;
use crate::limit::LogLimit;
use crate::memory::{MemoryTable, Quota, Region};
use crate::ring::{FEATURES, InflightArea, MAX_SIZE, QueueShared, Ring, RingAddresses, RingConfig};

/// How long GET_VRING_BASE waits for requests in flight before the connection is dropped. The end of a connection waits
/// as long as it takes.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a wait for requests in flight looks whether the device is being stopped.
const STOP_SLICE: Duration = Duration::from_millis(100);
/// Memory regions we take, as many as libvhost-user does.
const MAX_MEMORY_SLOTS: usize = 509;
/// Longest configuration space a front-end may ask for (vhost-user: VHOST_USER_CONFIG_SIZE).
const MAX_CONFIG_BYTES: u32 = 256;
/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;

/// One virtqueue as the front-end describes it.
#[derive(Debug, Default)]
struct Vring {
    size: u16,
    base: u16,
    addresses: Option<RingAddresses>,
    kick: Option<Event>,
    /// What SET_VRING_ENABLE said last, if anything.
    enabled: Option<bool>,
    running: bool,
}

/// The state of a connection.
pub(super) struct Handler {
    device: Arc<dyn Device>,
    queues: Vec<Arc<QueueShared>>,
    vrings: Vec<Vring>,
    memory: MemoryTable,
    features: u64,
    protocol_features: u64,
    inflight: Option<InflightArea>,
    backend_channel: Option<File>,
    /// Mappings of files that the front-end can cut.
    quota: Quota,
    /// The device's.
    log: Arc<LogLimit>,
    /// The device is being stopped.
    stopping: Box<dyn Fn() -> bool + Send>,
}

/// A failed request, for the acknowledgement and the log; the connection goes on.
fn failed(e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(e))
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

impl Handler {
    pub(super) fn new(
        device: Arc<dyn Device>,
        queues: Vec<Arc<QueueShared>>,
        log: Arc<LogLimit>,
        stopping: Box<dyn Fn() -> bool + Send>,
    ) -> Self {
        let vrings = queues.iter().map(|_| Vring::default()).collect();
        let memory = MemoryTable::new();
        Self {
            device,
            queues,
            vrings,
            memory,
            features: 0,
            protocol_features: 0,
            inflight: None,
            backend_channel: None,
            quota: Quota::default(),
            log,
            stopping,
        }
    }

    pub(super) fn protocol_features(&self) -> Protocol {
        Protocol::from_bits_truncate(self.protocol_features)
    }

    fn offered(&self) -> u64 {
        self.device.identity().features | FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let known = self.vrings.len();
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.vrings.get_mut(index).ok_or_else(|| failed(format!("queue {index} of {known}")))
    }

    /// Where CONFIG_CHANGE goes.
    pub(super) fn set_backend_channel(&mut self, fd: OwnedFd) -> io::Result<()> {
        let stream = std::os::unix::net::UnixStream::from(fd);
        stream.peer_addr()?;
        // A front-end that does not read must not hold us up.
        stream.set_nonblocking(true)?;
        self.backend_channel = Some(File::from(OwnedFd::from(stream)));
        Ok(())
    }

    /// Tells the front-end that the configuration space has changed.
    pub(super) fn config_changed(&self) {
        use std::io::Write as _;
        let Some(mut channel) = self.backend_channel.as_ref() else {
            debug!("the configuration has changed, and the front-end did not ask to be told");
            return;
        };
        match channel.write(&wire::message(CONFIG_CHANGE)) {
            Ok(_) => info!("told the front-end that the configuration has changed"),
            // Full: it has such messages to read already.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => warn!("cannot tell the front-end that the configuration has changed: {e}"),
        }
    }

    /// Starts queue `index` if everything is there. What is wrong with the ring is the driver's doing: it shows as broken.
    /// What the host cannot do now it may be able to do later: the connection ends, the front-end tries again, and nothing
    /// of what the driver asked for is lost meanwhile.
    fn maybe_start(&mut self, index: u32) -> Result<()> {
        let features = self.features;
        // A ring is enabled from the start if the front-end did not acknowledge the feature with which that is a message
        // of its own. QEMU's network devices do not, and send the message all the same: then it counts.
        let implied = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        let vring = self.vring(index)?;
        let (Some(addresses), Some(kick)) = (vring.addresses, &vring.kick) else {
            return Ok(());
        };
        if vring.running || vring.size == 0 || !vring.enabled.unwrap_or(implied) {
            return Ok(());
        }
        let kick = kick.try_clone();
        let (size, base) = (vring.size, vring.base);
        let kick = kick.map_err(|e| self.host_failed(index, &e))?;
        let index_u16 = u16::try_from(index).map_err(failed)?;
        let shared = self.queues[index as usize].clone();
        shared.clear_broken();
        let ring = if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            Err("the driver did not accept VIRTIO_F_VERSION_1, and legacy drivers are not served".to_owned())
        } else {
            let inflight = self.inflight.as_ref().and_then(|area| area.queue(index_u16, size));
            if self.inflight.is_some() && inflight.is_none() {
                self.log.say(|left_out| {
                    warn!(
                        "queue {index} of {size} is not in the inflight area: requests are answered in order{left_out}"
                    );
                });
            }
            let config = RingConfig {
                index: index_u16,
                size,
                features,
                addresses,
                base,
                kick,
                memory: self.memory.clone(),
                shared: shared.clone(),
                inflight,
            };
            Ring::new(config).map_err(|e| e.to_string())
        };
        match ring {
            Ok(ring) => {
                let left = ring.in_flight();
                if left > 0 {
                    info!("queue {index} starts with {left} requests left in flight by a predecessor");
                }
                self.device.start_queue(ring).map_err(|e| self.host_failed(index, &e))?;
                debug!("queue {index} of {size} started at {base}");
                shared.announce();
                self.vrings[index as usize].running = true;
            }
            // Not a failed message: the driver may have broken the ring before it started, and a front-end that saw
            // the message fail would connect anew for ever. The error descriptor tells it what to do.
            Err(why) => {
                self.log.say(|left_out| warn!("queue {index} cannot start: {why}{left_out}"));
                shared.set_broken(format!("queue {index}: {why}"));
            }
        }
        Ok(())
    }

    /// The host cannot serve a queue now: ends the connection.
    fn host_failed(&self, index: u32, why: &dyn std::fmt::Display) -> Error {
        self.log.say(|left_out| error!("queue {index} cannot be served now: {why}{left_out}"));
        Error::BackendInternalError
    }

    /// Takes queue `index` back from the engine. `patience` bounds the wait; `None`: as long as it takes.
    fn stop(&mut self, index: u32, patience: Option<Duration>) -> Result<()> {
        let vring = self.vring(index)?;
        if !vring.running {
            return Ok(());
        }
        let index_u16 = u16::try_from(index).map_err(failed)?;
        self.device.begin_stop(index_u16);
        let since = Instant::now();
        let state = loop {
            match self.device.stop_queue(index_u16, Instant::now() + STOP_SLICE) {
                Ok(state) => break state,
                Err(busy) => {
                    if patience.is_some_and(|p| since.elapsed() >= p || (self.stopping)()) {
                        // Not `failed`: nobody must believe that the queue has stopped.
                        warn!("{busy}");
                        return Err(Error::BackendInternalError);
                    }
                }
            }
        };
        let vring = self.vring(index)?;
        vring.running = false;
        match state {
            Some(state) => {
                debug!("queue {index} stopped at {}", state.next_avail);
                vring.base = state.next_avail;
            }
            // Where it was started it stands.
            None => error!("queue {index} was given to the engine, which says it was not"),
        }
        Ok(())
    }

    fn indices(&self) -> std::ops::Range<u32> {
        0..u32::try_from(self.vrings.len()).unwrap_or(0)
    }

    /// Stops all queues. Their kick descriptors are forgotten: they start when the front-end sets them up again.
    fn stop_all(&mut self, patience: Option<Duration>) -> Result<()> {
        // All have their orders before one is waited for, so that they finish at the same time.
        for (index, _) in (0..).zip(&self.vrings).filter(|(_, vring)| vring.running) {
            self.device.begin_stop(index);
        }
        for index in self.indices() {
            self.stop(index, patience)?;
        }
        for vring in &mut self.vrings {
            vring.kick = None;
            vring.enabled = None;
        }
        Ok(())
    }

    /// The connection is over. Returns when no queue has anything in flight any more.
    pub(super) fn end(&mut self) {
        if let Err(e) = self.stop_all(None) {
            warn!("a queue did not stop: {e}");
        }
        for queue in &self.queues {
            queue.set_call(None);
            queue.set_error(None);
        }
    }

    fn event(fd: Option<File>) -> Result<Option<Event>> {
        fd.map(|fd| Event::from_peer(fd.into())).transpose().map_err(failed)
    }

    fn region(&self, region: &VhostUserMemoryRegion, file: File) -> Result<Region> {
        let r = region;
        Region::map_within(&self.quota, r.guest_phys_addr, r.memory_size, r.user_addr, file, r.mmap_offset)
            .map_err(failed)
    }

    /// Memory may have been removed. Whoever works on a ring lets go of it when he looks at the ring: have them look.
    fn memory_removed(&self) {
        for vring in self.vrings.iter().filter(|v| v.running) {
            if let Some(kick) = &vring.kick {
                kick.signal();
            }
        }
    }
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated; means to disable all rings.
    fn reset_owner(&mut self) -> Result<()> {
        self.stop_all(Some(STOP_TIMEOUT))
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all(Some(STOP_TIMEOUT))?;
        self.device.reset();
        for queue in &self.queues {
            queue.clear_broken();
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(failed(format!("features {unknown:#x} were not offered")));
        }
        // Running rings go by the features they were started with. Whether rings are enabled by a message of its own is
        // no business of theirs.
        let changed = (features ^ self.features) & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if changed != 0 && self.vrings.iter().any(|v| v.running) {
            return Err(failed(format!("features {changed:#x} cannot change while a queue runs")));
        }
        self.features = features;
        for index in self.indices() {
            self.maybe_start(index)?;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions: Result<Vec<_>> =
            regions.iter().zip(files).map(|(r, file)| self.region(r, file)).collect();
        self.memory.replace(regions?).map_err(failed)?;
        self.memory_removed();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let limit = self.device.identity().max_queue_size.min(MAX_SIZE);
        let vring = self.vring(index)?;
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() && size <= limit && !vring.running => {
                vring.size = size;
                Ok(())
            }
            _ => {
                Err(failed(format!("queue {index} cannot have {num} entries (a power of two up to {limit})")))
            }
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let memory = &self.memory;
        let translate = |what: &str, address: u64| {
            memory.translate(address).ok_or_else(|| {
                failed(format!("{what} of queue {index} at {address:#x} is in no memory region"))
            })
        };
        let addresses = RingAddresses {
            descriptors: translate("the descriptor table", descriptor)?,
            avail: translate("the available ring", available)?,
            used: translate("the used ring", used)?,
        };
        let vring = self.vring(index)?;
        if vring.running && vring.addresses != Some(addresses) {
            return Err(failed(format!("queue {index} runs: it cannot move")));
        }
        vring.addresses = Some(addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let vring = self.vring(index)?;
        let base = u16::try_from(base).map_err(failed)?;
        if vring.running {
            return Err(failed(format!("queue {index} runs: its base cannot change")));
        }
        vring.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.stop(index, Some(STOP_TIMEOUT))?;
        let vring = self.vring(index)?;
        vring.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let Some(kick) = Self::event(fd)? else {
            return Err(failed(format!("queue {index} has no kick descriptor: polled rings are not served")));
        };
        let index = u32::from(index);
        self.stop(index, Some(STOP_TIMEOUT))?;
        self.vring(index)?.kick = Some(kick);
        self.maybe_start(index)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(u32::from(index))?;
        self.queues[usize::from(index)].set_call(Self::event(fd)?);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(u32::from(index))?;
        self.queues[usize::from(index)].set_error(Self::event(fd)?);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<Protocol> {
        Ok(Protocol::REPLY_ACK
            | Protocol::MQ
            | Protocol::CONFIG
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::INFLIGHT_SHMFD
            | Protocol::BACKEND_REQ
            | Protocol::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = Some(enable);
        if enable { self.maybe_start(index) } else { self.stop(index, Some(STOP_TIMEOUT)) }
    }

    /// What lies behind our configuration space reads as 0: front-ends ask for the space their headers know.
    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        if offset.checked_add(size).is_none_or(|end| end > MAX_CONFIG_BYTES) {
            return Err(failed(format!("configuration space of {size} bytes at {offset}")));
        }
        let mut bytes = vec![0; size as usize];
        let ours = self.device.identity().config_size.saturating_sub(offset).min(size);
        if ours > 0 {
            self.device.read_config(offset, &mut bytes[..ours as usize]);
        }
        Ok(bytes)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let end = u64::from(offset) + bytes.len() as u64;
        if end > u64::from(self.device.identity().config_size) {
            return Err(failed(format!("configuration space up to {end} cannot be written")));
        }
        self.device.write_config(offset, bytes).map_err(failed)
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        if usize::from(queues) > self.vrings.len() || size > MAX_SIZE {
            return Err(Error::InvalidParam);
        }
        let (area, file) = InflightArea::create(queues, size).map_err(|e| {
            warn!("{e}");
            Error::BackendInternalError
        })?;
        Ok((VhostUserInflight::new(area.size(), 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, area: &VhostUserInflight, file: File) -> Result<()> {
        let mapped =
            InflightArea::map(file, area.mmap_offset, area.mmap_size, area.num_queues, area.queue_size);
        self.inflight = Some(mapped.map_err(failed)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_MEMORY_SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.memory.len() >= MAX_MEMORY_SLOTS {
            return Err(failed(format!("there are {MAX_MEMORY_SLOTS} memory regions already")));
        }
        self.memory.add(self.region(region, file)?).map_err(failed)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (gpa, size, user) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        self.memory.remove(gpa, size, user).map_err(failed)?;
        self.memory_removed();
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        unsupported("there is no GPU")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("there are no shared objects")
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        unsupported("device state is not transferred")
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported("device state is not transferred")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("there is no shared memory")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported("dirty pages are not logged")
    }
}
