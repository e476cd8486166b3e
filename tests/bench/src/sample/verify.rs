//! Whether a system keeps what it is given.

use anyhow::bail;
use e2e::guest::Report;

use super::{disk, number, one_guest};
use crate::bench::Bench;
use crate::system::Vmm;
use crate::workload::{Backing, Block, GuestMode, Op, Workload};

/// Bytes that are written and read back.
const BYTES: u64 = 32 << 20;
const BLOCK_BYTES: u64 = 4096;

/// What makes the guest write everything, and read everything back.
pub(super) const WHOLE: &str = "verify=passes order=random";
/// What makes it skip the reading: for the test that this is noticed.
pub(super) const WITHOUT_READING: &str = "verify=write";

/// Has a guest write a pattern through two queues and compare what it reads back, in the way that `how` says.
pub(super) fn verify(vmm: &mut impl Vmm, bench: &Bench, how: &str) -> anyhow::Result<()> {
    let block = Block {
        backing: Backing::Buffered,
        op: Op::RandomWrite,
        block_bytes: BLOCK_BYTES as u32,
        depth: 32,
        queues: 2,
        guest: GuestMode::Poll,
    };
    if vmm.can_run(&Workload::Block(block)).is_err() {
        return Ok(());
    }
    let job =
        format!("end=halt job=blk-verify {how} bytes={BYTES} bs={BLOCK_BYTES} qd=32 queues=2 vectors=1");
    let booted = vmm.boot(bench, &one_guest(job, Some(disk(bench, &block))))?;
    check(&booted.guests[0].result(bench.patience())?)
}

/// Whether a guest's report says that everything was written, read and found right.
fn check(report: &Report) -> anyhow::Result<()> {
    let blocks = (BYTES / BLOCK_BYTES) as f64;
    for (key, what) in [("writes", "written"), ("reads", "read back")] {
        let count = number(report, key)?;
        if count < blocks {
            bail!("nothing is proven: of {blocks} blocks the guest has {what} {count}");
        }
    }
    for key in ["mismatches", "stale", "unknown", "errors"] {
        let count = number(report, key)?;
        if count > 0.0 {
            bail!("data was lost: {count} {key}: {report}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_was_read_back_counts() {
        let good =
            json!({"writes": 8192, "reads": 8192, "mismatches": 0, "stale": 0, "unknown": 0, "errors": 0});
        check(&good).unwrap();
        for (key, value) in [("reads", 0), ("reads", 8191), ("writes", 1), ("mismatches", 1), ("stale", 1)] {
            let mut bad = good.clone();
            bad[key] = value.into();
            assert!(check(&bad).is_err(), "{bad}");
        }
        assert!(check(&json!({})).is_err());
    }
}
