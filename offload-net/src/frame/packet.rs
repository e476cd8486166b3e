//! What a frame carries: as much of ARP, IPv4, IPv6 and UDP as decides whether its sender may send it.
//!
//! Only a frame's copied head is looked at, and everything a decision needs must be in it: a sender that hides its
//! transport header behind 200 bytes of extension headers is not understood, and so not forwarded.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::ETH_HEADER;
use crate::mac::MacAddr;

/// EtherType of IPv4.
pub const TYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const TYPE_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const TYPE_IPV6: u16 = 0x86dd;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
/// Bytes of a transport header that must not be cut off by fragmentation: ports, type, code.
const TRANSPORT_MIN: usize = 8;

/// Why a frame is not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unclear {
    /// Neither ARP nor IP; VLAN tags are not either.
    Protocol,
    /// Lengths or headers contradict each other, or the transport header is not where it can be seen.
    Malformed,
}

/// A frame's contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packet {
    /// ARP for IPv4 over Ethernet.
    Arp(Arp),
    /// IPv4.
    V4(V4),
    /// IPv6.
    V6(V6),
}

/// An ARP packet (RFC 826).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arp {
    /// 1: request, 2: reply.
    pub operation: u16,
    /// Sender's hardware address.
    pub sender_mac: MacAddr,
    /// Sender's protocol address.
    pub sender: Ipv4Addr,
    /// Whom it is about.
    pub target: Ipv4Addr,
}

/// UDP ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Sender's.
    pub source: u16,
    /// Receiver's.
    pub destination: u16,
}

/// A part of a packet that was sent in several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The same in all parts of a packet.
    pub id: u32,
    /// Where it begins in the packet's payload, in bytes; 0: it is the first.
    pub offset: u16,
    /// Its bytes of the payload.
    pub len: u16,
}

/// An IPv4 packet (RFC 791).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct V4 {
    /// From.
    pub source: Ipv4Addr,
    /// To.
    pub destination: Ipv4Addr,
    /// What it carries.
    pub protocol: u8,
    /// It is UDP, and not a fragment behind the first.
    pub udp: Option<Ports>,
    /// A fragment of a packet, the first or another.
    pub fragment: bool,
    /// Which, if it is one.
    pub part: Option<Part>,
    /// Where the transport header begins in the frame.
    pub l4: usize,
    /// Where the packet ends in the frame.
    pub end: usize,
}

/// An IPv6 packet (RFC 8200).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct V6 {
    /// From.
    pub source: Ipv6Addr,
    /// To.
    pub destination: Ipv6Addr,
    /// Hop limit.
    pub hop_limit: u8,
    /// The upper layer's protocol; `None` for a fragment behind the first.
    pub protocol: Option<u8>,
    /// It is UDP, and not a fragment behind the first.
    pub udp: Option<Ports>,
    /// A fragment of a packet, the first or another.
    pub fragment: bool,
    /// Which, if it is one.
    pub part: Option<Part>,
    /// Where the upper layer's header begins in the frame.
    pub l4: usize,
    /// Where the packet ends in the frame.
    pub end: usize,
}

/// Reads a frame of `bytes` bytes that begins with `head`.
///
/// # Errors
/// It is not understood, and should not be forwarded where contents matter.
pub fn parse(head: &[u8], bytes: usize) -> Result<Packet, Unclear> {
    let Some(ethertype) = u16_at(head, 12) else { return Err(Unclear::Malformed) };
    match ethertype {
        TYPE_IPV4 => v4(head, bytes).map(Packet::V4),
        TYPE_IPV6 => v6(head, bytes).map(Packet::V6),
        TYPE_ARP => arp(head).map(Packet::Arp),
        _ => return Err(Unclear::Protocol),
    }
    .ok_or(Unclear::Malformed)
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_be_bytes)
}

fn arp(head: &[u8]) -> Option<Arp> {
    // Ethernet, IPv4, lengths of their addresses.
    if array_at(head, ETH_HEADER)? != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    Some(Arp {
        operation: u16_at(head, 20)?,
        sender_mac: MacAddr(array_at(head, 22)?),
        sender: array_at::<4>(head, 28)?.into(),
        target: array_at::<4>(head, 38)?.into(),
    })
}

fn ports(head: &[u8], l4: usize) -> Option<Ports> {
    let [a, b, c, d] = array_at(head, l4)?;
    Some(Ports { source: u16::from_be_bytes([a, b]), destination: u16::from_be_bytes([c, d]) })
}

fn v4(head: &[u8], bytes: usize) -> Option<V4> {
    let ip: [u8; IPV4_HEADER] = array_at(head, ETH_HEADER)?;
    let header = usize::from(ip[0] & 0xf) * 4;
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    let (l4, end) = (ETH_HEADER + header, ETH_HEADER + total);
    if ip[0] >> 4 != 4 || header < IPV4_HEADER || l4 > head.len() || end < l4 || end > bytes {
        return None;
    }
    let flags = u16::from_be_bytes([ip[6], ip[7]]);
    let (first, fragment) = (flags & 0x1fff == 0, flags & 0x3fff != 0);
    let protocol = ip[9];
    // RFC 1858: a first fragment too small for the ports would let the rest say whatever it likes.
    if first && matches!(protocol, TCP | UDP) && l4 + TRANSPORT_MIN > end.min(head.len()) {
        return None;
    }
    let udp = if first && protocol == UDP { Some(ports(head, l4)?) } else { None };
    let [.., a, b, c, d, e, f, g, h] = ip;
    let part = fragment.then(|| Part {
        id: u16::from_be_bytes([ip[4], ip[5]]).into(),
        offset: (flags & 0x1fff).saturating_mul(8),
        len: (end - l4) as u16,
    });
    let (source, destination) = ([a, b, c, d].into(), [e, f, g, h].into());
    Some(V4 { source, destination, protocol, udp, fragment, part, l4, end })
}

fn v6(head: &[u8], bytes: usize) -> Option<V6> {
    let ip: [u8; IPV6_HEADER] = array_at(head, ETH_HEADER)?;
    let mut l4 = ETH_HEADER + IPV6_HEADER;
    let end = l4 + usize::from(u16::from_be_bytes([ip[4], ip[5]]));
    if ip[0] >> 4 != 6 || end > bytes {
        return None;
    }
    let mut next = ip[6];
    let mut fragment = false;
    let mut part = None;
    // Each round goes at least 8 bytes on, so the end of `head` ends the loop.
    let protocol = loop {
        let length = |at: usize| head.get(at + 1).map(|l| usize::from(*l));
        match next {
            // Hop-by-hop options, routing, destination options.
            0 | 43 | 60 => {
                let header = (length(l4)? + 1) * 8;
                next = *head.get(l4)?;
                l4 += header;
            }
            // Authentication.
            51 => {
                let header = (length(l4)? + 2) * 4;
                next = *head.get(l4)?;
                l4 += header;
            }
            // Fragment.
            44 => {
                let offset = u16_at(head, l4 + 2)?;
                fragment = true;
                next = *head.get(l4)?;
                let id = u32::from_be_bytes(array_at(head, l4 + 4)?);
                l4 += 8;
                let len = end.checked_sub(l4)? as u16;
                part = Some(Part { id, offset: offset & 0xfff8, len });
                if offset & 0xfff8 != 0 {
                    break None;
                }
            }
            other => break Some(other),
        }
    };
    if l4 > end.min(head.len()) {
        return None;
    }
    if matches!(protocol, Some(TCP | UDP | ICMPV6)) && l4 + TRANSPORT_MIN > end.min(head.len()) {
        return None;
    }
    let udp = if protocol == Some(UDP) { Some(ports(head, l4)?) } else { None };
    Some(V6 {
        source: array_at::<16>(&ip, 8)?.into(),
        destination: array_at::<16>(&ip, 24)?.into(),
        hop_limit: ip[7],
        protocol,
        udp,
        fragment,
        part,
        l4,
        end,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::HEAD_MAX;
    use super::*;

    fn udp4(edit: impl FnOnce(&mut Vec<u8>)) -> Result<Packet, Unclear> {
        let mut f = vec![0; 14];
        f[12..14].copy_from_slice(&TYPE_IPV4.to_be_bytes());
        f.extend([0x45, 0, 0, 36, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        f.extend([0, 67, 0, 68, 0, 16, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        edit(&mut f);
        parse(&f, f.len())
    }

    #[test]
    fn udp_is_found() {
        let Ok(Packet::V4(p)) = udp4(|_| {}) else { panic!() };
        assert_eq!((p.source, p.destination), ([10, 0, 0, 1].into(), [10, 0, 0, 2].into()));
        assert_eq!((p.udp, p.fragment), (Some(Ports { source: 67, destination: 68 }), false));
        assert_eq!((p.l4, p.end), (34, 50));
        // The padding of a short frame is not the packet's.
        let Ok(Packet::V4(p)) = udp4(|f| f.resize(60, 0)) else { panic!() };
        assert_eq!(p.end, 50);
        // Behind options.
        let with_options = udp4(|f| {
            f[14] = 0x46;
            f[17] = 40;
            f.splice(34..34, [1; 4]);
        });
        assert!(matches!(with_options, Ok(Packet::V4(p)) if p.udp.is_some() && p.l4 == 38));
    }

    #[test]
    fn what_contradicts_itself_is_not_understood() {
        let edits: [fn(&mut Vec<u8>); 8] = [
            |f| f[14] = 0x65,
            |f| f[14] = 0x44,
            |f| f[14] = 0x4f,
            |f| f[17] = 37,
            |f| f[17] = 19,
            |f| f.truncate(33),
            // A first fragment that ends in the ports.
            |f| (f[17], f[20]) = (23, 0x20),
            |f| f.truncate(13),
        ];
        for (i, edit) in edits.into_iter().enumerate() {
            assert_eq!(udp4(edit), Err(Unclear::Malformed), "{i}");
        }
        assert_eq!(udp4(|f| f[12] = 0x81), Err(Unclear::Protocol));
    }

    #[test]
    fn later_fragments_have_no_ports() {
        let Ok(Packet::V4(p)) = udp4(|f| f[21] = 1) else { panic!() };
        assert_eq!((p.udp, p.fragment), (None, true));
        assert_eq!(p.part, Some(Part { id: 1, offset: 8, len: 16 }));
    }

    fn v6_frame(next: u8, body: &[u8]) -> Vec<u8> {
        let mut f = vec![0; 14];
        f[12..14].copy_from_slice(&TYPE_IPV6.to_be_bytes());
        f.extend([0x60, 0, 0, 0, 0, body.len() as u8, next, 255]);
        f.extend([0xfd; 16]);
        f.extend([0xfe; 16]);
        f.extend(body);
        f
    }

    #[test]
    fn extension_headers_are_walked() {
        let udp = [2, 35, 2, 34, 0, 8, 0, 0];
        let behind = |headers: &[u8], first: u8| {
            let f = v6_frame(first, &[headers, &udp].concat());
            match parse(&f, f.len()) {
                Ok(Packet::V6(p)) => Some(p),
                _ => None,
            }
        };
        let ports = Some(Ports { source: 547, destination: 546 });
        assert_eq!(behind(&[], 17).unwrap().udp, ports);
        let options = [17, 0, 1, 4, 0, 0, 0, 0];
        for kind in [0, 43, 60] {
            assert_eq!(behind(&options, kind).unwrap().udp, ports);
        }
        assert_eq!(behind(&[17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 51).unwrap().udp, ports);
        let first = behind(&[17, 0, 0, 1, 0, 0, 0, 0], 44).unwrap();
        assert_eq!((first.udp, first.fragment), (ports, true));
        let second = behind(&[17, 0, 0, 9, 0, 0, 0, 0], 44).unwrap();
        assert_eq!((second.udp, second.protocol, second.fragment), (None, None, true));
        assert_eq!(
            (first.part, second.part),
            (Some(Part { id: 0, offset: 0, len: 8 }), Some(Part { id: 0, offset: 8, len: 8 }))
        );
        // Out of what can be seen.
        assert_eq!(behind(&[17, 255, 1, 4, 0, 0, 0, 0], 0), None);
    }

    proptest! {
        /// Whatever is understood lies within the frame and its head.
        #[test]
        fn what_is_understood_is_in_the_frame(
            head in prop::collection::vec(any::<u8>(), 0..=HEAD_MAX),
            ethertype in prop::sample::select(vec![TYPE_IPV4, TYPE_ARP, TYPE_IPV6, 0x8100]),
            next in prop::sample::select(vec![0_u8, 6, 17, 43, 44, 51, 58, 60]),
            small: bool, more in 0..2000_usize,
        ) {
            let mut head = head;
            if head.len() > 60 {
                head[12..14].copy_from_slice(&ethertype.to_be_bytes());
                if ethertype == TYPE_IPV4 { (head[14], head[23]) = (0x45, next) }
                if ethertype == TYPE_IPV6 { (head[14], head[20]) = (0x60, next) }
                if small { (head[16], head[18]) = (0, 0) }
            }
            let bytes = head.len() + more;
            match parse(&head, bytes) {
                Ok(Packet::V4(p)) => prop_assert!(p.l4 <= p.end && p.end <= bytes && p.l4 <= head.len()),
                Ok(Packet::V6(p)) => prop_assert!(p.l4 <= p.end && p.end <= bytes && p.l4 <= head.len()),
                Ok(Packet::Arp(_)) => prop_assert!(head.len() >= 42),
                Err(_) => {}
            }
        }
    }
}
