//! `offload-bench quick` and `full`: every workload on every system, in turns, round after round.

mod machine;
pub(crate) mod self_test;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;

use crate::bench::Bench;
use crate::probe;
use crate::report::progress::Progress;
use crate::report::targets::{self, Verdict};
use crate::report::{html, table};
use crate::results::{self, Cell, FORMAT, Metric, Results, Series, Settings};
use crate::system::{self, System};
use crate::workload::{Backing, Block, Profile, Suite, Workload, workloads};

/// What ratios are formed with, if it is measured.
const REFERENCE: &str = "thread";

/// Systems made of nothing but our own programs.
const OURS: [&str; 7] = ["card", "card-poll", "card-irq", "card-qcow2", "card-groups", "thread", "inline"];

/// The options of `offload-bench quick` and `full`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only these suites.
    #[arg(long, value_enum, value_delimiter = ',')]
    suite: Vec<Suite>,
    /// Only workloads whose id contains one of these, e.g. `null/randread-4k/qd32`.
    #[arg(long, value_name = "TEXT", value_delimiter = ',')]
    only: Vec<String>,
    /// Only these systems, e.g. `card,thread,qemu`. `--list` shows all.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    systems: Vec<String>,
    /// Rounds, in each of which every system is measured once per workload [quick: 3, full: 5].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Seconds of each measurement that count [quick: 0.25, full: 0.7].
    #[arg(long, value_parser = seconds)]
    secs: Option<f64>,
    /// Seconds of each measurement before it counts [quick: 0.1, full: 0.2].
    #[arg(long, value_parser = seconds)]
    warmup: Option<f64>,
    /// Leave threads to the scheduler instead of giving the vCPU and everything else a processor each.
    #[arg(long)]
    no_pin: bool,
    /// Where the test file (1 GiB) is made and kept: a directory on the file system to be measured.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp/outboard-bench")]
    files: PathBuf,
    /// Where the results go: NAME.json, and NAME.html for people.
    #[arg(short, long, value_name = "NAME", default_value = "offload-bench")]
    output: PathBuf,
    /// Exit with status 1 if a target is missed that no noise can hide (exits, kicks, memory), or a measurement failed.
    #[arg(long)]
    check: bool,
    /// Print what would be measured, on what, and how long it would take.
    #[arg(long)]
    list: bool,
}

impl Options {
    fn rounds(&self, profile: Profile) -> u32 {
        self.rounds.unwrap_or(if profile == Profile::Quick { 3 } else { 5 })
    }

    fn measure(&self, profile: Profile) -> f64 {
        self.secs.unwrap_or(if profile == Profile::Quick { 0.25 } else { 0.7 })
    }

    fn warmup(&self, profile: Profile) -> f64 {
        self.warmup.unwrap_or(if profile == Profile::Quick { 0.1 } else { 0.2 })
    }
}

/// What `quick` measures unless told otherwise: one of each kind.
const QUICK_SYSTEMS: [&str; 6] = ["card", "card-poll", "thread", "inline", "qemu", "host"];

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.05..=600.0).contains(&value) => Ok(value),
        _ => Err("give seconds from 0.05 to 600".into()),
    }
}

/// Measures, prints, and writes the results. False if a check failed that was asked for.
pub(crate) fn run(options: &Options, profile: Profile) -> anyhow::Result<bool> {
    let mut systems = wanted_systems(&options.systems, profile)?;
    let plan = plan(options, profile)?;
    let (rounds, measure_s, warmup_s) =
        (options.rounds(profile), options.measure(profile), options.warmup(profile));
    if options.list {
        list(&plan, &systems, rounds, warmup_s + measure_s);
        return Ok(true);
    }
    if cfg!(debug_assertions) {
        bail!(
            "this is a debug build, whose figures mean nothing: run `cargo build --release --workspace`, then target/release/offload-bench"
        );
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "measuring needs root: for /dev/kvm, network interfaces and the kernel's counters. Try: sudo offload-bench run"
        );
    }
    if let Err(e) = probe::mount_counters() {
        eprintln!("exits from the guests cannot be counted: mounting debugfs and tracefs: {e}");
    }
    // Interfaces that are made here are nobody else's and go away with this process.
    e2e::enter_new_network_namespace();
    let bench = Bench::new(&options.files, warmup_s, measure_s, !options.no_pin)?;
    let began = Instant::now();
    let mut results = Results {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").into(),
        started: machine::now(),
        seconds: 0.0,
        machine: machine::describe(&options.files),
        settings: Settings {
            rounds,
            warmup_s,
            measure_s,
            pinned: !options.no_pin,
            command: std::env::args().collect::<Vec<_>>().join(" "),
        },
        systems: systems.iter().map(|s| s.about()).collect(),
        cells: Vec::new(),
    };
    if plan
        .iter()
        .any(|w| matches!(w, Workload::Block(Block { backing: Backing::Buffered | Backing::Direct, .. })))
    {
        verify(&bench, &mut systems)?;
    }
    let samples = plan.iter().map(|w| runnable(&systems, w).count() as u64).sum::<u64>();
    let mut progress = Progress::new(samples * u64::from(rounds));
    for workload in &plan {
        let cell = measure(&bench, &mut systems, workload, rounds, &mut progress);
        progress.suspend(|| table::print_cell(&cell, REFERENCE));
        results.cells.push(cell);
        results.seconds = began.elapsed().as_secs_f64();
        // After every cell: a run that is interrupted has not been in vain.
        write(&options.output, &results)?;
    }
    drop(progress);
    println!("{} and {}", with(&options.output, "json").display(), with(&options.output, "html").display());
    Ok(!options.check || check(&results, rounds))
}

/// Whether all measurements of our own systems were made and no target is missed that does not depend on the machine's noise.
fn check(results: &Results, rounds: u32) -> bool {
    let mut good = true;
    for cell in &results.cells {
        for series in cell.systems.iter().filter(|s| !s.note.is_empty() && s.samples.len() < rounds as usize)
        {
            // A system that cannot run a workload has said so before it was tried.
            if !series.samples.is_empty() || series.note.starts_with("round ") {
                println!("failed   {} on {}: {}", cell.id, series.system, series.note);
                // What others' programs do here is told, and not ours to answer for.
                good &= !OURS.contains(&series.system.as_str());
            }
        }
    }
    for outcome in targets::outcomes(results).iter().filter(|outcome| outcome.noise_free) {
        let missed = matches!(outcome.verdict, Verdict::Missed | Verdict::MissedBarely);
        let verdict = match outcome.verdict {
            Verdict::NotMeasured => "not seen",
            _ if missed => "MISSED",
            _ => "met",
        };
        println!("{verdict:8} {} ({}): {}", outcome.name, outcome.condition, outcome.measured);
        good &= !missed;
    }
    good
}

/// Every system has to prove that it keeps data before its speed counts.
fn verify(bench: &Bench, systems: &mut [Box<dyn System>]) -> anyhow::Result<()> {
    for system in systems {
        system.verify(bench).with_context(|| format!("verifying data through {}", system.about().name))?;
    }
    Ok(())
}

fn with(path: &std::path::Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    PathBuf::from(name)
}

fn write(path: &std::path::Path, results: &Results) -> anyhow::Result<()> {
    results::write(&with(path, "json"), results)?;
    let page = with(path, "html");
    std::fs::write(&page, html::page(results)).with_context(|| format!("writing {}", page.display()))
}

fn wanted_systems(names: &[String], profile: Profile) -> anyhow::Result<Vec<Box<dyn System>>> {
    let all = system::all();
    let known: Vec<String> = all.iter().map(|s| s.about().name).collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(name)) {
        bail!("there is no system named {unknown}; there are: {}", known.join(", "));
    }
    let wanted = |name: &str| match names {
        [] => profile != Profile::Quick || QUICK_SYSTEMS.contains(&name),
        names => names.iter().any(|wanted| wanted == name),
    };
    Ok(all.into_iter().filter(|s| wanted(&s.about().name)).collect())
}

fn plan(options: &Options, profile: Profile) -> anyhow::Result<Vec<Workload>> {
    let chosen = |w: &Workload| {
        (options.suite.is_empty() || options.suite.contains(&w.suite()))
            && (options.only.is_empty() || options.only.iter().any(|text| w.id().contains(text.as_str())))
    };
    let plan: Vec<_> = workloads(profile).into_iter().filter(chosen).collect();
    if plan.is_empty() {
        bail!("no workload is left by --suite and --only; --list without them shows all");
    }
    Ok(plan)
}

fn runnable<'a>(
    systems: &'a [Box<dyn System>],
    workload: &'a Workload,
) -> impl Iterator<Item = &'a Box<dyn System>> {
    systems.iter().filter(|s| s.can_run(workload).is_ok())
}

fn list(plan: &[Workload], systems: &[Box<dyn System>], rounds: u32, seconds: f64) {
    println!("systems:");
    for system in systems {
        let about = system.about();
        let why_not = plan.iter().map(|w| system.can_run(w)).collect::<Result<Vec<_>, _>>().err();
        let missing = plan.iter().all(|w| system.can_run(w).is_err());
        println!("  {:16}  {}", about.name, about.description);
        if let Some(why) = why_not.filter(|_| missing) {
            println!("  {:16}  not measured: {why}", "");
        }
    }
    println!("workloads:");
    let mut samples = 0;
    for workload in plan {
        let count = runnable(systems, workload).count();
        samples += count;
        println!("  {:40}  {count} systems", workload.id());
    }
    // What a measurement takes beyond its seconds: booting, and taking everything away.
    let minutes = samples as f64 * f64::from(rounds) * (seconds + 0.4) / 60.0;
    println!("{rounds} rounds: about {minutes:.0} minutes");
}

/// Measures one workload: in each round every system once.
fn measure(
    bench: &Bench,
    systems: &mut [Box<dyn System>],
    workload: &Workload,
    rounds: u32,
    progress: &mut Progress,
) -> Cell {
    let id = workload.id();
    let mut series: Vec<Series> = systems
        .iter()
        .map(|s| Series {
            system: s.about().name,
            samples: Vec::new(),
            note: s.can_run(workload).err().unwrap_or_default(),
        })
        .collect();
    let count = systems.len();
    for round in 0..rounds {
        let copy = is_null(workload).then(|| machine::copy_ns(bench.placement.map(|p| p.backend)));
        // Every round begins with another one, so that no system always comes after the same.
        for turn in 0..count {
            let n = (turn + round as usize) % count;
            let (system, series) = (&mut systems[n], &mut series[n]);
            if system.can_run(workload).is_err() {
                continue;
            }
            let began = Instant::now();
            match system.sample(bench, workload) {
                Ok(mut sample) => {
                    sample.round = round;
                    sample.values.extend(copy.map(|ns| (Metric::CopyNs, ns)));
                    series.samples.push(sample);
                }
                Err(e) => {
                    progress.suspend(|| eprintln!("{id} on {}: {e:#}", series.system));
                    series.note =
                        format!("round {}: {e:#}", round + 1).lines().next().unwrap_or_default().into();
                }
            }
            progress.step(&id, &series.system, began.elapsed());
            // What the last one has left to the kernel is not the next one's.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Cell {
        suite: workload.suite().name().into(),
        parameters: workload.parameters(),
        headline: workload.headline(),
        systems: series,
        id,
    }
}

fn is_null(workload: &Workload) -> bool {
    matches!(workload, Workload::Block(Block { backing: Backing::Null, .. }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_systems_are_named_with_the_known_ones() {
        let wanted = |names: &[&str], profile| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            wanted_systems(&names, profile)
        };
        let error = wanted(&["card", "nitro"], Profile::Full).err().unwrap().to_string();
        assert!(error.contains("nitro") && error.contains("thread"), "{error}");
        assert_eq!(wanted(&["qemu-card"], Profile::Quick).unwrap().len(), 1);
        assert!(wanted(&[], Profile::Full).unwrap().iter().any(|s| s.about().name == REFERENCE));
        assert_eq!(wanted(&[], Profile::Quick).unwrap().len(), QUICK_SYSTEMS.len());
    }

    #[test]
    fn results_are_two_files_of_one_name() {
        let path = PathBuf::from("out/v1.2");
        assert_eq!(with(&path, "json"), PathBuf::from("out/v1.2.json"));
    }

    #[test]
    fn durations_have_sensible_bounds() {
        assert_eq!(seconds("0.5"), Ok(0.5));
        assert!(seconds("0").is_err() && seconds("nan").is_err() && seconds("x").is_err());
    }
}
