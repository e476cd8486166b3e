//! What limits of an interface do: frames from it wait, frames to it are dropped, and nobody else notices.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use offload_card::poll::{PollMode, PollPolicy};
use offload_card::qos::NetLimits;
use offload_net::frame::header::VnetHeader;
use offload_net::network::Network;
use offload_net::network::allowance::Exceeded;
use offload_net::network::uplink::Uplink;
use offload_net::switch::PortId;
use proto::error::{Error, ErrorReason};
use proto::v1;
use proto::v1::device_spec::Kind;

fn network(mode: PollMode) -> Network {
    let policy = PollPolicy { mode, ..PollPolicy::default() };
    Network::start("test", 1500, None, Uplink::None, policy).unwrap()
}

struct Member {
    guest: Guest,
    port: PortId,
    exceeded: Arc<Exceeded>,
}

impl Member {
    fn new(network: &Network, last: u8) -> Self {
        let mut guest = Guest::new(last, FULL);
        guest.fill_rx(250, 2048);
        let port = guest.plug(network);
        Self { guest, port, exceeded: Arc::default() }
    }

    fn limit(&self, network: &Network, limits: v1::NetLimits) {
        network.limit(self.port, NetLimits::new(Some(&limits)).unwrap(), self.exceeded.clone()).unwrap();
    }

    fn exceeded(&self) -> v1::NetAllowances {
        self.exceeded.message()
    }
}

/// Frames that arrive in so much time while the sender has always more; and how long that took.
fn flood(from: &mut Guest, to: &mut Guest, payload: usize, time: Duration) -> (u64, Duration) {
    let f = frame(to.mac, from.mac, 1, payload);
    let begin = Instant::now();
    let mut got = 0;
    let mut last = begin;
    std::thread::scope(|s| {
        let sender = s.spawn(|| {
            while begin.elapsed() < time {
                from.send(&f);
            }
        });
        while !sender.is_finished() {
            while to.receive_within(Duration::from_millis(20)).is_some() {
                let now = Instant::now();
                if now.duration_since(begin) <= time {
                    got += 1;
                    last = now;
                }
            }
        }
    });
    (got, last.duration_since(begin))
}

#[test]
fn what_a_guest_sends_waits_and_is_exact() {
    for mode in [PollMode::Never, PollMode::Adaptive, PollMode::Always] {
        let network = network(mode);
        let (mut a, mut b) = (Member::new(&network, 1), Member::new(&network, 2));
        // A frame of 1000 bytes is 8000 bits: 1000 of them per second, and 100 at once, which is how long a busy machine
        // may keep the thread from its work without a loss.
        let limits =
            v1::NetLimits { bits_per_second_out: 8_000_000, bits_burst_out: 800_000, ..Default::default() };
        a.limit(&network, limits);
        let second = Duration::from_secs(1);
        let (got, took) = flood(&mut a.guest, &mut b.guest, 1000 - 14, second);
        let expected = took.as_secs_f64() * 1000.0 + 100.0;
        assert!((got as f64 - expected).abs() <= expected / 100.0, "{mode:?}: {got} frames in {took:?}");
        let counters = &a.guest.shared[1].counters;
        let exceeded = a.exceeded();
        assert!(exceeded.bw_out_allowance_exceeded > 0, "{exceeded:?}");
        assert_eq!(counters.throttled.get(), exceeded.bw_out_allowance_exceeded);
        assert!(counters.throttled_ns.get() > 500_000_000);
        // Nothing that it sent was lost, and nobody polled for it.
        assert_eq!((counters.dropped.get(), b.guest.shared[0].counters.dropped.get()), (0, 0));
        assert_eq!((exceeded.bw_in_allowance_exceeded, exceeded.pps_allowance_exceeded), (0, 0));
    }
}

#[test]
fn what_a_guest_is_sent_beyond_its_limits_is_dropped_and_the_sender_does_not_wait() {
    let network = network(PollMode::default());
    let (mut a, mut b) = (Member::new(&network, 1), Member::new(&network, 2));
    let mut c = Member::new(&network, 3);
    b.limit(&network, v1::NetLimits { packets_per_second_in: 1, packets_burst_in: 20, ..Default::default() });
    let (to_b, to_c) = (frame(b.guest.mac, a.guest.mac, 1, 60), frame(c.guest.mac, a.guest.mac, 2, 60));
    for _ in 0..100 {
        a.guest.send(&to_b);
        a.guest.send(&to_c);
    }
    for _ in 0..100 {
        assert_eq!(c.guest.receive().unwrap().1, to_c);
    }
    let got = std::iter::from_fn(|| b.guest.receive_within(MOMENT)).count() as u64;
    // A slow machine may have taken a second or two.
    assert!((20..25).contains(&got), "{got}");
    assert_eq!(b.exceeded().pps_allowance_exceeded, 100 - got);
    assert_eq!(b.guest.shared[0].counters.dropped.get(), 100 - got);
    // The sender is not told of it.
    assert_eq!(a.guest.shared[1].counters.dropped.get(), 0);
    assert_eq!(a.exceeded(), v1::NetAllowances::default());
}

#[test]
fn a_super_frame_is_paid_for_as_the_packets_it_stands_for() {
    let network = network(PollMode::default());
    let (mut a, b) = (Member::new(&network, 1), Member::new(&network, 2));
    a.limit(
        &network,
        v1::NetLimits { packets_per_second_out: 10, packets_burst_out: 50, ..Default::default() },
    );
    let payload = vec![5; 45 * 1000];
    let (header, f) = tcp4_super((b.guest.mac, a.guest.mac), &payload, 1000);
    // 45 packets, then 45 more, of which the burst allows the first: 40 are owed, and the next waits for 4 seconds.
    let begin = Instant::now();
    let mut receiver = b;
    for _ in 0..2 {
        a.guest.send_pieces(&header, &f, usize::MAX);
        assert_eq!(receiver.guest.receive().unwrap().1.len(), f.len());
    }
    assert!(begin.elapsed() < Duration::from_secs(1));
    a.guest.send(&frame(receiver.guest.mac, a.guest.mac, 1, 60));
    assert!(receiver.guest.receives_nothing());
    assert_eq!(a.exceeded().pps_allowance_exceeded, 1);
    // Other limits, and it goes at once.
    let slow = begin.elapsed() > Duration::from_secs(3);
    a.limit(&network, v1::NetLimits::default());
    assert!(receiver.guest.receive().is_some() && !slow);
    assert!(begin.elapsed() < Duration::from_secs(4));
}

#[test]
fn a_limited_guest_delays_no_other() {
    let network = network(PollMode::Never);
    let (mut slow, mut a, mut b) =
        (Member::new(&network, 1), Member::new(&network, 2), Member::new(&network, 3));
    slow.limit(&network, v1::NetLimits { bits_per_second_out: 32_768, ..Default::default() });
    // As much as fits into its ring waits there, at 4 kB per second.
    let f = frame(b.guest.mac, slow.guest.mac, 9, 1500);
    for _ in 0..200 {
        slow.guest.send_pieces(&VnetHeader::default(), &f, usize::MAX);
    }
    let to_b = frame(b.guest.mac, a.guest.mac, 1, 60);
    let begin = Instant::now();
    for i in 0..1000 {
        a.guest.send(&to_b);
        loop {
            let (_, got) = b.guest.receive().unwrap();
            if got == to_b {
                break;
            }
            assert_eq!(got, f, "in round {i}");
        }
    }
    // A frame of the limited one takes 370 ms.
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    assert!(slow.exceeded().bw_out_allowance_exceeded < 50, "{:?}", slow.exceeded());
}

#[test]
fn a_device_that_waits_can_be_stopped_and_unplugged() {
    let network = network(PollMode::default());
    let (mut a, b) = (Member::new(&network, 1), Member::new(&network, 2));
    a.limit(
        &network,
        v1::NetLimits { packets_per_second_out: 1, packets_burst_out: 1, ..Default::default() },
    );
    for i in 0..10 {
        a.guest.send(&frame(b.guest.mac, a.guest.mac, i, 60));
    }
    card::retry(|| if a.exceeded().pps_allowance_exceeded > 0 { Ok(()) } else { Err("does not wait") });
    let soon = Instant::now() + PATIENCE;
    for index in [0, 1] {
        assert!(network.stop_queue(a.port, index, soon).unwrap().is_some());
    }
    network.unplug(a.port);
    // Its place is another's now, which has no limits.
    let mut c = Member::new(&network, 3);
    assert_eq!(c.port, a.port);
    let mut b = b;
    while b.guest.receive_within(MOMENT).is_some() {}
    for i in 0..10 {
        c.guest.send(&frame(b.guest.mac, c.guest.mac, i, 60));
        assert!(b.guest.receive_within(Duration::from_millis(500)).is_some());
    }
}

#[tokio::test]
async fn a_card_keeps_limits_tells_what_they_did_and_takes_new_ones() {
    let directory = tempfile::tempdir().unwrap();
    let card = card::Card::start(directory.path());
    let spec = v1::NetworkSpec { id: "n".to_owned(), ..Default::default() };
    let create = v1::CreateNetworkRequest { spec: Some(spec), ..Default::default() };
    card.networks().await.create_network(create).await.unwrap();
    let mut a = Guest::new(1, FULL);
    let first = v1::NetLimits { packets_per_second_out: 1_000_000, ..Default::default() };
    let net = v1::NetDeviceSpec { network: "n".into(), mac: a.mac.to_vec(), ..Default::default() };
    let spec = v1::DeviceSpec {
        id: "a".into(),
        kind: Some(Kind::Net(net)),
        net_limits: Some(first),
        ..Default::default()
    };
    let create = v1::CreateDeviceRequest { spec: Some(spec), ..Default::default() };
    let mut devices = card.devices().await;
    devices.create_device(create).await.unwrap();

    // A disk's limits are none of its kind, and change nothing.
    let of_disk = v1::DeviceLimits { operations_per_second: 5, ..Default::default() };
    for net_limits in [None, Some(first)] {
        let set = v1::SetLimitsRequest { id: "a".into(), limits: Some(of_disk), net_limits };
        let e = Error::from(devices.set_limits(set).await.unwrap_err());
        assert_eq!(e.reason(), ErrorReason::Unsupported, "{e}");
    }
    let bad = v1::NetLimits { bits_per_second_out: 1, ..Default::default() };
    let set =
        |net_limits| v1::SetLimitsRequest { id: "a".into(), limits: None, net_limits: Some(net_limits) };
    let e = Error::from(devices.set_limits(set(bad)).await.unwrap_err());
    assert_eq!(e.reason(), ErrorReason::InvalidField, "{e}");
    let slow = v1::NetLimits { packets_per_second_out: 1, packets_burst_out: 2, ..Default::default() };
    let device = devices.set_limits(set(slow)).await.unwrap().into_inner();
    assert_eq!(device.spec.and_then(|s| s.net_limits), Some(slow));

    card.kill();
    let card = card::Card::start(directory.path());
    let mut devices = card.devices().await;
    let list = devices.list_devices(v1::ListDevicesRequest {}).await.unwrap().into_inner().devices;
    assert_eq!(list[0].spec.as_ref().and_then(|s| s.net_limits), Some(slow));
    let _link = a.connect(&card.socket("a"));
    for i in 0..10 {
        a.send(&frame([0x52, 0x54, 0, 0, 0, 9], a.mac, i, 60));
    }
    let begin = Instant::now();
    loop {
        let (queue, allowances) = stats(&card).await;
        if allowances.pps_allowance_exceeded > 0 {
            assert_eq!(allowances.bw_out_allowance_exceeded, 0);
            assert!(queue.requests < 10 && queue.throttled > 0, "{queue:?}");
            break;
        }
        assert!(begin.elapsed() < PATIENCE);
    }
    // The rest goes as soon as it may.
    devices.set_limits(set(v1::NetLimits::default())).await.unwrap();
    while stats(&card).await.0.requests < 10 {
        assert!(begin.elapsed() < PATIENCE);
    }
}

/// Of the transmit queue of device "a", and what its limits did.
async fn stats(card: &card::Card) -> (v1::QueueStats, v1::NetAllowances) {
    let request = v1::GetCardStatsRequest { device_id: "a".into() };
    let stats = card.devices().await.get_stats(request).await.unwrap().into_inner().devices.swap_remove(0);
    (stats.queues[1].clone(), stats.allowances.expect("a network device's"))
}
