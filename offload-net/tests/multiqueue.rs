//! A device with several queue pairs: which of them frames come by, what its driver can say in the control queue, and that
//! a card that comes back knows it.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use common::multi::{MQ, Multi, PAIRS_SET};
use common::*;
use offload_card::poll::{PollMode, PollPolicy};
use offload_card::qos::NetLimits;
use offload_card::ring::InflightArea;
use offload_net::network::Network;
use offload_net::network::uplink::Uplink;
use proptest::prelude::*;
use proto::v1;

const CTRL_VQ: u64 = 1 << 17;
/// A driver that knows all about it.
const DRIVER: u64 = FULL | MQ | CTRL_VQ;
const FLOWS: u16 = 64;

fn network() -> Network {
    let policy = PollPolicy { mode: PollMode::Never, ..PollPolicy::default() };
    Network::start("test", 1500, None, Uplink::None, policy).unwrap()
}

/// A guest that sends by one queue.
fn sender(network: &Network) -> Guest {
    let mut guest = Guest::new(1, FULL);
    guest.fill_rx(200, 2048);
    guest.plug(network);
    guest
}

/// Packet `n` of a flow.
fn packet(from: [u8; 6], to: [u8; 6], flow: u16, n: u8) -> Vec<u8> {
    udp4((to, from), ([10, 0, 0, 1], 1000 + flow), ([10, 0, 0, 2], 9000), &[n; 32], false)
}

/// Sends `rounds` packets of each flow; by which pairs each flow's packets came, after checking that all came, in order.
fn spread(from: &mut Guest, to: &mut Multi, rounds: u8) -> BTreeMap<u16, BTreeSet<u16>> {
    for n in 0..rounds {
        for flow in 0..FLOWS {
            from.send(&packet(from.mac, to.mac, flow, n));
        }
    }
    let frames = to.receive(usize::from(rounds) * usize::from(FLOWS));
    let mut pairs = BTreeMap::<u16, BTreeSet<u16>>::new();
    let mut next = BTreeMap::new();
    for (pair, frame) in frames {
        let flow = u16::from_be_bytes([frame[34], frame[35]]) - 1000;
        let n = next.entry(flow).or_insert(0);
        assert_eq!(frame, packet(from.mac, to.mac, flow, *n), "flow {flow}");
        *n += 1;
        pairs.entry(flow).or_default().insert(pair);
    }
    assert!(next.len() == usize::from(FLOWS) && next.values().all(|n| *n == rounds), "{next:?}");
    pairs
}

/// All pairs by which anything came.
fn used(from: &mut Guest, to: &mut Multi) -> BTreeSet<u16> {
    spread(from, to, 1).into_values().flatten().collect()
}

fn set<const N: usize>(of: [u16; N]) -> BTreeSet<u16> {
    of.into()
}

#[test]
fn frames_come_by_as_many_pairs_as_the_driver_says_and_a_flow_by_one() {
    let network = network();
    let (mut a, mut b) = (sender(&network), Multi::new(2, 4, DRIVER));
    b.plug(&network, b.all(), None);
    assert_eq!(used(&mut a, &mut b), set([0]), "before the driver says anything");

    assert!(b.set_pairs(4));
    let flows = spread(&mut a, &mut b, 5);
    assert!(flows.values().all(|pairs| pairs.len() == 1), "{flows:?}");
    assert_eq!(flows.into_values().flatten().collect::<BTreeSet<_>>(), set([0, 1, 2, 3]));
    // What is no IP has no flow.
    let arp = frame(BROADCAST, a.mac, 1, 50);
    a.send(&arp);
    assert_eq!(b.receive(1), [(0, arp)]);

    assert!(b.set_pairs(2));
    assert_eq!(used(&mut a, &mut b), set([0, 1]));
    assert!(b.set_pairs(1));
    assert_eq!(used(&mut a, &mut b), set([0]));
    let numbers = |index: usize| {
        let counters = &b.shared[index].counters;
        (counters.requests.get(), counters.errors.get(), counters.dropped.get())
    };
    assert_eq!(numbers(8), (3, 0, 0), "the control queue");
    assert!((0..4).all(|pair| numbers(2 * pair).0 > 0), "each receive queue has its own numbers");
}

#[test]
fn all_transmit_queues_are_served() {
    let network = network();
    let (mut a, mut b) = (sender(&network), Multi::new(2, 4, DRIVER));
    b.plug(&network, b.all(), None);
    assert!(b.set_pairs(4));
    for round in 0..50 {
        for pair in 0..4 {
            let f = frame(a.mac, b.mac, round, 100 + usize::from(pair));
            b.send(pair, &f);
            assert_eq!(a.receive().unwrap().1, f, "round {round}, pair {pair}");
        }
    }
}

#[test]
fn nonsense_in_the_control_queue_is_refused_and_changes_nothing() {
    let network = network();
    let (mut a, mut b) = (sender(&network), Multi::new(2, 3, DRIVER));
    b.plug(&network, b.all(), None);
    assert!(b.set_pairs(2));
    for pairs in [0, 4, 0x100, 0x8000, 0xffff] {
        assert!(!b.set_pairs(pairs), "{pairs} pairs");
    }
    let three = 3_u16.to_le_bytes();
    let long = [4, 0, 3, 0, 0];
    let refused: [&[&[u8]]; 10] = [
        // Other commands: of this class, and of all others.
        &[&[4, 1], &three],
        &[&[4, 2], &three],
        &[&[0, 0], &[1, 0]],
        &[&[1, 0], &three],
        &[&[5, 0], &three],
        &[&[255, 0], &three],
        // Too short, too long.
        &[&[4]],
        &[&PAIRS_SET],
        &[&PAIRS_SET, &[3]],
        &[&long],
    ];
    for pieces in refused {
        assert_eq!(b.command(pieces), 1, "{pieces:?}");
    }
    // Neither a command nor room for an answer.
    b.put_command(&[&PAIRS_SET, &three], 0);
    b.control().kick();
    assert_eq!(b.control().wait_used(PATIENCE).expect("it comes back").1, 0);
    assert_eq!(b.command(&[]), 1);
    assert_eq!(b.shared[6].counters.errors.get(), 17);
    assert_eq!(used(&mut a, &mut b), set([0, 1]));
    // In any pieces it is the same command.
    assert_eq!(b.command(&[&[4], &[0, 3], &[0]]), 0);
    assert_eq!(used(&mut a, &mut b), set([0, 1, 2]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is in the control queue, it is answered, and OK only when it is a number of pairs that there are.
    #[test]
    fn any_command_is_answered(
        commands in prop::collection::vec((3u8..6, 0u8..2, 0u8..5, 0u8..2, 3usize..6, 0usize..4), 1..30),
    ) {
        let network = network();
        let mut b = Multi::new(2, 3, DRIVER);
        b.plug(&network, b.all(), None);
        for (class, command, low, high, length, cut) in commands {
            let bytes = &[class, command, low, high, 0][..length.min(5)];
            let (first, second) = bytes.split_at(cut.min(length));
            let good = matches!(bytes, [4, 0, 1..=3, 0]);
            prop_assert_eq!(b.command(&[first, second]), u8::from(!good), "{:?}", bytes);
        }
        prop_assert!(b.shared.iter().all(|queue| queue.broken().is_none()));
    }
}

#[test]
fn a_broken_control_queue_is_no_concern_of_the_others() {
    let network = network();
    let (mut a, mut b) = (sender(&network), Multi::new(2, 2, DRIVER));
    b.plug(&network, b.all(), None);
    assert!(b.set_pairs(2));
    b.control().descriptor(0, 0xffff_ffff_0000, 4, 0, 0);
    b.control().offer(0);
    b.control().kick.signal();
    card::retry(|| b.shared[4].broken().map(drop).ok_or("not broken"));
    assert_eq!(used(&mut a, &mut b), set([0, 1]));
    assert!(b.shared[0].broken().is_none());
}

#[test]
fn a_flood_of_commands_is_answered_and_holds_nobody_up() {
    let network = network();
    let (mut a, mut b) = (sender(&network), Multi::new(2, 2, DRIVER));
    b.plug(&network, b.all(), None);
    for _ in 0..60 {
        b.put_command(&[&PAIRS_SET, &2_u16.to_le_bytes()], 1);
    }
    // One kick for all of them.
    b.control().kick();
    assert_eq!((0..60).filter(|_| b.control().wait_used(PATIENCE).is_some()).count(), 60);
    assert_eq!(used(&mut a, &mut b), set([0, 1]));
}

#[test]
fn a_front_end_that_has_the_control_queue_starts_and_stops_pairs() {
    let network = network();
    let (mut a, mut b) = (sender(&network), Multi::new(2, 3, FULL | MQ));
    let port = b.plug(&network, 0..6, None);
    assert_eq!(used(&mut a, &mut b), set([0, 1, 2]));
    let stop = |index| network.stop_queue(port, index, std::time::Instant::now() + PATIENCE).unwrap();
    for index in [4, 5] {
        assert!(stop(index).is_some());
    }
    assert_eq!(used(&mut a, &mut b), set([0, 1]));
    network.start_queue(port, b.ring(4, None)).unwrap();
    assert_eq!(used(&mut a, &mut b), set([0, 1, 2]));
    // Who starts the control queue all the same finds nobody there.
    network.start_queue(port, b.ring(6, None)).unwrap();
    b.put_command(&[&PAIRS_SET, &1_u16.to_le_bytes()], 1);
    b.control().kick();
    assert!(b.control().wait_used(MOMENT).is_none());
    assert_eq!(stop(6).map(|state| state.next_avail), Some(0));
    assert_eq!(used(&mut a, &mut b), set([0, 1, 2]));
}

#[test]
fn a_driver_that_did_not_ask_for_several_pairs_has_one() {
    let network = network();
    let mut a = sender(&network);
    // Its control queue is the third, whatever the device could have (VirtIO 1.3 section 5.1.2).
    let mut b = Multi::new(2, 3, FULL | CTRL_VQ);
    b.plug(&network, 0..3, None);
    assert!(!b.set_pairs(1) && !b.set_pairs(2));
    assert_eq!(used(&mut a, &mut b), set([0]));

    let mut c = Multi::new(3, 3, FULL);
    c.plug(&network, 0..6, None);
    assert_eq!(used(&mut a, &mut c), set([0]));
}

#[test]
fn a_card_that_comes_back_knows_how_many_pairs_are_used() {
    let mut b = Multi::new(2, 4, DRIVER);
    let area = InflightArea::create(9, queue::SIZE).unwrap().0;
    {
        let network = network();
        b.plug(&network, b.all(), Some(&area));
        assert!(b.set_pairs(3));
    }
    // The next process has nothing but the rings and the record of what is in flight.
    {
        let network = network();
        let mut a = sender(&network);
        b.plug(&network, b.all(), Some(&area));
        assert_eq!(used(&mut a, &mut b), set([0, 1, 2]));
    }
    // A command that was given while no card was there.
    b.put_command(&[&PAIRS_SET, &2_u16.to_le_bytes()], 1);
    {
        let network = network();
        let mut a = sender(&network);
        b.plug(&network, b.all(), Some(&area));
        assert!(b.control().wait_used(PATIENCE).is_some());
        assert_eq!(used(&mut a, &mut b), set([0, 1]));
    }
    // A record that says what cannot be is not believed.
    let mut control = b.ring(8, Some(&area));
    control.set_note(1 << 16 | 4);
    control.publish();
    drop(control);
    let network = network();
    let mut a = sender(&network);
    let port = b.plug(&network, b.all(), Some(&area));
    assert_eq!(used(&mut a, &mut b), set([0]));
    network.stop_queue(port, 8, std::time::Instant::now() + PATIENCE).unwrap();
}

#[test]
fn a_driver_begins_with_one_pair_again() {
    let network = network();
    let (mut a, mut b) = (sender(&network), Multi::new(2, 2, DRIVER));
    let area = InflightArea::create(5, queue::SIZE).unwrap().0;
    let port = b.plug(&network, b.all(), Some(&area));
    assert!(b.set_pairs(2));
    for index in b.all() {
        network.stop_queue(port, index, std::time::Instant::now() + PATIENCE).unwrap().unwrap();
    }
    // The front-end forgets the record when the driver resets the device.
    let area = InflightArea::create(5, queue::SIZE).unwrap().0;
    for index in b.all() {
        network.start_queue(port, b.ring(index, Some(&area))).unwrap();
    }
    assert_eq!(used(&mut a, &mut b), set([0]));
    assert!(b.set_pairs(2));
    assert_eq!(used(&mut a, &mut b), set([0, 1]));
}

#[test]
fn what_waits_in_a_queue_that_is_not_used_any_more_is_dropped() {
    let network = network();
    let (mut a, mut b) = (sender(&network), Multi::new(2, 2, DRIVER));
    b.plug(&network, b.all(), None);
    assert!(b.set_pairs(2));
    // More than there are buffers for, in both queues.
    for n in 0..16 {
        for flow in 0..FLOWS {
            a.send(&packet(a.mac, b.mac, flow, n));
        }
    }
    let sent = 16 * u64::from(FLOWS);
    let numbers = |b: &Multi, pair: usize| {
        let c = &b.shared[2 * pair].counters;
        (c.requests.get(), c.dropped.get())
    };
    card::retry(|| if a.shared[1].counters.requests.get() == sent { Ok(()) } else { Err("not yet") });
    assert_eq!((numbers(&b, 0), numbers(&b, 1)), ((200, 0), (200, 0)));
    assert!(b.set_pairs(1));
    let dropped = numbers(&b, 1).1;
    assert!(dropped > 0);
    let frames = b.receive((sent - dropped) as usize);
    assert_eq!(frames.iter().filter(|(pair, _)| *pair == 1).count(), 200);
    assert_eq!(frames.len() as u64 + dropped, sent);
    assert!(b.receives_nothing());
}

/// However many queues a device sends by, it has one device's turn.
#[test]
fn many_queues_are_no_larger_share() {
    const EACH: u16 = 250;
    let network = network();
    let (mut many, mut one) = (Multi::new(1, 4, DRIVER), Multi::new(2, 1, FULL));
    let mut sink = Multi::new(3, 1, FULL);
    many.plug(&network, many.all(), None);
    one.plug(&network, 0..2, None);
    sink.plug(&network, 0..2, None);
    let mut shared_turns = 0;
    for _ in 0..50 {
        for n in 0..EACH {
            for pair in 0..4 {
                assert!(many.put(pair, &frame(sink.mac, many.mac, n as u8, 50)));
            }
            assert!(one.put(0, &frame(sink.mac, one.mac, n as u8, 50)));
        }
        for pair in 0..4 {
            many.queues[2 * pair + 1].kick();
        }
        one.queues[1].kick();
        let frames = sink.receive(5 * usize::from(EACH));
        assert_eq!(frames.len(), 5 * usize::from(EACH));
        let of_one: Vec<_> = (0..).zip(&frames).filter(|(_, (_, f))| f[11] == 2).map(|(at, _)| at).collect();
        let between = of_one.windows(2).map(|w: &[usize]| w[1] - w[0] - 1).max().unwrap();
        assert!(between <= 64, "{between} frames of the other between two of this one");
        shared_turns += usize::from(between > 0);
        if shared_turns > 3 {
            return;
        }
    }
    panic!("the two never sent at the same time");
}

/// While a device waits for its limits, the queue that waits is not the only one that goes on.
#[test]
fn the_queues_of_a_limited_device_take_turns() {
    let network = network();
    let (mut a, mut sink) = (Multi::new(1, 2, DRIVER), Multi::new(3, 1, FULL));
    let port = a.plug(&network, a.all(), None);
    sink.plug(&network, 0..2, None);
    let limits = v1::NetLimits { packets_per_second_out: 2000, packets_burst_out: 10, ..Default::default() };
    network.limit(port, NetLimits::new(Some(&limits)).unwrap(), Arc::default()).unwrap();
    let (many, few) = (frame(sink.mac, a.mac, 1, 50), frame(sink.mac, a.mac, 2, 50));
    for n in 0..250 {
        assert!(a.put(0, &many) && (n >= 50 || a.put(1, &few)));
    }
    for queue in [1, 3] {
        a.queues[queue].kick();
    }
    let frames = sink.receive(300);
    assert_eq!(frames.len(), 300);
    let last = frames.iter().rposition(|(_, f)| *f == few).unwrap();
    assert!(last < 200, "the 50 frames of one queue came up to number {last}, behind the other's");
}
