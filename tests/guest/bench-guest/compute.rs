//! `compute`: a load on the CPU that knows how long its work takes when nobody disturbs it.

use crate::stage::{Context, Job, Progress};
use crate::time::{self, Clock};
use alloc::boxed::Box;
use guest::json::Object;

/// Length of a slice, in nanoseconds, and how many of them find out the shortest time of one.
const SLICE_NS: u64 = 5_000;
const CALIBRATION: u32 = 4_000;
/// Rounds that are timed to find the length of a slice.
const TRIAL: u64 = 20_000;

struct Compute {
    clock: Clock,
    /// Ticks the job lasts.
    limit: u64,
    rounds: u64,
    /// Ticks of an undisturbed slice.
    calibrated: u64,
    start: u64,
    slices: u64,
    lost: u64,
    gaps: u64,
    longest: u64,
    state: u64,
}

/// Builds the job; `micros`: how long it lasts at most. Takes some 20 ms to calibrate.
pub(crate) fn compute<'c>(context: &Context<'_>, micros: u64) -> Box<dyn Job + 'c> {
    let clock = context.clock;
    let mut state = 1;
    // The best of a few: the first runs with cold caches and a sleepy CPU.
    let trial = (0..50).map(|_| slice(TRIAL, &mut state)).min().unwrap_or(0).max(1);
    let wanted = u128::from(SLICE_NS) * u128::from(clock.khz()) / 1_000_000;
    let rounds = (u128::from(TRIAL) * wanted / u128::from(trial)).max(1) as u64;
    let calibrated = (0..CALIBRATION).map(|_| slice(rounds, &mut state)).min().unwrap_or(0);
    let limit = clock.ticks(micros);
    Box::new(Compute {
        clock,
        limit,
        rounds,
        calibrated,
        start: 0,
        slices: 0,
        lost: 0,
        gaps: 0,
        longest: 0,
        state,
    })
}

/// Computes: a chain of multiplications in registers, so that neither caches nor memory have a say. Returns the ticks it took.
fn slice(rounds: u64, state: &mut u64) -> u64 {
    let begun = time::now();
    let mut value = *state;
    for _ in 0..rounds {
        value = core::hint::black_box(value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
    *state = value;
    time::now() - begun
}

impl Job for Compute {
    fn begin(&mut self, now: u64) {
        self.start = now;
    }

    fn poll(&mut self, now: u64) -> Progress {
        if now.saturating_sub(self.start) >= self.limit {
            return Progress::Done;
        }
        let excess = slice(self.rounds, &mut self.state).saturating_sub(self.calibrated);
        self.slices += 1;
        self.lost += excess;
        self.gaps += u64::from(excess > self.clock.ticks(1));
        self.longest = self.longest.max(excess);
        Progress::Awake
    }

    fn background(&self) -> bool {
        true
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        let work = u128::from(self.slices) * u128::from(self.calibrated);
        let event = event
            .number("slices", self.slices)
            .number("slice_ns", self.clock.nanos(self.calibrated))
            .number("work_us", self.clock.micros(work.min(u128::from(u64::MAX)) as u64))
            .number("lost_us", self.clock.micros(self.lost))
            .number("gaps", self.gaps)
            .number("max_gap_ns", self.clock.nanos(self.longest));
        (event, true)
    }
}
