//! What smoltcp takes for a network device: a packet from the guest, and frames to it, in memory.

use smoltcp::phy::{self, Checksum, Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

use crate::frame::ETH_HEADER;
use crate::frame::checksum::Sum;
use crate::frame::packet::{TYPE_IPV4, TYPE_IPV6};
use crate::mac::MacAddr;

/// Most frames that wait to be sent. smoltcp keeps what does not fit, and sends it next time.
const FRAMES_MAX: usize = 64;
/// Hop limit of all that goes out: what is told to a guest is not for those for whom it forwards.
const HOP_LIMIT: u8 = 1;
const IPV4_HEADER: usize = 20;

/// Frames to a guest, one behind the other.
#[derive(Debug)]
pub struct Frames {
    to: MacAddr,
    from: MacAddr,
    bytes: Vec<u8>,
    /// Where each ends.
    ends: Vec<usize>,
}

impl Frames {
    /// None yet, and all of them from and to these.
    pub fn new(from: MacAddr, to: MacAddr) -> Self {
        Self { to, from, bytes: Vec::new(), ends: Vec::new() }
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Hands out all of them, in order.
    pub fn drain(&mut self, mut f: impl FnMut(&mut [u8])) {
        let mut start = 0;
        for end in self.ends.drain(..) {
            if let Some(frame) = self.bytes.get_mut(start..end) {
                f(frame);
            }
            start = end;
        }
        self.bytes.clear();
    }

    /// Adds a frame with an IP packet of this length, which `write` writes.
    fn add<R>(&mut self, length: usize, write: impl FnOnce(&mut [u8]) -> R) -> R {
        let start = self.bytes.len();
        self.bytes.resize(start + ETH_HEADER + length, 0);
        self.ends.push(self.bytes.len());
        // So long it has just been made.
        let frame = self.bytes.get_mut(start..).unwrap_or_default();
        let (header, packet) = frame.split_at_mut_checked(ETH_HEADER).unwrap_or_default();
        let result = write(packet);
        let ethertype = if packet.first().is_some_and(|b| b >> 4 == 6) { TYPE_IPV6 } else { TYPE_IPV4 };
        let fields = self.to.0.into_iter().chain(self.from.0).chain(ethertype.to_be_bytes());
        header.iter_mut().zip(fields).for_each(|(to, byte)| *to = byte);
        limit_hops(packet);
        result
    }
}

fn limit_hops(packet: &mut [u8]) {
    if let [0x60..=0x6f, _, _, _, _, _, _, hop_limit, ..] = packet {
        *hop_limit = HOP_LIMIT;
    // smoltcp sends no options.
    } else if let Some(header @ [0x45, ..]) = packet.first_chunk_mut::<IPV4_HEADER>() {
        (header[8], header[10], header[11]) = (HOP_LIMIT, 0, 0);
        let mut sum = Sum::new();
        sum.add(header);
        [header[10], header[11]] = sum.finish().to_be_bytes();
    }
}

/// A device with at most one packet in it.
#[derive(Debug)]
pub(super) struct Wire<'a> {
    pub(super) packet: Option<&'a [u8]>,
    pub(super) frames: &'a mut Frames,
    pub(super) mtu: usize,
}

impl Device for Wire<'_> {
    type RxToken<'b>
        = RxToken<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = TxToken<'b>
    where
        Self: 'b;

    fn receive(&mut self, now: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        let packet = self.packet.take()?;
        Some((RxToken(packet), self.transmit(now)?))
    }

    fn transmit(&mut self, _now: Instant) -> Option<TxToken<'_>> {
        (self.frames.ends.len() < FRAMES_MAX).then_some(TxToken(self.frames))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        // A guest leaves its checksums to the device, and what has come through memory needs none.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// The packet.
#[derive(Debug)]
pub(super) struct RxToken<'a>(&'a [u8]);

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for one more.
#[derive(Debug)]
pub(super) struct TxToken<'a>(&'a mut Frames);

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        self.0.add(length, f)
    }
}
