//! Whether others want the processor of a thread that looks.
//!
//! A look then takes time from whoever is to bring the work: a guest's vCPU, as often as not. The scheduler says how long a
//! thread was ready to run and did not. Where that is much, and not because of other data threads, which look and work in turns
//! ([`super::awake`]), looking ceases for a while. On two processors with two polling guests and a card it is half of
//! the time, and with a processor each it is a hundredth.

use std::cell::OnceCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::awake;

/// How often the scheduler is asked.
const WINDOW: Duration = Duration::from_millis(4);
/// Others want the CPU if the thread has waited for it for this part of the time, or more.
const MUCH: u32 = 4;
/// How long the thread does not look then, at first, and at most if it is the same again and again.
const MIN_PENALTY: Duration = Duration::from_millis(16);
const MAX_PENALTY: Duration = Duration::from_secs(1);

/// What the scheduler says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// The thread was ready to run, and did not.
    delayed: Duration,
    /// CPU time of all threads of the process.
    process: Duration,
    /// CPUs that the thread may use.
    cpus: u32,
}

/// A thread's view of others.
#[derive(Debug, Default)]
pub(super) struct Others {
    /// When the scheduler was asked last, and what it said.
    asked: Option<(Instant, Times)>,
    /// They want the CPU: there is no looking until `until`.
    waiting: bool,
    until: Option<Instant>,
    penalty: Duration,
}

impl Others {
    /// They wanted the CPU when this was looked at last.
    pub(super) fn waiting(&self) -> bool {
        self.waiting
    }

    /// There should be no looks at `now`. `times` is [`Times::now`].
    pub(super) fn want_cpu(&mut self, now: Instant, times: impl FnOnce() -> Option<Times>) -> bool {
        if self.waiting {
            if self.until.is_some_and(|until| now < until) {
                return true;
            }
            self.waiting = false;
            self.asked = None;
        }
        if self.asked.is_some_and(|(at, _)| now.saturating_duration_since(at) < WINDOW) {
            return false;
        }
        let Some(times) = times() else { return false };
        let before = self.asked.replace((now, times));
        if before.is_some_and(|(at, before)| times.much_waited(&before, now.saturating_duration_since(at))) {
            // Soon again: they are here to stay.
            let soon =
                self.until.is_some_and(|until| now.saturating_duration_since(until) < 16 * self.penalty);
            self.penalty = if soon { (2 * self.penalty).min(MAX_PENALTY) } else { MIN_PENALTY };
            self.until = Some(now + self.penalty);
            self.waiting = true;
        }
        self.waiting
    }
}

impl Times {
    /// For the calling thread. `None`: this kernel does not say.
    pub(super) fn now() -> Option<Self> {
        thread_local! {
            static SCHEDSTAT: OnceCell<Option<File>> = const { OnceCell::new() };
        }
        let delayed = SCHEDSTAT.with(|file| {
            let file = file.get_or_init(|| File::open("/proc/thread-self/schedstat").ok()).as_ref()?;
            // CPU time, time of waiting for it, and how often it was given one.
            let mut text = [0; 64];
            let read = file.read_at(&mut text, 0).ok()?;
            std::str::from_utf8(text.get(..read)?).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
        })?;
        let process = Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).ok()?;
        Some(Self { delayed: Duration::from_nanos(delayed), process, cpus: awake::cpus() })
    }

    /// The thread has waited much since `before`, which is `elapsed` ago, and not because of this process's other threads.
    fn much_waited(&self, before: &Self, elapsed: Duration) -> bool {
        let delayed = self.delayed.saturating_sub(before.delayed);
        let process = self.process.saturating_sub(before.process);
        let all = elapsed.saturating_mul(self.cpus);
        MUCH * delayed >= elapsed && process < all - all / 10
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A thread that may look for all of its time, on one CPU.
    struct Thread {
        others: Others,
        now: Instant,
        times: Times,
    }

    impl Thread {
        fn new() -> Self {
            let times = Times { delayed: Duration::ZERO, process: Duration::ZERO, cpus: 1 };
            Self { others: Others::default(), now: Instant::now(), times }
        }

        /// `time` goes by, of which it waits for `delayed`, and its process has `process` CPU time. For how long it looks.
        fn run(&mut self, time: Duration, delayed: u32, process: u32) -> Duration {
            let end = self.now + time;
            let mut looked = Duration::ZERO;
            while self.now < end {
                self.now += MS;
                self.times.delayed += MS * delayed / 100;
                self.times.process += MS * process / 100;
                let times = self.times;
                if !self.others.want_cpu(self.now, || Some(times)) {
                    looked += MS;
                }
            }
            looked
        }
    }

    #[test]
    fn a_thread_that_waits_little_looks() {
        let mut thread = Thread::new();
        assert_eq!(thread.run(1000 * MS, 20, 80), 1000 * MS);
        // As the only thread of a process that has a CPU and uses it in part.
        assert_eq!(thread.run(1000 * MS, 2, 30), 1000 * MS);
    }

    #[test]
    fn a_thread_that_waits_much_looks_ever_more_rarely_and_soon_again_when_it_does_not() {
        let mut thread = Thread::new();
        let first = thread.run(1000 * MS, 50, 50);
        let second = thread.run(9000 * MS, 50, 50);
        // 16 ms after 4 ms, 32 ms, and so on to 1 s.
        assert!(first < 50 * MS && second < 60 * MS, "{first:?} {second:?}");
        thread.run(MAX_PENALTY, 1, 99);
        assert_eq!(thread.run(1000 * MS, 1, 99), 1000 * MS);
        // What was long ago counts no more.
        thread.run(17 * MAX_PENALTY, 1, 99);
        thread.run(10 * MS, 50, 50);
        thread.run(MIN_PENALTY, 1, 99);
        assert_eq!(thread.run(100 * MS, 1, 99), 100 * MS);
    }

    #[test]
    fn threads_of_this_process_are_no_others() {
        let mut thread = Thread::new();
        assert_eq!(thread.run(1000 * MS, 50, 98), 1000 * MS);
    }

    #[test]
    fn a_kernel_that_does_not_say_is_asked_and_nothing_is_assumed() {
        let mut others = Others::default();
        let now = Instant::now();
        for ms in 0..100 {
            assert!(!others.want_cpu(now + ms * MS, || None));
        }
    }

    #[test]
    fn the_scheduler_says_how_long_a_thread_waited_for_another() {
        let all = sched_getaffinity(None).unwrap();
        let mut one = CpuSet::new();
        one.set((0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).unwrap());
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                sched_setaffinity(None, &one).unwrap();
                while !done.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            scope.spawn(|| {
                sched_setaffinity(None, &one).unwrap();
                let (before, since) = (Times::now().unwrap(), Instant::now());
                assert_eq!(before.cpus, 1);
                while Times::now().unwrap().delayed < before.delayed + 10 * MS {
                    assert!(since.elapsed() < Duration::from_secs(60));
                }
                assert!(Times::now().unwrap().process > before.process);
                done.store(true, Ordering::Relaxed);
            });
        });
    }
}
