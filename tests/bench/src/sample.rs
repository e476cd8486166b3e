//! One measurement of a system that boots bench guests: from the workload to the guests' command lines, and from their reports
//! and the host's counters to a [`Sample`].

mod network;
mod verify;

use std::time::Duration;

use anyhow::{Context, bail};
use e2e::guest::Report;

use crate::bench::{Bench, DISK_BYTES};
use crate::probe::{Probe, Used, beyond_guest_ram, place_thread, vcpu_threads};
use crate::results::{self, Metric, Sample};
use crate::system::qemu::TAP;
use crate::system::{Booted, Disk, GuestSetup, Setup, System, Vmm};
use crate::vm::Guest;
use crate::workload::{Backing, Block, GuestMode, Op, SCALE_DEPTH, Workload};

/// RAM of a guest that is alone or one of two, and of one of many.
const MEMORY_MIB: u32 = 128;
const SMALL_MEMORY_MIB: u32 = 32;

/// How long an idle guest is watched, and how long before that it is left alone.
const IDLE_SECONDS: f64 = 1.0;
const SETTLE: Duration = Duration::from_millis(300);

/// Share of the measured time that the host does not count, lest the guests end before it has looked.
const MARGIN: f64 = 0.2;

/// Makes a system of a VMM.
pub(crate) fn on(vmm: impl Vmm + 'static) -> Box<dyn System> {
    Box::new(OnVmm(vmm))
}

struct OnVmm<V>(V);

impl<V: Vmm> System for OnVmm<V> {
    fn about(&self) -> results::System {
        self.0.about()
    }

    fn can_run(&self, workload: &Workload) -> Result<(), String> {
        self.0.can_run(workload)
    }

    fn sample(&mut self, bench: &Bench, workload: &Workload) -> anyhow::Result<Sample> {
        match workload {
            Workload::Block(block) => {
                bench.prepare(block.backing)?;
                let job = format!("{} {}", disk_job(block), timing(bench));
                let setup = one_guest(job, Some(disk(bench, block)));
                let (booted, used) = run(&mut self.0, bench, &setup)?;
                let result = booted.guests[0].result(bench.patience())?;
                let mut sample = of_job(&result)?;
                add_used(&mut sample, &used, &[result])?;
                Ok(sample)
            }
            Workload::Network { traffic, peer, guest } => {
                network::sample(&mut self.0, bench, *traffic, *peer, *guest)
            }
            Workload::Jitter { backing, rate, guest } => {
                bench.prepare(*backing)?;
                let block = Block {
                    backing: *backing,
                    op: Op::RandomRead,
                    block_bytes: 4096,
                    depth: 8,
                    queues: 1,
                    guest: *guest,
                };
                let seconds = bench.warmup + bench.measure;
                let job =
                    format!("{} rate={rate} secs={seconds} also=compute secs={seconds}", disk_job(&block));
                let setup = one_guest(job, Some(disk(bench, &block)));
                let (booted, used) = run(&mut self.0, bench, &setup)?;
                let disk = booted.guests[0].result(bench.patience())?;
                let mut sample = of_job(&disk)?;
                add_used(&mut sample, &used, std::slice::from_ref(&disk))?;
                let results = booted.guests[0].results();
                let compute = results.get(1).context("the guest did not report its computation")?;
                add_jitter(&mut sample, &disk, compute)?;
                Ok(sample)
            }
            Workload::Scale { guests } => scale(&mut self.0, bench, *guests),
            Workload::StartUp => start_up(&mut self.0, bench),
            Workload::Idle => idle(&mut self.0, bench),
        }
    }

    fn verify(&mut self, bench: &Bench) -> anyhow::Result<()> {
        verify::verify(&mut self.0, bench, verify::WHOLE)
    }
}

/// [`System::verify`] with a guest that skips the reading: for the test of the harness, which must not believe it.
pub(crate) fn verify_without_reading(vmm: &mut impl Vmm, bench: &Bench) -> anyhow::Result<()> {
    verify::verify(vmm, bench, verify::WITHOUT_READING)
}

/// The words of a load on a disk, without its length.
fn disk_job(block: &Block) -> String {
    let Block { op, block_bytes, depth, queues, guest, .. } = block;
    format!(
        "end=halt job=blk-bench rw={} bs={block_bytes} qd={depth} queues={queues} mode={} vectors=1 hist=1 wait=serial",
        op.name(),
        guest.name()
    )
}

fn timing(bench: &Bench) -> String {
    format!("warmup={} secs={}", bench.warmup, bench.measure)
}

fn disk(bench: &Bench, block: &Block) -> Disk {
    Disk { backing: block.backing, path: bench.file.clone(), bytes: DISK_BYTES, queues: block.queues }
}

fn one_guest(cmdline: String, disk: Option<Disk>) -> Setup {
    let guest = GuestSetup { name: "guest".into(), memory_mib: MEMORY_MIB, cmdline, disk, nics: vec![] };
    Setup { guests: vec![guest], uplink: false, quick_start: false }
}

/// Boots `setup`, lets all its guests begin at once, and counts what is used while they work.
fn run(vmm: &mut impl Vmm, bench: &Bench, setup: &Setup) -> anyhow::Result<(Booted, Used)> {
    let booted = vmm.boot(bench, setup)?;
    run_booted(booted, bench, setup)
}

/// The same for guests that are booted.
fn run_booted(mut booted: Booted, bench: &Bench, setup: &Setup) -> anyhow::Result<(Booted, Used)> {
    let several = booted.guests.len() > 1;
    for guest in &booted.guests {
        guest.wait_ready()?;
        if several {
            // A guest that waits for a byte polls its serial port, which is not to slow down those that still boot.
            guest.freeze(true)?;
        }
    }
    if let Some(placement) = bench.placement
        && let [guest] = &booted.guests[..]
    {
        vcpu_threads(guest.pid()).into_iter().for_each(|tid| place_thread(tid, Some(placement.vcpu)));
    }
    let mut probe = Probe::new(booted.guests.iter().map(Guest::pid).collect(), booted.backends.clone());
    if setup.uplink {
        probe.watch(TAP);
    }
    if several {
        booted.guests.iter().try_for_each(|guest| guest.freeze(false))?;
    }
    booted.guests.iter_mut().try_for_each(Guest::go)?;
    for guest in &booted.guests {
        guest.wait("io_begin", bench.patience())?;
    }
    // In the middle of the guests' work: what they print at its beginning and end is not part of it.
    std::thread::sleep(Duration::from_secs_f64(bench.warmup));
    let begin = probe.read();
    std::thread::sleep(Duration::from_secs_f64(bench.measure * (1.0 - MARGIN)));
    let end = probe.read();
    let used = probe.used(begin, end);
    Ok((booted, used))
}

/// A number of a guest's report.
fn number(report: &Report, key: &str) -> anyhow::Result<f64> {
    report[key].as_f64().with_context(|| format!("the guest's report has no {key}: {report}"))
}

/// What the guest itself says of a job.
fn of_job(result: &Report) -> anyhow::Result<Sample> {
    let mut sample = Sample::default();
    let seconds = number(result, "measured_us")? / 1e6;
    let ops = number(result, "ops")?;
    if ops == 0.0 || seconds == 0.0 {
        bail!("the guest did nothing: {result}");
    }
    let values = &mut sample.values;
    values.insert(Metric::OpsPerS, ops / seconds);
    values.insert(Metric::BytesPerS, number(result, "bytes")? / seconds);
    for (metric, key) in [
        (Metric::P50Ns, "p50_ns"),
        (Metric::P90Ns, "p90_ns"),
        (Metric::P99Ns, "p99_ns"),
        (Metric::P999Ns, "p999_ns"),
        (Metric::MaxNs, "max_ns"),
    ] {
        values.extend(result[key].as_f64().map(|value| (metric, value)));
    }
    // Of a disk with several queues; what the guest asks of them is the same.
    if let Some(queues) = result["per_queue"].as_array().filter(|queues| queues.len() > 1) {
        let each: Vec<f64> = queues.iter().filter_map(|queue| queue["ops"].as_f64()).collect();
        values.insert(Metric::Fairness, fairness(&each));
    }
    if let Some(classes) = result["latency"].as_array() {
        sample.latency =
            classes.iter().filter_map(|class| Some((class[0].as_u64()?, class[1].as_u64()?))).collect();
    }
    Ok(sample)
}

/// What the guests say of notifications and interrupts, and what the host says, divided by what was done meanwhile.
fn add_used(sample: &mut Sample, used: &Used, results: &[Report]) -> anyhow::Result<()> {
    let sum = |key: &str| results.iter().map(|r| number(r, key)).sum::<anyhow::Result<f64>>();
    let (kicks, irqs, counted) = (sum("kicks")?, sum("irqs")?, sum("ops")?);
    let values = &mut sample.values;
    let ops = values.get(&Metric::OpsPerS).context("a sample without a rate")? * used.seconds;
    values.insert(Metric::KicksPerOp, kicks / counted);
    values.insert(Metric::IrqsPerOp, irqs / counted);
    values.insert(Metric::VcpuNsPerOp, used.vcpu_ns / ops);
    values.insert(Metric::BackendNsPerOp, used.backend_ns / ops);
    values.insert(Metric::OtherNsPerOp, used.other_ns / ops);
    values.insert(Metric::BackendPercent, used.backend_ns / used.seconds / 1e7);
    values.extend(used.exits.map(|n| (Metric::ExitsPerOp, n / ops)));
    values.extend(used.user_exits.map(|n| (Metric::UserExitsPerOp, n / ops)));
    values.extend(used.cycles.map(|n| (Metric::CyclesPerOp, n / ops)));
    Ok(())
}

/// What the guest's computation lost: time that its slices took longer, and time in notifications.
fn add_jitter(sample: &mut Sample, disk: &Report, compute: &Report) -> anyhow::Result<()> {
    let seconds = number(compute, "us")? / 1e6;
    let lost = number(compute, "lost_us")? + number(disk, "kick_us")?;
    let gap = number(compute, "max_gap_ns")?.max(number(disk, "max_kick_ns")?);
    let values = &mut sample.values;
    values.insert(Metric::LostPercent, lost / seconds / 1e4);
    values.insert(Metric::LostNsPerOp, lost * 1e3 / number(disk, "ops")?);
    values.insert(Metric::MaxGapNs, gap);
    Ok(())
}

fn scale(vmm: &mut impl Vmm, bench: &Bench, count: u16) -> anyhow::Result<Sample> {
    let block = Block {
        backing: Backing::Null,
        op: Op::RandomRead,
        block_bytes: 4096,
        depth: SCALE_DEPTH,
        queues: 1,
        guest: GuestMode::Irq,
    };
    let guests = (0..count).map(|n| GuestSetup {
        name: format!("guest{n}"),
        memory_mib: SMALL_MEMORY_MIB,
        cmdline: format!("{} {}", disk_job(&block), timing(bench)),
        disk: Some(disk(bench, &block)),
        nics: vec![],
    });
    let setup = Setup { guests: guests.collect(), uplink: false, quick_start: false };
    let (booted, used) = run(vmm, bench, &setup)?;
    let results: Vec<Report> =
        booted.guests.iter().map(|guest| guest.result(bench.patience())).collect::<Result<_, _>>()?;
    let samples: Vec<Sample> = results.iter().map(of_job).collect::<Result<_, _>>()?;
    let each: Vec<f64> = samples.iter().map(|s| s.values[&Metric::OpsPerS]).collect();
    let mut sample = Sample::default();
    let values = &mut sample.values;
    values.insert(Metric::OpsPerS, each.iter().sum());
    values.insert(Metric::Fairness, fairness(&each));
    let worst = |metric| samples.iter().filter_map(|s| s.values.get(&metric).copied()).fold(0.0, f64::max);
    values.insert(Metric::P50Ns, worst(Metric::P50Ns));
    values.insert(Metric::P99Ns, worst(Metric::P99Ns));
    let memory: u64 = booted
        .guests
        .iter()
        .map(|guest| beyond_guest_ram(guest.pid(), u64::from(SMALL_MEMORY_MIB) << 20))
        .sum::<anyhow::Result<u64>>()?;
    values.insert(Metric::MemoryBytes, memory as f64 / f64::from(count));
    add_used(&mut sample, &used, &results)?;
    Ok(sample)
}

/// Jain's index: 1 if all have the same, 1/n if one has all.
fn fairness(each: &[f64]) -> f64 {
    let (sum, squares): (f64, f64) = each.iter().fold((0.0, 0.0), |(s, q), x| (s + x, q + x * x));
    if squares == 0.0 { 0.0 } else { sum * sum / (each.len() as f64 * squares) }
}

fn start_up(vmm: &mut impl Vmm, bench: &Bench) -> anyhow::Result<Sample> {
    let block = Block {
        backing: Backing::Buffered,
        op: Op::RandomRead,
        block_bytes: 4096,
        depth: 1,
        queues: 1,
        guest: GuestMode::Poll,
    };
    bench.prepare(block.backing)?;
    let one = one_guest("end=halt job=blk-first job=idle".into(), Some(disk(bench, &block)));
    let setup = Setup { quick_start: true, ..one };
    let booted = vmm.boot(bench, &setup)?;
    let guest = &booted.guests[0];
    guest.wait("first_io", bench.patience())?;
    let first_io = guest.age();
    guest.wait("io_begin", bench.patience())?;
    std::thread::sleep(SETTLE);
    let mut sample = Sample::default();
    let first_line = guest.first_line().context("the guest said nothing")?;
    sample.values.insert(Metric::FirstLineNs, first_line.as_nanos() as f64);
    sample.values.insert(Metric::FirstIoNs, first_io.as_nanos() as f64);
    let memory = beyond_guest_ram(guest.pid(), u64::from(MEMORY_MIB) << 20)?;
    sample.values.insert(Metric::MemoryBytes, memory as f64);
    Ok(sample)
}

/// A guest that waits for its disk to change, which it does not.
fn idle(vmm: &mut impl Vmm, bench: &Bench) -> anyhow::Result<Sample> {
    let block = Block {
        backing: Backing::Buffered,
        op: Op::RandomRead,
        block_bytes: 4096,
        depth: 1,
        queues: 1,
        guest: GuestMode::Irq,
    };
    let seconds = IDLE_SECONDS + 4.0 * SETTLE.as_secs_f64();
    let job = format!("end=halt job=blk-watch mode=irq wait=serial secs={seconds}");
    let setup = one_guest(job, Some(disk(bench, &block)));
    let mut booted = vmm.boot(bench, &setup)?;
    booted.guests[0].wait_ready()?;
    let mut probe = Probe::new(vec![booted.guests[0].pid()], booted.backends.clone());
    booted.guests[0].go()?;
    booted.guests[0].wait("io_begin", bench.patience())?;
    std::thread::sleep(SETTLE);
    let begin = probe.read();
    std::thread::sleep(Duration::from_secs_f64(IDLE_SECONDS));
    let end = probe.read();
    let used = probe.used(begin, end);
    let mut sample = Sample::default();
    sample.values.insert(Metric::WakeupsPerS, used.wakeups / used.seconds);
    sample.values.insert(Metric::BackendPercent, used.backend_ns / used.seconds / 1e7);
    Ok(sample)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn jain() {
        assert_eq!(fairness(&[2.0, 2.0, 2.0]), 1.0);
        assert_eq!(fairness(&[1.0, 0.0]), 0.5);
        assert_eq!(fairness(&[]), 0.0);
    }

    #[test]
    fn a_queue_that_is_hardly_served_shows() {
        let mut report =
            json!({"ops": 1000, "bytes": 0, "measured_us": 1000, "per_queue": [{"ops": 900}, {"ops": 100}]});
        let sample = of_job(&report).unwrap();
        assert!((sample.values[&Metric::Fairness] - 1.0 / 1.64).abs() < 1e-9);
        report["per_queue"] = json!([{"ops": 1000}]);
        assert!(!of_job(&report).unwrap().values.contains_key(&Metric::Fairness));
    }

    #[test]
    fn host_counts_are_divided_by_what_was_done_meanwhile() {
        let report = json!({"ops": 1000, "bytes": 4_096_000, "measured_us": 500_000, "p50_ns": 7, "kicks": 20, "irqs": 0,
            "latency": [[10, 900], [20, 100]]});
        let mut sample = of_job(&report).unwrap();
        let used = Used {
            seconds: 0.75,
            vcpu_ns: 1500.0,
            backend_ns: 3000.0,
            other_ns: 0.0,
            exits: Some(15.0),
            user_exits: None,
            cycles: Some(1_500_000.0),
            wakeups: 0.0,
            frames: 0.0,
            frame_bytes: 0.0,
        };
        add_used(&mut sample, &used, &[report]).unwrap();
        assert_eq!(sample.values[&Metric::OpsPerS], 2000.0);
        assert_eq!(sample.values[&Metric::KicksPerOp], 0.02);
        assert_eq!(sample.values[&Metric::BackendNsPerOp], 2.0);
        assert_eq!(sample.values[&Metric::ExitsPerOp], 0.01);
        assert_eq!(sample.values[&Metric::CyclesPerOp], 1000.0);
        assert_eq!(sample.latency, [(10, 900), (20, 100)]);
        assert!(!sample.values.contains_key(&Metric::UserExitsPerOp));
        assert!(of_job(&json!({"ops": 0, "measured_us": 5, "bytes": 0})).is_err());
    }
}
