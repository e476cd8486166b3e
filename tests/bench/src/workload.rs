//! What is measured: workloads, what the bench guest is told to do for each, and which of them a run takes.

use std::collections::BTreeMap;

use clap::ValueEnum;

use crate::results::Metric;

/// What is behind a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Backing {
    /// Nothing: requests are completed at once and no payload is touched.
    Null,
    /// A file, through the page cache, which holds all of it.
    Buffered,
    /// The same file by O_DIRECT.
    Direct,
}

/// What the guest does with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    RandomRead,
    RandomWrite,
    Read,
    Write,
}

/// How the guest learns of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GuestMode {
    /// It looks at the used rings.
    Poll,
    /// It sleeps until it is interrupted.
    Irq,
}

/// A load on one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) backing: Backing,
    pub(crate) op: Op,
    pub(crate) block_bytes: u32,
    /// Requests in flight per queue.
    pub(crate) depth: u16,
    pub(crate) queues: u16,
    pub(crate) guest: GuestMode,
}

/// What goes over a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Traffic {
    /// UDP in frames of 64 bytes, as many as go.
    Packets,
    /// UDP in frames of 1514 bytes.
    Frames,
    /// TCP segments of 60 KiB, cut by whoever is last.
    Bulk,
    /// One request at a time, echoed.
    RoundTrip,
}

/// Where it goes from the first guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    /// A second guest.
    Guest,
    /// A second interface of the same guest: then what is between them has a processor of its own.
    Itself,
    /// The host, by a TAP.
    Host,
}

/// One measurement's kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Workload {
    Block(Block),
    Network {
        traffic: Traffic,
        peer: Peer,
        guest: GuestMode,
    },
    /// The guest computes while its disk is read at a fixed rate.
    Jitter {
        backing: Backing,
        /// Requests per second.
        rate: u32,
        guest: GuestMode,
    },
    /// Many guests, each with a disk, on one back-end.
    Scale {
        guests: u16,
    },
    /// Process start to first line and first request.
    StartUp,
    /// A guest that does nothing, with a disk attached.
    Idle,
}

impl Backing {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Buffered => "buffered",
            Self::Direct => "direct",
        }
    }
}

impl Op {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RandomRead => "randread",
            Self::RandomWrite => "randwrite",
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

impl GuestMode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Irq => "irq",
        }
    }
}

impl Peer {
    fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Itself => "itself",
            Self::Host => "host",
        }
    }
}

impl Traffic {
    fn name(self) -> &'static str {
        match self {
            Self::Packets => "packets-64",
            Self::Frames => "frames-1514",
            Self::Bulk => "bulk-tso",
            Self::RoundTrip => "round-trip",
        }
    }
}

/// "4K", "512".
fn size(bytes: u32) -> String {
    if bytes.is_multiple_of(1024) { format!("{}K", bytes / 1024) } else { bytes.to_string() }
}

impl Workload {
    /// The cell's id: a path, of which any part can be given to `--only`.
    pub(crate) fn id(&self) -> String {
        match self {
            Self::Block(Block { backing, op, block_bytes, depth, queues, guest }) => format!(
                "block/{}/{}-{}/qd{depth}/q{queues}/{}",
                backing.name(),
                op.name(),
                size(*block_bytes).to_lowercase(),
                guest.name()
            ),
            Self::Network { traffic, peer, guest } => {
                format!("network/{}/to-{}/{}", traffic.name(), peer.name(), guest.name())
            }
            Self::Jitter { backing, rate, guest } => {
                format!("jitter/{}/{rate}-per-s/{}", backing.name(), guest.name())
            }
            Self::Scale { guests } => format!("scale/null/randread-4k/vms{guests}"),
            Self::StartUp => "start-up/boot".to_owned(),
            Self::Idle => "idle/disk-attached".to_owned(),
        }
    }

    /// The suite it belongs to.
    pub(crate) fn suite(&self) -> Suite {
        match self {
            Self::Block(_) => Suite::Block,
            Self::Network { .. } => Suite::Network,
            Self::Jitter { .. } => Suite::Jitter,
            Self::Scale { .. } => Suite::Scale,
            Self::StartUp | Self::Idle => Suite::StartUp,
        }
    }

    /// What varies, by name.
    pub(crate) fn parameters(&self) -> BTreeMap<String, String> {
        let pairs: Vec<(&str, String)> = match self {
            Self::Block(b) => vec![
                ("backing", b.backing.name().into()),
                ("op", b.op.name().into()),
                ("block", size(b.block_bytes)),
                ("qd", b.depth.to_string()),
                ("queues", b.queues.to_string()),
                ("guest", b.guest.name().into()),
            ],
            Self::Network { traffic, peer, guest } => vec![
                ("traffic", traffic.name().into()),
                ("peer", peer.name().into()),
                ("guest", guest.name().into()),
            ],
            Self::Jitter { backing, rate, guest } => vec![
                ("backing", backing.name().into()),
                ("rate", rate.to_string()),
                ("guest", guest.name().into()),
            ],
            Self::Scale { guests } => vec![
                ("vms", guests.to_string()),
                ("backing", "null".into()),
                ("op", "randread".into()),
                ("block", "4K".into()),
                ("qd", SCALE_DEPTH.to_string()),
                ("guest", "irq".into()),
            ],
            Self::StartUp | Self::Idle => vec![],
        };
        pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
    }

    /// What the cell is about, most important first.
    pub(crate) fn headline(&self) -> Vec<Metric> {
        use Metric::*;
        match self {
            Self::Block(b) if b.depth == 1 => {
                vec![P50Ns, OpsPerS, P99Ns, BackendNsPerOp, VcpuNsPerOp, UserExitsPerOp, KicksPerOp]
            }
            Self::Block(b) if b.block_bytes >= 65536 => {
                vec![BytesPerS, P50Ns, P99Ns, BackendNsPerOp, VcpuNsPerOp, UserExitsPerOp, KicksPerOp]
            }
            Self::Block(b) if b.queues > 1 => {
                vec![OpsPerS, P50Ns, P99Ns, Fairness, BackendNsPerOp, VcpuNsPerOp, UserExitsPerOp, KicksPerOp]
            }
            Self::Block(_) => {
                vec![OpsPerS, P50Ns, P99Ns, BackendNsPerOp, VcpuNsPerOp, UserExitsPerOp, KicksPerOp]
            }
            Self::Network { traffic: Traffic::RoundTrip, .. } => {
                vec![P50Ns, OpsPerS, P99Ns, BackendNsPerOp, UserExitsPerOp, CopiesPerByte]
            }
            Self::Network { traffic: Traffic::Packets, .. } => {
                vec![OpsPerS, BackendNsPerOp, VcpuNsPerOp, UserExitsPerOp, CopiesPerByte]
            }
            Self::Network { .. } => {
                vec![BytesPerS, OpsPerS, BackendNsPerOp, VcpuNsPerOp, UserExitsPerOp, CopiesPerByte]
            }
            Self::Jitter { .. } => vec![LostNsPerOp, LostPercent, MaxGapNs, BackendNsPerOp],
            Self::Scale { .. } => vec![OpsPerS, Fairness, P99Ns, BackendNsPerOp, BackendPercent, MemoryBytes],
            Self::StartUp => vec![FirstLineNs, FirstIoNs, MemoryBytes],
            Self::Idle => vec![WakeupsPerS, BackendPercent],
        }
    }
}

/// Requests in flight of each guest of the suite `scale`.
pub(crate) const SCALE_DEPTH: u16 = 8;

/// A group of workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Suite {
    /// One guest, one disk.
    Block,
    /// Two guests in a network, and a guest and the host.
    Network,
    /// What computing guests lose to I/O.
    Jitter,
    /// Many VMs on one back-end.
    Scale,
    /// Start-up, memory, an idle VM.
    StartUp,
}

impl Suite {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Network => "network",
            Self::Jitter => "jitter",
            Self::Scale => "scale",
            Self::StartUp => "start-up",
        }
    }
}

/// How much of everything there is to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// A handful of cells: whether all is well.
    Quick,
    /// What tells the systems apart.
    Full,
    /// Every combination: a night.
    Exhaustive,
}

/// The workloads of a profile, in the order in which they are measured.
pub(crate) fn workloads(profile: Profile) -> Vec<Workload> {
    let mut all = block(profile);
    all.extend(network(profile));
    all.extend(jitter(profile));
    let guests: &[u16] = match profile {
        Profile::Quick => &[4],
        Profile::Full | Profile::Exhaustive => &[1, 2, 4, 8, 16, 64],
    };
    all.extend(guests.iter().map(|&guests| Workload::Scale { guests }));
    all.extend([Workload::StartUp, Workload::Idle]);
    all
}

fn block(profile: Profile) -> Vec<Workload> {
    use {Backing::*, GuestMode::*, Op::*};
    let cell = |backing, op, block_bytes, depth, queues, guest| {
        Workload::Block(Block { backing, op, block_bytes, depth, queues, guest })
    };
    let small = |backing, op, depth| cell(backing, op, 4096, depth, 1, Poll);
    match profile {
        Profile::Quick => vec![
            small(Null, RandomRead, 1),
            small(Null, RandomRead, 32),
            small(Buffered, RandomRead, 1),
            small(Buffered, RandomRead, 32),
        ],
        Profile::Full => {
            let mut cells = Vec::new();
            cells.extend([1, 8, 32, 128].map(|depth| small(Null, RandomRead, depth)));
            cells.push(cell(Null, RandomRead, 4096, 32, 2, Poll));
            cells.extend([1, 32].map(|depth| cell(Null, RandomRead, 4096, depth, 1, Irq)));
            for backing in [Buffered, Direct] {
                for op in [RandomRead, RandomWrite] {
                    for queues in [1, 2] {
                        cells.extend([1, 32].map(|depth| cell(backing, op, 4096, depth, queues, Poll)));
                    }
                }
                cells.push(cell(backing, RandomRead, 4096, 32, 1, Irq));
                cells.extend([Read, Write].map(|op| cell(backing, op, 128 << 10, 8, 1, Poll)));
            }
            cells
        }
        Profile::Exhaustive => {
            let mut cells = Vec::new();
            for backing in [Null, Buffered, Direct] {
                for (op, bytes) in
                    [(RandomRead, 4096), (RandomWrite, 4096), (Read, 128 << 10), (Write, 128 << 10)]
                {
                    for depth in [1, 8, 32, 128] {
                        for queues in [1, 2] {
                            cells.extend(
                                [Poll, Irq].map(|guest| cell(backing, op, bytes, depth, queues, guest)),
                            );
                        }
                    }
                }
            }
            cells
        }
    }
}

fn network(profile: Profile) -> Vec<Workload> {
    use Traffic::*;
    let cells = |peer, guest| {
        [Packets, Frames, Bulk, RoundTrip].map(|traffic| Workload::Network { traffic, peer, guest })
    };
    let to_itself = |traffic| Workload::Network { traffic, peer: Peer::Itself, guest: GuestMode::Poll };
    match profile {
        Profile::Quick => {
            vec![Workload::Network { traffic: RoundTrip, peer: Peer::Guest, guest: GuestMode::Poll }]
        }
        Profile::Full => {
            let mut all = cells(Peer::Guest, GuestMode::Poll).to_vec();
            all.extend([Packets, Frames].map(to_itself));
            all.extend(cells(Peer::Host, GuestMode::Poll));
            all.push(Workload::Network { traffic: RoundTrip, peer: Peer::Guest, guest: GuestMode::Irq });
            all
        }
        Profile::Exhaustive => [Peer::Guest, Peer::Host]
            .into_iter()
            .flat_map(|peer| [GuestMode::Poll, GuestMode::Irq].map(|guest| (peer, guest)))
            .flat_map(|(peer, guest)| cells(peer, guest))
            .chain([Packets, Frames].map(to_itself))
            .collect(),
    }
}

fn jitter(profile: Profile) -> Vec<Workload> {
    let cell = |backing, rate| Workload::Jitter { backing, rate, guest: GuestMode::Poll };
    match profile {
        Profile::Quick => vec![cell(Backing::Null, 10_000)],
        Profile::Full => vec![
            cell(Backing::Null, 2_000),
            cell(Backing::Null, 10_000),
            cell(Backing::Buffered, 10_000),
            Workload::Jitter { backing: Backing::Null, rate: 10_000, guest: GuestMode::Irq },
        ],
        Profile::Exhaustive => [Backing::Null, Backing::Buffered, Backing::Direct]
            .into_iter()
            .flat_map(|backing| [2_000, 10_000].map(|rate| (backing, rate)))
            .flat_map(|(backing, rate)| {
                [GuestMode::Poll, GuestMode::Irq].map(|guest| Workload::Jitter { backing, rate, guest })
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ids_are_unique_and_begin_with_their_suite() {
        for profile in [Profile::Quick, Profile::Full, Profile::Exhaustive] {
            let all = workloads(profile);
            let ids: BTreeSet<_> = all.iter().map(Workload::id).collect();
            assert_eq!(ids.len(), all.len());
            for workload in &all {
                let (id, suite) = (workload.id(), workload.suite().name());
                assert!(id.starts_with(suite) || *workload == Workload::Idle, "{id} in {suite}");
                assert!(!workload.headline().is_empty());
            }
        }
    }

    #[test]
    fn the_full_profile_is_part_of_the_exhaustive_one() {
        let all: BTreeSet<_> = workloads(Profile::Exhaustive).iter().map(Workload::id).collect();
        for workload in workloads(Profile::Full) {
            assert!(all.contains(&workload.id()), "{} is not in the exhaustive profile", workload.id());
        }
    }
}
