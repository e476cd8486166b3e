//! How soon the scheduler lets a thread run, and for how long.
//!
//! Guests that poll keep every processor busy. Linux from 6.12 on lets a thread that is woken run at once if it asks for a shorter slice
//! than the one that runs, and otherwise when that one's slice is over, which takes up to a tick; and if it has had its fair share of
//! that processor lately, it waits until the other has had that, too. A shorter slice needs no right, as nobody
//! gets more of a processor by it: only sooner. Precedence, a better nice value, needs `RLIMIT_NICE` or `CAP_SYS_NICE`.
//! (`sched(7)`, `sched_setattr(2)`.)

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::info;

/// As short as the kernel allows, in nanoseconds.
const SHORTEST_NS: u64 = 100_000;
/// How much better the nice value of what runs first is: its weight is three times that of a vCPU.
const PRECEDENCE: i32 = 5;

/// When a thread runs that others compete with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Turn {
    /// As others do.
    #[default]
    Usual,
    /// For a short time, and soon: for what consists of many short steps of several threads that a guest waits for.
    Soon,
    /// As soon as it is woken, and until it has nothing more to do: for what sleeps then. As [`Turn::Soon`] where
    /// this process may not have more than others. Threads that it starts have the usual slice, and no precedence.
    First,
}

/// The calling thread, and those it starts, run so from now on. `RLIMIT_NICE` is asked for once.
///
/// # Errors
/// What the host says; nothing has changed.
pub fn set(turn: Turn) -> io::Result<()> {
    static NICE: OnceLock<i32> = OnceLock::new();
    static DENIED: AtomicBool = AtomicBool::new(false);
    let mut attributes = attributes()?;
    // Real-time threads have neither.
    if attributes.sched_policy != libc::SCHED_OTHER.unsigned_abs() {
        return Ok(());
    }
    let nice = *NICE.get_or_init(|| attributes.sched_nice);
    attributes.sched_runtime = if turn == Turn::Usual { 0 } else { SHORTEST_NS };
    attributes.sched_nice = nice;
    // It stays once it is there: to take it back needs a right.
    attributes.sched_flags &= libc::SCHED_FLAG_RESET_ON_FORK as u64;
    if turn == Turn::First && !DENIED.load(Ordering::Relaxed) {
        let first = libc::sched_attr {
            sched_nice: (nice - PRECEDENCE).max(-20),
            sched_flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
            ..attributes
        };
        match apply(&first) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                if !DENIED.swap(true, Ordering::Relaxed) {
                    info!(
                        "guests that keep the processors busy delay this card's threads: RLIMIT_NICE allows no nice value of {}",
                        first.sched_nice
                    );
                }
            }
            done => return done,
        }
    }
    apply(&attributes)
}

fn apply(attributes: &libc::sched_attr) -> io::Result<()> {
    // SAFETY: the attributes outlive the call, which reads as many bytes of them as they say.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(attributes), 0) })
}

fn attributes() -> io::Result<libc::sched_attr> {
    // SAFETY: all zeroes is a valid sched_attr.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: the call writes `size` bytes at most to the attributes, which have as many and outlive it.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) })?;
    attributes.size = size;
    Ok(attributes)
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::process::{Resource, Rlimit, setrlimit};
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

    use super::*;

    /// Nice value and slice of a thread that this one starts.
    fn of_a_child() -> (i32, u64) {
        thread::spawn(of_this).join().unwrap()
    }

    fn of_this() -> (i32, u64) {
        let attributes = attributes().unwrap();
        (attributes.sched_nice, attributes.sched_runtime)
    }

    #[test]
    fn a_slice_is_inherited_and_can_be_given_back() {
        let before = of_this();
        set(Turn::Soon).unwrap();
        let short = of_this();
        // Kernels before 6.12 say nothing of it.
        assert!([0, SHORTEST_NS].contains(&short.1), "{}", short.1);
        assert_eq!(short.0, before.0);
        assert_eq!(of_a_child(), short);
        set(Turn::Usual).unwrap();
        assert_eq!(of_this(), before);
    }

    #[test]
    fn precedence_is_not_inherited_and_can_be_had_again() {
        let before = of_this();
        for _ in 0..2 {
            set(Turn::First).unwrap();
            let (nice, slice) = of_this();
            assert!(nice == before.0 - PRECEDENCE && [0, SHORTEST_NS].contains(&slice), "{nice} {slice}");
            assert!(of_a_child().0 >= 0);
            set(Turn::Usual).unwrap();
            assert_eq!(of_this(), before);
        }
    }

    #[test]
    fn without_the_right_to_it_first_is_soon() {
        // Capabilities are the thread's own. The limit, and that it was denied, are the process's, which is this test's alone.
        thread::spawn(|| {
            let limit = Rlimit { current: Some(0), maximum: Some(0) };
            setrlimit(Resource::Nice, limit).unwrap();
            let mut sets = capabilities(None).unwrap();
            sets.effective -= CapabilitySet::SYS_NICE;
            set_capabilities(None, sets).unwrap();
            let before = of_this();
            set(Turn::First).unwrap();
            assert_eq!(of_this().0, before.0);
            assert!([0, SHORTEST_NS].contains(&of_this().1));
            set(Turn::Usual).unwrap();
            assert_eq!(of_this(), before);
        })
        .join()
        .unwrap();
    }
}
