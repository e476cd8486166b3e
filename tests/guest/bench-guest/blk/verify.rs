//! `blk-verify`: what was written is what is read.

use super::load::{Load, Source};
use super::queue::{Op, Request};
use super::{DISCARD, Disk, FLUSH, Sizing, WRITE_ZEROES};
use crate::memory;
use crate::stage::{Context, Job};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use guest::args::{self, Order, VerifyMode};
use guest::json::Object;
use guest::pattern::{self, Random, SECTOR, Shuffle};
use guest::requests::{RANGE, range};

/// What the region's blocks hold is not known: an error happened. Such blocks are not compared.
const UNKNOWN: u32 = 0;

/// What has been made of a block since it was written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Erased {
    /// Nothing.
    No,
    /// It reads as zeros.
    Zeros,
    /// It was discarded, and reads as anything.
    Anything,
}
/// How many earlier generations a block is compared with when it does not hold the right one.
const STALE_DEPTH: u32 = 64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Write,
    /// Flush, then `Read` or the end.
    FlushWritten,
    Read,
    Mixed,
    FlushMixed,
    LastRead,
    Over,
}

struct Verify {
    mode: VerifyMode,
    seed: u64,
    phase: Phase,
    first_sector: u64,
    block: u32,
    blocks: u64,
    queues: u64,
    /// Generation that each block holds.
    generations: Vec<u32>,
    erased: Vec<Erased>,
    /// One of so many mixed requests erases; 0: none.
    erase: u64,
    /// In flight, in the mixed phase.
    busy: Vec<bool>,
    /// Position of each queue in its pass.
    cursors: Vec<u64>,
    orders: Option<Vec<Shuffle>>,
    random: Random,
    generation: u32,
    loops: u64,
    loops_wanted: u64,
    mixed_left: u64,
    flush: bool,
    flush_due: bool,
    deadline: Option<u64>,
    /// Ticks that the deadline is after the first request.
    duration: Option<u64>,
    mismatches: u64,
    stale: u64,
    unknown: u64,
    first_mismatch: Option<String>,
}

/// Builds the job.
pub(crate) fn verify<'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
    args: &args::Verify,
) -> Result<Box<dyn Job + 'c>, String> {
    let load = &args.load;
    let sizing = Sizing { depth: load.depth, block: load.block as usize };
    let disk = Disk::open(context, number, wanted, sizing)?;
    let sectors = super::region(&disk, load, Some(64 << 20))?;
    let blocks = sectors.count / (u64::from(load.block) / SECTOR as u64);
    let queues = disk.queues.len() as u64;
    if (blocks as usize).saturating_mul(6) > memory::heap_left() / 2 {
        return Err(alloc::format!(
            "{blocks} blocks are more than the guest can keep in mind: a larger bs= or more RAM"
        ));
    }
    let mode = if disk.readonly { VerifyMode::Read } else { args.mode };
    let orders = (args.order == Order::Random).then(|| {
        (0..queues).map(|queue| Shuffle::new(share(blocks, queues, queue), load.seed ^ queue)).collect()
    });
    if args.erase > 0 && !(disk.device.has(DISCARD) && disk.device.has(WRITE_ZEROES)) {
        return Err(alloc::format!("erase={}: the disk has no DISCARD and WRITE_ZEROES", args.erase));
    }
    let duration = load.micros.map(|micros| context.clock.ticks(micros));
    // Mixed needs an end.
    let default_duration =
        (mode == VerifyMode::Mixed && load.ops.is_none()).then(|| context.clock.ticks(3_000_000));
    let source = Verify {
        mode,
        seed: load.seed,
        phase: if mode == VerifyMode::Read { Phase::Read } else { Phase::Write },
        first_sector: sectors.first,
        block: load.block,
        blocks,
        queues,
        generations: vec![if mode == VerifyMode::Read { args.generation } else { UNKNOWN }; blocks as usize],
        erased: vec![Erased::No; blocks as usize],
        erase: args.erase,
        busy: vec![false; blocks as usize],
        cursors: vec![0; queues as usize],
        orders,
        random: Random::new(load.seed),
        generation: args.generation,
        loops: 0,
        loops_wanted: args.loops,
        mixed_left: load.ops.unwrap_or(u64::MAX),
        flush: disk.device.has(FLUSH),
        flush_due: false,
        deadline: None,
        duration: duration.or(default_duration),
        mismatches: 0,
        stale: 0,
        unknown: 0,
        first_mismatch: None,
    };
    Ok(Box::new(Load::new(disk, source, context.clock, wanted, load.gaps_us)))
}

/// Blocks of the region that belong to a queue: every `queues`-th.
const fn share(blocks: u64, queues: u64, queue: u64) -> u64 {
    (blocks + queues - 1 - queue) / queues
}

impl Verify {
    fn late(&self, now: u64) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline)
    }

    fn request(&self, op: Op, block: u64) -> Request {
        let sectors = u64::from(self.block) / SECTOR as u64;
        let (sector, len) = match op {
            // Where is said in the data.
            Op::Discard | Op::WriteZeroes => (0, RANGE as u32),
            _ => (self.first_sector + block * sectors, self.block),
        };
        Request { op, sector, len, tag: block }
    }

    /// The next block of a queue's pass.
    fn step(&mut self, queue: usize) -> Option<u64> {
        let k = self.cursors[queue];
        if k >= share(self.blocks, self.queues, queue as u64) {
            return None;
        }
        self.cursors[queue] += 1;
        let k = self.orders.as_ref().map_or(k, |orders| orders[queue].at(k));
        Some(k * self.queues + queue as u64)
    }

    fn mixed(&mut self, queue: usize) -> Option<Request> {
        let share = share(self.blocks, self.queues, queue as u64);
        if share == 0 || self.mixed_left == 0 {
            return None;
        }
        let start = self.random.below(share);
        // A block in flight is passed over; more than a few in a row means a region smaller than the queue is deep.
        let block = (0..share.min(64))
            .map(|skip| (start + skip) % share * self.queues + queue as u64)
            .find(|block| !self.busy[*block as usize])?;
        self.busy[block as usize] = true;
        self.mixed_left -= 1;
        let op = match self.random.word() {
            _ if self.erase > 0 && self.random.below(self.erase) == 0 => {
                if self.random.below(4) == 0 {
                    Op::Discard
                } else {
                    Op::WriteZeroes
                }
            }
            word if word & 1 == 0 => Op::Read,
            _ => Op::Write,
        };
        Some(self.request(op, block))
    }

    fn next_generation(&self, block: u64) -> u32 {
        match self.phase {
            Phase::Mixed => self.generations[block as usize].max(self.generation) + 1,
            _ => self.generation,
        }
    }

    fn restart(&mut self, phase: Phase) {
        self.cursors.fill(0);
        self.phase = phase;
    }

    fn mismatch(&mut self, request: &Request, data: &[u8], at: usize, generation: u32) {
        self.mismatches += 1;
        let oldest = generation.saturating_sub(STALE_DEPTH).max(1);
        let earlier = (oldest..generation).rev().find(|earlier| {
            pattern::check_sectors(self.seed, request.sector, u64::from(*earlier), data).is_none()
        });
        self.stale += u64::from(earlier.is_some());
        if self.first_mismatch.is_none() {
            let sector = request.sector + (at / SECTOR) as u64;
            let found = data.get(at).copied().unwrap_or_default();
            let expected = match self.erased[request.tag as usize] {
                Erased::No => alloc::format!("of generation {generation}"),
                Erased::Zeros | Erased::Anything => "zero, as it was made".into(),
            };
            let mut text =
                alloc::format!("sector {sector} byte {}: {found:#04x} is not {expected}", at % SECTOR);
            if let Some(earlier) = earlier {
                text.push_str(&alloc::format!(": the block holds generation {earlier}"));
            }
            self.first_mismatch = Some(text);
        }
    }
}

impl Source for Verify {
    fn next(&mut self, queue: usize, now: u64) -> Option<Request> {
        if self.deadline.is_none() {
            self.deadline = self.duration.map(|duration| now + duration);
        }
        match self.phase {
            // What a cut-off pass did not write keeps its generation: the read that follows knows.
            Phase::Write if self.late(now) && self.loops > 0 => None,
            Phase::Write => self.step(queue).map(|block| self.request(Op::Write, block)),
            Phase::FlushWritten | Phase::FlushMixed => (queue == 0 && core::mem::take(&mut self.flush_due))
                .then_some(Request { op: Op::Flush, sector: 0, len: 0, tag: 0 }),
            Phase::Read | Phase::LastRead => self.step(queue).map(|block| self.request(Op::Read, block)),
            Phase::Mixed if self.late(now) => None,
            Phase::Mixed => self.mixed(queue),
            Phase::Over => None,
        }
    }

    fn prepare(&mut self, request: &Request, data: &mut [u8]) {
        if let Op::Discard | Op::WriteZeroes = request.op {
            let sectors = self.block / SECTOR as u32;
            let sector = self.first_sector + request.tag * u64::from(sectors);
            let unmap = request.op == Op::WriteZeroes && self.random.below(2) == 0;
            data.copy_from_slice(&range(sector, sectors, unmap));
            return;
        }
        pattern::fill_sectors(self.seed, request.sector, u64::from(self.next_generation(request.tag)), data);
    }

    fn completed(&mut self, request: &Request, data: &[u8]) {
        let block = request.tag as usize;
        match request.op {
            Op::Write => {
                self.generations[block] = self.next_generation(request.tag);
                self.erased[block] = Erased::No;
                self.busy[block] = false;
            }
            Op::Discard | Op::WriteZeroes => {
                let zeros = request.op == Op::WriteZeroes;
                self.erased[block] = if zeros { Erased::Zeros } else { Erased::Anything };
                self.busy[block] = false;
            }
            Op::Read => {
                self.busy[block] = false;
                match self.generations[block] {
                    UNKNOWN => self.unknown += 1,
                    _ if self.erased[block] == Erased::Anything => {}
                    generation if self.erased[block] == Erased::Zeros => {
                        if let Some(at) = data.iter().position(|byte| *byte != 0) {
                            self.mismatch(request, data, at, generation);
                        }
                    }
                    generation => {
                        let at =
                            pattern::check_sectors(self.seed, request.sector, u64::from(generation), data);
                        if let Some(at) = at {
                            self.mismatch(request, data, at, generation);
                        }
                    }
                }
            }
            Op::Flush | Op::GetId => {}
        }
    }

    fn failed(&mut self, request: &Request) {
        if request.op.sends() || request.op == Op::Read {
            self.busy[request.tag as usize] = false;
            if request.op.sends() {
                self.generations[request.tag as usize] = UNKNOWN;
            }
        }
    }

    fn more(&mut self, now: u64) -> bool {
        match self.phase {
            Phase::Write => {
                self.flush_due = self.flush;
                self.restart(Phase::FlushWritten);
            }
            Phase::FlushWritten => match self.mode {
                VerifyMode::Write => self.phase = Phase::Over,
                VerifyMode::Mixed => self.restart(Phase::Mixed),
                VerifyMode::Passes | VerifyMode::Read => self.restart(Phase::Read),
            },
            Phase::Mixed => {
                self.flush_due = self.flush;
                self.restart(Phase::FlushMixed);
            }
            Phase::FlushMixed => self.restart(Phase::LastRead),
            Phase::Read => {
                self.loops += 1;
                let again = match self.deadline {
                    Some(deadline) => now < deadline,
                    None => self.loops < self.loops_wanted,
                };
                match (again, self.mode) {
                    (true, VerifyMode::Read) => self.restart(Phase::Read),
                    (true, _) => {
                        self.generation += 1;
                        self.restart(Phase::Write);
                    }
                    (false, _) => self.phase = Phase::Over,
                }
            }
            Phase::LastRead | Phase::Over => self.phase = Phase::Over,
        }
        self.phase != Phase::Over
    }

    fn report(&self, event: Object) -> (Object, bool) {
        let mut event = event
            .number("mismatches", self.mismatches)
            .number("stale", self.stale)
            .number("unknown", self.unknown)
            .number("loops", self.loops);
        if let Some(what) = &self.first_mismatch {
            event = event.text("first_mismatch", what);
        }
        (event, self.mismatches == 0)
    }
}
