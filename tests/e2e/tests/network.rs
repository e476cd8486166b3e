//! VMs whose network lives in the network card: frames between VMs and with the host, and the card's death.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use e2e::card::Card;
use e2e::pauses::{APART, Pauses, wanted};
use e2e::vm::{Vm, config, slot};
use e2e::{SOON, enter_new_network_namespace, temp_dir, wait_until};
use proto::v1::NetworkSpec;

#[test]
fn two_vms_exchange_frames_without_userspace_exits() {
    enter_new_network_namespace();
    let dir = temp_dir();
    let card = Card::start("offload-net", dir.path());
    card.network("lan", "", "");
    let job = |own: u8, peer: u8| {
        format!(
            "job=net-exchange ip=10.9.0.{own} peer=10.9.0.{peer} count=200000 size=1400 window=64 mode=irq timeout=30"
        )
    };
    let first = card.nic("a", "lan", 1);
    let second = card.nic("b", "lan", 2);
    let mut a = Vm::boot(dir.path(), config("a", &job(1, 2), vec![slot("nic0", &first)]));
    let b = Vm::boot(dir.path(), config("b", &job(2, 1), vec![slot("nic0", &second)]));
    a.reports.wait("io_begin", SOON);
    let start = card.requests("a");
    wait_until("frames to flow", SOON, || card.requests("a") > start + 1000);
    let before = a.stats();
    let frames_before = card.requests("a");
    std::thread::sleep(Duration::from_millis(500));
    let frames = card.requests("a") - frames_before;
    let after = a.stats();
    assert!(a.reports.all("io_end").is_empty(), "both samples lie in the I/O phase");
    assert!(frames > 500, "frames flowed between the samples: {frames}");
    assert_eq!(after.userspace_exits_total, before.userspace_exits_total, "{before:#?} {after:#?}");
    for vm in [&a, &b] {
        let results = vm.reports.finish(Duration::from_secs(120));
        assert_eq!((&results[0]["corrupt"], &results[0]["rx"]), (&0.into(), &200_000.into()), "{results:#?}");
    }
}

#[test]
fn a_vm_and_the_host_exchange_frames_through_the_tap() {
    enter_new_network_namespace();
    let dir = temp_dir();
    let card = Card::start("offload-net", dir.path());
    card.network("lan", "obtest0", "10.9.0.254/24");
    let device = card.nic("a", "lan", 1);
    let job = "job=net-echo ip=10.9.0.1 count=100 secs=60 job=net-pingpong ip=10.9.0.1 peer=10.9.0.254 port=9000 count=200";
    let mut vm = Vm::boot(dir.path(), config("a", job, vec![slot("nic0", &device)]));
    vm.reports.wait("io_begin", SOON);

    // The host asks, the guest answers.
    let host = UdpSocket::bind("10.9.0.254:0").expect("bind on the TAP's address");
    host.set_read_timeout(Some(Duration::from_millis(500))).expect("socket time-out");
    let (mut answered, mut exits) = (0u32, Vec::new());
    let mut buffer = [0; 2048];
    wait_until("100 answers of the guest", SOON, || {
        let payload = vec![answered as u8; 1000];
        let _ = host.send_to(&payload, "10.9.0.1:7");
        if let Ok((n, _)) = host.recv_from(&mut buffer) {
            assert_eq!(&buffer[..n], &payload[..], "the echo came back changed");
            answered += 1;
            // Both well within the I/O phase, which ends with the hundredth.
            if [20, 80].contains(&answered) {
                exits.push(vm.stats().userspace_exits_total);
            }
        }
        answered == 100
    });
    assert_eq!(exits[0], exits[1], "frames of the TAP brought the vCPU back to the hypervisor");

    // The guest asks, the host answers.
    let echo = UdpSocket::bind("10.9.0.254:9000").expect("bind on the TAP's address");
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((n, peer)) = echo.recv_from(&mut buffer) {
            let _ = echo.send_to(&buffer[..n], peer);
        }
    });
    let results = vm.reports.finish(Duration::from_secs(60));
    assert_eq!((&results[1]["corrupt"], &results[1]["rx"]), (&0.into(), &200.into()), "{results:#?}");

    // The TAP is the card's, and the card's alone.
    let files = vm.open_files();
    assert!(!files.iter().any(|f| f.contains("/dev/net/tun")), "the hypervisor has a TAP open: {files:?}");
}

/// Two VMs exchange frames, and their card goes and comes back: a few times, or OUTBOARD_RESTARTS times. Prints the longest pause.
fn an_exchange_survives(what: &str, go: impl Fn(&mut Card)) {
    let restarts = wanted(5);
    enter_new_network_namespace();
    let dir = temp_dir();
    let mut card = Card::start("offload-net", dir.path());
    card.network("lan", "obtest1", "10.9.0.254/24");
    let count = 20_000 * restarts;
    let job = |own: u8, peer: u8| {
        format!(
            "job=net-exchange ip=10.9.0.{own} peer=10.9.0.{peer} count={count} size=1400 mode=irq timeout=60"
        )
    };
    let first = card.nic("a", "lan", 1);
    let second = card.nic("b", "lan", 2);
    let a = Vm::boot(dir.path(), config("a", &job(1, 2), vec![slot("nic0", &first)]));
    let b = Vm::boot(dir.path(), config("b", &job(2, 1), vec![slot("nic0", &second)]));
    a.reports.wait("io_begin", SOON);
    b.reports.wait("io_begin", SOON);
    for n in 0..restarts {
        wait_until("frames after the start", SOON, || card.try_requests("a").is_some_and(|n| n > 500));
        assert!(a.reports.all("io_end").is_empty(), "the exchange ended before restart {n}");
        go(&mut card);
        card.start_again();
    }
    for vm in [&a, &b] {
        let results = vm.reports.finish(Duration::from_secs(180));
        assert_eq!(
            (&results[0]["corrupt"], &results[0]["needs_reset"]),
            (&0.into(), &false.into()),
            "{results:#?}"
        );
        println!(
            "{restarts} {what}; longest pause {} us, {} frames sent again",
            results[0]["max_gap_us"], results[0]["retransmits"]
        );
    }
}

#[test]
fn kill9_of_the_card_does_not_break_an_exchange() {
    an_exchange_survives("kills", Card::kill9);
}

#[test]
fn a_planned_restart_of_the_card_does_not_break_an_exchange() {
    an_exchange_survives("planned restarts", Card::stop);
}

/// One VM sends to another all the time, with a card that goes and comes back. Prints for how long nothing arrived.
fn a_stream_goes_on(what: &str, go: impl Fn(&mut Card)) {
    let (restarts, mut pauses) = (wanted(5), Pauses::default());
    let dir = temp_dir();
    let mut card = Card::start("offload-net", dir.path());
    card.network("lan", "", "");
    let secs = (restarts / 8).clamp(4, 120);
    let (first, second) = (card.nic("a", "lan", 1), card.nic("b", "lan", 2));
    let receive = format!("job=net-recv ip=10.9.0.2 mode=irq gaps=0.001 secs={secs} timeout=60");
    let send = format!(
        "job=net-send ip=10.9.0.1 peer=10.9.0.2 rate=5000 count=100000000 secs={secs} mode=irq timeout=60"
    );
    let b = Vm::boot(dir.path(), config("b", &receive, vec![slot("nic0", &second)]));
    b.reports.wait("io_begin", SOON);
    let begin = Instant::now();
    let a = Vm::boot(dir.path(), config("a", &send, vec![slot("nic0", &first)]));
    let ended = || !b.reports.all("io_end").is_empty();
    let mut instants = Vec::new();
    while instants.len() < restarts && !ended() {
        wait_until("frames after the start", SOON, || {
            card.try_requests("a").is_some_and(|n| n > 100) || ended()
        });
        // The backlog of a busy host arrives at once.
        let last = instants.last().map_or(begin, |last| begin + *last);
        std::thread::sleep(APART.saturating_sub(last.elapsed()));
        instants.push(begin.elapsed());
        go(&mut card);
        card.start_again();
    }
    let results = [&a, &b].map(|vm| vm.reports.finish(Duration::from_secs(180)));
    let result = &results[1][0];
    assert_eq!((&result["corrupt"], &result["needs_reset"]), (&0.into(), &false.into()), "{result:#?}");
    pauses.add(&instants, result);
    assert!(!pauses.alone.is_empty(), "no pause was seen: {result:#?}");
    pauses.print(&format!("{what}; {} of {} frames lost", result["lost"], results[0][0]["tx"]));
}

#[test]
fn a_stream_goes_on_after_kill9_of_the_card() {
    a_stream_goes_on("kills", Card::kill9);
}

#[test]
fn a_stream_goes_on_after_a_planned_restart_of_the_card() {
    a_stream_goes_on("planned restarts", Card::stop);
}

/// Two VMs with two queue pairs each; the card is killed in between, and knows afterwards that both pairs are used.
#[test]
fn both_queue_pairs_carry_frames_also_after_a_kill9_of_the_card() {
    enter_new_network_namespace();
    let dir = temp_dir();
    let mut card = Card::start("offload-net", dir.path());
    card.network("lan", "", "");
    let job = |own: u8, peer: u8| {
        format!(
            "job=net-exchange ip=10.9.0.{own} peer=10.9.0.{peer} count=100000 size=1400 queues=2 flows=64 mode=irq \
             timeout=60"
        )
    };
    let first = card.nic_with_pairs("a", "lan", 1, 2);
    let second = card.nic_with_pairs("b", "lan", 2, 2);
    let a = Vm::boot(dir.path(), config("a", &job(1, 2), vec![slot("nic0", &first)]));
    let b = Vm::boot(dir.path(), config("b", &job(2, 1), vec![slot("nic0", &second)]));
    for vm in [&a, &b] {
        vm.reports.wait("io_begin", SOON);
        let device = &vm.reports.all("device")[0];
        assert_eq!((&device["queues"], &device["max_pairs"]), (&2.into(), &2.into()));
    }
    let both = |card: &Card| ["a", "b"].iter().all(|d| card.received_by_pair(d).iter().all(|n| *n > 100_000));
    for n in 0..3 {
        wait_until("frames in both receive queues of both VMs", SOON, || both(&card));
        assert!(a.reports.all("io_end").is_empty(), "the exchange ended before kill {n}");
        card.kill9();
        card.restart();
    }
    wait_until("frames in both receive queues after the last kill", SOON, || both(&card));
    for vm in [&a, &b] {
        let results = vm.reports.finish(Duration::from_secs(180));
        let result = &results[0];
        assert_eq!(
            (&result["corrupt"], &result["rx"], &result["needs_reset"]),
            (&0.into(), &100_000.into(), &false.into()),
            "{results:#?}"
        );
        // A link that had gone down and up would have told the guest by an interrupt.
        assert_eq!(result["config_irqs"], 0);
    }
}

#[test]
fn networks_are_apart() {
    enter_new_network_namespace();
    let dir = temp_dir();
    let card = Card::start("offload-net", dir.path());
    card.network("red", "", "");
    card.network("blue", "", "");
    let (red, blue) = (card.nic("a", "red", 1), card.nic("b", "blue", 2));
    let send = "job=net-send ip=10.9.0.1 peer=10.9.0.2 peer_mac=02:00:00:00:0b:02 count=1000 wait=serial";
    let recv = "job=net-recv ip=10.9.0.2 count=1 min=0 timeout=3 secs=3";
    let b = Vm::boot(dir.path(), config("b", recv, vec![slot("nic0", &blue)]));
    let a = Vm::boot(dir.path(), config("a", send, vec![slot("nic0", &red)]));
    b.reports.wait("io_begin", SOON);
    a.reports.wait("waiting", SOON);
    a.type_in(b"\n");
    a.reports.finish(SOON);
    let results = b.reports.finish(SOON);
    assert_eq!((&results[0]["rx"], &results[0]["other"]), (&0.into(), &0.into()), "{results:#?}");
}

/// In a network with a prefix two VMs exchange verified frames under the addresses they were given; one that uses another
/// address is heard by nobody.
#[test]
fn a_vm_speaks_under_its_own_address_only() {
    enter_new_network_namespace();
    let dir = temp_dir();
    let mut card = Card::start("offload-net", dir.path());
    let (id, ipv4_prefix) = ("vpc".to_owned(), "10.9.0.0/24".to_owned());
    card.create_network(NetworkSpec { id, ipv4_prefix, ..Default::default() }).expect("create network");
    // The addresses of the peers are asked for by ARP, which the card answers.
    let exchange = |own: u8, peer: u8| {
        format!(
            "job=net-exchange ip=10.9.0.{own} peer=10.9.0.{peer} count=100000 size=1400 mode=irq timeout=60"
        )
    };
    let boot = |name: &str, job: &str, device: &proto::v1::Device| {
        Vm::boot(dir.path(), config(name, job, vec![slot("nic0", device)]))
    };
    let first = card.nic_with_address("a", "vpc", 11, "10.9.0.11");
    let second = card.nic_with_address("b", "vpc", 12, "10.9.0.12");
    let (a, b) = (boot("a", &exchange(11, 12), &first), boot("b", &exchange(12, 11), &second));
    a.reports.wait("io_begin", SOON);
    b.reports.wait("io_begin", SOON);
    // The card comes back with the network and its addresses, without anybody's help.
    wait_until("frames to flow", SOON, || card.requests("a") > 500);
    card.kill9();
    card.restart();
    for vm in [a, b] {
        let results = vm.reports.finish(Duration::from_secs(180));
        assert_eq!(
            (&results[0]["corrupt"], &results[0]["rx"], &results[0]["needs_reset"]),
            (&0.into(), &100_000.into(), &false.into()),
            "{results:#?}"
        );
    }
    assert_eq!(card.drops("a"), proto::v1::NetDrops::default());

    let (third, fourth) = (
        card.nic_with_address("c", "vpc", 13, "10.9.0.13"),
        card.nic_with_address("d", "vpc", 14, "10.9.0.14"),
    );
    let send = "job=net-send ip=10.9.0.11 peer=10.9.0.14 peer_mac=02:00:00:00:0b:0e count=1000 wait=serial";
    let d = boot("d", "job=net-recv ip=10.9.0.14 count=1 min=0 timeout=3 secs=3", &fourth);
    let c = boot("c", send, &third);
    d.reports.wait("io_begin", SOON);
    c.reports.wait("waiting", SOON);
    c.type_in(b"\n");
    c.reports.finish(SOON);
    let results = d.reports.finish(SOON);
    assert_eq!((&results[0]["rx"], &results[0]["other"]), (&0.into(), &0.into()), "{results:#?}");
    assert_eq!(card.drops("c"), proto::v1::NetDrops { spoofed_address: 1000, ..Default::default() });
}
