//! A guest whose network device has several queue pairs, and a control queue behind them.

use std::sync::Arc;
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};
use offload_card::memory::MemoryTable;
use offload_card::ring::{InflightArea, QueueShared, Ring, RingConfig};
use offload_net::frame::header::{LEN, VnetHeader};
use offload_net::mac::MacAddr;
use offload_net::network::Network;
use offload_net::subnet::Interface;
use offload_net::switch::PortId;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::queue::{Queue, SIZE};
use super::{MEMORY, PATIENCE};

/// A ring's areas take up to that many bytes; up to 16 rings.
const RING: u64 = 0x1_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x200_0000;
const COMMANDS: u64 = 0x3f0_0000;
const BUFFER: u32 = 2048;
/// VIRTIO_NET_F_MQ.
pub const MQ: u64 = 1 << 22;
/// Class and command of VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
pub const PAIRS_SET: [u8; 2] = [4, 0];

pub struct Multi {
    pub mac: [u8; 6],
    pub features: u64,
    pub mem: Arc<GuestMemoryMmap<()>>,
    pub pairs: u16,
    /// By index in the device.
    pub queues: Vec<Queue>,
    pub shared: Vec<Arc<QueueShared>>,
    /// Pairs that its driver has buffers in.
    receiving: u16,
    sent: u64,
}

impl Multi {
    /// With `mac` 52:54:00:00:00:`last`, and receive buffers in all pairs that it may use.
    pub fn new(last: u8, pairs: u16, features: u64) -> Self {
        let file = std::fs::File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(MEMORY as u64).unwrap();
        let range = (GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)));
        let mem = Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap());
        let count = 2 * pairs + 1;
        let queues = (0..u64::from(count)).map(|i| Queue::new(mem.clone(), i * RING)).collect();
        let shared = (0..count).map(|_| Arc::default()).collect();
        let receiving = if features & MQ == 0 { 1 } else { pairs };
        let mac = [0x52, 0x54, 0, 0, 0, last];
        let mut guest = Self { mac, features, mem, pairs, queues, shared, receiving, sent: 0 };
        for pair in 0..receiving {
            for n in 0..200 {
                let address = RX_BUFFERS + u64::from(BUFFER) * (u64::from(pair * SIZE) + n);
                guest.queues[usize::from(2 * pair)].add(&[(address, BUFFER, true)]).unwrap();
            }
        }
        guest
    }

    pub fn ring(&self, index: u16, inflight: Option<&InflightArea>) -> Ring {
        let queue = &self.queues[usize::from(index)];
        let shared = self.shared[usize::from(index)].clone();
        shared.set_call(Some(queue.call.try_clone().unwrap()));
        Ring::new(RingConfig {
            index,
            size: SIZE,
            features: self.features,
            addresses: queue.addresses(),
            base: 0,
            kick: queue.kick.try_clone().unwrap(),
            memory: MemoryTable::from_view((*self.mem).clone()),
            shared,
            inflight: inflight.and_then(|a| a.queue(index, SIZE)),
        })
        .unwrap()
    }

    /// Plugs it into a network of this process, and starts these queues.
    pub fn plug(
        &self,
        network: &Network,
        queues: impl IntoIterator<Item = u16>,
        inflight: Option<&InflightArea>,
    ) -> PortId {
        let interface = Interface::plain(MacAddr(self.mac));
        let (port, _) = network.plug_pairs(interface, None, self.pairs).unwrap();
        for index in queues {
            network.start_queue(port, self.ring(index, inflight)).unwrap();
        }
        port
    }

    /// The indices of all its queues.
    pub fn all(&self) -> std::ops::RangeInclusive<u16> {
        0..=2 * self.pairs
    }

    /// Puts a frame into a pair's transmit queue, without a kick; false: it is full.
    pub fn put(&mut self, pair: u16, frame: &[u8]) -> bool {
        let queue = &mut self.queues[usize::from(2 * pair + 1)];
        while queue.used().is_some() {}
        let address = TX_BUFFERS + self.sent % 4096 * u64::from(BUFFER);
        self.sent += 1;
        let mut bytes = VnetHeader::default().to_bytes().to_vec();
        bytes.extend(frame);
        self.mem.write_slice(&bytes, GuestAddress(address)).unwrap();
        queue.add(&[(address, bytes.len() as u32, false)]).is_some()
    }

    /// Sends a frame by a pair.
    pub fn send(&mut self, pair: u16, frame: &[u8]) {
        while !self.put(pair, frame) {
            std::thread::yield_now();
        }
        self.queues[usize::from(2 * pair + 1)].kick();
    }

    /// The next `count` frames, each with the pair by which it came.
    pub fn receive(&mut self, count: usize) -> Vec<(u16, Vec<u8>)> {
        let until = Instant::now() + PATIENCE;
        let mut frames = Vec::new();
        while frames.len() < count && Instant::now() < until {
            let before = frames.len();
            self.take(&mut frames);
            if frames.len() == before {
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
        }
        frames
    }

    /// Sees that no frame comes.
    pub fn receives_nothing(&mut self) -> bool {
        std::thread::sleep(super::MOMENT);
        let mut frames = Vec::new();
        self.take(&mut frames);
        frames.is_empty()
    }

    fn take(&mut self, frames: &mut Vec<(u16, Vec<u8>)>) {
        for pair in 0..self.receiving {
            let ring = u64::from(2 * pair) * RING;
            let queue = &mut self.queues[usize::from(2 * pair)];
            while let Some((head, length)) = queue.used() {
                let address: u64 = self.mem.read_obj(GuestAddress(ring + 16 * u64::from(head))).unwrap();
                let mut bytes = vec![0; length as usize];
                self.mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
                assert_eq!(bytes[10..12], [1, 0], "a frame in one buffer");
                frames.push((pair, bytes.split_off(LEN)));
                queue.add(&[(address, BUFFER, true)]).unwrap();
                queue.kick();
            }
        }
    }

    /// Puts a command of these pieces into the control queue, with room for an answer of so many bytes.
    pub fn put_command(&mut self, pieces: &[&[u8]], room: u32) {
        let mut at = COMMANDS;
        let mut buffers = Vec::new();
        for piece in pieces {
            self.mem.write_slice(piece, GuestAddress(at)).unwrap();
            buffers.push((at, piece.len() as u32, false));
            at += 0x100;
        }
        if room > 0 {
            self.mem.write_obj(0xee_u8, GuestAddress(at)).unwrap();
            buffers.push((at, room, true));
        }
        self.control().add(&buffers).unwrap();
    }

    pub fn control(&mut self) -> &mut Queue {
        let control = if self.features & MQ == 0 { 2 } else { 2 * self.pairs };
        &mut self.queues[usize::from(control)]
    }

    /// Does a command; the answer, 0 for OK and 1 for ERR.
    pub fn command(&mut self, pieces: &[&[u8]]) -> u8 {
        self.put_command(pieces, 1);
        self.control().kick();
        let (_, written) = self.control().wait_used(PATIENCE).expect("an answer");
        assert_eq!(written, 1);
        self.mem.read_obj(GuestAddress(COMMANDS + 0x100 * pieces.len() as u64)).unwrap()
    }

    /// Uses so many pairs; whether the device agrees.
    pub fn set_pairs(&mut self, pairs: u16) -> bool {
        self.command(&[&PAIRS_SET, &pairs.to_le_bytes()]) == 0
    }
}
