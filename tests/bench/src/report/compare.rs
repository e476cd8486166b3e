//! What changed between two runs.
//!
//! Two runs share no rounds, so that everything that differs between them counts: the machine's mood too. A *change* is what
//! the unpaired bootstrap tells from the scatter of rounds and is beyond the threshold.

use std::path::Path;
use std::process::ExitCode;

use comfy_table::{Cell as Field, Color};
use serde::Serialize;

use crate::metric::Better;
use crate::report::table::{align, plain_table, ratio_text, trimmed, use_colour};
use crate::results::{self, Cell, Metric, Results};
use crate::stats::{self, Estimate, FEWEST_ROUNDS, Summary};

/// Two runs beside each other.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    /// Why the runs should not be compared.
    pub(crate) warnings: Vec<String>,
    /// The share beyond which a difference is a change: 0.05.
    pub(crate) threshold: f64,
    /// Slower first, the largest change first.
    pub(crate) changes: Vec<Change>,
    /// Pairs that were looked at, changes among them.
    pub(crate) compared: usize,
    /// Pairs with too few rounds to tell anything.
    pub(crate) too_few_rounds: usize,
    /// "cell, system" that has samples in the old file only.
    pub(crate) only_old: Vec<String>,
    pub(crate) only_new: Vec<String>,
}

/// A figure that is not what it was.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Change {
    pub(crate) cell: String,
    pub(crate) system: String,
    pub(crate) metric: Metric,
    pub(crate) direction: Direction,
    /// Medians.
    pub(crate) old: f64,
    pub(crate) new: f64,
    /// New to old; none if the old one is zero.
    pub(crate) ratio: Option<Estimate>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Direction {
    /// Worse: slower, or more of what should be little.
    Slower,
    Faster,
}

enum Judged {
    Changed(Change),
    Same,
    TooFewRounds,
}

/// Compares two files and prints what changed. Exit status 1 if something got slower.
///
/// # Errors
/// If one of the files cannot be read.
pub(crate) fn run(old: &Path, new: &Path, threshold: f64, json: bool) -> anyhow::Result<ExitCode> {
    let comparison = compare(&results::read(old)?, &results::read(new)?, threshold);
    if json {
        println!("{}", serde_json::to_string_pretty(&comparison)?);
    } else {
        print!("{}", comparison.text(use_colour()));
    }
    Ok(if comparison.is_slower() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Compares the headline metric of every cell and system.
pub(crate) fn compare(old: &Results, new: &Results, threshold: f64) -> Comparison {
    let mut comparison = Comparison {
        warnings: warnings(old, new),
        threshold,
        changes: Vec::new(),
        compared: 0,
        too_few_rounds: 0,
        only_old: only(old, new),
        only_new: only(new, old),
    };
    for cell in &old.cells {
        let (Some(after), Some(&metric)) = (new.cell(&cell.id), cell.headline.first()) else { continue };
        for system in cell.systems.iter().map(|s| s.system.as_str()) {
            let Some(judged) = judge(cell, after, system, metric, threshold) else { continue };
            comparison.compared += 1;
            match judged {
                Judged::Changed(change) => comparison.changes.push(change),
                Judged::Same => {}
                Judged::TooFewRounds => comparison.too_few_rounds += 1,
            }
        }
    }
    comparison.changes.sort_by(|a, b| a.direction.cmp(&b.direction).then(b.size().total_cmp(&a.size())));
    comparison
}

/// `None` if one of them has no sample.
fn judge(old: &Cell, new: &Cell, system: &str, metric: Metric, threshold: f64) -> Option<Judged> {
    let values = |cell: &Cell| Some(cell.series(system)?.values(metric)).filter(|v| !v.is_empty());
    let (before, after) = (values(old)?, values(new)?);
    if before.len().min(after.len()) < FEWEST_ROUNDS {
        return Some(Judged::TooFewRounds);
    }
    let ratio = stats::unpaired_ratio(&after, &before);
    let (before, after) = (Summary::of(&before), Summary::of(&after));
    let changed = match ratio {
        Some(ratio) => ratio.excludes(1.0) && is_beyond(ratio.value, threshold),
        // Of nothing there is no share: more than was ever seen is a change.
        None => after.median != before.median && (after.min > before.max || after.max < before.min),
    };
    if !changed {
        return Some(Judged::Same);
    }
    let worse = metric.better().than(before.median, after.median);
    Some(Judged::Changed(Change {
        cell: old.id.clone(),
        system: system.to_owned(),
        metric,
        direction: if worse { Direction::Slower } else { Direction::Faster },
        old: before.median,
        new: after.median,
        ratio,
    }))
}

/// A threshold of 5 % is the same either way: 1.05 times as much, or 1/1.05.
fn is_beyond(ratio: f64, threshold: f64) -> bool {
    ratio > 1.0 + threshold || ratio < 1.0 / (1.0 + threshold)
}

fn warnings(old: &Results, new: &Results) -> Vec<String> {
    let (a, b) = (&old.machine, &new.machine);
    let (s, t) = (&old.settings, &new.settings);
    let mut pairs = vec![
        ("processor", a.cpu.clone(), b.cpu.clone()),
        ("processors", a.cpus.to_string(), b.cpus.to_string()),
        (
            "memory",
            Metric::MemoryBytes.format(a.memory_bytes as f64),
            Metric::MemoryBytes.format(b.memory_bytes as f64),
        ),
        ("kernel", a.kernel.clone(), b.kernel.clone()),
        ("kind of KVM", a.kvm.clone(), b.kvm.clone()),
        ("file system", a.file_system.clone(), b.file_system.clone()),
        ("warm-up", format!("{} s", s.warmup_s), format!("{} s", t.warmup_s)),
        ("measured time", format!("{} s", s.measure_s), format!("{} s", t.measure_s)),
        ("pinned threads", s.pinned.to_string(), t.pinned.to_string()),
    ];
    for system in &old.systems {
        if let Some(other) = new.system(&system.name) {
            pairs.push((
                "version of",
                format!("{} {}", system.name, system.version),
                format!("{} {}", other.name, other.version),
            ));
        }
    }
    let mut warnings: Vec<String> = pairs
        .into_iter()
        .filter(|(_, old, new)| old != new)
        .map(|(what, old, new)| format!("different {what}: {} and {}", old.trim(), new.trim()))
        .collect();
    let rounds = s.rounds.min(t.rounds) as usize;
    if rounds < 6 {
        warnings.push(format!(
            "only {rounds} rounds: an interval is no more than the range of what was seen, and holds the true value in {:.0} % \
             of runs at best",
            100.0 * stats::coverage_bound(rounds.max(1))
        ));
    }
    warnings
}

fn only(a: &Results, b: &Results) -> Vec<String> {
    let mut only = Vec::new();
    for cell in &a.cells {
        let measured = cell.systems.iter().filter(|s| !s.samples.is_empty());
        let Some(other) = b.cell(&cell.id) else {
            only.push(format!("{} ({})", cell.id, count(measured.count(), "system")));
            continue;
        };
        for series in measured.filter(|s| other.series(&s.system).is_none()) {
            only.push(format!("{}, {}", cell.id, series.system));
        }
    }
    only
}

/// "1 system", "2 systems".
fn count(n: usize, of: &str) -> String {
    format!("{n} {of}{}", if n == 1 { "" } else { "s" })
}

impl Change {
    /// How far the two are apart, whichever is more.
    fn size(&self) -> f64 {
        self.ratio.map_or(f64::INFINITY, |r| r.value.ln().abs())
    }
}

impl Comparison {
    /// Whether anything got slower.
    pub(crate) fn is_slower(&self) -> bool {
        self.changes.iter().any(|c| c.direction == Direction::Slower)
    }

    /// For people.
    pub(crate) fn text(&self, colour: bool) -> String {
        let mut text = String::new();
        for warning in &self.warnings {
            text.push_str(&format!("warning: {warning}\n"));
        }
        if !self.warnings.is_empty() {
            text.push('\n');
        }
        if !self.changes.is_empty() {
            let mut table = plain_table(colour);
            table.set_header(["", "cell", "system", "metric", "old", "new", "new to old"]);
            for change in &self.changes {
                let (word, tint) = match change.direction {
                    Direction::Slower => ("slower", Color::Red),
                    Direction::Faster => ("faster", Color::Green),
                };
                let word = Field::new(word);
                let ratio = change.ratio.as_ref().map_or_else(|| "from zero".to_owned(), ratio_text);
                table.add_row([
                    if colour { word.fg(tint) } else { word },
                    Field::new(&change.cell),
                    Field::new(&change.system),
                    Field::new(match change.metric.better() {
                        Better::Higher => format!("{} ↑", change.metric.short()),
                        Better::Lower => format!("{} ↓", change.metric.short()),
                    }),
                    Field::new(change.metric.format(change.old)),
                    Field::new(change.metric.format(change.new)),
                    Field::new(ratio),
                ]);
            }
            align(&mut table, 4..7);
            text.push_str(&trimmed(&table));
            text.push_str("\n(↑ higher is better, ↓ lower is better)\n\n");
        }
        for (title, list) in
            [("only in the old file", &self.only_old), ("only in the new file", &self.only_new)]
        {
            for entry in list {
                text.push_str(&format!("{title}: {entry}\n"));
            }
        }
        let slower = self.changes.iter().filter(|c| c.direction == Direction::Slower).count();
        text.push_str(&format!(
            "{} compared: {slower} slower, {} faster, beyond {} % and the scatter of rounds",
            count(self.compared, "figure"),
            self.changes.len() - slower,
            Percent(self.threshold)
        ));
        if self.too_few_rounds > 0 {
            text.push_str(&format!(
                "; {} with fewer than {FEWEST_ROUNDS} rounds tell nothing",
                self.too_few_rounds
            ));
        }
        text.push('\n');
        text
    }
}

struct Percent(f64);

impl std::fmt::Display for Percent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = format!("{:.2}", self.0 * 100.0);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

/// A threshold as people give it: `5%`, or `0.05`.
///
/// # Errors
/// If it is no number, or no share from 0 to 1000 %.
pub(crate) fn parse_threshold(text: &str) -> Result<f64, String> {
    let number = text.trim().trim_end_matches('%').trim_end();
    let value: f64 = number.parse().map_err(|_| format!("{text:?} is no share; write 5% or 0.05"))?;
    let share = if text.contains('%') { value / 100.0 } else { value };
    if !(0.0..=10.0).contains(&share) {
        return Err(format!("{text:?} is not from 0% to 1000%; write 5% or 0.05"));
    }
    Ok(share)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixture;

    const NULL_32: &str = "block/null/randread-4k/qd32/q1/poll";

    fn scale(results: &mut Results, id: &str, system: &str, by: f64) {
        let cell = results.cells.iter_mut().find(|c| c.id == id).unwrap();
        let metric = cell.headline[0];
        for sample in &mut cell.systems.iter_mut().find(|s| s.system == system).unwrap().samples {
            *sample.values.get_mut(&metric).unwrap() *= by;
        }
    }

    #[test]
    fn a_run_against_itself_has_no_change() {
        let results = fixture::results(6);
        let comparison = compare(&results, &results, 0.0);
        assert!(comparison.changes.is_empty() && !comparison.is_slower());
        assert!(comparison.warnings.is_empty(), "{:?}", comparison.warnings);
        assert!(comparison.only_old.is_empty() && comparison.only_new.is_empty());
        assert!(comparison.compared > 100, "{}", comparison.compared);
    }

    #[test]
    fn slower_and_faster_are_by_the_direction_of_the_metric() {
        let old = fixture::results(5);
        let mut new = old.clone();
        scale(&mut new, NULL_32, "card-poll", 0.7);
        scale(&mut new, NULL_32, "thread", 1.5);
        // A latency.
        scale(&mut new, "block/null/randread-4k/qd1/q1/poll", "card-poll", 2.0);
        let comparison = compare(&old, &new, 0.05);
        let of = |i: usize| (comparison.changes[i].system.as_str(), comparison.changes[i].direction);
        assert_eq!(comparison.changes.len(), 3);
        assert_eq!([of(0), of(1)], [("card-poll", Direction::Slower); 2]);
        assert_eq!(of(2), ("thread", Direction::Faster));
        assert_eq!(comparison.changes[0].metric, Metric::P50Ns, "the largest first");
        assert!(comparison.is_slower());
        let text = comparison.text(false);
        assert!(text.contains("2 slower, 1 faster, beyond 5 %"), "{text}");
        assert!(text.contains("2.00x (1.9"), "{text}");
        assert!(!text.contains('\x1b') && comparison.text(true).contains('\x1b'));
    }

    #[test]
    fn a_change_is_beyond_the_threshold_and_beyond_the_scatter() {
        let old = fixture::results(5);
        let mut new = old.clone();
        // Rounds scatter by 3 % to either side.
        scale(&mut new, NULL_32, "card-poll", 0.985);
        assert!(compare(&old, &new, 0.0).changes.is_empty(), "within the scatter");
        scale(&mut new, NULL_32, "card-poll", 0.9);
        assert_eq!(compare(&old, &new, 0.05).changes.len(), 1);
        assert!(compare(&old, &new, 0.25).changes.is_empty(), "within the threshold");
    }

    #[test]
    fn more_than_nothing_is_a_change() {
        let mut old = fixture::results(5);
        for cell in &mut old.cells {
            cell.headline = vec![Metric::UserExitsPerOp];
        }
        let mut new = old.clone();
        for sample in &mut new.cells[2].systems[0].samples {
            sample.values.insert(Metric::UserExitsPerOp, 0.02);
        }
        let comparison = compare(&old, &new, 0.05);
        assert_eq!(comparison.changes.len(), 1);
        assert_eq!((comparison.changes[0].direction, comparison.changes[0].ratio), (Direction::Slower, None));
        assert!(comparison.text(false).contains("from zero"));
    }

    #[test]
    fn two_rounds_tell_nothing() {
        let old = fixture::results(2);
        let mut new = old.clone();
        scale(&mut new, NULL_32, "card-poll", 0.5);
        let comparison = compare(&old, &new, 0.05);
        assert!(comparison.changes.is_empty());
        assert_eq!(comparison.too_few_rounds, comparison.compared);
        assert!(comparison.text(false).contains("tell nothing"));
    }

    #[test]
    fn what_only_one_has_is_listed() {
        let old = fixture::results(5);
        let mut new = old.clone();
        let gone = new.cells.remove(0);
        new.cells[0].systems[1].samples.clear();
        let comparison = compare(&old, &new, 0.05);
        assert_eq!(
            comparison.only_old,
            [
                format!("{} (9 systems)", gone.id),
                format!("{}, {}", new.cells[0].id, new.cells[0].systems[1].system)
            ]
        );
        assert!(comparison.only_new.is_empty());
        assert_eq!(compare(&new, &old, 0.05).only_new, comparison.only_old);
    }

    #[test]
    fn other_machines_and_settings_are_warned_about() {
        let old = fixture::results(6);
        let mut new = old.clone();
        new.machine.kvm = "kvm_amd".to_owned();
        new.settings.pinned = false;
        new.systems[5].version = "10.0".to_owned();
        let warnings = compare(&old, &new, 0.05).warnings.join("\n");
        assert_eq!(
            warnings,
            "different kind of KVM: kvm_pvm and kvm_amd\ndifferent pinned threads: true and false\n\
             different version of: qemu 7.2.22 and qemu 10.0"
        );
        assert!(compare(&fixture::results(5), &old, 0.05).warnings.join("").contains("94 %"));
    }

    #[test]
    fn thresholds() {
        assert_eq!(parse_threshold("5%"), Ok(0.05));
        assert_eq!(parse_threshold("0.05"), Ok(0.05));
        assert_eq!(parse_threshold("0"), Ok(0.0));
        for bad in ["", "%", "five", "-1%", "2000%", "NaN", "inf"] {
            assert!(parse_threshold(bad).is_err(), "{bad}");
        }
        assert_eq!([Percent(0.05).to_string(), Percent(0.125).to_string()], ["5", "12.5"]);
    }
}
