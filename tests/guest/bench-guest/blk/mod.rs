//! The block jobs (VirtIO 1.3, 5.2).

mod bench;
mod first;
mod load;
mod malformed;
mod queue;
mod verify;
mod watch;

pub(crate) use bench::bench;
pub(crate) use first::first;
pub(crate) use malformed::malformed;
pub(crate) use verify::verify;
pub(crate) use watch::watch;

use crate::serial;
use crate::stage::Context;
use crate::virtio::{self, Type};
use alloc::string::String;
use alloc::vec::Vec;
use guest::args;
use queue::{Op, Queue, Request};

const RO: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const SEG_MAX: u64 = 1 << 2;
const BLK_SIZE: u64 = 1 << 6;
const MQ: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

/// Offsets in `virtio_blk_config` (5.2.4).
const CONFIG_CAPACITY: usize = 0;
const CONFIG_SEG_MAX: usize = 12;
const CONFIG_BLK_SIZE: usize = 20;
const CONFIG_NUM_QUEUES: usize = 34;

/// Sizes of what a job needs for its requests.
#[derive(Clone, Copy)]
struct Sizing {
    /// Requests in flight per queue.
    depth: u16,
    /// Largest payload in bytes.
    block: usize,
}

/// An open disk.
struct Disk<'a> {
    device: virtio::Device<'a>,
    queues: Vec<Queue>,
    /// As many as the disk has.
    num_queues: u16,
    /// In sectors.
    capacity: u64,
    readonly: bool,
    /// Generation of the configuration at the start.
    generation: u32,
}

impl<'a> Disk<'a> {
    /// Opens the disk, prints its `device` event and asks for its ID.
    fn open(
        context: &Context<'a>,
        job: u32,
        wanted: &args::Device<'_>,
        sizing: Sizing,
    ) -> Result<Self, String> {
        let mut disk = Self::set_up(context, wanted, sizing)?;
        let id = disk.id(context)?;
        disk.announce(job, Some(&id));
        Ok(disk)
    }

    /// The same without a request: the job's own is the first.
    fn open_untouched(
        context: &Context<'a>,
        job: u32,
        wanted: &args::Device<'_>,
        sizing: Sizing,
    ) -> Result<Self, String> {
        let disk = Self::set_up(context, wanted, sizing)?;
        disk.announce(job, None);
        Ok(disk)
    }

    fn set_up(context: &Context<'a>, wanted: &args::Device<'_>, sizing: Sizing) -> Result<Self, String> {
        let mut features = RO | SEG_MAX | BLK_SIZE;
        for (name, feature) in [("flush", FLUSH), ("mq", MQ), ("erase", DISCARD | WRITE_ZEROES)] {
            if !wanted.refuses(name) {
                features |= feature;
            }
        }
        let device = virtio::Device::open(context.devices, Type::Block, wanted, features, context.clock)?;
        let capacity = u64::from_le_bytes(device.config(CONFIG_CAPACITY));
        let num_queues =
            if device.has(MQ) { u16::from_le_bytes(device.config(CONFIG_NUM_QUEUES)).max(1) } else { 1 };
        let count = wanted.queues.unwrap_or(num_queues);
        if count > num_queues {
            return Err(alloc::format!("queues={count}: the disk has {num_queues}"));
        }
        let mut queues = Vec::new();
        for index in 0..count {
            let indirect = device.has(virtio::INDIRECT_DESC);
            queues.push(Queue::new(device.queue(index)?, sizing.depth, sizing.block, indirect)?);
        }
        device.start();
        let generation = device.generation();
        Ok(Self { readonly: device.has(RO), device, queues, num_queues, capacity, generation })
    }

    /// Prints the `device` event.
    fn announce(&self, job: u32, id: Option<&str>) {
        let field = |feature: u64, value: u64| if self.device.has(feature) { value } else { 0 };
        let mut event = self
            .device
            .describe(Type::Block, self.queues.len(), self.queues[0].ring_size())
            .number("job", job)
            .number("capacity", self.capacity)
            .flag("readonly", self.readonly)
            .number(
                "blk_size",
                field(BLK_SIZE, u64::from(u32::from_le_bytes(self.device.config(CONFIG_BLK_SIZE)))),
            )
            .number("num_queues", self.num_queues)
            .number(
                "seg_max",
                field(SEG_MAX, u64::from(u32::from_le_bytes(self.device.config(CONFIG_SEG_MAX)))),
            );
        if let Some(id) = id {
            event = event.text("id", id);
        }
        serial::print(event);
    }

    /// The disk's ID string (5.2.6: VIRTIO_BLK_T_GET_ID), empty if it has none.
    fn id(&mut self, context: &Context<'_>) -> Result<String, String> {
        let queue = &mut self.queues[0];
        queue.submit(Request { op: Op::GetId, sector: 0, len: 20, tag: 0 }, 0);
        queue.kick();
        for _ in 0..200_000 {
            if let Some(done) = queue.complete() {
                let text = queue.data(done.slot, 20).split(|byte| *byte == 0).next().unwrap_or_default();
                let id = core::str::from_utf8(text).unwrap_or_default();
                let id = if done.status == 0 { String::from(id) } else { String::new() };
                queue.release(done.slot);
                return Ok(id);
            }
            context.clock.delay(50);
        }
        Err(String::from("the disk does not answer its first request (GET_ID) within 10 s"))
    }
}

/// A run of sectors.
struct Sectors {
    first: u64,
    count: u64,
}

/// The part of the disk that a job may use: what `bytes=` and `offset=` say, else `default` bytes or the whole disk, in whole
/// blocks.
fn region(disk: &Disk<'_>, load: &args::Load, default: Option<u64>) -> Result<Sectors, String> {
    const SECTOR: u64 = guest::pattern::SECTOR as u64;
    let (first, block) = (load.offset / SECTOR, u64::from(load.block) / SECTOR);
    let left = disk.capacity.saturating_sub(first);
    let wanted = match (load.bytes, default) {
        (Some(bytes), _) => bytes / SECTOR,
        (None, Some(bytes)) => (bytes / SECTOR).min(left),
        (None, None) => left,
    };
    let count = wanted - wanted % block;
    if wanted > left || count == 0 {
        return Err(alloc::format!(
            "bytes={} offset={}: the disk has {} sectors of 512 bytes",
            wanted * SECTOR,
            load.offset,
            disk.capacity
        ));
    }
    Ok(Sectors { first, count })
}
