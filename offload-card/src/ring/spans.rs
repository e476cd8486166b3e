//! Guest-physical addresses to addresses of this process, for the descriptors of one ring.
//!
//! Nearly every buffer lies in the region that the one before lay in, so that region is tried first: one comparison and
//! one addition. A ring makes its spans anew when the memory table changes; the view they are of must outlive what they
//! answer.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::View;

/// A region: where it is for the guest, and for us.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    start: u64,
    length: u64,
    host: usize,
}

/// The regions of a guest's memory.
#[derive(Debug)]
pub(super) struct Spans {
    /// The last hit.
    last: Span,
    /// By address; they do not overlap.
    all: Box<[Span]>,
}

impl Spans {
    pub(super) fn new(memory: &View) -> Self {
        let all: Box<[Span]> = memory
            .iter()
            .map(|r| Span { start: r.start_addr().0, length: r.len(), host: r.as_ptr() as usize })
            .collect();
        debug_assert!(all.is_sorted_by_key(|s| s.start));
        Self { last: all.first().copied().unwrap_or_default(), all }
    }

    /// Where the bytes from `address` on are, and how many of `length` are there in one piece, at least 1. `None`: the
    /// first of them is not in guest memory. `length` is not 0.
    #[inline]
    pub(super) fn translate(&mut self, address: u64, length: u32) -> Option<(usize, u32)> {
        let mut offset = address.wrapping_sub(self.last.start);
        if offset >= self.last.length {
            self.last = self.find(address)?;
            offset = address - self.last.start;
        }
        let room = self.last.length - offset;
        let part = if u64::from(length) <= room { length } else { room as u32 };
        // In the mapping, whose length is a usize.
        Some((self.last.host + offset as usize, part))
    }

    #[cold]
    fn find(&self, address: u64) -> Option<Span> {
        let after = self.all.partition_point(|s| s.start <= address);
        let span = self.all.get(after.checked_sub(1)?)?;
        (address - span.start < span.length).then_some(*span)
    }
}
