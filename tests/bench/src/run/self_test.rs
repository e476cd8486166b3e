//! `offload-bench self-test`: whether the harness sees differences that are there, and none that are not.

use anyhow::Context;

use super::measure;
use crate::bench::Bench;
use crate::report::progress::Progress;
use crate::results::{Cell, Metric};
use crate::sample;
use crate::system::System;
use crate::system::in_process::InProcess;
use crate::workload::{Backing, Block, GuestMode, Op, Workload};

const ROUNDS: u32 = 9;
const MEASURE_S: f64 = 0.15;
const WARMUP_S: f64 = 0.1;

/// What the slowed engine waits, and the least of it that must be seen: a request that comes in the middle waits for the rest.
const DELAY_NS: u32 = 5_000;
const SEEN_NS: f64 = 2_000.0;

/// Two systems that are the same may differ by so much although the interval leaves 1 out, which it does one time in twenty: where
/// the memory of a start lies makes a tenth of a request that takes 600 ns.
const SAME: f64 = 0.15;

/// Runs all; true if all is well.
pub(crate) fn run(files: &std::path::Path) -> anyhow::Result<bool> {
    let bench = Bench::new(files, WARMUP_S, MEASURE_S, true)?;
    let mut systems: Vec<Box<dyn System>> = vec![
        sample::on(InProcess::thread()),
        sample::on(InProcess::slowed("again", 0)),
        sample::on(InProcess::slowed("slowed", DELAY_NS)),
    ];
    let workload = Workload::Block(Block {
        backing: Backing::Null,
        op: Op::RandomRead,
        block_bytes: 4096,
        depth: 1,
        queues: 1,
        guest: GuestMode::Poll,
    });
    let mut progress = Progress::new(u64::from(ROUNDS) * systems.len() as u64);
    let cell = measure(&bench, &mut systems, &workload, ROUNDS, &mut progress);
    drop(progress);
    let mut good = say("a system compared with itself shows no difference", same(&cell)?);
    good &= say("5 us that an engine takes longer are seen", slower(&cell)?);
    good &=
        say("a system that keeps its data is believed", (systems[0].verify(&bench).is_ok(), String::new()));
    let (noticed, why) = match sample::verify_without_reading(&mut InProcess::thread(), &bench) {
        Ok(()) => (false, "it was believed".to_owned()),
        Err(e) => (true, format!("{e:#}")),
    };
    good &= say("a guest that skips verification is not believed", (noticed, why));
    Ok(good)
}

fn say(what: &str, (good, detail): (bool, String)) -> bool {
    println!(
        "{}  {what}{}{detail}",
        if good { "ok  " } else { "FAIL" },
        if detail.is_empty() { "" } else { ": " }
    );
    good
}

fn same(cell: &Cell) -> anyhow::Result<(bool, String)> {
    let ratio = cell.ratio("again", "thread", Metric::P50Ns).context("no samples to compare")?;
    let good = !ratio.excludes(1.0) || (ratio.value - 1.0).abs() < SAME;
    Ok((good, format!("p50 {:.3}x, {:.3} to {:.3}", ratio.value, ratio.low, ratio.high)))
}

fn slower(cell: &Cell) -> anyhow::Result<(bool, String)> {
    let difference = cell.difference("slowed", "thread", Metric::P50Ns).context("no samples to compare")?;
    let text =
        format!("p50 {:.0} ns more, {:.0} to {:.0}", difference.value, difference.low, difference.high);
    Ok((difference.low > SEEN_NS, text))
}
