//! What a packet says about the connection it belongs to.

use std::net::IpAddr;

use crate::frame::Frame;
use crate::frame::packet::{self, ICMPV6, Part, TCP, UDP};

/// IP protocol number of ICMP.
const ICMP: u8 = 1;
/// What must be seen of a TCP header, to know that what it says of itself is all there.
const TCP_HEADER: usize = 20;
/// Length of the header of an ICMP message, behind which an error has what it is about.
const ICMP_HEADER: usize = 8;
/// Next header: fragment (RFC 8200 section 4.5).
const FRAGMENT: u8 = 44;

/// Which way a packet goes, as seen from an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the interface.
    In,
    /// From it.
    Out,
}

impl Direction {
    /// The other.
    pub fn reverse(self) -> Self {
        match self {
            Self::In => Self::Out,
            Self::Out => Self::In,
        }
    }
}

/// An IP address as a number, with the version beside it, for a version 6 address may be the image of another.
pub fn number(address: IpAddr) -> (u128, bool) {
    match address {
        IpAddr::V4(a) => (a.to_bits().into(), false),
        IpAddr::V6(a) => (a.to_bits(), true),
    }
}

/// A connection's name, from an interface's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// IPv6.
    pub v6: bool,
    /// IP protocol number.
    pub protocol: u8,
    /// The interface's address.
    pub local: u128,
    /// The other's.
    pub peer: u128,
    /// The interface's port; an echo's identifier.
    pub local_port: u16,
    /// The other's port; an echo's direction: 1 when the other asks, so that two who ask each other are not one.
    pub peer_port: u16,
}

/// TCP's control bits (RFC 9293 section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flags(pub u8);

impl Flags {
    /// Nothing more from the sender.
    pub const FIN: u8 = 1;
    /// A connection is opened.
    pub const SYN: u8 = 2;
    /// It is gone.
    pub const RST: u8 = 4;
    /// An acknowledgement.
    pub const ACK: u8 = 16;

    /// One of these bits.
    pub fn has(self, bits: u8) -> bool {
        self.0 & bits != 0
    }

    /// The segment that opens a connection.
    pub fn opens(self) -> bool {
        self.0 & (Self::SYN | Self::ACK | Self::RST | Self::FIN) == Self::SYN
    }

    /// No end of TCP sends this.
    pub fn is_nonsense(self) -> bool {
        let all = Self::SYN | Self::ACK | Self::RST | Self::FIN;
        self.0 & all == 0 || self.has(Self::SYN) && self.has(Self::RST | Self::FIN)
    }
}

/// What a packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A TCP segment with these ports.
    Tcp(u16, u16, Flags),
    /// UDP, with these.
    Udp(u16, u16),
    /// An ICMP question (echo, timestamp) with this identifier, or the answer to one.
    Query {
        /// What question and answer have in common.
        id: u16,
        /// It is the answer.
        reply: bool,
    },
    /// An ICMP error about this packet, of which the addresses and ports are known.
    Error(About),
    /// Another ICMP message, which belongs to nothing.
    Message,
    /// Another protocol.
    Other,
    /// A fragment behind the first, which says nothing but where it belongs.
    Later,
}

/// The packet that an ICMP error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct About {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    content: Inner,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inner {
    Ports(u16, u16),
    Query { id: u16, reply: bool },
    Other,
}

/// An IP packet, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// From.
    pub source: IpAddr,
    /// To.
    pub destination: IpAddr,
    /// IP protocol number; 0 for an IPv6 fragment behind the first.
    pub protocol: u8,
    /// What it carries.
    pub content: Content,
    /// Which fragment it is, if it is one.
    pub part: Option<Part>,
}

impl Packet {
    /// Reads a frame. `None`: it is no IP packet, or what is to be known of it is not in its head.
    pub fn of(frame: &Frame<'_>) -> Option<Self> {
        match packet::parse(frame.head, frame.bytes()).ok()? {
            packet::Packet::Arp(_) => None,
            packet::Packet::V4(p) => {
                let later = p.part.is_some_and(|part| part.offset != 0);
                let head = frame.head.get(..p.end.min(frame.head.len()))?;
                let content = if later { Content::Later } else { content(head, p.l4, p.protocol, false)? };
                let (source, destination) = (p.source.into(), p.destination.into());
                Some(Self { source, destination, protocol: p.protocol, content, part: p.part })
            }
            packet::Packet::V6(p) => {
                let head = frame.head.get(..p.end.min(frame.head.len()))?;
                let (protocol, content) = match p.protocol {
                    Some(protocol) => (protocol, content(head, p.l4, protocol, true)?),
                    None => (0, Content::Later),
                };
                let (source, destination) = (p.source.into(), p.destination.into());
                Some(Self { source, destination, protocol, content, part: p.part })
            }
        }
    }

    /// The connection it belongs to, as an interface names it that it reaches or leaves. `None`: to none.
    pub fn key(&self, direction: Direction) -> Option<Key> {
        let content = match self.content {
            Content::Tcp(from, to, _) | Content::Udp(from, to) => Inner::Ports(from, to),
            Content::Query { id, reply } => Inner::Query { id, reply },
            Content::Other => Inner::Other,
            Content::Error(_) | Content::Message | Content::Later => return None,
        };
        Some(key((self.source, self.destination), self.protocol, content, direction))
    }
}

impl About {
    /// The connection that the packet belongs to which the error is about, if the error goes in this direction and to
    /// whoever has sent that packet.
    pub fn key(&self, error: &Packet, direction: Direction) -> Option<Key> {
        (error.destination == self.source)
            .then(|| key((self.source, self.destination), self.protocol, self.content, direction.reverse()))
    }
}

fn key((from, to): (IpAddr, IpAddr), protocol: u8, content: Inner, direction: Direction) -> Key {
    let ((from, v6), (to, _)) = (number(from), number(to));
    let (local, peer) = match direction {
        Direction::Out => (from, to),
        Direction::In => (to, from),
    };
    let (local_port, peer_port) = match (content, direction) {
        (Inner::Ports(from, to), Direction::Out) => (from, to),
        (Inner::Ports(from, to), Direction::In) => (to, from),
        // Whoever asks has opened it: a reply that goes in belongs to a question that went out.
        (Inner::Query { id, reply }, direction) => (id, u16::from((direction == Direction::In) != reply)),
        (Inner::Other, _) => (0, 0),
    };
    Key { v6, protocol, local, peer, local_port, peer_port }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
}

/// Reads what is at `l4` of a packet of which `head` is what is seen. `None`: too little of it.
fn content(head: &[u8], l4: usize, protocol: u8, v6: bool) -> Option<Content> {
    match (protocol, v6) {
        (TCP, _) => {
            head.get(l4..l4 + TCP_HEADER)?;
            let flags = Flags(*head.get(l4 + 13)?);
            Some(Content::Tcp(u16_at(head, l4)?, u16_at(head, l4 + 2)?, flags))
        }
        (UDP, _) => Some(Content::Udp(u16_at(head, l4)?, u16_at(head, l4 + 2)?)),
        (ICMP, false) | (ICMPV6, true) => icmp(head, l4, v6),
        _ => Some(Content::Other),
    }
}

/// ICMP types (RFC 792, RFC 4443): question, answer.
fn query(kind: u8, v6: bool) -> Option<bool> {
    match (kind, v6) {
        // Echo, timestamp.
        (8 | 13, false) | (128, true) => Some(false),
        (0 | 14, false) | (129, true) => Some(true),
        _ => None,
    }
}

fn icmp(head: &[u8], l4: usize, v6: bool) -> Option<Content> {
    head.get(l4..l4 + ICMP_HEADER)?;
    let kind = *head.get(l4)?;
    if let Some(reply) = query(kind, v6) {
        return Some(Content::Query { id: u16_at(head, l4 + 4)?, reply });
    }
    // Unreachable, time exceeded, parameter problem; too big. A redirect is none: it changes where packets go.
    let is_error = if v6 { matches!(kind, 1..=4) } else { matches!(kind, 3 | 11 | 12) };
    Some(match is_error.then(|| about(head.get(l4 + ICMP_HEADER..)?, v6)).flatten() {
        Some(about) => Content::Error(about),
        None => Content::Message,
    })
}

/// Reads the packet that an error is about, of which `bytes` are the first. An IPv6 packet with other extension headers
/// than that of a first fragment is not understood: then the error belongs to nothing.
fn about(bytes: &[u8], v6: bool) -> Option<About> {
    let (source, destination, protocol, l4): (IpAddr, IpAddr, u8, usize) = if v6 {
        let ip: [u8; 40] = bytes.first_chunk().copied()?;
        let [_, _, _, _, _, _, next, _, ..] = ip;
        if bytes.first()? >> 4 != 6 {
            return None;
        }
        let at = |from: usize| ip.get(from..).and_then(<[u8]>::first_chunk::<16>).copied();
        let (protocol, l4) = if next == FRAGMENT {
            (u16_at(bytes, 42)? & 0xfff8 == 0).then_some(())?;
            (*bytes.get(40)?, 48)
        } else {
            (next, 40)
        };
        (IpAddr::from(at(8)?), IpAddr::from(at(24)?), protocol, l4)
    } else {
        let ip: [u8; 20] = bytes.first_chunk().copied()?;
        let header = usize::from(ip[0] & 0xf) * 4;
        let later = u16::from_be_bytes([ip[6], ip[7]]) & 0x1fff != 0;
        if ip[0] >> 4 != 4 || header < 20 || later {
            return None;
        }
        let [.., a, b, c, d, e, f, g, h] = ip;
        (IpAddr::from([a, b, c, d]), IpAddr::from([e, f, g, h]), ip[9], header)
    };
    let content = match (protocol, v6) {
        (TCP | UDP, _) => Inner::Ports(u16_at(bytes, l4)?, u16_at(bytes, l4 + 2)?),
        (ICMP, false) | (ICMPV6, true) => {
            Inner::Query { id: u16_at(bytes, l4 + 4)?, reply: query(*bytes.get(l4)?, v6)? }
        }
        _ => Inner::Other,
    };
    Some(About { source, destination, protocol, content })
}
