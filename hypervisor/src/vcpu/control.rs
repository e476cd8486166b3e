//! Whether the vCPUs are to run, and where they wait when they are not.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    Run,
    Hold,
    Stop,
}

/// What a vCPU does after it has looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Run,
    End,
}

#[derive(Debug)]
struct State {
    want: Want,
    // vCPUs that are here and not in the guest.
    parked: usize,
}

/// Shared by the vCPUs of one life of the guest and whoever starts and stops them.
///
/// The order "set what is wanted, then kick every vCPU" loses nothing: a vCPU that looked before the change is kicked out
/// of the guest after it, and looks again.
#[derive(Debug)]
pub struct RunControl {
    state: Mutex<State>,
    changed: Condvar,
}

impl RunControl {
    /// Control that lets the vCPUs run, or holds them from the start.
    pub fn new(held: bool) -> Self {
        let want = if held { Want::Hold } else { Want::Run };
        Self { state: Mutex::new(State { want, parked: 0 }), changed: Condvar::new() }
    }

    /// Lets them run.
    pub fn release(&self) {
        self.set(Want::Run);
    }

    /// Holds them once they are kicked.
    pub fn hold(&self) {
        self.set(Want::Hold);
    }

    /// Ends them once they are kicked; for good.
    pub fn stop(&self) {
        self.set(Want::Stop);
    }

    fn set(&self, want: Want) {
        let mut state = self.lock();
        if state.want != Want::Stop {
            state.want = want;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until `count` vCPUs are out of the guest, after they have been kicked.
    pub fn wait_until_parked(&self, count: usize) {
        let state = self.lock();
        drop(self.changed.wait_while(state, |s| s.parked < count).unwrap_or_else(PoisonError::into_inner));
    }

    /// A vCPU looks what it is to do, and waits here while it is to be held; `on_hold` is called before it waits.
    pub(super) fn consult(&self, on_hold: impl FnOnce()) -> Flow {
        let mut state = self.lock();
        if state.want == Want::Hold {
            on_hold();
            state = self.park(state, |s| s.want == Want::Hold);
        }
        if state.want == Want::Stop { Flow::End } else { Flow::Run }
    }

    /// A vCPU has nothing more to do and waits to be ended.
    pub(super) fn wait_for_stop(&self) {
        let state = self.lock();
        drop(self.park(state, |s| s.want != Want::Stop));
    }

    fn park<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        while_: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        state.parked += 1;
        self.changed.notify_all();
        state = self.changed.wait_while(state, |s| while_(s)).unwrap_or_else(PoisonError::into_inner);
        state.parked -= 1;
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn held_vcpus_wait_until_released_and_end_when_stopped() {
        let control = Arc::new(RunControl::new(true));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let control = Arc::clone(&control);
                thread::spawn(move || control.consult(|| {}))
            })
            .collect();
        control.wait_until_parked(3);
        control.release();
        assert!(threads.into_iter().all(|t| t.join().unwrap() == Flow::Run));
        let finished = {
            let control = Arc::clone(&control);
            thread::spawn(move || control.wait_for_stop())
        };
        control.wait_until_parked(1);
        control.stop();
        finished.join().unwrap();
        control.release();
        assert_eq!(control.consult(|| {}), Flow::End);
    }
}
