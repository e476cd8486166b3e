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
//! process, they look and work in turns ([`Awake`]); where it is anybody else ([`Others`]), it sleeps for want of work, for a
//! while, as it would without polling. And a thread that does not look has precedence ([`Turn::First`]), as an interrupt has: what it
//! does, others wait for, also those whose processor it takes.

use std::time::{Duration, Instant};

use tracing::debug;

use super::awake::Awake;
use super::contention::{Others, Times};
use crate::schedule::{self, Turn};

/// Looks between two looks at the clock.
const LOOKS: u32 = 16;
/// A window below this is none.
const MIN_WINDOW: Duration = Duration::from_micros(2);
/// What a sleep costs both sides is so many times what a completion's costs, which wakes nobody but the card.
const COMPLETIONS_DIVISOR: u32 = 4;

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
    /// When the last one before a sleep ended.
    asleep: Option<Instant>,
    others: Others,
    awake: Awake,
    turn: Turn,
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
            asleep: None,
            others: Others::default(),
            awake,
            turn: Turn::default(),
        }
    }

    /// The last looks found nothing: if the next one does, polling has saved a sleep.
    pub fn looks_in_vain(&self) -> bool {
        self.looks > 0
    }

    /// The thread may sleep although there is work.
    pub fn may_rest(&self) -> bool {
        self.policy.mode != PollMode::Always
    }

    /// A look that finds nothing but what the host is asked for is followed by a sleep, and not by another look.
    pub fn sleeps_next(&self) -> bool {
        match self.policy.mode {
            PollMode::Never => true,
            PollMode::Adaptive => self.windows[Awaited::Completions as usize].is_zero(),
            PollMode::Always => false,
        }
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
            // It gives up the rest of its slice, which should be little.
            if self.turn == Turn::Usual {
                self.take_turn(Turn::Soon);
            }
            std::thread::yield_now();
        }
    }

    fn take_turn(&mut self, turn: Turn) {
        if self.turn != turn {
            self.turn = turn;
            if let Err(e) = schedule::set(turn) {
                debug!("the thread runs when it did: {e}");
            }
        }
    }

    /// A look found nothing.
    pub fn idle(&mut self, awaited: Awaited) -> Next {
        self.idle_at(awaited, Instant::now, Times::now)
    }

    fn idle_at(
        &mut self,
        awaited: Awaited,
        now: impl FnOnce() -> Instant,
        times: impl FnOnce() -> Option<Times>,
    ) -> Next {
        match self.policy.mode {
            PollMode::Never => return Next::Sleep,
            PollMode::Always => {}
            PollMode::Adaptive => {
                let window = self.windows[awaited as usize];
                self.awaited = awaited;
                // A thread that is not to look reads the clock once per sleep, and has no need to know who else wants the CPU.
                if window.is_zero() || self.others.waiting() || self.looks % LOOKS == LOOKS - 1 {
                    let now = now();
                    let since = *self.since.get_or_insert(now);
                    if window.is_zero()
                        || self.others.want_cpu(now, times)
                        || now.saturating_duration_since(since) >= window
                    {
                        self.asleep = Some(now);
                        return Next::Sleep;
                    }
                }
            }
        }
        if self.turn == Turn::First {
            self.take_turn(Turn::Usual);
        }
        // Not 0 when it wraps around: there were looks.
        self.looks = self.looks.checked_add(1).unwrap_or(1);
        std::hint::spin_loop();
        self.make_way();
        Next::Look
    }

    /// The thread is about to sleep. If it does not look at all now, it runs as soon as there is something to do, until that is done.
    /// One that looks for one thing and sleeps for another stays as it is: a turn is a system call.
    pub fn sleeps(&mut self) {
        self.awake.set(false);
        if self.policy.mode == PollMode::Never
            || self.others.waiting()
            || self.windows.iter().all(Duration::is_zero)
        {
            self.take_turn(Turn::First);
        }
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
        (self.looks, self.since) = (0, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// A thread whose look takes 10 ns, and its clock.
    struct Thread {
        pacer: Pacer,
        now: Instant,
        looks: u64,
        sleeps: u64,
    }

    impl Thread {
        fn new(mode: PollMode) -> Self {
            let pacer = Pacer::new(PollPolicy { mode, max: 50 * US });
            Self { pacer, now: Instant::now(), looks: 0, sleeps: 0 }
        }

        /// Work comes after `gap`; what it takes to get it.
        fn gap(&mut self, gap: Duration) {
            self.gap_of(Awaited::Driver, gap);
        }

        fn gap_of(&mut self, awaited: Awaited, gap: Duration) {
            let due = self.now + gap;
            while self.now < due {
                let now = self.now;
                match self.pacer.idle_at(awaited, || now, || None) {
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

    #[test]
    fn short_gaps_are_polled_through_after_the_first() {
        let mut thread = Thread::new(PollMode::Adaptive);
        for _ in 0..100 {
            thread.gap(20 * US);
        }
        assert_eq!(thread.sleeps, 1);
    }

    #[test]
    fn a_thread_knows_when_it_will_not_look_for_completions() {
        let mut thread = Thread::new(PollMode::Adaptive);
        assert!(thread.pacer.sleeps_next());
        thread.gap_of(Awaited::Completions, 5 * US);
        assert!(!thread.pacer.sleeps_next());
        for _ in 0..5 {
            thread.gap_of(Awaited::Completions, 1000 * US);
        }
        assert!(thread.pacer.sleeps_next());
        assert!(Thread::new(PollMode::Never).pacer.sleeps_next());
        assert!(!Thread::new(PollMode::Always).pacer.sleeps_next());
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
    fn who_does_not_look_does_not_ask_who_else_wants_the_cpu() {
        let mut pacer = Pacer::new(PollPolicy { mode: PollMode::Adaptive, max: 50 * US });
        let mut now = Instant::now();
        for _ in 0..100 {
            let asked = || panic!("the scheduler was asked");
            assert_eq!(pacer.idle_at(Awaited::Completions, || now, asked), Next::Sleep);
            pacer.sleeps();
            now += 10_000 * US;
            pacer.woke_at(|| now);
            pacer.worked();
        }
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

    /// The guest whose processor it looks on must get it.
    #[test]
    fn a_thread_that_does_not_look_is_the_first_when_it_is_woken_and_one_that_looks_is_not() {
        let mut never = Thread::new(PollMode::Never);
        assert_eq!(never.pacer.turn, Turn::Usual);
        never.gap(US);
        assert_eq!(never.pacer.turn, Turn::First);
        let mut adaptive = Thread::new(PollMode::Adaptive);
        adaptive.gap(20 * US);
        // It had not learnt to look before this sleep.
        assert_eq!(adaptive.pacer.turn, Turn::First);
        adaptive.gap(20 * US);
        assert_eq!((adaptive.pacer.turn, adaptive.sleeps), (Turn::Usual, 1));
        // What it sleeps for is the storage; for the driver it looks.
        for _ in 0..10 {
            adaptive.gap_of(Awaited::Completions, 25 * US);
            assert_eq!(adaptive.pacer.turn, Turn::Usual);
            adaptive.gap_of(Awaited::Driver, 3 * US);
        }
        for _ in 0..10 {
            adaptive.gap(1000 * US);
        }
        assert_eq!(adaptive.pacer.turn, Turn::First);
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
