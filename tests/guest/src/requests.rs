//! Block requests in flight on a ring (VirtIO 1.3, 5.2.6), with fixed buffers: a request occupies a slot, a slot has its header, status,
//! descriptors and data for ever. What a slot's last request left there is written again only where it differs: a cache line that the
//! device only reads stays with it, too.
//!
//! ```text
//! meta, 128 bytes per slot:  0 type, reserved, sector | 32 status | 64 indirect table of 3 descriptors
//! data, `block` bytes per slot
//! ring:  direct: descriptors 3n, 3n+1, 3n+2;  indirect: descriptor n
//! ```

use crate::ring::{Descriptor, INDIRECT, NEXT, SplitQueue, WRITE};
use alloc::vec;
use alloc::vec::Vec;

/// Bytes of header, status and table of a slot.
pub const META: usize = 128;
const SECTOR: usize = 8;
const STATUS: usize = 32;
const TABLE: usize = 64;
/// What the status byte holds until the device writes it.
const UNWRITTEN: u8 = 0xff;

/// Types of request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// `VIRTIO_BLK_T_IN`
    Read = 0,
    /// `VIRTIO_BLK_T_OUT`
    Write = 1,
    /// `VIRTIO_BLK_T_FLUSH`
    Flush = 4,
    /// `VIRTIO_BLK_T_GET_ID`
    GetId = 8,
    /// `VIRTIO_BLK_T_DISCARD`; its data is a range, see [`range`]
    Discard = 11,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`; as `Discard`
    WriteZeroes = 13,
}

impl Op {
    /// The device reads the data.
    #[must_use]
    pub const fn sends(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes)
    }
}

/// Bytes of a range.
pub const RANGE: usize = 16;

/// A range of a [`Op::Discard`] or [`Op::WriteZeroes`] (`virtio_blk_discard_write_zeroes`); with `unmap`, its space may go.
#[must_use]
pub fn range(sector: u64, sectors: u32, unmap: bool) -> [u8; RANGE] {
    let mut bytes = [0; RANGE];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12] = u8::from(unmap);
    bytes
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its type.
    pub op: Op,
    /// First sector.
    pub sector: u64,
    /// Bytes; 0 for a flush.
    pub len: u32,
    /// Whatever the job wants to find again.
    pub tag: u64,
}

/// A request the device has returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Where its data is.
    pub slot: u16,
    /// What was asked for.
    pub request: Request,
    /// The status byte; 0 is good.
    pub status: u8,
    /// When it was submitted.
    pub since: u64,
}

/// The slots of one ring.
#[derive(Debug)]
pub struct Requests {
    meta: *mut u8,
    data: u64,
    block: usize,
    indirect: bool,
    slots: Vec<Option<(Request, u64)>>,
    /// What the descriptors and the header of each slot say.
    written: Vec<Option<(Op, u32)>>,
    free: Vec<u16>,
    /// The device's offences: heads it never got, or returned twice.
    pub bogus: u64,
}

impl Requests {
    /// Slots for `depth` requests on a fresh ring, with data of `block` bytes each at guest-physical address `data`.
    ///
    /// # Panics
    /// If the ring has not enough descriptors: `depth` with `indirect`, three times that without.
    ///
    /// # Safety
    /// `meta` points to [`META`] bytes per slot that only these requests and the device use while they live; memory is identity
    /// mapped as far as the device knows.
    #[must_use]
    pub unsafe fn new(
        ring: &mut SplitQueue,
        meta: *mut u8,
        data: u64,
        block: usize,
        depth: u16,
        indirect: bool,
    ) -> Self {
        let per_request = if indirect { 1 } else { 3 };
        assert!(depth <= ring.size() / per_request, "too few descriptors");
        for slot in 0..if indirect { depth } else { 0 } {
            let address = meta as u64 + (META * usize::from(slot) + TABLE) as u64;
            ring.set_descriptor(slot, Descriptor { address, len: 48, flags: INDIRECT, next: 0 });
        }
        Self {
            meta,
            data,
            block,
            indirect,
            slots: vec![None; usize::from(depth)],
            written: vec![None; usize::from(depth)],
            free: (0..depth).rev().collect(),
            bogus: 0,
        }
    }

    /// Slots.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Requests in flight, and completed ones that were not [released](Self::release).
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The slot that the next [`submit`](Self::submit) will use, if one is free.
    #[must_use]
    pub fn next_slot(&self) -> Option<u16> {
        self.free.last().copied()
    }

    fn put<T>(&mut self, slot: usize, offset: usize, value: T) {
        debug_assert!(slot < self.slots.len() && offset + size_of::<T>() <= META);
        // SAFETY: `slot` indexes `slots` (callers have it from `free`), so this is inside the memory that `new` was given, at a
        // multiple of the value's size. Volatile, as the device reads it behind our back.
        unsafe { self.meta.add(META * slot + offset).cast::<T>().write_volatile(value) }
    }

    /// Writes what differs between requests of other types and lengths.
    fn shape(&mut self, ring: &mut SplitQueue, slot: u16, op: Op, len: u32) {
        let index = usize::from(slot);
        self.written[index] = Some((op, len));
        self.put(index, 0, op as u32);
        self.put(index, 4, 0u32);
        let base = if self.indirect { 0 } else { 3 * slot };
        let direction = if op.sends() { 0 } else { WRITE };
        let after_header = if len == 0 { base + 2 } else { base + 1 };
        let meta = self.meta as u64 + (META * index) as u64;
        let chain = [
            Descriptor { address: meta, len: 16, flags: NEXT, next: after_header },
            Descriptor {
                address: self.data + (self.block * index) as u64,
                len,
                flags: NEXT | direction,
                next: base + 2,
            },
            Descriptor { address: meta + STATUS as u64, len: 1, flags: WRITE, next: 0 },
        ];
        for (number, descriptor) in (0u16..).zip(chain) {
            if self.indirect {
                self.put(index, TABLE + 16 * usize::from(number), descriptor);
            } else {
                ring.set_descriptor(base + number, descriptor);
            }
        }
    }

    /// Puts a request into [`next_slot`](Self::next_slot), if there is one; the device sees it after [`SplitQueue::publish`].
    #[inline]
    pub fn submit(&mut self, ring: &mut SplitQueue, request: Request, now: u64) {
        let Some(slot) = self.free.pop() else { return };
        let index = usize::from(slot);
        if self.written[index] != Some((request.op, request.len)) {
            self.shape(ring, slot, request.op, request.len);
        }
        self.put(index, SECTOR, request.sector);
        self.put(index, STATUS, UNWRITTEN);
        self.slots[index] = Some((request, now));
        ring.push(if self.indirect { slot } else { 3 * slot });
    }

    /// Takes the next returned request. Its slot is the caller's until [`release`](Self::release).
    #[inline]
    pub fn complete(&mut self, ring: &mut SplitQueue) -> Option<Completion> {
        loop {
            let used = ring.pop()?;
            let (slot, whole) =
                if self.indirect { (used.id, true) } else { (used.id / 3, used.id.is_multiple_of(3)) };
            let found = self.slots.get_mut(slot as usize).filter(|_| whole).and_then(Option::take);
            let Some((request, since)) = found else {
                self.bogus += 1;
                continue;
            };
            // SAFETY: `slot` indexes `slots`: inside the memory that `new` was given. Volatile, as the device writes it.
            let status = unsafe { self.meta.add(META * slot as usize + STATUS).read_volatile() };
            return Some(Completion { slot: slot as u16, request, status, since });
        }
    }

    /// Gives the slot of a completed request back.
    #[inline]
    pub fn release(&mut self, slot: u16) {
        self.free.push(slot);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::ring::Layout;
    use proptest::prelude::*;
    use std::boxed::Box;

    const SIZE: u16 = 32;
    const DEPTH: u16 = 8;
    const DATA: u64 = 0x10_0000;

    #[repr(align(64))]
    struct Memory([u8; 4096]);

    fn read<T>(address: u64) -> T {
        // SAFETY: addresses of these tests' own memory, as the driver wrote them.
        unsafe { (address as *const T).read_volatile() }
    }

    /// The device's side: follows the chain of the entry at `seen`, answers it with status 0, and says what it asked for.
    fn serve(ring: &SplitQueue, seen: u16) -> (Op, u64, Option<Descriptor>) {
        let [table, available, used] = ring.addresses();
        let head: u16 = read(available + 4 + 2 * u64::from(seen % SIZE));
        let mut descriptor: Descriptor = read(table + 16 * u64::from(head));
        let mut table = table;
        if descriptor.flags & INDIRECT != 0 {
            assert_eq!(descriptor.len, 48);
            table = descriptor.address;
            descriptor = read(table);
        }
        let follow = |descriptor: &Descriptor| read::<Descriptor>(table + 16 * u64::from(descriptor.next));
        assert_eq!((descriptor.len, descriptor.flags), (16, NEXT));
        let op = match read::<u32>(descriptor.address) {
            0 => Op::Read,
            1 => Op::Write,
            4 => Op::Flush,
            8 => Op::GetId,
            11 => Op::Discard,
            13 => Op::WriteZeroes,
            other => panic!("type {other}"),
        };
        assert_eq!(read::<u32>(descriptor.address + 4), 0, "reserved");
        let sector = read(descriptor.address + 8);
        let mut last = follow(&descriptor);
        let data = (last.flags & NEXT != 0).then(|| {
            let next = follow(&last);
            core::mem::replace(&mut last, next)
        });
        assert_eq!((last.len, last.flags), (1, WRITE));
        assert_eq!(read::<u8>(last.address), UNWRITTEN);
        // SAFETY: the status byte and the used ring, in these tests' memory.
        unsafe {
            (last.address as *mut u8).write_volatile(0);
            let element = (used + 4 + 8 * u64::from(seen % SIZE)) as *mut u32;
            element.write_volatile(u32::from(head));
            ((used + 2) as *mut u16).write_volatile(seen.wrapping_add(1));
        }
        (op, sector, data)
    }

    fn set_up(ring: &mut Memory, meta: &mut Memory, indirect: bool) -> (SplitQueue, Requests) {
        assert!(Layout::new(SIZE).bytes <= ring.0.len());
        // SAFETY: memory of the right size and alignment that the caller keeps.
        unsafe {
            let mut ring = SplitQueue::new(ring.0.as_mut_ptr(), SIZE, false);
            let requests = Requests::new(&mut ring, meta.0.as_mut_ptr(), DATA, 4096, DEPTH, indirect);
            (ring, requests)
        }
    }

    proptest! {
        /// Slots are used again and again by requests of every shape: what the device sees is what was asked for.
        #[test]
        fn the_device_sees_every_request(
            indirect: bool,
            wanted in proptest::collection::vec(
                (0usize..6, any::<u64>(), prop_oneof![Just(512u32), Just(4096), 1u32..4096]), 1..200),
        ) {
            let (mut memory, mut meta) = (Box::new(Memory([0; 4096])), Box::new(Memory([0xaa; 4096])));
            let (mut ring, mut requests) = set_up(&mut memory, &mut meta, indirect);
            let (mut seen, mut tag) = (0u16, 0);
            for batch in wanted.chunks(usize::from(DEPTH)) {
                let batch = batch.iter().map(|(op, sector, len)| {
                    let op = [Op::Read, Op::Write, Op::Flush, Op::GetId, Op::Discard, Op::WriteZeroes][*op];
                    tag += 1;
                    Request { op, sector: *sector, len: if op == Op::Flush { 0 } else { *len }, tag }
                });
                let batch: Vec<_> = batch.map(|request| {
                    let slot = requests.next_slot().expect("a free slot");
                    requests.submit(&mut ring, request, request.tag * 10);
                    (slot, request)
                }).collect();
                ring.publish();
                prop_assert_eq!(requests.in_flight(), batch.len());
                for (slot, request) in batch {
                    let (op, sector, data) = serve(&ring, seen);
                    seen = seen.wrapping_add(1);
                    prop_assert_eq!((op, sector), (request.op, request.sector));
                    let sends = !matches!(request.op, Op::Read | Op::Flush | Op::GetId);
                    let direction = if sends { 0 } else { WRITE };
                    let expected = (request.len > 0)
                        .then_some((DATA + 4096 * u64::from(slot), request.len, NEXT | direction));
                    prop_assert_eq!(data.map(|d| (d.address, d.len, d.flags)), expected);
                    let done = Completion { slot, request, status: 0, since: request.tag * 10 };
                    prop_assert_eq!(requests.complete(&mut ring), Some(done));
                    requests.release(slot);
                }
                prop_assert_eq!((requests.in_flight(), requests.bogus), (0, 0));
            }
        }
    }

    #[test]
    fn what_was_not_in_flight_is_an_offence() {
        for (indirect, wrong) in [(false, 1), (false, 3), (false, 96), (true, 1), (true, u32::MAX)] {
            let (mut memory, mut meta) = (Box::new(Memory([0; 4096])), Box::new(Memory([0; 4096])));
            let (mut ring, mut requests) = set_up(&mut memory, &mut meta, indirect);
            requests.submit(&mut ring, Request { op: Op::Read, sector: 0, len: 512, tag: 0 }, 0);
            ring.publish();
            serve(&ring, 0);
            let used = ring.addresses()[2];
            // SAFETY: the first element of the used ring.
            unsafe { ((used + 4) as *mut u32).write_volatile(wrong) };
            assert_eq!(requests.complete(&mut ring), None);
            assert_eq!((requests.bogus, requests.in_flight()), (1, 1), "{wrong}");
        }
    }
}
