//! A disk's limits as a guest meets them, and neighbours on one card.

use std::time::{Duration, Instant};

use e2e::card::Card;
use e2e::vm::{Vm, config, slot};
use e2e::{SOON, image, temp_dir, wait_until};
use proto::v1::{BlockDeviceSpec, DeviceLimits};

fn throttled(card: &Card, device: &str) -> u64 {
    card.queue_stats(device).iter().map(|q| q.throttled).sum()
}

/// What is served in a time is what the bucket has in that time: both are measured in the same run.
#[test]
fn a_guest_gets_what_the_limit_says_and_a_change_at_once() {
    let dir = temp_dir();
    let card = Card::start("offload-blk", dir.path());
    let device = card.block("disk0", &image(dir.path(), "disk.img", 64 << 20), 2);
    let (rate, burst, queues) = (500, 500, 2);
    let limits =
        DeviceLimits { operations_per_second: rate, operations_burst: burst, ..DeviceLimits::default() };
    card.set_limits("disk0", limits);
    let job = "job=blk-verify bytes=16M queues=2 qd=8 verify=mixed secs=600 timeout=600";
    let mut vm = Vm::boot(dir.path(), config("vm", job, vec![slot("disk0", &device)]));
    vm.reports.wait("boot", SOON);
    // The burst is used up.
    wait_until("the limit to be met", SOON, || throttled(&card, "disk0") > 10);
    let (before, first) = (Instant::now(), card.requests("disk0"));
    let after_first = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    let (before_second, second) = (Instant::now(), card.requests("disk0"));
    let after = Instant::now();
    let served = second - first;
    let tokens = |time: Duration| rate as f64 * time.as_secs_f64();
    let most = tokens(after - before) + burst as f64 + f64::from(queues);
    assert!(served as f64 <= most + 1.0, "{served} of {most}");
    // The bucket keeps a second's worth for a guest or a thread that does not run for a moment, so nothing is lost; what
    // was there at the first look and is not at the second is at most what the queues took at once.
    let least = tokens(before_second - after_first) - burst as f64 / 2.0;
    assert!(served as f64 >= least, "{served} of {least}");
    println!("{served} requests in {:?}: {} to {} allowed", after - before, least.round(), most.round());

    // Four times what two seconds had, at once.
    card.set_limits("disk0", DeviceLimits::default());
    let since = Instant::now();
    wait_until("an unlimited disk to be quick", SOON, || card.requests("disk0") > second + 4000);
    assert!(since.elapsed() < Duration::from_secs(8), "no quicker than it was: {:?}", since.elapsed());
    let waits = throttled(&card, "disk0");
    wait_until("more requests", SOON, || card.requests("disk0") > second + 8000);
    assert_eq!(throttled(&card, "disk0"), waits);
    vm.process().kill9();
}

/// What a small reader notices of a flood on the same file system, both around the page cache: printed for people, as a time
/// says something only on a host with nothing else to do and a processor for each thread. The bounds themselves are
/// counted in the tests of offload-blk.
#[test]
fn a_small_reader_beside_a_flood_gets_on() {
    let dir = temp_dir();
    let card = Card::start("offload-blk", dir.path());
    let disk = |id: &str, bytes: usize| {
        let path = dir.path().join(id);
        // With blocks: holes would be read without the storage.
        std::fs::write(&path, vec![7; bytes])
            .and_then(|()| std::fs::File::open(&path)?.sync_all())
            .expect("image");
        let path = path.to_str().expect("path").to_owned();
        card.create_block(id, BlockDeviceSpec { path, queues: 1, direct: true, ..Default::default() })
    };
    let (Ok(victim), Ok(flood)) = (disk("victim", 32 << 20), disk("flood", 64 << 20)) else {
        return println!("no direct I/O here");
    };
    let reads = |name: &str| {
        let job = "job=blk-bench rw=randread bs=4096 qd=1 queues=1 mode=irq secs=4 warmup=1 timeout=60";
        let before = card.requests("victim");
        let vm = Vm::boot(dir.path(), config(name, job, vec![slot("disk0", &victim)]));
        let result = vm.reports.finish(Duration::from_secs(120)).swap_remove(0);
        println!(
            "{name}: {} reads, p50 {} ns, p99 {} ns",
            card.requests("victim") - before,
            result["p50_ns"],
            result["p99_ns"]
        );
        card.requests("victim") - before
    };
    let alone = reads("alone");
    for (kind, qd) in [("write", 128), ("read", 128)] {
        let job = format!("job=blk-bench rw={kind} bs=131072 qd={qd} queues=1 mode=irq secs=600 timeout=600");
        let mut vm = Vm::boot(dir.path(), config(kind, &job, vec![slot("disk0", &flood)]));
        let before = card.requests("flood");
        wait_until("the flood", SOON, || card.requests("flood") > before + 200);
        let (before, since) = (card.requests("flood"), Instant::now());
        let beside = reads(&format!("beside-a-{kind}"));
        let rate = (card.requests("flood") - before) as f64 / 8.0 / since.elapsed().as_secs_f64();
        println!("    the flood: {rate:.0} MiB/s");
        assert!(rate > 0.0 && beside > alone / 100, "{beside} of {alone} reads, {rate}");
        vm.process().kill9();
    }
}

/// One VM with all it can have in flight, and one with a request at a time: both get on.
#[test]
fn a_flood_does_not_starve_a_neighbour() {
    let dir = temp_dir();
    let card = Card::start("offload-blk", dir.path());
    let flooded = card.block("flood", &image(dir.path(), "flood.img", 64 << 20), 2);
    let victim = card.block("victim", &image(dir.path(), "victim.img", 16 << 20), 1);
    let flood = "job=blk-verify bytes=64M queues=2 qd=64 verify=mixed secs=600 timeout=600";
    let mut flood = Vm::boot(dir.path(), config("flood", flood, vec![slot("disk0", &flooded)]));
    wait_until("the flood", SOON, || card.requests("flood") > 1000);
    let job = "job=blk-verify bytes=2M qd=1 verify=mixed secs=2 timeout=120";
    let before = card.requests("flood");
    let vm = Vm::boot(dir.path(), config("victim", job, vec![slot("disk0", &victim)]));
    let results = vm.reports.finish(Duration::from_secs(180));
    assert_eq!((&results[0]["errors"], &results[0]["mismatches"]), (&0.into(), &0.into()));
    assert!(card.requests("victim") > 1000, "a write and a read of each 4 KiB at least");
    assert!(card.requests("flood") > before + 1000, "nor does the neighbour starve the flood");
    flood.process().kill9();
}
