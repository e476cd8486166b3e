//! `blk-watch`: waits for a change of the configuration.

use super::{CONFIG_CAPACITY, Disk, Sizing};
use crate::gate;
use crate::stage::{Context, Job, Progress};
use crate::time::Clock;
use alloc::boxed::Box;
use alloc::string::String;
use guest::args;
use guest::json::Object;

/// How often the generation is looked at without interrupts, in microseconds.
const LOOK_US: u64 = 10_000;

struct Watch<'a> {
    disk: Disk<'a>,
    clock: Clock,
    interrupts: bool,
    ticks: u64,
    start: u64,
    looked: u64,
    changed: bool,
    before: u64,
}

/// Builds the job.
pub(crate) fn watch<'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
    args: &args::Watch,
) -> Result<Box<dyn Job + 'c>, String> {
    let disk = Disk::open(context, number, wanted, Sizing { depth: 1, block: 512 })?;
    Ok(Box::new(Watch {
        disk,
        clock: context.clock,
        interrupts: wanted.interrupts,
        ticks: context.clock.ticks(args.micros),
        start: 0,
        looked: 0,
        changed: false,
        before: 0,
    }))
}

impl Job for Watch<'_> {
    fn begin(&mut self, now: u64) {
        self.start = now;
        self.before = gate::interrupts();
    }

    fn poll(&mut self, now: u64) -> Progress {
        if self.interrupts {
            self.changed = self.disk.device.config_interrupts() > 0;
        } else if now - self.looked > self.clock.ticks(LOOK_US) {
            self.looked = now;
            // The generation may stay the same though the capacity grew: look at both.
            let capacity = u64::from_le_bytes(self.disk.device.config(CONFIG_CAPACITY));
            self.changed =
                self.disk.device.generation() != self.disk.generation || capacity != self.disk.capacity;
        }
        if self.changed || now - self.start > self.ticks { Progress::Done } else { Progress::Idle }
    }

    fn arm(&mut self) -> bool {
        self.interrupts
    }

    fn patience(&self, now: u64) -> Option<u64> {
        Some(self.clock.micros(self.ticks.saturating_sub(now.saturating_sub(self.start))) + 1)
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        let after = u64::from_le_bytes(self.disk.device.config(CONFIG_CAPACITY));
        let health = self.disk.device.health();
        let event = event
            .flag("changed", self.changed)
            .number("before", self.disk.capacity)
            .number("after", after)
            .number("wakeups", gate::interrupts() - self.before)
            .number("config_irqs", health.config_interrupts)
            .flag("needs_reset", health.needs_reset);
        (event, self.changed && !health.needs_reset)
    }
}
