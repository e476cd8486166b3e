//! A guest with one virtqueue in 64 KiB of memory, and what a hostile driver does with it.
//!
//! ```text
//! 0x0000 descriptors   0x3000 indirect tables   0x8000 data; a region of its own for the device
//! 0x1000 available     0x4000 headers
//! 0x2000 used          0x5000 statuses
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use offload_card::memory::{GuestMemory, MemoryTable, Region};
use offload_card::ring::RingAddresses;
use vm_memory::{Bytes, FileOffset, GuestAddress};

use crate::input::Input;
use crate::memfd::memfd;

/// Bytes of memory.
pub const MEMORY: u64 = 0x1_0000;
/// Where the device's two regions meet.
pub const BORDER: u64 = 0x8000;
/// Largest ring.
pub const MAX_SIZE: u16 = 128;
/// Where the ring is.
pub const RING: RingAddresses = RingAddresses { descriptors: 0, avail: 0x1000, used: 0x2000 };
const TABLES: u64 = 0x3000;
const HEADERS: u64 = 0x4000;
const STATUSES: u64 = 0x5000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The memory, shared.
pub struct Guest {
    memory: GuestMemory,
    file: File,
}

impl Guest {
    /// In a file that cannot be cut if `sealed`.
    pub fn new(sealed: bool) -> Self {
        let file = memfd(MEMORY, sealed);
        let mapped = FileOffset::new(file.try_clone().expect("memfd"), 0);
        let range = (GuestAddress(0), MEMORY as usize, Some(mapped));
        Self { memory: GuestMemory::from_ranges_with_files([range]).expect("mapping"), file }
    }

    /// Its file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// All zeros again.
    pub fn clear(&self) {
        self.write(0, &[0; MEMORY as usize]);
    }

    /// One of the ways in which a front-end may share the memory.
    pub fn regions(&self, way: u8) -> Vec<Region> {
        let region = |from: u64, to: u64| {
            let file = self.file.try_clone().expect("memfd");
            Region::map(from, to - from, 0x7000_0000 + from, file, from).expect("region")
        };
        match way % 4 {
            0 | 1 => vec![region(0, BORDER), region(BORDER, MEMORY)],
            2 => vec![region(0, BORDER)],
            _ => vec![region(0, 0x4000), region(0x4000, 0x5000), region(0x6000, MEMORY)],
        }
    }

    /// A table with the memory shared in that way.
    pub fn table(&self, way: u8) -> MemoryTable {
        let table = MemoryTable::new();
        table.replace(self.regions(way)).expect("memory table");
        table
    }

    /// Writes what lies within the memory.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
    }

    /// Reads; what lies outside reads as 0.
    pub fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let _ = self.memory.read_slice(&mut bytes, GuestAddress(at));
        bytes
    }

    fn u16(&self, at: u64) -> u16 {
        self.memory.load(GuestAddress(at), Ordering::Acquire).unwrap_or(0)
    }

    /// The used ring's index.
    pub fn used_idx(&self) -> u16 {
        self.u16(RING.used + 2)
    }

    /// Entry `index` of the used ring: head and bytes written.
    pub fn used(&self, index: u16, size: u16) -> (u32, u32) {
        let at = RING.used + 4 + 8 * u64::from(index % size);
        let word = |at| u32::from_le_bytes(self.read(at, 4).try_into().unwrap_or_default());
        (word(at), word(at + 4))
    }

    /// Writes a descriptor into the table at `table`.
    pub fn descriptor(&self, table: u64, index: u16, d: Descriptor) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&d.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&d.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&d.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&d.next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    /// Makes `head` available, whatever is there.
    pub fn offer(&self, head: u16, size: u16) {
        let idx = self.u16(RING.avail + 2);
        self.write(RING.avail + 4 + 2 * u64::from(idx % size), &head.to_le_bytes());
        self.set_avail_idx(idx.wrapping_add(1));
    }

    fn set_avail_idx(&self, idx: u16) {
        let _ = self.memory.store(idx, GuestAddress(RING.avail + 2), Ordering::Release);
    }

    /// Writes a block request's header at `at`.
    pub fn header(&self, at: u64, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.write(at, &bytes);
    }
}

/// A descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    /// Guest-physical.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// `VRING_DESC_F_*`.
    pub flags: u16,
    /// With NEXT.
    pub next: u16,
}

/// Something a driver does.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// Writes a descriptor of the ring's table or an indirect one.
    Descriptor(u64, u16, Descriptor),
    /// Makes a head available.
    Offer(u16),
    /// Writes the available ring's index.
    AvailIdx(u16),
    /// Writes a request's header.
    Header(u64, u32, u64),
    /// A whole request that begins at descriptor `head`, with `length` bytes of data at `data`.
    Request { head: u16, indirect: bool, kind: u32, sector: u64, data: u64, length: u32 },
    /// Writes a word anywhere.
    Poke(u64, u32),
    /// Says where an interrupt is wanted.
    UsedEvent(u16),
    /// Notifies the device.
    Kick,
    /// Gives the device time.
    Pause,
    /// The front-end shares the memory in another way.
    Share(u8),
    /// The front-end writes into the inflight area.
    Inflight(u16, u32),
}

impl Step {
    /// The next one in `input`.
    pub fn read(input: &mut Input<'_>) -> Self {
        let index = |input: &mut Input<'_>| if input.rarely(32) { input.u16() } else { input.u8().into() };
        match input.u8() % 16 {
            0..=2 => {
                let table = if input.rarely(2) { TABLES + 16 * u64::from(input.u8()) } else { 0 };
                let d = Descriptor {
                    address: address(input),
                    length: length(input),
                    flags: if input.rarely(8) { input.u16() } else { (input.u8() % 8).into() },
                    next: index(input),
                };
                Self::Descriptor(table, index(input) % (2 * MAX_SIZE), d)
            }
            3 | 4 => Self::Offer(index(input)),
            5 => Self::AvailIdx(input.u16()),
            6 => Self::Header(address(input), kind(input), sector(input)),
            7..=10 => Self::Request {
                head: index(input) % MAX_SIZE,
                indirect: input.rarely(2),
                kind: kind(input),
                sector: sector(input),
                data: address(input),
                length: length(input),
            },
            11 => Self::Poke(address(input), input.u32()),
            12 => Self::UsedEvent(input.u16()),
            13 => Self::Kick,
            14 => Self::Pause,
            _ if input.rarely(2) => Self::Share(input.u8()),
            _ => Self::Inflight(input.u16(), input.u32()),
        }
    }

    /// Does it, for a ring of `size`.
    pub fn perform(self, guest: &Guest, size: u16, front: &Front<'_>) {
        match self {
            Self::Descriptor(table, index, d) => guest.descriptor(table, index, d),
            Self::Offer(head) => guest.offer(head, size),
            Self::AvailIdx(idx) => guest.set_avail_idx(idx),
            Self::Header(at, kind, sector) => guest.header(at, kind, sector),
            Self::Request { head, indirect, kind, sector, data, length } => {
                let header = HEADERS + 16 * u64::from(head);
                guest.header(header, kind, sector);
                let table = if indirect { TABLES + 48 * u64::from(head % 64) } else { 0 };
                let at = |i: u16| if indirect { i } else { head.wrapping_add(i) % size };
                let data_flags = if kind == 1 { NEXT } else { NEXT | WRITE };
                let status = STATUSES + u64::from(head);
                let chain = [(header, 16, NEXT), (data, length, data_flags), (status, 1, WRITE)];
                for (i, (address, length, flags)) in (0..).zip(chain) {
                    guest.descriptor(table, at(i), Descriptor { address, length, flags, next: at(i + 1) });
                }
                if indirect {
                    let whole = Descriptor { address: table, length: 48, flags: INDIRECT, next: 0 };
                    guest.descriptor(0, head % size, whole);
                }
                guest.offer(head % size, size);
            }
            Self::Poke(at, value) => guest.write(at, &value.to_le_bytes()),
            Self::UsedEvent(at) => guest.write(RING.avail + 4 + 2 * u64::from(size), &at.to_le_bytes()),
            Self::Kick => (front.kick)(),
            Self::Pause => std::thread::yield_now(),
            Self::Share(way) => {
                let _ = front.table.replace(guest.regions(way));
                (front.kick)();
            }
            Self::Inflight(at, value) => {
                if let Some(file) = front.inflight {
                    let end = file.metadata().map_or(0, |m| m.len().saturating_sub(4));
                    let _ = file.write_all_at(&value.to_le_bytes(), u64::from(at).min(end));
                }
            }
        }
    }
}

/// What a front-end has of the device.
pub struct Front<'a> {
    /// Notifies it.
    pub kick: &'a (dyn Fn() + Sync),
    /// The memory it sees.
    pub table: &'a MemoryTable,
    /// The inflight area.
    pub inflight: Option<&'a File>,
}

fn address(input: &mut Input<'_>) -> u64 {
    let n = u64::from(input.u16());
    match input.u8() % 16 {
        0..=4 => BORDER + n % (MEMORY - BORDER),
        5..=7 => HEADERS + 16 * (n % 128),
        8 | 9 => STATUSES + n % 256,
        10 => TABLES + n % 0x1000,
        11 => BORDER.wrapping_sub(16).wrapping_add(n % 32),
        12 => MEMORY.wrapping_sub(16).wrapping_add(n % 32),
        13 | 14 => n % 0x3000,
        _ => input.u64(),
    }
}

fn length(input: &mut Input<'_>) -> u32 {
    match input.u8() % 8 {
        0..=3 => 512 * u32::from(input.u8() % 16),
        4 => 1,
        5 => 16,
        6 => input.u16().into(),
        _ => input.u32(),
    }
}

fn kind(input: &mut Input<'_>) -> u32 {
    match input.u8() {
        255 => input.u32(),
        n => [0, 0, 0, 1, 1, 1, 4, 8, 11, 13, u32::from(n)][usize::from(n) % 11],
    }
}

fn sector(input: &mut Input<'_>) -> u64 {
    if input.rarely(8) { input.u64() } else { u64::from(input.u8()) % 70 }
}
