//! What Outboard wants to reach, and whether a run shows it.
//!
//! Targets are data: a target that a run cannot show, or shows to be missed, stays in the table.

mod list;

use crate::metric::times;
use crate::results::{Cell, Metric, Results};
use crate::stats::Estimate;
use list::TARGETS;

/// Systems that stand for a role, the preferred one first: a run need not have all of them.
type Role = &'static [&'static str];

/// The card as it is meant to run where speed is all.
pub(crate) const CARD: Role = &["card-poll", "card", "card-adaptive"];
/// The card as it is meant to run where VMs idle.
pub(crate) const SLEEPING_CARD: Role = &["card-adaptive", "card-irq", "card"];
/// The same engine on an I/O thread of the VMM: the reference.
pub(crate) const THREAD: Role = &["thread"];
/// The same engine in the vCPU thread.
pub(crate) const INLINE: Role = &["inline"];
/// QEMU, everything in one process.
pub(crate) const QEMU: Role = &["qemu"];
enum Rule {
    AtMost(f64),
    Below(f64),
    /// The median of another metric of the same run.
    AtMostMetric(Metric),
    RatioAtLeast(Role, f64),
    RatioAtMost(Role, f64),
    RatioBelow(Role, f64),
    /// Missed only where the interval shows that it is worse.
    NeverWorse(Role),
    MoreByAtMost(Role, f64),
}

struct Target {
    name: &'static str,
    /// `*` stands for anything. Of several cells, the worst decides.
    cells: &'static str,
    system: Role,
    metric: Metric,
    rule: Rule,
}

/// How a run stands to a target.
/// Queues that are asked the same are served alike from here on.
const FAIR: f64 = 0.9;

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) name: &'static str,
    /// "3.00x `inline` or more".
    pub(crate) condition: String,
    /// What was measured, in words; the reason if nothing was.
    pub(crate) measured: String,
    /// The cell that decided, and of how many.
    pub(crate) cell: String,
    pub(crate) verdict: Verdict,
    /// It is a count or a size, which neither a slow nor a busy machine changes.
    pub(crate) noise_free: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Met,
    /// Met by the median, but the interval reaches beyond the limit.
    MetBarely,
    Missed,
    /// Missed by the median, but the interval reaches to the limit.
    MissedBarely,
    NotMeasured,
}

/// Every target, with what the run shows.
pub(crate) fn outcomes(results: &Results) -> Vec<Outcome> {
    TARGETS.iter().map(|target| target.outcome(results)).collect()
}

/// The first system of a role that has samples in a cell.
pub(crate) fn of_role(cell: &Cell, role: Role) -> Option<&'static str> {
    role.iter().copied().find(|system| cell.series(system).is_some())
}

/// What was measured in one cell, and by how much it is off the limit: above 0 is missed.
struct Shown {
    text: String,
    excess: f64,
    verdict: Verdict,
}

impl Target {
    fn outcome(&self, results: &Results) -> Outcome {
        let cells: Vec<&Cell> = results.cells.iter().filter(|c| matches(self.cells, &c.id)).collect();
        let mut shown: Vec<(&Cell, Shown)> =
            cells.iter().filter_map(|cell| Some((*cell, self.shown(cell)?))).collect();
        // The worst first.
        shown.sort_by(|(_, a), (_, b)| {
            let missed = |s: &Shown| matches!(s.verdict, Verdict::Missed | Verdict::MissedBarely);
            missed(b).cmp(&missed(a)).then(b.excess.total_cmp(&a.excess))
        });
        let (name, condition, noise_free) = (self.name, self.condition(), self.is_noise_free());
        match shown.first() {
            Some((cell, worst)) => {
                let of = match shown.len() {
                    1 => String::new(),
                    n => format!(" (worst of {n})"),
                };
                let cell = format!("{}{of}", cell.id);
                Outcome {
                    name,
                    condition,
                    measured: worst.text.clone(),
                    cell,
                    verdict: worst.verdict,
                    noise_free,
                }
            }
            None => Outcome {
                name,
                condition,
                measured: self.why_not(&cells),
                cell: self.cells.to_owned(),
                verdict: Verdict::NotMeasured,
                noise_free,
            },
        }
    }

    fn is_noise_free(&self) -> bool {
        let counted = match self.metric {
            Metric::UserExitsPerOp | Metric::KicksPerOp | Metric::IrqsPerOp | Metric::MemoryBytes => true,
            // A frame for a receiver that has fallen behind is copied once more; of one frame at a time, none is.
            Metric::CopiesPerByte => self.cells.starts_with("network/round-trip/"),
            _ => false,
        };
        counted && matches!(self.rule, Rule::AtMost(_) | Rule::Below(_))
    }

    fn shown(&self, cell: &Cell) -> Option<Shown> {
        let system = of_role(cell, self.system)?;
        let metric = self.metric;
        let ratio = |role: Role| {
            let other = of_role(cell, role)?;
            let ratio = cell.ratio(system, other, metric)?;
            Some((ratio, format!("{}, {} to {}", times(ratio.value), times(ratio.low), times(ratio.high))))
        };
        let absolute = |limit: f64, met: fn(f64, f64) -> bool| {
            let summary = cell.summary(system, metric)?;
            let text = match summary.max {
                max if metric.format(max) == metric.format(summary.min) => metric.format(max),
                max => format!(
                    "{}, {} to {}",
                    metric.format(summary.median),
                    metric.format(summary.min),
                    metric.format(max)
                ),
            };
            let seen = [summary.median, summary.min, summary.max];
            Some(Shown::new(text, summary.median - limit, seen.map(|v| met(v, limit))))
        };
        let relative = |role: Role, limit: f64, sign: f64, met: fn(f64, f64) -> bool| {
            let (ratio, text) = ratio(role)?;
            Some(Shown::new(text, sign * (ratio.value - limit), ends(&ratio).map(|v| met(v, limit))))
        };
        match self.rule {
            Rule::AtMost(limit) => absolute(limit, |v, limit| v <= limit),
            Rule::Below(limit) => absolute(limit, |v, limit| v < limit),
            Rule::AtMostMetric(other) => {
                let limit = cell.summary(system, other)?.median;
                let mut shown = absolute(limit, |v, limit| v <= limit)?;
                shown.text.push_str(&format!("; {}: {}", other.label(), other.format(limit)));
                Some(shown)
            }
            Rule::RatioAtLeast(role, limit) => relative(role, limit, -1.0, |v, limit| v >= limit),
            Rule::RatioAtMost(role, limit) => relative(role, limit, 1.0, |v, limit| v <= limit),
            Rule::RatioBelow(role, limit) => relative(role, limit, 1.0, |v, limit| v < limit),
            Rule::NeverWorse(role) => {
                let (ratio, mut text) = ratio(role)?;
                let fairness = of_role(cell, role).and_then(|other| cell.summary(other, Metric::Fairness));
                if let Some(fairness) = fairness.filter(|f| metric != Metric::Fairness && f.median < FAIR) {
                    let fairness = Metric::Fairness.format(fairness.median);
                    text.push_str(&format!("; the latter hardly serves some queues (fairness {fairness})"));
                }
                let better = metric.better();
                let worse = better.than(1.0, ratio.value) && ratio.excludes(1.0);
                let excess = if better.than(2.0, 1.0) { 1.0 - ratio.value } else { ratio.value - 1.0 };
                Some(Shown { text, excess, verdict: if worse { Verdict::Missed } else { Verdict::Met } })
            }
            Rule::MoreByAtMost(role, limit) => {
                let difference = cell.difference(system, of_role(cell, role)?, metric)?;
                let signed =
                    |v: f64| format!("{}{}", if v < 0.0 { "−" } else { "+" }, metric.format(v.abs()));
                let text = format!(
                    "{}, {} to {}",
                    signed(difference.value),
                    signed(difference.low),
                    signed(difference.high)
                );
                Some(Shown::new(text, difference.value - limit, ends(&difference).map(|v| v <= limit)))
            }
        }
    }

    fn condition(&self) -> String {
        let metric = self.metric.label();
        let first = |role: Role| role.first().copied().unwrap_or_default();
        match self.rule {
            Rule::AtMost(0.0) => format!("{metric}: exactly 0"),
            Rule::AtMost(limit) => format!("{metric}: at most {}", self.metric.format(limit)),
            Rule::Below(limit) => format!("{metric}: below {}", self.metric.format(limit)),
            Rule::AtMostMetric(other) => format!("{metric}: at most that of {}", other.label()),
            Rule::RatioAtLeast(role, limit) => {
                format!("{metric}: {} that of {} or more", times(limit), first(role))
            }
            Rule::RatioAtMost(role, limit) => {
                format!("{metric}: {} that of {} or less", times(limit), first(role))
            }
            Rule::RatioBelow(role, 1.0) => format!("{metric}: below that of {}", first(role)),
            Rule::RatioBelow(role, limit) => {
                format!("{metric}: below {} that of {}", times(limit), first(role))
            }
            Rule::NeverWorse(role) => format!("{metric}: never worse than {}", first(role)),
            Rule::MoreByAtMost(role, limit) => {
                format!("{metric}: at most {} more than {}", self.metric.format(limit), first(role))
            }
        }
    }

    fn why_not(&self, cells: &[&Cell]) -> String {
        if cells.is_empty() {
            return "this run has no such workload".to_owned();
        }
        let other = match self.rule {
            Rule::RatioAtLeast(role, _)
            | Rule::RatioAtMost(role, _)
            | Rule::RatioBelow(role, _)
            | Rule::NeverWorse(role)
            | Rule::MoreByAtMost(role, _) => Some(role),
            Rule::AtMost(_) | Rule::Below(_) | Rule::AtMostMetric(_) => None,
        };
        for role in [Some(self.system), other].into_iter().flatten() {
            if cells.iter().all(|c| of_role(c, role).is_none()) {
                let note = cells
                    .iter()
                    .flat_map(|c| &c.systems)
                    .find(|s| role.contains(&s.system.as_str()) && !s.note.is_empty());
                let reason = note.map(|s| format!(": {}", s.note)).unwrap_or_default();
                return format!("{} was not measured{reason}", role.join(" or "));
            }
        }
        format!("no sample of {}, or one that is zero", self.metric.label())
    }
}

impl Shown {
    /// `met`: whether the median meets it, and either end of the interval.
    fn new(text: String, excess: f64, met: [bool; 3]) -> Self {
        let verdict = match met {
            [true, true, true] => Verdict::Met,
            [true, ..] => Verdict::MetBarely,
            [false, false, false] => Verdict::Missed,
            [false, ..] => Verdict::MissedBarely,
        };
        Self { text, excess, verdict }
    }
}

fn ends(estimate: &Estimate) -> [f64; 3] {
    [estimate.value, estimate.low, estimate.high]
}

/// Whether a pattern, in which `*` stands for anything, is all of `text`.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == text };
    let Some(rest) = text.strip_prefix(head) else { return false };
    (0..=rest.len()).any(|i| rest.is_char_boundary(i) && matches(tail, &rest[i..]))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::report::fixture;

    fn verdict(results: &Results, name: &str) -> (Verdict, String) {
        let outcome = outcomes(results).into_iter().find(|o| o.name == name).unwrap();
        (outcome.verdict, outcome.measured)
    }

    fn set(results: &mut Results, id: &str, system: &str, metric: Metric, value: f64) {
        let cell = results.cells.iter_mut().find(|c| c.id == id).unwrap();
        let series = cell.systems.iter_mut().find(|s| s.system == system).unwrap();
        for sample in &mut series.samples {
            sample.values.insert(metric, value);
        }
    }

    const NULL_32: &str = "block/null/randread-4k/qd32/q1/poll";

    #[test]
    fn patterns() {
        for (pattern, text, is) in [
            ("block/*", "block/null/x", true),
            ("block/*/qd32/*", "block/null/a/qd32/q1", true),
            ("block/*/qd3", "block/null/qd32", false),
            ("*", "", true),
            ("a", "ab", false),
            ("scale/*vms64", "scale/null/vms64", true),
        ] {
            assert_eq!(matches(pattern, text), is, "{pattern} {text}");
        }
    }

    #[test]
    fn names_are_unique() {
        assert_eq!(TARGETS.iter().map(|t| t.name).collect::<BTreeSet<_>>().len(), TARGETS.len());
    }

    #[test]
    fn ratios_are_judged_with_their_interval() {
        let name = "Card and in-process inline, null, QD 32";
        let mut results = fixture::results(5);
        set(&mut results, NULL_32, "card-poll", Metric::OpsPerS, 3.0e6);
        set(&mut results, NULL_32, "inline", Metric::OpsPerS, 1.0e6);
        assert_eq!(verdict(&results, name), (Verdict::Met, "3.00x, 3.00x to 3.00x".to_owned()));
        set(&mut results, NULL_32, "inline", Metric::OpsPerS, 1.01e6);
        assert_eq!(verdict(&results, name).0, Verdict::Missed);
        let cell = results.cells.iter_mut().find(|c| c.id == NULL_32).unwrap();
        let inline = cell.systems.iter_mut().find(|s| s.system == "inline").unwrap();
        inline.samples[0].values.insert(Metric::OpsPerS, 0.9e6);
        assert_eq!(verdict(&results, name).0, Verdict::MissedBarely);
    }

    #[test]
    fn exactly_zero_is_exactly_zero_in_every_cell() {
        let name = "Exits to user space per I/O with a card";
        let mut results = fixture::results(5);
        assert_eq!(verdict(&results, name).0, Verdict::Met);
        set(&mut results, NULL_32, "card-poll", Metric::UserExitsPerOp, 1e-6);
        let outcome = outcomes(&results).into_iter().find(|o| o.name == name).unwrap();
        assert_eq!((outcome.verdict, outcome.measured.as_str()), (Verdict::Missed, "<0.01"));
        assert_eq!(outcome.cell, format!("{NULL_32} (worst of 12)"));
    }

    #[test]
    fn a_difference_has_a_sign_and_a_unit() {
        let id = "block/null/randread-4k/qd1/q1/poll";
        let mut results = fixture::results(5);
        results.cells.retain(|c| c.id == id);
        set(&mut results, id, "card-poll", Metric::P50Ns, 2_000.0);
        set(&mut results, id, "thread", Metric::P50Ns, 2_400.0);
        let (v, measured) = verdict(&results, "Card and in-process thread, QD 1");
        assert_eq!((v, measured.as_str()), (Verdict::Met, "−400 ns, −400 ns to −400 ns"));
        set(&mut results, id, "card-poll", Metric::P50Ns, 3_500.0);
        assert_eq!(verdict(&results, "Card and in-process thread, QD 1").0, Verdict::Missed);
    }

    #[test]
    fn never_worse_forgives_noise_only() {
        let name = "Our hypervisor and QEMU before the same card, IOPS";
        let mut results = fixture::results(5);
        results.cells.retain(|c| c.id == NULL_32);
        set(&mut results, NULL_32, "card-adaptive", Metric::OpsPerS, 1.0e6);
        set(&mut results, NULL_32, "qemu-card", Metric::OpsPerS, 1.001e6);
        assert_eq!(verdict(&results, name).0, Verdict::Missed);
        results.cells[0].systems.iter_mut().find(|s| s.system == "card-adaptive").unwrap().samples[0]
            .values
            .insert(Metric::OpsPerS, 1.1e6);
        assert_eq!(verdict(&results, name).0, Verdict::Met);
    }

    #[test]
    fn what_was_not_measured_is_listed_with_the_reason() {
        let mut results = fixture::results(5);
        let (v, why) = verdict(&results, "O_DIRECT, QD 1, and fio on the host");
        assert_eq!((v, why.as_str()), (Verdict::NotMeasured, "host was not measured"));
        for cell in &mut results.cells {
            for series in cell.systems.iter_mut().filter(|s| s.system == "qemu") {
                series.samples.clear();
                series.note = "qemu-system-x86_64 is not installed".to_owned();
            }
        }
        let (v, why) = verdict(&results, "Card and QEMU in-process, null, QD 32");
        assert_eq!(v, Verdict::NotMeasured);
        assert_eq!(why, "qemu was not measured: qemu-system-x86_64 is not installed");
        results.cells.clear();
        assert!(outcomes(&results).iter().all(|o| o.verdict == Verdict::NotMeasured));
        assert_eq!(outcomes(&results).len(), TARGETS.len());
    }
}
