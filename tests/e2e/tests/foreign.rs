//! Invariant 2: our cards under a foreign front-end, our slots on a foreign back-end.

use std::time::Duration;

use e2e::card::Card;
use e2e::qemu::{Qemu, StorageDaemon};
use e2e::vm::{Vm, config};
use e2e::{SOON, enter_new_network_namespace, image, temp_dir, wait_until};

#[test]
fn qemu_drives_the_storage_card() {
    let dir = temp_dir();
    let card = Card::start("offload-blk", dir.path());
    let device = card.block("disk0", &image(dir.path(), "disk.img", 64 << 20), 2);
    let qemu = Qemu::boot(dir.path(), "end=triple job=blk-verify bytes=64M queues=2 qd=32", &[&device]);
    let results = qemu.reports.finish(Duration::from_secs(120));
    assert_eq!(results[0]["bytes"], 2 * (64 << 20), "{results:#?}");
    let queues = card.queue_stats("disk0");
    assert!(
        queues.len() == 2 && queues.iter().all(|q| q.requests > 1000),
        "both queues carry the load: {queues:?}"
    );
}

#[test]
fn qemu_drives_the_network_card() {
    exchange_with_qemu(1);
}

/// The control queue is QEMU's own, which enables the pairs.
#[test]
fn qemu_drives_several_queue_pairs_of_the_network_card() {
    exchange_with_qemu(2);
}

fn exchange_with_qemu(pairs: u32) {
    enter_new_network_namespace();
    let dir = temp_dir();
    let card = Card::start("offload-net", dir.path());
    card.network("lan", "", "");
    let (first, second) = (card.nic_with_pairs("a", "lan", 1, pairs), card.nic("b", "lan", 2));
    let job = |own: u8, peer: u8| {
        let queues = if own == 1 { pairs } else { 1 };
        format!(
            "end=triple job=net-exchange ip=10.9.0.{own} peer=10.9.0.{peer} count=20000 size=1400 timeout=60 \
             queues={queues} flows=64"
        )
    };
    // One VM of QEMU's and one of ours, in the same network.
    let qemu = Qemu::boot(dir.path(), &job(1, 2), &[&first]);
    let ours = Vm::boot(dir.path(), config("b", &job(2, 1), vec![e2e::vm::slot("nic0", &second)]));
    for reports in [&qemu.reports, &ours.reports] {
        let results = reports.finish(Duration::from_secs(120));
        assert_eq!((&results[0]["corrupt"], &results[0]["rx"]), (&0.into(), &20_000.into()), "{results:#?}");
    }
    let received = card.received_by_pair("a");
    assert!(received.len() == pairs as usize && received.iter().all(|n| *n > 1_000_000), "{received:?}");
}

#[test]
fn qemu_storage_daemon_serves_a_slot() {
    let dir = temp_dir();
    let disk = image(dir.path(), "disk.img", 64 << 20);
    let daemon = StorageDaemon::start(dir.path(), &disk, 2);
    let job = "job=blk-verify bytes=64M queues=2 qd=32";
    let mut vm = Vm::boot(dir.path(), config("vm", job, vec![daemon.slot()]));
    let results = vm.reports.finish(Duration::from_secs(120));
    assert_eq!(results[0]["bytes"], 2 * (64 << 20), "{results:#?}");
    assert_eq!(vm.stats().data_path_exits, 0);
    assert_eq!(vm.reports.all("device")[0]["num_queues"], 2);
}

#[test]
fn a_foreign_back_end_may_come_back() {
    let dir = temp_dir();
    let disk = image(dir.path(), "disk.img", 16 << 20);
    let mut daemon = StorageDaemon::start(dir.path(), &disk, 1);
    // Between the two jobs nothing is in flight: this back-end has no inflight area to find it in.
    let job =
        "job=blk-verify bytes=16M qd=8 seed=3 job=blk-verify verify=read bytes=16M qd=8 seed=3 wait=serial";
    let mut vm = Vm::boot(dir.path(), config("vm", job, vec![daemon.slot()]));
    vm.reports.wait("waiting", Duration::from_secs(60));
    daemon.kill9_and_restart();
    wait_until("the link to be active again", SOON, || {
        let slot = &vm.info().slots[0];
        slot.reconnects >= 1 && slot.link() == proto::v1::LinkState::Active
    });
    vm.type_in(b"\n");
    vm.reports.finish(Duration::from_secs(60));
}
