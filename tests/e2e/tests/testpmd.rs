//! DPDK as the guest of a network: `dpdk-testpmd`'s virtio-user ports are front-ends that nobody of us has written.

use std::path::Path;
use std::time::Duration;

use e2e::card::{Card, mac_of};
use e2e::testpmd::{PortStats, Testpmd};
use e2e::vm::{Vm, config, slot};
use e2e::{SOON, enter_new_network_namespace, temp_dir, wait_until};
use proto::v1::{Device, NetDrops, NetworkSpec, QueueStats};

/// Frames that each port begins with: four bursts of 32.
const FIRST: u64 = 128;

/// A card with a network whose prefix is 10.9.0.0/24.
fn card(dir: &Path) -> Card {
    let card = Card::start("offload-net", dir);
    let (id, ipv4_prefix) = ("vpc".to_owned(), "10.9.0.0/24".to_owned());
    card.create_network(NetworkSpec { id, ipv4_prefix, ..Default::default() }).expect("create network");
    card
}

/// The receive and the transmit queue of a device, once nothing is in flight in the latter.
fn queues(card: &Card, device: &str) -> (QueueStats, QueueStats) {
    let mut stats = card.queue_stats(device).into_iter();
    (stats.next().expect("a receive queue"), stats.next().expect("a transmit queue"))
}

/// Two ports send each other's frames back, with addresses and ports exchanged: each is a device that speaks as itself.
#[test]
fn frames_go_to_and_fro_between_two_ports() {
    let dir = temp_dir();
    let card = card(dir.path());
    let a = card.nic_with_address("a", "vpc", 11, "10.9.0.11");
    let b = card.nic_with_address("b", "vpc", 12, "10.9.0.12");
    // What its drivers ask for, and how long frames are. The card has no packed rings: then they make split ones.
    for (virtio, length) in [("", 64), (",mrg_rxbuf=0,in_order=0", 1514), (",packed_vq=1", 600)] {
        println!("virtio options '{virtio}'");
        to_and_fro(dir.path(), &card, [&a, &b], virtio, length);
    }
}

fn to_and_fro(dir: &Path, card: &Card, devices: [&Device; 2], virtio: &str, length: u64) {
    let before = ["a", "b"].map(|id| queues(card, id));
    let spoofed_before = card.drops("b").spoofed_address;
    let peer = |port: usize, device: &Device| format!("--eth-peer={port},{}", mac_of(device));
    let options = [
        "--port-topology=loop",
        "--forward-mode=5tswap",
        // Of all ports' first frames.
        "--tx-ip=10.9.0.11,10.9.0.12",
        &format!("--txpkts={length}"),
        &peer(0, devices[1]),
        &peer(1, devices[0]),
    ];
    let mut testpmd = Testpmd::start(dir, &devices, virtio, &options);
    testpmd.order("start tx_first 4");
    let sent = |id: &str, before: &(QueueStats, QueueStats)| queues(card, id).1.requests - before.1.requests;
    wait_until("frames to go to and fro", SOON, || {
        sent("a", &before[0]) > 20_000 && sent("b", &before[1]) > 20_000
    });
    testpmd.order("stop");
    // What the card has delivered meanwhile is still to be counted.
    let drain = |testpmd: &mut Testpmd| {
        testpmd.order("set fwd rxonly");
        testpmd.order("start");
        std::thread::sleep(Duration::from_millis(100));
        testpmd.order("stop");
    };
    drain(&mut testpmd);
    let ports = [0, 1].map(|port| testpmd.stats(port));
    let spoofed = card.drops("b").spoofed_address - spoofed_before;
    // The first frames of port 1 have port 0's address.
    assert_eq!(spoofed, FIRST, "{:?}", card.drops("b"));
    for ((id, before), (own, other)) in
        ["a", "b"].into_iter().zip(&before).zip([(ports[0], ports[1]), (ports[1], ports[0])])
    {
        let (rx, tx) = queues(card, id);
        let delivered = (rx.bytes_in - before.0.bytes_in) / length;
        let dropped = rx.dropped - before.0.dropped;
        let refused = if id == "b" { FIRST } else { 0 };
        let own_refused = if id == "a" { FIRST } else { 0 };
        println!("{id}: {own:?}, card: delivered {delivered}, dropped {dropped}");
        assert_eq!((own.tx_packets, own.rx_errors), (tx.requests - before.1.requests, 0), "{id}");
        assert_eq!(own.tx_bytes, own.tx_packets * length, "{id}");
        assert_eq!((own.rx_packets, own.rx_bytes), (delivered, delivered * length), "{id}");
        assert_eq!(tx.errors - before.1.errors, refused, "{id}");
        assert_eq!(delivered + dropped, other.tx_packets - own_refused, "{id}");
        assert!(own.rx_packets > 15_000, "{id}: {own:?}");
    }
    let status = testpmd.quit();
    assert!(status.success(), "testpmd ended with {status}");
    wait_until("the card to see that they are gone", SOON, || {
        ["a", "b"].iter().all(|id| !card.device(id).connected)
    });
    assert_eq!(["a", "b"].map(|id| card.device(id).broken), ["", ""]);
}

/// A guest's frames come back from testpmd as they were; and after that, with nothing but a kill between, it counts them.
#[test]
fn a_guest_and_a_port_exchange_frames() {
    enter_new_network_namespace();
    let dir = temp_dir();
    let card = card(dir.path());
    let port = card.nic_with_address("port", "vpc", 11, "10.9.0.11");
    let guest = card.nic_with_address("guest", "vpc", 12, "10.9.0.12");
    let job = "job=net-pingpong ip=10.9.0.12 peer=10.9.0.11 count=500 size=1400 timeout=60 \
               job=net-send ip=10.9.0.12 peer=10.9.0.11 count=20000 size=1000 wait=serial";
    let mut testpmd = Testpmd::start(dir.path(), &[&port], "", &["--forward-mode=5tswap"]);
    testpmd.order("start");
    let vm = Vm::boot(dir.path(), config("guest", job, vec![slot("nic0", &guest)]));
    vm.reports.wait("waiting", Duration::from_secs(60));
    let PortStats { rx_packets, tx_packets, .. } = testpmd.stats(0);
    assert!(rx_packets >= 500 && tx_packets >= 500, "{rx_packets} {tx_packets}");
    // Its end is no harm to the card, nor to the next.
    testpmd.kill9();
    wait_until("the card to see that it is gone", SOON, || !card.device("port").connected);

    let mut testpmd = Testpmd::start(dir.path(), &[&port], "", &["--forward-mode=rxonly"]);
    testpmd.order("start");
    let before = queues(&card, "port").0;
    vm.type_in(b"\n");
    let results = vm.reports.finish(Duration::from_secs(60));
    assert_eq!((&results[0]["corrupt"], &results[0]["rx"]), (&0.into(), &500.into()), "{results:#?}");
    // Ethernet, IPv4 and UDP headers.
    let length = 1000 + 42;
    let mut seen = PortStats::default();
    wait_until("all frames to be counted", SOON, || {
        seen = testpmd.stats(0);
        let after = queues(&card, "port").0;
        let (delivered, dropped) =
            ((after.bytes_in - before.bytes_in) / length, after.dropped - before.dropped);
        seen.rx_packets == delivered && delivered + dropped == 20_000
    });
    assert_eq!((seen.rx_bytes, seen.rx_errors), (seen.rx_packets * length, 0));
    assert!(seen.rx_packets > 10_000, "{seen:?}");
    assert_eq!(card.drops("guest"), NetDrops::default());
    testpmd.order("stop");
    let status = testpmd.quit();
    assert!(status.success(), "testpmd ended with {status}");
}
