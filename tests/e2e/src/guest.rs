//! What the bench guest says: JSON lines on its serial port (tests/guest/README.md).

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// One line of the guest.
pub type Report = Value;

#[derive(Default)]
struct Lines {
    partial: Vec<u8>,
    reports: Vec<Report>,
    other: Vec<String>,
    closed: bool,
}

/// Collects a guest's serial output and lets a test wait for what is in it.
#[derive(Clone, Default)]
pub struct Reports(Arc<(Mutex<Lines>, Condvar)>);

impl Reports {
    /// Takes the next bytes of the console.
    pub fn feed(&self, data: &[u8]) {
        let (lines, changed) = &*self.0;
        let mut lines = lines.lock().expect("reports");
        for &byte in data {
            if byte != b'\n' {
                lines.partial.push(byte);
                continue;
            }
            let line = std::mem::take(&mut lines.partial);
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            match serde_json::from_str(&text) {
                Ok(report) => lines.reports.push(report),
                Err(_) => lines.other.push(text),
            }
        }
        changed.notify_all();
    }

    /// The console has ended.
    pub fn close(&self) {
        self.0.0.lock().expect("reports").closed = true;
        self.0.1.notify_all();
    }

    /// All reports of one kind so far.
    pub fn all(&self, event: &str) -> Vec<Report> {
        let lines = self.0.0.lock().expect("reports");
        lines.reports.iter().filter(|r| r["event"] == event).cloned().collect()
    }

    /// Waits for the `n`th report (from 1) of a kind.
    ///
    /// # Panics
    /// If it does not come within `limit`, or the console ends first; with all that was said.
    pub fn wait_nth(&self, event: &str, n: usize, limit: Duration) -> Report {
        self.try_wait_nth(event, n, limit).unwrap_or_else(|said| panic!("{said}"))
    }

    /// The same without a panic.
    ///
    /// # Errors
    /// What was said instead.
    pub fn try_wait_nth(&self, event: &str, n: usize, limit: Duration) -> Result<Report, String> {
        let end = Instant::now() + limit;
        let (lines, changed) = &*self.0;
        let mut lines = lines.lock().expect("reports");
        loop {
            if let Some(found) = lines.reports.iter().filter(|r| r["event"] == event).nth(n - 1) {
                return Ok(found.clone());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || lines.closed {
                return Err(format!(
                    "no {event:?} #{n} from the guest within {limit:?} (console {}); it said:\n{}\n{}",
                    if lines.closed { "closed" } else { "open" },
                    lines.reports.iter().map(|r| format!("    {r}\n")).collect::<String>(),
                    lines.other.join("\n")
                ));
            }
            lines = changed.wait_timeout(lines, left).expect("reports").0;
        }
    }

    /// Waits for the first report of a kind.
    pub fn wait(&self, event: &str, limit: Duration) -> Report {
        self.wait_nth(event, 1, limit)
    }

    /// Waits for the end of all jobs and returns their results.
    ///
    /// # Panics
    /// If one of them was not ok.
    pub fn finish(&self, limit: Duration) -> Vec<Report> {
        let done = self.wait("done", limit);
        let results = self.all("result");
        assert_eq!(done["ok"], true, "a job failed: {results:#?} {:?}", self.all("error"));
        results
    }
}
