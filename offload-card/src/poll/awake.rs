//! Whether the data threads of this process that are awake have a CPU each.
//!
//! If not, the scheduler gives each of them a tick's time, some milliseconds, and a queue waits so long for its thread. So they
//! hand the CPU on when they have done a batch. (The queues of one device share threads then; this is about several devices.)

use std::sync::atomic::{AtomicU32, Ordering};

/// Data threads that do not sleep.
static AWAKE: AtomicU32 = AtomicU32::new(0);

/// Batches after which a thread asks again which CPUs it may use.
const REMEMBERED: u32 = 1024;

/// How many CPUs the calling thread, and those it starts, may use. If the host does not say, there are enough.
pub fn cpus() -> u32 {
    rustix::thread::sched_getaffinity(None).map_or(u32::MAX, |set| set.count())
}

/// A data thread's part in it.
#[derive(Debug)]
pub(super) struct Awake {
    counted: bool,
    /// CPUs that this thread may use.
    cpus: u32,
    /// Batches until they are looked up again.
    remembered: u32,
}

impl Awake {
    /// For a thread that is not awake yet.
    pub(super) fn new() -> Self {
        Self { counted: false, cpus: 0, remembered: 0 }
    }

    /// The calling thread is awake from now on, or not.
    pub(super) fn set(&mut self, awake: bool) {
        if self.counted != awake {
            self.counted = awake;
            if awake {
                AWAKE.fetch_add(1, Ordering::Relaxed);
            } else {
                AWAKE.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// More are awake than there are CPUs for them. Costs a load where there is but one thread.
    #[inline]
    pub(super) fn outnumber_cpus(&mut self) -> bool {
        let awake = AWAKE.load(Ordering::Relaxed);
        awake > 1 && self.more_than_cpus(awake)
    }

    fn more_than_cpus(&mut self, awake: u32) -> bool {
        if self.remembered == 0 {
            self.remembered = REMEMBERED;
            self.cpus = cpus();
        }
        self.remembered -= 1;
        awake > self.cpus
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    use super::*;

    #[test]
    fn two_threads_on_one_cpu_are_too_many_until_one_sleeps() {
        // In a process of its own, as all tests: nobody else counts.
        std::thread::spawn(|| {
            let mut one = CpuSet::new();
            let all = sched_getaffinity(None).unwrap();
            one.set((0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).unwrap());
            sched_setaffinity(None, &one).unwrap();
            let (mut a, mut b) = (Awake::new(), Awake::new());
            assert!(!a.outnumber_cpus());
            a.set(true);
            assert!(!a.outnumber_cpus());
            b.set(true);
            assert!(a.outnumber_cpus() && b.outnumber_cpus());
            a.set(false);
            a.set(false);
            assert!(!b.outnumber_cpus());
            a.set(true);
            assert!(b.outnumber_cpus());
            drop(a);
            assert!(!b.outnumber_cpus());
        })
        .join()
        .unwrap();
    }
}
