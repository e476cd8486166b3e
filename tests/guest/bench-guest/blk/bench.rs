//! `blk-bench`: requests as fast as they go.

use super::load::{Load, Source};
use super::queue::{Op, Request};
use super::{Disk, Sizing};
use crate::stage::{Context, Job};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use guest::args::{self, Order};
use guest::json::Object;
use guest::pace::Pace;
use guest::pattern::{Random, SECTOR};

struct Bench {
    first_sector: u64,
    block: u32,
    blocks: u64,
    writes: u8,
    order: Order,
    random: Random,
    cursors: Vec<u64>,
    queues: u64,
    left: u64,
    distribution: bool,
    pace: Option<Pace>,
    warmup: Option<u64>,
    duration: Option<u64>,
    /// End of the warm-up, then of the measurement.
    deadline: Option<u64>,
}

/// Builds the job.
pub(crate) fn bench<'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
    args: &args::Bench,
) -> Result<Box<dyn Job + 'c>, String> {
    let load = &args.load;
    let disk = Disk::open(context, number, wanted, Sizing { depth: load.depth, block: load.block as usize })?;
    if disk.readonly && args.writes > 0 {
        return Err(String::from("rw=: the disk is read-only"));
    }
    let sectors = super::region(&disk, load, None)?;
    let queues = disk.queues.len() as u64;
    let blocks = sectors.count / (u64::from(load.block) / SECTOR as u64);
    let source = Bench {
        first_sector: sectors.first,
        block: load.block,
        blocks,
        writes: args.writes,
        order: args.order,
        random: Random::new(load.seed),
        // Each queue its own stretch.
        cursors: (0..queues).map(|queue| blocks / queues * queue).collect(),
        queues,
        left: load.ops.unwrap_or(u64::MAX),
        distribution: args.distribution,
        pace: args.rate.map(|rate| Pace::new(context.clock.khz() * 1000, rate)),
        warmup: (args.warmup_us > 0).then(|| context.clock.ticks(args.warmup_us)),
        duration: load.micros.map(|micros| context.clock.ticks(micros)),
        deadline: None,
    };
    let mut load = Load::new(disk, source, context.clock, wanted, load.gaps_us);
    load.fill_data(args.load.seed);
    Ok(Box::new(load))
}

impl Bench {
    fn over(&self, now: u64) -> bool {
        let expired = self.warmup.is_none() && self.deadline.is_some_and(|deadline| now >= deadline);
        self.left == 0 || expired
    }
}

impl Source for Bench {
    fn next(&mut self, queue: usize, now: u64) -> Option<Request> {
        if self.deadline.is_none() {
            self.deadline = self.warmup.or(self.duration).map(|ticks| now + ticks);
        }
        if self.over(now) || self.pace.as_mut().is_some_and(|pace| !pace.take(now)) {
            return None;
        }
        if self.warmup.is_none() {
            self.left -= 1;
        }
        let block = match self.order {
            Order::Random => self.random.below(self.blocks),
            Order::Sequential => {
                let block = self.cursors[queue] % self.blocks;
                self.cursors[queue] = block + 1;
                block
            }
        };
        let op = match self.writes {
            0 => Op::Read,
            100 => Op::Write,
            percent if self.random.below(100) < u64::from(percent) => Op::Write,
            _ => Op::Read,
        };
        let sector = self.first_sector + block * (u64::from(self.block) / SECTOR as u64);
        Some(Request { op, sector, len: self.block, tag: 0 })
    }

    /// The buffers were filled before: filling is not what is measured.
    fn prepare(&mut self, _request: &Request, _data: &mut [u8]) {}

    fn completed(&mut self, _request: &Request, _data: &[u8]) {}

    fn failed(&mut self, _request: &Request) {}

    fn more(&mut self, now: u64) -> bool {
        self.pace.is_some() && !self.over(now)
    }

    fn paced(&self) -> bool {
        self.pace.is_some()
    }

    fn warm(&mut self, now: u64) -> bool {
        let over = self.warmup.is_some() && self.deadline.is_some_and(|deadline| now >= deadline);
        if over {
            self.warmup = None;
            self.pace.iter_mut().for_each(Pace::forget);
            self.deadline = self.duration.map(|ticks| now + ticks);
        }
        over
    }

    fn distribution(&self) -> bool {
        self.distribution
    }

    fn report(&self, event: Object) -> (Object, bool) {
        let event = event.number("queue_count", self.queues);
        (self.pace.iter().fold(event, |event, pace| event.number("late", pace.late())), true)
    }
}

impl Load<'_, Bench> {
    /// Gives every buffer contents of its own.
    fn fill_data(&mut self, seed: u64) {
        let mut random = Random::new(seed);
        let mut block = vec![0; 512];
        for byte in &mut block {
            *byte = random.word() as u8;
        }
        self.for_each_buffer(|buffer| {
            for chunk in buffer.chunks_mut(512) {
                chunk.copy_from_slice(&block[..chunk.len()]);
            }
            block.rotate_left(1);
        });
    }
}
