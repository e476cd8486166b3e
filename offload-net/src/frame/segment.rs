//! Software segmentation and checksums, for receivers that did not negotiate the offload the sender used.

#![cfg_attr(
    not(test),
    expect(
        clippy::indexing_slicing,
        reason = "what `offload::check` has let pass, and nothing else comes here, lies in the head; fuzzed as `frame`"
    )
)]

use super::checksum::Sum;
use super::offload::{Gso, Offloads, PartialCsum, TcpKind};
use super::{Bytes, Frame, HEAD_MAX};

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;
const PROTO_TCP: u16 = 6;

/// Room for the head of a frame we change.
pub type HeadBuf = [u8; HEAD_MAX];

/// Cuts a TCP super-frame into frames of at most the MSS, each with a partial checksum of its own.
#[derive(Debug)]
pub struct Segments<'a> {
    frame: Frame<'a>,
    gso: Gso,
    /// Payload bytes handed out so far.
    done: usize,
    index: u16,
}

impl<'a> Segments<'a> {
    /// `gso` is the frame's own, checked by [`super::offload::check`].
    pub fn new(frame: Frame<'a>, gso: Gso) -> Self {
        Self { frame, gso, done: 0, index: 0 }
    }

    /// The next segment, its head written into `buf`.
    pub fn next<'b>(&mut self, buf: &'b mut HeadBuf) -> Option<Frame<'b>>
    where
        'a: 'b,
    {
        let headers = usize::from(self.gso.headers);
        let in_head = self.frame.head.get(headers..)?;
        let payload = in_head.len() + self.frame.tail_bytes.len;
        let n = (payload - self.done).min(usize::from(self.gso.mss));
        if n == 0 {
            return None;
        }
        let (first, last) = (self.done == 0, self.done + n == payload);

        // The payload's beginning may lie in the head that was copied, the rest in the tail.
        buf[..headers].copy_from_slice(&self.frame.head[..headers]);
        let from_head = in_head.get(self.done..).unwrap_or_default();
        let from_head = &from_head[..from_head.len().min(n)];
        let head_len = headers + from_head.len();
        buf[headers..head_len].copy_from_slice(from_head);
        let tail_bytes = Bytes {
            start: self.frame.tail_bytes.start + (self.done + from_head.len()).saturating_sub(in_head.len()),
            len: n - from_head.len(),
        };

        self.write_ip(buf, n);
        self.write_tcp(buf, n, first, last);
        self.done += n;
        self.index = self.index.wrapping_add(1);
        let csum = Some(PartialCsum { start: self.gso.l4, offset: 16 });
        Some(Frame {
            head: &buf[..head_len],
            tail: self.frame.tail,
            tail_bytes,
            offloads: Offloads { csum, gso: None, verified: false },
        })
    }

    /// Length fields, and for IPv4 identification and header checksum (RFC 791, RFC 8200 section 3).
    fn write_ip(&self, buf: &mut HeadBuf, n: usize) {
        let (l3, l4) = (usize::from(self.gso.l3), usize::from(self.gso.l4));
        let ip_len = usize::from(self.gso.headers) - l3 + n;
        match self.gso.kind {
            TcpKind::V4 => {
                put16(buf, l3 + 2, ip_len as u16);
                put16(buf, l3 + 4, get16(buf, l3 + 4).wrapping_add(self.index));
                put16(buf, l3 + 10, 0);
                let mut sum = Sum::new();
                sum.add(&buf[l3..l4]);
                put16(buf, l3 + 10, sum.finish());
            }
            TcpKind::V6 => put16(buf, l3 + 4, (ip_len - 40) as u16),
        }
    }

    /// Sequence number, flags that belong to the first or last segment only, and the sum of the pseudo-header.
    fn write_tcp(&self, buf: &mut HeadBuf, n: usize, first: bool, last: bool) {
        let (l3, l4) = (usize::from(self.gso.l3), usize::from(self.gso.l4));
        let seq = u32::from(get16(buf, l4 + 4)) << 16 | u32::from(get16(buf, l4 + 6));
        // A super-frame is shorter than 2^32.
        let seq = seq.wrapping_add(self.done as u32);
        buf[l4 + 4..l4 + 8].copy_from_slice(&seq.to_be_bytes());
        if !last {
            buf[l4 + 13] &= !(TCP_FIN | TCP_PSH);
        }
        if !first {
            buf[l4 + 13] &= !TCP_CWR;
        }
        let mut sum = Sum::new();
        let addresses = match self.gso.kind {
            TcpKind::V4 => l3 + 12..l3 + 20,
            TcpKind::V6 => l3 + 8..l3 + 40,
        };
        sum.add(&buf[addresses]);
        sum.add_u16(PROTO_TCP);
        sum.add_u16((usize::from(self.gso.headers) - l4 + n) as u16);
        put16(buf, l4 + 16, sum.fold());
    }
}

/// Completes a partial checksum in software; the changed head is written into `buf`. A frame without one is returned
/// as it is.
pub fn complete_csum<'b>(frame: Frame<'b>, buf: &'b mut HeadBuf) -> Frame<'b> {
    let Some(c) = frame.offloads.csum else { return frame };
    let (start, field) = (usize::from(c.start), usize::from(c.start) + usize::from(c.offset));
    let mut sum = Sum::new();
    sum.add(&frame.head[start..]);
    sum.add_memory(frame.tail, frame.tail_bytes);
    let head = &mut buf[..frame.head.len()];
    head.copy_from_slice(frame.head);
    // Zero means "no checksum" to UDP; its other representation is the same number to everyone else.
    let value = match sum.finish() {
        0 => 0xffff,
        v => v,
    };
    head[field..field + 2].copy_from_slice(&value.to_be_bytes());
    Frame { head, offloads: Offloads { csum: None, ..frame.offloads }, ..frame }
}

fn get16(buf: &HeadBuf, at: usize) -> u16 {
    u16::from_be_bytes([buf[at], buf[at + 1]])
}

fn put16(buf: &mut HeadBuf, at: usize, value: u16) {
    buf[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use vm_memory::VolatileSlice;

    use super::super::Memory;
    use super::super::header::{F_NEEDS_CSUM, GSO_TCPV4, GSO_TCPV6, VnetHeader};
    use super::super::offload::{self, Allowed};
    use super::*;

    /// A TCP/IPv4 frame with 12 bytes of options and `payload` bytes, its checksum partial.
    pub(crate) fn tcp4_frame(payload: usize) -> Vec<u8> {
        let mut f = vec![0x52, 0x54, 0, 0, 0, 2, 0x52, 0x54, 0, 0, 0, 1, 8, 0];
        f.extend([0x45, 0]);
        f.extend(((52 + payload) as u16).to_be_bytes());
        f.extend([0xff, 0xff, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        f.extend([0x1f, 0x90, 0x00, 0x50, 0xff, 0xff, 0xff, 0x00, 0, 0, 0, 1, 0x80, 0x99, 1, 0, 0, 0, 0, 0]);
        f.extend([1; 12]);
        f.extend((0..payload).map(|i| (i * 7) as u8));
        f
    }

    fn tcp6_frame(payload: usize) -> Vec<u8> {
        let v4 = tcp4_frame(payload);
        let mut f = v4[..12].to_vec();
        f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        f.extend(((32 + payload) as u16).to_be_bytes());
        f.extend([6, 64]);
        f.extend([0xfd; 16]);
        f.extend([0xfc; 16]);
        f.extend(&v4[34..]);
        f
    }

    pub(crate) fn tcp_header(mss: u16) -> VnetHeader {
        VnetHeader {
            flags: F_NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: 66,
            gso_size: mss,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0,
        }
    }

    fn flatten(f: &Frame<'_>) -> Vec<u8> {
        let mut v = f.head.to_vec();
        let mut tail = vec![0; f.tail_bytes.len];
        assert_eq!(f.tail.copy_out(f.tail_bytes.start, &mut tail), tail.len());
        v.extend(tail);
        v
    }

    /// Cuts `bytes`, completes every checksum and returns the finished frames.
    fn cut(bytes: &mut [u8], h: &VnetHeader, pieces: usize) -> Vec<Vec<u8>> {
        let mtu = 1500;
        let mut head = [0; HEAD_MAX];
        let len = bytes.len();
        let mut rest = bytes;
        let mut slices = Vec::new();
        while !rest.is_empty() {
            let (a, b) = rest.split_at_mut(pieces.min(rest.len()));
            slices.push(VolatileSlice::from(a));
            rest = b;
        }
        let n = Memory::Host(&slices).copy_out(0, &mut head);
        let offloads = offload::check(h, &head[..n], len, mtu, Allowed::HOST).unwrap();
        let tail_bytes = Bytes { start: n, len: len - n };
        let frame = Frame { head: &head[..n], tail: Memory::Host(&slices), tail_bytes, offloads };
        let mut segments = Segments::new(frame, offloads.gso.unwrap());
        let mut out = Vec::new();
        loop {
            let (mut a, mut b) = ([0; HEAD_MAX], [0; HEAD_MAX]);
            let Some(s) = segments.next(&mut a) else { return out };
            out.push(flatten(&complete_csum(s, &mut b)));
        }
    }

    fn tcp_checksum_holds(f: &[u8], v6: bool) -> bool {
        let (l4, addresses) = if v6 { (54, 22..54) } else { (34, 26..34) };
        let mut s = Sum::new();
        s.add(&f[addresses]);
        s.add_u16(PROTO_TCP);
        s.add_u16((f.len() - l4) as u16);
        s.add(&f[l4..]);
        s.fold() == 0xffff
    }

    #[test]
    fn segments_are_whole_tcp_over_ipv4() {
        let original = tcp4_frame(4000);
        let out = cut(&mut original.clone(), &tcp_header(1448), 777);
        assert_eq!(out.iter().map(Vec::len).collect::<Vec<_>>(), [1514, 1514, 66 + 1104]);
        let mut payload: Vec<u8> = Vec::new();
        for (i, f) in out.iter().enumerate() {
            assert!(tcp_checksum_holds(f, false), "segment {i}");
            let mut ip = Sum::new();
            ip.add(&f[14..34]);
            assert_eq!(ip.fold(), 0xffff, "IPv4 header checksum of segment {i}");
            assert_eq!(usize::from(u16::from_be_bytes([f[16], f[17]])), f.len() - 14);
            assert_eq!(u16::from_be_bytes([f[18], f[19]]), 0xffff_u16.wrapping_add(i as u16));
            let seq = u32::from_be_bytes(f[38..42].try_into().unwrap());
            assert_eq!(seq, 0xffff_ff00_u32.wrapping_add(1448 * i as u32));
            payload.extend(&f[66..]);
        }
        assert_eq!(payload, original[66..]);
        // CWR on the first, FIN and PSH on the last only; ACK on all.
        assert_eq!(out.iter().map(|f| f[47]).collect::<Vec<_>>(), [0x90, 0x10, 0x19]);
    }

    #[test]
    fn segments_are_whole_tcp_over_ipv6() {
        let original = tcp6_frame(3000);
        let h = VnetHeader { gso_type: GSO_TCPV6, csum_start: 54, ..tcp_header(1400) };
        let out = cut(&mut original.clone(), &h, 100);
        assert_eq!(out.len(), 3);
        assert!(out.iter().all(|f| tcp_checksum_holds(f, true)));
        assert!(out.iter().all(|f| usize::from(u16::from_be_bytes([f[18], f[19]])) == f.len() - 54));
        assert_eq!(out.iter().flat_map(|f| f[86..].to_vec()).collect::<Vec<_>>(), original[86..]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_whatever_the_sizes(payload in 1..20_000_usize, mss in 48..1434_u16, pieces in 1..3000_usize) {
            let original = tcp4_frame(payload);
            let out = cut(&mut original.clone(), &tcp_header(mss), pieces);
            prop_assert_eq!(out.len(), payload.div_ceil(usize::from(mss)));
            prop_assert!(out.iter().all(|f| tcp_checksum_holds(f, false)));
            prop_assert_eq!(out.iter().flat_map(|f| f[66..].to_vec()).collect::<Vec<_>>(), &original[66..]);
        }
    }
}
