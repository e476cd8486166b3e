//! The flow log: what devices sent and were sent, added up per flow and written to a file.
//!
//! A network's thread adds frames up in a table of its own, and at the end of every interval gives the table away to a
//! thread that writes it, and goes on with the other one of two. It never waits and allocates nothing: while the writer
//! still has the other table, or when the table is full, frames of flows that are not in it are not logged, and counted.
//! Without a flow log a frame costs a branch.

mod writer;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use offload_card::clock;
use proto::error::Error;

use crate::drops::DropReason;
use crate::frame::Frame;
use crate::frame::packet::{self, Packet};
use crate::mac::MacAddr;

/// Flows of one network in one interval.
const FLOWS_MAX: usize = 16_384;
/// Transport protocols that begin with ports: TCP, UDP, DCCP, SCTP, UDP-Lite.
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];

/// What is logged, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The file; lines are added to it.
    pub file: PathBuf,
    /// How long flows are added up.
    pub interval: Duration,
    /// One in so many frames is counted.
    pub sample: u32,
}

/// The card's flow log. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FlowLog {
    settings: Arc<Settings>,
    tables: Sender<Full>,
}

/// A table on its way to the writer, and the way back.
#[derive(Debug)]
struct Full {
    network: Arc<str>,
    table: Table,
    back: Sender<Table>,
}

/// Which way a frame went, seen from the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From its guest.
    Out,
    /// To it.
    In,
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// It went on.
    Accept,
    /// It went nowhere.
    Reject(DropReason),
    /// The device's limits did not admit it.
    Limited,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    device: MacAddr,
    direction: Direction,
    action: Action,
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// 0 for protocols without, and fragments.
    ports: (u16, u16),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Flow {
    /// Unix times in microseconds of its first and last frame.
    first_us: u64,
    last_us: u64,
    packets: u64,
    bytes: u64,
}

#[derive(Debug)]
struct Table {
    flows: HashMap<Key, Flow>,
    /// Packets for which there was no room.
    lost: u64,
}

impl Table {
    fn new() -> Self {
        Self { flows: HashMap::with_capacity(FLOWS_MAX), lost: 0 }
    }

    fn is_empty(&self) -> bool {
        self.flows.is_empty() && self.lost == 0
    }

    fn add(&mut self, key: Key, (packets, bytes): (u64, u64), now_us: u64) {
        if let Some(flow) = self.flows.get_mut(&key) {
            (flow.last_us, flow.packets, flow.bytes) = (now_us, flow.packets + packets, flow.bytes + bytes);
        } else if self.flows.len() < FLOWS_MAX {
            self.flows.insert(key, Flow { first_us: now_us, last_us: now_us, packets, bytes });
        } else {
            self.lost += packets;
        }
    }
}

impl FlowLog {
    /// Begins to write.
    ///
    /// # Errors
    /// The file cannot be opened, or there is no thread to be had.
    pub fn open(settings: Settings) -> Result<Self, Error> {
        let settings = Arc::new(settings);
        let tables = writer::start(settings.clone())?;
        Ok(Self { settings, tables })
    }

    /// A network's end of it.
    pub(crate) fn recorder(&self, network: &str) -> Recorder {
        let (back, returned) = mpsc::channel();
        Recorder {
            network: network.into(),
            table: Some(Table::new()),
            other: Some(Table::new()),
            tables: self.tables.clone(),
            back,
            returned,
            interval: u64::try_from(self.settings.interval.as_nanos()).unwrap_or(u64::MAX),
            due: 0,
            sample: self.settings.sample.max(1),
            passed: 0,
        }
    }
}

/// What a network's thread records by.
#[derive(Debug)]
pub(crate) struct Recorder {
    network: Arc<str>,
    /// `None` only in between.
    table: Option<Table>,
    /// The one that is filled next; `None`: the writer has it.
    other: Option<Table>,
    tables: Sender<Full>,
    back: Sender<Table>,
    returned: Receiver<Table>,
    interval: u64,
    /// When the table is given away: a time of [`clock::now`]; of no meaning while it is empty.
    due: u64,
    sample: u32,
    /// Frames since one was counted.
    passed: u32,
}

impl Recorder {
    /// A frame of `device` has gone by, if it is of the sample and IP.
    pub(crate) fn add(&mut self, device: MacAddr, direction: Direction, action: Action, frame: &Frame<'_>) {
        self.passed += 1;
        if self.passed < self.sample {
            return;
        }
        self.passed = 0;
        let Some(key) = key(device, direction, action, frame) else { return };
        let Some(table) = &mut self.table else { return };
        if table.is_empty() {
            self.due = clock::now().saturating_add(self.interval);
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        table.add(key, frame.on_wire(), u64::try_from(since.as_micros()).unwrap_or(u64::MAX));
    }

    /// Time until [`Recorder::settle`] has something to do; `None`: there is nothing in the table.
    pub(crate) fn next(&self) -> Option<Duration> {
        self.table.as_ref().filter(|t| !t.is_empty())?;
        Some(Duration::from_nanos(self.due.saturating_sub(clock::now())))
    }

    /// Gives the table away if its time has come.
    pub(crate) fn settle(&mut self) {
        if self.table.as_ref().is_none_or(Table::is_empty) || clock::now() < self.due {
            return;
        }
        if self.other.is_none() {
            self.other = self.returned.try_recv().ok();
        }
        match self.other.take() {
            Some(other) => {
                if let Some(table) = self.table.replace(other) {
                    self.give(table);
                }
            }
            // The writer is late: this one is filled on.
            None => self.due = clock::now().saturating_add(self.interval),
        }
    }

    fn give(&self, table: Table) {
        // It fails only when the writer has ended, which it does not.
        let full = Full { network: self.network.clone(), table, back: self.back.clone() };
        let _ = self.tables.send(full);
    }
}

impl Drop for Recorder {
    /// The network ends: what is there is written, if the process goes on for so long.
    fn drop(&mut self) {
        if let Some(table) = self.table.take().filter(|t| !t.is_empty()) {
            self.give(table);
        }
    }
}

/// `None`: it is no IP packet.
fn key(device: MacAddr, direction: Direction, action: Action, frame: &Frame<'_>) -> Option<Key> {
    let (source, destination, protocol, l4, fragment): (IpAddr, IpAddr, _, _, _) =
        match packet::parse(frame.head, frame.bytes()).ok()? {
            // The header is there: it has been read.
            Packet::V4(p) => (p.source.into(), p.destination.into(), *frame.head.get(23)?, p.l4, p.fragment),
            Packet::V6(p) => {
                let protocol = p.protocol.unwrap_or_default();
                (p.source.into(), p.destination.into(), protocol, p.l4, p.fragment)
            }
            Packet::Arp(_) => return None,
        };
    let ports = match frame.head.get(l4..).and_then(<[u8]>::first_chunk) {
        Some([a, b, c, d]) if WITH_PORTS.contains(&protocol) && !fragment => {
            (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]))
        }
        _ => (0, 0),
    };
    Some(Key { device, direction, action, source, destination, protocol, ports })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(port: u16) -> Key {
        Key {
            device: MacAddr([2, 0, 0, 0, 0, 1]),
            direction: Direction::Out,
            action: Action::Accept,
            source: [10, 0, 0, 1].into(),
            destination: [10, 0, 0, 2].into(),
            protocol: 6,
            ports: (port, 80),
        }
    }

    #[test]
    fn a_full_table_counts_what_it_cannot_take_and_goes_on_with_what_it_has() {
        let mut table = Table::new();
        let room = table.flows.capacity();
        for port in 0..u16::MAX {
            table.add(key(port), (2, 100), u64::from(port));
        }
        assert_eq!((table.flows.len(), table.lost), (FLOWS_MAX, 2 * (65_535 - FLOWS_MAX as u64)));
        table.add(key(7), (1, 50), 99_999);
        let flow = Flow { first_us: 7, last_us: 99_999, packets: 3, bytes: 150 };
        assert_eq!(table.flows[&key(7)], flow);
        assert_eq!(table.flows.capacity(), room);
    }

    proptest! {
        /// Whatever a frame is, its flow is named or not, without a panic.
        #[test]
        fn any_frame_is_survived(mut bytes in prop::collection::vec(any::<u8>(), 0..400), v6: bool) {
            if let Some(place) = bytes.get_mut(12..15) {
                place.copy_from_slice(if v6 { &[0x86, 0xdd, 0x60] } else { &[8, 0, 0x45] });
            }
            let length = bytes.len().min(crate::frame::HEAD_MAX);
            let (head, tail) = bytes.split_at_mut(length);
            let tail_bytes = crate::frame::Bytes { start: 0, len: tail.len() };
            let tail = [vm_memory::VolatileSlice::from(tail)];
            let frame = Frame {
                head,
                tail: crate::frame::Memory::Host(&tail),
                tail_bytes,
                offloads: Default::default(),
            };
            let _ = super::key(MacAddr([2; 6]), Direction::In, Action::Limited, &frame);
        }
    }
}
