//! Keeps the queues of a disk full with whatever a [`Source`] wants done.

use super::queue::{Op, Queue, Request};
use super::{CONFIG_CAPACITY, Disk};
use crate::stage::{Job, Progress};
use crate::time::Clock;
use crate::virtio::Signals;
use alloc::string::String;
use core::fmt::Display;
use guest::histogram::Histogram;
use guest::json::Object;

/// Decides what is read and written.
pub(super) trait Source {
    /// The next request for a queue; `None`: nothing for now.
    fn next(&mut self, queue: usize, now: u64) -> Option<Request>;

    /// Fills the data of a write, or the range of what is to be erased.
    fn prepare(&mut self, request: &Request, data: &mut [u8]);

    /// A request was completed well.
    fn completed(&mut self, request: &Request, data: &[u8]);

    /// A request came back with an error.
    fn failed(&mut self, request: &Request);

    /// Nothing is in flight and nothing was wanted: whether there is more to do after all.
    fn more(&mut self, now: u64) -> bool;

    /// From now on it counts: true once, when a warm-up is over.
    fn warm(&mut self, _now: u64) -> bool {
        false
    }

    /// Whether requests become due while others are in flight: the CPU must not sleep then.
    fn paced(&self) -> bool {
        false
    }

    /// Whether the result is to have the distribution of the latencies.
    fn distribution(&self) -> bool {
        false
    }

    /// Adds to the result; whether it is good.
    fn report(&self, event: Object) -> (Object, bool);
}

/// A load on a disk.
pub(super) struct Load<'a, S> {
    disk: Disk<'a>,
    source: S,
    clock: Clock,
    interrupts: bool,
    timeout: u64,
    begun: u64,
    reads: u64,
    writes: u64,
    flushes: u64,
    erased: u64,
    errors: u64,
    first_error: Option<String>,
    timed_out: bool,
}

impl<'a, S: Source> Load<'a, S> {
    pub(super) fn new(
        mut disk: Disk<'a>,
        source: S,
        clock: Clock,
        wanted: &guest::args::Device<'_>,
        gaps_us: Option<u64>,
    ) -> Self {
        if let Some(micros) = gaps_us {
            disk.queues.iter_mut().for_each(|queue| queue.keep_gaps(clock.ticks(micros)));
        }
        Self {
            disk,
            source,
            clock,
            interrupts: wanted.interrupts,
            timeout: clock.ticks(wanted.timeout_us),
            begun: 0,
            reads: 0,
            writes: 0,
            flushes: 0,
            erased: 0,
            errors: 0,
            first_error: None,
            timed_out: false,
        }
    }

    /// Shows every slot's data; nothing is in flight yet.
    pub(super) fn for_each_buffer(&mut self, mut f: impl FnMut(&mut [u8])) {
        for queue in &mut self.disk.queues {
            queue.for_each_buffer(&mut f);
        }
    }

    fn error(&mut self, what: impl Display) {
        self.errors += 1;
        if self.first_error.is_none() {
            self.first_error = Some(alloc::format!("{what}"));
        }
    }

    /// Takes completions of one queue and submits what comes next; whether anything happened. `now` is the one reading of the clock
    /// of a turn: it ends and begins the latencies of all its requests.
    fn turn(&mut self, index: usize, now: u64) -> bool {
        let mut happened = false;
        while let Some(done) = self.disk.queues[index].complete() {
            happened = true;
            let queue = &mut self.disk.queues[index];
            queue.count(&done, now);
            match done.request.op {
                Op::Read => self.reads += 1,
                Op::Write => self.writes += 1,
                Op::Flush => self.flushes += 1,
                Op::Discard | Op::WriteZeroes => self.erased += 1,
                Op::GetId => {}
            }
            if done.status == 0 {
                self.source.completed(&done.request, queue.data(done.slot, done.request.len as usize));
            } else {
                self.source.failed(&done.request);
                let Request { op, sector, len, .. } = done.request;
                self.error(format_args!("{op:?} of {len} bytes at sector {sector}: status {}", done.status));
            }
            self.disk.queues[index].release(done.slot);
        }
        happened | self.fill(index, now)
    }

    fn fill(&mut self, index: usize, now: u64) -> bool {
        let queue = &mut self.disk.queues[index];
        let mut submitted = false;
        while let Some(slot) = queue.next_slot() {
            let Some(request) = self.source.next(index, now) else { break };
            if request.op.sends() {
                self.source.prepare(&request, queue.data_mut(slot, request.len as usize));
            }
            queue.submit(request, now);
            submitted = true;
        }
        if submitted {
            queue.kick();
        }
        submitted
    }
}

impl<S: Source> Job for Load<'_, S> {
    fn begin(&mut self, now: u64) {
        self.begun = now;
        self.disk.queues.iter_mut().for_each(Queue::begin);
    }

    fn poll(&mut self, now: u64) -> Progress {
        if self.interrupts {
            self.disk.device.acknowledge();
        }
        let mut happened = false;
        for index in 0..self.disk.queues.len() {
            happened |= self.turn(index, now);
        }
        if self.source.warm(now) {
            self.begun = now;
            (self.reads, self.writes, self.flushes, self.erased) = (0, 0, 0, 0);
            self.disk.queues.iter_mut().for_each(Queue::measure);
        }
        if happened {
            return Progress::Busy;
        }
        if self.disk.queues.iter().all(|queue| queue.in_flight() == 0) {
            return match (self.source.more(now), self.source.paced()) {
                (true, true) => Progress::Awake,
                (true, false) => Progress::Busy,
                (false, _) => Progress::Done,
            };
        }
        if self.disk.queues.iter().any(|queue| queue.silence(now) > self.timeout) {
            self.timed_out = true;
            return Progress::Done;
        }
        if self.source.paced() { Progress::Awake } else { Progress::Idle }
    }

    fn arm(&mut self) -> bool {
        if !self.interrupts {
            return false;
        }
        for queue in &mut self.disk.queues {
            queue.set_interrupts(true);
        }
        !self.disk.queues.iter().any(Queue::has_completions)
    }

    fn disarm(&mut self) {
        if self.interrupts {
            for queue in &mut self.disk.queues {
                queue.set_interrupts(false);
            }
        }
    }

    /// Completions wake it; the clock is for those that do not come.
    fn patience(&self, now: u64) -> Option<u64> {
        let silence = self.disk.queues.iter().map(|queue| queue.silence(now)).max().unwrap_or(0);
        Some(self.clock.micros(self.timeout.saturating_sub(silence)) + 1)
    }

    fn finish(&mut self, now: u64, event: Object) -> (Object, bool) {
        let bogus: u64 = self.disk.queues.iter().map(Queue::bogus).sum();
        if bogus > 0 {
            self.error(format_args!("{bogus} used elements name requests that were not in flight"));
        }
        if self.timed_out {
            let waiting: usize = self.disk.queues.iter().map(Queue::in_flight).sum();
            self.error(format_args!("{waiting} requests are not answered in time"));
        }
        let health = self.disk.device.health();
        let capacity = u64::from_le_bytes(self.disk.device.config(CONFIG_CAPACITY));
        let changed = self.disk.device.generation() != self.disk.generation || capacity != self.disk.capacity;
        let mut latency = Histogram::default();
        let (mut ops, mut bytes, mut total_ops, mut gap) = (0, 0, 0, 0);
        let (mut total, mut measured) = (Signals::default(), Signals::default());
        for queue in &self.disk.queues {
            ops += queue.stats.ops;
            bytes += queue.stats.bytes;
            total_ops += queue.total;
            total = total + queue.signals();
            measured = measured + queue.measured();
            // A queue that never answered again has its gap too.
            gap = gap.max(queue.stats.gaps.longest()).max(queue.silence(now));
            latency.merge(&queue.stats.latency);
        }
        let micros = self.clock.micros(now - self.begun);
        let (clock, rate) = (self.clock, |count: u64| count * 1_000_000 / micros.max(1));
        let mut event = event
            .number("ops", ops)
            .number("reads", self.reads)
            .number("writes", self.writes)
            .number("flushes", self.flushes)
            .number("erased", self.erased)
            .number("bytes", bytes)
            .number("errors", self.errors)
            .number("measured_us", micros)
            .number("iops", rate(ops))
            .number("max_gap_us", clock.micros(gap));
        event = clock.report(event, &latency, self.source.distribution()).number("total_ops", total_ops);
        event = Signals::report(event, measured, total, &clock)
            .number("config_irqs", health.config_interrupts)
            .flag("config_changed", changed)
            .flag("needs_reset", health.needs_reset)
            .flag("timed_out", self.timed_out)
            .number("capacity", capacity)
            .list(
                "per_queue",
                self.disk.queues.iter().map(|queue| queue.report(|ticks| clock.micros(ticks))),
            );
        if self.disk.queues.iter().any(|queue| queue.stats.gaps.kept().is_some()) {
            let since = |at: u64| clock.micros(at.saturating_sub(self.begun));
            let all = self.disk.queues.iter().filter_map(|queue| queue.stats.gaps.kept()).flatten();
            event = event.pairs("gaps", all.map(|&(end, gap)| (since(end), clock.micros(gap))));
        }
        if let Some(what) = &self.first_error {
            event = event.text("first_error", what);
        }
        let (event, good) = self.source.report(event);
        (event, good && self.errors == 0 && !health.needs_reset)
    }
}
