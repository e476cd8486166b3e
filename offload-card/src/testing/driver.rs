//! The driver's side of a split virtqueue.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::TestGuest;
use crate::event::Event;
use crate::memory::{GuestMemory, MemoryTable};
use crate::ring::{InflightQueue, QueueShared, Ring, RingAddresses, RingConfig, RingError};

/// A buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// The device may write it.
    pub writable: bool,
}

impl Buffer {
    /// One that the device reads.
    pub fn readable(address: u64, length: u32) -> Self {
        Self { address, length, writable: false }
    }

    /// One that the device writes.
    pub fn writable(address: u64, length: u32) -> Self {
        Self { address, length, writable: true }
    }
}

/// A driver's ring. Its three areas take 64 KiB from its base on, whatever its size up to 1024.
#[derive(Debug)]
pub struct DriverQueue {
    memory: Arc<GuestMemory>,
    guest: TestGuest,
    /// Where it is.
    pub addresses: RingAddresses,
    /// Entries.
    pub size: u16,
    /// Its number in the device, for [`DriverQueue::ring`]: 0 unless set.
    pub index: u16,
    features: u64,
    /// What the driver signals.
    pub kick: Event,
    /// What the device signals.
    pub call: Event,
    /// What the device signals when the queue is broken.
    pub error: Event,
    free: Vec<u16>,
    /// Chain length by head, to free it.
    chains: Vec<Vec<u16>>,
    avail: u16,
    used: u16,
}

impl DriverQueue {
    /// An empty ring of `size` entries at `base` of the guest's memory.
    pub fn new(guest: &TestGuest, base: u64, size: u16, features: u64) -> Self {
        let addresses = RingAddresses { descriptors: base, avail: base + 0x8000, used: base + 0xa000 };
        Self {
            memory: guest.memory.clone(),
            guest: guest.clone(),
            addresses,
            size,
            index: 0,
            features,
            kick: Event::new().expect("eventfd"),
            call: Event::new().expect("eventfd"),
            error: Event::new().expect("eventfd"),
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail: 0,
            used: 0,
        }
    }

    /// The device's side of it, in this process.
    pub fn ring(&self, inflight: Option<InflightQueue>) -> Result<(Ring, Arc<QueueShared>), RingError> {
        self.ring_in(self.guest.table(), inflight)
    }

    /// The same in a table that may change.
    pub fn ring_in(
        &self,
        memory: MemoryTable,
        inflight: Option<InflightQueue>,
    ) -> Result<(Ring, Arc<QueueShared>), RingError> {
        let shared = Arc::new(QueueShared::default());
        shared.set_call(Some(self.call.try_clone().expect("eventfd")));
        shared.set_error(Some(self.error.try_clone().expect("eventfd")));
        let ring = Ring::new(RingConfig {
            index: self.index,
            size: self.size,
            features: self.features,
            addresses: self.addresses,
            base: 0,
            kick: self.kick.try_clone().expect("eventfd"),
            memory,
            shared: shared.clone(),
            inflight,
        })?;
        Ok((ring, shared))
    }

    /// The driver is in `guest` from now on, which has what its memory had.
    pub fn move_to(&mut self, guest: &TestGuest) {
        (self.memory, self.guest) = (guest.memory.clone(), guest.clone());
    }

    fn read<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.memory.read_obj(GuestAddress(address)).expect("address")
    }

    fn write<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).expect("address");
    }

    /// Writes a descriptor, valid or not.
    pub fn set_descriptor(&self, table: u64, index: u16, address: u64, length: u32, flags: u32, next: u16) {
        let descriptor = Descriptor::new(address, length, flags as u16, next);
        self.write(table + 16 * u64::from(index), descriptor.addr().0);
        self.write(table + 16 * u64::from(index) + 8, length);
        self.write(table + 16 * u64::from(index) + 12, descriptor.flags());
        self.write(table + 16 * u64::from(index) + 14, next);
    }

    /// Writes a chain and makes it available; `None` if there are too few free descriptors.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let at = self.free.len().checked_sub(buffers.len())?;
        let descriptors = self.free.split_off(at);
        for (i, (buffer, &index)) in buffers.iter().zip(&descriptors).enumerate() {
            let next = descriptors.get(i + 1).copied();
            let flags = if buffer.writable { VRING_DESC_F_WRITE } else { 0 }
                | if next.is_some() { VRING_DESC_F_NEXT } else { 0 };
            let table = self.addresses.descriptors;
            self.set_descriptor(table, index, buffer.address, buffer.length, flags, next.unwrap_or(0));
        }
        let head = *descriptors.first()?;
        self.chains[usize::from(head)] = descriptors;
        self.offer(head);
        Some(head)
    }

    /// As `add`, with an indirect table written at `table`.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Option<u16> {
        for (index, buffer) in (0..).zip(buffers) {
            let last = usize::from(index) + 1 == buffers.len();
            let flags = if buffer.writable { VRING_DESC_F_WRITE } else { 0 }
                | if last { 0 } else { VRING_DESC_F_NEXT };
            self.set_descriptor(table, index, buffer.address, buffer.length, flags, index + 1);
        }
        let head = self.free.pop()?;
        let length = 16 * buffers.len() as u32;
        self.set_descriptor(self.addresses.descriptors, head, table, length, VRING_DESC_F_INDIRECT, 0);
        self.chains[usize::from(head)] = vec![head];
        self.offer(head);
        Some(head)
    }

    /// Makes `head` available, whatever its descriptors say.
    pub fn offer(&mut self, head: u16) {
        self.write(self.addresses.avail + 4 + 2 * u64::from(self.avail % self.size), head);
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_idx(self.avail);
    }

    /// Writes the available ring's index, right or wrong.
    pub fn set_avail_idx(&self, idx: u16) {
        self.memory.store(idx, GuestAddress(self.addresses.avail + 2), Ordering::Release).expect("address");
    }

    /// Signals the device, whether or not it wants to be.
    pub fn kick(&self) {
        self.kick.signal();
    }

    /// The device wants a kick for what was made available last.
    pub fn kick_wanted(&self) -> bool {
        fence(Ordering::SeqCst);
        if self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0 {
            let event: u16 = self.read(self.addresses.used + 4 + 8 * u64::from(self.size));
            self.avail.wrapping_sub(event).wrapping_sub(1) < 1
        } else {
            self.read::<u16>(self.addresses.used) & 1 == 0
        }
    }

    /// The next chain that the device has returned: its head, and how many bytes were written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_idx() == self.used {
            return None;
        }
        let entry = self.addresses.used + 4 + 8 * u64::from(self.used % self.size);
        let (head, length) = (self.read::<u32>(entry) as u16, self.read::<u32>(entry + 4));
        self.used = self.used.wrapping_add(1);
        let mut freed = std::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!freed.is_empty(), "chain {head} was returned twice");
        self.free.append(&mut freed);
        Some((head, length))
    }

    /// Waits for the next chain.
    pub fn wait_used(&mut self, patience: Duration) -> Option<(u16, u32)> {
        let since = Instant::now();
        loop {
            // The driver wants an interrupt for the very next one.
            self.set_used_event(self.used);
            fence(Ordering::SeqCst);
            if let Some(used) = self.take_used() {
                return Some(used);
            }
            if since.elapsed() > patience {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Where an interrupt is wanted next (EVENT_IDX).
    pub fn set_used_event(&self, at: u16) {
        self.write(self.addresses.avail + 4 + 2 * u64::from(self.size), at);
    }

    /// The used ring's index.
    pub fn used_idx(&self) -> u16 {
        self.memory.load(GuestAddress(self.addresses.used + 2), Ordering::Acquire).expect("address")
    }

    /// Descriptors not in use.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Features the driver acknowledged.
    pub fn features(&self) -> u64 {
        self.features
    }
}
