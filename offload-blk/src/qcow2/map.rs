//! Where clusters of the disk are in the file: what the queues look at instead of the image's own tables.

use std::sync::atomic::{AtomicU64, Ordering};

/// Most entries, of 8 bytes each: 64 GiB of a disk in 64 KiB clusters. What finds no room is looked up in the image.
const MAX_ENTRIES: u64 = 1 << 20;
/// Bits of an entry that say where in the file; the others, which part of the disk.
const HOST_BITS: u32 = 40;

/// Places of clusters, shared by all queues of a disk without a lock.
///
/// A cluster is only entered when the guest may read and write it in its place, and it keeps its place as long as the disk
/// is open: nothing is ever entered that is wrong later. Two clusters may want the same entry; then the last has it.
///
/// ```text
///    cluster of the disk = | tag | index |        entry[index] = | tag | cluster of the file, 40 bits |
/// ```
#[derive(Debug)]
pub(super) struct Map {
    entries: Box<[AtomicU64]>,
    index_bits: u32,
    pub(super) cluster_bits: u32,
}

impl Map {
    /// For a disk of `size_bytes`, in clusters of `1 << cluster_bits` bytes, which may grow.
    pub(super) fn new(size_bytes: u64, cluster_bits: u32) -> Self {
        let clusters = (size_bytes >> cluster_bits) + 1;
        let entries = clusters.next_power_of_two().clamp(1024, MAX_ENTRIES);
        Self {
            entries: (0..entries).map(|_| AtomicU64::new(0)).collect(),
            index_bits: entries.trailing_zeros(),
            cluster_bits,
        }
    }

    /// The cluster of the disk that has byte `offset` is at byte `host` of the file.
    pub(super) fn enter(&self, offset: u64, host: u64) {
        let (cluster, host) = (offset >> self.cluster_bits, host >> self.cluster_bits);
        let (index, tag) = (self.index(cluster), cluster >> self.index_bits);
        // The file's first cluster is its header: 0 means nothing.
        if host != 0 && host < 1 << HOST_BITS && tag < 1 << (u64::BITS - HOST_BITS) {
            self.entries[index].store(tag << HOST_BITS | host, Ordering::Relaxed);
        }
    }

    fn index(&self, cluster: u64) -> usize {
        (cluster & ((1 << self.index_bits) - 1)) as usize
    }

    /// Where byte `offset` of the disk is in the file.
    fn look(&self, offset: u64) -> Option<u64> {
        let cluster = offset >> self.cluster_bits;
        let entry = self.entries[self.index(cluster)].load(Ordering::Relaxed);
        let host = entry & ((1 << HOST_BITS) - 1);
        if host == 0 || entry >> HOST_BITS != cluster >> self.index_bits {
            return None;
        }
        Some(host << self.cluster_bits | offset & ((1 << self.cluster_bits) - 1))
    }

    /// Where byte `offset` of the disk is in the file, and how many of the `length` bytes from there on are in one piece.
    #[inline]
    pub(super) fn run(&self, offset: u64, length: u64) -> Option<(u64, u64)> {
        let first = self.look(offset)?;
        let cluster = 1u64 << self.cluster_bits;
        let mut run = cluster - (offset & (cluster - 1));
        while run < length && self.look(offset + run) == Some(first + run) {
            run += cluster;
        }
        Some((first, run.min(length)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What it says is what was entered last, whatever wants the same entries.
        #[test]
        fn it_never_lies(
            entered in prop::collection::vec((0u64..5000, 1u64..6000), 0..200),
            asked in prop::collection::vec((0u64..(5000 << 16), 1u64..(1 << 20)), 1..50),
        ) {
            let map = Map::new(1 << 20, 16);
            let mut truth = BTreeMap::new();
            for (cluster, host) in entered {
                map.enter(cluster << 16, host << 16);
                truth.insert(cluster, host);
            }
            for (offset, length) in asked {
                let Some((host, run)) = map.run(offset, length) else { continue };
                prop_assert!(run > 0 && run <= length);
                for at in (0..run).step_by(512) {
                    let at = (offset + at, host + at);
                    prop_assert_eq!(truth.get(&(at.0 >> 16)), Some(&(at.1 >> 16)));
                    prop_assert_eq!(at.0 & 0xffff, at.1 & 0xffff);
                }
            }
        }
    }

    #[test]
    fn neighbours_are_one_run_and_what_cannot_be_said_is_not() {
        let map = Map::new(1 << 30, 16);
        (0..4).for_each(|i| map.enter(i << 16, (10 + i) << 16));
        map.enter(4 << 16, 99 << 16);
        assert_eq!(map.run(512, 1 << 20), Some(((10 << 16) + 512, (4 << 16) - 512)));
        assert_eq!(map.run(3 << 16, 1), Some((13 << 16, 1)));
        assert_eq!(map.run(4 << 16, 1 << 20), Some((99 << 16, 1 << 16)));
        map.enter(7 << 16, 0);
        map.enter(8 << 16, 1 << 60);
        map.enter(u64::MAX, 1 << 16);
        assert_eq!((map.run(7 << 16, 1), map.run(8 << 16, 1), map.run(5 << 16, 1)), (None, None, None));
    }
}
