//! Guests made of memory and two queues, for tests of the network card.
// Every test binary uses its own part of this.
#![allow(dead_code, unreachable_pub)]

pub mod card;
pub mod groups;
pub mod multi;
pub mod queue;

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use offload_card::memory::MemoryTable;
use offload_card::ring::{InflightArea, QueueShared, Ring, RingConfig};
use offload_net::conntrack::Filter;
use offload_net::drops::Drops;
use offload_net::frame::header::{LEN, VnetHeader};
use offload_net::mac::MacAddr;
use offload_net::network::{Network, RX, TX};
use offload_net::subnet::Interface;
use offload_net::switch::PortId;
use queue::{Queue, SIZE};
use virtio_bindings::virtio_net::*;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

pub const PATIENCE: Duration = Duration::from_secs(5);
/// Long enough for a frame that must not come.
pub const MOMENT: Duration = Duration::from_millis(100);

pub const MEMORY: usize = 64 << 20;
const RX_RING: u64 = 0;
const TX_RING: u64 = 0x1_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x200_0000;
/// Room for one super-frame.
const TX_SLOT: u64 = 0x1_1000;

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT_DESC: u64 = 1 << 28;
/// What every modern driver has.
pub const BASE: u64 =
    VERSION_1 | EVENT_IDX | INDIRECT_DESC | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS;
/// Everything a stock Linux guest takes.
pub const FULL: u64 = BASE
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6;

/// Runs `ip` of iproute2; what it prints.
pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// A guest with one network device.
pub struct Guest {
    pub mac: [u8; 6],
    pub features: u64,
    pub file: File,
    pub mem: Arc<GuestMemoryMmap<()>>,
    pub rx: Queue,
    pub tx: Queue,
    buffer_len: u32,
    sent: u64,
    pub shared: [Arc<QueueShared>; 2],
}

impl Guest {
    /// With `mac` 52:54:00:00:00:`last`.
    pub fn new(last: u8, features: u64) -> Self {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(MEMORY as u64).unwrap();
        let range = (GuestAddress(0), MEMORY, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
        let mem = Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap());
        Self {
            mac: [0x52, 0x54, 0, 0, 0, last],
            features,
            file,
            rx: Queue::new(mem.clone(), RX_RING),
            tx: Queue::new(mem.clone(), TX_RING),
            mem,
            buffer_len: 0,
            sent: 0,
            shared: Default::default(),
        }
    }

    /// Puts `count` receive buffers of `length` bytes there.
    pub fn fill_rx(&mut self, count: u16, length: u32) {
        self.buffer_len = length;
        for i in 0..count {
            let address = RX_BUFFERS + u64::from(i) * u64::from(length);
            assert!(address + u64::from(length) <= TX_BUFFERS);
            self.rx.add(&[(address, length, true)]).unwrap();
        }
        self.rx.kick();
    }

    fn rings(&self, inflight: Option<&InflightArea>) -> [Ring; 2] {
        let ring = |queue: &Queue, index: u16| {
            Ring::new(RingConfig {
                index,
                size: SIZE,
                features: self.features,
                addresses: queue.addresses(),
                base: 0,
                kick: queue.kick.try_clone().unwrap(),
                memory: MemoryTable::from_view((*self.mem).clone()),
                shared: self.shared[usize::from(index)].clone(),
                inflight: inflight.and_then(|a| a.queue(index, SIZE)),
            })
            .unwrap()
        };
        self.shared[0].set_call(Some(self.rx.call.try_clone().unwrap()));
        self.shared[1].set_call(Some(self.tx.call.try_clone().unwrap()));
        [ring(&self.rx, RX), ring(&self.tx, TX)]
    }

    /// Plugs the guest into a network of this process, without vhost-user.
    pub fn plug(&self, network: &Network) -> PortId {
        self.plug_as(network, Interface::plain(MacAddr(self.mac))).0
    }

    /// The same with addresses; also what the network does not take from it.
    pub fn plug_as(&self, network: &Network, interface: Interface) -> (PortId, Arc<Drops>) {
        self.plug_behind(network, interface, None)
    }

    /// The same behind a filter.
    pub fn plug_behind(
        &self,
        network: &Network,
        interface: Interface,
        filter: Option<Box<Filter>>,
    ) -> (PortId, Arc<Drops>) {
        let (port, drops) = network.plug_behind(interface, filter).unwrap();
        for ring in self.rings(None) {
            network.start_queue(port, ring).unwrap();
        }
        (port, drops)
    }

    /// Sends a frame as buffers of at most `piece` bytes, the vnet header in the first.
    pub fn send_pieces(&mut self, header: &VnetHeader, frame: &[u8], piece: usize) {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(frame);
        self.send_raw(&bytes, piece);
    }

    /// Sends bytes that need not be a frame.
    pub fn send_raw(&mut self, bytes: &[u8], piece: usize) {
        while self.tx.used().is_some() {}
        // Before anything is written: where it goes may be what the card has yet to read.
        while !self.tx.has_room(bytes.len().div_ceil(piece)) {
            self.tx.wait_used(PATIENCE).expect("the card takes frames");
        }
        let address = TX_BUFFERS + (self.sent % u64::from(SIZE)) * TX_SLOT;
        self.sent += 1;
        self.mem.write_slice(bytes, GuestAddress(address)).unwrap();
        let buffers: Vec<_> = (0..bytes.len())
            .step_by(piece)
            .map(|at| (address + at as u64, piece.min(bytes.len() - at) as u32, false))
            .collect();
        self.tx.add(&buffers).expect("there is room");
        self.tx.kick();
    }

    /// Sends a frame without any offload, in one buffer.
    pub fn send(&mut self, frame: &[u8]) {
        self.send_pieces(&VnetHeader::default(), frame, usize::MAX);
    }

    /// The next frame and its vnet header.
    pub fn receive(&mut self) -> Option<(VnetHeader, Vec<u8>)> {
        self.receive_within(PATIENCE)
    }

    /// Sees that no frame comes.
    pub fn receives_nothing(&mut self) -> bool {
        self.receive_within(MOMENT).is_none()
    }

    /// As `receive`, with less patience; the buffers are given back to the device.
    pub fn receive_within(&mut self, patience: Duration) -> Option<(VnetHeader, Vec<u8>)> {
        let mut bytes = Vec::new();
        let mut heads = Vec::new();
        let mut left = 1;
        while left > 0 {
            let (head, length) = self.rx.wait_used(patience)?;
            let address = self.rx.mem.read_obj::<u64>(GuestAddress(RX_RING + 16 * u64::from(head))).unwrap();
            let mut part = vec![0; length as usize];
            self.mem.read_slice(&mut part, GuestAddress(address)).unwrap();
            bytes.extend(part);
            heads.push(address);
            if heads.len() == 1 {
                left = u16::from_le_bytes([bytes[10], bytes[11]]);
                assert!(left >= 1, "num_buffers of a frame is at least 1");
            }
            left -= 1;
        }
        for address in heads {
            self.rx.add(&[(address, self.buffer_len, true)]).unwrap();
        }
        self.rx.kick();
        let header = VnetHeader::from_bytes(bytes[..LEN].try_into().unwrap());
        Some((header, bytes.split_off(LEN)))
    }

    /// Connects to a device's vhost-user socket.
    pub fn connect(&mut self, socket: &Path) -> card::Link {
        card::Link::up(self, socket)
    }
}

/// An Ethernet frame of an experimental type (RFC 5342) with a pattern as payload.
pub fn frame(destination: [u8; 6], source: [u8; 6], seed: u8, payload: usize) -> Vec<u8> {
    let mut f = destination.to_vec();
    f.extend(source);
    f.extend([0x88, 0xb5]);
    f.extend((0..payload).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)));
    f
}

pub const BROADCAST: [u8; 6] = [0xff; 6];

/// The Internet checksum, the plain way.
pub fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut s = 0_u32;
    for p in bytes.chunks(2) {
        s += u32::from(p[0]) << 8 | u32::from(*p.get(1).unwrap_or(&0));
    }
    while s > 0xffff {
        s = (s & 0xffff) + (s >> 16);
    }
    !(s as u16)
}

/// A UDP/IPv4 frame; its checksum complete, or partial (the pseudo-header's sum) as for NEEDS_CSUM.
pub fn udp4(
    macs: ([u8; 6], [u8; 6]),
    from: ([u8; 4], u16),
    to: ([u8; 4], u16),
    payload: &[u8],
    partial: bool,
) -> Vec<u8> {
    let udp_len = (8 + payload.len()) as u16;
    let mut f = macs.0.to_vec();
    f.extend(macs.1);
    f.extend([8, 0]);
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(from.0);
    ip.extend(to.0);
    let c = internet_checksum(&ip);
    ip[10..12].copy_from_slice(&c.to_be_bytes());
    let mut udp = Vec::new();
    udp.extend(from.1.to_be_bytes());
    udp.extend(to.1.to_be_bytes());
    udp.extend(udp_len.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(payload);
    let mut pseudo = ip[12..20].to_vec();
    pseudo.extend([0, 17]);
    pseudo.extend(udp_len.to_be_bytes());
    let value = if partial {
        !internet_checksum(&pseudo)
    } else {
        pseudo.extend(&udp);
        internet_checksum(&pseudo)
    };
    udp[6..8].copy_from_slice(&value.to_be_bytes());
    f.extend(ip);
    f.extend(udp);
    f
}

/// The vnet header that goes with a partial [`udp4`].
pub const UDP_PARTIAL: VnetHeader = VnetHeader {
    flags: 1,
    gso_type: 0,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 34,
    csum_offset: 6,
    num_buffers: 0,
};

/// Whether the UDP checksum of a whole IPv4 frame is right.
pub fn udp4_checksum_holds(f: &[u8]) -> bool {
    let mut bytes = f[26..34].to_vec();
    bytes.extend([0, 17]);
    bytes.extend(&f[38..40]);
    bytes.extend(&f[34..]);
    internet_checksum(&bytes) == 0
}

/// A TCP/IPv4 super-frame with a partial checksum, and its vnet header.
pub fn tcp4_super(macs: ([u8; 6], [u8; 6]), payload: &[u8], mss: u16) -> (VnetHeader, Vec<u8>) {
    let mut f = macs.0.to_vec();
    f.extend(macs.1);
    f.extend([8, 0, 0x45, 0]);
    f.extend(((40 + payload.len()) as u16).to_be_bytes());
    f.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    f.extend([0x1f, 0x90, 0, 80, 0, 0, 0x10, 0, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    f.extend(payload);
    let header = VnetHeader {
        flags: 1,
        gso_type: 1,
        hdr_len: 54,
        gso_size: mss,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    (header, f)
}

/// Whether the TCP checksum of a whole IPv4 frame without options is right.
pub fn tcp4_checksum_holds(f: &[u8]) -> bool {
    let mut bytes = f[26..34].to_vec();
    bytes.extend([0, 6]);
    bytes.extend(((f.len() - 34) as u16).to_be_bytes());
    bytes.extend(&f[34..]);
    internet_checksum(&bytes) == 0
}
