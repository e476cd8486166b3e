//! `blk-first`: one read, announced the moment it is done.

use super::queue::{Op, Queue, Request};
use super::{Disk, Sizing};
use crate::serial;
use crate::stage::{Context, Job, Progress};
use crate::time::{self, Clock};
use alloc::boxed::Box;
use alloc::string::String;
use guest::args;
use guest::json::Object;

const BLOCK: u32 = 4096;

struct First<'a> {
    disk: Disk<'a>,
    clock: Clock,
    number: u32,
    interrupts: bool,
    timeout: u64,
    start: u64,
    /// Ticks it took, and the status byte.
    done: Option<(u64, u8)>,
}

/// Builds the job.
pub(crate) fn first<'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
) -> Result<Box<dyn Job + 'c>, String> {
    let sizing = Sizing { depth: 1, block: BLOCK as usize };
    let disk = Disk::open_untouched(context, number, wanted, sizing)?;
    Ok(Box::new(First {
        disk,
        clock: context.clock,
        number,
        interrupts: wanted.interrupts,
        timeout: context.clock.ticks(wanted.timeout_us),
        start: 0,
        done: None,
    }))
}

impl Job for First<'_> {
    fn begin(&mut self, now: u64) {
        self.start = now;
        let queue = &mut self.disk.queues[0];
        queue.begin();
        queue.submit(Request { op: Op::Read, sector: 0, len: BLOCK, tag: 0 }, now);
        queue.kick();
    }

    fn poll(&mut self, now: u64) -> Progress {
        if self.interrupts {
            self.disk.device.acknowledge();
        }
        if let Some(done) = self.disk.queues[0].complete() {
            let took = time::now() - self.start;
            let us = self.clock.micros(took);
            serial::print(Object::event("first_io").number("us", us).number("job", self.number));
            self.done = Some((took, done.status));
            return Progress::Done;
        }
        if now.saturating_sub(self.start) > self.timeout { Progress::Done } else { Progress::Idle }
    }

    fn arm(&mut self) -> bool {
        if !self.interrupts {
            return false;
        }
        let queue = &mut self.disk.queues[0];
        queue.set_interrupts(true);
        !queue.has_completions()
    }

    fn disarm(&mut self) {
        self.disk.queues.iter_mut().filter(|_| self.interrupts).for_each(|queue| queue.set_interrupts(false));
    }

    fn patience(&self, now: u64) -> Option<u64> {
        Some(self.clock.micros(self.timeout.saturating_sub(now.saturating_sub(self.start))) + 1)
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        let health = self.disk.device.health();
        let bogus: u64 = self.disk.queues.iter().map(Queue::bogus).sum();
        let event = event
            .flag("needs_reset", health.needs_reset)
            .flag("timed_out", self.done.is_none())
            .number("bogus", bogus);
        let Some((took, status)) = self.done else { return (event, false) };
        let event = event.number("first_io_us", self.clock.micros(took)).number("status", status);
        (event, status == 0 && bogus == 0 && !health.needs_reset)
    }
}
