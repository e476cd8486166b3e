//! Which of a device's receive queues a frame goes to, if its driver uses several: the same for all frames of a flow, so
//! that none overtakes another.
//!
//! The hash is SipHash with a key of this thread's own, so nobody can choose flows that meet in one queue. It is the
//! same for both directions of a flow. A fragmented packet goes by its addresses alone, because only its first fragment
//! has the ports.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::IpAddr;

use crate::frame::Frame;
use crate::frame::packet::{self, Packet, TCP, UDP};

/// One end of a flow: address and port.
type End = (IpAddr, [u8; 2]);

/// Steers frames.
#[derive(Debug, Default)]
pub(super) struct Steering(RandomState);

impl Steering {
    /// Which of `queues` queues a frame goes to; what is neither IPv4 nor IPv6 to the first.
    pub(super) fn queue(&self, frame: &Frame<'_>, queues: usize) -> usize {
        if queues < 2 {
            return 0;
        }
        let Some((a, b)) = ends(frame) else { return 0 };
        let hash = self.0.hash_one((a.min(b), a.max(b)));
        // As many parts of the range of hashes as there are queues: the result is below their number.
        ((u128::from(hash) * queues as u128) >> 64) as usize
    }
}

/// The two ends of the flow that a frame belongs to.
fn ends(frame: &Frame<'_>) -> Option<(End, End)> {
    let (source, destination, protocol, fragment, l4): (IpAddr, IpAddr, _, _, _) =
        match packet::parse(frame.head, frame.bytes()).ok()? {
            Packet::V4(p) => (p.source.into(), p.destination.into(), Some(p.protocol), p.fragment, p.l4),
            Packet::V6(p) => (p.source.into(), p.destination.into(), p.protocol, p.fragment, p.l4),
            Packet::Arp(_) => return None,
        };
    let ports = match protocol {
        Some(TCP | UDP) if !fragment => frame.head.get(l4..).and_then(<[u8]>::first_chunk),
        _ => None,
    };
    let [a, b, c, d] = *ports.unwrap_or(&[0; 4]);
    Some(((source, [a, b]), (destination, [c, d])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::offload::Offloads;
    use crate::frame::{Bytes, Memory};

    fn queue(steering: &Steering, head: &[u8]) -> usize {
        let tail_bytes = Bytes { start: 0, len: 0 };
        let frame = Frame { head, tail: Memory::Host(&[]), tail_bytes, offloads: Offloads::default() };
        steering.queue(&frame, QUEUES)
    }

    const QUEUES: usize = 7;

    /// Ethernet and IPv4, with this fragment field and payload.
    fn v4(source: [u8; 4], target: [u8; 4], protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let mut f = [[2; 12].as_slice(), &[8, 0, 0x45, 0]].concat();
        f.extend((20 + payload.len() as u16).to_be_bytes());
        f.extend([0, 9]);
        f.extend(fragment.to_be_bytes());
        f.extend([64, protocol, 0, 0]);
        f.extend([source, target].concat());
        f.extend(payload);
        f
    }

    /// Ethernet and IPv6, with this next header and payload.
    fn v6(source: u8, target: u8, next: u8, payload: &[u8]) -> Vec<u8> {
        let mut f = [[2; 12].as_slice(), &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
        f.extend((payload.len() as u16).to_be_bytes());
        f.extend([next, 64]);
        f.extend([[source; 16], [target; 16]].concat());
        f.extend(payload);
        f
    }

    /// Beginning of a transport header.
    fn l4(source: u16, target: u16) -> Vec<u8> {
        [source.to_be_bytes(), target.to_be_bytes(), [0, 28], [0, 0]]
            .concat()
            .into_iter()
            .chain([7; 20])
            .collect()
    }

    #[test]
    fn a_flow_has_one_queue_both_ways_and_flows_spread() {
        let steering = Steering::default();
        for v in [4, 6] {
            let mut used = [0; QUEUES];
            for port in 0..1000 {
                let (there, back) = (l4(port, 443), l4(443, port));
                let (there, back) = if v == 4 {
                    (
                        v4([10, 0, 0, 1], [10, 0, 0, 2], 6, 0, &there),
                        v4([10, 0, 0, 2], [10, 0, 0, 1], 6, 0, &back),
                    )
                } else {
                    (v6(1, 2, UDP, &there), v6(2, 1, UDP, &back))
                };
                let at = queue(&steering, &there);
                assert_eq!((queue(&steering, &there), queue(&steering, &back)), (at, at));
                used[at] += 1;
            }
            // 143 each on average; 1000 flows miss this by chance once in 10^9 tries.
            assert!(used.iter().all(|n| *n > 70), "IPv{v}: {used:?}");
        }
    }

    #[test]
    fn the_fragments_of_a_packet_have_one_queue() {
        let steering = Steering::default();
        for n in 0..100 {
            let (source, target) = ([10, 0, n, 1], [10, 0, n, 2]);
            let first = v4(source, target, UDP, 0x2000, &l4(n.into(), 53));
            let middle = v4(source, target, UDP, 0x2003, &l4(n.into(), 99));
            let last = v4(source, target, UDP, 0x0006, &[1, 2, 3]);
            let at = queue(&steering, &first);
            assert_eq!((queue(&steering, &middle), queue(&steering, &last)), (at, at));

            let part = |offset: u16, more: u16, payload: &[u8]| {
                let mut fragment = vec![UDP, 0];
                fragment.extend((offset | more).to_be_bytes());
                fragment.extend([0, 0, 0, 1]);
                fragment.extend(payload);
                v6(n, 200, 44, &fragment)
            };
            let at = queue(&steering, &part(0, 1, &l4(n.into(), 53)));
            assert_eq!(queue(&steering, &part(24, 0, &[9; 5])), at);
        }
    }

    #[test]
    fn nobody_knows_where_a_flow_goes() {
        let flow = v4([10, 0, 0, 1], [10, 0, 0, 2], 6, 0, &l4(1, 443));
        let places: Vec<_> = (0..64).map(|_| queue(&Steering::default(), &flow)).collect();
        assert!(places.iter().any(|p| *p != places[0]), "{places:?}");
    }

    #[test]
    fn what_is_no_ip_goes_to_the_first_queue() {
        let steering = Steering::default();
        let mut arp = vec![2; 60];
        arp[12..20].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4]);
        let mut tagged = v4([10, 0, 0, 1], [10, 0, 0, 2], 6, 0, &l4(1, 443));
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        for frame in [arp, tagged, vec![2; 14], vec![], v6(1, 2, UDP, &[])] {
            assert_eq!(queue(&steering, &frame), 0);
        }
    }
}
