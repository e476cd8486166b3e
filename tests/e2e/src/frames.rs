//! Frames that a [`Station`](crate::station::Station) sends, true ones and others.

use std::net::{Ipv4Addr, Ipv6Addr};

use guest::frame::{self, Flow, Mac, Protocol};

use crate::card::mac;

/// Length of the Ethernet and IPv4 headers.
const L4: usize = 34;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// TCP control bits.
pub const SYN: u8 = 2;
/// TCP control bits.
pub const ACK: u8 = 16;

/// Who a frame comes from, or says it does, and who it goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// IPv4 address.
    pub ip: Ipv4Addr,
    /// IPv6 address.
    pub ip6: Ipv6Addr,
}

impl End {
    /// Number `n` of those in 10.9.0.0/24 and fd09::/64, with the MAC address that [`Card::nic`](crate::card::Card::nic) gives.
    pub fn new(n: u8) -> Self {
        let ip6 = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, n.into());
        Self { mac: mac(n), ip: Ipv4Addr::new(10, 9, 0, n), ip6 }
    }

    /// Everybody on the link.
    pub const EVERYBODY: Self =
        Self { mac: [0xff; 6], ip: Ipv4Addr::BROADCAST, ip6: Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1) };
}

fn datagram(from: &End, to: &End, ports: (u16, u16), protocol: Protocol, payload: &[u8]) -> Vec<u8> {
    let (source_mac, target_mac) = (Mac(from.mac), Mac(to.mac));
    let (source, target) = (from.ip.octets(), to.ip.octets());
    let flow = Flow { source_mac, target_mac, source, target, source_port: ports.0, target_port: ports.1 };
    let mut out = vec![0; protocol.overhead()];
    out.extend(payload);
    frame::datagram(&mut out, &flow, protocol, payload.len(), false);
    out
}

/// A UDP datagram over IPv4.
pub fn udp(from: &End, to: &End, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    datagram(from, to, ports, Protocol::Udp, payload)
}

/// A TCP segment over IPv4 with these control bits and nothing in it.
pub fn tcp(from: &End, to: &End, ports: (u16, u16), flags: u8) -> Vec<u8> {
    let mut out = datagram(from, to, ports, Protocol::Tcp, &[]);
    // The checksum is a complement: what a word gains it loses.
    let (before, sum) = (u16::from(out[L4 + 13]), u16::from_be_bytes([out[L4 + 16], out[L4 + 17]]));
    let folded = u32::from(!sum) + u32::from(!before) + u32::from(flags);
    let folded = (folded & 0xffff) + (folded >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    out[L4 + 13] = flags;
    out[L4 + 16..L4 + 18].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    out
}

/// The sum of RFC 1071, complemented, over parts of an even length but the last.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u32 = words.map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    (!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes()
}

/// An ICMP error of this type and code about what is in a frame, of which it has the first 8 bytes behind the IPv4 header.
pub fn icmp_error(from: &End, to: &End, kind: (u8, u8), about: &[u8]) -> Vec<u8> {
    let mut message = vec![kind.0, kind.1, 0, 0, 0, 0, 0, 0];
    // Of "fragmentation needed" the last two are the MTU.
    if kind == (3, 4) {
        message[6..8].copy_from_slice(&1280_u16.to_be_bytes());
    }
    message.extend(&about[14..L4 + 8]);
    let sum = checksum(&[&message]);
    message[2..4].copy_from_slice(&sum);
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, ICMP, 0, 0];
    ip.extend(from.ip.octets());
    ip.extend(to.ip.octets());
    let length = u16::try_from(ip.len() + message.len()).expect("a short packet");
    ip[2..4].copy_from_slice(&length.to_be_bytes());
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum);
    [&to.mac[..], &from.mac, &[8, 0], &ip, &message].concat()
}

/// An ARP request for `target`, or with `to` the answer of `sender` to it.
pub fn arp(sender: &End, target: Ipv4Addr, to: Option<&End>) -> Vec<u8> {
    let mut out = vec![0; frame::ARP_LEN];
    let to = to.map(|end| Mac(end.mac));
    frame::arp(&mut out, Mac(sender.mac), sender.ip.octets(), target.octets(), to);
    out
}

/// An IPv6 packet with this upper-layer protocol, whose checksum is at `sum` of it.
fn ipv6(from: &End, to: &End, next: u8, sum: usize, mut body: Vec<u8>) -> Vec<u8> {
    let length = u16::try_from(body.len()).expect("a short packet").to_be_bytes();
    let (source, target) = (from.ip6.octets(), to.ip6.octets());
    let value = checksum(&[&source, &target, &[0, 0], &length, &[0, 0, 0, next], &body]);
    body[sum..sum + 2].copy_from_slice(&value);
    let head = [0x60, 0, 0, 0, length[0], length[1], next, 255];
    [&to.mac[..], &from.mac, &[0x86, 0xdd], &head, &source, &target, &body].concat()
}

/// A UDP datagram over IPv6.
pub fn udp6(from: &End, to: &End, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).expect("a short datagram");
    let body = [ports.0, ports.1, length, 0].into_iter().flat_map(u16::to_be_bytes);
    ipv6(from, to, 17, 6, body.chain(payload.iter().copied()).collect())
}

/// A neighbour advertisement for `target`, which is said to be at the sender's MAC address.
pub fn neighbour_advertisement(from: &End, to: &End, target: Ipv6Addr) -> Vec<u8> {
    let body = [&[136, 0, 0, 0, 0x60, 0, 0, 0][..], &target.octets(), &[2, 1], &from.mac].concat();
    ipv6(from, to, ICMPV6, 2, body)
}

/// A neighbour solicitation for `target`.
pub fn neighbour_solicitation(from: &End, to: &End, target: Ipv6Addr) -> Vec<u8> {
    let body = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), &[1, 1], &from.mac].concat();
    ipv6(from, to, ICMPV6, 2, body)
}

/// A router advertisement: the sender is a router, for an hour.
pub fn router_advertisement(from: &End, to: &End) -> Vec<u8> {
    ipv6(from, to, ICMPV6, 2, vec![134, 0, 0, 0, 64, 0, 14, 16, 0, 0, 0, 0, 0, 0, 0, 0])
}

/// Whether a frame is a router's advertisement.
pub fn is_router_advertisement(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x86, 0xdd]) && (frame.get(20), frame.get(54)) == (Some(&ICMPV6), Some(&134))
}

/// A DHCP message of this kind (1: discover, 2: offer): from the client `client`, or to it, with this address for it.
pub fn dhcp(kind: u8, client: [u8; 6], offered: Ipv4Addr) -> Vec<u8> {
    let mut message = vec![0; 240];
    message[..3].copy_from_slice(&[if kind == 1 { 1 } else { 2 }, 1, 6]);
    message[4..8].copy_from_slice(b"xid1");
    message[16..20].copy_from_slice(&offered.octets());
    message[28..34].copy_from_slice(&client);
    message[236..].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
    message.extend([53, 1, kind, 255]);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_hold() {
        let (a, b) = (End::new(1), End::new(2));
        for flags in [SYN, SYN | ACK, ACK, 0xff, 0] {
            let f = tcp(&a, &b, (1, 2), flags);
            assert_eq!(f[L4 + 13], flags);
            assert_eq!(checksum(&[&f[26..34], &[0, 6, 0, 20], &f[L4..]]), [0, 0], "{flags:#x}");
        }
        let f = icmp_error(&a, &b, (3, 4), &udp(&b, &a, (1, 2), b"x"));
        assert_eq!((checksum(&[&f[14..L4]]), checksum(&[&f[L4..]])), ([0, 0], [0, 0]));
        for f in [udp6(&a, &b, (1, 2), b"odd"), neighbour_advertisement(&a, &b, a.ip6)] {
            let length = u16::try_from(f.len() - 54).expect("short").to_be_bytes();
            assert_eq!(checksum(&[&f[22..54], &[0, 0], &length, &[0, 0, 0, f[20]], &f[54..]]), [0, 0]);
        }
    }
}
