//! One request queue of a disk: its ring, its requests, and what it counted.

use crate::memory::Dma;
use crate::virtio;
use alloc::string::String;
use guest::gaps::Gaps;
use guest::histogram::Histogram;
use guest::json::Object;
pub(super) use guest::requests::{Completion, Op, Request};
use guest::requests::{META, Requests};

/// What a queue counted.
#[derive(Default)]
pub(super) struct Stats {
    pub(super) ops: u64,
    pub(super) bytes: u64,
    pub(super) latency: Histogram,
    /// Times without a completion while requests were in flight.
    pub(super) gaps: Gaps,
}

/// A queue.
pub(super) struct Queue {
    queue: virtio::Queue,
    requests: Requests,
    /// The requests' memory lives as long as they do.
    _meta: Dma,
    data: Dma,
    block: usize,
    /// Last completion, or the submission that ended a time without requests.
    moved: u64,
    pub(super) stats: Stats,
    /// Requests completed since the beginning of the I/O phase.
    pub(super) total: u64,
}

impl Queue {
    /// Takes over a fresh ring.
    pub(super) fn new(
        mut queue: virtio::Queue,
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
        let block = block.max(512);
        let (meta, data) = (Dma::new(META * usize::from(depth))?, Dma::new(block * usize::from(depth))?);
        // SAFETY: the block has the size it takes and stays with the requests.
        let requests = unsafe {
            Requests::new(&mut queue.ring, meta.pointer(), data.address(0), block, depth, indirect)
        };
        Ok(Self { queue, requests, _meta: meta, data, block, moved: 0, stats: Stats::default(), total: 0 })
    }

    /// Keeps the gaps of at least `ticks`.
    pub(super) fn keep_gaps(&mut self, ticks: u64) {
        self.stats.gaps = Gaps::new(Some(ticks));
    }

    pub(super) fn ring_size(&self) -> u16 {
        self.queue.ring.size()
    }

    /// Requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.requests.in_flight()
    }

    /// The slot that the next [`submit`](Self::submit) will use, if one is free.
    pub(super) fn next_slot(&self) -> Option<u16> {
        self.requests.next_slot()
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
        for slot in 0..self.requests.depth() {
            f(self.data.bytes_mut(self.block * slot, self.block));
        }
    }

    /// Puts a request into [`next_slot`](Self::next_slot); the device sees it after [`kick`](Self::kick).
    pub(super) fn submit(&mut self, request: Request, now: u64) {
        if self.in_flight() == 0 {
            self.moved = now;
        }
        self.requests.submit(&mut self.queue.ring, request, now);
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
        self.requests.complete(&mut self.queue.ring)
    }

    /// The device's offences: heads it never got, or returned twice.
    pub(super) fn bogus(&self) -> u64 {
        self.requests.bogus
    }

    /// Counts a completed request.
    pub(super) fn count(&mut self, done: &Completion, now: u64) {
        self.total += 1;
        self.stats.ops += 1;
        self.stats.bytes += u64::from(done.request.len);
        self.stats.latency.record(now.saturating_sub(done.since));
        self.stats.gaps.add(now, now.saturating_sub(self.moved));
        self.moved = now;
    }

    /// Time without a completion, in ticks, while requests are in flight.
    pub(super) fn silence(&self, now: u64) -> u64 {
        if self.in_flight() == 0 { 0 } else { now.saturating_sub(self.moved) }
    }

    /// Gives a slot back.
    pub(super) fn release(&mut self, slot: u16) {
        self.requests.release(slot);
    }

    /// The I/O phase begins.
    pub(super) fn begin(&mut self) {
        self.clear();
        self.total = 0;
        self.queue.begin();
    }

    /// The warm-up is over: starts counting afresh, but for totals.
    pub(super) fn measure(&mut self) {
        self.clear();
        self.queue.measure();
    }

    fn clear(&mut self) {
        let mut gaps = core::mem::take(&mut self.stats.gaps);
        gaps.clear();
        self.stats = Stats { gaps, ..Stats::default() };
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
            .number("max_gap_us", micros(self.stats.gaps.longest()))
    }
}
