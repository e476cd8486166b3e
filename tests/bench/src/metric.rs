//! What a reader must know of each [`Metric`]: its name, its unit, which way is better, how a figure is written.

use crate::results::Metric;

/// Which of two figures is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    Higher,
    Lower,
}

impl Better {
    /// In words.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Higher => "higher is better",
            Self::Lower => "lower is better",
        }
    }

    /// Whether `a` is better than `b`.
    pub(crate) fn than(self, a: f64, b: f64) -> bool {
        match self {
            Self::Higher => a > b,
            Self::Lower => a < b,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    PerSecond,
    BytesPerSecond,
    Bytes,
    Nanoseconds,
    PerOperation,
    Percent,
    Index,
}

impl Metric {
    /// Every metric, for what must hold of all.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 26] = [
        Self::OpsPerS,
        Self::BytesPerS,
        Self::P50Ns,
        Self::P90Ns,
        Self::P99Ns,
        Self::P999Ns,
        Self::MaxNs,
        Self::UserExitsPerOp,
        Self::ExitsPerOp,
        Self::KicksPerOp,
        Self::IrqsPerOp,
        Self::VcpuNsPerOp,
        Self::BackendNsPerOp,
        Self::OtherNsPerOp,
        Self::CyclesPerOp,
        Self::LostPercent,
        Self::MaxGapNs,
        Self::LostNsPerOp,
        Self::Fairness,
        Self::BackendPercent,
        Self::WakeupsPerS,
        Self::FirstLineNs,
        Self::FirstIoNs,
        Self::MemoryBytes,
        Self::CopiesPerByte,
        Self::CopyNs,
    ];

    fn about(self) -> (&'static str, &'static str, Unit) {
        use Unit::{Bytes, BytesPerSecond, Index, Nanoseconds, PerOperation, PerSecond, Percent};
        match self {
            Self::OpsPerS => ("operations per second", "ops/s", PerSecond),
            Self::BytesPerS => ("throughput", "bytes/s", BytesPerSecond),
            Self::P50Ns => ("median latency", "p50", Nanoseconds),
            Self::P90Ns => ("90th percentile of latency", "p90", Nanoseconds),
            Self::P99Ns => ("99th percentile of latency", "p99", Nanoseconds),
            Self::P999Ns => ("99.9th percentile of latency", "p99.9", Nanoseconds),
            Self::MaxNs => ("longest latency", "max", Nanoseconds),
            Self::UserExitsPerOp => ("exits to user space per operation", "user exits", PerOperation),
            Self::ExitsPerOp => ("exits per operation", "exits", PerOperation),
            Self::KicksPerOp => ("notifications per operation", "kicks", PerOperation),
            Self::IrqsPerOp => ("interrupts per operation", "irqs", PerOperation),
            Self::VcpuNsPerOp => ("vCPU time per operation", "vCPU", Nanoseconds),
            Self::BackendNsPerOp => ("back-end CPU time per operation", "back-end", Nanoseconds),
            Self::OtherNsPerOp => ("other CPU time per operation", "other", Nanoseconds),
            Self::CyclesPerOp => ("cycles per operation", "cycles", PerOperation),
            Self::LostPercent => ("guest CPU time lost to I/O", "lost", Percent),
            Self::MaxGapNs => ("longest stand-still of the guest", "max gap", Nanoseconds),
            Self::LostNsPerOp => ("guest CPU time lost per operation", "lost/op", Nanoseconds),
            Self::Fairness => ("fairness between guests or queues (Jain's index)", "fairness", Index),
            Self::BackendPercent => ("CPU use of the back-end", "back-end", Percent),
            Self::WakeupsPerS => ("wake-ups of the hypervisor per second", "wake-ups/s", PerSecond),
            Self::FirstLineNs => ("process start to first line", "first line", Nanoseconds),
            Self::FirstIoNs => ("process start to first completed I/O", "first I/O", Nanoseconds),
            Self::MemoryBytes => ("memory beyond guest RAM", "memory", Bytes),
            Self::CopiesPerByte => ("copies of each byte by the card", "copies", PerOperation),
            Self::CopyNs => ("memcpy of 4 KiB", "memcpy 4K", Nanoseconds),
        }
    }

    /// Name in full: "median latency".
    pub(crate) fn label(self) -> &'static str {
        self.about().0
    }

    /// Name as the heading of a column: "p50".
    pub(crate) fn short(self) -> &'static str {
        self.about().1
    }

    /// Which way is better.
    pub(crate) fn better(self) -> Better {
        match self {
            Self::OpsPerS | Self::BytesPerS | Self::Fairness => Better::Higher,
            _ => Better::Lower,
        }
    }

    /// A figure as people write it: "1.64 M", "2.8 us", "0.00", "12 %". What is not zero is never written as zero.
    pub(crate) fn format(self, value: f64) -> String {
        match self.about().2 {
            Unit::PerSecond | Unit::PerOperation if value > 0.0 && value < 0.005 => "<0.01".to_owned(),
            Unit::PerSecond if value < 9.995 => digits(value),
            Unit::PerSecond => scaled(value, 1e3, &["", " k", " M", " G"]),
            Unit::BytesPerSecond => scaled(value, 1e3, &[" B/s", " kB/s", " MB/s", " GB/s", " TB/s"]),
            Unit::Bytes => scaled(value, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB"]),
            Unit::Nanoseconds => nanoseconds(value),
            Unit::PerOperation => digits(value),
            Unit::Percent if value > 0.0 && value < 0.05 => "<0.1 %".to_owned(),
            Unit::Percent if value < 9.95 => format!("{value:.1} %"),
            Unit::Percent => format!("{value:.0} %"),
            Unit::Index => format!("{value:.3}"),
        }
    }

    /// Whether ticks of an axis should be powers of two times a unit.
    pub(crate) fn is_binary(self) -> bool {
        self.about().2 == Unit::Bytes
    }
}

/// Three significant digits; two behind the point at most.
fn digits(value: f64) -> String {
    match value.abs() {
        v if v < 9.995 => format!("{value:.2}"),
        v if v < 99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // Before rounding could make it four digits.
    while value.abs() >= step - 0.5 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let number = if unit == 0 { format!("{value:.0}") } else { digits(value) };
    format!("{number}{}", units[unit])
}

/// Latencies are known to about a twentieth: one digit behind the point of a microsecond is all there is.
fn nanoseconds(value: f64) -> String {
    match value.abs() {
        v if v > 0.0 && v < 0.05 => "<0.1 ns".to_owned(),
        v if v > 0.0 && v < 9.95 => format!("{value:.1} ns"),
        v if v < 999.5 => format!("{value:.0} ns"),
        v if v < 99_950.0 => format!("{:.1} us", value / 1e3),
        v if v < 999_500.0 => format!("{:.0} us", value / 1e3),
        v if v < 999_500_000.0 => format!("{} ms", digits(value / 1e6)),
        _ => format!("{} s", digits(value / 1e9)),
    }
}

/// A ratio: "0.98x", "12.3x".
pub(crate) fn times(ratio: f64) -> String {
    if ratio > 0.0 && ratio < 0.005 { "<0.01x".to_owned() } else { format!("{}x", digits(ratio)) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn figures_are_written_as_people_write_them() {
        for (metric, value, text) in [
            (Metric::OpsPerS, 1_640_000.0, "1.64 M"),
            (Metric::OpsPerS, 324_400.0, "324 k"),
            (Metric::OpsPerS, 999_900.0, "1.00 M"),
            (Metric::OpsPerS, 999.0, "999"),
            (Metric::WakeupsPerS, 0.0, "0.00"),
            (Metric::BytesPerS, 6.71e9, "6.71 GB/s"),
            (Metric::P50Ns, 2_800.0, "2.8 us"),
            (Metric::P50Ns, 18_000.0, "18.0 us"),
            (Metric::P50Ns, 850.0, "850 ns"),
            (Metric::P99Ns, 99_960.0, "100 us"),
            (Metric::FirstLineNs, 4_970_000.0, "4.97 ms"),
            (Metric::FirstIoNs, 1.2e9, "1.20 s"),
            (Metric::UserExitsPerOp, 0.0, "0.00"),
            (Metric::UserExitsPerOp, 0.0004, "<0.01"),
            (Metric::KicksPerOp, 1.0, "1.00"),
            (Metric::LostPercent, 12.3, "12 %"),
            (Metric::LostPercent, 1.26, "1.3 %"),
            (Metric::MemoryBytes, 2.5 * 1024.0 * 1024.0, "2.50 MiB"),
            (Metric::MemoryBytes, 1023.8, "1.00 KiB"),
            (Metric::Fairness, 0.9987, "0.999"),
        ] {
            assert_eq!(metric.format(value), text, "{metric:?} {value}");
        }
        assert_eq!(
            [times(0.98), times(12.34), times(0.0001), times(0.0)],
            ["0.98x", "12.3x", "<0.01x", "0.00x"]
        );
    }

    #[test]
    fn names_are_unique_in_full() {
        assert_eq!(Metric::ALL.iter().map(|m| m.label()).collect::<BTreeSet<_>>().len(), Metric::ALL.len());
    }

    proptest! {
        /// Nobody is misled by rounding or by a wrong unit.
        #[test]
        fn a_figure_reads_back_as_what_it_was(value in 10.0..1e12f64, metric in proptest::sample::select(&Metric::ALL)) {
            let text = metric.format(value);
            let (number, unit) = text.split_once(' ').unwrap_or((&text, ""));
            let factor = match unit.trim_end_matches("/s") {
                "k" | "kB" | "us" => 1e3,
                "M" | "MB" | "ms" => 1e6,
                "G" | "GB" | "s" => 1e9,
                "TB" => 1e12,
                "KiB" => 1024.0,
                "MiB" => 1024f64.powi(2),
                "GiB" => 1024f64.powi(3),
                "" | "%" | "ns" | "B" => 1.0,
                unknown => panic!("{unknown} in {text}"),
            };
            let read: f64 = number.parse().unwrap();
            prop_assert!((read * factor - value).abs() <= value * 0.051, "{text} of {value}");
        }

        #[test]
        fn what_is_not_zero_is_not_written_as_zero(value in 1e-3..1.0f64, metric in proptest::sample::select(&Metric::ALL)) {
            // Half a byte and a thousandth of an index are nothing that can be measured.
            prop_assume!(!metric.is_binary() && !matches!(metric, Metric::BytesPerS | Metric::Fairness));
            let text = metric.format(value);
            prop_assert!(text.chars().any(|c| ('1'..='9').contains(&c)), "{text} of {value}");
        }
    }
}
