//! Which packets' first fragments have passed: those behind them have no ports to judge them by.
//!
//! A fragment passes when the first of its packet has, not long ago, and does not overlap it (RFC 1858, RFC 5722: what was
//! judged must not be written over by what follows). One that comes before the first is dropped: its sender sends the
//! packet again. The place is bounded, and a new packet takes that of an old one: fragments may get lost, and never
//! pass because of another's.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::IpAddr;

use super::flow::{Direction, Packet};

/// Packets that are remembered.
const PLACES: usize = 256;
/// For how long: what receivers give a packet to come together (RFC 8200 section 4.5 gives it 60 s, Linux 30).
const TIMEOUT_MS: u64 = 30_000;

/// A packet that comes in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Name {
    direction: Direction,
    source: IpAddr,
    destination: IpAddr,
    /// 0 for IPv6, where it is not part of the name.
    protocol: u8,
    id: u32,
}

#[derive(Debug, Clone, Copy)]
struct Passed {
    name: Name,
    /// Where the first part ends.
    end: u16,
    epoch: u64,
    since: u64,
}

/// The packets whose first fragment has passed.
#[derive(Debug)]
pub struct Fragments {
    places: Box<[Option<Passed>]>,
    hasher: RandomState,
}

impl Default for Fragments {
    fn default() -> Self {
        Self { places: vec![None; PLACES].into(), hasher: RandomState::new() }
    }
}

impl Fragments {
    fn place(&mut self, name: &Name) -> Option<&mut Option<Passed>> {
        let hash = self.hasher.hash_one(name) as usize;
        self.places.get_mut(hash % PLACES)
    }

    /// The rules of `epoch` have let the first fragment of a packet pass.
    pub fn remember(&mut self, packet: &Packet, direction: Direction, epoch: u64, now: u64) {
        let (Some(name), Some(part)) = (name(packet, direction), packet.part) else { return };
        if let Some(place) = self.place(&name) {
            *place = Some(Passed { name, end: part.len, epoch, since: now });
        }
    }

    /// Whether a fragment behind the first may pass.
    pub fn pass(&mut self, packet: &Packet, direction: Direction, epoch: u64, now: u64) -> bool {
        let (Some(name), Some(part)) = (name(packet, direction), packet.part) else { return false };
        self.place(&name).is_some_and(|place| {
            place.is_some_and(|first| {
                first.name == name
                    && first.epoch == epoch
                    && now < first.since + TIMEOUT_MS
                    && part.offset >= first.end
            })
        })
    }
}

fn name(packet: &Packet, direction: Direction) -> Option<Name> {
    let protocol = if packet.source.is_ipv4() { packet.protocol } else { 0 };
    let (source, destination) = (packet.source, packet.destination);
    Some(Name { direction, source, destination, protocol, id: packet.part?.id })
}

#[cfg(test)]
mod tests {
    use super::super::flow::Content;
    use super::*;
    use crate::frame::packet::Part;

    fn part(id: u32, offset: u16, len: u16) -> Packet {
        Packet {
            source: [10, 0, 0, 1].into(),
            destination: [10, 0, 0, 2].into(),
            protocol: 17,
            content: if offset == 0 { Content::Udp(1, 2) } else { Content::Later },
            part: Some(Part { id, offset, len }),
        }
    }

    #[test]
    fn fragments_pass_behind_their_first() {
        let mut f = Fragments::default();
        assert!(!f.pass(&part(1, 1480, 100), Direction::In, 1, 0));
        f.remember(&part(1, 0, 1480), Direction::In, 1, 0);
        assert!(f.pass(&part(1, 1480, 100), Direction::In, 1, 0));
        assert!(f.pass(&part(1, 2960, 100), Direction::In, 1, 29_999));
        // Over the first; of another packet, the other way, by other rules, too late.
        assert!(!f.pass(&part(1, 1472, 100), Direction::In, 1, 0));
        assert!(!f.pass(&part(1, 8, 100), Direction::In, 1, 0));
        assert!(!f.pass(&part(2, 1480, 100), Direction::In, 1, 0));
        assert!(!f.pass(&part(1, 1480, 100), Direction::Out, 1, 0));
        assert!(!f.pass(&part(1, 1480, 100), Direction::In, 2, 0));
        assert!(!f.pass(&part(1, 1480, 100), Direction::In, 1, 30_000));
        let other = Packet { protocol: 6, ..part(1, 1480, 100) };
        assert!(!f.pass(&other, Direction::In, 1, 0));
    }

    #[test]
    fn the_place_is_bounded_and_nobody_passes_for_another() {
        let mut f = Fragments::default();
        (0..10_000).for_each(|id| f.remember(&part(id, 0, 8), Direction::In, 1, 0));
        let passed =
            (0..20_000).filter(|id| f.pass(&part(*id, 8, 8), Direction::In, 1, 0)).collect::<Vec<_>>();
        assert!(passed.len() <= PLACES && !passed.is_empty() && passed.iter().all(|id| *id < 10_000));
    }
}
