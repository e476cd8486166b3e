//! How far a run is, on standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Between two lines where there is no terminal to draw a bar on.
const QUIET: Duration = Duration::from_secs(60);

/// A bar with the time left; a line now and then if standard error is no terminal.
pub(crate) struct Progress {
    bar: ProgressBar,
    lines: Option<Lines>,
}

struct Lines {
    began: Instant,
    last: Instant,
}

impl Progress {
    /// Of a run that takes so many samples.
    pub(crate) fn new(total_samples: u64) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total_samples), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len}  {eta} left  {wide_msg}") {
            bar.set_style(style);
        }
        let now = Instant::now();
        Self { bar, lines: (!is_terminal).then_some(Lines { began: now, last: now }) }
    }

    /// A sample has been taken.
    pub(crate) fn step(&mut self, cell: &str, system: &str, took: Duration) {
        self.bar.set_message(format!("{cell} on {system}: {:.1} s", took.as_secs_f64()));
        self.bar.inc(1);
        let Some(lines) = &mut self.lines else { return };
        if lines.last.elapsed() >= QUIET {
            lines.last = Instant::now();
            let (done, total) = (self.bar.position(), self.bar.length().unwrap_or_default());
            eprintln!("{}", line(done, total, lines.began.elapsed(), cell, system));
        }
    }

    /// Prints something with the bar out of the way.
    pub(crate) fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn line(done: u64, total: u64, spent: Duration, cell: &str, system: &str) -> String {
    let left = spent.as_secs_f64() / done.max(1) as f64 * total.saturating_sub(done) as f64;
    format!("{done} of {total} samples, about {:.0} min left; last was {cell} on {system}", left / 60.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_by_the_samples_so_far() {
        let text = line(100, 400, Duration::from_secs(600), "block/x", "card");
        assert_eq!(text, "100 of 400 samples, about 30 min left; last was block/x on card");
        assert!(line(0, 0, Duration::ZERO, "c", "s").contains("about 0 min"));
    }

    #[test]
    fn what_is_printed_meanwhile_is_given_back() {
        let mut progress = Progress::new(2);
        progress.step("c", "s", Duration::from_secs(1));
        assert_eq!(progress.suspend(|| 7), 7);
    }
}
