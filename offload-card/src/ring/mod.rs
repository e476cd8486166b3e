//! A started split virtqueue, device side (VirtIO 1.3 section 2.7).
//!
//! A [`Ring`] belongs to one thread. It takes requests with [`Ring::pop`], returns them in any order with
//! [`Ring::push`], and shows a batch of returned ones to the driver, with at most one interrupt, with [`Ring::publish`].
//! It needs no vhost-user: memory, addresses and two eventfds make one ([`Ring::new`]). With an inflight area the driver
//! sees chains in the order in which they are returned; without one in the order in which they were taken, because then
//! the used ring is all that a successor has to go by.
//!
//! Whatever the guest writes, a ring stays within its memory and its bounds. What cannot be understood breaks the ring:
//! [`Ring::pop`] answers an error once and nothing ever after, what is in flight can still be returned, the reason is in
//! [`QueueShared::broken`], and the front-end is told by the error eventfd. Other rings are not concerned.

mod chain;
mod counters;
mod error;
mod inflight;
mod layout;
mod order;
mod shared;
mod spans;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
};

pub use chain::{Chain, Segment};
pub use counters::{Counter, Histogram, Operation, QueueCounters};
pub use error::RingError;
pub use inflight::{InflightArea, InflightError, InflightQueue};
use layout::Layout;
use order::InOrder;
pub use shared::QueueShared;

use crate::event::Event;
use crate::memory::{MemoryTable, View};

/// Feature bits that rings bring, whatever the device.
pub const FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Largest ring (VirtIO 1.3 section 2.7).
pub const MAX_SIZE: u16 = 32768;

/// Longest chain through an indirect table. A driver must not make one longer than the queue (section 2.7.5.3.1), yet
/// some do with small queues, so the bound is no tighter than other devices'.
const MAX_INDIRECT: u16 = 1024;

/// How far a ring looks ahead ([`Ring::look_ahead`]), in chains: to descriptors; to the buffers or indirect tables that they name;
/// and to the first buffers that those tables name. A line that another processor has written takes about as long as two small
/// frames, and each is found by the one before. A disk's batches are of 4 requests: as long as nothing nearer than 4 chains was
/// fetched, and no table's first buffer, waiting for the header took 1 to 2 % of the CPU time of an O_DIRECT read.
const AHEAD: [u16; 3] = [8, 4, 2];

/// Where a ring's areas are, as guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table, aligned to 16.
    pub descriptors: u64,
    /// Available ring, aligned to 2.
    pub avail: u64,
    /// Used ring, aligned to 4.
    pub used: u64,
}

/// What makes a ring.
#[derive(Debug)]
pub struct RingConfig {
    /// Index of the queue in its device.
    pub index: u16,
    /// Entries, a power of two.
    pub size: u16,
    /// All features the driver acknowledged.
    pub features: u64,
    /// Where it is.
    pub addresses: RingAddresses,
    /// Where to begin in the available ring, if the used ring does not tell.
    pub base: u16,
    /// Signalled by the driver.
    pub kick: Event,
    /// The guest's memory.
    pub memory: MemoryTable,
    /// What outlives this ring.
    pub shared: Arc<QueueShared>,
    /// Where to record what is in flight. Without it chains are shown to the driver in the order in which they were taken:
    /// what is done early waits for what is slow.
    pub inflight: Option<InflightQueue>,
}

/// What is left of a ring that has been given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingState {
    /// Where the next start begins in the available ring.
    pub next_avail: u16,
}

/// Where a chain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Head {
    /// The driver's, or in the available ring.
    Free,
    /// Popped from the available ring.
    Taken,
    /// Taken by a predecessor of this process.
    Recovered,
    /// Returned, and waiting for those taken before it: see [`InOrder`].
    Held,
}

/// A started virtqueue.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    size: u16,
    features: u64,
    event_idx: bool,
    addresses: RingAddresses,
    layout: Layout,
    memory: MemoryTable,
    generation: u64,
    kick: Event,
    shared: Arc<QueueShared>,
    inflight: Option<InflightQueue>,
    /// If there is no inflight area.
    in_order: Option<InOrder>,
    /// Longest chain taken, in descriptors.
    chain_max: u16,
    /// What the next chains are made of is fetched early: by stage, the first position in the available ring not fetched yet.
    looked_ahead: Option<[u16; AHEAD.len()]>,
    /// The layout is of another memory than when [`Ring::memory_changed`] was asked last.
    moved: bool,
    /// Left from a predecessor, to be popped before anything new; oldest last.
    resubmit: Vec<u16>,
    /// Per head.
    heads: Vec<Head>,
    in_flight: u16,
    next_avail: u16,
    /// `avail.idx` as last read: entries up to here are known to be there.
    seen_avail: u16,
    next_used: u16,
    published: u16,
    broken: bool,
}

impl Ring {
    /// Starts a ring behind what the used ring says has been returned. What a predecessor had taken beyond that is taken
    /// again: by the inflight area, if there is one, in its old order; else because the ring simply goes back. So nothing
    /// depends on where the front-end believes the predecessor was, which after a crash it cannot know. Only if the used
    /// index cannot be right (a driver that set the ring up anew without clearing it), `base` is where it begins.
    pub fn new(config: RingConfig) -> Result<Self, RingError> {
        let RingConfig { index, size, features, addresses, base, kick, memory, shared, mut inflight } =
            config;
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(RingError::Size { size });
        }
        let generation = memory.generation();
        let layout = Layout::new(memory.view(), addresses, size)?;
        let used_idx = layout.used_idx();
        let used = if layout.avail_idx().wrapping_sub(used_idx) <= size { used_idx } else { base };
        let mut heads = vec![Head::Free; usize::from(size)];
        let mut resubmit = Vec::new();
        if let Some(area) = &mut inflight {
            resubmit = area.recover(used);
            let waiting = layout.avail_idx().wrapping_sub(used);
            if resubmit.len() > usize::from(waiting) || waiting > size {
                return Err(RingError::Inflight { count: resubmit.len() });
            }
            for &head in &resubmit {
                heads[usize::from(head)] = Head::Recovered;
            }
            resubmit.reverse();
        }
        let taken =
            u16::try_from(resubmit.len()).map_err(|_| RingError::Inflight { count: resubmit.len() })?;
        let next_avail = used.wrapping_add(taken);
        shared.counters.in_flight.set(u64::from(taken));
        let in_order = inflight.is_none().then(|| InOrder::new(size));
        Ok(Self {
            index,
            size,
            features,
            event_idx: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            addresses,
            layout,
            memory,
            generation,
            kick,
            shared,
            inflight,
            in_order,
            chain_max: size.max(MAX_INDIRECT),
            looked_ahead: None,
            moved: false,
            resubmit,
            heads,
            in_flight: taken,
            next_avail,
            seen_avail: next_avail,
            next_used: used,
            published: used,
            broken: false,
        })
    }

    /// Index of the queue in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// All features the driver acknowledged.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The driver's kicks. Wait for it edge-triggered ([`crate::poll::Poller::add_edge`]), then nobody needs to read it.
    pub fn kick(&self) -> &Event {
        &self.kick
    }

    /// Counters of the queue.
    pub fn counters(&self) -> &QueueCounters {
        &self.shared.counters
    }

    /// What the outside sees of the queue, also when the ring is gone.
    pub fn shared(&self) -> &Arc<QueueShared> {
        &self.shared
    }

    /// Chains a predecessor left in flight that are still to be popped. They should be popped even by an engine that has
    /// been told to stop.
    pub fn recovered(&self) -> usize {
        if self.broken { 0 } else { self.resubmit.len() }
    }

    /// Chains popped and not yet returned to the driver, including those a predecessor left that are still to be popped.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// What [`Ring::set_note`] said last, also in a predecessor of this process; 0 if nothing was.
    pub fn note(&self) -> u64 {
        self.inflight.as_ref().map_or(0, InflightQueue::note)
    }

    /// Has a number kept where what is in flight is recorded: it outlives this process, and not the driver's use of the
    /// ring. For the little that a driver has told an engine by requests. Without an inflight area it is lost.
    pub fn set_note(&self, note: u64) {
        if let Some(area) = &self.inflight {
            area.set_note(note);
        }
    }

    /// The ring is broken: it pops nothing any more.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Breaks the ring, for a request that cannot be answered.
    pub fn fail(&mut self, error: &RingError) {
        if !self.broken {
            self.broken = true;
            self.shared.set_broken(format!("queue {}: {error}", self.index));
        }
    }

    /// From now on a chain of more than `descriptors` breaks the ring: for an engine that cannot use longer ones, and has
    /// better to do than to look at them.
    pub fn limit_chains(&mut self, descriptors: u16) {
        self.chain_max = descriptors;
    }

    /// From now on the processor is told to fetch what the next chains are made of, and where their buffers begin, before that is
    /// needed: for an engine that reads those itself.
    pub fn look_ahead(&mut self) {
        self.looked_ahead = Some([self.next_avail; AHEAD.len()]);
    }

    /// True if the guest's memory has changed since this was asked last. What the front-end removed is unmapped when
    /// nobody keeps it: so an engine asks whenever it wakes up, and then clears the chains that it keeps and that are not
    /// in flight ([`Chain::clear`]). Whoever changes the memory wakes it, by a kick.
    pub fn memory_changed(&mut self) -> bool {
        if !self.broken
            && let Err(e) = self.follow_memory()
        {
            self.fail(&e);
        }
        std::mem::take(&mut self.moved)
    }

    /// The guest's memory as the ring sees it now.
    pub fn memory(&self) -> &Arc<View> {
        self.layout.memory()
    }

    /// `chain` keeps no memory but what the ring is in now. One that does is to be cleared when it has been pushed.
    pub fn is_current(&self, chain: &Chain) -> bool {
        chain.is_clear() || chain.is_in(self.layout.memory())
    }

    #[inline]
    fn follow_memory(&mut self) -> Result<(), RingError> {
        if self.memory.generation() == self.generation { Ok(()) } else { self.lay_out_anew() }
    }

    #[cold]
    fn lay_out_anew(&mut self) -> Result<(), RingError> {
        self.generation = self.memory.generation();
        self.layout = Layout::new(self.memory.view(), self.addresses, self.size)?;
        self.moved = true;
        Ok(())
    }

    /// Takes the next chain into `chain`; false if none waits or the ring is broken.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if self.broken {
            return Ok(false);
        }
        let popped = self.try_pop(chain);
        if let Err(e) = &popped {
            self.fail(e);
        }
        popped
    }

    fn try_pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        self.follow_memory()?;
        if let Some(&head) = self.resubmit.last() {
            self.walk(head, chain)?;
            self.resubmit.pop();
            self.shared.counters.resubmitted.add(1);
            self.shared.counters.requests.add(1);
            return Ok(true);
        }
        if self.next_avail == self.seen_avail && self.refresh()? == 0 {
            return Ok(false);
        }
        self.fetch_ahead();
        let head = self.layout.avail_head(self.next_avail);
        match self.heads.get(usize::from(head)) {
            None => return Err(RingError::Index { head, index: head }),
            Some(Head::Free) => {}
            Some(_) => return Err(RingError::InFlight { head }),
        }
        self.walk(head, chain)?;
        if let Some(area) = &mut self.inflight {
            area.take(head);
        }
        if let Some(order) = &mut self.in_order {
            order.taken(self.next_avail, head);
        }
        self.heads[usize::from(head)] = Head::Taken;
        self.in_flight += 1;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.shared.counters.requests.add(1);
        self.shared.counters.in_flight.set(u64::from(self.in_flight));
        Ok(true)
    }

    /// Nothing that is found here counts: the guest may change it until it is popped.
    fn fetch_ahead(&mut self) {
        let Some(stages) = &mut self.looked_ahead else { return };
        let known = self.seen_avail.wrapping_sub(self.next_avail);
        for (stage, (at, depth)) in stages.iter_mut().zip(AHEAD).enumerate() {
            // What has been popped since is fetched no more, and after `unpop` some already is that is far ahead.
            let mut ahead = at.wrapping_sub(self.next_avail);
            if ahead > self.size {
                ahead = 0;
            }
            while ahead < known.min(depth) {
                let head = self.layout.avail_head(self.next_avail.wrapping_add(ahead));
                match stage {
                    0 => self.layout.prefetch_descriptor(head),
                    1 => self.layout.prefetch_buffer(head),
                    _ => self.layout.prefetch_indirect_buffer(head),
                }
                ahead += 1;
            }
            *at = self.next_avail.wrapping_add(ahead);
        }
    }

    /// Reads `avail.idx` anew; chains waiting.
    fn refresh(&mut self) -> Result<u16, RingError> {
        let idx = self.layout.avail_idx();
        let count = idx.wrapping_sub(self.next_avail);
        if count > self.size {
            return Err(RingError::AvailIndex { count, size: self.size });
        }
        self.seen_avail = idx;
        Ok(count)
    }

    /// Puts back the chains popped last, given newest first: as if never popped. They are popped again in the same
    /// order. For an engine that finds it cannot use what it has taken.
    pub fn unpop(&mut self, heads: &[u16]) {
        for &head in heads {
            match self.heads.get_mut(usize::from(head)) {
                Some(Head::Recovered) => self.resubmit.push(head),
                Some(state @ Head::Taken) => {
                    *state = Head::Free;
                    if let Some(area) = &mut self.inflight {
                        area.untake(head);
                    }
                    self.next_avail = self.next_avail.wrapping_sub(1);
                    self.in_flight -= 1;
                }
                Some(Head::Free | Head::Held) | None => continue,
            }
            let requests = &self.shared.counters.requests;
            requests.set(requests.get().wrapping_sub(1));
        }
        self.shared.counters.in_flight.set(u64::from(self.in_flight));
    }

    /// Copies the descriptors of the chain that begins at `head`, checking each.
    fn walk(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.begin(head, self.layout.memory());
        let mut index = head;
        for _ in 0..self.size.min(self.chain_max) {
            let descriptor = self.layout.descriptor(index).ok_or(RingError::Index { head, index })?;
            let flags = u32::from(descriptor.flags());
            if flags & VRING_DESC_F_INDIRECT != 0 {
                let (address, length) = (descriptor.addr().0, descriptor.len());
                if flags & VRING_DESC_F_NEXT != 0 || self.features & 1 << VIRTIO_RING_F_INDIRECT_DESC == 0 {
                    return Err(RingError::Indirect { head, address, length });
                }
                return self.walk_indirect(head, address, length, chain);
            }
            let writable = flags & VRING_DESC_F_WRITE != 0;
            chain.add(descriptor.addr().0, descriptor.len(), writable, self.layout.spans())?;
            if flags & VRING_DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next();
        }
        Err(RingError::Loop { head })
    }

    /// Copies the descriptors of an indirect table (VirtIO 1.3 section 2.7.5.3).
    fn walk_indirect(
        &mut self,
        head: u16,
        address: u64,
        length: u32,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        let invalid = || RingError::Indirect { head, address, length };
        let entries = length / 16;
        if !length.is_multiple_of(16) || entries == 0 || entries > u32::from(u16::MAX) + 1 {
            return Err(invalid());
        }
        let mut index = 0;
        for _ in 0..entries.min(u32::from(self.chain_max.min(MAX_INDIRECT))) {
            if u32::from(index) >= entries {
                return Err(RingError::Index { head, index });
            }
            let at = address.checked_add(16 * u64::from(index)).ok_or_else(invalid)?;
            let descriptor = self.layout.indirect(at).ok_or_else(invalid)?;
            let flags = u32::from(descriptor.flags());
            if flags & VRING_DESC_F_INDIRECT != 0 {
                return Err(invalid());
            }
            let writable = flags & VRING_DESC_F_WRITE != 0;
            chain.add(descriptor.addr().0, descriptor.len(), writable, self.layout.spans())?;
            if flags & VRING_DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next();
        }
        Err(RingError::Loop { head })
    }

    /// Returns the chain `head`, into which `written` bytes were written. The driver sees it after
    /// [`Ring::publish`], and after what it is held back for ([`RingConfig::inflight`]). A head that is not in flight is
    /// ignored.
    pub fn push(&mut self, head: u16, written: u32) {
        let out = |state: &&mut Head| matches!(state, Head::Taken | Head::Recovered);
        let Some(state) = self.heads.get_mut(usize::from(head)).filter(out) else {
            debug_assert!(false, "chain {head} returned twice");
            return;
        };
        if let Some(order) = &mut self.in_order {
            *state = Head::Held;
            order.done(head, written);
            self.release();
            return;
        }
        *state = Head::Free;
        self.in_flight -= 1;
        if let Some(area) = &mut self.inflight {
            area.link(head);
        }
        self.layout.set_used(self.next_used, head, written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Returns held chains for which none is waited any more.
    fn release(&mut self) {
        let Some(order) = &self.in_order else { return };
        while self.next_used != self.next_avail {
            let (head, written) = order.at(self.next_used);
            let Some(state @ Head::Held) = self.heads.get_mut(usize::from(head)) else { return };
            *state = Head::Free;
            self.in_flight -= 1;
            self.layout.set_used(self.next_used, head, written);
            self.next_used = self.next_used.wrapping_add(1);
        }
    }

    /// Shows everything pushed to the driver, and interrupts it if it wants to be.
    pub fn publish(&mut self) {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return;
        }
        self.layout.set_used_idx(new);
        if let Some(area) = &mut self.inflight {
            area.published(new.wrapping_sub(old), new);
        }
        self.shared.counters.batch(new.wrapping_sub(old));
        self.published = new;
        self.shared.counters.in_flight.set(u64::from(self.in_flight));
        // The driver writes what it wants and then looks at the index; we write the index and then look.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            // Section 2.7.7.2: the entry named by used_event is among those published now.
            new.wrapping_sub(self.layout.used_event()).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            !self.layout.no_interrupt()
        };
        if wanted {
            self.shared.call();
        }
    }

    /// Chains that can be popped now; at least, if the driver is adding more.
    pub fn available(&mut self) -> Result<u16, RingError> {
        if self.broken {
            return Ok(0);
        }
        let left = self.resubmit.len() as u16;
        self.refresh().map(|n| n.saturating_add(left)).inspect_err(|e| self.fail(&e.clone()))
    }

    /// Asks the driver for kicks again, before the thread sleeps. True if chains wait already: then do not sleep.
    pub fn enable_kicks(&mut self) -> bool {
        self.enable_kicks_beyond(0)
    }

    /// As [`Ring::enable_kicks`], for an engine that needs more chains at once than the `waiting` there are (as counted
    /// by [`Ring::available`]): the driver is to kick when it adds one. True if more wait already.
    pub fn enable_kicks_beyond(&mut self, waiting: u16) -> bool {
        if self.broken {
            return false;
        }
        // A ring has at most 32768 entries.
        let left = self.resubmit.len() as u16;
        let known = waiting.saturating_sub(left);
        if self.event_idx {
            self.layout.set_avail_event(self.next_avail.wrapping_add(known));
        } else {
            self.layout.set_no_notify(false);
        }
        // As in `publish`, with the roles changed.
        fence(Ordering::SeqCst);
        left > waiting || self.layout.avail_idx() != self.next_avail.wrapping_add(known)
    }

    /// Asks the driver for no kicks: the thread is looking anyway. A hint; kicks may still come.
    pub fn disable_kicks(&mut self) {
        if self.event_idx {
            // The driver kicks when it passes avail_event. It has passed this one, and what is popped leaves it behind.
            self.layout.set_avail_event(self.next_avail.wrapping_sub(1));
        } else {
            self.layout.set_no_notify(true);
        }
    }

    /// Ends the ring. What is popped and not pushed stays recorded as in flight, if there is an inflight area.
    pub fn stop(mut self) -> RingState {
        self.publish();
        if let Some(area) = self.inflight.as_mut().filter(|_| self.broken) {
            // The driver has to reset the device: nothing of this may be done again after that.
            area.forget();
        }
        if !self.event_idx && !self.broken {
            self.layout.set_no_notify(false);
        }
        RingState { next_avail: self.published.wrapping_add(self.in_flight) }
    }
}
