//! The device configuration space of a disk (VirtIO 1.3 section 5.2.4).

use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
};

use crate::image::{Geometry, SECTOR_BYTES};

/// Length of the space in bytes: up to and including what discard and write-zeroes use, so that it does not change when
/// they come.
pub(crate) const CONFIG_BYTES: u32 = 60;

/// Data segments the kernel takes in one request (IOV_MAX).
const MAX_SEGMENTS: u16 = 1024;

const WRITEBACK: u32 = 32;

/// What a disk offers, and how its configuration space says so.
#[derive(Debug)]
pub(crate) struct Config {
    geometry: Geometry,
    read_only: bool,
    queues: u16,
    queue_size: u16,
    /// The driver wants a write-back cache: completed writes are durable only after a flush.
    writeback: AtomicBool,
}

impl Config {
    /// Of a disk with `queues` rings of up to `queue_size` entries.
    pub(crate) fn new(geometry: Geometry, read_only: bool, queues: u16, queue_size: u16) -> Self {
        Self { geometry, read_only, queues, queue_size, writeback: AtomicBool::new(true) }
    }

    /// Feature bits offered.
    pub(crate) fn features(&self) -> u64 {
        let mut bits = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        if self.read_only {
            bits |= 1 << VIRTIO_BLK_F_RO;
        }
        if self.queues > 1 {
            bits |= 1 << VIRTIO_BLK_F_MQ;
        }
        bits
    }

    /// Completed writes must be durable at once, for a driver with `features`: it switched the cache off, or it never
    /// flushes (section 5.2.6.2).
    pub(crate) fn write_through(&self, features: u64) -> bool {
        features & 1 << VIRTIO_BLK_F_FLUSH == 0 || !self.writeback.load(Ordering::Relaxed)
    }

    fn bytes(&self) -> [u8; CONFIG_BYTES as usize] {
        let g = &self.geometry;
        let mut bytes = [0; CONFIG_BYTES as usize];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(g.size_bytes / SECTOR_BYTES).to_le_bytes()); // capacity
        let segments = (self.queue_size - 2).min(MAX_SEGMENTS);
        put(12, &u32::from(segments).to_le_bytes()); // seg_max: header and status need descriptors, too
        put(20, &g.logical_block.to_le_bytes()); // blk_size
        let exponent = (g.physical_block / g.logical_block).trailing_zeros();
        put(24, &[exponent as u8, 0]); // physical_block_exp, alignment_offset
        put(26, &1u16.to_le_bytes()); // min_io_size, in logical blocks
        put(28, &0u32.to_le_bytes()); // opt_io_size: nothing to suggest
        put(32, &[u8::from(self.writeback.load(Ordering::Relaxed))]); // writeback
        put(34, &self.queues.to_le_bytes()); // num_queues
        bytes
    }

    /// Fills `data` from `offset` on.
    pub(crate) fn read(&self, offset: u32, data: &mut [u8]) {
        let bytes = self.bytes();
        let from = bytes.get(offset as usize..).unwrap_or_default();
        let length = from.len().min(data.len());
        data[..length].copy_from_slice(&from[..length]);
    }

    /// The driver writes. Only the cache mode can be written; the rest keeps its value (section 5.2.4).
    pub(crate) fn write(&self, offset: u32, data: &[u8]) {
        for (at, &byte) in (offset..).zip(data) {
            if at == WRITEBACK {
                self.writeback.store(byte & 1 != 0, Ordering::Relaxed);
            }
        }
    }

    /// Back to what a new device has.
    pub(crate) fn reset(&self) {
        self.writeback.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let geometry = Geometry {
            size_bytes: 1 << 30,
            logical_block: 512,
            physical_block: 4096,
            block_device: false,
            memory_alignment: 1,
        };
        Config::new(geometry, false, 4, 256)
    }

    fn field<const N: usize>(config: &Config, offset: u32) -> [u8; N] {
        let mut bytes = [0xff; N];
        config.read(offset, &mut bytes);
        bytes
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let config = config();
        assert_eq!(u64::from_le_bytes(field(&config, 0)), 2 << 20);
        assert_eq!(u32::from_le_bytes(field(&config, 12)), 254);
        assert_eq!(u32::from_le_bytes(field(&config, 20)), 512);
        assert_eq!(field(&config, 24), [3, 0]);
        assert_eq!(u16::from_le_bytes(field(&config, 34)), 4);
        assert_eq!(field(&config, 59), [0]);
    }

    #[test]
    fn only_the_cache_mode_can_be_written() {
        let config = config();
        let flush = 1 << VIRTIO_BLK_F_FLUSH;
        assert!(!config.write_through(flush) && config.write_through(0));
        config.write(0, &[0; CONFIG_BYTES as usize]);
        assert_eq!(u64::from_le_bytes(field(&config, 0)), 2 << 20);
        assert_eq!(field(&config, 32), [0]);
        assert!(config.write_through(flush));
        config.reset();
        assert!(!config.write_through(flush));
    }
}
