//! A network device: pairs of a receive and a transmit queue with fixed buffers.
//!
//! Descriptor n of a ring is buffer n; a buffer begins with the 12-byte `virtio_net_hdr` (5.1.6).

use crate::memory::Dma;
use crate::serial;
use crate::stage::Context;
use crate::virtio::{self, Health, Signals, Type};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::{Add, Range};
use guest::args;
use guest::frame::{L4_OFFSET, Mac, Protocol};
use guest::ring::{Descriptor, WRITE};

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;

/// Length of `virtio_net_hdr` with `num_buffers`.
const HEADER: usize = 12;
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
/// Largest frame either way: a super-frame.
const MAX_FRAME: usize = 65_536 + 18;
/// A receive buffer that takes any frame when buffers are not merged.
const WHOLE_FRAME: usize = HEADER + MAX_FRAME;
/// Receive buffers per ring; more is memory without use.
const RECEIVE_BUFFERS: u16 = 256;

/// What one direction counted.
#[derive(Default, Clone, Copy)]
pub(super) struct Bogus(pub(super) u64);

/// The receiving side of a pair.
pub(super) struct Receiver {
    queue: virtio::Queue,
    buffers: Dma,
    size: usize,
    count: u16,
    merge: bool,
    /// Buffers of the frame shown last, and others to be given back.
    used: Vec<u16>,
    scratch: Vec<u8>,
    pub(super) bogus: Bogus,
}

/// A received frame.
pub(super) struct Frame<'a> {
    pub(super) bytes: &'a mut [u8],
    /// The device has checked the checksum, or it never left the host.
    pub(super) trusted: bool,
}

enum Place {
    Buffer(Range<usize>),
    Scratch,
}

impl Receiver {
    fn new(queue: virtio::Queue, size: usize, merge: bool) -> Result<Self, String> {
        let count = queue.ring.size().min(RECEIVE_BUFFERS);
        let buffers = Dma::new(size * usize::from(count))?;
        let mut this = Self {
            queue,
            buffers,
            size,
            count,
            merge,
            used: Vec::new(),
            scratch: Vec::new(),
            bogus: Bogus(0),
        };
        this.used.reserve(usize::from(count));
        this.scratch.reserve(if merge { MAX_FRAME } else { 0 });
        for number in 0..count {
            let address = this.buffers.address(size * usize::from(number));
            this.queue
                .ring
                .set_descriptor(number, Descriptor { address, len: size as u32, flags: WRITE, next: 0 });
            this.used.push(number);
        }
        Ok(this)
    }

    /// Gives the device all buffers that are not in use.
    pub(super) fn refill(&mut self) {
        for number in self.used.drain(..) {
            self.queue.ring.push(number);
        }
        self.queue.kick();
    }

    /// Takes one used buffer: its number and how much of it is filled.
    fn buffer(&mut self) -> Option<(u16, usize)> {
        loop {
            let used = self.queue.ring.pop()?;
            if used.id < u32::from(self.count) {
                return Some((used.id as u16, (used.len as usize).min(self.size)));
            }
            self.bogus.0 += 1;
        }
    }

    /// The next frame. Its buffers go back with the next [`refill`](Self::refill).
    pub(super) fn next(&mut self) -> Option<Frame<'_>> {
        let (trusted, place) = loop {
            let (number, len) = self.buffer()?;
            self.used.push(number);
            let start = self.size * usize::from(number);
            if len < HEADER {
                self.bogus.0 += 1;
                continue;
            }
            let flags = self.buffers.get(start);
            let more = if self.merge {
                u16::from_le_bytes([self.buffers.get(start + 10), self.buffers.get(start + 11)]).max(1) - 1
            } else {
                0
            };
            let trusted = flags & (NEEDS_CSUM | DATA_VALID) != 0;
            if more == 0 {
                break (trusted, Place::Buffer(start + HEADER..start + len));
            }
            self.scratch.clear();
            self.scratch.extend_from_slice(self.buffers.bytes(start + HEADER, len - HEADER));
            let mut whole = true;
            for _ in 0..more {
                // All buffers of a frame are used at once (5.1.6.4): one that is missing is the device's fault.
                let Some((number, len)) = self.buffer() else {
                    whole = false;
                    break;
                };
                self.used.push(number);
                let room = MAX_FRAME - self.scratch.len();
                let bytes = self.buffers.bytes(self.size * usize::from(number), len.min(room));
                self.scratch.extend_from_slice(bytes);
            }
            if whole {
                break (trusted, Place::Scratch);
            }
            self.bogus.0 += 1;
        };
        let bytes = match place {
            Place::Buffer(range) => self.buffers.bytes_mut(range.start, range.len()),
            Place::Scratch => &mut self.scratch[..],
        };
        Some(Frame { bytes, trusted })
    }
}

/// The transmitting side of a pair.
pub(super) struct Transmitter {
    queue: virtio::Queue,
    buffers: Dma,
    size: usize,
    free: Vec<u16>,
    flying: Vec<bool>,
    checksum: bool,
    tso: bool,
    mtu: usize,
    pub(super) bogus: Bogus,
}

impl Transmitter {
    fn new(queue: virtio::Queue, depth: u16, frame: usize) -> Result<Self, String> {
        let depth = depth.min(queue.ring.size());
        let size = (HEADER + frame).next_multiple_of(64);
        let buffers = Dma::new(size * usize::from(depth))?;
        Ok(Self {
            queue,
            buffers,
            size,
            free: (0..depth).rev().collect(),
            flying: vec![false; usize::from(depth)],
            checksum: false,
            tso: false,
            mtu: 1500,
            bogus: Bogus(0),
        })
    }

    /// Whether the device completes checksums.
    pub(super) fn partial_checksums(&self) -> bool {
        self.checksum
    }

    /// Frames that the device has not sent yet.
    pub(super) fn in_flight(&self) -> usize {
        self.flying.len() - self.free.len()
    }

    /// Takes back what the device has sent; how many.
    pub(super) fn reclaim(&mut self) -> usize {
        let mut count = 0;
        while let Some(used) = self.queue.ring.pop() {
            match self.flying.get_mut(used.id as usize) {
                Some(flying @ true) => {
                    *flying = false;
                    self.free.push(used.id as u16);
                    count += 1;
                }
                _ => self.bogus.0 += 1,
            }
        }
        count
    }

    /// Room for a frame that [`send`](Self::send) will send, if a buffer is free.
    pub(super) fn frame(&mut self, len: usize) -> Option<&mut [u8]> {
        let number = *self.free.last()?;
        let start = self.size * usize::from(number) + HEADER;
        (len + HEADER <= self.size).then(|| self.buffers.bytes_mut(start, len))
    }

    /// Sends `len` bytes of what [`frame`](Self::frame) returned. `partial`: the device completes the checksum of this protocol, and
    /// segments TCP that is longer than the MTU.
    pub(super) fn send(&mut self, len: usize, partial: Option<Protocol>) {
        let Some(number) = self.free.pop() else { return };
        let start = self.size * usize::from(number);
        let mut header = [0u8; HEADER];
        if let Some(protocol) = partial {
            header[0] = NEEDS_CSUM;
            header[6..8].copy_from_slice(&(L4_OFFSET as u16).to_le_bytes());
            header[8..10].copy_from_slice(&(protocol.checksum_offset() as u16).to_le_bytes());
            let longest = 14 + self.mtu;
            if self.tso && protocol == Protocol::Tcp && len > longest {
                header[1] = GSO_TCPV4;
                header[2..4].copy_from_slice(&(protocol.overhead() as u16).to_le_bytes());
                header[4..6].copy_from_slice(&((longest - protocol.overhead()) as u16).to_le_bytes());
            }
        }
        self.buffers.bytes_mut(start, HEADER).copy_from_slice(&header);
        let address = self.buffers.address(start);
        self.queue
            .ring
            .set_descriptor(number, Descriptor { address, len: (HEADER + len) as u32, flags: 0, next: 0 });
        self.flying[usize::from(number)] = true;
        self.queue.ring.push(number);
    }

    /// Makes what was sent visible.
    pub(super) fn kick(&mut self) {
        self.queue.kick();
    }
}

/// An open network device.
pub(super) struct Port<'a> {
    device: virtio::Device<'a>,
    pub(super) receivers: Vec<Receiver>,
    pub(super) transmitters: Vec<Transmitter>,
    /// Not polled in the I/O phase; here so that its memory lives.
    _control: Option<(virtio::Queue, Dma)>,
    pub(super) mac: Mac,
    interrupts: bool,
}

impl<'a> Port<'a> {
    /// Opens the device and prints its `device` event. `payload`: the largest frame to be sent, in bytes.
    pub(super) fn open(
        context: &Context<'a>,
        job: u32,
        wanted: &args::Device<'_>,
        net: &args::Net,
        frame: usize,
    ) -> Result<Self, String> {
        let mut features = MAC;
        for (name, feature) in [("mtu", MTU), ("status", STATUS), ("mrg", MRG_RXBUF)] {
            if !wanted.refuses(name) {
                features |= feature;
            }
        }
        if net.offload.checksum {
            features |= CSUM | GUEST_CSUM;
            if net.offload.tso {
                features |= HOST_TSO4 | GUEST_TSO4;
            }
        }
        if wanted.queues != Some(1) && !wanted.refuses("mq") {
            features |= MQ | CTRL_VQ;
        }
        let device = virtio::Device::open(context.devices, Type::Net, wanted, features, context.clock)?;
        let max_pairs = if device.has(MQ) { u16::from_le_bytes(device.config(8)).max(1) } else { 1 };
        let pairs = wanted.queues.unwrap_or(max_pairs);
        if pairs > max_pairs {
            return Err(alloc::format!("queues={pairs}: the device has {max_pairs} queue pairs"));
        }
        let mtu = if device.has(MTU) { u16::from_le_bytes(device.config(10)) } else { 1500 };
        let tso = device.has(HOST_TSO4) && device.has(CSUM);
        if frame > 14 + usize::from(mtu) && !tso {
            return Err(alloc::format!(
                "size=: a frame of {frame} bytes is longer than the MTU of {mtu} allows (offload=csum,tso proto=tcp)"
            ));
        }
        let merge = device.has(MRG_RXBUF);
        let smallest = if !merge && device.has(GUEST_TSO4) {
            WHOLE_FRAME
        } else if merge {
            128
        } else {
            HEADER + 14 + usize::from(mtu)
        };
        let receive_size = (net.receive_buffer as usize).max(smallest).next_multiple_of(64);
        let (mut receivers, mut transmitters) = (Vec::new(), Vec::new());
        for pair in 0..pairs {
            receivers.push(Receiver::new(device.queue(2 * pair)?, receive_size, merge)?);
            // Room for an answer to a ping at least.
            let mut transmitter = Transmitter::new(device.queue(2 * pair + 1)?, net.depth, frame.max(2048))?;
            (transmitter.checksum, transmitter.tso) = (device.has(CSUM), tso);
            transmitter.mtu = usize::from(mtu);
            transmitters.push(transmitter);
        }
        let mut control =
            if device.has(CTRL_VQ) { Some((device.queue(2 * max_pairs)?, Dma::new(4096)?)) } else { None };
        device.start();
        if let (Some((queue, buffer)), true) = (&mut control, pairs > 1) {
            set_pairs(context, queue, buffer, pairs)?;
        }
        let mac = if device.has(MAC) {
            Mac(device.config(0))
        } else {
            Mac([2, 0, net.ip[0], net.ip[1], net.ip[2], net.ip[3]])
        };
        let link = !device.has(STATUS) || u16::from_le_bytes(device.config(6)) & 1 != 0;
        let event = device
            .describe(Type::Net, usize::from(pairs), transmitters[0].queue.ring.size())
            .number("job", job)
            .text("mac", mac)
            .number("mtu", mtu)
            .text("link", if link { "up" } else { "down" })
            .number("max_pairs", max_pairs);
        serial::print(event);
        Ok(Self { device, receivers, transmitters, _control: control, mac, interrupts: wanted.interrupts })
    }

    pub(super) fn acknowledge(&self) {
        self.device.acknowledge();
    }

    pub(super) fn health(&self) -> Health {
        self.device.health()
    }

    fn queues(&self) -> impl Iterator<Item = &virtio::Queue> {
        self.receivers.iter().map(|r| &r.queue).chain(self.transmitters.iter().map(|t| &t.queue))
    }

    fn queues_mut(&mut self) -> impl Iterator<Item = &mut virtio::Queue> {
        let receivers = self.receivers.iter_mut().map(|r| &mut r.queue);
        receivers.chain(self.transmitters.iter_mut().map(|t| &mut t.queue))
    }

    /// The I/O phase begins.
    pub(super) fn begin(&mut self) {
        self.queues_mut().for_each(virtio::Queue::begin);
        self.receivers.iter_mut().for_each(Receiver::refill);
    }

    /// The warm-up ends.
    pub(super) fn measure(&mut self) {
        self.queues_mut().for_each(virtio::Queue::measure);
    }

    /// Kicks and interrupts of the I/O phase, over all queues.
    pub(super) fn signals(&self) -> Signals {
        self.queues().map(virtio::Queue::signals).fold(Signals::default(), Add::add)
    }

    /// The same, after the warm-up.
    pub(super) fn measured(&self) -> Signals {
        self.queues().map(virtio::Queue::measured).fold(Signals::default(), Add::add)
    }

    /// Offences of the device against the rings' rules.
    pub(super) fn bogus(&self) -> u64 {
        let receivers = self.receivers.iter().map(|r| r.bogus.0);
        receivers.chain(self.transmitters.iter().map(|t| t.bogus.0)).sum()
    }

    /// As [`crate::stage::Job::arm`]. `full`: a frame waits for a transmit buffer.
    pub(super) fn arm(&mut self, full: bool) -> bool {
        if !self.interrupts {
            return false;
        }
        let mut quiet = true;
        for receiver in &mut self.receivers {
            receiver.queue.ring.set_interrupts(true);
            quiet &= !receiver.queue.ring.has_used();
        }
        for transmitter in self.transmitters.iter_mut().filter(|_| full) {
            transmitter.queue.ring.set_interrupts(true);
            quiet &= !transmitter.queue.ring.has_used();
        }
        quiet
    }

    pub(super) fn disarm(&mut self) {
        if self.interrupts {
            for receiver in &mut self.receivers {
                receiver.queue.ring.set_interrupts(false);
            }
            for transmitter in &mut self.transmitters {
                transmitter.queue.ring.set_interrupts(false);
            }
        }
    }
}

/// `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET` (5.1.6.5.5).
fn set_pairs(
    context: &Context<'_>,
    queue: &mut virtio::Queue,
    buffer: &mut Dma,
    pairs: u16,
) -> Result<(), String> {
    use guest::ring::NEXT;
    buffer.put(0, [4u8, 0]);
    buffer.put(64, pairs);
    buffer.put(128, 0xffu8);
    for (index, offset, len, flags) in [(0u16, 0, 2, NEXT), (1, 64, 2, NEXT), (2, 128, 1, WRITE)] {
        let descriptor = Descriptor { address: buffer.address(offset), len, flags, next: index + 1 };
        queue.ring.set_descriptor(index, descriptor);
    }
    queue.ring.push(0);
    queue.kick();
    for _ in 0..50_000 {
        if queue.ring.pop().is_some() {
            let status = buffer.get(128);
            return if status == 0 {
                Ok(())
            } else {
                Err(alloc::format!("the device refuses {pairs} queue pairs"))
            };
        }
        context.clock.delay(100);
    }
    Err(String::from("the control queue does not answer within 5 s"))
}
