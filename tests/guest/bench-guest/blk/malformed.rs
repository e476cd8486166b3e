//! `blk-malformed`: requests that break the rules (VirtIO 1.3, 2.7.5.3, 2.7.13, 5.2.6), one after the other on a ring of their own.

use super::CONFIG_CAPACITY;
use crate::memory::Dma;
use crate::serial;
use crate::stage::{Context, Job, Progress};
use crate::time::Clock;
use crate::virtio::{self, Type};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use guest::args;
use guest::json::Object;
use guest::ring::{Descriptor, INDIRECT, NEXT, WRITE};

/// Layout of the buffer: header, status, indirect table, data of two pages.
const HEADER: usize = 0;
const STATUS: usize = 64;
const TABLE: usize = 128;
const DATA: usize = 4096;
const LEN: usize = 3 * 4096;

const READ: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

/// Waits this long for each answer, in microseconds.
const ANSWER_US: u64 = 1_000_000;

/// One part of a chain.
#[derive(Clone, Copy)]
enum Part {
    /// The header, of so many bytes, readable.
    Header(u32),
    /// The header's place, but writable.
    WritableHeader,
    /// Data the device reads, or writes.
    Readable(u32),
    Writable(u32),
    /// The status byte, or a status of so many bytes.
    Status(u32),
    ReadableStatus,
    /// Data at an address of choice, writable.
    At(u64, u32),
}

/// How the chain is put into the ring.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Twist {
    None,
    /// The last descriptor points at the first.
    Loop,
    /// The last descriptor points outside the table.
    BadNext,
    /// The head is outside the table.
    BadHead,
    /// As an indirect table of so many bytes more than it has.
    Indirect(i32),
    /// An indirect table whose first entry is an indirect table.
    Nested,
    /// The available index runs ahead.
    Jump,
}

struct Case {
    name: &'static str,
    kind: u32,
    /// The sector; counted from the end of the disk if negative.
    sector: i64,
    parts: &'static [Part],
    twist: Twist,
}

const fn case(name: &'static str, kind: u32, sector: i64, parts: &'static [Part]) -> Case {
    Case { name, kind, sector, parts, twist: Twist::None }
}

const fn twisted(name: &'static str, twist: Twist) -> Case {
    Case { name, kind: READ, sector: 0, parts: PROPER, twist }
}

const PROPER: &[Part] = &[Part::Header(16), Part::Writable(512), Part::Status(1)];

const CASES: &[Case] = &[
    case("no-status", READ, 0, &[Part::Header(16), Part::Readable(512)]),
    case("header-only", READ, 0, &[Part::Header(16)]),
    case("status-only", READ, 0, &[Part::Status(1)]),
    case("header-short", READ, 0, &[Part::Header(8), Part::Writable(512), Part::Status(1)]),
    case("header-writable", READ, 0, &[Part::WritableHeader, Part::Writable(512), Part::Status(1)]),
    case("status-readable", READ, 0, &[Part::Header(16), Part::Writable(512), Part::ReadableStatus]),
    case("status-empty", READ, 0, &[Part::Header(16), Part::Writable(512), Part::Status(0)]),
    case("read-into-readable", READ, 0, &[Part::Header(16), Part::Readable(512), Part::Status(1)]),
    case("write-from-writable", OUT, 0, &[Part::Header(16), Part::Writable(512), Part::Status(1)]),
    case("len-unaligned", READ, 0, &[Part::Header(16), Part::Writable(513), Part::Status(1)]),
    case("write-len-unaligned", OUT, 0, &[Part::Header(16), Part::Readable(511), Part::Status(1)]),
    case("read-nothing", READ, 0, &[Part::Header(16), Part::Status(1)]),
    case("len-zero", READ, 0, &[Part::Header(16), Part::Writable(0), Part::Status(1)]),
    case("len-huge", READ, 0, &[Part::Header(16), Part::Writable(u32::MAX), Part::Status(1)]),
    case("past-end", READ, i64::MIN, PROPER),
    case("crossing-end", READ, -1, &[Part::Header(16), Part::Writable(1024), Part::Status(1)]),
    case("write-crossing-end", OUT, -1, &[Part::Header(16), Part::Readable(1024), Part::Status(1)]),
    case("sector-wraps", READ, i64::MAX, PROPER),
    case("unknown-type", 0x7777, 0, PROPER),
    case("get-id-short", GET_ID, 0, &[Part::Header(16), Part::Writable(8), Part::Status(1)]),
    case("flush-with-data", FLUSH, 0, &[Part::Header(16), Part::Writable(512), Part::Status(1)]),
    case("flush-with-sector", FLUSH, 77, &[Part::Header(16), Part::Status(1)]),
    case("write", OUT, 0, &[Part::Header(16), Part::Readable(512), Part::Status(1)]),
    case("address-nowhere", READ, 0, &[Part::Header(16), Part::At(0x7fff_ffff_f000, 512), Part::Status(1)]),
    case("address-wraps", READ, 0, &[Part::Header(16), Part::At(u64::MAX - 255, 512), Part::Status(1)]),
    case("address-apic", READ, 0, &[Part::Header(16), Part::At(0xfee0_0000, 512), Part::Status(1)]),
    twisted("loop", Twist::Loop),
    twisted("bad-next", Twist::BadNext),
    twisted("bad-head", Twist::BadHead),
    twisted("indirect-odd", Twist::Indirect(-8)),
    twisted("indirect-empty", Twist::Indirect(-48)),
    twisted("indirect-long", Twist::Indirect(16 * 4096)),
    twisted("indirect-nested", Twist::Nested),
    twisted("index-jump", Twist::Jump),
];

/// What a request got.
struct Answer {
    status: u8,
    used: Option<u32>,
    needs_reset: bool,
}

struct Malformed<'a> {
    context: &'a Context<'a>,
    number: u32,
    wanted: args::Device<'static>,
    left: Vec<&'static Case>,
    run: u64,
    not_alive: u64,
    error: Option<String>,
}

/// Builds the job.
pub(crate) fn malformed<'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
    args: &args::Malformed<'_>,
) -> Result<Box<dyn Job + 'c>, String> {
    for name in &args.cases {
        if !CASES.iter().any(|case| case.name == *name) {
            return Err(alloc::format!("cases=: there is no {name}"));
        }
    }
    let wanted_cases = |case: &&Case| args.cases.is_empty() || args.cases.contains(&case.name);
    let mut left: Vec<&'static Case> = CASES.iter().filter(wanted_cases).collect();
    left.reverse();
    let wanted = args::Device {
        index: wanted.index,
        queues: Some(1),
        ring: wanted.ring,
        interrupts: false,
        vectors: false,
        timeout_us: wanted.timeout_us,
        refused: Vec::new(),
    };
    Ok(Box::new(Malformed { context, number, wanted, left, run: 0, not_alive: 0, error: None }))
}

/// A device opened for one case.
struct Victim<'a> {
    device: virtio::Device<'a>,
    queue: virtio::Queue,
    buffer: Dma,
    capacity: u64,
    clock: Clock,
}

impl<'a> Victim<'a> {
    fn open(context: &Context<'a>, wanted: &args::Device<'_>) -> Result<Self, String> {
        let features = super::RO | super::FLUSH;
        let device = virtio::Device::open(context.devices, Type::Block, wanted, features, context.clock)?;
        let queue = device.queue(0)?;
        device.start();
        let capacity = u64::from_le_bytes(device.config(CONFIG_CAPACITY));
        Ok(Self { device, queue, buffer: Dma::new(LEN)?, capacity, clock: context.clock })
    }

    fn descriptor(&self, part: Part) -> Descriptor {
        let (address, len, flags) = match part {
            Part::Header(len) => (self.buffer.address(HEADER), len, 0),
            Part::WritableHeader => (self.buffer.address(HEADER), 16, WRITE),
            Part::Readable(len) => (self.buffer.address(DATA), len, 0),
            Part::Writable(len) => (self.buffer.address(DATA), len, WRITE),
            Part::Status(len) => (self.buffer.address(STATUS), len, WRITE),
            Part::ReadableStatus => (self.buffer.address(STATUS), 1, 0),
            Part::At(address, len) => (address, len, WRITE),
        };
        Descriptor { address, len, flags, next: 0 }
    }

    fn request(&mut self, case: &Case) -> Answer {
        let sector = match case.sector {
            i64::MIN => self.capacity,
            i64::MAX => u64::MAX,
            sector if sector < 0 => self.capacity.wrapping_add_signed(sector),
            sector => sector as u64,
        };
        self.buffer.put(HEADER, case.kind);
        self.buffer.put(HEADER + 4, 0u32);
        self.buffer.put(HEADER + 8, sector);
        self.buffer.put(STATUS, 0xffu8);
        let mut chain: Vec<Descriptor> = case.parts.iter().map(|part| self.descriptor(*part)).collect();
        let last = chain.len() - 1;
        for (index, descriptor) in chain.iter_mut().enumerate().take(last) {
            descriptor.flags |= NEXT;
            descriptor.next = index as u16 + 1;
        }
        let size = self.queue.ring.size();
        let mut head = 0;
        let mut skip = 0;
        match case.twist {
            Twist::None => {}
            Twist::Loop => {
                chain[last] = Descriptor { flags: chain[last].flags | NEXT, next: 0, ..chain[last] }
            }
            Twist::BadNext => {
                chain[last] = Descriptor { flags: chain[last].flags | NEXT, next: size + 7, ..chain[last] };
            }
            Twist::BadHead => head = size + 3,
            Twist::Indirect(more) => chain = self.indirect(&chain, more),
            Twist::Nested => {
                let inner =
                    Descriptor { address: self.buffer.address(TABLE), len: 48, flags: INDIRECT, next: 0 };
                chain = self.indirect(&[inner], 0);
            }
            Twist::Jump => skip = 1000 + size,
        }
        for (index, descriptor) in (0..).zip(chain) {
            self.queue.ring.set_descriptor(index, descriptor);
        }
        self.queue.ring.push(head);
        self.queue.ring.skip(skip);
        self.queue.ring.publish();
        self.queue.bell.ring();
        self.answer()
    }

    /// Moves a chain into the table and points at it.
    fn indirect(&mut self, chain: &[Descriptor], more: i32) -> Vec<Descriptor> {
        for (index, descriptor) in chain.iter().enumerate() {
            self.buffer.put(TABLE + 16 * index, *descriptor);
        }
        let len = (16 * chain.len() as i32 + more) as u32;
        Vec::from([Descriptor { address: self.buffer.address(TABLE), len, flags: INDIRECT, next: 0 }])
    }

    fn answer(&mut self) -> Answer {
        let mut answer = Answer { status: 0xff, used: None, needs_reset: false };
        for _ in 0..ANSWER_US / 100 {
            self.clock.delay(100);
            answer.needs_reset = self.device.health().needs_reset;
            answer.used = self.queue.ring.pop().map(|used| used.len);
            if answer.used.is_some() || answer.needs_reset {
                break;
            }
        }
        answer.status = self.buffer.get(STATUS);
        answer
    }

    fn alive(&mut self) -> bool {
        // What is still in the ring is not of interest any more.
        while self.queue.ring.pop().is_some() {}
        let answer =
            self.request(&Case { name: "", kind: READ, sector: 0, parts: PROPER, twist: Twist::None });
        answer.status == 0 && answer.used.is_some() && !answer.needs_reset
    }
}

impl Malformed<'_> {
    fn one(&self, case: &Case) -> Result<bool, String> {
        let mut victim = Victim::open(self.context, &self.wanted)?;
        let answer = victim.request(case);
        // Alive as it is, or at least after a reset.
        let dead_ring = answer.needs_reset || answer.used.is_none();
        let alive = if dead_ring {
            drop(victim);
            Victim::open(self.context, &self.wanted)?.alive()
        } else {
            victim.alive()
        };
        let event = Object::event("case")
            .number("job", self.number)
            .text("case", case.name)
            .number("status", answer.status)
            .number("used_len", answer.used.map_or(-1, i64::from))
            .flag("needs_reset", answer.needs_reset)
            .flag("timeout", answer.used.is_none() && !answer.needs_reset)
            .flag("alive", alive);
        serial::print(event);
        Ok(alive)
    }
}

impl Job for Malformed<'_> {
    fn begin(&mut self, _now: u64) {}

    fn poll(&mut self, _now: u64) -> Progress {
        let Some(case) = self.left.pop() else { return Progress::Done };
        self.run += 1;
        match self.one(case) {
            Ok(alive) => {
                self.not_alive += u64::from(!alive);
                Progress::Busy
            }
            Err(what) => {
                self.error = Some(alloc::format!("{}: {what}", case.name));
                Progress::Done
            }
        }
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        let mut event = event.number("cases", self.run).number("not_alive", self.not_alive);
        if let Some(what) = &self.error {
            event = event.text("first_error", what);
        }
        (event, self.error.is_none())
    }
}
