//! What a sender leaves for the device to do (VirtIO 1.3 section 5.1.6.2), checked against the frame it comes with.
//!
//! A guest writes every field of the vnet header. Whatever reaches [`Offloads`] is true of the frame: later code may
//! index by it without asking again.

use super::header::{F_DATA_VALID, F_NEEDS_CSUM, GSO_NONE, GSO_TCPV4, GSO_TCPV6, VnetHeader};
use super::{ETH_HEADER, ETH_OVERHEAD, FRAME_MAX};

/// VIRTIO_NET_HDR_GSO_ECN: the TCP segment has the CWR bit; kept as it is.
const GSO_ECN: u8 = 0x80;
/// Smallest segment payload we cut: Linux sends none below (TCP_MIN_SND_MSS), and each segment costs the receiver a
/// buffer.
pub const MSS_MIN: u16 = 48;
const TCP_CSUM_OFFSET: u16 = 16;
const PROTO_TCP: u8 = 6;

/// A checksum to be completed: ones' complement sum of everything from `start` to the end of the frame, put at
/// `start + offset`. Both bytes of the field lie in the frame's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartialCsum {
    /// First byte summed, from the start of the frame.
    pub start: u16,
    /// Place of the checksum, from `start`.
    pub offset: u16,
}

/// Which TCP the segments are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcpKind {
    /// TCP over IPv4.
    V4,
    /// TCP over IPv6.
    V6,
}

/// A TCP super-frame to be cut into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gso {
    /// Over IPv4 or IPv6.
    pub kind: TcpKind,
    /// Payload bytes per segment, at least [`MSS_MIN`].
    pub mss: u16,
    /// Where the IP header begins.
    pub l3: u16,
    /// Where the TCP header begins; equals the partial checksum's `start`.
    pub l4: u16,
    /// Length of all headers; all of them lie in the frame's head, and payload follows.
    pub headers: u16,
}

/// The work left on a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Checksum to complete.
    pub csum: Option<PartialCsum>,
    /// Segments to cut; implies `csum`.
    pub gso: Option<Gso>,
    /// The host has verified the checksum.
    pub verified: bool,
}

/// Which offloads a sender may use: those it negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Allowed {
    /// Partial checksums.
    pub csum: bool,
    /// TCP over IPv4 super-frames.
    pub tso4: bool,
    /// TCP over IPv6 super-frames.
    pub tso6: bool,
    /// It may say that it has verified checksums: the host may, a guest may not.
    pub verified: bool,
}

impl Allowed {
    /// Everything: the host kernel behind a TAP.
    pub const HOST: Self = Self { csum: true, tso4: true, tso6: true, verified: true };
}

/// Why a frame was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Shorter than an Ethernet header, or longer than any frame.
    #[error("frame of {0} bytes")]
    Length(usize),
    /// Not a super-frame and longer than the MTU allows.
    #[error("frame of {0} bytes is over the MTU")]
    OverMtu(usize),
    /// An offload that was not negotiated, or none that exists.
    #[error("offload not negotiated")]
    NotNegotiated,
    /// The checksum field lies outside the frame or its headers.
    #[error("partial checksum out of range")]
    Csum,
    /// A super-frame that is not the TCP it claims to be.
    #[error("malformed super-frame")]
    Gso,
}

/// Checks a header against the frame: `head` is its first bytes, `len` its length in all, `mtu` the network's.
///
/// # Errors
/// [`Malformed`]; the frame is to be dropped.
pub fn check(
    h: &VnetHeader,
    head: &[u8],
    len: usize,
    mtu: usize,
    allowed: Allowed,
) -> Result<Offloads, Malformed> {
    if !(ETH_HEADER..=FRAME_MAX).contains(&len) || head.len() < ETH_HEADER || head.len() > len {
        return Err(Malformed::Length(len));
    }
    let mut offloads =
        Offloads { verified: allowed.verified && h.flags & F_DATA_VALID != 0, ..Default::default() };
    if h.flags & F_NEEDS_CSUM != 0 {
        if !allowed.csum {
            return Err(Malformed::NotNegotiated);
        }
        let field = usize::from(h.csum_start) + usize::from(h.csum_offset);
        // A field that the summed range does not include would be overwritten without being part of the sum.
        if usize::from(h.csum_start) < ETH_HEADER || field + 2 > head.len() {
            return Err(Malformed::Csum);
        }
        offloads.csum = Some(PartialCsum { start: h.csum_start, offset: h.csum_offset });
    }
    let kind = match h.gso_type & !GSO_ECN {
        GSO_NONE if h.gso_type & GSO_ECN == 0 => {
            return if len > mtu + ETH_OVERHEAD { Err(Malformed::OverMtu(len)) } else { Ok(offloads) };
        }
        GSO_TCPV4 if allowed.tso4 => TcpKind::V4,
        GSO_TCPV6 if allowed.tso6 => TcpKind::V6,
        _ => return Err(Malformed::NotNegotiated),
    };
    let gso = check_gso(h, head, len, kind).ok_or(Malformed::Gso)?;
    if usize::from(gso.headers) + usize::from(gso.mss) > mtu + ETH_OVERHEAD {
        return Err(Malformed::OverMtu(usize::from(gso.headers) + usize::from(gso.mss)));
    }
    // Without NEEDS_CSUM the TCP checksum would be of no segment.
    if offloads.csum != Some(PartialCsum { start: gso.l4, offset: TCP_CSUM_OFFSET }) {
        return Err(Malformed::Gso);
    }
    offloads.gso = Some(gso);
    Ok(offloads)
}

/// Walks the headers of a super-frame. `None`: they are not what the vnet header says, or not all in `head`.
fn check_gso(h: &VnetHeader, head: &[u8], len: usize, kind: TcpKind) -> Option<Gso> {
    if h.gso_size < MSS_MIN {
        return None;
    }
    let (ethertype, l3) = ethertype(head)?;
    let l4 = match (kind, ethertype) {
        (TcpKind::V4, 0x0800) => ipv4_tcp(head, l3)?,
        (TcpKind::V6, 0x86dd) => ipv6_tcp(head, l3)?,
        _ => return None,
    };
    let tcp_len = usize::from(head.get(l4 + 12)? >> 4) * 4;
    let headers = l4 + tcp_len;
    if tcp_len < 20 || headers > head.len() || headers >= len {
        return None;
    }
    Some(Gso {
        kind,
        mss: h.gso_size,
        l3: l3.try_into().ok()?,
        l4: l4.try_into().ok()?,
        headers: headers.try_into().ok()?,
    })
}

/// The EtherType behind at most one VLAN tag, and where the payload begins.
pub fn ethertype(head: &[u8]) -> Option<(u16, usize)> {
    let at = |i: usize| Some(u16::from_be_bytes([*head.get(i)?, *head.get(i + 1)?]));
    match at(12)? {
        0x8100 => Some((at(16)?, 18)),
        t => Some((t, 14)),
    }
}

fn ipv4_tcp(head: &[u8], l3: usize) -> Option<usize> {
    let first = *head.get(l3)?;
    let ihl = usize::from(first & 0xf) * 4;
    (first >> 4 == 4 && ihl >= 20 && *head.get(l3 + 9)? == PROTO_TCP).then_some(l3 + ihl)
}

fn ipv6_tcp(head: &[u8], l3: usize) -> Option<usize> {
    if head.get(l3)? >> 4 != 6 {
        return None;
    }
    let (mut next, mut at) = (*head.get(l3 + 6)?, l3 + 40);
    loop {
        match next {
            PROTO_TCP => return Some(at),
            // Hop-by-hop, routing, destination options: next header, length in units of 8 beyond the first 8. Each
            // round goes at least 8 bytes on, so the end of `head` ends the loop.
            0 | 43 | 60 => {
                next = *head.get(at)?;
                at += (usize::from(*head.get(at + 1)?) + 1) * 8;
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::HEAD_MAX;
    use super::super::segment::tests::{tcp_header, tcp4_frame};
    use super::*;

    const ALL: Allowed = Allowed { csum: true, tso4: true, tso6: true, verified: false };

    #[test]
    fn a_plain_frame_has_nothing_left_to_do() {
        let f = [0_u8; 60];
        assert_eq!(check(&VnetHeader::default(), &f, 60, 1500, Allowed::default()), Ok(Offloads::default()));
    }

    #[test]
    fn a_super_frame_is_understood() {
        let f = tcp4_frame(4000);
        let o = check(&tcp_header(1448), &f[..HEAD_MAX], f.len(), 1500, ALL).unwrap();
        assert_eq!(o.gso, Some(Gso { kind: TcpKind::V4, mss: 1448, l3: 14, l4: 34, headers: 66 }));
        assert_eq!(o.csum, Some(PartialCsum { start: 34, offset: 16 }));
    }

    #[test]
    fn what_a_hostile_guest_writes_is_refused() {
        let f = tcp4_frame(4000);
        let with = |edit: fn(&mut VnetHeader)| {
            let mut h = tcp_header(1448);
            edit(&mut h);
            check(&h, &f[..HEAD_MAX], f.len(), 1500, ALL)
        };
        assert_eq!(with(|h| h.gso_size = 0), Err(Malformed::Gso));
        assert_eq!(with(|h| h.gso_size = 65000), Err(Malformed::OverMtu(65066)));
        assert_eq!(with(|h| h.csum_start = 65000), Err(Malformed::Csum));
        assert_eq!(with(|h| h.csum_offset = 0xffff), Err(Malformed::Csum));
        assert_eq!(with(|h| h.csum_start = 0), Err(Malformed::Csum));
        assert_eq!(with(|h| h.flags = 0), Err(Malformed::Gso));
        assert_eq!(with(|h| h.gso_type = GSO_TCPV6), Err(Malformed::Gso));
        assert_eq!(with(|h| h.gso_type = 3), Err(Malformed::NotNegotiated));
        assert_eq!(with(|h| h.gso_type = GSO_NONE), Err(Malformed::OverMtu(4066)));
        let small = &f[..HEAD_MAX];
        assert_eq!(check(&VnetHeader::default(), &small[..13], 13, 1500, ALL), Err(Malformed::Length(13)));
        let mut wants_csum =
            VnetHeader { flags: F_NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..Default::default() };
        let none = Allowed::default();
        assert_eq!(check(&wants_csum, small, 256, 1500, none), Err(Malformed::NotNegotiated));
        wants_csum.csum_start = 239;
        assert_eq!(check(&wants_csum, small, 256, 1500, ALL), Err(Malformed::Csum));
    }

    #[test]
    fn a_guest_cannot_vouch_for_checksums() {
        let h = VnetHeader { flags: F_DATA_VALID, ..Default::default() };
        assert!(!check(&h, &[0; 60], 60, 1500, ALL).unwrap().verified);
        assert!(check(&h, &[0; 60], 60, 1500, Allowed::HOST).unwrap().verified);
    }

    proptest! {
        /// Whatever is accepted may be indexed by without a further check.
        #[test]
        fn accepted_offloads_are_inside_the_frame(
            head in prop::collection::vec(any::<u8>(), 0..HEAD_MAX),
            ethertype in prop::sample::select(vec![0x0800_u16, 0x86dd, 0x8100, 0x1234]),
            more in 0..70_000_usize,
            header: [u8; 12], mtu in 68..65_521_usize,
        ) {
            let mut head = head;
            if head.len() > 40 {
                head[12..14].copy_from_slice(&ethertype.to_be_bytes());
                head[14] = if ethertype == 0x0800 { 0x45 } else { 0x60 };
                head[23] = 6;
                head[20] = 6;
            }
            let h = VnetHeader::from_bytes(&header);
            let len = head.len() + more;
            if let Ok(o) = check(&h, &head, len, mtu, ALL) {
                if let Some(c) = o.csum {
                    prop_assert!(usize::from(c.start) + usize::from(c.offset) + 2 <= head.len());
                }
                if let Some(g) = o.gso {
                    prop_assert!(usize::from(g.headers) <= head.len() && usize::from(g.headers) < len);
                    prop_assert!(g.mss >= MSS_MIN && g.l3 < g.l4 && g.l4 + 20 <= g.headers);
                }
            }
        }
    }
}
