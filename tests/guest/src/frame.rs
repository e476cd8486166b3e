//! Ethernet, ARP, IPv4, ICMP and UDP/TCP headers: as much as two guests, or a guest and a host's sockets, need to talk.

use core::fmt;

/// Length of the Ethernet, IPv4 and UDP headers in front of a datagram's payload.
pub const UDP_OVERHEAD: usize = ETHERNET + IPV4 + 8;
/// Length of the Ethernet, IPv4 and TCP headers in front of a segment's payload.
pub const TCP_OVERHEAD: usize = ETHERNET + IPV4 + 20;
/// Length of an ARP frame.
pub const ARP_LEN: usize = ETHERNET + 28;
/// Offset of the IPv4 header's successor: where a checksum that is left to the device starts.
pub const L4_OFFSET: usize = ETHERNET + IPV4;

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const TYPE_IPV4: [u8; 2] = [8, 0];
const TYPE_ARP: [u8; 2] = [8, 6];

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Everybody.
    pub const BROADCAST: Self = Self([0xff; 6]);
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An IPv4 address.
pub type Ipv4 = [u8; 4];

/// The transport of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// UDP.
    Udp,
    /// TCP segments, of which nobody waits for an acknowledgement.
    Tcp,
    /// The TCP segment that opens a connection, which has no payload: for whoever on the way lets nothing else pass before it.
    TcpSyn,
}

impl Protocol {
    /// The protocol number in the IPv4 header.
    const fn number(self) -> u8 {
        match self {
            Self::Udp => 17,
            Self::Tcp | Self::TcpSyn => 6,
        }
    }

    /// Bytes in front of the payload.
    #[must_use]
    pub const fn overhead(self) -> usize {
        match self {
            Self::Udp => UDP_OVERHEAD,
            Self::Tcp | Self::TcpSyn => TCP_OVERHEAD,
        }
    }

    /// Offset of the checksum in the transport header.
    #[must_use]
    pub const fn checksum_offset(self) -> usize {
        match self {
            Self::Udp => 6,
            Self::Tcp | Self::TcpSyn => 16,
        }
    }
}

/// Who talks to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Sender's Ethernet address.
    pub source_mac: Mac,
    /// Receiver's Ethernet address.
    pub target_mac: Mac,
    /// Sender.
    pub source: Ipv4,
    /// Receiver.
    pub target: Ipv4,
    /// Sender's port.
    pub source_port: u16,
    /// Receiver's port.
    pub target_port: u16,
}

/// What a received frame is.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// Somebody asks for the Ethernet address of `target`.
    ArpRequest {
        /// Who asks.
        mac: Mac,
        /// Who asks.
        ip: Ipv4,
        /// For whom.
        target: Ipv4,
    },
    /// `ip` is at `mac`.
    ArpReply {
        /// The address.
        mac: Mac,
        /// Whose.
        ip: Ipv4,
    },
    /// An ICMP echo request to `target`.
    Ping {
        /// To whom.
        target: Ipv4,
    },
    /// A UDP datagram or TCP segment.
    Datagram {
        /// From whom to whom.
        flow: Flow,
        /// UDP or TCP.
        protocol: Protocol,
        /// Its payload.
        payload: &'a [u8],
        /// Whether its checksum is right (true if there is none).
        checksum_ok: bool,
    },
    /// Something else, or malformed.
    Other,
}

/// The sum of RFC 1071 over `bytes`, to be continued or [`fold`]ed.
fn sum(bytes: &[u8], start: u64) -> u64 {
    let mut chunks = bytes.chunks_exact(4);
    let mut total = start;
    for chunk in &mut chunks {
        let mut word = [0; 4];
        word.copy_from_slice(chunk);
        total += u64::from(u32::from_be_bytes(word));
    }
    let rest = chunks.remainder();
    let mut word = [0; 4];
    word[..rest.len()].copy_from_slice(rest);
    total + u64::from(u32::from_be_bytes(word))
}

fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total >> 16) + (total & 0xffff);
    }
    total as u16
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn pseudo_header(source: Ipv4, target: Ipv4, protocol: u8, len: usize) -> u64 {
    sum(&source, 0) + sum(&target, 0) + u64::from(protocol) + len as u64
}

/// Classifies a frame. `trust_checksum`: do not look at the transport checksum (the device did, or left it open).
#[must_use]
pub fn parse(frame: &[u8], trust_checksum: bool) -> Received<'_> {
    parse_known(frame, trust_checksum).unwrap_or(Received::Other)
}

fn parse_known(frame: &[u8], trust_checksum: bool) -> Option<Received<'_>> {
    match array::<2>(frame, 12)? {
        TYPE_ARP => {
            // Ethernet, IPv4, lengths 6 and 4.
            if array::<6>(frame, 14)? != [0, 1, 8, 0, 6, 4] {
                return None;
            }
            let (mac, ip) = (Mac(array(frame, 22)?), array(frame, 28)?);
            match array::<2>(frame, 20)? {
                [0, 1] => Some(Received::ArpRequest { mac, ip, target: array(frame, 38)? }),
                [0, 2] => Some(Received::ArpReply { mac, ip }),
                _ => None,
            }
        }
        TYPE_IPV4 => parse_ipv4(frame, trust_checksum),
        _ => None,
    }
}

fn parse_ipv4(frame: &[u8], trust_checksum: bool) -> Option<Received<'_>> {
    let packet = frame.get(ETHERNET..)?;
    let total = usize::from(u16::from_be_bytes(array(packet, 2)?));
    // No options, no fragments; what is beyond the length is Ethernet's padding.
    if packet.first()? != &0x45 || u16::from_be_bytes(array(packet, 6)?) & 0x3fff != 0 {
        return None;
    }
    let packet = packet.get(..total)?;
    let body = packet.get(IPV4..)?;
    if fold(sum(&packet[..IPV4], 0)) != 0xffff {
        return None;
    }
    let (source, target) = (array(packet, 12)?, array(packet, 16)?);
    let number = packet[9];
    let (protocol, header) = match number {
        1 => {
            let ok = body.len() >= 8 && body[0..2] == [8, 0] && fold(sum(body, 0)) == 0xffff;
            return ok.then_some(Received::Ping { target });
        }
        17 => (Protocol::Udp, 8),
        6 => (Protocol::Tcp, usize::from(body.get(12)? >> 4) * 4),
        _ => return None,
    };
    let no_checksum = protocol == Protocol::Udp && array::<2>(body, 6)? == [0, 0];
    let checksum_ok = trust_checksum
        || no_checksum
        || fold(sum(body, pseudo_header(source, target, number, body.len()))) == 0xffff;
    Some(Received::Datagram {
        flow: Flow {
            source_mac: Mac(array(frame, 6)?),
            target_mac: Mac(array(frame, 0)?),
            source,
            target,
            source_port: u16::from_be_bytes(array(body, 0)?),
            target_port: u16::from_be_bytes(array(body, 2)?),
        },
        protocol,
        payload: body.get(header..)?,
        checksum_ok,
    })
}

fn ethernet(out: &mut [u8], target: Mac, source: Mac, kind: [u8; 2]) {
    out[0..6].copy_from_slice(&target.0);
    out[6..12].copy_from_slice(&source.0);
    out[12..14].copy_from_slice(&kind);
}

/// Writes an ARP frame: a request for `target` if `to` is `None`, the answer to `to` otherwise. Its length, [`ARP_LEN`].
///
/// # Panics
/// If `out` is shorter than that.
pub fn arp(out: &mut [u8], mac: Mac, ip: Ipv4, target: Ipv4, to: Option<Mac>) -> usize {
    ethernet(out, to.unwrap_or(Mac::BROADCAST), mac, TYPE_ARP);
    out[14..20].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
    out[20..22].copy_from_slice(&[0, if to.is_some() { 2 } else { 1 }]);
    out[22..28].copy_from_slice(&mac.0);
    out[28..32].copy_from_slice(&ip);
    out[32..38].copy_from_slice(&to.map_or([0; 6], |mac| mac.0));
    out[38..42].copy_from_slice(&target);
    ARP_LEN
}

/// Writes the headers of a datagram around a payload of `payload` bytes that is in `out` behind
/// [`Protocol::overhead`] already, and its checksum: complete, or with `partial` the sum over the pseudo header only
/// (VirtIO 1.3, 5.1.6.2). The length of the frame.
///
/// # Panics
/// If `out` is too short, or the packet longer than IPv4 allows.
pub fn datagram(out: &mut [u8], flow: &Flow, protocol: Protocol, payload: usize, partial: bool) -> usize {
    let len = protocol.overhead() + payload;
    let (packet_len, body_len) = (len - ETHERNET, len - L4_OFFSET);
    assert!(packet_len <= 0xffff, "a packet has at most 65535 bytes");
    ethernet(out, flow.target_mac, flow.source_mac, TYPE_IPV4);
    let (ip, body) = out[ETHERNET..len].split_at_mut(IPV4);
    ip[0..4].copy_from_slice(&[0x45, 0, (packet_len >> 8) as u8, packet_len as u8]);
    // Do not fragment, 64 hops.
    ip[4..12].copy_from_slice(&[0, 0, 0x40, 0, 64, protocol.number(), 0, 0]);
    ip[12..16].copy_from_slice(&flow.source);
    ip[16..20].copy_from_slice(&flow.target);
    let checksum = !fold(sum(ip, 0));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());

    body[0..2].copy_from_slice(&flow.source_port.to_be_bytes());
    body[2..4].copy_from_slice(&flow.target_port.to_be_bytes());
    match protocol {
        Protocol::Udp => {
            body[4..6].copy_from_slice(&(body_len as u16).to_be_bytes());
            body[6..8].fill(0);
        }
        Protocol::Tcp | Protocol::TcpSyn => {
            body[4..12].fill(0);
            // SYN, or ACK and PSH.
            let flags = if protocol == Protocol::TcpSyn { 0x02 } else { 0x18 };
            // Header length 5 words; a window.
            body[12..20].copy_from_slice(&[0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        }
    }
    let pseudo = pseudo_header(flow.source, flow.target, protocol.number(), body_len);
    let checksum = if partial {
        fold(pseudo)
    } else {
        // For UDP zero would mean "none".
        match !fold(sum(body, pseudo)) {
            0 => 0xffff,
            checksum => checksum,
        }
    };
    let at = protocol.checksum_offset();
    body[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    len
}

/// Turns a frame that [`parse`] called [`Received::Ping`] into its answer.
///
/// # Panics
/// If it is something else and shorter than such a frame.
pub fn answer_ping(frame: &mut [u8], own: Mac) {
    let asker = Mac(frame[6..12].try_into().unwrap_or([0; 6]));
    ethernet(frame, asker, own, TYPE_IPV4);
    swap(frame, ETHERNET + 12, ETHERNET + 16, 4);
    let total = usize::from(u16::from_be_bytes([frame[16], frame[17]])) + ETHERNET;
    let message = &mut frame[L4_OFFSET..total];
    message[0] = 0;
    message[2..4].fill(0);
    let checksum = !fold(sum(message, 0));
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
}

fn swap(bytes: &mut [u8], a: usize, b: usize, len: usize) {
    for offset in 0..len {
        bytes.swap(a + offset, b + offset);
    }
}

impl Flow {
    /// The way back, `own` being the receiver's Ethernet address.
    #[must_use]
    pub fn reversed(&self, own: Mac) -> Self {
        Self {
            source_mac: own,
            target_mac: self.source_mac,
            source: self.target,
            target: self.source,
            source_port: self.target_port,
            target_port: self.source_port,
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    const A: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const B: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn flow() -> Flow {
        Flow {
            source_mac: A,
            target_mac: B,
            source: [10, 0, 0, 1],
            target: [10, 0, 0, 2],
            source_port: 1234,
            target_port: 9000,
        }
    }

    #[test]
    fn a_known_checksum() {
        // The example of RFC 1071, section 3.
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0)), 0xddf2);
    }

    #[test]
    fn arp_both_ways() {
        let mut frame = [0; ARP_LEN];
        arp(&mut frame, A, [10, 0, 0, 1], [10, 0, 0, 2], None);
        assert_eq!(frame[0..6], [0xff; 6]);
        assert_eq!(
            parse(&frame, false),
            Received::ArpRequest { mac: A, ip: [10, 0, 0, 1], target: [10, 0, 0, 2] }
        );
        arp(&mut frame, B, [10, 0, 0, 2], [10, 0, 0, 1], Some(A));
        assert_eq!(parse(&frame, false), Received::ArpReply { mac: B, ip: [10, 0, 0, 2] });
    }

    #[test]
    fn a_ping_is_answered() {
        let mut frame = vec![0u8; L4_OFFSET + 8 + 5];
        ethernet(&mut frame, B, A, TYPE_IPV4);
        let len = (frame.len() - ETHERNET) as u8;
        frame[14..34]
            .copy_from_slice(&[0x45, 0, 0, len, 0, 0, 0x40, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let checksum = !fold(sum(&frame[14..34], 0));
        frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        frame[34..].copy_from_slice(&[8, 0, 0, 0, 0, 7, 0, 1, 1, 2, 3, 4, 5]);
        let checksum = !fold(sum(&frame[34..], 0));
        frame[36..38].copy_from_slice(&checksum.to_be_bytes());
        assert_eq!(parse(&frame, false), Received::Ping { target: [10, 0, 0, 2] });
        answer_ping(&mut frame, B);
        assert_eq!(frame[0..12], [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
        assert_eq!(frame[34], 0);
        assert_eq!(fold(sum(&frame[14..34], 0)), 0xffff);
        assert_eq!(fold(sum(&frame[34..], 0)), 0xffff);
    }

    #[test]
    fn a_connection_is_opened_by_a_syn_without_payload() {
        let mut frame = vec![0u8; TCP_OVERHEAD];
        assert_eq!(datagram(&mut frame, &flow(), Protocol::TcpSyn, 0, false), TCP_OVERHEAD);
        // The control bits (RFC 9293 section 3.1).
        assert_eq!(frame[L4_OFFSET + 13], 2);
        let Received::Datagram { protocol: Protocol::Tcp, payload, checksum_ok: true, .. } =
            parse(&frame, false)
        else {
            panic!("{frame:?}")
        };
        assert!(payload.is_empty());
    }

    proptest! {
        #[test]
        fn datagrams_round_trip(payload in proptest::collection::vec(any::<u8>(), 0..1500), tcp: bool, partial: bool, pad in 0usize..20) {
            let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
            let mut frame = vec![0u8; protocol.overhead() + payload.len() + pad];
            frame[protocol.overhead()..][..payload.len()].copy_from_slice(&payload);
            let len = datagram(&mut frame, &flow(), protocol, payload.len(), partial);
            prop_assert_eq!(len + pad, frame.len());
            match parse(&frame, partial) {
                Received::Datagram { flow: got, protocol: p, payload: body, checksum_ok } => {
                    prop_assert_eq!(got, flow());
                    prop_assert_eq!(p, protocol);
                    prop_assert_eq!(body, &payload[..]);
                    prop_assert!(checksum_ok);
                }
                other => prop_assert!(false, "{:?}", other),
            }
            if !partial && !payload.is_empty() {
                frame[len - 1] ^= 0x10;
                let damaged = matches!(parse(&frame, false), Received::Datagram { checksum_ok: false, .. });
                prop_assert!(damaged);
            }
        }

        #[test]
        fn anything_parses(bytes: Vec<u8>) {
            let _ = parse(&bytes, false);
        }

        #[test]
        fn anything_that_starts_well_parses(rest in proptest::collection::vec(any::<u8>(), 0..80), arp: bool, trust: bool) {
            let mut frame = vec![2u8; 12];
            frame.extend(if arp { [8, 6, 0, 1, 8, 0, 6, 4] } else { [8, 0, 0x45, 0, 0, 60, 0, 0] });
            frame.extend(rest);
            let _ = parse(&frame, trust);
        }
    }
}
