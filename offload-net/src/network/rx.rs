//! A device's receive queue: frames go into the buffers that the guest has put there. Without buffers they wait for a
//! moment, within bounds, or are dropped.

#![cfg_attr(
    not(test),
    expect(
        clippy::indexing_slicing,
        reason = "`held` counts chains that are there, and nobody else sets it"
    )
)]

use offload_card::event::Event;
use offload_card::ring::{Chain, Ring, RingError, RingState};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};
use vm_memory::VolatileSlice;

use super::backlog::Backlog;
use crate::frame::header::{LEN, VnetHeader};
use crate::frame::offload::{Gso, TcpKind};
use crate::frame::segment::{HeadBuf, Segments, complete_csum};
use crate::frame::{Frame, HEAD_MAX};

/// Most buffers one frame is spread over: enough for a super-frame in buffers of 256 bytes. A guest that offers smaller
/// ones would have the thread of its whole network collect crumbs.
const BUFFERS_MAX: usize = 256;
/// Longest chain we take as a buffer. Drivers use about 20 descriptors for what is not mergeable, else one.
const DESCRIPTORS_MAX: u16 = 64;
/// Most pieces of memory one frame is spread over, in all its buffers.
const PIECES_MAX: usize = 2 * BUFFERS_MAX;

/// Whether there is room for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    /// It has been delivered.
    Now,
    /// When the guest adds buffers.
    Later,
    /// This guest's buffers are too small, or its ring is broken.
    Never,
}

/// A started receive queue.
pub struct RxQueue {
    ring: Ring,
    mergeable: bool,
    csum: bool,
    tso4: bool,
    tso6: bool,
    /// Buffers; kept, so that nothing is allocated per frame.
    chains: Vec<Chain>,
    /// How many of `chains`, from the first on and at most all, are popped and not filled: those a frame found too few wait for the next,
    /// so that no buffer is looked at twice.
    held: usize,
    /// Bytes in them.
    room: usize,
    /// Pieces of memory in them.
    pieces: usize,
    /// Frames that wait for buffers.
    backlog: Backlog,
    /// Buffers have come since the backlog was looked at, without a kick.
    look_again: bool,
    /// Something has been pushed since the last [`RxQueue::settle`].
    dirty: bool,
}

impl RxQueue {
    /// Takes over a ring with the features its driver negotiated.
    pub fn new(mut ring: Ring) -> Self {
        let has = |bit: u32| ring.features() & 1 << bit != 0;
        let mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
        let csum = has(VIRTIO_NET_F_GUEST_CSUM);
        let (tso4, tso6) = (csum && has(VIRTIO_NET_F_GUEST_TSO4), csum && has(VIRTIO_NET_F_GUEST_TSO6));
        // A guest that puts new buffers there need not say so: we look when a frame comes.
        ring.disable_kicks();
        ring.limit_chains(DESCRIPTORS_MAX);
        Self {
            ring,
            mergeable,
            csum,
            tso4,
            tso6,
            chains: Vec::new(),
            held: 0,
            room: 0,
            pieces: 0,
            backlog: Backlog::default(),
            look_again: false,
            dirty: false,
        }
    }

    /// Gives a frame to the guest, after doing whatever the sender left to do and this guest does not do itself. What
    /// there is no room for waits in the backlog; what finds no room there is dropped and counted. True: it waits now, as does all
    /// that waited before.
    pub fn deliver(&mut self, frame: &Frame<'_>) -> bool {
        let waited = self.backlog.len();
        if !self.backlog.is_empty() {
            self.flush();
        }
        match frame.offloads.gso {
            Some(gso) if !self.takes(gso) => {
                let mut segments = Segments::new(*frame, gso);
                let mut head: HeadBuf = [0; HEAD_MAX];
                while let Some(segment) = segments.next(&mut head) {
                    self.deliver_or_keep(&segment);
                }
            }
            _ => self.deliver_or_keep(frame),
        }
        self.backlog.len() > waited
    }

    /// The driver does not use this queue any more: what waits for buffers is dropped, and what has been delivered is shown.
    pub fn retire(&mut self) {
        self.settle();
        let waiting = std::mem::take(&mut self.backlog).len();
        self.ring.counters().dropped.add(waiting as u64);
        self.ring.disable_kicks();
    }

    /// Counts a frame that the device's limits do not admit.
    pub fn refuse(&mut self) {
        self.ring.counters().dropped.add(1);
    }

    fn deliver_or_keep(&mut self, frame: &Frame<'_>) {
        let waits = !self.backlog.is_empty();
        let room = if waits { Room::Later } else { self.deliver_one(frame) };
        match room {
            Room::Now => {}
            Room::Later if self.backlog.push(frame) => {
                self.ring.counters().copied.add(frame.bytes() as u64);
                if !waits {
                    self.await_buffers();
                }
            }
            Room::Later | Room::Never => self.ring.counters().dropped.add(1),
        }
    }

    /// Delivers what waits in the backlog as far as there are buffers.
    pub fn flush(&mut self) {
        let mut backlog = std::mem::take(&mut self.backlog);
        loop {
            let mut room = Room::Now;
            let oldest = backlog.with_oldest(|frame| {
                room = self.deliver_one(frame);
                !matches!(room, Room::Later)
            });
            match (oldest, room) {
                (None, _) => break,
                (_, Room::Now) => {}
                (_, Room::Never) => self.ring.counters().dropped.add(1),
                (_, Room::Later) => {
                    let expired = backlog.expire();
                    self.ring.counters().dropped.add(expired);
                    if expired == 0 {
                        break;
                    }
                }
            }
        }
        self.backlog = backlog;
        if self.backlog.is_empty() {
            self.ring.disable_kicks();
        } else {
            self.await_buffers();
        }
    }

    /// The guest is to kick when it adds buffers.
    fn await_buffers(&mut self) {
        if let Ok(waiting) = self.ring.available()
            && self.ring.enable_kicks_beyond(waiting)
        {
            self.look_again = true;
        }
    }

    /// The driver's kicks.
    pub fn kick(&self) -> &Event {
        self.ring.kick()
    }

    /// A kick has come.
    pub fn kicked(&mut self) {
        self.ring.counters().kicks.add(1);
        if self.ring.memory_changed() {
            // They would keep what was removed; those that are still there come again.
            self.put_back();
            self.chains.iter_mut().for_each(Chain::clear);
        }
        if !self.backlog.is_empty() {
            self.flush();
        }
    }

    /// Breaks the ring, with a reason.
    pub fn fail(&mut self, why: String) {
        self.ring.fail(&RingError::Request(why));
    }

    fn takes(&self, gso: Gso) -> bool {
        match gso.kind {
            TcpKind::V4 => self.tso4,
            TcpKind::V6 => self.tso6,
        }
    }

    fn deliver_one(&mut self, frame: &Frame<'_>) -> Room {
        let need = LEN + frame.bytes();
        let buffers = match self.gather(need) {
            Ok(buffers) => buffers,
            Err(room) => return room,
        };
        let mut head: HeadBuf;
        let mut frame = *frame;
        if !self.csum {
            if frame.offloads.csum.is_some() {
                head = [0; HEAD_MAX];
                frame = complete_csum(frame, &mut head);
            }
            frame.offloads.verified = false;
        }
        // At most BUFFERS_MAX.
        let header = VnetHeader { num_buffers: buffers as u16, ..VnetHeader::of(&frame.offloads) }.to_bytes();
        let chains = &self.chains[..buffers];
        {
            let mut to = Scatter::new(chains.iter().flat_map(Chain::writable_slices));
            to.put_bytes(&header);
            to.put_bytes(frame.head);
            frame.tail.for_each(frame.tail_bytes, |part| to.put(part));
        }
        let mut left = need;
        for chain in chains {
            let n = left.min(chain.writable_len() as usize);
            // A frame's length fits.
            self.ring.push(chain.head(), n as u32);
            left -= n;
        }
        self.let_go(buffers);
        let counters = self.ring.counters();
        counters.bytes_in.add(frame.bytes() as u64);
        counters.copied.add(frame.bytes() as u64);
        self.dirty = true;
        Room::Now
    }

    /// Sees to it that buffers for `need` bytes are held, and answers how many of those held it takes. If there are too
    /// few, they stay held. If this guest's buffers are too small altogether, those held are given back empty: the guest
    /// pays for new ones, and we do not look at the old ones again.
    fn gather(&mut self, need: usize) -> Result<usize, Room> {
        let most = if self.mergeable { BUFFERS_MAX } else { 1 };
        while self.room < need {
            if self.held >= most || self.pieces > PIECES_MAX {
                self.give_back_empty();
                return Err(Room::Never);
            }
            if self.held == self.chains.len() {
                self.chains.push(Chain::new());
            }
            let chain = &mut self.chains[self.held];
            match self.ring.pop(chain) {
                Ok(true) => {}
                Ok(false) => return Err(if self.ring.is_broken() { Room::Never } else { Room::Later }),
                Err(e) => {
                    self.ring.shared().log.say(|left_out| {
                        tracing::warn!(queue = self.ring.index(), "receive queue broken: {e}{left_out}");
                    });
                    return Err(Room::Never);
                }
            }
            self.held += 1;
            self.room = self.room.saturating_add(chain.writable_len() as usize);
            self.pieces += chain.writable().len();
            if chain.writable().is_empty() || usize::from(chain.descriptors()) > chain.writable().len() {
                self.fail("a receive buffer with a descriptor that cannot be written".to_owned());
                return Err(Room::Never);
            }
        }
        let mut room = 0;
        for (n, chain) in self.chains[..self.held].iter().enumerate() {
            room += chain.writable_len() as usize;
            if room >= need {
                return Ok(n + 1);
            }
        }
        Ok(self.held)
    }

    /// The first `n` held buffers have been returned.
    fn let_go(&mut self, n: usize) {
        for chain in &self.chains[..n] {
            self.room = self.room.saturating_sub(chain.writable_len() as usize);
            self.pieces -= chain.writable().len();
        }
        if n < self.held {
            self.chains[..self.held].rotate_left(n);
        }
        self.held -= n;
    }

    /// Returns all held buffers with nothing in them.
    fn give_back_empty(&mut self) {
        for chain in &self.chains[..self.held] {
            self.ring.push(chain.head(), 0);
        }
        self.let_go(self.held);
        self.dirty = true;
    }

    /// Puts all held buffers back, as if never popped.
    fn put_back(&mut self) {
        let newest_first: Vec<_> = self.chains[..self.held].iter().rev().map(Chain::head).collect();
        self.ring.unpop(&newest_first);
        (self.held, self.room, self.pieces) = (0, 0, 0);
    }

    /// [`RxQueue::settle`] is to be called.
    pub fn needs_attention(&self) -> bool {
        self.dirty || self.look_again
    }

    /// The end of a turn: shows the guest what has been delivered.
    pub fn settle(&mut self) {
        // Each round delivers something, or ends.
        while std::mem::take(&mut self.look_again) {
            self.flush();
        }
        if std::mem::take(&mut self.dirty) {
            self.ring.publish();
        }
    }

    /// Gives the ring back.
    pub fn stop(mut self) -> RingState {
        self.settle();
        self.put_back();
        self.ring.counters().dropped.add(self.backlog.len() as u64);
        self.ring.stop()
    }
}

/// Writes one thing after another into pieces of guest memory. What does not fit is left out: callers see to it that
/// all does.
struct Scatter<'a, I> {
    pieces: I,
    current: Option<VolatileSlice<'a>>,
}

impl<'a, I: Iterator<Item = VolatileSlice<'a>>> Scatter<'a, I> {
    fn new(mut pieces: I) -> Self {
        let current = pieces.next();
        Self { pieces, current }
    }

    fn put_bytes(&mut self, mut bytes: &[u8]) {
        while let Some(to) = self.current.filter(|_| !bytes.is_empty()) {
            let (now, rest) = bytes.split_at(to.len().min(bytes.len()));
            to.copy_from(now);
            self.advance(to, now.len());
            bytes = rest;
        }
    }

    fn put(&mut self, mut from: VolatileSlice<'_>) {
        while let Some(to) = self.current.filter(|_| !from.is_empty()) {
            let n = to.len().min(from.len());
            from.copy_to_volatile_slice(to);
            self.advance(to, n);
            match from.offset(n) {
                Ok(rest) => from = rest,
                Err(_) => return,
            }
        }
    }

    fn advance(&mut self, current: VolatileSlice<'a>, by: usize) {
        self.current = current.offset(by).ok().filter(|rest| !rest.is_empty()).or_else(|| self.pieces.next());
    }
}
