//! Counters of VMs and their devices.

use std::collections::BTreeMap;

use proto::v1;
use serde::Serialize;

/// Counters of a VM.
#[derive(Debug, Serialize)]
pub(crate) struct Stats {
    /// Exits from the guest to the hypervisor process, by reason.
    pub userspace_exits: BTreeMap<String, u64>,
    /// Their sum.
    pub userspace_exits_total: u64,
    /// Those that carried I/O; 0 in steady state.
    pub data_path_exits: u64,
    /// Bytes the guest wrote to its console.
    pub console_bytes: u64,
    /// From process start to the guest's first instruction; 0: not yet.
    pub first_entry_us: u64,
    /// From process start to its first console output; 0: not yet.
    pub first_console_byte_us: u64,
    /// Its devices; those whose card does not answer are missing.
    pub devices: Vec<DeviceStats>,
}

/// Counters of a device.
#[derive(Debug, Serialize)]
pub(crate) struct DeviceStats {
    /// Its id within the VM.
    pub id: String,
    /// Connections the card accepted for it.
    pub connections: u64,
    /// Its requests, by kind; empty if its card does not tell kinds apart.
    pub operations: Vec<Operation>,
    /// Its queues.
    pub queues: Vec<QueueStats>,
    /// Of a NIC: frames that its network did not take from it or did not give it, by reason; null for other devices.
    pub drops: Option<BTreeMap<&'static str, u64>>,
    /// Of a NIC: what its limits did; null for other devices.
    pub allowances: Option<BTreeMap<&'static str, u64>>,
}

/// Requests of one kind, over all queues of a device. Latencies are what the card took, without what came before and
/// after; quantiles are known to a quarter, and are null without requests.
#[derive(Debug, Serialize)]
pub(crate) struct Operation {
    /// "read", "write", "flush", ...
    pub name: String,
    /// Answered.
    pub requests: u64,
    /// Of these with an error.
    pub errors: u64,
    /// Mean latency.
    pub mean_ns: Option<u64>,
    /// Half of them took less.
    pub p50_ns: Option<u64>,
    /// 99 of 100 took less.
    pub p99_ns: Option<u64>,
}

/// Counters of a queue.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub(crate) struct QueueStats {
    pub index: u32,
    pub requests: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub bytes_copied: u64,
    pub bytes_registered: u64,
    pub errors: u64,
    pub dropped: u64,
    pub kicks: u64,
    pub calls: u64,
    pub in_flight: u64,
    pub resubmitted: u64,
    pub batches: u64,
    pub poll_hits: u64,
    pub sleeps: u64,
    pub throttled: u64,
    pub throttled_ns: u64,
}

impl From<v1::VmStats> for Stats {
    fn from(s: v1::VmStats) -> Self {
        let h = s.hypervisor.unwrap_or_default();
        Self {
            userspace_exits: h.userspace_exits.into_iter().collect(),
            userspace_exits_total: h.userspace_exits_total,
            data_path_exits: h.data_path_exits,
            console_bytes: h.console_bytes,
            first_entry_us: h.first_entry_us,
            first_console_byte_us: h.first_console_byte_us,
            devices: s.devices.into_iter().map(DeviceStats::from).collect(),
        }
    }
}

impl From<v1::DeviceStats> for DeviceStats {
    fn from(d: v1::DeviceStats) -> Self {
        Self {
            id: d.id,
            connections: d.connections,
            operations: operations(&d.queues),
            queues: d.queues.into_iter().map(QueueStats::from).collect(),
            drops: d.drops.map(|drops| drops.by_reason().into_iter().collect()),
            allowances: d.allowances.map(|a| a.by_name().into_iter().collect()),
        }
    }
}

impl From<v1::QueueStats> for QueueStats {
    fn from(q: v1::QueueStats) -> Self {
        Self {
            index: q.index,
            requests: q.requests,
            bytes_in: q.bytes_in,
            bytes_out: q.bytes_out,
            bytes_copied: q.bytes_copied,
            bytes_registered: q.bytes_registered,
            errors: q.errors,
            dropped: q.dropped,
            kicks: q.kicks,
            calls: q.calls,
            in_flight: q.in_flight,
            resubmitted: q.resubmitted,
            batches: q.batches,
            poll_hits: q.poll_hits,
            sleeps: q.sleeps,
            throttled: q.throttled,
            throttled_ns: q.throttled_ns,
        }
    }
}

/// What all queues have done, by kind, in the card's order.
fn operations(queues: &[v1::QueueStats]) -> Vec<Operation> {
    let known = queues.iter().map(|q| &q.operations).find(|o| !o.is_empty());
    known.into_iter().flatten().map(|kind| operation(&kind.name, queues)).collect()
}

fn operation(name: &str, queues: &[v1::QueueStats]) -> Operation {
    let all = || queues.iter().flat_map(|q| &q.operations).filter(|o| o.name == name);
    let mut buckets = BTreeMap::new();
    for bucket in all().flat_map(|o| &o.latency_ns) {
        *buckets.entry(bucket.below).or_insert(0) += bucket.count;
    }
    let requests: u64 = buckets.values().sum();
    let sum: u64 = all().map(|o| o.latency_sum_ns).sum();
    let below = |percent: u128| {
        let rank = (u128::from(requests) * percent).div_ceil(100);
        let mut seen = 0;
        let bucket = buckets.iter().find(|(_, count)| {
            seen += u128::from(**count);
            seen >= rank
        });
        bucket.map(|(below, _)| *below)
    };
    Operation {
        name: name.to_owned(),
        requests,
        errors: all().map(|o| o.errors).sum(),
        mean_ns: sum.checked_div(requests),
        p50_ns: below(50),
        p99_ns: below(99),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_all_queues() {
        let queue = |buckets: &[(u64, u64)]| {
            let latency_ns = buckets.iter().map(|(below, count)| v1::Bucket { below: *below, count: *count });
            let op = v1::OperationStats {
                name: "read".into(),
                latency_ns: latency_ns.collect(),
                latency_sum_ns: 50_000,
                errors: 1,
            };
            v1::QueueStats { operations: vec![op], ..Default::default() }
        };
        // One that was never started knows no kinds.
        let queues = [
            v1::QueueStats::default(),
            queue(&[(128, 40), (256, 8)]),
            queue(&[(128, 9), (256, 42), (512, 1)]),
        ];
        let ops = operations(&queues);
        assert_eq!((ops.len(), ops[0].requests, ops[0].errors, ops[0].mean_ns), (1, 100, 2, Some(1000)));
        assert_eq!((ops[0].p50_ns, ops[0].p99_ns), (Some(256), Some(256)));
        let none = operation("write", &queues);
        assert_eq!((none.requests, none.mean_ns, none.p99_ns), (0, None, None));
    }
}
