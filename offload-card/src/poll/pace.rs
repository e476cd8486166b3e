//! When a data thread looks again, and when it sleeps.
//!
//! A sleep costs a kick and a wake-up, for the driver or the device; a look costs next to nothing, but takes the CPU from
//! others. An adaptive thread looks as long as looking has lately found something soon:
//!
//! ```text
//!   work │←── window: look ──→│←──── sleep ────→│ woken
//!        │←────────────── gap ─────────────────→│   gap up to max: the window becomes twice the gap, at most max
//!                                                   longer: half the window, soon 0
//! ```
//!
//! So a queue with requests every 20 µs is polled, one with a request every millisecond is not looked at in vain at all. While
//! requests are under way the gaps are others, and so is what a sleep costs: there is a window for these, too.
//!
//! A thread that looks while others wait for its CPU takes what it meant to save. Where these are data threads of the same
//! process, they look and work in turns ([`Awake`]). That it is anybody else it finds out by its clock, which jumps when the
//! scheduler lets others run, and by the scheduler's own count of that (a hypervisor below makes clocks jump, too); then it
//! sleeps for want of work, for a while, as it would without polling.

use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use tracing::debug;

use super::awake::Awake;
use crate::slice;

/// Looks between two looks at the clock.
const LOOKS: u32 = 16;
/// A window below this is none.
const MIN_WINDOW: Duration = Duration::from_micros(2);
/// What a sleep costs both sides is so many times what a completion's costs, which wakes nobody but the card.
const COMPLETIONS_DIVISOR: u32 = 4;
/// Two readings of the clock with nothing but looks between them are as far apart only if others ran, here or on the processor
/// itself.
const PUT_ASIDE: Duration = Duration::from_micros(200);
/// How long a thread that others have put aside does not look, at first, and at most if they do it again and again.
const MIN_PENALTY: Duration = Duration::from_millis(1);
const MAX_PENALTY: Duration = Duration::from_secs(1);

/// Longest window, if nobody says otherwise: as much CPU time as a sleep costs both sides, so that looking in vain never
/// does worse than twice the better choice. `offload-bench` (one request at a time, `card-irq`), on KVM without hardware
/// virtualization: 30 µs of the vCPU and 20 µs of the card. Where exits are cheaper, less would do.
pub const DEFAULT_MAX: Duration = Duration::from_micros(50);

/// Whether a data thread looks for work or sleeps until it is woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum PollMode {
    /// Sleep as soon as there is nothing to do.
    Never,
    /// Look while that has lately found work soon, sleep otherwise.
    #[default]
    Adaptive,
    /// Never sleep while a queue is started; takes a whole CPU.
    Always,
}

/// A mode and its bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PollPolicy {
    /// The mode.
    pub mode: PollMode,
    /// Longest time [`PollMode::Adaptive`] looks without finding anything.
    pub max: Duration,
}

impl Default for PollPolicy {
    fn default() -> Self {
        Self { mode: PollMode::default(), max: DEFAULT_MAX }
    }
}

/// The command line's part of it; `#[command(flatten)]` it into a card's own.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct PollArgs {
    /// When data threads look for work instead of sleeping until they are woken.
    #[arg(long, value_enum, default_value_t)]
    pub poll: PollMode,
    /// Longest time an adaptive data thread looks without finding anything, in microseconds.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX.as_micros() as u32,
        value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub poll_max_us: u32,
}

impl PollArgs {
    /// What they say.
    pub fn policy(&self) -> PollPolicy {
        PollPolicy { mode: self.poll, max: Duration::from_micros(self.poll_max_us.into()) }
    }
}

/// What to do after a look that found nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Look again at once.
    Look,
    /// Ask for kicks, look once more, and sleep.
    Sleep,
}

/// What there is to find for a thread that looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// What the driver does next.
    Driver,
    /// That, and what the host is asked for already.
    Completions,
}

/// Decides for one data thread. In its loop: [`Pacer::worked`] after every look that found work, [`Pacer::idle`] after
/// one that did not, [`Pacer::sleeps`] before and [`Pacer::woke`] after a sleep.
#[derive(Debug)]
pub struct Pacer {
    policy: PollPolicy,
    /// By what is awaited.
    windows: [Duration; 2],
    /// Looks in vain since there was work.
    looks: u32,
    /// What they were for.
    awaited: Awaited,
    /// When the first of them ended, roughly.
    since: Option<Instant>,
    /// When the last one ended, roughly.
    last: Option<Instant>,
    /// When the last one before a sleep ended.
    asleep: Option<Instant>,
    others: Others,
    awake: Awake,
}

impl Pacer {
    /// One that has not seen anything yet, of a thread that is awake.
    pub fn new(policy: PollPolicy) -> Self {
        let mut awake = Awake::new();
        awake.set(true);
        Self {
            policy,
            windows: [Duration::ZERO; 2],
            looks: 0,
            awaited: Awaited::Driver,
            since: None,
            last: None,
            asleep: None,
            others: Others::default(),
            awake,
        }
    }

    /// The last looks found nothing: if the next one does, polling has saved a sleep.
    pub fn looks_in_vain(&self) -> bool {
        self.looks > 0
    }

    /// A look found work.
    pub fn worked(&mut self) {
        self.forget();
        self.make_way();
    }

    /// Lets another data thread of this process run, if there are more of them than CPUs.
    #[inline]
    fn make_way(&mut self) {
        if self.awake.outnumber_cpus() {
            self.others.set_short(true);
            std::thread::yield_now();
        }
    }

    /// A look found nothing.
    pub fn idle(&mut self, awaited: Awaited) -> Next {
        self.idle_at(awaited, Instant::now, involuntary_switches)
    }

    fn idle_at(
        &mut self,
        awaited: Awaited,
        now: impl FnOnce() -> Instant,
        switches: impl FnOnce() -> i64,
    ) -> Next {
        match self.policy.mode {
            PollMode::Never => return Next::Sleep,
            PollMode::Always => {}
            PollMode::Adaptive => {
                let window = self.windows[awaited as usize];
                self.awaited = awaited;
                // A thread that is not to look reads the clock once per sleep.
                if window.is_zero() || self.others.waiting || self.looks % LOOKS == LOOKS - 1 {
                    let now = now();
                    let since = *self.since.get_or_insert(now);
                    let last = self.last.replace(now).unwrap_or(now);
                    if self.others.want_cpu(last, now, switches)
                        || now.saturating_duration_since(since) >= window
                    {
                        self.asleep = Some(now);
                        return Next::Sleep;
                    }
                }
            }
        }
        // Not 0 when it wraps around: there were looks.
        self.looks = self.looks.checked_add(1).unwrap_or(1);
        std::hint::spin_loop();
        self.make_way();
        Next::Look
    }

    /// The thread is about to sleep.
    pub fn sleeps(&mut self) {
        self.awake.set(false);
    }

    /// The thread has slept, for whatever reason it was woken.
    pub fn woke(&mut self) {
        self.woke_at(Instant::now);
    }

    fn woke_at(&mut self, now: impl FnOnce() -> Instant) {
        self.awake.set(true);
        let looked = match (self.since, self.asleep) {
            (Some(since), Some(asleep)) if self.looks > 0 => asleep.saturating_duration_since(since),
            _ => Duration::ZERO,
        };
        self.forget();
        let Some(asleep) = self.asleep.take() else { return };
        let gap = looked + now().saturating_duration_since(asleep);
        let bound = match self.awaited {
            Awaited::Driver => self.policy.max,
            Awaited::Completions => self.policy.max / COMPLETIONS_DIVISOR,
        };
        let window = &mut self.windows[self.awaited as usize];
        *window = if gap <= bound {
            // Twice, as gaps are not all the same.
            (2 * gap).clamp(MIN_WINDOW, bound.max(MIN_WINDOW))
        } else {
            Some(*window / 2).filter(|w| *w >= MIN_WINDOW).unwrap_or_default()
        };
    }

    fn forget(&mut self) {
        (self.looks, self.since, self.last) = (0, None, None);
    }
}

/// Others that want the CPU of a thread that looks.
#[derive(Debug, Default)]
struct Others {
    /// They have shown it: there is no looking until `until`.
    waiting: bool,
    until: Option<Instant>,
    penalty: Duration,
    /// How often the scheduler had taken the CPU away when the clock jumped last.
    switches: i64,
    /// The thread has a short slice.
    short: bool,
}

impl Others {
    /// There was nothing but looks between `last` and `now`, both read from the clock. True if there are to be no more.
    fn want_cpu(&mut self, last: Instant, now: Instant, switches: impl FnOnce() -> i64) -> bool {
        if now.saturating_duration_since(last) >= PUT_ASIDE && self.switched(switches()) {
            // Soon again: they are here to stay.
            let soon =
                self.until.is_some_and(|until| now.saturating_duration_since(until) < 16 * self.penalty);
            self.penalty = if soon { (2 * self.penalty).min(MAX_PENALTY) } else { MIN_PENALTY };
            self.until = Some(now + self.penalty);
            self.set(true);
        } else if self.waiting && self.until.is_none_or(|until| until <= now) {
            self.set(false);
        }
        self.waiting
    }

    fn switched(&mut self, switches: i64) -> bool {
        std::mem::replace(&mut self.switches, switches) != switches
    }

    fn set(&mut self, waiting: bool) {
        self.waiting = waiting;
        self.set_short(waiting);
    }

    /// A thread that sleeps is to run as soon as it is woken, even where another one looks; and one that hands its CPU on
    /// gives up the rest of its slice, which should be little.
    fn set_short(&mut self, short: bool) {
        if self.short != short {
            self.short = short;
            let slice = if short { slice::shorten() } else { slice::reset() };
            if let Err(e) = slice {
                debug!("the thread's time slice stays as it is: {e}");
            }
        }
    }
}

/// How often the scheduler has taken the CPU away from this thread.
fn involuntary_switches() -> i64 {
    // It cannot fail.
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.involuntary_context_switches())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// A thread whose look takes 10 ns, and its clock.
    struct Thread {
        pacer: Pacer,
        now: Instant,
        looks: u64,
        sleeps: u64,
        switches: i64,
    }

    impl Thread {
        fn new(mode: PollMode) -> Self {
            let pacer = Pacer::new(PollPolicy { mode, max: 50 * US });
            Self { pacer, now: Instant::now(), looks: 0, sleeps: 0, switches: 0 }
        }

        /// Work comes after `gap`; what it takes to get it.
        fn gap(&mut self, gap: Duration) {
            self.gap_of(Awaited::Driver, gap);
        }

        fn gap_of(&mut self, awaited: Awaited, gap: Duration) {
            let due = self.now + gap;
            while self.now < due {
                let now = self.now;
                let switches = self.switches;
                match self.pacer.idle_at(awaited, || now, || switches) {
                    Next::Look => {
                        self.looks += 1;
                        self.now += Duration::from_nanos(10);
                    }
                    Next::Sleep => {
                        self.sleeps += 1;
                        self.pacer.sleeps();
                        self.now = due;
                        self.pacer.woke_at(|| due);
                    }
                }
            }
            self.pacer.worked();
        }
    }

    impl Thread {
        /// Others take its CPU while it looks. False: it does not look.
        fn put_aside(&mut self) -> bool {
            self.switches += 1;
            self.clock_jumps()
        }

        fn clock_jumps(&mut self) -> bool {
            for turn in 0..4 * LOOKS {
                if turn == 2 * LOOKS {
                    self.now += Duration::from_millis(4);
                }
                let (now, switches) = (self.now, self.switches);
                if self.pacer.idle_at(Awaited::Driver, || now, || switches) == Next::Sleep {
                    self.pacer.sleeps();
                    self.pacer.woke_at(|| now + 5 * US);
                    return turn >= 2 * LOOKS;
                }
            }
            panic!("it looks while others wait");
        }
    }

    #[test]
    fn short_gaps_are_polled_through_after_the_first() {
        let mut thread = Thread::new(PollMode::Adaptive);
        for _ in 0..100 {
            thread.gap(20 * US);
        }
        assert_eq!(thread.sleeps, 1);
    }

    #[test]
    fn an_idle_thread_soon_looks_no_more() {
        let mut thread = Thread::new(PollMode::Adaptive);
        thread.gap(20 * US);
        thread.gap(20 * US);
        for _ in 0..10 {
            thread.gap(1000 * US);
        }
        let (looks, sleeps) = (thread.looks, thread.sleeps);
        for _ in 0..10 {
            thread.gap(1000 * US);
        }
        assert_eq!((thread.looks, thread.sleeps), (looks, sleeps + 10));
        // What it wasted until then is bounded: 40 + 20 + 10 + ... µs, and some looks between clock readings.
        assert!(looks < 2000 + 8000 + 10 * u64::from(LOOKS), "{looks}");
    }

    #[test]
    fn a_gap_beyond_the_bound_is_slept_through_and_a_burst_is_noticed() {
        let mut thread = Thread::new(PollMode::Adaptive);
        for _ in 0..20 {
            thread.gap(100 * US);
        }
        assert_eq!((thread.looks, thread.sleeps), (0, 20));
        thread.gap(5 * US);
        thread.gap(5 * US);
        assert_eq!(thread.sleeps, 21);
    }

    #[test]
    fn what_the_storage_takes_is_slept_through_and_what_the_driver_takes_in_between_is_not() {
        let mut thread = Thread::new(PollMode::Adaptive);
        for _ in 0..100 {
            thread.gap_of(Awaited::Driver, 3 * US);
            thread.gap_of(Awaited::Completions, 25 * US);
        }
        assert_eq!(thread.sleeps, 101);
        for _ in 0..100 {
            thread.gap_of(Awaited::Completions, 5 * US);
        }
        assert_eq!(thread.sleeps, 102);
    }

    #[test]
    fn a_thread_that_others_put_aside_looks_again_ever_later() {
        let mut thread = Thread::new(PollMode::Adaptive);
        let end = thread.now + Duration::from_secs(60);
        let mut asides = 0;
        while thread.now < end {
            thread.now += Duration::from_millis(10);
            thread.gap(5 * US);
            asides += u32::from(thread.put_aside());
        }
        // 1 ms, 2 ms, 4 ms, and so on to 1 s.
        assert!((60..80).contains(&asides), "{asides}");
        thread.now += MAX_PENALTY;
        let sleeps = thread.sleeps;
        thread.gap(5 * US);
        thread.gap(5 * US);
        assert!(thread.sleeps <= sleeps + 1 && !thread.pacer.others.waiting, "alone again");
    }

    #[test]
    fn a_clock_that_jumps_while_nobody_else_runs_here_says_nothing_of_others() {
        let mut thread = Thread::new(PollMode::Adaptive);
        for _ in 0..10 {
            thread.gap(5 * US);
            thread.gap(5 * US);
            thread.clock_jumps();
            assert!(!thread.pacer.others.waiting);
        }
    }

    #[test]
    fn the_scheduler_counts_what_it_takes_away() {
        let pin = |cpu: usize| {
            let mut one = CpuSet::new();
            one.set(cpu);
            sched_setaffinity(None, &one).unwrap();
        };
        let all = sched_getaffinity(None).unwrap();
        let cpu = (0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).unwrap();
        let done = AtomicBool::new(false);
        let busy = || {
            pin(cpu);
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        let counts = || {
            pin(cpu);
            let (before, since) = (involuntary_switches(), Instant::now());
            while involuntary_switches() == before {
                assert!(since.elapsed() < Duration::from_secs(60));
            }
            done.store(true, Ordering::Relaxed);
        };
        std::thread::scope(|scope| {
            scope.spawn(busy);
            scope.spawn(counts);
        });
    }

    #[test]
    fn the_other_modes_do_not_think() {
        let mut never = Thread::new(PollMode::Never);
        let mut always = Thread::new(PollMode::Always);
        for us in [0, 1, 5, 1, 500] {
            never.gap(us * US);
            always.gap(us * US);
        }
        assert_eq!((never.looks, never.sleeps, always.sleeps), (0, 4, 0));
    }

    #[test]
    fn looks_are_in_vain_until_one_finds_work() {
        let mut pacer = Pacer::new(PollPolicy { mode: PollMode::Always, max: US });
        assert!(!pacer.looks_in_vain());
        assert_eq!(pacer.idle(Awaited::Driver), Next::Look);
        assert!(pacer.looks_in_vain());
        pacer.worked();
        assert!(!pacer.looks_in_vain());
    }
}
