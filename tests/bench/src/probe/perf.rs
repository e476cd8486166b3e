//! What the host kernel counts for single threads when asked to: exits to user space and processor cycles.

use std::io;

use perf_event::events::{Hardware, Tracepoint};
use perf_event::{Builder, Counter};

/// One event, counted on some threads.
#[derive(Debug)]
pub(super) struct ThreadCounters(Option<Vec<Counter>>);

impl ThreadCounters {
    /// Exits of vCPU threads to user space. The kernel may not permit it, or tracefs not be mounted.
    pub(super) fn user_exits(tids: impl Iterator<Item = u32>) -> Self {
        Self::count(tids, || Ok(Builder::new(Tracepoint::with_name("kvm/kvm_userspace_exit")?)))
    }

    /// Cycles of threads and of those they will start, in the guest, the kernel and user space. Many virtual machines have no
    /// such counters.
    pub(super) fn cycles(tids: impl Iterator<Item = u32>) -> Self {
        Self::count(tids, || {
            let mut builder = Builder::new(Hardware::CPU_CYCLES);
            builder.inherit(true);
            Ok(builder)
        })
    }

    fn count<'a>(tids: impl Iterator<Item = u32>, event: impl Fn() -> io::Result<Builder<'a>>) -> Self {
        let one = |tid: u32| -> io::Result<Counter> {
            let mut counter =
                event()?.observe_pid(tid.cast_signed()).exclude_kernel(false).exclude_hv(false).build()?;
            counter.enable()?;
            Ok(counter)
        };
        Self(
            tids.map(|tid| one(tid).ok()).collect::<Option<Vec<_>>>().filter(|counters| !counters.is_empty()),
        )
    }

    /// So many so far; `None` where they are not counted.
    pub(super) fn read(&mut self) -> Option<u64> {
        self.0.as_mut()?.iter_mut().map(|counter| counter.read().ok()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Most virtual machines cannot; those that can count ours.
    #[test]
    fn cycles_go_by_or_are_not_counted() {
        let mut counters =
            ThreadCounters::cycles(std::iter::once(nix::unistd::gettid().as_raw().cast_unsigned()));
        let before = counters.read();
        let sum: u64 = (0..1_000_000_u64).map(std::hint::black_box).sum();
        assert!(sum > 0);
        let after = counters.read();
        assert_eq!(before.is_some(), after.is_some());
        assert!(before.is_none() || after > before, "{before:?} {after:?}");
    }

    #[test]
    fn without_threads_nothing_is_counted() {
        assert_eq!(ThreadCounters::user_exits(std::iter::empty()).read(), None);
    }
}
