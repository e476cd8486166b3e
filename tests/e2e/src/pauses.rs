//! How long guests wait for a card that is started again.

use std::time::Duration;

/// The guest's clock and ours agree to this.
const SKEW: Duration = Duration::from_millis(25);
/// Restarts with so much time between them can be told apart, if a guest does not wait for longer than that less the skew.
pub const APART: Duration = Duration::from_millis(80);

/// What the restarts of one guest's card were to it.
#[derive(Default)]
pub struct Pauses {
    /// How many restarts there were.
    pub restarts: usize,
    /// Of restarts that the guest had recovered from before the next one.
    pub alone: Vec<Duration>,
    /// Of at least a millisecond, when there was no restart: what a busy host does to a guest by itself.
    other: Vec<Duration>,
}

impl Pauses {
    /// Adds those of a guest: when its card was restarted, and the gaps that it reports (end, length).
    pub fn add(&mut self, restarts: &[Duration], result: &serde_json::Value) {
        let micros = |value: &serde_json::Value| Duration::from_micros(value.as_u64().expect("microseconds"));
        let gaps = result["gaps"].as_array().expect("gaps");
        let gaps: Vec<_> = gaps.iter().map(|gap| (micros(&gap[0]), micros(&gap[1]))).collect();
        self.restarts += restarts.len();
        let by_itself = |&&(end, length): &&(Duration, Duration)| {
            let during = end.saturating_sub(length + SKEW)..=end + SKEW;
            !restarts.iter().any(|r| during.contains(r))
        };
        self.other.extend(gaps.iter().filter(by_itself).map(|gap| gap.1));
        for &restart in restarts {
            let during = |&(end, length): &(Duration, Duration)| {
                (end.saturating_sub(length + SKEW)..=end + SKEW).contains(&restart)
            };
            let Some(&(end, length)) = gaps.iter().filter(|&g| during(g)).max_by_key(|g| g.1) else {
                continue;
            };
            let begin = end.saturating_sub(length + SKEW);
            if restarts.iter().filter(|r| (begin..=end).contains(r)).count() == 1 {
                self.alone.push(length);
            }
        }
    }

    /// Prints the distributions, behind what the restarts were.
    pub fn print(self, what: &str) {
        println!(
            "{} {what}\n  pauses of those that came alone: {}\n  others of 1 ms or more: {}",
            self.restarts,
            distribution(self.alone),
            distribution(self.other)
        );
    }
}

fn distribution(mut all: Vec<Duration>) -> String {
    all.sort();
    let (count, last) = (all.len(), all.len().saturating_sub(1));
    let at = |share: f64| {
        all.get(((count as f64 * share) as usize).min(last)).map_or(0.0, |d| d.as_secs_f64() * 1e3)
    };
    format!(
        "{count}, in ms: min {:.1}, p50 {:.1}, p90 {:.1}, p99 {:.1}, max {:.1}",
        at(0.0),
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0)
    )
}

/// How many restarts there are to be: OUTBOARD_RESTARTS, or so many.
pub fn wanted(default: usize) -> usize {
    match std::env::var("OUTBOARD_RESTARTS") {
        Ok(n) => n.parse().expect("OUTBOARD_RESTARTS is a number"),
        Err(_) => default,
    }
}
