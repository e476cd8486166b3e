//! The three areas of a split virtqueue (VirtIO 1.3 section 2.7) in mapped guest memory.
//!
//! ```text
//! descriptor table   size x { address u64, length u32, flags u16, next u16 }
//! available ring     flags u16, idx u16, size x head u16,                  used_event u16     (driver writes)
//! used ring          flags u16, idx u16, size x { head u32, length u32 },  avail_event u16    (device writes)
//! ```
//!
//! Their addresses are translated once per memory table, not once per access: this module is where that is made safe.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::spans::Spans;
use super::{RingAddresses, RingError};
use crate::memory::{CACHE_LINE, View, prefetch};

/// Every access is to one of the areas, at an index below `size`, by volatile or atomic operations: the guest's writes
/// at the same time can change what is read, and nothing else.
#[derive(Debug)]
pub(super) struct Layout {
    /// Keeps the pointers valid.
    memory: Arc<View>,
    /// Of `memory`.
    spans: Spans,
    size: u16,
    descriptors: *const Descriptor,
    avail: *const AtomicU16,
    used: *const AtomicU16,
}

// SAFETY: the pointers are into shared mappings that `memory` keeps, which any thread may access.
unsafe impl Send for Layout {}

impl Layout {
    /// Checks that the areas of a ring of `size` entries are in `memory` and aligned, and remembers where.
    pub(super) fn new(memory: Arc<View>, at: RingAddresses, size: u16) -> Result<Self, RingError> {
        let entries = usize::from(size);
        let area = |what, address: u64, length: usize, align: usize| {
            let invalid = RingError::Address { what, address };
            let Ok(slice) = memory.get_slice(GuestAddress(address), length) else {
                return Err(invalid);
            };
            let pointer = slice.ptr_guard_mut().as_ptr();
            if pointer.align_offset(align) == 0 { Ok(pointer) } else { Err(invalid) }
        };
        let descriptors = area("descriptor table", at.descriptors, 16 * entries, 16)?;
        let avail = area("available ring", at.avail, 6 + 2 * entries, 2)?;
        let used = area("used ring", at.used, 6 + 8 * entries, 4)?;
        Ok(Self {
            size,
            descriptors: descriptors.cast_const().cast(),
            avail: avail.cast_const().cast(),
            used: used.cast_const().cast(),
            spans: Spans::new(&memory),
            memory,
        })
    }

    /// The memory the ring lies in.
    pub(super) fn memory(&self) -> &Arc<View> {
        &self.memory
    }

    /// Its regions, to translate buffers of chains that keep [`Layout::memory`].
    pub(super) fn spans(&mut self) -> &mut Spans {
        &mut self.spans
    }

    /// A copy of the entry at `address` of an indirect table, which may be unaligned and across regions.
    pub(super) fn indirect(&mut self, address: u64) -> Option<Descriptor> {
        const BYTES: u32 = size_of::<Descriptor>() as u32;
        match self.spans.translate(address, BYTES)? {
            (host, BYTES) if host.is_multiple_of(align_of::<Descriptor>()) => {
                // SAFETY: the bytes are in guest memory, which `memory` keeps mapped, and any bytes are a descriptor.
                Some(unsafe { (host as *const Descriptor).read_volatile() })
            }
            _ => self.memory.read_obj(GuestAddress(address)).ok(),
        }
    }

    fn wrap(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// A copy of descriptor `index`; `None` if the table has no such.
    pub(super) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        // SAFETY: `new` checked that `size` descriptors are mapped from here on, aligned; `memory` keeps them so.
        Some(unsafe { self.descriptors.add(usize::from(index)).read_volatile() })
    }

    /// Has the processor fetch descriptor `index`, if the table has it.
    pub(super) fn prefetch_descriptor(&self, index: u16) {
        if index < self.size {
            prefetch(self.descriptors.wrapping_add(usize::from(index)) as usize);
        }
    }

    /// Has the processor fetch the beginning of the buffer that descriptor `index` names, if it names one.
    pub(super) fn prefetch_buffer(&mut self, index: u16) {
        let Some(descriptor) = self.descriptor(index).filter(|d| d.len() > 0) else { return };
        if let Some((host, length)) = self.spans.translate(descriptor.addr().0, descriptor.len()) {
            prefetch(host);
            if length as usize > CACHE_LINE {
                prefetch(host.wrapping_add(CACHE_LINE));
            }
        }
    }

    /// Has the processor fetch the beginning of the first buffer of the indirect table that descriptor `index` names, if it
    /// names one.
    pub(super) fn prefetch_indirect_buffer(&mut self, index: u16) {
        let table = self.descriptor(index).filter(|d| u32::from(d.flags()) & VRING_DESC_F_INDIRECT != 0);
        if let Some(first) = table.and_then(|table| self.indirect(table.addr().0))
            && first.len() > 0
            && let Some((host, _)) = self.spans.translate(first.addr().0, first.len())
        {
            prefetch(host);
        }
    }

    fn avail_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < usize::from(self.size) + 3);
        // SAFETY: `new` checked that 3 + size words are mapped from here on, aligned, and `memory` keeps them as long
        // as `self`. All callers stay below. Others access the memory too, which an atomic allows.
        unsafe { &*self.avail.add(word) }
    }

    fn used_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 4 * usize::from(self.size) + 3);
        // SAFETY: as for the available ring, with 3 + 4 * size words.
        unsafe { &*self.used.add(word) }
    }

    /// `avail.idx`; what the driver wrote before it is visible afterwards.
    pub(super) fn avail_idx(&self) -> u16 {
        u16::from_le(self.avail_word(1).load(Ordering::Acquire))
    }

    /// The driver wants no interrupts (`VIRTQ_AVAIL_F_NO_INTERRUPT`).
    pub(super) fn no_interrupt(&self) -> bool {
        u16::from_le(self.avail_word(0).load(Ordering::Relaxed)) & 1 != 0
    }

    /// The head in the available ring at position `at`, modulo the ring.
    pub(super) fn avail_head(&self, at: u16) -> u16 {
        u16::from_le(self.avail_word(2 + self.wrap(at)).load(Ordering::Relaxed))
    }

    /// `used_event`: the driver wants an interrupt when this entry is used.
    pub(super) fn used_event(&self) -> u16 {
        u16::from_le(self.avail_word(2 + usize::from(self.size)).load(Ordering::Relaxed))
    }

    /// `used.idx`.
    pub(super) fn used_idx(&self) -> u16 {
        u16::from_le(self.used_word(1).load(Ordering::Acquire))
    }

    /// Makes used entries up to `idx` visible to the driver.
    pub(super) fn set_used_idx(&self, idx: u16) {
        self.used_word(1).store(idx.to_le(), Ordering::Release);
    }

    /// Writes the used entry at position `at`, modulo the ring.
    pub(super) fn set_used(&self, at: u16, head: u16, length: u32) {
        let entry = std::ptr::from_ref(self.used_word(2 + 4 * self.wrap(at))).cast::<AtomicU32>();
        // SAFETY: the entry is the 8 bytes from here on, within the used ring, and aligned to 4 as the ring is.
        let (id, len) = unsafe { (&*entry, &*entry.add(1)) };
        id.store(u32::from(head).to_le(), Ordering::Relaxed);
        len.store(length.to_le(), Ordering::Relaxed);
    }

    /// Asks the driver not to kick, or to kick again (`VIRTQ_USED_F_NO_NOTIFY`).
    pub(super) fn set_no_notify(&self, on: bool) {
        self.used_word(0).store(u16::from(on).to_le(), Ordering::Relaxed);
    }

    /// `avail_event`: asks the driver to kick when it has made this entry available.
    pub(super) fn set_avail_event(&self, idx: u16) {
        self.used_word(2 + 4 * usize::from(self.size)).store(idx.to_le(), Ordering::Relaxed);
    }
}
