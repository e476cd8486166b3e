//! A device's transmit queue: frames are taken from the guest, copied as far as decisions depend on them, and checked.

use offload_card::ring::{Chain, Ring, RingState};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6};

use crate::frame::header::{LEN, VnetHeader};
use crate::frame::offload::{self, Allowed, Malformed};
use crate::frame::{Bytes, Frame, HEAD_MAX, Memory};

/// Longest chain we look at. Drivers use about 20 descriptors.
const DESCRIPTORS_MAX: u16 = 1024;

/// A started transmit queue.
pub struct TxQueue {
    /// The ring.
    pub ring: Ring,
    /// What was popped last. It is taken out while its frame is forwarded, and put back: the ring's own memory goes
    /// with the ring.
    pub chain: Chain,
    /// The thread will look at the ring in its next turn.
    pub active: bool,
    /// The offloads its driver may use.
    pub allowed: Allowed,
}

/// The offloads a driver may use, from the features it negotiated.
fn allowed(features: u64) -> Allowed {
    let has = |bit: u32| features & 1 << bit != 0;
    let csum = has(VIRTIO_NET_F_CSUM);
    Allowed {
        csum,
        tso4: csum && has(VIRTIO_NET_F_HOST_TSO4),
        tso6: csum && has(VIRTIO_NET_F_HOST_TSO6),
        verified: false,
    }
}

/// Room for the vnet header and the head of a frame.
pub type TxHead = [u8; LEN + HEAD_MAX];

/// That room, empty.
pub fn empty_head() -> TxHead {
    [0; LEN + HEAD_MAX]
}

impl TxQueue {
    /// Takes over a ring. It is looked at in the next turn: frames may be waiting.
    pub fn new(mut ring: Ring) -> Self {
        ring.disable_kicks();
        ring.limit_chains(DESCRIPTORS_MAX);
        ring.look_ahead();
        Self { chain: Chain::new(), active: true, allowed: allowed(ring.features()), ring }
    }

    /// Gives the ring back.
    pub fn stop(self) -> RingState {
        self.ring.stop()
    }
}

/// Copies and checks the frame in `chain`.
///
/// # Errors
/// Why it is to be dropped.
pub fn parse<'a>(
    chain: &'a Chain,
    buf: &'a mut TxHead,
    allowed: Allowed,
    mtu: usize,
) -> Result<Frame<'a>, Malformed> {
    let total = chain.readable_len() as usize;
    let in_head = chain.read_at(0, &mut buf[..]);
    // A guest that wants something written to a transmit buffer does not know what it is doing.
    if in_head <= LEN || chain.writable_len() != 0 {
        return Err(Malformed::Length(total.saturating_sub(LEN)));
    }
    let Some((header, head)) = buf.get(..in_head).and_then(<[u8]>::split_first_chunk) else {
        return Err(Malformed::Length(0));
    };
    let header = VnetHeader::from_bytes(header);
    let offloads = offload::check(&header, head, total - LEN, mtu, allowed)?;
    let tail_bytes = Bytes { start: in_head, len: total - in_head };
    Ok(Frame { head, tail: Memory::Guest(chain), tail_bytes, offloads })
}
