//! The storage card: which disks can be made, and the `StorageCard` service.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use offload_card::device::not_limited;
use offload_card::poll::{PollMode, PollPolicy};
use offload_card::{ConfigNotifier, Device, DeviceFactory, Identity};
use proto::error::Error;
use proto::v1::device_spec::Kind;
use proto::v1::{
    self, BlockDeviceSpec, DeviceSpec, ErrorReason, ImageFormat, ImageInfo, InspectImageRequest,
    ResizeDeviceRequest, ResizeDeviceResponse, storage_card_server,
};
use tonic::{Code, Request, Response, Status};
use tracing::{info, warn};

use crate::device::{BlockDevice, DiskConfig};
use crate::image::Image;
use crate::io::{MapLimit, Register};
use crate::mode::ModeFile;
use crate::qcow2;
use crate::request::ID_BYTES;
use crate::share::Storages;
use crate::store::Store;
use crate::suspect::{Suspects, watched};
use crate::threads::Threads;
use crate::worker::IoEngine;

const MAX_QUEUES: u32 = 64;
const DEFAULT_QUEUE_SIZE: u32 = 256;
const MAX_POLL_US: u32 = 1_000_000;

/// Makes disks.
#[derive(Debug)]
pub struct StorageCard {
    engine: IoEngine,
    register: Register,
    map_limit: Arc<MapLimit>,
    poll: PollPolicy,
    /// Where cache modes are kept.
    modes: PathBuf,
    suspects: Suspects,
    /// Those made and not yet gone, by id.
    disks: Mutex<BTreeMap<String, (Weak<BlockDevice>, ConfigNotifier)>>,
    storages: Storages,
}

impl StorageCard {
    /// One whose disks do I/O by `engine`, register guest memory as `register` says, map no more of their images than
    /// `map_limit` and, unless their specification says otherwise, poll as `poll` says. What must
    /// outlive the process is kept in `runtime_dir`.
    ///
    /// # Errors
    /// `Host`: the directory cannot be used.
    pub fn new(
        engine: IoEngine,
        register: Register,
        map_limit: MapLimit,
        poll: PollPolicy,
        runtime_dir: &Path,
    ) -> Result<Self, Error> {
        let failed = |path: &Path, e: std::io::Error| {
            let message = format!("cannot make directory {}: {e}", path.display());
            Error::new(Code::Internal, ErrorReason::Host, message)
                .resource(path.display().to_string())
                .remedy("check the runtime directory and its permissions")
        };
        let modes = runtime_dir.join("modes");
        std::fs::create_dir_all(&modes).map_err(|e| failed(&modes, e))?;
        let suspects = runtime_dir.join("suspects");
        let suspects = Suspects::new(suspects.clone()).map_err(|e| failed(&suspects, e))?;
        Ok(Self {
            engine,
            register,
            map_limit: Arc::new(map_limit),
            poll,
            modes,
            suspects,
            disks: Mutex::default(),
            storages: Storages::default(),
        })
    }

    fn disks(&self) -> MutexGuard<'_, BTreeMap<String, (Weak<BlockDevice>, ConfigNotifier)>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes disk `id` longer and tells its guest; its size then. See [`BlockDevice::resize`].
    fn resize(&self, id: &str, size_bytes: u64) -> Result<u64, Error> {
        let found =
            self.disks().get(id).and_then(|(disk, notifier)| Some((disk.upgrade()?, notifier.clone())));
        let Some((disk, notifier)) = found else {
            let message = format!("there is no device {id:?} on this card");
            return Err(Error::new(Code::NotFound, ErrorReason::DeviceNotFound, message)
                .resource(id)
                .remedy("list the card's devices for what there is"));
        };
        let before = disk.size_bytes();
        if disk.resize(size_bytes)? {
            info!("disk {id} has grown from {before} to {} bytes", disk.size_bytes());
            notifier.config_changed();
        }
        Ok(disk.size_bytes())
    }

    fn mode_file(&self, id: &str) -> ModeFile {
        ModeFile::new(self.modes.join(format!("{id}.write-through")))
    }

    /// With `check`, it is only to be looked at.
    fn make(&self, spec: &DeviceSpec, check: bool) -> Result<BlockDevice, Error> {
        let Some(Kind::Block(block)) = &spec.kind else {
            return Err(Error::invalid_field("kind", format!("device {:?} is not a block device", spec.id))
                .remedy("create it on a card of its kind"));
        };
        if spec.net_limits.is_some_and(|l| !l.is_none()) {
            return Err(not_limited());
        }
        let queues = or_default(block.queues, 1);
        let queue_size = or_default(block.queue_size, DEFAULT_QUEUE_SIZE);
        let (Some(queues), true) = (u16::try_from(queues).ok(), queues <= MAX_QUEUES) else {
            return Err(Error::invalid_field("queues", format!("{queues} queues are not 1 to {MAX_QUEUES}")));
        };
        // What does not even fit is refused as what is too large.
        let queue_size = u16::try_from(queue_size).unwrap_or(u16::MAX);
        let serial = &block.serial;
        if serial.len() > ID_BYTES || !serial.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
            let message =
                format!("serial number {serial:?} is not up to {ID_BYTES} printable ASCII characters");
            return Err(Error::invalid_field("serial", message));
        }
        let mark = self.suspects.mark(&spec.id);
        if let Some(why) = self.suspects.why(&spec.id) {
            let message = format!("the image of disk {} has made the card panic: {why}", spec.id);
            return Err(Error::new(Code::FailedPrecondition, ErrorReason::DiskInvalid, message)
                .resource(&block.path)
                .remedy("check the image with qemu-img; delete the disk to try it once more"));
        }
        // What has not been made cannot be deleted, so it leaves no mark.
        let store = watched((!check).then_some(mark), || store(block, check))?;
        BlockDevice::new(DiskConfig {
            name: spec.id.clone(),
            queues,
            queue_size,
            serial: if serial.is_empty() { spec.id.clone() } else { serial.clone() },
            engine: self.engine,
            register: self.register,
            map_limit: self.map_limit.clone(),
            poll: self.policy(block)?,
            host: Arc::new(Threads::default()),
            mode_file: Some(self.mode_file(&spec.id)),
            storage: self.storages.of(&block.path),
            store,
        })
    }

    /// When the queues of a disk poll.
    fn policy(&self, block: &BlockDeviceSpec) -> Result<PollPolicy, Error> {
        let mode = match v1::PollMode::try_from(block.poll) {
            Ok(v1::PollMode::Unspecified) => self.poll.mode,
            Ok(v1::PollMode::Never) => PollMode::Never,
            Ok(v1::PollMode::Adaptive) => PollMode::Adaptive,
            Ok(v1::PollMode::Always) => PollMode::Always,
            Err(_) => {
                return Err(Error::invalid_field("poll", format!("there is no poll mode {}", block.poll)));
            }
        };
        let max = match block.poll_max_us {
            0 => self.poll.max,
            us @ 1..=MAX_POLL_US => Duration::from_micros(us.into()),
            us => {
                let message = format!("polling for {us} µs in vain is not 1 to {MAX_POLL_US}");
                return Err(Error::invalid_field("poll_max_us", message));
            }
        };
        Ok(PollPolicy { mode, max })
    }
}

fn store(block: &BlockDeviceSpec, check: bool) -> Result<Store, Error> {
    let BlockDeviceSpec { path, read_only, direct, null_bytes, .. } = block;
    let format = ImageFormat::try_from(block.format)
        .map_err(|_| Error::invalid_field("format", format!("there is no image format {}", block.format)))?;
    if *null_bytes == 0 {
        return match format {
            ImageFormat::Unspecified | ImageFormat::Raw => {
                Ok(Store::Image(Arc::new(Image::open(path, *read_only, *direct)?)))
            }
            ImageFormat::Qcow2 if check => Store::qcow2_to_check(path, *read_only, *direct),
            ImageFormat::Qcow2 => Store::qcow2(path, *read_only, *direct),
        };
    }
    if !path.is_empty() || *direct || format == ImageFormat::Qcow2 {
        let message = "a disk without storage has no path and no format, and is not direct";
        return Err(Error::invalid_field("null_bytes", message).remedy("give either a path or null_bytes"));
    }
    Store::null(*null_bytes, *read_only)
}

fn or_default(value: u32, default: u32) -> u32 {
    if value == 0 { default } else { value }
}

impl DeviceFactory for StorageCard {
    fn validate(&self, spec: &DeviceSpec) -> Result<Identity, Error> {
        Ok(self.make(spec, true)?.identity().clone())
    }

    fn create(&self, spec: &DeviceSpec, notifier: ConfigNotifier) -> Result<Arc<dyn Device>, Error> {
        let disk = Arc::new(self.make(spec, false)?);
        let mut disks = self.disks();
        disks.retain(|_, (disk, _)| disk.strong_count() > 0);
        disks.insert(spec.id.clone(), (Arc::downgrade(&disk), notifier));
        Ok(disk)
    }

    fn forget(&self, id: &str) {
        self.disks().remove(id);
        if let Err(e) = self.mode_file(id).set(false) {
            warn!("the next disk named {id} begins with a write-through cache: {e}");
        }
        if let Err(e) = self.suspects.forget(id) {
            warn!("the next disk named {id} is taken for one that has made the card panic: {e}");
        }
    }
}

/// What the image at `path` is, or says it is.
fn inspect(path: &str) -> Result<ImageInfo, Error> {
    let image = Image::peek(path)?;
    let geometry = image.geometry();
    let block_size = geometry.logical_block;
    if let Some(qcow2::Info { size_bytes, backing_file }) = qcow2::inspect(&image)? {
        return Ok(ImageInfo { format: "qcow2".into(), size_bytes, block_size, backing_file });
    }
    let format = if geometry.block_device { "block-device" } else { "raw" };
    let size_bytes = Image::inspect(path)?.size_bytes;
    Ok(ImageInfo { format: format.into(), size_bytes, block_size, backing_file: String::new() })
}

/// The gRPC service `StorageCard`.
#[derive(Debug)]
pub struct StorageService(pub Arc<StorageCard>);

/// Runs what may block away from the service's own thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
        Err(Error::new(Code::Internal, ErrorReason::Internal, format!("the call ended: {e}")))
    })
}

#[tonic::async_trait]
impl storage_card_server::StorageCard for StorageService {
    async fn inspect_image(
        &self,
        request: Request<InspectImageRequest>,
    ) -> Result<Response<ImageInfo>, Status> {
        let path = request.into_inner().path;
        Ok(Response::new(blocking(move || inspect(&path)).await?))
    }

    async fn resize_device(
        &self,
        request: Request<ResizeDeviceRequest>,
    ) -> Result<Response<ResizeDeviceResponse>, Status> {
        let ResizeDeviceRequest { id, size_bytes } = request.into_inner();
        let card = self.0.clone();
        let size_bytes = blocking(move || card.resize(&id, size_bytes)).await?;
        Ok(Response::new(ResizeDeviceResponse { size_bytes }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_over_which_the_card_has_died_does_not_keep_the_others_from_being_made() {
        let dir = tempfile::tempdir().unwrap();
        let card = StorageCard::new(
            IoEngine::Sync,
            Register::default(),
            MapLimit::default(),
            PollPolicy::default(),
            dir.path(),
        )
        .expect("a storage card");
        let spec = |id: &str| {
            let path = dir.path().join(id);
            std::fs::File::create(&path).and_then(|f| f.set_len(1 << 20)).unwrap();
            let block = BlockDeviceSpec { path: path.to_str().unwrap().to_owned(), ..Default::default() };
            DeviceSpec { id: id.to_owned(), kind: Some(Kind::Block(block)), ..DeviceSpec::default() }
        };
        std::fs::write(dir.path().join("suspects/a"), "it panicked at once").unwrap();
        let e = card.create(&spec("a"), ConfigNotifier::default()).err().expect("a mark");
        assert!(e.message().contains("it panicked at once"), "{e}");
        assert!(card.create(&spec("b"), ConfigNotifier::default()).is_ok());
        card.forget("a");
        assert!(card.create(&spec("a"), ConfigNotifier::default()).is_ok());
    }
}
