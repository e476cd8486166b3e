//! The driver's side of a split virtqueue (VirtIO 1.3, 2.7).
//!
//! The owner of a [`SplitQueue`] decides which descriptors and which buffers a request uses: the guest's jobs tie each
//! descriptor to a fixed buffer, so there is no free list and no bookkeeping per request here. Whatever the device writes is
//! read once, by volatile reads, and never used as an index unchecked.

use core::sync::atomic::{Ordering, fence};

/// `VIRTQ_DESC_F_NEXT`: the chain goes on at `next`.
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes to the buffer.
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, `VIRTQ_USED_F_NO_NOTIFY`.
const NO_NOTIFICATION: u16 = 1;

/// The largest ring this driver makes (VirtIO allows 32768).
pub const MAX_SIZE: u16 = 1024;

/// One descriptor (VirtIO 1.3, 2.7.5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Descriptor {
    /// Guest-physical address of the buffer.
    pub address: u64,
    /// Length of the buffer in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next descriptor of the chain, with [`NEXT`].
    pub next: u16,
}

/// An element of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain, as the device says: anything.
    pub id: u32,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// Where the three parts of a ring lie in one block of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Offset of the available ring; the descriptor table is at 0.
    pub available: usize,
    /// Offset of the used ring.
    pub used: usize,
    /// Size of the whole in bytes.
    pub bytes: usize,
}

impl Layout {
    /// The layout of a ring of `size` entries: parts on cache lines of their own (the specification asks for 16, 2 and 4 bytes).
    #[must_use]
    pub const fn new(size: u16) -> Self {
        let size = size as usize;
        let available = (16 * size).next_multiple_of(64);
        let used = (available + 6 + 2 * size).next_multiple_of(64);
        Self { available, used, bytes: (used + 6 + 8 * size).next_multiple_of(64) }
    }
}

/// A split virtqueue as its driver sees it.
#[derive(Debug)]
pub struct SplitQueue {
    base: *mut u8,
    layout: Layout,
    size: u16,
    event_idx: bool,
    /// Entries put into the available ring; published up to `published`.
    pushed: u16,
    published: u16,
    /// Entries taken from the used ring.
    taken: u16,
}

impl SplitQueue {
    /// Takes the memory at `base` for a ring of `size` entries, zeroed, with interrupts off.
    ///
    /// # Panics
    /// If `size` is not a power of two or exceeds [`MAX_SIZE`].
    ///
    /// # Safety
    /// `base` points to [`Layout::bytes`] bytes, aligned to 64, that only this queue and its device use while it lives.
    #[must_use]
    pub unsafe fn new(base: *mut u8, size: u16, event_idx: bool) -> Self {
        assert!(
            size.is_power_of_two() && size <= MAX_SIZE,
            "a ring has 1..={MAX_SIZE} entries, a power of two"
        );
        let layout = Layout::new(size);
        // SAFETY: the caller gives us these bytes.
        unsafe { base.write_bytes(0, layout.bytes) };
        let mut queue = Self { base, layout, size, event_idx, pushed: 0, published: 0, taken: 0 };
        queue.set_interrupts(false);
        queue
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest-physical addresses of descriptor table, available ring and used ring, memory being identity mapped.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        let base = self.base as u64;
        [base, base + self.layout.available as u64, base + self.layout.used as u64]
    }

    fn write<T>(&mut self, offset: usize, value: T) {
        debug_assert!(offset + size_of::<T>() <= self.layout.bytes);
        // SAFETY: every offset used in this module is inside the layout (indices are masked by the size) and aligned to
        // its type; the memory is ours by the contract of `new`. Volatile, as the device reads it behind our back.
        unsafe { self.base.add(offset).cast::<T>().write_volatile(value) }
    }

    fn read<T>(&self, offset: usize) -> T
    where
        T: Copy,
    {
        debug_assert!(offset + size_of::<T>() <= self.layout.bytes);
        // SAFETY: as in `write`; every bit pattern is valid for the integers read here.
        unsafe { self.base.add(offset).cast::<T>().read_volatile() }
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// Writes descriptor `index` (modulo the size of the ring) of the table.
    pub fn set_descriptor(&mut self, index: u16, descriptor: Descriptor) {
        let offset = 16 * self.slot(index);
        self.write(offset, descriptor);
    }

    /// Puts a chain into the available ring. The device sees it after [`publish`](Self::publish).
    pub fn push(&mut self, head: u16) {
        let offset = self.layout.available + 4 + 2 * self.slot(self.pushed);
        self.write(offset, head);
        self.pushed = self.pushed.wrapping_add(1);
    }

    /// Moves the available index by `by` without entries to match, as only a broken driver does.
    pub fn skip(&mut self, by: u16) {
        self.pushed = self.pushed.wrapping_add(by);
    }

    /// Makes what was pushed visible to the device; whether the device wants a notification for it (2.7.7.2, 2.7.10).
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.pushed);
        if old == new {
            return false;
        }
        // The entries before the index.
        fence(Ordering::Release);
        self.write(self.layout.available + 2, new);
        self.published = new;
        // The index before the look at what the device asked for: a full barrier, else the device may go to sleep unseen.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event: u16 = self.read(self.layout.used + 4 + 8 * usize::from(self.size));
            passes(event, old, new)
        } else {
            self.read::<u16>(self.layout.used) & NO_NOTIFICATION == 0
        }
    }

    /// Whether the device has returned a chain.
    #[must_use]
    pub fn has_used(&self) -> bool {
        self.read::<u16>(self.layout.used + 2) != self.taken
    }

    /// The next chain that the device returned.
    pub fn pop(&mut self) -> Option<Used> {
        if !self.has_used() {
            return None;
        }
        // The index before the element.
        fence(Ordering::Acquire);
        let offset = self.layout.used + 4 + 8 * self.slot(self.taken);
        let used = Used { id: self.read(offset), len: self.read(offset + 4) };
        self.taken = self.taken.wrapping_add(1);
        Some(used)
    }

    /// Asks for an interrupt with the next used chain, or for none. After asking, look at [`has_used`](Self::has_used) once
    /// more: what came before the request raises no interrupt.
    pub fn set_interrupts(&mut self, on: bool) {
        if self.event_idx {
            // Off: the event is behind, and is passed only when the index wraps around once.
            let event = if on { self.taken } else { self.taken.wrapping_sub(1) };
            self.write(self.layout.available + 4 + 2 * usize::from(self.size), event);
        } else {
            self.write(self.layout.available, if on { 0 } else { NO_NOTIFICATION });
        }
        fence(Ordering::SeqCst);
    }
}

/// Whether the index moving from `old` to `new` passes `event` (2.7.7.1, `vring_need_event`).
#[must_use]
pub const fn passes(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::boxed::Box;
    use std::vec::Vec;

    #[repr(align(64))]
    struct Memory([u8; 32 * 1024]);

    /// The device's side, written from the specification's structure definitions.
    struct Device {
        base: *mut u8,
        size: u16,
        seen: u16,
        used: u16,
    }

    impl Device {
        fn at<T>(&self, offset: usize) -> *mut T {
            // SAFETY: inside `Memory` for the ring sizes of these tests.
            unsafe { self.base.add(offset).cast() }
        }
        fn get(&self, offset: usize) -> u16 {
            // SAFETY: as above.
            unsafe { self.at::<u16>(offset).read_volatile() }
        }
        fn put<T>(&self, offset: usize, value: T) {
            // SAFETY: as above.
            unsafe { self.at::<T>(offset).write_volatile(value) }
        }
        fn available(&self) -> usize {
            (16 * usize::from(self.size)).next_multiple_of(64)
        }
        fn used_ring(&self) -> usize {
            (self.available() + 6 + 2 * usize::from(self.size)).next_multiple_of(64)
        }
        fn take(&mut self) -> Option<u16> {
            if self.get(self.available() + 2) == self.seen {
                return None;
            }
            let head = self.get(self.available() + 4 + 2 * usize::from(self.seen % self.size));
            self.seen = self.seen.wrapping_add(1);
            Some(head)
        }
        /// Returns a chain; whether the driver wants an interrupt.
        fn give(&mut self, head: u16, len: u32, event_idx: bool) -> bool {
            let element = self.used_ring() + 4 + 8 * usize::from(self.used % self.size);
            self.put(element, u32::from(head));
            self.put(element + 4, len);
            let old = self.used;
            self.used = self.used.wrapping_add(1);
            self.put(self.used_ring() + 2, self.used);
            if event_idx {
                let event = self.get(self.available() + 4 + 2 * usize::from(self.size));
                self.used.wrapping_sub(event).wrapping_sub(1) < self.used.wrapping_sub(old)
            } else {
                self.get(self.available()) & 1 == 0
            }
        }
        fn want_notification(&self, at: u16) {
            self.put(self.used_ring() + 4 + 8 * usize::from(self.size), at);
        }
    }

    fn pair(memory: &mut Memory, size: u16, event_idx: bool) -> (SplitQueue, Device) {
        let base = memory.0.as_mut_ptr();
        // SAFETY: the memory is aligned and large enough for the sizes of these tests and outlives the queue.
        let queue = unsafe { SplitQueue::new(base, size, event_idx) };
        (queue, Device { base, size, seen: 0, used: 0 })
    }

    proptest! {
        #[test]
        fn chains_go_round(size in 0u32..8, event_idx: bool, batches in proptest::collection::vec(1u16..64, 1..200)) {
            let size = 1u16 << size;
            let mut memory = Box::new(Memory([0xff; 32 * 1024]));
            let (mut queue, mut device) = pair(&mut memory, size, event_idx);
            let mut number = 0u16;
            for batch in batches {
                let batch = batch.min(size);
                device.want_notification(device.seen);
                let mut sent = Vec::new();
                for _ in 0..batch {
                    queue.push(number % size);
                    sent.push(number % size);
                    number = number.wrapping_add(1);
                }
                prop_assert!(device.take().is_none(), "seen before it was published");
                prop_assert!(queue.publish(), "the device asked to be told");
                prop_assert!(!queue.publish(), "nothing new");
                for head in &sent {
                    prop_assert_eq!(device.take(), Some(*head));
                }
                prop_assert!(queue.pop().is_none());
                queue.set_interrupts(true);
                prop_assert!(device.give(sent[0], 7, event_idx), "an interrupt was asked for");
                queue.set_interrupts(false);
                for head in &sent[1..] {
                    device.give(*head, 7, event_idx);
                }
                for head in &sent {
                    prop_assert_eq!(queue.pop(), Some(Used { id: u32::from(*head), len: 7 }));
                }
                prop_assert!(!queue.has_used());
            }
        }
    }

    #[test]
    fn no_interrupt_while_they_are_off() {
        for event_idx in [false, true] {
            let mut memory = Box::new(Memory([0; 32 * 1024]));
            let (mut queue, mut device) = pair(&mut memory, 16, event_idx);
            for _ in 0..1000 {
                queue.push(0);
                queue.publish();
                let head = device.take().expect("published");
                assert!(!device.give(head, 0, event_idx));
                assert!(queue.pop().is_some());
            }
        }
    }

    #[test]
    fn a_busy_device_is_not_notified() {
        let mut memory = Box::new(Memory([0; 32 * 1024]));
        let (mut queue, mut device) = pair(&mut memory, 16, true);
        queue.push(0);
        assert!(queue.publish(), "event 0 is passed by the first entry");
        queue.push(1);
        assert!(!queue.publish(), "the device did not ask again");
        device.take();
        device.take();
        device.want_notification(2);
        queue.push(2);
        assert!(queue.publish());
    }

    #[test]
    fn layout_follows_the_specification() {
        for size in [1u16, 2, 128, 256, MAX_SIZE] {
            let layout = Layout::new(size);
            assert!(layout.available >= 16 * usize::from(size) && layout.available.is_multiple_of(2));
            assert!(
                layout.used >= layout.available + 6 + 2 * usize::from(size) && layout.used.is_multiple_of(4)
            );
            assert!(layout.bytes >= layout.used + 6 + 8 * usize::from(size));
        }
    }
}
