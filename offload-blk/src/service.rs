//! The storage card: which disks can be made, and the `StorageCard` service.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use offload_card::poll::{PollMode, PollPolicy};
use offload_card::{ConfigNotifier, Device, DeviceFactory, Identity};
use proto::error::Error;
use proto::v1::device_spec::Kind;
use proto::v1::{
    self, BlockDeviceSpec, DeviceSpec, ErrorReason, ImageInfo, InspectImageRequest, storage_card_server,
};
use tonic::{Code, Request, Response, Status};
use tracing::warn;

use crate::device::{BlockDevice, DiskConfig};
use crate::image::Image;
use crate::mode::ModeFile;
use crate::queue::Threads;
use crate::request::ID_BYTES;
use crate::store::Store;
use crate::worker::IoEngine;

const MAX_QUEUES: u32 = 64;
const DEFAULT_QUEUE_SIZE: u32 = 256;
const MAX_POLL_US: u32 = 1_000_000;

/// Makes disks.
#[derive(Debug)]
pub struct StorageCard {
    engine: IoEngine,
    poll: PollPolicy,
    /// Where cache modes are kept.
    modes: PathBuf,
}

impl StorageCard {
    /// One whose disks do I/O by `engine` and, unless their specification says otherwise, poll as `poll` says. What must
    /// outlive the process is kept in `runtime_dir`.
    ///
    /// # Errors
    /// `Host`: the directory cannot be used.
    pub fn new(engine: IoEngine, poll: PollPolicy, runtime_dir: &Path) -> Result<Self, Error> {
        let modes = runtime_dir.join("modes");
        std::fs::create_dir_all(&modes).map_err(|e| {
            let message = format!("cannot make directory {}: {e}", modes.display());
            Error::new(Code::Internal, ErrorReason::Host, message)
                .resource(modes.display().to_string())
                .remedy("check the runtime directory and its permissions")
        })?;
        Ok(Self { engine, poll, modes })
    }

    fn mode_file(&self, id: &str) -> ModeFile {
        ModeFile::new(self.modes.join(format!("{id}.write-through")))
    }

    fn make(&self, spec: &DeviceSpec) -> Result<BlockDevice, Error> {
        let Some(Kind::Block(block)) = &spec.kind else {
            return Err(Error::invalid_field("kind", format!("device {:?} is not a block device", spec.id))
                .remedy("create it on a card of its kind"));
        };
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
        BlockDevice::new(DiskConfig {
            name: spec.id.clone(),
            queues,
            queue_size,
            serial: if serial.is_empty() { spec.id.clone() } else { serial.clone() },
            engine: self.engine,
            poll: self.policy(block)?,
            host: Arc::new(Threads),
            mode_file: Some(self.mode_file(&spec.id)),
            store: store(block)?,
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

fn store(block: &BlockDeviceSpec) -> Result<Store, Error> {
    let BlockDeviceSpec { path, read_only, direct, null_bytes, .. } = block;
    if *null_bytes == 0 {
        return Ok(Store::Image(Arc::new(Image::open(path, *read_only, *direct)?)));
    }
    if !path.is_empty() || *direct {
        let message = "a disk without storage has no path, and is not direct";
        return Err(Error::invalid_field("null_bytes", message).remedy("give either a path or null_bytes"));
    }
    Store::null(*null_bytes, *read_only)
}

fn or_default(value: u32, default: u32) -> u32 {
    if value == 0 { default } else { value }
}

impl DeviceFactory for StorageCard {
    fn validate(&self, spec: &DeviceSpec) -> Result<Identity, Error> {
        Ok(self.make(spec)?.identity().clone())
    }

    /// A disk's size is looked at once, so its configuration space never changes by itself.
    fn create(&self, spec: &DeviceSpec, _notifier: ConfigNotifier) -> Result<Arc<dyn Device>, Error> {
        Ok(Arc::new(self.make(spec)?))
    }

    fn forget(&self, id: &str) {
        if let Err(e) = self.mode_file(id).set(false) {
            warn!("the next disk named {id} begins with a write-through cache: {e}");
        }
    }
}

/// The gRPC service `StorageCard`.
#[derive(Debug, Default)]
pub struct StorageService;

#[tonic::async_trait]
impl storage_card_server::StorageCard for StorageService {
    async fn inspect_image(
        &self,
        request: Request<InspectImageRequest>,
    ) -> Result<Response<ImageInfo>, Status> {
        let path = request.into_inner().path;
        let inspected = tokio::task::spawn_blocking(move || Image::inspect(&path)).await;
        let geometry = inspected.map_err(|e| {
            Error::new(Code::Internal, ErrorReason::Internal, format!("the call ended: {e}"))
        })??;
        let format = if geometry.block_device { "block-device" } else { "raw" };
        Ok(Response::new(ImageInfo {
            format: format.into(),
            size_bytes: geometry.size_bytes,
            block_size: geometry.logical_block,
        }))
    }
}
