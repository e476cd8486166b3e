//! Cells that belong into one picture: they differ in one number or word only.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::results::{Cell, Metric, Results};

/// Cells of a suite that differ in one parameter.
pub(crate) struct Group<'a> {
    /// What they have in common: "null engine, 4K random read, 1 queue, polling guest".
    pub(crate) title: String,
    /// Label of an axis of the parameter that varies.
    pub(crate) axis: &'static str,
    /// Value of that parameter, and the cell; in order.
    pub(crate) cells: Vec<(String, &'a Cell)>,
    /// What is drawn.
    pub(crate) metrics: Vec<Metric>,
    /// Lines over the parameter, not bars for each value.
    pub(crate) is_lines: bool,
    /// The table is what readers look for.
    pub(crate) is_table: bool,
}

/// Suite, the parameter that varies within a picture, its name.
const VARIES: [(&str, &str, &str); 4] = [
    ("block", "qd", "queue depth"),
    ("network", "traffic", "traffic"),
    ("jitter", "rate", "requests per second"),
    ("scale", "vms", "number of VMs"),
];

/// Groups of a suite, in the order in which it was measured.
pub(crate) fn groups<'a>(results: &'a Results, suite: &str) -> Vec<Group<'a>> {
    let varies = VARIES.iter().find(|v| v.0 == suite);
    let mut groups: Vec<(BTreeMap<&str, &str>, Group<'a>)> = Vec::new();
    for cell in results.cells.iter().filter(|c| c.suite == suite) {
        let mut common: BTreeMap<&str, &str> =
            cell.parameters.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let value = varies.and_then(|v| common.remove(v.1)).unwrap_or_default().to_owned();
        match groups.iter_mut().find(|(key, _)| varies.is_some() && *key == common) {
            Some((_, group)) => group.cells.push((value, cell)),
            None => {
                let group = Group {
                    title: title(cell, &common),
                    axis: varies.map_or("", |v| v.2),
                    cells: vec![(value, cell)],
                    metrics: cell.headline.clone(),
                    is_lines: suite == "scale",
                    is_table: suite == "start-up",
                };
                groups.push((common, group));
            }
        }
    }
    let mut groups: Vec<Group<'a>> = groups.into_iter().map(|(_, group)| group).collect();
    for group in &mut groups {
        group.cells.sort_by(|(a, _), (b, _)| match (a.parse::<f64>(), b.parse::<f64>()) {
            (Ok(a), Ok(b)) => a.total_cmp(&b),
            // Words stay in the order in which they were measured.
            _ => Ordering::Equal,
        });
        // One point is no line.
        group.is_lines &= group.cells.len() > 1;
    }
    groups
}

impl<'a> Group<'a> {
    /// "Queue depth 32: ", before the name of what is drawn.
    pub(crate) fn point(&self, value: &str) -> String {
        match (self.axis, value) {
            ("", _) | (_, "") => String::new(),
            ("traffic", value) => format!("{}: ", word("traffic", value)),
            ("requests per second", value) => format!("{value} requests per second: "),
            (axis, value) => {
                let (first, rest) = axis.split_at(1);
                format!("{}{rest} {value}: ", first.to_uppercase())
            }
        }
    }

    /// Cells whose latency is drawn: the ones that everybody quotes, if they are there.
    pub(crate) fn with_latency(&self) -> Vec<&(String, &'a Cell)> {
        let quoted: Vec<_> = self.cells.iter().filter(|(v, _)| v == "1" || v == "32").collect();
        if self.axis == "queue depth" && !quoted.is_empty() { quoted } else { self.cells.iter().collect() }
    }
}

/// What is drawn of a cell as bars: two metrics where there are many cells, else all.
pub(crate) fn drawn(cell: &Cell) -> Vec<Metric> {
    let pair: &[Metric] = match cell.suite.as_str() {
        "block" if cell.headline.contains(&Metric::BytesPerS) => &[Metric::BytesPerS, Metric::P50Ns],
        "block" => &[Metric::OpsPerS, Metric::P50Ns],
        "network" => &cell.headline[..cell.headline.len().min(2)],
        _ => &cell.headline,
    };
    pair.to_vec()
}

fn title(cell: &Cell, common: &BTreeMap<&str, &str>) -> String {
    if common.is_empty() {
        return match cell.id.as_str() {
            "start-up/boot" => "Start to first line and first request, and memory".to_owned(),
            "idle/disk-attached" => "An idle VM with a disk attached".to_owned(),
            id => id.to_owned(),
        };
    }
    let mut common = common.clone();
    let mut parts = Vec::new();
    for name in ["backing", "op", "peer", "queues", "qd", "guest"] {
        if let Some(value) = common.remove(name) {
            let block = if name == "op" { common.remove("block") } else { None };
            let block = block.map(|b| format!("{} ", word("block", b))).unwrap_or_default();
            parts.push(format!("{block}{}", word(name, value)));
        }
    }
    // What this page has no words for.
    parts.extend(common.iter().map(|(name, value)| format!("{name} {value}")));
    let title = parts.join(", ");
    title.chars().take(1).flat_map(char::to_uppercase).chain(title.chars().skip(1)).collect()
}

/// A value of a parameter in words.
fn word(name: &str, value: &str) -> String {
    let word = match (name, value) {
        ("backing", "null") => "null engine",
        ("backing", "buffered") => "file in the page cache",
        ("backing", "direct") => "file by O_DIRECT",
        ("op", "randread") => "random reads",
        ("op", "randwrite") => "random writes",
        ("op", "read") => "sequential reads",
        ("op", "write") => "sequential writes",
        ("guest", "poll") => "polling guest",
        ("guest", "irq") => "interrupt-driven guest",
        ("peer", "guest") => "guest to guest",
        ("peer", "host") => "guest to host (TAP)",
        ("queues", "1") => "1 queue",
        ("traffic", "packets-64") => "Packets of 64 bytes",
        ("traffic", "frames-1514") => "Frames of 1514 bytes",
        ("traffic", "bulk-tso") => "Bulk with TSO",
        ("traffic", "round-trip") => "Round trips",
        ("block", size) if size.ends_with('K') => return format!("{} KiB", size.trim_end_matches('K')),
        ("queues", n) => return format!("{n} queues"),
        ("qd", n) => return format!("queue depth {n}"),
        _ => value,
    };
    word.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixture;

    #[test]
    fn cells_that_differ_in_depth_are_one_picture() {
        let mut results = fixture::results(1);
        results.cells.reverse();
        let groups = groups(&results, "block");
        assert_eq!(groups.len(), 3);
        assert_eq!(groups[2].title, "Null engine, 4 KiB random reads, 1 queue, polling guest");
        let depths: Vec<_> = groups[2].cells.iter().map(|(v, _)| v.as_str()).collect();
        assert_eq!(depths, ["1", "8", "32", "128"]);
        assert_eq!(groups[2].point("32"), "Queue depth 32: ");
        assert_eq!(groups[2].with_latency().len(), 2);
    }

    #[test]
    fn every_cell_is_in_one_group() {
        let results = fixture::results(1);
        let grouped: usize = ["block", "network", "jitter", "scale", "start-up"]
            .iter()
            .flat_map(|suite| groups(&results, suite))
            .map(|g| g.cells.len())
            .sum();
        assert_eq!(grouped, results.cells.len());
        assert_eq!(groups(&results, "start-up").len(), 2);
        assert!(groups(&results, "scale")[0].is_lines);
    }

    #[test]
    fn unknown_parameters_are_named() {
        let mut results = fixture::results(1);
        results.cells.truncate(1);
        results.cells[0].parameters.insert("cache".to_owned(), "cold".to_owned());
        assert!(groups(&results, "block")[0].title.ends_with(", cache cold"));
    }
}
