//! The connections of one interface: found by name, forgotten in time, never more than there is room for.
//!
//! What must outlive the process is in [`Slots`]; what finds it and orders it is made of that when the table is opened:
//!
//! ```text
//!   index    hash of a name ──► slot       open addressing, half full at most
//!   queues   one per state: slots in the order in which they are forgotten. All connections of a state live
//!            equally long after their last packet, so the newest is the last, and only the first must be looked at
//! ```
//!
//! So what is over is found at once, whenever room is needed, and no sweep ever stops the network's thread. All memory is
//! taken when the table is made.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use super::flow::{Direction, Key};
use super::slots::{Kept, Slots};
use super::tcp::{STATES, State};

/// No slot.
const NONE: u32 = u32::MAX;
/// A connection is written anew only when it is to live so much longer: most packets change nothing.
const GRAIN_MS: u64 = 1000;
/// How long a connection that the rules do not allow any more keeps its room. It carries nothing; but rules that come back
/// within this time, as those about a group do when a restarted card has found all its devices, find it as it was.
const REVOKED_MS: u64 = 60_000;
/// The queue of these; the others have their state's number.
const REVOKED: u8 = 0;
/// Queues.
const QUEUES: usize = STATES.len() + 1;
/// Connections that are looked at for being over, when a new one comes.
const REAP: usize = 4;

/// There is no room for one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// A connection in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(u32);

/// A connection as it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Where it is.
    pub slot: Slot,
    /// The direction of the packet that opened it.
    pub origin: Direction,
    /// How far it is.
    pub state: State,
    /// The rules by which it was allowed last; 0: none of this process.
    pub epoch: u64,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
    queue: u8,
    out: bool,
}

#[derive(Debug, Clone, Copy)]
struct Queue {
    first: u32,
    last: u32,
}

/// The table.
#[derive(Debug)]
pub struct Table {
    slots: Slots,
    /// The upper half a name's hash, the lower its slot + 1; 0: free.
    index: Box<[u64]>,
    links: Box<[Link]>,
    epochs: Box<[u64]>,
    queues: [Queue; QUEUES],
    /// The first free slot; the others follow in their links.
    free: u32,
    len: usize,
    hasher: RandomState,
}

impl Table {
    /// Takes up the connections in `slots`. True: there was something that cannot have been written there, and all of it
    /// has been thrown away.
    pub fn new(slots: Slots, now: u64) -> (Self, bool) {
        let count = slots.count();
        let none = Link { previous: NONE, next: NONE, queue: REVOKED, out: false };
        let mut table = Self {
            index: vec![0; (2 * count).next_power_of_two()].into(),
            links: vec![none; count].into(),
            epochs: vec![0; count].into(),
            queues: [Queue { first: NONE, last: NONE }; QUEUES],
            free: NONE,
            len: 0,
            hasher: RandomState::new(),
            slots,
        };
        let damaged = !table.take_up(now);
        if damaged {
            table.index.fill(0);
            table.links.fill(none);
            table.queues = [Queue { first: NONE, last: NONE }; QUEUES];
            table.len = 0;
            (0..count).for_each(|i| table.slots.clear(i));
        }
        table.free = NONE;
        for i in (0..count as u32).rev() {
            if !table.slots.is_used(i as usize) {
                table.link_mut(i).next = table.free;
                table.free = i;
            }
        }
        (table, damaged)
    }

    /// False: something in the slots makes no sense.
    fn take_up(&mut self, now: u64) -> bool {
        let mut all = Vec::new();
        for i in 0..self.slots.count() {
            if !self.slots.is_used(i) {
                continue;
            }
            let Some(kept) = self.slots.get(i) else { return false };
            // A step of the clock's coarse reading apart, nothing lives longer than this.
            if kept.expires > now + kept.state.timeout_ms() + GRAIN_MS {
                return false;
            }
            all.push((kept.expires, i as u32, kept));
        }
        all.sort_unstable_by_key(|(expires, i, _)| (*expires, *i));
        for (_, i, kept) in all {
            let hash = self.hash(&kept.key);
            if self.position(&kept.key, hash).is_some() {
                return false;
            }
            self.index_insert(hash, i);
            self.link_mut(i).out = kept.origin == Direction::Out;
            self.append(i, kept.state as u8);
            self.len += 1;
        }
        true
    }

    /// Connections in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Finds a connection.
    pub fn find(&mut self, key: &Key, now: u64) -> Option<Found> {
        let position = self.position(key, self.hash(key))?;
        let i = self.slot_at(position)?;
        let (state, expires) = self.slots.status(i as usize)?;
        if expires <= now {
            self.remove(Slot(i));
            return None;
        }
        let origin = if self.links.get(i as usize)?.out { Direction::Out } else { Direction::In };
        let epoch = self.epochs.get(i as usize).copied()?;
        Some(Found { slot: Slot(i), origin, state, epoch })
    }

    /// Adds a connection that is not in it.
    ///
    /// # Errors
    /// There is no room, and nothing in it is over.
    pub fn insert(
        &mut self,
        key: &Key,
        origin: Direction,
        state: State,
        epoch: u64,
        now: u64,
    ) -> Result<(), Full> {
        self.reap(now);
        let i = self.free;
        let Some(link) = self.links.get_mut(i as usize) else { return Err(Full) };
        self.free = link.next;
        link.out = origin == Direction::Out;
        if let Some(e) = self.epochs.get_mut(i as usize) {
            *e = epoch;
        }
        let expires = now + state.timeout_ms();
        self.slots.put(i as usize, &Kept { key: *key, origin, state, expires });
        self.index_insert(self.hash(key), i);
        self.append(i, state as u8);
        self.len += 1;
        Ok(())
    }

    /// A packet of a connection has passed, after which its state is this one.
    pub fn touch(&mut self, slot: Slot, state: State, now: u64) {
        let i = slot.0;
        let (Some((was, expires)), Some(link)) =
            (self.slots.status(i as usize), self.links.get(i as usize).copied())
        else {
            return;
        };
        let until = now + state.timeout_ms();
        if was == state && link.queue == state as u8 && until < expires + GRAIN_MS {
            return;
        }
        self.slots.set_status(i as usize, state, until);
        self.unlink(i);
        self.append(i, state as u8);
    }

    /// The rules of `epoch` allow a connection.
    pub fn allow(&mut self, slot: Slot, epoch: u64) {
        if let Some(e) = self.epochs.get_mut(slot.0 as usize) {
            *e = epoch;
        }
    }

    /// The rules do not allow it any more: it is forgotten soon.
    pub fn revoke(&mut self, slot: Slot, now: u64) {
        let i = slot.0;
        let (Some((state, expires)), Some(link)) =
            (self.slots.status(i as usize), self.links.get(i as usize).copied())
        else {
            return;
        };
        if link.queue != REVOKED {
            // Not sooner than those that are in the queue already: `now` does not go back.
            let until = expires.min(now + REVOKED_MS);
            if until == now + REVOKED_MS {
                self.slots.set_status(i as usize, state, until);
                self.unlink(i);
                self.append(i, REVOKED);
            }
        }
    }

    /// Forgets a connection.
    pub fn remove(&mut self, slot: Slot) {
        let i = slot.0;
        let Some(kept) = self.slots.get(i as usize) else { return };
        if let Some(position) = self.position(&kept.key, self.hash(&kept.key)) {
            self.index_remove(position);
        }
        self.unlink(i);
        self.slots.clear(i as usize);
        let free = self.free;
        self.link_mut(i).next = free;
        self.free = i;
        self.len = self.len.saturating_sub(1);
    }

    /// Forgets what is over, a little at a time: a queue's first for every new connection, so that what there is room for
    /// is looked after as quickly as it fills; without room, all that is needed.
    fn reap(&mut self, now: u64) {
        let mut left = REAP;
        for queue in 0..QUEUES {
            while left > 0 {
                let Some(first) = self.queues.get(queue).map(|q| q.first).filter(|f| *f != NONE) else {
                    break;
                };
                match self.slots.status(first as usize) {
                    Some((_, expires)) if expires <= now => self.remove(Slot(first)),
                    _ => break,
                }
                left -= 1;
            }
        }
    }

    /// Of few words: it is most of what a packet of a known connection costs.
    fn hash(&self, key: &Key) -> u32 {
        let mut hasher = self.hasher.build_hasher();
        let ports = u64::from(key.local_port) << 16 | u64::from(key.peer_port);
        hasher.write_u64(u64::from(key.v6) << 40 | u64::from(key.protocol) << 32 | ports);
        if key.v6 {
            hasher.write_u128(key.local);
            hasher.write_u128(key.peer);
        } else {
            // Addresses of 32 bits. If the file has others, they are found all the same.
            hasher.write_u64((key.local as u64) << 32 | key.peer as u64 & 0xffff_ffff);
        }
        (hasher.finish() >> 32) as u32
    }

    fn mask(&self) -> usize {
        self.index.len() - 1
    }

    fn cell(&self, position: usize) -> u64 {
        self.index.get(position).copied().unwrap_or(0)
    }

    fn slot_at(&self, position: usize) -> Option<u32> {
        (self.cell(position) as u32).checked_sub(1)
    }

    /// Where in the index a name is.
    fn position(&self, key: &Key, hash: u32) -> Option<usize> {
        let mut position = hash as usize & self.mask();
        // At most half of the cells are used, so there is a free one.
        loop {
            let cell = self.cell(position);
            if cell == 0 {
                return None;
            }
            if (cell >> 32) as u32 == hash
                && let Some(slot) = (cell as u32).checked_sub(1)
                && self.slots.get(slot as usize).is_some_and(|kept| kept.key == *key)
            {
                return Some(position);
            }
            position = (position + 1) & self.mask();
        }
    }

    fn index_insert(&mut self, hash: u32, slot: u32) {
        let mut position = hash as usize & self.mask();
        while self.cell(position) != 0 {
            position = (position + 1) & self.mask();
        }
        if let Some(cell) = self.index.get_mut(position) {
            *cell = u64::from(hash) << 32 | u64::from(slot + 1);
        }
    }

    /// Takes a cell out, and moves up those behind it that would not be found any more.
    fn index_remove(&mut self, position: usize) {
        let mask = self.mask();
        let mut hole = position;
        let mut at = position;
        loop {
            at = (at + 1) & mask;
            let cell = self.cell(at);
            if cell == 0 {
                break;
            }
            let home = (cell >> 32) as usize & mask;
            // It may go into the hole unless its home is behind it.
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(hole) & mask {
                if let Some(to) = self.index.get_mut(hole) {
                    *to = cell;
                }
                hole = at;
            }
        }
        if let Some(cell) = self.index.get_mut(hole) {
            *cell = 0;
        }
    }

    #[cfg_attr(
        not(test),
        expect(clippy::indexing_slicing, reason = "callers have a slot of this table, so it has one")
    )]
    fn link_mut(&mut self, i: u32) -> &mut Link {
        // The last is there for what cannot be.
        let last = self.links.len() - 1;
        &mut self.links[(i as usize).min(last)]
    }

    fn append(&mut self, i: u32, queue: u8) {
        let Some(last) = self.queues.get(usize::from(queue)).map(|q| q.last) else { return };
        let link = self.link_mut(i);
        (link.previous, link.next, link.queue) = (last, NONE, queue);
        if last != NONE {
            self.link_mut(last).next = i;
        }
        if let Some(q) = self.queues.get_mut(usize::from(queue)) {
            q.last = i;
            if last == NONE {
                q.first = i;
            }
        }
    }

    fn unlink(&mut self, i: u32) {
        let Link { previous, next, queue, .. } = *self.link_mut(i);
        if previous != NONE {
            self.link_mut(previous).next = next;
        }
        if next != NONE {
            self.link_mut(next).previous = previous;
        }
        if let Some(q) = self.queues.get_mut(usize::from(queue)) {
            if previous == NONE {
                q.first = next;
            }
            if next == NONE {
                q.last = previous;
            }
        }
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
