//! A card's numbers as Prometheus reads them (text format 0.0.4).
//!
//! Counters have the labels `device` and `queue`, and `op` where they are by kind of request; histograms are a device's,
//! over its queues, in buckets of powers of two. So there are some 20 series per queue and some 150 per disk, and no guest
//! can make more of them.

use std::fmt::{self, Display, Write as _};

use proto::v1::{Bucket, DeviceStats, NetAllowances, QueueStats};

/// What the format is called.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A number of a queue.
struct PerQueue {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    value: fn(&QueueStats) -> Value,
}

/// As it is written.
enum Value {
    Count(u64),
    Nanoseconds(u64),
}

use Value::{Count, Nanoseconds};

impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Count(n) => n.fmt(f),
            // In seconds.
            Nanoseconds(n) => write!(f, "{}.{:09}", n / 1_000_000_000, n % 1_000_000_000),
        }
    }
}

const PER_QUEUE: [PerQueue; 14] = [
    PerQueue {
        name: "chains_taken_total",
        kind: "counter",
        help: "Descriptor chains taken from the ring (count).",
        value: |q| Count(q.requests),
    },
    PerQueue {
        name: "errors_total",
        kind: "counter",
        help: "Requests answered with an error (count).",
        value: |q| Count(q.errors),
    },
    PerQueue {
        name: "dropped_total",
        kind: "counter",
        help: "Frames dropped (count).",
        value: |q| Count(q.dropped),
    },
    PerQueue {
        name: "kicks_total",
        kind: "counter",
        help: "Notifications from the driver (count).",
        value: |q| Count(q.kicks),
    },
    PerQueue {
        name: "calls_total",
        kind: "counter",
        help: "Interrupts to the driver (count).",
        value: |q| Count(q.calls),
    },
    PerQueue {
        name: "in_flight",
        kind: "gauge",
        help: "Chains taken and not yet returned (count).",
        value: |q| Count(q.in_flight),
    },
    PerQueue {
        name: "resubmitted_total",
        kind: "counter",
        help: "Chains found in flight after a crash and done again (count).",
        value: |q| Count(q.resubmitted),
    },
    PerQueue {
        name: "batches_total",
        kind: "counter",
        help: "Batches of answers shown to the driver (count).",
        value: |q| Count(q.batches),
    },
    PerQueue {
        name: "poll_hits_total",
        kind: "counter",
        help: "Times that polling found work and saved a sleep (count).",
        value: |q| Count(q.poll_hits),
    },
    PerQueue {
        name: "sleeps_total",
        kind: "counter",
        help: "Times the queue's thread went to sleep (count).",
        value: |q| Count(q.sleeps),
    },
    PerQueue {
        name: "copied_bytes_total",
        kind: "counter",
        help: "Payload that the card itself copied, as often as it did (bytes).",
        value: |q| Count(q.bytes_copied),
    },
    PerQueue {
        name: "registered_bytes",
        kind: "gauge",
        help: "Guest memory registered with the kernel for the queue's transfers (bytes).",
        value: |q| Count(q.bytes_registered),
    },
    PerQueue {
        name: "throttled_total",
        kind: "counter",
        help: "Times that requests waited for the device's limits (count).",
        value: |q| Count(q.throttled),
    },
    PerQueue {
        name: "throttled_seconds_total",
        kind: "counter",
        help: "How long requests waited for the device's limits (seconds).",
        value: |q| Nanoseconds(q.throttled_ns),
    },
];

/// The numbers of a card. `prefix` begins all names, `stats` are its devices that are served, `lost` counts those that are
/// not.
pub fn encode(prefix: &str, version: &str, stats: &[DeviceStats], lost: usize) -> String {
    let mut out = Text { prefix, text: String::new() };
    out.family("build_info", "gauge", "Version of the card (always 1).");
    out.sample("build_info", &[("version", &version)], &1);
    out.family("devices", "gauge", "Devices of the card, by whether it can serve them (count).");
    out.sample("devices", &[("state", &"served")], &stats.len());
    out.sample("devices", &[("state", &"lost")], &lost);
    out.family("connections_total", "counter", "Connections accepted from front-ends (count).");
    for device in stats {
        out.sample("connections_total", &[("device", &device.id)], &device.connections);
    }
    for metric in &PER_QUEUE {
        out.family(metric.name, metric.kind, metric.help);
        for (device, queue) in queues(stats) {
            let labels: [Label<'_>; 2] = [("device", &device.id), ("queue", &queue.index)];
            out.sample(metric.name, &labels, &(metric.value)(queue));
        }
    }
    out.family("bytes_total", "counter", "Payload written into and read from guest memory (bytes).");
    for (device, queue) in queues(stats) {
        for (direction, bytes) in [("to_guest", queue.bytes_in), ("from_guest", queue.bytes_out)] {
            let labels: [Label<'_>; 3] =
                [("device", &device.id), ("queue", &queue.index), ("direction", &direction)];
            out.sample("bytes_total", &labels, &bytes);
        }
    }
    if stats.iter().any(|d| d.queues.iter().any(|q| !q.operations.is_empty())) {
        out.operations(stats);
    }
    if stats.iter().any(|d| d.drops.is_some()) {
        out.family(
            "refused_total",
            "counter",
            "Frames that a network did not take from a device or did not give it, by reason (count).",
        );
        for (device, drops) in stats.iter().filter_map(|d| Some((d, d.drops?))) {
            for (reason, frames) in drops.by_reason() {
                out.sample("refused_total", &[("device", &device.id), ("reason", &reason)], &frames);
            }
        }
    }
    if stats.iter().any(|d| d.allowances.is_some()) {
        out.allowances(stats);
    }
    out.family("batch_size", "histogram", "Answers shown to the driver at a time (count).");
    for device in stats {
        let sizes = device.queues.iter().flat_map(|q| &q.batch_sizes);
        // Those taken and not in flight have been answered.
        let sum = device.queues.iter().map(|q| q.requests.saturating_sub(q.in_flight)).sum();
        out.histogram("batch_size", &[("device", &device.id)], sizes, 1..=15, Count, 1, &Count(sum));
    }
    out.text
}

fn queues(stats: &[DeviceStats]) -> impl Iterator<Item = (&DeviceStats, &QueueStats)> {
    stats.iter().flat_map(|d| d.queues.iter().map(move |q| (d, q)))
}

type Label<'a> = (&'a str, &'a dyn Display);

struct Text<'a> {
    prefix: &'a str,
    text: String,
}

// Writing to a String cannot fail.
impl Text<'_> {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let prefix = self.prefix;
        let _ = writeln!(self.text, "# HELP {prefix}_{name} {help}\n# TYPE {prefix}_{name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[Label<'_>], value: &dyn Display) {
        let _ = write!(self.text, "{}_{name}", self.prefix);
        for (i, (label, value)) in labels.iter().enumerate() {
            // Nothing in a label's value needs escapes: ids are of [a-z0-9-], the rest is ours.
            let _ = write!(self.text, "{}{label}=\"{value}\"", if i == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.text, "}} {value}");
    }

    /// What is counted by kind of request.
    fn operations(&mut self, stats: &[DeviceStats]) {
        for (name, help) in [
            ("requests_total", "Requests answered, by kind (count)."),
            ("request_errors_total", "Requests answered with an error, by kind (count)."),
        ] {
            self.family(name, "counter", help);
            for (device, queue) in queues(stats) {
                for op in &queue.operations {
                    let value = match name {
                        "requests_total" => op.latency_ns.iter().map(|b| b.count).sum(),
                        _ => op.errors,
                    };
                    let labels: [Label<'_>; 3] =
                        [("device", &device.id), ("queue", &queue.index), ("op", &op.name)];
                    self.sample(name, &labels, &value);
                }
            }
        }
        let name = "request_duration_seconds";
        self.family(
            name,
            "histogram",
            "From when a request was taken to when it was answered, waiting for limits left out (seconds).",
        );
        for device in stats {
            let known = device.queues.iter().map(|q| &q.operations).find(|o| !o.is_empty());
            for kind in known.into_iter().flatten() {
                let all = || device.queues.iter().flat_map(|q| &q.operations).filter(|o| o.name == kind.name);
                let sum = all().map(|o| o.latency_sum_ns).sum();
                let labels: [Label<'_>; 2] = [("device", &device.id), ("op", &kind.name)];
                let buckets = all().flat_map(|o| &o.latency_ns);
                // 1 µs to 17 s.
                self.histogram(name, &labels, buckets, 10..=34, Nanoseconds, 0, &Nanoseconds(sum));
            }
        }
    }

    /// What the limits of network devices did, under the names that guests on Nitro know, with a sentence each.
    fn allowances(&mut self, stats: &[DeviceStats]) {
        const HELP: [&str; 3] = [
            "Frames to a device dropped because of its limit of bits per second (count).",
            "Times that frames from a device waited for its limit of bits per second (count).",
            "Frames to a device dropped, and times that those from it waited, because of a limit of packets (count).",
        ];
        for (i, (name, _)) in NetAllowances::default().by_name().iter().enumerate() {
            let family = format!("{name}_total");
            self.family(&family, "counter", HELP[i]);
            for (device, allowances) in stats.iter().filter_map(|d| Some((d, d.allowances?))) {
                self.sample(&family, &[("device", &device.id)], &allowances.by_name()[i].1);
            }
        }
    }

    /// A histogram with a bucket for every power of two in `bounds`; `le` is `less` below that.
    #[allow(clippy::too_many_arguments)]
    fn histogram<'b>(
        &mut self,
        name: &str,
        labels: &[Label<'_>],
        buckets: impl Iterator<Item = &'b Bucket>,
        bounds: std::ops::RangeInclusive<u32>,
        unit: fn(u64) -> Value,
        less: u64,
        sum: &Value,
    ) {
        let mut buckets: Vec<_> = buckets.collect();
        buckets.sort_unstable_by_key(|b| b.below);
        let (mut count, mut next) = (0, 0);
        let bucket = format!("{name}_bucket");
        for log in bounds {
            while let Some(b) = buckets.get(next).filter(|b| b.below <= 1 << log) {
                count += b.count;
                next += 1;
            }
            let le = unit((1 << log) - less);
            self.sample(&bucket, &[labels, &[("le", &le)]].concat(), &count);
        }
        count += buckets[next..].iter().map(|b| b.count).sum::<u64>();
        self.sample(&bucket, &[labels, &[("le", &"+Inf")]].concat(), &count);
        self.sample(&format!("{name}_sum"), labels, sum);
        self.sample(&format!("{name}_count"), labels, &count);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proto::v1::NetDrops;

    use crate::ring::QueueCounters;

    use super::*;

    /// Series and their values; what is said of families must be said before and once.
    fn parse(text: &str) -> BTreeMap<String, f64> {
        let mut series = BTreeMap::new();
        let (mut family, mut families) = (String::new(), BTreeSet::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(families.insert(name.to_owned()), "{name} comes twice");
                assert!(help.ends_with(").") || help.ends_with("1)."), "{name} has no unit: {help}");
                family = name.to_owned();
            } else if !line.starts_with("# TYPE ") {
                let (name, value) = line.rsplit_once(' ').unwrap();
                assert!(name.starts_with(&family), "{name} is no {family}");
                assert!(series.insert(name.to_owned(), value.parse().unwrap()).is_none(), "{name} twice");
            }
        }
        series
    }

    #[test]
    fn every_number_is_there_once_with_its_unit() {
        let counters = QueueCounters::default();
        counters.requests.add(9);
        counters.bytes_in.add(4096);
        counters.throttled_ns.add(1_500_000_000);
        let read = &counters.operations(&["read", "write"])[0];
        read.latency.add(1000, 5);
        read.latency.add(3000, 3);
        read.latency.add(40_000_000_000, 1);
        counters.batches[0].add(4);
        counters.batches[2].add(1);
        let device = |id: &str, queues| DeviceStats {
            id: id.into(),
            connections: 2,
            queues,
            drops: None,
            allowances: None,
        };
        let stats = [
            device("a", vec![counters.message(0), counters.message(1)]),
            device("b", vec![QueueCounters::default().message(0)]),
        ];
        let series = parse(&encode("outboard_blk", "1.2.3", &stats, 1));
        let value = |name: &str| *series.get(name).unwrap_or_else(|| panic!("no {name} in {series:#?}"));
        assert_eq!(value(r#"outboard_blk_build_info{version="1.2.3"}"#), 1.0);
        assert_eq!(value(r#"outboard_blk_devices{state="lost"}"#), 1.0);
        assert_eq!(value(r#"outboard_blk_requests_total{device="a",queue="1",op="read"}"#), 9.0);
        assert_eq!(value(r#"outboard_blk_chains_taken_total{device="b",queue="0"}"#), 0.0);
        assert_eq!(value(r#"outboard_blk_throttled_seconds_total{device="a",queue="0"}"#), 1.5);
        assert_eq!(value(r#"outboard_blk_bytes_total{device="a",queue="0",direction="to_guest"}"#), 4096.0);
        let bucket = |le: &str| {
            value(&format!(
                r#"outboard_blk_request_duration_seconds_bucket{{device="a",op="read",le="{le}"}}"#
            ))
        };
        // Both queues together. 1000 ns are below 1024.
        assert_eq!(
            (bucket("0.000001024"), bucket("0.000004096"), bucket("17.179869184")),
            (10.0, 16.0, 16.0)
        );
        assert_eq!(bucket("+Inf"), 18.0);
        assert_eq!(value(r#"outboard_blk_request_duration_seconds_count{device="a",op="write"}"#), 0.0);
        assert_eq!(value(r#"outboard_blk_batch_size_bucket{device="a",le="1"}"#), 8.0);
        assert_eq!(value(r#"outboard_blk_batch_size_bucket{device="a",le="7"}"#), 10.0);
        assert_eq!(value(r#"outboard_blk_batch_size_sum{device="a"}"#), 18.0);
        // A card whose requests are of one kind says nothing about kinds.
        let plain = parse(&encode("outboard_net", "1", &stats[1..], 0));
        assert!(
            !plain.keys().any(|name| name.contains("request_") || name.contains("refused")),
            "{plain:#?}"
        );
        let refused = NetDrops { spoofed_mac: 3, ..Default::default() };
        let allowances = NetAllowances { pps_allowance_exceeded: 4, ..Default::default() };
        let net = DeviceStats { drops: Some(refused), allowances: Some(allowances), ..device("n", vec![]) };
        let net = parse(&encode("outboard_net", "1", &[net], 0));
        assert_eq!(net[r#"outboard_net_pps_allowance_exceeded_total{device="n"}"#], 4.0);
        assert_eq!(net[r#"outboard_net_bw_in_allowance_exceeded_total{device="n"}"#], 0.0);
        assert_eq!(net[r#"outboard_net_refused_total{device="n",reason="spoofed_mac"}"#], 3.0);
    }
}
