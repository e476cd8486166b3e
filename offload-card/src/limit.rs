//! Log lines that a guest or a peer can cause: a few, then few.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that may come at once.
const BURST: u32 = 10;
/// After that, one in this time.
const INTERVAL: Duration = Duration::from_secs(10);

/// Bounds how much of the log one device or queue can fill. Not for the data path: there is a lock in it.
#[derive(Debug, Default)]
pub struct LogLimit(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Lines written of a burst.
    used: u32,
    /// When one of them was forgiven last.
    since: Option<Instant>,
    left_out: u64,
}

/// To be put at the end of a line: how many there would have been before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeftOut(u64);

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            n => write!(f, " ({n} lines about this were left out)"),
        }
    }
}

impl LogLimit {
    /// Calls `say` if a line may be written now.
    pub fn say(&self, say: impl FnOnce(LeftOut)) {
        // The lock is not held while the line is written: the log may be slow.
        if let Some(left_out) = self.admit(Instant::now()) {
            say(left_out);
        }
    }

    fn admit(&self, now: Instant) -> Option<LeftOut> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = *state.since.get_or_insert(now);
        let forgiven = now.saturating_duration_since(since).as_secs() / INTERVAL.as_secs();
        if forgiven > 0 {
            state.used = state.used.saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX));
            state.since = Some(now);
        }
        if state.used >= BURST {
            state.left_out += 1;
            return None;
        }
        state.used += 1;
        Some(LeftOut(std::mem::take(&mut state.left_out)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_leaves_few_lines_and_they_say_so() {
        let limit = LogLimit::default();
        let start = Instant::now();
        let lines = |at: Duration| (0..1000).filter_map(|_| limit.admit(start + at)).collect::<Vec<_>>();
        assert_eq!(lines(Duration::ZERO), [LeftOut(0); BURST as usize]);
        let later = lines(INTERVAL);
        assert_eq!(later, [LeftOut(990)]);
        assert_eq!(later[0].to_string(), " (990 lines about this were left out)");
        assert_eq!(lines(INTERVAL * 1000)[..2], [LeftOut(999), LeftOut(0)]);
    }
}
