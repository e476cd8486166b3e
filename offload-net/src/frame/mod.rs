//! One Ethernet frame on its way through the switch.
//!
//! A frame's headers decide where it goes, and the sender may rewrite its buffers while we look. So the first
//! [`HEAD_MAX`] bytes are copied out once, checked, *and delivered from the copy*; only what no decision depends on (the
//! payload) is read from the sender's memory, straight into the receiver's:
//!
//! ```text
//!   sender's buffers   [ vnet header | eth ip tcp | payload .......... ]
//!                              │           │            │
//!                              ▼           ▼            │ the one copy
//!   Frame            offloads ◄─ head (copied) ◄ tail ──┤
//!                              │           │            ▼
//!   receiver's buffers [ vnet header | eth ip tcp | payload .......... ]
//! ```

pub mod checksum;
pub mod header;
pub mod offload;
pub mod packet;
pub mod segment;

use offload_card::ring::Chain;
use vm_memory::VolatileSlice;

use crate::mac::MacAddr;
use offload::Offloads;

/// Bytes of a frame that are copied before they are looked at: Ethernet with a VLAN tag, IPv6 with extension headers
/// and TCP with options fit, and so do small frames as a whole.
pub const HEAD_MAX: usize = 256;
/// Length of an Ethernet header.
pub const ETH_HEADER: usize = 14;
/// Ethernet header and a VLAN tag: what a frame may have beyond the MTU.
pub const ETH_OVERHEAD: usize = ETH_HEADER + 4;
/// Largest frame: a TCP super-frame of the largest IP packet.
pub const FRAME_MAX: usize = 65535 + ETH_OVERHEAD;

/// A range of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes {
    /// First byte.
    pub start: usize,
    /// Number of bytes.
    pub len: usize,
}

/// Where the bytes of a frame lie that were not copied.
#[derive(Debug, Clone, Copy)]
pub enum Memory<'a> {
    /// The readable part of a descriptor chain: memory that its guest may change at any time.
    Guest(&'a Chain),
    /// Memory of our own.
    Host(&'a [VolatileSlice<'a>]),
}

impl<'a> Memory<'a> {
    /// Calls `f` for each piece that lies in `range` of these bytes. What lies beyond the end is skipped.
    pub fn for_each(self, range: Bytes, f: impl FnMut(VolatileSlice<'a>)) {
        match self {
            Memory::Guest(chain) => each_part(chain.readable_slices(), range, f),
            Memory::Host(slices) => each_part(slices.iter().copied(), range, f),
        }
    }

    /// Copies bytes from `start` on into `to`; returns how many there were.
    pub fn copy_out(self, start: usize, to: &mut [u8]) -> usize {
        let mut done = 0;
        self.for_each(Bytes { start, len: to.len() }, |part| {
            if let Some(to) = to.get_mut(done..done + part.len()) {
                part.copy_to(to);
                done += part.len();
            }
        });
        done
    }
}

fn each_part<'a>(
    slices: impl Iterator<Item = VolatileSlice<'a>>,
    range: Bytes,
    mut f: impl FnMut(VolatileSlice<'a>),
) {
    let (mut skip, mut left) = (range.start, range.len);
    for s in slices {
        if left == 0 {
            return;
        }
        if skip >= s.len() {
            skip -= s.len();
            continue;
        }
        let n = (s.len() - skip).min(left);
        if let Ok(part) = s.subslice(skip, n) {
            f(part);
        }
        skip = 0;
        left -= n;
    }
}

/// A frame whose headers have been copied and checked.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// Its first bytes, at most [`HEAD_MAX`].
    pub head: &'a [u8],
    /// Where all that follows `head` is, in the sender's memory.
    pub tail: Memory<'a>,
    /// Which bytes of `tail` are the frame's.
    pub tail_bytes: Bytes,
    /// What the sender left to do.
    pub offloads: Offloads,
}

impl Frame<'_> {
    /// Bytes of the frame, without the vnet header.
    pub fn bytes(&self) -> usize {
        self.head.len() + self.tail_bytes.len
    }

    /// Packets and bytes that it is on a wire, where a super-frame goes as the segments it stands for.
    pub fn on_wire(&self) -> (u64, u64) {
        let bytes = self.bytes() as u64;
        let Some(gso) = self.offloads.gso else { return (1, bytes) };
        let headers = u64::from(gso.headers);
        let segments = bytes.saturating_sub(headers).div_ceil(u64::from(gso.mss.max(1))).max(1);
        (segments, bytes + (segments - 1) * headers)
    }

    /// Copies its bytes from `start` on into `to`; false if there are not so many.
    pub fn copy_out(&self, start: usize, to: &mut [u8]) -> bool {
        let in_head = self.head.get(start..).unwrap_or_default();
        let (first, rest) = to.split_at_mut(in_head.len().min(to.len()));
        first.iter_mut().zip(in_head).for_each(|(to, byte)| *to = *byte);
        let behind = start.saturating_sub(self.head.len());
        let there = rest.is_empty() || behind + rest.len() <= self.tail_bytes.len;
        there && self.tail.copy_out(self.tail_bytes.start + behind, rest) == rest.len()
    }

    /// Where it goes. `None`: too short to be a frame.
    pub fn destination(&self) -> Option<MacAddr> {
        self.head.first_chunk().copied().map(MacAddr)
    }

    /// Who says it sent it.
    pub fn source(&self) -> Option<MacAddr> {
        self.head.get(6..).and_then(<[u8]>::first_chunk).copied().map(MacAddr)
    }
}
