//! `struct virtio_net_hdr` (VirtIO 1.3 section 5.1.6), as on the ring and on a TAP with IFF_VNET_HDR.

use super::offload::{Offloads, TcpKind};

/// Length of the header in bytes, with `num_buffers`: as it always is with VIRTIO_F_VERSION_1, without which the card's
/// runtime starts no queue, and on our TAPs.
pub const LEN: usize = 12;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM: the checksum from `csum_start` on is to be completed.
pub const F_NEEDS_CSUM: u8 = 1;
/// VIRTIO_NET_HDR_F_DATA_VALID: the device has verified the checksum.
pub const F_DATA_VALID: u8 = 2;
/// VIRTIO_NET_HDR_GSO_NONE.
pub const GSO_NONE: u8 = 0;
/// VIRTIO_NET_HDR_GSO_TCPV4.
pub const GSO_TCPV4: u8 = 1;
/// VIRTIO_NET_HDR_GSO_TCPV6.
pub const GSO_TCPV6: u8 = 4;

/// The header's fields, in host byte order. Nothing is checked: see [`super::offload`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    /// `F_*`.
    pub flags: u8,
    /// `GSO_*`.
    pub gso_type: u8,
    /// Bytes of headers in front of the TCP payload; a hint.
    pub hdr_len: u16,
    /// Payload bytes per segment.
    pub gso_size: u16,
    /// Where the checksummed bytes begin, from the start of the frame.
    pub csum_start: u16,
    /// Where the checksum is put, from `csum_start`.
    pub csum_offset: u16,
    /// Receive buffers the frame takes.
    pub num_buffers: u16,
}

impl VnetHeader {
    /// The header that says `offloads`, for a frame in one buffer.
    pub fn of(offloads: &Offloads) -> Self {
        let mut h = Self { num_buffers: 1, ..Self::default() };
        if let Some(c) = offloads.csum {
            h.flags = F_NEEDS_CSUM;
            (h.csum_start, h.csum_offset) = (c.start, c.offset);
        } else if offloads.verified {
            h.flags = F_DATA_VALID;
        }
        if let Some(g) = offloads.gso {
            h.gso_type = match g.kind {
                TcpKind::V4 => GSO_TCPV4,
                TcpKind::V6 => GSO_TCPV6,
            };
            (h.hdr_len, h.gso_size) = (g.headers, g.mss);
        }
        h
    }

    /// Reads a sender's header; its `num_buffers` means nothing and is left 0.
    pub fn from_bytes(b: &[u8; LEN]) -> Self {
        let [flags, gso_type, a, b, c, d, e, f, g, h, _, _] = *b;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([a, b]),
            gso_size: u16::from_le_bytes([c, d]),
            csum_start: u16::from_le_bytes([e, f]),
            csum_offset: u16::from_le_bytes([g, h]),
            num_buffers: 0,
        }
    }

    /// The header as bytes.
    pub fn to_bytes(self) -> [u8; LEN] {
        let mut b = [0; LEN];
        b[0] = self.flags;
        b[1] = self.gso_type;
        let fields = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (to, value) in b[2..].chunks_exact_mut(2).zip(fields) {
            to.copy_from_slice(&value.to_le_bytes());
        }
        b
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_back() {
        let h = VnetHeader {
            flags: F_NEEDS_CSUM,
            gso_type: GSO_TCPV6,
            hdr_len: 74,
            gso_size: 1440,
            csum_start: 54,
            csum_offset: 16,
            num_buffers: 0,
        };
        let b = h.to_bytes();
        assert_eq!(b, [1, 4, 74, 0, 0xa0, 5, 54, 0, 16, 0, 0, 0]);
        assert_eq!(VnetHeader::from_bytes(&b), h);
    }
}
