//! What a run leaves: the file `offload-bench run` writes, and everything that reads it.
//!
//! A *cell* is one workload. Every system that can run it has one [`Sample`] per round, taken in turns with the others', so
//! that samples of one round may be compared as a pair and nothing else may. Numbers that sum up samples (medians, ratios,
//! intervals) are not kept: they are computed from here, by [`crate::stats`].

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::stats::{self, Estimate, Summary};

/// Version of the format; a reader refuses what it does not know.
pub(crate) const FORMAT: u32 = 1;

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Results {
    /// [`FORMAT`].
    pub(crate) format: u32,
    /// Version of Outboard.
    pub(crate) version: String,
    /// When it began, RFC 3339, UTC.
    pub(crate) started: String,
    /// How long it took, in seconds.
    pub(crate) seconds: f64,
    pub(crate) machine: Machine,
    pub(crate) settings: Settings,
    pub(crate) systems: Vec<System>,
    pub(crate) cells: Vec<Cell>,
}

/// Where it was measured: fields a reader knows, by their labels, in order of importance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// Processor, as it calls itself.
    pub(crate) cpu: String,
    /// Processors online.
    pub(crate) cpus: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) kernel: String,
    /// `kvm_intel`, `kvm_amd`, `kvm_pvm`.
    pub(crate) kvm: String,
    /// File system of the test files.
    pub(crate) file_system: String,
    /// What limits the trust in the figures ("2 CPUs: vCPU and card have no third to leave to the host").
    pub(crate) remarks: Vec<String>,
}

/// How it was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) rounds: u32,
    /// Seconds of each sample before it counts.
    pub(crate) warmup_s: f64,
    /// Seconds of each sample that count.
    pub(crate) measure_s: f64,
    /// Whether vCPU and back-end threads were pinned to a processor each.
    pub(crate) pinned: bool,
    /// Command line, to repeat it.
    pub(crate) command: String,
}

/// A system that was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct System {
    /// Short and unique: `card`, `card-poll`, `inline`, `qemu`.
    pub(crate) name: String,
    /// What it is, in a sentence.
    pub(crate) description: String,
    /// Version of what is not ours.
    pub(crate) version: String,
}

/// One workload and what the systems made of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// Unique path: `block/null/randread-4k/qd32/q1/poll`.
    pub(crate) id: String,
    /// `block`, `network`, `jitter`, `scale`, `start-up`.
    pub(crate) suite: String,
    /// What varies, by name: `backing`=`null`, `op`=`randread`, `block`=`4K`, `qd`=`32`, `queues`=`1`, `guest`=`poll`.
    pub(crate) parameters: BTreeMap<String, String>,
    /// The metric that this cell is about, first; others worth a column after it.
    pub(crate) headline: Vec<Metric>,
    pub(crate) systems: Vec<Series>,
}

/// One system's samples of one cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    /// [`System::name`].
    pub(crate) system: String,
    /// One per round, in order; empty if it could not run this workload.
    pub(crate) samples: Vec<Sample>,
    /// Why there are none, or why one is missing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) note: String,
}

/// One measurement.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Round it belongs to, from 0.
    pub(crate) round: u32,
    pub(crate) values: BTreeMap<Metric, f64>,
    /// Latency distribution as the guest saw it: (upper bound in nanoseconds, requests), of the classes that are not empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) latency: Vec<(u64, u64)>,
}

/// What is measured. Each has one unit and one better direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Metric {
    /// Operations, packets or round trips per second.
    OpsPerS,
    BytesPerS,
    P50Ns,
    P90Ns,
    P99Ns,
    P999Ns,
    MaxNs,
    /// Exits of the VMM's vCPU threads to user space, per operation.
    UserExitsPerOp,
    /// All exits from the guest, per operation.
    ExitsPerOp,
    /// Notifications the guest sent, per operation.
    KicksPerOp,
    /// Interrupts the guest got, per operation.
    IrqsPerOp,
    /// CPU time of the vCPU threads, per operation.
    VcpuNsPerOp,
    /// CPU time of whatever does the I/O (card, I/O thread, storage daemon), per operation.
    BackendNsPerOp,
    /// CPU time of all other threads of the system's processes, per operation.
    OtherNsPerOp,
    /// Cycles of all processes of the system, per operation, where the machine counts them.
    CyclesPerOp,
    /// Share of the guest's CPU time that its computation lost to I/O, in percent.
    LostPercent,
    /// Longest time the guest's computation stood still.
    MaxGapNs,
    /// CPU time the guest's computation lost, per I/O.
    LostNsPerOp,
    /// Jain's index of the guests' throughputs, 1 is fair.
    Fairness,
    /// Share of a processor that the back-end used, in percent.
    BackendPercent,
    /// Wake-ups of the hypervisor's threads per second.
    WakeupsPerS,
    /// From the start of the process to the guest's first line.
    FirstLineNs,
    /// From the start of the process to the guest's first completed request.
    FirstIoNs,
    /// Memory of the VMM's process beyond guest RAM (PSS).
    MemoryBytes,
    /// Bytes that the card itself copied, for each byte of a frame that it delivered.
    CopiesPerByte,
    /// A memcpy of 4 KiB, for comparison.
    CopyNs,
}

impl Results {
    /// The system of this name.
    pub(crate) fn system(&self, name: &str) -> Option<&System> {
        self.systems.iter().find(|s| s.name == name)
    }

    /// The cell of this id.
    pub(crate) fn cell(&self, id: &str) -> Option<&Cell> {
        self.cells.iter().find(|c| c.id == id)
    }
}

impl Cell {
    /// The series of a system, if it has samples.
    pub(crate) fn series(&self, system: &str) -> Option<&Series> {
        self.systems.iter().find(|s| s.system == system && !s.samples.is_empty())
    }

    /// Median and spread of a metric; `None` if the system has no sample of it.
    pub(crate) fn summary(&self, system: &str, metric: Metric) -> Option<Summary> {
        let values = self.series(system)?.values(metric);
        (!values.is_empty()).then(|| Summary::of(&values))
    }

    /// Ratio of a system to another, by the rounds that both have.
    pub(crate) fn ratio(&self, system: &str, to: &str, metric: Metric) -> Option<Estimate> {
        stats::paired_ratio(&self.pairs(system, to, metric))
    }

    /// By how much a system is more than another, by the rounds that both have.
    pub(crate) fn difference(&self, system: &str, to: &str, metric: Metric) -> Option<Estimate> {
        stats::paired_difference(&self.pairs(system, to, metric))
    }

    fn pairs(&self, system: &str, to: &str, metric: Metric) -> Vec<(f64, f64)> {
        let (Some(a), Some(b)) = (self.series(system), self.series(to)) else { return Vec::new() };
        let value = |s: &Sample| s.values.get(&metric).copied();
        a.samples
            .iter()
            .filter_map(|a| {
                let b = b.samples.iter().find(|b| b.round == a.round)?;
                Some((value(a)?, value(b)?))
            })
            .collect()
    }

    /// The best median of a metric that must be told from the others: `None` if all are the same.
    pub(crate) fn best(&self, metric: Metric) -> Option<f64> {
        let medians: Vec<f64> =
            self.systems.iter().filter_map(|s| Some(self.summary(&s.system, metric)?.median)).collect();
        let best = medians.iter().copied().reduce(|a, b| if metric.better().than(b, a) { b } else { a })?;
        medians.iter().any(|&m| m != best).then_some(best)
    }
}

impl Series {
    /// All samples of a metric.
    pub(crate) fn values(&self, metric: Metric) -> Vec<f64> {
        self.samples.iter().filter_map(|s| s.values.get(&metric).copied()).collect()
    }

    /// Latency distribution of all rounds together: (upper bound in nanoseconds, requests), ascending.
    pub(crate) fn latency(&self) -> Vec<(u64, u64)> {
        let mut classes = BTreeMap::new();
        for &(bound, requests) in self.samples.iter().flat_map(|s| &s.latency) {
            let sum: &mut u64 = classes.entry(bound).or_default();
            *sum = sum.saturating_add(requests);
        }
        classes.into_iter().collect()
    }
}

/// Reads the results of a run.
///
/// # Errors
/// If the file cannot be read, is not whole, is of another format or holds no sample.
pub(crate) fn read(path: &Path) -> anyhow::Result<Results> {
    let file = path.display();
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read {file}; name a file that `offload-bench run` has written"))?;
    parse(&text).with_context(|| format!("cannot use {file}"))
}

fn parse(text: &str) -> anyhow::Result<Results> {
    #[derive(Deserialize)]
    struct Head {
        format: u32,
    }
    let not_whole = |e: &serde_json::Error| {
        if e.is_eof() {
            "it ends in the middle: the run was interrupted or the copy is incomplete; copy it again, or repeat the run"
        } else {
            "it is not what `offload-bench run` writes; name such a file"
        }
    };
    let head: Head = serde_json::from_str(text).map_err(|e| {
        let message = not_whole(&e);
        anyhow::Error::from(e).context(message)
    })?;
    if head.format != FORMAT {
        bail!(
            "it is of format {}, and this offload-bench knows format {FORMAT} only; use the offload-bench that wrote it, \
             or repeat the run",
            head.format
        );
    }
    let results: Results = serde_json::from_str(text).map_err(|e| {
        let message = not_whole(&e);
        anyhow::Error::from(e).context(message)
    })?;
    let mut series = results.cells.iter().flat_map(|c| &c.systems);
    if series.clone().all(|s| s.samples.is_empty()) {
        match series.find(|s| !s.note.is_empty()) {
            Some(s) => bail!("it holds no sample ({}: {}); repeat the run", s.system, s.note),
            None => bail!("it holds no sample; repeat the run with at least one workload"),
        }
    }
    Ok(results)
}

/// Writes the results of a run. Whoever reads meanwhile sees the old file or the new one.
///
/// # Errors
/// If a value is no number, or the file cannot be written.
pub(crate) fn write(path: &Path, results: &Results) -> anyhow::Result<()> {
    for cell in &results.cells {
        for series in &cell.systems {
            for sample in &series.samples {
                if let Some((metric, value)) = sample.values.iter().find(|(_, v)| !v.is_finite()) {
                    bail!(
                        "{}, {}, round {}: {} is {value}, which no file can hold",
                        cell.id,
                        series.system,
                        sample.round,
                        metric.label()
                    );
                }
            }
        }
    }
    let mut text = serde_json::to_string(results).context("cannot write the results as JSON")?;
    text.push('\n');
    replace(path, &text)
}

/// Writes a file beside its place and moves it there.
///
/// # Errors
/// If the directory or the disk does not allow it; what was there before stays.
pub(crate) fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}", std::process::id()));
    let temporary = path.with_file_name(temporary);
    let written = std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written.with_context(|| {
        format!("cannot write {}; name a file in a directory that exists and has room", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixture;

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.json");
        let results = fixture::results(5);
        write(&path, &results).unwrap();
        assert!(read(&path).unwrap() == results, "not to the last digit");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file was left");
    }

    #[test]
    fn errors_name_the_file_the_reason_and_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.json");
        let error = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let error = format!("{:#}", read(&path).unwrap_err());
            assert!(error.contains("results.json"), "{error}");
            error
        };
        let whole = serde_json::to_string(&fixture::results(5)).unwrap();
        for end in [0, 1, 10, whole.len() / 2, whole.len() - 1] {
            let said = error(&whole[..end]);
            assert!(said.contains("ends in the middle") && said.contains("repeat the run"), "{said}");
        }
        let said = error(&whole.replacen("\"format\":1", "\"format\":7", 1));
        assert!(said.contains("format 7") && said.contains("format 1") && said.contains("use the"), "{said}");
        assert!(error("{\"format\":7}").contains("format 7"), "the version comes before everything else");
        assert!(error("[]").contains("not what `offload-bench run` writes"));
        let mut none = fixture::results(5);
        for series in none.cells.iter_mut().flat_map(|c| &mut c.systems) {
            series.samples.clear();
        }
        assert!(error(&serde_json::to_string(&none).unwrap()).contains("no sample"));
        none.cells[0].systems[0].note = "no /dev/kvm".to_owned();
        assert!(error(&serde_json::to_string(&none).unwrap()).contains("no /dev/kvm"));
        let said = format!("{:#}", read(&dir.path().join("absent.json")).unwrap_err());
        assert!(said.contains("absent.json") && said.contains("No such file"), "{said}");
    }

    #[test]
    fn no_file_is_left_if_writing_fails() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        std::fs::create_dir(&path).unwrap();
        assert!(replace(&path, "x").unwrap_err().to_string().contains("taken"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_json_cannot_hold_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = fixture::results(5);
        results.cells[0].systems[0].samples[2].values.insert(Metric::P50Ns, f64::NAN);
        let error = write(&dir.path().join("r.json"), &results).unwrap_err().to_string();
        assert!(error.contains(&results.cells[0].id) && error.contains("round 2"), "{error}");
    }

    #[test]
    fn only_rounds_that_both_have_are_compared() {
        let mut results = fixture::results(5);
        let cell = &mut results.cells[0];
        let (a, b) = (cell.systems[0].system.clone(), cell.systems[1].system.clone());
        let metric = cell.headline[0];
        cell.systems[0].samples.remove(1);
        cell.systems[1].samples.remove(3);
        assert_eq!(cell.ratio(&a, &b, metric).unwrap().rounds, 3);
        assert_eq!(cell.ratio(&a, "unknown", metric), None);
    }

    #[test]
    fn latency_classes_of_all_rounds_are_added_up() {
        let sample = |latency: &[(u64, u64)]| Sample { latency: latency.to_vec(), ..Sample::default() };
        let series = Series {
            system: "card".to_owned(),
            samples: vec![sample(&[(100, 1), (200, 2)]), sample(&[(50, 4), (200, 3)])],
            note: String::new(),
        };
        assert_eq!(series.latency(), [(50, 4), (100, 1), (200, 5)]);
    }
}
