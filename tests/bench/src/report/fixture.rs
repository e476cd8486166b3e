//! Results as a run leaves them, made up: of plausible size and scatter, the same each time.

use std::collections::BTreeMap;

use crate::results::{Cell, FORMAT, Machine, Metric, Results, Sample, Series, Settings, System};

/// Name, what it is, version, cost of a request relative to the card's, time of one request alone in nanoseconds.
const SYSTEMS: [(&str, &str, &str, f64, f64); 9] = [
    ("card-poll", "our hypervisor, card in its own process, polling", "", 1.0, 2_300.0),
    ("card-adaptive", "our hypervisor, card that polls while there is work", "", 1.03, 2_500.0),
    ("card-irq", "our hypervisor, card that sleeps until it is notified", "", 1.25, 16_000.0),
    ("thread", "the same engine on an I/O thread of the VMM", "", 0.99, 2_400.0),
    ("inline", "the same engine in the vCPU thread, on the exit", "", 3.9, 41_000.0),
    ("qemu", "QEMU, virtio-blk with iothread and io_uring", "7.2.22", 2.7, 2_800.0),
    ("qemu-card", "QEMU as front-end of our card", "7.2.22", 1.01, 2_600.0),
    ("outboard-qsd", "our hypervisor and qemu-storage-daemon", "7.2.22", 1.24, 17_500.0),
    ("qemu-qsd", "QEMU and qemu-storage-daemon", "7.2.22", 1.26, 18_000.0),
];

struct Noise(u64);

impl Noise {
    /// Around 1, within 3 %.
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        0.97 + 0.06 * (self.0 >> 40) as f64 / (1u64 << 24) as f64
    }
}

/// A run of so many rounds.
pub(crate) fn results(rounds: u32) -> Results {
    let mut noise = Noise(3);
    let mut cells = Vec::new();
    for (backing, floor_ns, request_ns) in
        [("null", 0.0, 210.0), ("buffered", 2_100.0, 1_600.0), ("direct", 42_000.0, 13_000.0)]
    {
        for qd in [1u32, 8, 32, 128] {
            cells.push(block(&mut noise, rounds, backing, qd, floor_ns, request_ns));
        }
    }
    for (traffic, per_op) in [("packets-64", 420.0), ("bulk-tso", 9_000.0), ("round-trip", 5_200.0)] {
        cells.push(network(&mut noise, rounds, traffic, per_op));
    }
    for rate in [2_000, 10_000] {
        cells.push(jitter(&mut noise, rounds, rate));
    }
    cells.extend([1, 2, 4, 8, 16, 64].map(|vms| scale(&mut noise, rounds, vms)));
    cells.push(start_up(&mut noise, rounds));
    cells.push(idle(&mut noise, rounds));
    Results {
        format: FORMAT,
        version: "0.1.0".to_owned(),
        started: "2026-11-25T10:12:44Z".to_owned(),
        seconds: 4_312.0,
        machine: Machine {
            cpu: "AMD EPYC 9R14".to_owned(),
            cpus: 2,
            memory_bytes: 24 << 30,
            kernel: "6.12.43".to_owned(),
            kvm: "kvm_pvm".to_owned(),
            file_system: "ext4".to_owned(),
            remarks: vec![
                "2 CPUs: vCPU and card have no third to leave to the host".to_owned(),
                "page-table based KVM: an exit to user space costs about 40 us, ten times that of VT-x"
                    .to_owned(),
            ],
        },
        settings: Settings {
            rounds,
            warmup_s: 0.5,
            measure_s: 2.0,
            pinned: true,
            command: "offload-bench run --profile standard --rounds 5".to_owned(),
        },
        systems: SYSTEMS
            .iter()
            .map(|&(name, description, version, ..)| System {
                name: name.to_owned(),
                description: description.to_owned(),
                version: version.to_owned(),
            })
            .collect(),
        cells,
    }
}

type Values = Vec<(Metric, f64)>;

fn cell(
    id: String,
    suite: &str,
    parameters: &[(&str, String)],
    headline: &[Metric],
    rounds: u32,
    mut of: impl FnMut(&str, f64, f64) -> Option<(Values, Vec<(u64, u64)>)>,
) -> Cell {
    let systems = SYSTEMS
        .iter()
        .filter_map(|&(name, _, _, cost, alone)| {
            let samples = (0..rounds)
                .map(|round| {
                    let (values, latency) = of(name, cost, alone)?;
                    Some(Sample { round, values: values.into_iter().collect(), latency })
                })
                .collect::<Option<Vec<_>>>()?;
            Some(Series { system: name.to_owned(), samples, note: String::new() })
        })
        .collect();
    let parameters: BTreeMap<_, _> = parameters.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
    Cell { id, suite: suite.to_owned(), parameters, headline: headline.to_vec(), systems }
}

/// Classes about a twentieth wide around `p50`, with a tail.
fn distribution(noise: &mut Noise, p50: f64) -> Vec<(u64, u64)> {
    let mut classes = Vec::new();
    for step in -12i32..=120 {
        let z = f64::from(step) / if step < 0 { 5.0 } else { 11.0 };
        let requests =
            2e6 * (-0.5 * z * z).exp() * noise.next() + 30.0 * (-f64::from(step.max(0)) / 30.0).exp();
        if requests >= 1.0 {
            classes.push(((p50 * 1.05f64.powi(step)) as u64, requests as u64));
        }
    }
    classes
}

fn block(noise: &mut Noise, rounds: u32, backing: &str, qd: u32, floor_ns: f64, request_ns: f64) -> Cell {
    let mut headline = vec![
        Metric::OpsPerS,
        Metric::P50Ns,
        Metric::P99Ns,
        Metric::BackendNsPerOp,
        Metric::VcpuNsPerOp,
        Metric::UserExitsPerOp,
        Metric::KicksPerOp,
    ];
    if qd == 1 {
        headline.swap(0, 1);
    }
    let parameters = [
        ("backing", backing.to_owned()),
        ("op", "randread".to_owned()),
        ("block", "4K".to_owned()),
        ("qd", qd.to_string()),
        ("queues", "1".to_owned()),
        ("guest", "poll".to_owned()),
    ];
    let id = format!("block/{backing}/randread-4k/qd{qd}/q1/poll");
    cell(id, "block", &parameters, &headline, rounds, |name, cost, alone| {
        let alone = alone + floor_ns * noise.next();
        let busy = (request_ns * if backing == "null" { cost } else { 0.9 + cost / 10.0 })
            .max(alone / f64::from(qd));
        let ops = 1e9 / busy * noise.next();
        let p50 = f64::from(qd) * 1e9 / ops;
        let is_card = name.starts_with("card") || name == "qemu-card";
        let exits = if name == "inline" { 1.0 / f64::from(qd.min(4)) } else { 0.0 };
        let kicks = match name {
            "card-poll" | "qemu-card" => 0.0004,
            "inline" => exits,
            _ => 0.3 / f64::from(qd),
        };
        let values = vec![
            (Metric::OpsPerS, ops),
            (Metric::P50Ns, p50),
            (Metric::P90Ns, p50 * 1.1),
            (Metric::P99Ns, p50 * 1.4 * noise.next()),
            (Metric::P999Ns, p50 * 2.0 * noise.next()),
            (Metric::MaxNs, p50 * 40.0 * noise.next()),
            (Metric::BackendNsPerOp, if is_card { busy * 0.4 } else { busy * 0.9 }),
            (Metric::VcpuNsPerOp, busy),
            (Metric::UserExitsPerOp, exits),
            (Metric::KicksPerOp, kicks),
            (Metric::CopyNs, 96.0 * noise.next()),
        ];
        Some((values, distribution(noise, p50)))
    })
}

fn network(noise: &mut Noise, rounds: u32, traffic: &str, per_op: f64) -> Cell {
    let headline = match traffic {
        "round-trip" => vec![Metric::P50Ns, Metric::OpsPerS, Metric::P99Ns, Metric::BackendNsPerOp],
        "packets-64" => vec![Metric::OpsPerS, Metric::BackendNsPerOp, Metric::VcpuNsPerOp],
        _ => vec![Metric::BytesPerS, Metric::OpsPerS, Metric::BackendNsPerOp],
    };
    let parameters =
        [("traffic", traffic.to_owned()), ("peer", "guest".to_owned()), ("guest", "poll".to_owned())];
    let id = format!("network/{traffic}/to-guest/poll");
    cell(id, "network", &parameters, &headline, rounds, |name, cost, _| {
        if !["card-poll", "card-adaptive", "card-irq", "thread", "qemu", "qemu-card"].contains(&name) {
            return None;
        }
        let took = per_op * cost * noise.next();
        let values = vec![
            (Metric::OpsPerS, 1e9 / took),
            (Metric::BytesPerS, 1e9 / took * 61_440.0),
            (Metric::P50Ns, took),
            (Metric::P99Ns, took * 1.7),
            (Metric::BackendNsPerOp, took * 0.6),
            (Metric::VcpuNsPerOp, took),
            (Metric::UserExitsPerOp, 0.0),
        ];
        let latency = if traffic == "round-trip" { distribution(noise, took) } else { Vec::new() };
        Some((values, latency))
    })
}

fn jitter(noise: &mut Noise, rounds: u32, rate: u32) -> Cell {
    let parameters =
        [("backing", "null".to_owned()), ("rate", rate.to_string()), ("guest", "poll".to_owned())];
    let headline = [Metric::LostPercent, Metric::LostNsPerOp, Metric::MaxGapNs, Metric::OpsPerS];
    let id = format!("jitter/null/{rate}-per-s/poll");
    cell(id, "jitter", &parameters, &headline, rounds, |name, _, _| {
        let lost_ns = match name {
            "inline" => 42_000.0,
            "qemu" | "qemu-qsd" | "outboard-qsd" | "thread" | "card-irq" => 4_200.0,
            _ => 260.0,
        } * noise.next();
        let values = vec![
            (Metric::LostPercent, lost_ns * f64::from(rate) / 1e7),
            (Metric::LostNsPerOp, lost_ns),
            (Metric::MaxGapNs, lost_ns * 3.0 + 9_000.0 * noise.next()),
            (Metric::OpsPerS, f64::from(rate)),
        ];
        Some((values, Vec::new()))
    })
}

fn scale(noise: &mut Noise, rounds: u32, vms: u32) -> Cell {
    let parameters = [("vms", vms.to_string()), ("backing", "null".to_owned()), ("qd", "8".to_owned())];
    let headline =
        [Metric::OpsPerS, Metric::Fairness, Metric::P99Ns, Metric::BackendPercent, Metric::MemoryBytes];
    let id = format!("scale/null/randread-4k/vms{vms}");
    cell(id, "scale", &parameters, &headline, rounds, |name, cost, _| {
        if !["card-adaptive", "thread", "inline", "qemu"].contains(&name) {
            return None;
        }
        let n = f64::from(vms);
        let ops = 1.1e6 * n / (n + 0.6) / cost * noise.next();
        let is_card = name == "card-adaptive";
        let values = vec![
            (Metric::OpsPerS, if is_card { ops } else { ops / n.powf(0.12) }),
            (Metric::Fairness, (1.0 - 0.004 * n.log2() * cost * noise.next()).min(1.0)),
            (Metric::P99Ns, n * 9_000.0 * cost * noise.next()),
            (Metric::BackendPercent, (100.0 * n / (n + 0.4) * noise.next()).min(100.0)),
            (Metric::MemoryBytes, (if name == "qemu" { 31.0 } else { 2.3 }) * 1048576.0 * noise.next()),
        ];
        Some((values, Vec::new()))
    })
}

fn start_up(noise: &mut Noise, rounds: u32) -> Cell {
    let headline = [Metric::FirstLineNs, Metric::FirstIoNs, Metric::MemoryBytes];
    cell("start-up/boot".to_owned(), "start-up", &[], &headline, rounds, |name, _, _| {
        let is_qemu = name.starts_with("qemu");
        let (line, mib) = if is_qemu { (112e6, 29.0) } else { (4.1e6, 2.2) };
        let line = line * noise.next();
        let values = vec![
            (Metric::FirstLineNs, line),
            (Metric::FirstIoNs, line + 1.3e6 * noise.next()),
            (Metric::MemoryBytes, mib * 1048576.0 * noise.next()),
        ];
        Some((values, Vec::new()))
    })
}

fn idle(noise: &mut Noise, rounds: u32) -> Cell {
    let headline = [Metric::WakeupsPerS, Metric::BackendPercent];
    cell("idle/disk-attached".to_owned(), "start-up", &[], &headline, rounds, |name, _, _| {
        let wakeups = if name.starts_with("qemu") { 11.0 * noise.next() } else { 0.0 };
        let percent = if name == "card-poll" { 100.0 } else { 0.2 * noise.next() };
        Some((vec![(Metric::WakeupsPerS, wakeups), (Metric::BackendPercent, percent)], Vec::new()))
    })
}
