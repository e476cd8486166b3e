//! The targets, as data.

use super::{CARD, INLINE, QEMU, Role, Rule, SLEEPING_CARD, THREAD, Target};
use crate::results::Metric;

const QEMU_CARD: Role = &["qemu-card"];
const QEMU_DAEMON: Role = &["qemu-qsd"];
/// QEMU's storage daemon behind our hypervisor.
const DAEMON: Role = &["outboard-qsd"];
/// The card with its disk in a qcow2 file.
const QCOW2_CARD: Role = &["card-qcow2"];
/// The card as it is unless told otherwise.
const DEFAULT_CARD: Role = &["card", "card-adaptive"];
const HOST: Role = &["host"];
/// The card with security groups at all its devices.
const GROUPS: Role = &["card-groups"];
/// DPDK's testpmd between two guests of ours.
const TESTPMD: Role = &["testpmd"];

pub(super) const TARGETS: [Target; 42] = {
    use Metric::*;
    use Rule::*;
    const fn target(
        name: &'static str,
        cells: &'static str,
        system: Role,
        metric: Metric,
        rule: Rule,
    ) -> Target {
        Target { name, cells, system, metric, rule }
    }
    const NULL_1: &str = "block/null/randread-4k/qd1/q1/poll";
    const NULL_32: &str = "block/null/randread-4k/qd32/q1/poll";
    const ANY_1: &str = "block/*/randread-4k/qd1/q1/poll";
    const ANY_32: &str = "block/*/randread-4k/qd32/q1/poll";
    [
        target("Exits to user space per I/O with a card", "block/*", CARD, UserExitsPerOp, AtMost(0.0)),
        target("Card and in-process thread, QD 32", ANY_32, CARD, OpsPerS, RatioAtLeast(THREAD, 0.98)),
        target("Card and in-process thread, QD 1", ANY_1, CARD, P50Ns, MoreByAtMost(THREAD, 1000.0)),
        target("Card and in-process inline, null, QD 32", NULL_32, CARD, OpsPerS, RatioAtLeast(INLINE, 3.0)),
        target("Card and QEMU in-process, null, QD 32", NULL_32, CARD, OpsPerS, RatioAtLeast(QEMU, 3.0)),
        target("Card and QEMU in-process, null, QD 1", NULL_1, CARD, P50Ns, RatioBelow(QEMU, 1.0)),
        target(
            "Card and QEMU + storage daemon, null, QD 32",
            NULL_32,
            CARD,
            OpsPerS,
            RatioAtLeast(QEMU_DAEMON, 1.2),
        ),
        target(
            "Card and QEMU + storage daemon, null, QD 1",
            NULL_1,
            CARD,
            P50Ns,
            RatioAtMost(QEMU_DAEMON, 0.2),
        ),
        target(
            "Page cache, QD 32, and fio on the host",
            "block/buffered/randread-4k/qd32/q1/poll",
            CARD,
            OpsPerS,
            RatioAtLeast(HOST, 0.9),
        ),
        target(
            "O_DIRECT, QD 1, and fio on the host",
            "block/direct/randread-4k/qd1/q1/poll",
            CARD,
            OpsPerS,
            RatioAtLeast(HOST, 0.95),
        ),
        target(
            "O_DIRECT, QD 32, and fio on the host",
            "block/direct/randread-4k/qd32/q1/poll",
            CARD,
            OpsPerS,
            RatioAtLeast(HOST, 0.95),
        ),
        target(
            "Page cache, CPU per request of card and storage daemon",
            "block/buffered/rand*-4k/*/poll",
            DEFAULT_CARD,
            BackendNsPerOp,
            RatioAtMost(DAEMON, 1.0 / 1.5),
        ),
        target(
            "O_DIRECT, CPU per request of card and storage daemon",
            "block/direct/rand*-4k/*/poll",
            DEFAULT_CARD,
            BackendNsPerOp,
            RatioAtMost(DAEMON, 1.0 / 1.5),
        ),
        target(
            "Page cache, p50 of card and storage daemon",
            "block/buffered/rand*-4k/*/poll",
            DEFAULT_CARD,
            P50Ns,
            NeverWorse(DAEMON),
        ),
        target(
            "Page cache, p99 of card and storage daemon",
            "block/buffered/rand*-4k/*/poll",
            DEFAULT_CARD,
            P99Ns,
            NeverWorse(DAEMON),
        ),
        target(
            "Page cache, queues of one disk served alike by card and storage daemon",
            "block/buffered/rand*-4k/*/q2/poll",
            DEFAULT_CARD,
            Fairness,
            NeverWorse(DAEMON),
        ),
        target(
            "O_DIRECT, p50 of card and storage daemon",
            "block/direct/rand*-4k/*/poll",
            DEFAULT_CARD,
            P50Ns,
            NeverWorse(DAEMON),
        ),
        target(
            "O_DIRECT, p99 of card and storage daemon",
            "block/direct/rand*-4k/*/poll",
            DEFAULT_CARD,
            P99Ns,
            NeverWorse(DAEMON),
        ),
        target(
            // Not writes: those that dirty a page for the first time cost several times as much, and the one file of all the
            // other systems is dirty already when the next one writes to it.
            "qcow2 without backing file and raw, page cache",
            "block/buffered/randread-4k/*/poll",
            QCOW2_CARD,
            OpsPerS,
            RatioAtLeast(CARD, 0.9),
        ),
        target(
            "Our hypervisor and QEMU before the same card, IOPS",
            "block/*",
            DEFAULT_CARD,
            OpsPerS,
            NeverWorse(QEMU_CARD),
        ),
        target(
            "Our hypervisor and QEMU before the same card, p50",
            "block/*",
            DEFAULT_CARD,
            P50Ns,
            NeverWorse(QEMU_CARD),
        ),
        target(
            "Card CPU per request and a memcpy of 4 KiB, QD 32",
            NULL_32,
            CARD,
            BackendNsPerOp,
            AtMostMetric(CopyNs),
        ),
        target("Kicks per request, polling card, QD 32", NULL_32, CARD, KicksPerOp, Below(0.01)),
        target(
            "Guest compute lost per I/O, card and inline",
            "jitter/*",
            CARD,
            LostNsPerOp,
            RatioAtMost(INLINE, 0.1),
        ),
        target("Idle VM: wake-ups of the hypervisor", "idle/*", SLEEPING_CARD, WakeupsPerS, AtMost(0.0)),
        target("Idle VM: CPU use of the card", "idle/*", SLEEPING_CARD, BackendPercent, Below(1.0)),
        target("Start to the guest's first line", "start-up/*", CARD, FirstLineNs, AtMost(5e6)),
        target("Memory of the hypervisor per VM", "start-up/*", CARD, MemoryBytes, AtMost(3.0 * 1048576.0)),
        target(
            "64-byte packets from guest to guest, card and QEMU",
            "network/packets-64/to-guest/poll",
            DEFAULT_CARD,
            OpsPerS,
            RatioAtLeast(QEMU, 5.0),
        ),
        target(
            "1514-byte frames from guest to guest, card and QEMU",
            "network/frames-1514/to-guest/poll",
            DEFAULT_CARD,
            BytesPerS,
            RatioAtLeast(QEMU, 4.0),
        ),
        target(
            "Guest to guest in bulk, card and QEMU",
            "network/bulk*/to-guest/poll",
            DEFAULT_CARD,
            BytesPerS,
            RatioAtLeast(QEMU, 2.0),
        ),
        target(
            "Round trip between guests, card and QEMU",
            "network/round-trip/to-guest/poll",
            DEFAULT_CARD,
            P50Ns,
            RatioAtMost(QEMU, 0.5),
        ),
        target(
            "64-byte packets through security groups, card and QEMU",
            "network/packets-64/to-guest/poll",
            GROUPS,
            OpsPerS,
            RatioAtLeast(QEMU, 5.0),
        ),
        target(
            "1514-byte frames through security groups, card and QEMU",
            "network/frames-1514/to-guest/poll",
            GROUPS,
            BytesPerS,
            RatioAtLeast(QEMU, 4.0),
        ),
        target(
            "In bulk through security groups, card and QEMU",
            "network/bulk*/to-guest/poll",
            GROUPS,
            BytesPerS,
            RatioAtLeast(QEMU, 2.0),
        ),
        target(
            "Round trip through security groups, card and QEMU",
            "network/round-trip/to-guest/poll",
            GROUPS,
            P50Ns,
            RatioAtMost(QEMU, 0.5),
        ),
        target(
            // Half as many packets for its CPU time, or more.
            "CPU per 64-byte packet, card and testpmd",
            "network/packets-64/to-itself/poll",
            DEFAULT_CARD,
            BackendNsPerOp,
            RatioAtMost(TESTPMD, 2.0),
        ),
        target(
            "CPU per 64-byte packet through security groups, card and testpmd",
            "network/packets-64/to-itself/poll",
            GROUPS,
            BackendNsPerOp,
            RatioAtMost(TESTPMD, 2.0),
        ),
        target(
            "Copies in the card, bulk",
            "network/bulk*/to-guest/poll",
            DEFAULT_CARD,
            CopiesPerByte,
            AtMost(1.01),
        ),
        target(
            "Copies in the card, a small frame: to judge it and to deliver it",
            "network/round-trip/to-guest/*",
            CARD,
            CopiesPerByte,
            // A frame may have been judged and not yet delivered when it is counted.
            AtMost(2.02),
        ),
        target("Exits to user space per packet with a card", "network/*", CARD, UserExitsPerOp, AtMost(0.0)),
        target(
            "Exits to user space per I/O, many VMs on a card",
            "scale/*",
            SLEEPING_CARD,
            UserExitsPerOp,
            AtMost(0.0),
        ),
    ]
};
