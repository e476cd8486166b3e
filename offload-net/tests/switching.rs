//! The network's thread with guests on in-process rings: what arrives where, and what a hostile guest can do.

mod common;

use std::path::Path;
use std::time::Instant;

use common::multi::{MQ, Multi};
use common::queue::{INDIRECT, NEXT, WRITE};
use common::*;
use offload_card::poll::{PollMode, PollPolicy};
use offload_net::frame::header::VnetHeader;
use offload_net::network::Network;
use offload_net::network::uplink::Uplink;
use proptest::prelude::*;
use virtio_bindings::virtio_net::*;

fn network_that_polls(mode: PollMode) -> Network {
    let policy = PollPolicy { mode, ..PollPolicy::default() };
    Network::start("test", 1500, None, Uplink::None, policy).unwrap()
}

fn network() -> Network {
    network_that_polls(PollMode::default())
}

/// Two guests with these features and mergeable-sized receive buffers.
fn two(network: &Network, a: u64, b: u64) -> (Guest, Guest) {
    let (mut a, mut b) = (Guest::new(1, a), Guest::new(2, b));
    for g in [&mut a, &mut b] {
        g.fill_rx(200, 2048);
        g.plug(network);
    }
    (a, b)
}

#[test]
fn frames_arrive_whole_whatever_the_pieces() {
    let network = network();
    let (mut a, mut b) = two(&network, FULL, FULL);
    for (i, (payload, piece)) in
        [(0, 4096), (46, 4096), (242, 300), (243, 7), (1486, 100), (1500, 12)].into_iter().enumerate()
    {
        let f = frame(b.mac, a.mac, i as u8, payload);
        a.send_pieces(&VnetHeader::default(), &f, piece);
        let (header, got) = b.receive().unwrap();
        assert_eq!(got, f, "{payload} bytes in pieces of {piece}");
        assert_eq!(header, VnetHeader::default());
    }
    assert!(a.receives_nothing());
    assert_eq!(b.shared[0].counters.bytes_in.get(), a.shared[1].counters.bytes_out.get());
}

#[test]
fn frames_arrive_in_order_and_none_is_lost_while_there_is_room() {
    let network = network();
    let (mut a, mut b) = two(&network, FULL, BASE);
    for round in 0..20_u8 {
        for i in 0..100 {
            a.send(&frame(b.mac, a.mac, round ^ i, usize::from(i) * 10));
        }
        for i in 0..100 {
            let (_, got) = b.receive().unwrap();
            assert_eq!(got, frame(b.mac, a.mac, round ^ i, usize::from(i) * 10));
        }
    }
    assert_eq!(b.shared[0].counters.dropped.get(), 0);
}

#[test]
fn no_wake_up_is_ever_missed() {
    for mode in [PollMode::Never, PollMode::Adaptive] {
        there_and_back(&network_that_polls(mode));
    }
}

#[test]
fn a_network_that_polls_takes_no_kicks_and_one_that_does_not_sleeps() {
    for (mode, polls) in [(PollMode::Always, true), (PollMode::Never, false)] {
        let network = network_that_polls(mode);
        let (mut a, mut b) = two(&network, FULL, FULL);
        for i in 0..100 {
            a.send(&frame(b.mac, a.mac, i, 60));
            assert!(b.receive().is_some());
        }
        let counters = &a.shared[1].counters;
        assert_eq!(counters.poll_hits.get() > 0, polls);
        // The first frame of a fresh ring kicks in any case.
        assert_eq!((counters.kicks.get() > 1, counters.sleeps.get() > 0), (!polls, !polls));
        // Tasks are seen all the same.
        let soon = Instant::now() + PATIENCE;
        assert!(network.stop_queue(offload_net::switch::PortId(0), 1, soon).unwrap().is_some());
    }
}

#[test]
fn a_network_that_polls_adaptively_sleeps_when_idle() {
    let network = network();
    let (mut a, mut b) = two(&network, FULL, FULL);
    for i in 0..200 {
        a.send(&frame(b.mac, a.mac, i, 60));
        assert!(b.receive().is_some());
    }
    // However far it looks, it ends asleep, with kicks asked for.
    card::retry(|| if a.tx.kick_wanted() { Ok(()) } else { Err("still looking") });
}

fn there_and_back(network: &Network) {
    const ROUNDS: u32 = 5000;
    let (mut a, mut b) = two(network, FULL, FULL);
    let (to_a, to_b) = (frame(a.mac, b.mac, 0, 60), frame(b.mac, a.mac, 0, 60));
    let echo = std::thread::spawn(move || {
        (0..ROUNDS).all(|_| {
            let got = b.receive().is_some();
            b.send(&to_a);
            got
        })
    });
    for i in 0..ROUNDS {
        a.send(&to_b);
        assert!(a.receive().is_some(), "stalled in round {i}");
    }
    assert!(echo.join().unwrap());
}

#[test]
fn broadcast_reaches_all_others_and_spoofed_frames_nobody() {
    let network = network();
    let (mut a, mut b) = two(&network, FULL, FULL);
    let mut c = Guest::new(3, BASE);
    c.fill_rx(20, 2048);
    c.plug(&network);
    let f = frame(BROADCAST, a.mac, 1, 100);
    a.send(&f);
    assert_eq!(b.receive().unwrap().1, f);
    assert_eq!(c.receive().unwrap().1, f);
    assert!(a.receives_nothing());

    a.send(&frame(b.mac, c.mac, 2, 100));
    a.send(&frame(BROADCAST, [0x52, 0x54, 0, 0, 0, 9], 3, 100));
    assert!(b.receives_nothing() && c.receives_nothing());
    let shared = a.shared[1].clone();
    let counters = &shared.counters;
    assert_eq!((counters.dropped.get(), counters.errors.get()), (2, 2));
    // Nobody has this address, and there is no uplink: no fault of the sender's.
    a.send(&frame([0x52, 0x54, 0, 0, 0, 9], a.mac, 4, 100));
    assert!(b.receives_nothing());
    assert_eq!((counters.dropped.get(), counters.errors.get()), (3, 2));
}

#[test]
fn a_super_frame_is_passed_whole_to_a_guest_that_takes_it() {
    let network = network();
    let (mut a, mut b) = two(&network, FULL, FULL);
    let payload: Vec<u8> = (0..60_000_u32).map(|i| (i / 7) as u8).collect();
    let (header, f) = tcp4_super((b.mac, a.mac), &payload, 1448);
    a.send_pieces(&header, &f, 4096);
    let (got, bytes) = b.receive().unwrap();
    assert_eq!(bytes, f);
    assert_eq!((got.gso_type, got.gso_size, got.flags, got.csum_start), (1, 1448, 1, 34));
    assert_eq!(b.shared[0].counters.requests.get(), (60_000_u64 + 54 + 12).div_ceil(2048));
}

#[test]
fn a_super_frame_is_cut_for_a_guest_that_does_not_take_it() {
    for receiver in [BASE, BASE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_MRG_RXBUF] {
        let network = network();
        let (mut a, mut b) = two(&network, FULL, receiver);
        let payload: Vec<u8> = (0..20_000_u32).map(|i| (i / 7) as u8).collect();
        let (header, f) = tcp4_super((b.mac, a.mac), &payload, 1448);
        a.send_pieces(&header, &f, 4096);
        let mut got: Vec<u8> = Vec::new();
        while got.len() < payload.len() {
            let (header, segment) = b.receive().unwrap();
            assert!(segment.len() <= 1514);
            if receiver == BASE {
                assert_eq!(header, VnetHeader::default());
                assert!(tcp4_checksum_holds(&segment));
            } else {
                assert_eq!(
                    (header.flags, header.gso_type, header.csum_start, header.csum_offset),
                    (1, 0, 34, 16)
                );
            }
            got.extend(&segment[54..]);
        }
        assert_eq!(got, payload);
    }
}

#[test]
fn checksums_are_completed_for_a_guest_that_cannot() {
    let network = network();
    let (mut a, mut b) = two(&network, FULL, BASE);
    let f = udp4((b.mac, a.mac), ([10, 0, 0, 1], 1), ([10, 0, 0, 2], 2), &[7; 1001], true);
    assert!(!udp4_checksum_holds(&f));
    a.send_pieces(&UDP_PARTIAL, &f, 333);
    let (header, got) = b.receive().unwrap();
    assert_eq!(header, VnetHeader::default());
    assert!(udp4_checksum_holds(&got));
}

#[test]
fn a_receiver_without_buffers_loses_its_frames_and_delays_nobody() {
    let network = network();
    let (mut a, mut b) = two(&network, FULL, FULL);
    let stalled = Guest::new(3, FULL);
    stalled.plug(&network);
    for i in 0..2000_u32 {
        a.send(&frame(stalled.mac, a.mac, 0, 1400));
        a.send(&frame(b.mac, a.mac, i as u8, 64));
        assert_eq!(b.receive().unwrap().1, frame(b.mac, a.mac, i as u8, 64));
    }
    // What waits for it is bounded by a MiB.
    let dropped = stalled.shared[0].counters.dropped.get();
    assert!(dropped >= 2000 - (1 << 20) / 1414, "{dropped}");
    assert_eq!(stalled.shared[0].counters.in_flight.get(), 0);
}

/// It may have the processor that this receiver needs, and what it piles up would be copied twice.
#[test]
fn a_network_that_could_only_pile_up_frames_for_a_receiver_without_buffers_rests_after_each_turn() {
    let network = network();
    let stalled = Guest::new(3, FULL);
    stalled.plug(&network);
    // There is always more to send: it never sleeps for want of work.
    let mut a = Multi::new(1, 7, BASE | MQ);
    let mut frames = 0;
    for pair in 0..7 {
        while a.put(pair, &frame(stalled.mac, a.mac, 0, 64)) {
            frames += 1;
        }
    }
    let sleeps = || {
        let status = |task: &Path| std::fs::read_to_string(task.join("status")).unwrap();
        let of_network = |task: &Path| std::fs::read_to_string(task.join("comm")).unwrap() == "net-test\n";
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        let status = status(&tasks.into_iter().find(|task| of_network(task)).unwrap());
        let (_, rest) = status.split_once("\nvoluntary_ctxt_switches:").unwrap();
        rest.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let before = sleeps();
    let device = a.plug(&network, (0..7).map(|pair| 2 * pair + 1), None);
    let until = Instant::now() + PATIENCE;
    while (0..7).any(|pair| a.queues[2 * pair + 1].device_used_idx() != 256) {
        assert!(Instant::now() < until);
    }
    let slept = sleeps() - before;
    network.unplug(device);
    // A rest ends at once if a queue is started meanwhile; and each of those is all else it could sleep for.
    let started = 9;
    assert!(slept >= frames / 16 - started && slept > started, "{slept} times in {frames} frames");
    assert_eq!(stalled.shared[0].counters.dropped.get(), 0);
}

#[test]
fn frames_wait_a_moment_for_buffers() {
    let network = network();
    let mut a = Guest::new(1, FULL);
    a.plug(&network);
    // With and without mergeable buffers; each round 10 buffers of 2 KiB for 100 frames.
    for (last, features) in [(2, BASE), (3, FULL)] {
        let mut b = Guest::new(last, features);
        b.fill_rx(10, 2048);
        b.plug(&network);
        let (header, f) = tcp4_super((b.mac, a.mac), &[last; 9000], 1448);
        for _ in 0..20 {
            for i in 0..100 {
                a.send(&frame(b.mac, a.mac, i, 1300));
            }
            a.send_pieces(&header, &f, 4096);
            for i in 0..100 {
                assert_eq!(b.receive().expect("it waited").1, frame(b.mac, a.mac, i, 1300));
            }
            let mut payload = 0;
            while payload < 9000 {
                payload += b.receive().expect("it waited").1.len() - 54;
            }
        }
        assert_eq!(b.shared[0].counters.dropped.get(), 0);
    }
}

#[test]
fn a_frame_that_does_not_fit_is_dropped() {
    let network = network();
    let mut a = Guest::new(1, FULL);
    a.plug(&network);
    // Not mergeable, and too small: dropped at once, and the buffer comes back empty. Four mergeable ones, too small
    // together: dropped after a while, and they wait for something smaller.
    for (last, features, empty) in [(2, BASE, 1), (3, FULL, 0)] {
        let mut b = Guest::new(last, features);
        b.fill_rx(4, 200);
        b.plug(&network);
        a.send(&frame(b.mac, a.mac, 1, 1400));
        for _ in 0..empty {
            assert_eq!(b.rx.wait_used(PATIENCE).unwrap().1, 0);
        }
        assert!(b.receives_nothing());
        std::thread::sleep(offload_net::network::backlog::PATIENCE);
        a.send(&frame(b.mac, a.mac, 2, 100));
        assert_eq!(b.receive().unwrap().1, frame(b.mac, a.mac, 2, 100));
        assert_eq!(b.shared[0].counters.dropped.get(), 1);
    }
}

#[test]
fn crumbs_are_looked_at_once_and_given_back() {
    let network = network();
    let (mut a, mut b) = two(&network, FULL, FULL);
    let mut hostile = Guest::new(3, FULL);
    hostile.fill_rx(255, 1);
    let port = hostile.plug(&network);
    let shared = hostile.shared[0].clone();
    for i in 0..100 {
        a.send(&frame(hostile.mac, a.mac, 0, 1400));
        a.send(&frame(b.mac, a.mac, i, 64));
        assert_eq!(b.receive().unwrap().1, frame(b.mac, a.mac, i, 64));
        // They are kept for the next frame, not put back and taken again.
        assert_eq!((shared.counters.requests.get(), shared.counters.in_flight.get()), (255, 255));
    }
    // One more, and it is clear that they will never do: it pays for new ones.
    hostile.rx.add(&[(0x10_8000, 1, true)]).unwrap();
    hostile.rx.kick();
    for _ in 0..256 {
        assert_eq!(hostile.rx.wait_used(PATIENCE).unwrap().1, 0);
    }
    // Held when it stops, they are as if never taken.
    hostile.fill_rx(10, 1);
    a.send(&frame(hostile.mac, a.mac, 0, 1400));
    card::retry(|| if shared.counters.in_flight.get() == 10 { Ok(()) } else { Err("not held") });
    let stopped = network.stop_queue(port, 0, Instant::now() + PATIENCE).unwrap().unwrap();
    assert_eq!((stopped.next_avail, shared.counters.in_flight.get()), (256, 0));
}

#[test]
fn queues_stop_and_start_and_macs_are_free_again() {
    let network = network();
    let (mut a, mut b) = two(&network, FULL, FULL);
    // Ports are numbered in order of their coming.
    let port = offload_net::switch::PortId(1);
    let soon = || Instant::now() + PATIENCE;
    a.send(&frame(b.mac, a.mac, 1, 10));
    b.receive().unwrap();
    for index in [0, 1] {
        let state = network.stop_queue(port, index, soon()).unwrap().unwrap();
        assert_eq!(state.next_avail, [1, 0][usize::from(index)]);
        assert!(network.stop_queue(port, index, soon()).unwrap().is_none());
    }
    a.send(&frame(b.mac, a.mac, 2, 10));
    assert!(b.receives_nothing());
    network.unplug(port);
    let mut again = Guest::new(2, FULL);
    again.fill_rx(10, 2048);
    assert_eq!(again.plug(&network), port);
    a.send(&frame(b.mac, a.mac, 3, 10));
    assert_eq!(again.receive().unwrap().1, frame(b.mac, a.mac, 3, 10));
}

/// After whatever guest `bad` did: the others' frames go their way.
fn others_live(network: &Network, bad: &str) {
    let (mut a, mut b) = (Guest::new(101, FULL), Guest::new(102, FULL));
    for g in [&mut a, &mut b] {
        g.fill_rx(200, 2048);
        g.plug(network);
    }
    a.send(&frame(b.mac, a.mac, 1, 1000));
    // What the bad one broadcasts may come before.
    let got = std::iter::repeat_with(|| b.receive().expect(bad).1).find(|f| f[6..12] == a.mac).unwrap();
    assert!(got == frame(b.mac, a.mac, 1, 1000), "{bad}");
}

#[test]
fn malformed_frames_are_dropped_and_counted() {
    let network = network();
    let (mut a, mut b) = two(&network, FULL, FULL);
    a.send_raw(&[0; 5], 5);
    a.send_raw(&[0; 12], 12);
    a.send_raw(&[0; 25], 25);
    a.send(&frame(b.mac, a.mac, 0, 1505));
    a.send_raw(&vec![0; 69_000], 3000);
    let (good, f) = tcp4_super((b.mac, a.mac), &[0; 3000], 1448);
    let bad = [
        VnetHeader { gso_size: 0, ..good },
        VnetHeader { gso_type: 3, ..good },
        VnetHeader { gso_type: 4, ..good },
        VnetHeader { csum_start: 0xffff, csum_offset: 0xffff, ..good },
        VnetHeader { csum_start: 3010, ..good },
        VnetHeader { flags: 0, ..good },
    ];
    for header in bad {
        a.send_pieces(&header, &f, 1000);
    }
    // A buffer that wants to be written.
    a.tx.add(&[(0x200_0000, 100, false), (0x201_0000, 100, true)]).unwrap();
    a.tx.kick();
    assert!(b.receives_nothing());
    let shared = a.shared[1].clone();
    let counters = &shared.counters;
    assert_eq!((counters.dropped.get(), counters.errors.get()), (12, 12));
    assert_eq!(a.shared[1].broken(), None);
    a.send_pieces(&good, &f, 1000);
    assert_eq!(b.receive().unwrap().1, f);
}

#[test]
fn malformed_rings_are_stopped_and_concern_nobody_else() {
    // Guest by guest: what it writes into which queue.
    type Crime = (&'static str, fn(&mut Guest));
    let crimes: [Crime; 9] = [
        ("descriptor outside memory", |g| {
            g.tx.descriptor(0, 0xffff_ffff_ffff_0000, 100, 0, 0);
            g.tx.offer(0);
        }),
        ("loop", |g| {
            g.tx.descriptor(0, 0x200_0000, 100, NEXT, 1);
            g.tx.descriptor(1, 0x200_0000, 100, NEXT, 0);
            g.tx.offer(0);
        }),
        ("head out of range", |g| g.tx.offer(0xfff0)),
        ("avail index runs away", |g| {
            g.tx.avail_idx = 0x7000;
            g.tx.offer(0);
        }),
        ("readable after writable", |g| {
            g.tx.descriptor(0, 0x200_0000, 100, NEXT | WRITE, 1);
            g.tx.descriptor(1, 0x200_0000, 100, 0, 0);
            g.tx.offer(0);
        }),
        ("indirect table of nothing", |g| {
            g.tx.descriptor(0, 0x200_0000, 0, INDIRECT, 0);
            g.tx.offer(0);
        }),
        ("receive buffer with a piece of no bytes", |g| {
            g.rx.descriptor(0, 0x10_0000, 0, WRITE | NEXT, 1);
            g.rx.descriptor(1, 0x10_0000, 100, WRITE, 0);
            g.rx.offer(0);
        }),
        ("receive buffer in more pieces than anybody needs", |g| {
            g.rx.add(&[(0x10_0000, 1, true); 65]).unwrap();
        }),
        ("receive buffer outside memory", |g| {
            g.rx.descriptor(0, 0x1_0000_0000, 100, WRITE, 0);
            g.rx.offer(0);
        }),
    ];
    for (name, crime) in crimes {
        let network = network();
        let mut guest = Guest::new(1, FULL);
        crime(&mut guest);
        let port = guest.plug(&network);
        guest.tx.kick();
        // Something for it to receive.
        let mut friend = Guest::new(2, FULL);
        friend.plug(&network);
        friend.send(&frame(guest.mac, friend.mac, 0, 10));
        card::retry(|| guest.shared[0].broken().or(guest.shared[1].broken()).ok_or(name));
        others_live(&network, name);
        for index in [0, 1] {
            network.stop_queue(port, index, Instant::now() + PATIENCE).unwrap().unwrap();
        }
    }
}

/// A descriptor of a hostile guest: anything, with a leaning towards what nearly works.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![Just(0x200_0000_u64), 0..0x400_0000_u64, any::<u64>()];
    let length = prop_oneof![0..3000_u32, 0..70_000_u32, any::<u32>()];
    (address, length, 0..8_u16, prop_oneof![0..16_u16, any::<u16>()])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is in its rings and buffers, the thread lives and the others' frames go their way.
    #[test]
    fn a_hostile_guest_harms_nobody(
        rx in prop::collection::vec(descriptor(), 1..16),
        tx in prop::collection::vec(descriptor(), 1..16),
        bytes in prop::collection::vec(any::<u8>(), 0..3000),
        heads in prop::collection::vec(0..17_u16, 1..40),
    ) {
        use vm_memory::Bytes as _;
        let network = network();
        let mut bad = Guest::new(1, FULL);
        bad.mem.write_slice(&bytes, vm_memory::GuestAddress(0x200_0000)).unwrap();
        bad.mem.write_slice(&bad.mac, vm_memory::GuestAddress(0x200_0000 + 12 + 6)).unwrap();
        for (i, d) in (0..).zip(&rx) {
            bad.rx.descriptor(i, d.0, d.1, d.2, d.3);
        }
        for (i, d) in (0..).zip(&tx) {
            bad.tx.descriptor(i, d.0, d.1, d.2, d.3);
        }
        for head in &heads {
            bad.rx.offer(*head);
            bad.tx.offer(*head);
        }
        bad.plug(&network);
        bad.tx.kick();
        let mut friend = Guest::new(2, FULL);
        friend.plug(&network);
        for i in 0..4 {
            friend.send(&frame(bad.mac, friend.mac, i, 1000));
            friend.send(&frame(BROADCAST, friend.mac, i, 100));
        }
        others_live(&network, "hostile guest");
    }
}
