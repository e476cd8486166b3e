//! A VM whose disk lives in the storage card: data, exits, file descriptors, and the card's death.

use std::time::Duration;

use e2e::card::Card;
use e2e::vm::{Vm, config, slot};
use e2e::{SOON, binary, image, temp_dir, wait_until};
use proto::v1::{BlockDeviceSpec, ErrorReason, ImageFormat};

const JOB: &str = "job=blk-verify bytes=64M queues=2 qd=32 timeout=60";

#[test]
fn patterned_reads_and_writes_through_two_queues_verify() {
    let dir = temp_dir();
    let card = Card::start("offload-blk", dir.path());
    let disk = image(dir.path(), "disk.img", 64 << 20);
    let device = card.block("disk0", &disk, 2);
    let mut vm = Vm::boot(dir.path(), config("vm", JOB, vec![slot("disk0", &device)]));
    let results = vm.reports.finish(Duration::from_secs(120));
    assert_eq!(results[0]["bytes"], 2 * (64 << 20), "written once, read once: {results:#?}");
    assert_eq!((&results[0]["errors"], &results[0]["mismatches"]), (&0.into(), &0.into()));
    let queues = card.queue_stats("disk0");
    assert!(
        queues.len() == 2 && queues.iter().all(|q| q.requests > 1000),
        "both queues carry the load: {queues:?}"
    );
    assert_eq!(vm.stats().data_path_exits, 0);

    // The data is really in the file: every sector was written.
    let content = std::fs::read(&disk).expect("read image");
    let untouched = content.chunks(4096).filter(|block| block.iter().all(|&b| b == 0)).count();
    assert_eq!(untouched, 0, "blocks that never reached the file");
}

/// Invariant 1: while I/O flows, nothing at all brings a vCPU back to the hypervisor.
fn no_userspace_exits(mode: &str) {
    let dir = temp_dir();
    let card = Card::start("offload-blk", dir.path());
    let device = card.block("disk0", &image(dir.path(), "disk.img", 64 << 20), 2);
    let job = format!("job=blk-verify bytes=16M queues=2 qd=8 verify=mixed secs=3 mode={mode}");
    let mut vm = Vm::boot(dir.path(), config("vm", &job, vec![slot("disk0", &device)]));
    vm.reports.wait("io_begin", SOON);
    // The guest's own last serial writes have left the vCPU when requests are flowing.
    let start = card.requests("disk0");
    wait_until("requests to flow", SOON, || card.requests("disk0") > start + 100);
    let before = vm.stats();
    let requests_before = card.requests("disk0");
    std::thread::sleep(Duration::from_millis(1500));
    let requests = card.requests("disk0") - requests_before;
    let after = vm.stats();
    assert!(vm.reports.all("io_end").is_empty(), "both samples lie in the I/O phase");
    assert!(requests > 500, "I/O flowed between the samples: {requests}");
    let exits = after.userspace_exits_total - before.userspace_exits_total;
    assert_eq!(exits, 0, "{requests} requests, {exits} exits: {before:#?} {after:#?}");
    vm.reports.finish(Duration::from_secs(60));
}

#[test]
fn polling_guest_causes_no_userspace_exits() {
    no_userspace_exits("poll");
}

#[test]
fn interrupt_driven_guest_causes_no_userspace_exits() {
    no_userspace_exits("irq");
}

#[test]
fn the_hypervisor_holds_no_disk() {
    let dir = temp_dir();
    let card = Card::start("offload-blk", dir.path());
    let device = card.block("disk0", &image(dir.path(), "disk.img", 1 << 20), 1);
    let mut vm = Vm::boot(dir.path(), config("vm", "job=idle", vec![slot("disk0", &device)]));
    vm.reports.wait("boot", SOON);
    let files = vm.open_files();
    // What it boots from stays open: a guest that reboots finds the same kernel.
    let kernel = binary("bench-guest").to_string_lossy().into_owned();
    for file in &files {
        let allowed = ["/dev/kvm", "/dev/null", "/memfd:", "anon_inode:", "socket:", "pipe:"];
        let log = file.ends_with(".log");
        assert!(
            log || *file == kernel || allowed.iter().any(|a| file.starts_with(a)),
            "the hypervisor has {file} open: {files:?}"
        );
    }
    vm.process().kill9();
}

#[test]
fn a_dead_card_does_not_lock_the_vm_out() {
    let dir = temp_dir();
    let mut card = Card::start("offload-blk", dir.path());
    let device = card.block("disk0", &image(dir.path(), "disk.img", 64 << 20), 1);
    let job = "job=blk-verify bytes=16M qd=4 verify=mixed secs=600 timeout=600";
    let mut vm = Vm::boot(dir.path(), config("vm", job, vec![slot("disk0", &device)]));
    vm.reports.wait("io_begin", SOON);
    card.kill9();
    vm.wait_event("link lost", SOON, |e| {
        matches!(e, proto::v1::hypervisor_event::Event::Link(l) if l.state() == proto::v1::LinkState::Lost)
            .then_some(())
    });
    vm.shutdown(proto::v1::ShutdownMode::Immediate).expect("shut down with a dead card");
    assert!(vm.process().wait(Duration::from_secs(2)).success());
}

#[test]
fn a_hung_card_does_not_lock_the_vm_out() {
    let dir = temp_dir();
    let mut card = Card::start("offload-blk", dir.path());
    let device = card.block("disk0", &image(dir.path(), "disk.img", 64 << 20), 1);
    let job = "job=blk-verify bytes=16M qd=4 verify=mixed secs=600 timeout=600";
    let mut vm = Vm::boot(dir.path(), config("vm", job, vec![slot("disk0", &device)]));
    vm.reports.wait("io_begin", SOON);
    card.process().signal(nix::sys::signal::Signal::SIGSTOP);
    vm.shutdown(proto::v1::ShutdownMode::Immediate).expect("shut down with a hung card");
    assert!(vm.process().wait(Duration::from_secs(5)).success());
}

/// Invariant 9: whatever state the card is in, the VM obeys at once.
#[test]
fn a_vm_on_a_dead_or_hung_card_is_paused_reset_and_ended() {
    for signal in [nix::sys::signal::Signal::SIGKILL, nix::sys::signal::Signal::SIGSTOP] {
        let dir = temp_dir();
        let mut card = Card::start("offload-blk", dir.path());
        let device = card.block("disk0", &image(dir.path(), "disk.img", 64 << 20), 1);
        let job = "job=blk-verify bytes=16M qd=4 verify=mixed secs=600 timeout=600";
        let mut vm = Vm::boot(dir.path(), config("vm", job, vec![slot("disk0", &device)]));
        vm.reports.wait("io_begin", SOON);
        card.process().signal(signal);
        let started = std::time::Instant::now();
        vm.pause().expect("pause");
        vm.resume().expect("resume");
        vm.reset().expect("reset");
        vm.reports.wait_nth("boot", 2, SOON);
        vm.pause().expect("pause after the reset");
        vm.shutdown(proto::v1::ShutdownMode::Immediate).expect("shut down");
        assert!(vm.process().wait(Duration::from_secs(5)).success(), "{signal}");
        let took = started.elapsed();
        assert!(took < Duration::from_secs(10), "{signal}: {took:?}");
    }
}

/// Around the page cache, the card holds on to the guest's pages, but not longer than its queues run: a reset takes all pages
/// away, and what the guest reads after it is not in those that it had before.
#[test]
fn registered_memory_outlives_no_reset() {
    let dir = temp_dir();
    let card = Card::start("offload-blk", dir.path());
    let path = image(dir.path(), "disk.img", 64 << 20);
    let spec = BlockDeviceSpec {
        path: path.to_str().expect("path").to_owned(),
        queues: 2,
        direct: true,
        ..Default::default()
    };
    let device = card.create_block("disk0", spec).expect("a disk around the page cache");
    let job = "job=blk-verify bytes=16M queues=2 qd=32 verify=mixed secs=2 timeout=60";
    let mut vm = Vm::boot(dir.path(), config("vm", job, vec![slot("disk0", &device)]));
    let registered = || card.queue_stats("disk0").iter().map(|q| q.bytes_registered).sum::<u64>();
    for boot in 1..=4 {
        vm.reports.wait_nth("boot", boot, SOON);
        wait_until("memory to be registered", SOON, || registered() > 0);
        if boot < 4 {
            vm.reset().expect("reset");
        }
    }
    let results = vm.reports.finish(Duration::from_secs(120));
    assert_eq!((&results[0]["errors"], &results[0]["mismatches"]), (&0.into(), &0.into()), "{results:#?}");
    drop(vm);
    wait_until("it to be forgotten", SOON, || registered() == 0);
}

#[test]
fn a_guest_that_breaks_the_rules_hurts_only_its_own_device() {
    let dir = temp_dir();
    let card = Card::start("offload-blk", dir.path());
    let bad = card.block("bad", &image(dir.path(), "bad.img", 1 << 20), 1);
    let good = card.block("good", &image(dir.path(), "good.img", 16 << 20), 1);
    let other = Vm::boot(
        dir.path(),
        config(
            "other",
            "job=blk-verify bytes=16M qd=8 verify=mixed secs=8 timeout=30",
            vec![slot("disk0", &good)],
        ),
    );
    let vm = Vm::boot(dir.path(), config("vm", "job=blk-malformed timeout=2", vec![slot("disk0", &bad)]));
    vm.reports.wait("done", Duration::from_secs(120));
    let cases = vm.reports.all("case");
    assert!(!cases.is_empty());
    for case in &cases {
        // Each is answered, or breaks this device alone; none hangs.
        let answered = case["status"] != 255 || case["used_len"] != -1;
        assert!(answered || case["needs_reset"] == true, "neither answered nor broken: {case}");
    }
    // What is well-formed but cannot be done has its own status (VirtIO 1.3 section 5.2.6): 1 IOERR, 2 UNSUPP.
    for (name, status) in [
        ("past-end", 1),
        ("crossing-end", 1),
        ("write-crossing-end", 1),
        ("sector-wraps", 1),
        ("unknown-type", 2),
    ] {
        let case = cases.iter().find(|c| c["case"] == name).expect("the case ran");
        assert_eq!((&case["status"], &case["alive"]), (&status.into(), &true.into()), "{case}");
    }
    other.reports.finish(Duration::from_secs(60));
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let dir = temp_dir();
    let card = Card::start("offload-blk", dir.path());
    let disk = image(dir.path(), "disk.img", 8 << 20);
    let device = card.block("disk0", &disk, 1);
    let vm = Vm::boot(
        dir.path(),
        config("writer", "job=blk-verify bytes=8M qd=8 seed=7", vec![slot("d", &device)]),
    );
    vm.reports.finish(Duration::from_secs(60));
    drop(vm);
    let before = std::fs::read(&disk).expect("read image");
    let spec = BlockDeviceSpec {
        path: disk.to_str().expect("path").to_owned(),
        read_only: true,
        ..Default::default()
    };
    drop(card);
    let ro = temp_dir();
    let card = Card::start("offload-blk", ro.path());
    let device = card.create_block("disk0", spec).expect("read-only device");
    let job = "job=blk-verify verify=read bytes=8M qd=8 seed=7 job=blk-malformed cases=write";
    let vm = Vm::boot(ro.path(), config("reader", job, vec![slot("d", &device)]));
    vm.reports.finish(Duration::from_secs(60));
    assert_eq!(vm.reports.all("device")[0]["readonly"], true);
    assert_eq!(vm.reports.all("case")[0]["status"], 1, "a write to a read-only disk is an I/O error");
    assert!(std::fs::read(&disk).expect("read image") == before, "a read-only image changed");
}

#[test]
fn a_socket_nobody_listens_on_is_named() {
    let dir = temp_dir();
    let mut vm = Vm::start(dir.path(), "vm");
    let device = proto::v1::Device {
        socket_path: dir.path().join("nobody.sock").to_str().expect("path").to_owned(),
        virtio_device_id: 2,
        queues: 1,
        ..Default::default()
    };
    let error =
        vm.configure(config("vm", "job=idle", vec![slot("disk0", &device)])).expect_err("nobody listens");
    let error = proto::error::Error::from(error);
    assert_eq!(error.reason(), ErrorReason::DeviceUnreachable);
    assert!(error.message().contains("nobody.sock"), "{error}");
    // The process is as it was: a good configuration is taken.
    vm.configure(config("vm", "job=idle", vec![])).expect("configure after an error");
    vm.run();
    vm.reports.wait("boot", SOON);
}

/// The guest is interrupted, sees the new size and uses it; so does the card's successor.
#[test]
fn a_disk_grows_under_a_running_guest() {
    let dir = temp_dir();
    let mut card = Card::start("offload-blk", dir.path());
    let image = image(dir.path(), "disk.img", 8 << 20);
    let device = card.block("disk0", &image, 1);
    let jobs = "job=blk-watch mode=irq secs=30 job=blk-verify bytes=16M qd=8 bs=64K";
    let vm = Vm::boot(dir.path(), config("vm", jobs, vec![slot("disk0", &device)]));
    vm.reports.wait("io_begin", SOON);
    let reason = |e: tonic::Status| proto::error::Error::from(e).reason();
    assert_eq!(reason(card.resize("disk0", 4 << 20).unwrap_err()), ErrorReason::InvalidField);
    assert_eq!(reason(card.resize("none", 0).unwrap_err()), ErrorReason::DeviceNotFound);
    assert_eq!(card.resize("disk0", 16 << 20).unwrap(), 16 << 20);
    let results = vm.reports.finish(Duration::from_secs(120));
    assert_eq!(results[0]["changed"], true, "{results:#?}");
    assert_eq!((&results[0]["before"], &results[0]["after"]), (&(8 << 11).into(), &(16 << 11).into()));
    assert_eq!((&results[1]["errors"], &results[1]["mismatches"]), (&0.into(), &0.into()));
    assert_eq!(std::fs::metadata(&image).expect("image").len(), 16 << 20);
    card.kill9();
    card.restart();
    // By hand, and then told.
    std::fs::File::options().write(true).open(&image).expect("image").set_len(20 << 20).expect("longer");
    assert_eq!(card.resize("disk0", 0).unwrap(), 20 << 20);
}

/// Zeros where zeros were asked for, and data everywhere else, on raw and on qcow2 over a backing file; requests that a
/// killed card had begun are done by its successor.
#[test]
fn erased_blocks_are_zeros_and_the_others_keep_what_they_have() {
    let dir = temp_dir();
    let base = image(dir.path(), "base.img", 32 << 20);
    std::fs::write(&base, vec![0x5a; 32 << 20]).expect("base image");
    let layer = dir.path().join("disk.qcow2");
    let mut qemu_img = std::process::Command::new("qemu-img");
    let made = qemu_img.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.img"]).arg(&layer);
    assert!(made.status().expect("qemu-img (qemu-utils)").success());
    for (name, path, format) in
        [("raw", base.clone(), ImageFormat::Raw), ("qcow2", layer.clone(), ImageFormat::Qcow2)]
    {
        let runtime = dir.path().join(name);
        let mut card = Card::start_with("offload-blk", &runtime, &[]);
        let path = path.to_str().expect("path").to_owned();
        let block = BlockDeviceSpec { path, queues: 2, format: format.into(), ..Default::default() };
        let device = card.create_block("disk0", block).expect("create disk");
        let job = "job=blk-verify bytes=24M bs=16K queues=2 qd=16 verify=mixed erase=6 secs=4 timeout=60";
        let vm = Vm::boot(&runtime, config(name, job, vec![slot("disk0", &device)]));
        vm.reports.wait("io_begin", SOON);
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(900));
            card.kill9();
            card.restart();
        }
        let results = vm.reports.finish(Duration::from_secs(120));
        assert_eq!(
            (&results[0]["errors"], &results[0]["mismatches"]),
            (&0.into(), &0.into()),
            "{results:#?}"
        );
        assert!(results[0]["erased"].as_u64().is_some_and(|n| n > 100), "{results:#?}");
        drop(vm);
        card.delete("disk0").expect("delete disk");
    }
    let check = std::process::Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&layer).output();
    let check = check.expect("qemu-img");
    assert!(check.status.success(), "{check:?}");
}
