//! fio on the host: what the file can do without a guest.

use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

use super::{System, needed, version};
use crate::bench::Bench;
use crate::results::{self, Metric, Sample};
use crate::vm::tie;
use crate::workload::{Backing, Block, Op, Workload};

/// fio.
pub(crate) struct Fio {
    version: Option<String>,
}

impl Fio {
    pub(crate) fn new() -> Self {
        Self { version: version("fio") }
    }
}

impl System for Fio {
    fn about(&self) -> results::System {
        results::System {
            name: "host".into(),
            description: "No guest: fio on the host, io_uring in batches (psync for one request at a time in the page cache)".into(),
            version: self.version.clone().unwrap_or_default(),
        }
    }

    fn can_run(&self, workload: &Workload) -> Result<(), String> {
        match workload {
            Workload::Block(Block { backing: Backing::Buffered | Backing::Direct, queues: 1, .. }) => {
                needed("fio", self.version.as_ref(), "Debian's package fio")
            }
            _ => Err("it measures the test file, from one thread".into()),
        }
    }

    fn sample(&mut self, bench: &Bench, workload: &Workload) -> anyhow::Result<Sample> {
        let Workload::Block(block) = workload else { bail!("fio measures disks only") };
        bench.prepare(block.backing)?;
        let mut command = Command::new("fio");
        command.args(["--name=host", "--output-format=json", "--allow_file_create=0", "--fallocate=none"]);
        command.arg(format!("--filename={}", bench.file.display()));
        command.arg(format!("--size={}", crate::bench::DISK_BYTES));
        command.args([
            "--time_based",
            "--norandommap",
            "--randrepeat=0",
            "--group_reporting",
            "--invalidate=0",
        ]);
        command.arg(format!("--runtime={:.0}ms", bench.measure * 1e3));
        command.arg(format!("--ramp_time={:.0}ms", bench.warmup * 1e3));
        command.arg(format!("--bs={}", block.block_bytes));
        command.arg(format!(
            "--rw={}",
            match block.op {
                Op::RandomRead => "randread",
                Op::RandomWrite => "randwrite",
                Op::Read => "read",
                Op::Write => "write",
            }
        ));
        command.arg(format!("--direct={}", u8::from(block.backing == Backing::Direct)));
        if block.depth == 1 && block.backing == Backing::Buffered {
            command.arg("--ioengine=psync");
        } else {
            command.args(["--ioengine=io_uring", "--registerfiles=1"]);
            command.arg(format!("--iodepth={}", block.depth));
            command.arg(format!("--iodepth_batch_submit={}", block.depth.div_ceil(2)));
            command.args([
                "--iodepth_batch_complete_min=1",
                &format!("--iodepth_batch_complete_max={}", block.depth),
            ]);
        }
        command.stdin(Stdio::null());
        tie(&mut command, bench.placement.map(|p| p.backend));
        let output = command.output().context("running fio")?;
        if !output.status.success() {
            bail!("fio: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        parse(&String::from_utf8_lossy(&output.stdout))
    }

    /// There is nothing of ours between fio and the file.
    fn verify(&mut self, _bench: &Bench) -> anyhow::Result<()> {
        Ok(())
    }
}

/// What fio's JSON says of its one job.
fn parse(text: &str) -> anyhow::Result<Sample> {
    // It may say something before.
    let json = text.find('{').map_or(text, |at| &text[at..]);
    let report: Value = serde_json::from_str(json).context("reading what fio printed")?;
    let job = &report["jobs"][0];
    let side = [&job["read"], &job["write"]].into_iter().find(|side| side["total_ios"].as_u64() > Some(0));
    let Some(side) = side else { bail!("fio did no I/O") };
    let mut sample = Sample::default();
    let values = &mut sample.values;
    for (metric, value) in [
        (Metric::OpsPerS, side["iops"].as_f64()),
        (Metric::BytesPerS, side["bw_bytes"].as_f64()),
        (Metric::P50Ns, side["clat_ns"]["percentile"]["50.000000"].as_f64()),
        (Metric::P90Ns, side["clat_ns"]["percentile"]["90.000000"].as_f64()),
        (Metric::P99Ns, side["clat_ns"]["percentile"]["99.000000"].as_f64()),
        (Metric::P999Ns, side["clat_ns"]["percentile"]["99.900000"].as_f64()),
        (Metric::MaxNs, side["clat_ns"]["max"].as_f64()),
    ] {
        values.extend(value.map(|value| (metric, value)));
    }
    // User and system time, in percent of the run's length.
    if let (Some(user), Some(system), Some(iops)) =
        (job["usr_cpu"].as_f64(), job["sys_cpu"].as_f64(), side["iops"].as_f64())
    {
        values.insert(Metric::BackendNsPerOp, (user + system) / 100.0 * 1e9 / iops);
    }
    Ok(sample)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fio_prints_is_understood() {
        let text = r#"fio: note
            {"jobs": [{"usr_cpu": 25.0, "sys_cpu": 75.0,
            "read": {"total_ios": 0, "iops": 0.0},
            "write": {"total_ios": 10, "iops": 1000000.0, "bw_bytes": 4096000000,
                "clat_ns": {"max": 900, "percentile": {"50.000000": 500, "99.000000": 800}}}}]}"#;
        let values = parse(text).unwrap().values;
        assert_eq!(values[&Metric::OpsPerS], 1e6);
        assert_eq!(values[&Metric::P50Ns], 500.0);
        assert_eq!(values[&Metric::BackendNsPerOp], 1000.0);
        assert!(!values.contains_key(&Metric::P90Ns));
        assert!(parse(r#"{"jobs": [{"read": {"total_ios": 0}, "write": {"total_ios": 0}}]}"#).is_err());
    }
}
