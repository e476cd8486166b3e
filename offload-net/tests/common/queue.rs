//! The driver's side of a split virtqueue (VirtIO 1.3 section 2.7), as a guest has it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use offload_card::event::Event;
use offload_card::ring::RingAddresses;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A queue of `SIZE` entries.
pub struct Queue {
    pub mem: Arc<GuestMemoryMmap<()>>,
    pub kick: Event,
    pub call: Event,
    base: u64,
    free: Vec<u16>,
    /// Descriptors of each chain in flight, by head.
    chains: Vec<Vec<u16>>,
    pub avail_idx: u16,
    kicked_idx: u16,
    used_idx: u16,
}

pub const SIZE: u16 = 256;

impl Queue {
    pub fn new(mem: Arc<GuestMemoryMmap<()>>, base: u64) -> Self {
        Self {
            mem,
            kick: Event::new().unwrap(),
            call: Event::new().unwrap(),
            base,
            free: (0..SIZE).rev().collect(),
            chains: vec![Vec::new(); SIZE.into()],
            avail_idx: 0,
            kicked_idx: 0,
            used_idx: 0,
        }
    }

    pub fn addresses(&self) -> RingAddresses {
        RingAddresses { descriptors: self.base, avail: self.base + 0x2000, used: self.base + 0x4000 }
    }

    fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.mem.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn read<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.mem.read_obj(GuestAddress(at)).unwrap()
    }

    /// The used ring's index, as the device left it.
    pub fn device_used_idx(&self) -> u16 {
        self.read(self.addresses().used + 2)
    }

    /// Writes one descriptor, whatever it says.
    pub fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = self.base + 16 * u64::from(index);
        self.write(at, address);
        self.write(at + 8, length);
        self.write(at + 12, flags);
        self.write(at + 14, next);
    }

    /// Makes `head` available, whatever it is.
    pub fn offer(&mut self, head: u16) {
        let a = self.addresses().avail;
        self.write(a + 4 + 2 * u64::from(self.avail_idx % SIZE), head);
        fence(Ordering::SeqCst);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.write(a + 2, self.avail_idx);
    }

    /// A chain of so many buffers can be offered.
    pub fn has_room(&self, buffers: usize) -> bool {
        self.free.len() >= buffers
    }

    /// Offers a chain of buffers (address, length, device may write); its head, or `None` if the table is full.
    pub fn add(&mut self, buffers: &[(u64, u32, bool)]) -> Option<u16> {
        if self.free.len() < buffers.len() {
            return None;
        }
        let ids: Vec<u16> = buffers.iter().filter_map(|_| self.free.pop()).collect();
        for (i, (address, length, writable)) in buffers.iter().enumerate() {
            let next = ids.get(i + 1);
            let flags = (u16::from(*writable) * WRITE) | (u16::from(next.is_some()) * NEXT);
            self.descriptor(ids[i], *address, *length, flags, next.copied().unwrap_or(0));
        }
        let head = ids[0];
        self.chains[usize::from(head)] = ids;
        self.offer(head);
        Some(head)
    }

    /// Kicks if the device asked for it (EVENT_IDX, section 2.7.10).
    pub fn kick(&mut self) {
        fence(Ordering::SeqCst);
        let event: u16 = self.read(self.addresses().used + 4 + 8 * u64::from(SIZE));
        let (new, old) = (self.avail_idx, self.kicked_idx);
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.kick.signal();
        }
        self.kicked_idx = new;
    }

    /// The device has asked for a kick for what is made available next.
    pub fn kick_wanted(&self) -> bool {
        fence(Ordering::SeqCst);
        self.read::<u16>(self.addresses().used + 4 + 8 * u64::from(SIZE)) == self.avail_idx
    }

    /// The next chain the device has returned: head and bytes written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let u = self.addresses().used;
        if self.read::<u16>(u + 2) == self.used_idx {
            return None;
        }
        fence(Ordering::SeqCst);
        let entry = u + 4 + 8 * u64::from(self.used_idx % SIZE);
        let (head, length) = (self.read::<u32>(entry), self.read::<u32>(entry + 4));
        self.used_idx = self.used_idx.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        self.free.append(&mut self.chains[usize::from(head)]);
        Some((head, length))
    }

    /// Like `used`, waiting for the interrupt as a driver does.
    pub fn wait_used(&mut self, patience: Duration) -> Option<(u16, u32)> {
        let until = Instant::now() + patience;
        loop {
            if let Some(used) = self.used() {
                return Some(used);
            }
            // used_event: an interrupt for the next entry, please; then look again.
            self.write(self.addresses().avail + 4 + 2 * u64::from(SIZE), self.used_idx);
            fence(Ordering::SeqCst);
            if let Some(used) = self.used() {
                return Some(used);
            }
            let left = until.checked_duration_since(Instant::now())?;
            let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)).unwrap();
            self.call.take();
        }
    }
}
