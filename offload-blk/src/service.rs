//! The storage card: which disks can be made, and the `StorageCard` service.

use std::sync::Arc;

use offload_card::{ConfigNotifier, Device, DeviceFactory, Identity};
use proto::error::Error;
use proto::v1::device_spec::Kind;
use proto::v1::{
    BlockDeviceSpec, DeviceSpec, ErrorReason, ImageInfo, InspectImageRequest, storage_card_server,
};
use tonic::{Code, Request, Response, Status};

use crate::device::{BlockDevice, DiskConfig};
use crate::image::Image;
use crate::request::ID_BYTES;
use crate::worker::IoEngine;

const MAX_QUEUES: u32 = 64;
const DEFAULT_QUEUE_SIZE: u32 = 256;
/// A request has a header, a status and at least one segment of data.
const MIN_QUEUE_SIZE: u32 = 4;
const MAX_QUEUE_SIZE: u32 = offload_card::ring::MAX_SIZE as u32;

/// Makes disks.
#[derive(Debug)]
pub struct StorageCard {
    engine: IoEngine,
}

impl StorageCard {
    /// One whose disks do I/O by `engine`.
    pub fn new(engine: IoEngine) -> Self {
        Self { engine }
    }

    fn make(&self, spec: &DeviceSpec) -> Result<BlockDevice, Error> {
        let Some(Kind::Block(block)) = &spec.kind else {
            return Err(Error::invalid_field("kind", format!("device {:?} is not a block device", spec.id))
                .remedy("create it on a card of its kind"));
        };
        let BlockDeviceSpec { path, read_only, queues, queue_size, serial, direct } = block;
        let queues = or_default(*queues, 1);
        let queue_size = or_default(*queue_size, DEFAULT_QUEUE_SIZE);
        let (Some(queues), true) = (u16::try_from(queues).ok(), queues <= MAX_QUEUES) else {
            return Err(Error::invalid_field("queues", format!("{queues} queues are not 1 to {MAX_QUEUES}")));
        };
        let in_range =
            (MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&queue_size) && queue_size.is_power_of_two();
        let (Some(queue_size), true) = (u16::try_from(queue_size).ok(), in_range) else {
            let message = format!(
                "queue size {queue_size} is not a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}"
            );
            return Err(Error::invalid_field("queue_size", message));
        };
        if serial.len() > ID_BYTES || !serial.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
            let message =
                format!("serial number {serial:?} is not up to {ID_BYTES} printable ASCII characters");
            return Err(Error::invalid_field("serial", message));
        }
        let serial = if serial.is_empty() { spec.id.clone() } else { serial.clone() };
        let image = Image::open(path, *read_only, *direct)?;
        let name = spec.id.clone();
        Ok(BlockDevice::new(DiskConfig { name, image, queues, queue_size, serial, engine: self.engine }))
    }
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
