//! One request queue of a disk, with fixed buffers: a request occupies a slot, a slot has its header, status, descriptors
//! and data for ever.
//!
//! ```text
//! meta, 128 bytes per slot:  0 type, reserved, sector | 32 status | 64 indirect table of 3 descriptors
//! data, `block` bytes per slot
//! ring:  direct: descriptors 3n, 3n+1, 3n+2;  indirect: descriptor n
//! ```

use crate::memory::Dma;
use crate::virtio;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use guest::histogram::Histogram;
use guest::json::Object;
use guest::ring::{Descriptor, INDIRECT, NEXT, WRITE};

const META: usize = 128;
const STATUS: usize = 32;
const TABLE: usize = 64;
/// What the status byte holds until the device writes it.
const UNWRITTEN: u8 = 0xff;

/// Types of request (VirtIO 1.3, 5.2.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Op {
    Read = 0,
    Write = 1,
    Flush = 4,
    GetId = 8,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) op: Op,
    /// First sector.
    pub(super) sector: u64,
    /// Bytes; 0 for a flush.
    pub(super) len: u32,
    /// Whatever the job wants to find again.
    pub(super) tag: u64,
}

/// A request the device has returned.
pub(super) struct Completion {
    pub(super) slot: u16,
    pub(super) request: Request,
    /// The status byte; 0 is good.
    pub(super) status: u8,
    /// When it was submitted.
    pub(super) since: u64,
}

/// What a queue counted.
#[derive(Default)]
pub(super) struct Stats {
    pub(super) ops: u64,
    pub(super) bytes: u64,
    pub(super) latency: Histogram,
    /// Longest time without a completion while requests were in flight, in ticks.
    pub(super) max_gap: u64,
}

/// A queue.
pub(super) struct Queue {
    queue: virtio::Queue,
    meta: Dma,
    data: Dma,
    block: usize,
    indirect: bool,
    slots: Vec<Option<(Request, u64)>>,
    free: Vec<u16>,
    /// Last completion, or the submission that ended a time without requests.
    moved: u64,
    pub(super) stats: Stats,
    /// Requests completed since the beginning of the I/O phase.
    pub(super) total: u64,
    /// The device's offences: heads it never got, or returned twice.
    pub(super) bogus: u64,
}

impl Queue {
    /// Takes over a fresh ring.
    pub(super) fn new(
        queue: virtio::Queue,
        depth: u16,
        block: usize,
        indirect: bool,
    ) -> Result<Self, String> {
        let per_request = if indirect { 1 } else { 3 };
        if depth > queue.ring.size() / per_request {
            let size = queue.ring.size();
            return Err(alloc::format!(
                "qd={depth}: a ring of {size} holds {}; the device or qsize= limits it",
                size / per_request
            ));
        }
        let mut this = Self {
            meta: Dma::new(META * usize::from(depth))?,
            data: Dma::new(block.max(512) * usize::from(depth))?,
            block: block.max(512),
            indirect,
            slots: vec![None; usize::from(depth)],
            free: (0..depth).rev().collect(),
            queue,
            moved: 0,
            stats: Stats::default(),
            total: 0,
            bogus: 0,
        };
        if indirect {
            for slot in 0..depth {
                let address = this.meta.address(META * usize::from(slot) + TABLE);
                this.queue
                    .ring
                    .set_descriptor(slot, Descriptor { address, len: 48, flags: INDIRECT, next: 0 });
            }
        }
        Ok(this)
    }

    pub(super) fn ring_size(&self) -> u16 {
        self.queue.ring.size()
    }

    /// Requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The slot that the next [`submit`](Self::submit) will use, if one is free.
    pub(super) fn next_slot(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// The data of a slot that is not in flight.
    pub(super) fn data(&self, slot: u16, len: usize) -> &[u8] {
        self.data.bytes(self.block * usize::from(slot), len)
    }

    /// The same, to fill.
    pub(super) fn data_mut(&mut self, slot: u16, len: usize) -> &mut [u8] {
        self.data.bytes_mut(self.block * usize::from(slot), len)
    }

    /// Shows the data of every slot.
    pub(super) fn for_each_buffer(&mut self, mut f: impl FnMut(&mut [u8])) {
        for slot in 0..self.slots.len() {
            f(self.data.bytes_mut(self.block * slot, self.block));
        }
    }

    /// Puts a request into [`next_slot`](Self::next_slot); the device sees it after [`kick`](Self::kick).
    pub(super) fn submit(&mut self, request: Request, now: u64) {
        let Some(slot) = self.free.pop() else { return };
        if self.in_flight() == 1 {
            self.moved = now;
        }
        let index = usize::from(slot);
        let meta = META * index;
        self.meta.put(meta, request.op as u32);
        self.meta.put(meta + 4, 0u32);
        self.meta.put(meta + 8, request.sector);
        self.meta.put(meta + STATUS, UNWRITTEN);
        let base = if self.indirect { 0 } else { 3 * slot };
        let direction = if request.op == Op::Write { 0 } else { WRITE };
        let after_header = if request.len == 0 { base + 2 } else { base + 1 };
        let chain = [
            Descriptor { address: self.meta.address(meta), len: 16, flags: NEXT, next: after_header },
            Descriptor {
                address: self.data.address(self.block * index),
                len: request.len,
                flags: NEXT | direction,
                next: base + 2,
            },
            Descriptor { address: self.meta.address(meta + STATUS), len: 1, flags: WRITE, next: 0 },
        ];
        for (number, descriptor) in (0u16..).zip(chain) {
            if self.indirect {
                self.meta.put(meta + TABLE + 16 * usize::from(number), descriptor);
            } else {
                self.queue.ring.set_descriptor(base + number, descriptor);
            }
        }
        self.slots[index] = Some((request, now));
        self.queue.ring.push(if self.indirect { slot } else { base });
    }

    /// Makes what was submitted visible, and notifies the device if it asks for that.
    pub(super) fn kick(&mut self) {
        self.queue.kick();
    }

    /// Whether there is something to [`complete`](Self::complete).
    pub(super) fn has_completions(&self) -> bool {
        self.queue.ring.has_used()
    }

    /// Takes the next returned request. Its slot is the caller's until [`release`](Self::release).
    pub(super) fn complete(&mut self) -> Option<Completion> {
        loop {
            let used = self.queue.ring.pop()?;
            let width = if self.indirect { 1 } else { 3 };
            let slot = (used.id / width) as usize;
            let whole = used.id % width == 0;
            let Some((request, since)) = self.slots.get_mut(slot).filter(|_| whole).and_then(Option::take)
            else {
                self.bogus += 1;
                continue;
            };
            let status = self.meta.get(META * slot + STATUS);
            return Some(Completion { slot: slot as u16, request, status, since });
        }
    }

    /// Counts a completed request.
    pub(super) fn count(&mut self, done: &Completion, now: u64) {
        self.total += 1;
        self.stats.ops += 1;
        self.stats.bytes += u64::from(done.request.len);
        self.stats.latency.record(now - done.since);
        self.stats.max_gap = self.stats.max_gap.max(now.saturating_sub(self.moved));
        self.moved = now;
    }

    /// Time without a completion, in ticks, while requests are in flight.
    pub(super) fn silence(&self, now: u64) -> u64 {
        if self.in_flight() == 0 { 0 } else { now.saturating_sub(self.moved) }
    }

    /// Gives a slot back.
    pub(super) fn release(&mut self, slot: u16) {
        self.free.push(slot);
    }

    /// The I/O phase begins.
    pub(super) fn begin(&mut self) {
        self.stats = Stats::default();
        self.total = 0;
        self.queue.begin();
    }

    /// The warm-up is over: starts counting afresh, but for totals.
    pub(super) fn measure(&mut self) {
        self.stats = Stats::default();
        self.queue.measure();
    }

    /// Asks for an interrupt with the next completion, or for none.
    pub(super) fn set_interrupts(&mut self, on: bool) {
        self.queue.ring.set_interrupts(on);
    }

    /// Kicks and interrupts of the I/O phase.
    pub(super) fn signals(&self) -> virtio::Signals {
        self.queue.signals()
    }

    /// The same, after the warm-up.
    pub(super) fn measured(&self) -> virtio::Signals {
        self.queue.measured()
    }

    /// The queue's part of a result.
    pub(super) fn report(&self, micros: impl Fn(u64) -> u64) -> Object {
        let measured = self.measured();
        Object::new()
            .number("ops", self.stats.ops)
            .number("kicks", measured.kicks)
            .number("irqs", measured.interrupts)
            .number("max_gap_us", micros(self.stats.max_gap))
    }
}
