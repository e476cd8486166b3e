//! The device configuration space of a disk (VirtIO 1.3 section 5.2.4).

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::erase::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::image::{Geometry, SECTOR_BYTES};
use crate::mode::ModeFile;

/// Length of the space in bytes: up to and including what discard and write-zeroes use, whether offered or not.
pub(crate) const CONFIG_BYTES: u32 = 60;

/// Data segments of a request at most. With its header and its status these are the 1024 descriptors that a ring takes in
/// one chain, and a system call in one vector (IOV_MAX).
const MAX_SEGMENTS: u16 = 1022;

const WRITEBACK: u32 = 32;

/// Which ways of doing away with data a disk has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Erases {
    /// DISCARD, and the space of what is zeroed can be given back.
    pub(crate) discard: bool,
    /// WRITE_ZEROES.
    pub(crate) write_zeroes: bool,
}

/// What a disk offers, and how its configuration space says so.
#[derive(Debug)]
pub(crate) struct Config {
    geometry: Geometry,
    /// Length of the disk in bytes. It grows.
    size_bytes: AtomicU64,
    read_only: bool,
    erases: Erases,
    queues: u16,
    queue_size: u16,
    /// The driver wants a write-back cache: completed writes are durable only after a flush.
    writeback: AtomicBool,
    /// Where that is kept.
    mode_file: Option<ModeFile>,
}

impl Config {
    /// Of a disk with `queues` rings of up to `queue_size` entries. The cache mode is what `mode_file` has from a
    /// predecessor of this process.
    pub(crate) fn new(
        geometry: Geometry,
        read_only: bool,
        erases: Erases,
        queues: u16,
        queue_size: u16,
        mode_file: Option<ModeFile>,
    ) -> Self {
        let writeback = AtomicBool::new(!mode_file.as_ref().is_some_and(ModeFile::write_through));
        let size_bytes = AtomicU64::new(geometry.size_bytes);
        Self { geometry, size_bytes, read_only, erases, queues, queue_size, writeback, mode_file }
    }

    /// Length of the disk in bytes, now.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// The disk has grown.
    pub(crate) fn set_size(&self, size_bytes: u64) {
        self.size_bytes.store(size_bytes, Ordering::Relaxed);
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
        if self.erases.discard {
            bits |= 1 << VIRTIO_BLK_F_DISCARD;
        }
        if self.erases.write_zeroes {
            bits |= 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        bits
    }

    /// Completed writes must be durable at once, for a driver with `features`: it switched the cache off, or it never
    /// flushes (section 5.2.6.2).
    pub(crate) fn write_through(&self, features: u64) -> bool {
        features & 1 << VIRTIO_BLK_F_FLUSH == 0 || !self.writeback.load(Ordering::Relaxed)
    }

    /// Data segments of a request, at most (`seg_max`).
    pub(crate) fn segments(&self) -> u16 {
        // Header and status need descriptors, too.
        self.queue_size.saturating_sub(2).min(MAX_SEGMENTS)
    }

    fn bytes(&self) -> [u8; CONFIG_BYTES as usize] {
        let g = &self.geometry;
        let mut bytes = [0; CONFIG_BYTES as usize];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(self.size_bytes() / SECTOR_BYTES).to_le_bytes()); // capacity
        put(12, &u32::from(self.segments()).to_le_bytes()); // seg_max
        put(20, &g.logical_block.to_le_bytes()); // blk_size
        let exponent = (g.physical_block / g.logical_block).trailing_zeros();
        put(24, &[exponent as u8, 0]); // physical_block_exp, alignment_offset
        put(26, &1u16.to_le_bytes()); // min_io_size, in logical blocks
        put(28, &0u32.to_le_bytes()); // opt_io_size: nothing to suggest
        put(32, &[u8::from(self.writeback.load(Ordering::Relaxed))]); // writeback
        put(34, &self.queues.to_le_bytes()); // num_queues
        if self.erases.discard {
            put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
            put(40, &(MAX_RANGES as u32).to_le_bytes()); // max_discard_seg
            // What is smaller gives nothing back.
            put(44, &(g.physical_block / SECTOR_BYTES as u32).to_le_bytes()); // discard_sector_alignment
        }
        if self.erases.write_zeroes {
            put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
            put(52, &(MAX_RANGES as u32).to_le_bytes()); // max_write_zeroes_seg
            put(56, &[u8::from(self.erases.discard)]); // write_zeroes_may_unmap
        }
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
    pub(crate) fn write(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        match (offset..).zip(data).find(|(at, _)| *at == WRITEBACK) {
            Some((_, byte)) => self.set_writeback(byte & 1 != 0),
            None => Ok(()),
        }
    }

    /// Back to what a new device has.
    pub(crate) fn reset(&self) -> io::Result<()> {
        self.set_writeback(true)
    }

    /// Keeps the mode, and then uses it: a mode that a successor would not know must not be promised.
    fn set_writeback(&self, on: bool) -> io::Result<()> {
        if let Some(file) = &self.mode_file {
            file.set(!on)?;
        }
        self.writeback.store(on, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: Erases = Erases { discard: true, write_zeroes: true };

    fn config() -> Config {
        let geometry = Geometry {
            size_bytes: 1 << 30,
            logical_block: 512,
            physical_block: 4096,
            block_device: false,
            memory_alignment: 1,
        };
        Config::new(geometry, false, BOTH, 4, 256, None)
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
        let words: [u8; 12] = field(&config, 36);
        assert_eq!(words, [0, 0, 32, 0, 64, 0, 0, 0, 8, 0, 0, 0]);
        let words: [u8; 12] = field(&config, 48);
        assert_eq!(words, [0, 0, 32, 0, 64, 0, 0, 0, 1, 0, 0, 0]);
        let none = Config { erases: Erases::default(), ..config };
        assert_eq!(field(&none, 36), [0; 24]);
    }

    #[test]
    fn a_request_with_all_its_segments_fits_into_a_ring_and_a_system_call() {
        let segments = |size| Config { queue_size: size, ..config() }.segments();
        assert_eq!((segments(4), segments(256), segments(1024)), (2, 254, 1022));
    }

    #[test]
    fn the_cache_mode_outlives_the_process_but_not_a_reset() {
        let dir = tempfile::tempdir().unwrap();
        let flush = 1 << VIRTIO_BLK_F_FLUSH;
        let mode_file = || Some(ModeFile::new(dir.path().join("disk.write-through")));
        let again = || Config::new(config().geometry, false, BOTH, 1, 4, mode_file());
        again().write(32, &[0]).unwrap();
        assert!(again().write_through(flush));
        again().reset().unwrap();
        assert!(!again().write_through(flush));
        // A mode that cannot be kept is refused.
        let nowhere = Some(ModeFile::new(dir.path().join("none/disk.write-through")));
        let config = Config::new(config().geometry, false, BOTH, 1, 4, nowhere);
        assert!(config.write(32, &[0]).is_err() && !config.write_through(flush));
    }

    #[test]
    fn only_the_cache_mode_can_be_written() {
        let config = config();
        let flush = 1 << VIRTIO_BLK_F_FLUSH;
        assert!(!config.write_through(flush) && config.write_through(0));
        config.write(0, &[0; CONFIG_BYTES as usize]).unwrap();
        assert_eq!(u64::from_le_bytes(field(&config, 0)), 2 << 20);
        assert_eq!(field(&config, 32), [0]);
        assert!(config.write_through(flush));
        config.reset().unwrap();
        assert!(!config.write_through(flush));
    }
}
