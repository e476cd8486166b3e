//! What is in flight, in memory that survives this process: the vhost-user inflight area for split virtqueues.
//!
//! The front-end keeps the area's memfd and hands it to the next back-end, so that after a SIGKILL at any instant the
//! new process knows which requests were taken and not yet returned, and in which order. Layout and the order of
//! writes are the vhost-user specification's ("Inflight I/O tracking", split virtqueue); queues are 64 bytes aligned:
//!
//! ```text
//! per queue   features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16,
//!             desc_num x { inflight u8, padding, next u16, counter u64 }
//!             what is left up to the next 64 bytes; the last 8 of it: a note of the engine's, u64
//! ```

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion};

use crate::memory::{Guard, Quota};

const ALIGN: u64 = 64;
/// The layout's version.
const VERSION: u16 = 1;

#[repr(C)]
#[derive(Debug)]
struct Header {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
}

#[repr(C)]
#[derive(Debug)]
struct Entry {
    inflight: AtomicU8,
    _padding: [AtomicU8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

const _: () = assert!(size_of::<Header>() == 16 && size_of::<Entry>() == 16);

/// An inflight area that cannot be used.
#[derive(Debug, Error)]
pub enum InflightError {
    /// The front-end's numbers do not fit the file or the device.
    #[error("inflight area of {size} bytes at {offset} cannot hold {queues} queues of {queue_size}")]
    Size {
        /// Length in bytes.
        size: u64,
        /// Offset into the file in bytes.
        offset: u64,
        /// Queues.
        queues: u16,
        /// Entries per queue.
        queue_size: u16,
    },
    /// The kernel refused to make or map it.
    #[error("inflight area cannot be made or mapped")]
    Map(#[from] std::io::Error),
}

/// Bytes of one queue's part that the specification has a use for.
fn queue_used(queue_size: u16) -> u64 {
    16 + 16 * u64::from(queue_size)
}

/// Bytes of one queue's part.
fn queue_bytes(queue_size: u16) -> u64 {
    queue_used(queue_size).next_multiple_of(ALIGN)
}

/// The front-end can cut the file, too.
#[derive(Debug)]
struct Mapping {
    region: MmapRegion<()>,
    /// Dropped after the mapping, as fields are in order.
    _guard: Guard,
}

/// The inflight area of a device: one mapping, a part per queue.
#[derive(Debug, Clone)]
pub struct InflightArea {
    mapping: Arc<Mapping>,
    queues: u16,
    queue_size: u16,
}

impl InflightArea {
    /// Makes a new area for `queues` rings of up to `queue_size` entries, and the memfd that holds it.
    pub fn create(queues: u16, queue_size: u16) -> Result<(Self, File), InflightError> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"outboard-inflight", flags).map_err(std::io::Error::from)?);
        let size = u64::from(queues) * queue_bytes(queue_size);
        file.set_len(size)?;
        // Nobody can cut it under a running back-end.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(std::io::Error::from)?;
        let area = Self::map(file.try_clone()?, 0, size, queues, queue_size)?;
        Ok((area, file))
    }

    /// Maps the area a front-end kept.
    pub fn map(
        file: File,
        offset: u64,
        size: u64,
        queues: u16,
        queue_size: u16,
    ) -> Result<Self, InflightError> {
        let misfit = || InflightError::Size { size, offset, queues, queue_size };
        let end = offset.checked_add(size).ok_or_else(misfit)?;
        let needed = u64::from(queues) * queue_bytes(queue_size);
        let metadata = file.metadata()?;
        if queues == 0 || queue_size == 0 || size < needed || !metadata.is_file() || metadata.len() < end {
            return Err(misfit());
        }
        let length = usize::try_from(size).map_err(|_| misfit())?;
        let file = FileOffset::new(file, offset);
        let region = MmapRegion::from_file(file.clone(), length).map_err(std::io::Error::other)?;
        // A device has one of these, and another only as long as rings run that began with it.
        let guard = Guard::new(&region, file.file(), metadata.blksize(), &Quota::default())?;
        Ok(Self { mapping: Arc::new(Mapping { region, _guard: guard }), queues, queue_size })
    }

    /// Bytes it takes.
    pub fn size(&self) -> u64 {
        u64::from(self.queues) * queue_bytes(self.queue_size)
    }

    /// The part of queue `index` for a ring of `size` entries; `None` if the area has no such.
    pub fn queue(&self, index: u16, size: u16) -> Option<InflightQueue> {
        if index >= self.queues || size > self.queue_size {
            return None;
        }
        let offset = usize::from(index) * usize::try_from(queue_bytes(self.queue_size)).ok()?;
        // SAFETY: `map` checked that the mapping has this part: it is the `index`-th of `queues` that fit.
        let base = unsafe { self.mapping.region.as_ptr().add(offset) };
        let left = queue_bytes(self.queue_size) - queue_used(self.queue_size);
        let note = (left >= 8).then_some(usize::try_from(queue_bytes(self.queue_size)).ok()? - 8);
        Some(InflightQueue { _mapping: self.mapping.clone(), base, note, size, next_counter: 1 })
    }
}

/// The inflight record of one ring. All its indices are checked: the memory is the front-end's too.
#[derive(Debug)]
pub struct InflightQueue {
    /// Keeps `base` valid.
    _mapping: Arc<Mapping>,
    /// Where this queue's part begins, aligned to 64.
    base: *const u8,
    /// Where the note is, behind `base`; there is room for it behind any ring whose size is a power of two.
    note: Option<usize>,
    size: u16,
    next_counter: u64,
}

// SAFETY: `base` points into a shared mapping that `_mapping` keeps, which any thread may access.
unsafe impl Send for InflightQueue {}

impl InflightQueue {
    fn header(&self) -> &Header {
        // SAFETY: `InflightArea::queue` found 16 bytes of header here. Others access it too, which atomics allow.
        unsafe { &*self.base.cast::<Header>() }
    }

    fn entry(&self, head: u16) -> Option<&Entry> {
        if head >= self.size {
            return None;
        }
        // SAFETY: as for the header: `size` entries follow it, and `head` is below.
        Some(unsafe { &*self.base.add(16 + 16 * usize::from(head)).cast::<Entry>() })
    }

    /// What the engine has noted, or a predecessor; 0: nothing yet.
    pub(super) fn note(&self) -> u64 {
        self.note_cell().map_or(0, |note| note.load(Ordering::Acquire))
    }

    /// Notes something.
    pub(super) fn set_note(&self, what: u64) {
        if let Some(note) = self.note_cell() {
            note.store(what, Ordering::Release);
        }
    }

    fn note_cell(&self) -> Option<&AtomicU64> {
        // SAFETY: `InflightArea::queue` found that these 8 bytes belong to this queue's part and to no entry of it. Both
        // `base` and the length of a part are multiples of 64, so they are aligned.
        Some(unsafe { &*self.base.add(self.note?).cast::<AtomicU64>() })
    }

    /// Repairs what a predecessor left in the middle of a batch, and returns what it had taken and not returned, oldest
    /// first. `used_idx` is the used ring's.
    pub(super) fn recover(&mut self, used_idx: u16) -> Vec<u16> {
        let header = self.header();
        if header.version.load(Ordering::Relaxed) == VERSION {
            // The predecessor published a batch and died before it took the batch out of the record.
            let batch = used_idx.wrapping_sub(header.used_idx.load(Ordering::Acquire));
            if batch <= self.size {
                let mut head = header.last_batch_head.load(Ordering::Acquire);
                for _ in 0..batch {
                    let Some(entry) = self.entry(head) else { break };
                    entry.inflight.store(0, Ordering::Release);
                    head = entry.next.load(Ordering::Acquire);
                }
            }
        } else {
            // Fresh, all zeros.
            header.features.store(0, Ordering::Relaxed);
            header.desc_num.store(self.size, Ordering::Relaxed);
            header.last_batch_head.store(0, Ordering::Relaxed);
            header.version.store(VERSION, Ordering::Release);
        }
        header.used_idx.store(used_idx, Ordering::Release);
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter_map(|head| {
                let entry = self.entry(head)?;
                let taken = entry.inflight.load(Ordering::Acquire) != 0;
                taken.then(|| (entry.counter.load(Ordering::Acquire), head))
            })
            .collect();
        left.sort_unstable();
        self.next_counter = left.last().map_or(1, |(counter, _)| counter.wrapping_add(1));
        left.into_iter().map(|(_, head)| head).collect()
    }

    /// `head` has been taken from the available ring.
    pub(super) fn take(&mut self, head: u16) {
        let counter = self.next_counter;
        if let Some(entry) = self.entry(head) {
            entry.counter.store(counter, Ordering::Relaxed);
            entry.inflight.store(1, Ordering::Release);
        }
        self.next_counter = counter.wrapping_add(1);
    }

    /// `head` goes back to the available ring, untouched.
    pub(super) fn untake(&mut self, head: u16) {
        if let Some(entry) = self.entry(head) {
            entry.inflight.store(0, Ordering::Release);
        }
    }

    /// Nothing is in flight any more.
    pub(super) fn forget(&mut self) {
        for head in 0..self.size {
            self.untake(head);
        }
    }

    /// `head` will be in the next batch to be published.
    pub(super) fn link(&mut self, head: u16) {
        let header = self.header();
        if let Some(entry) = self.entry(head) {
            entry.next.store(header.last_batch_head.load(Ordering::Relaxed), Ordering::Relaxed);
            header.last_batch_head.store(head, Ordering::Release);
        }
    }

    /// The batch of `count` heads linked last has been published: the used ring's index is `used_idx` now.
    pub(super) fn published(&mut self, count: u16, used_idx: u16) {
        // The used index has been stored before (release), and the stores below release as well: whoever sees an entry
        // cleared sees the used index that says why, and whoever does not clears it himself (`recover`). The reader is a
        // successor, for whom this thread has ended; so there is no load here that would have to wait for those stores,
        // which is the one thing a fence would add.
        let header = self.header();
        let mut head = header.last_batch_head.load(Ordering::Relaxed);
        for _ in 0..count {
            let Some(entry) = self.entry(head) else { break };
            entry.inflight.store(0, Ordering::Release);
            head = entry.next.load(Ordering::Relaxed);
        }
        header.used_idx.store(used_idx, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_the_queues_own_and_harms_no_entry() {
        for size in [1, 2, 4, 256] {
            let (area, file) = InflightArea::create(2, size).unwrap();
            let mut queue = area.queue(1, size).unwrap();
            assert!(queue.recover(0).is_empty());
            queue.take(size - 1);
            queue.set_note(u64::MAX);
            let length = area.size();
            drop((queue, area));
            let area = InflightArea::map(file, 0, length, 2, size).unwrap();
            assert_eq!(
                (area.queue(0, size).unwrap().note(), area.queue(1, size).unwrap().note()),
                (0, u64::MAX)
            );
            assert_eq!(area.queue(1, size).unwrap().recover(0), vec![size - 1]);
        }
    }

    #[test]
    fn where_there_is_no_room_nothing_is_noted() {
        // No ring is of this size, but a front-end may ask for it.
        let (area, _) = InflightArea::create(1, 3).unwrap();
        let mut queue = area.queue(0, 2).unwrap();
        queue.set_note(7);
        assert!(queue.note() == 0 && queue.recover(0).is_empty());
    }
}
