//! The network: two guests, and this test as the other station.

use crate::vm::{Vm, accels, counted, field, one};
use guest::frame::{self, Flow, Mac, Protocol, Received};
use guest::payload::{Header, Kind};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

/// Arguments of a network card whose wire is a pair of datagram sockets.
fn wire(dir: &Path, mine: &str, other: &str, mac: &str) -> Vec<String> {
    let (mine, other) = (dir.join(mine), dir.join(other));
    let netdev = format!(
        "dgram,id=n0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        mine.display(),
        other.display()
    );
    let device = format!("virtio-net-pci,netdev=n0,disable-legacy=on,romfile=,mac={mac}");
    ["-M", "q35", "-netdev", &netdev, "-device", &device].map(str::to_owned).to_vec()
}

#[test]
fn two_guests_exchange_frames() {
    for (accel, dir) in accels() {
        for mode in ["poll", "irq"] {
            let job = |me: u8, peer: u8| {
                format!(
                    "end=triple job=net-exchange wait=serial count=1000 size=900 ip=10.0.0.{me} peer=10.0.0.{peer} mode={mode}"
                )
            };
            let mut first = Vm::start(accel, &wire(dir.path(), "a", "b", "52:54:00:00:00:01"), &job(1, 2));
            let mut second = Vm::start(accel, &wire(dir.path(), "b", "a", "52:54:00:00:00:02"), &job(2, 1));
            // Neither speaks before the other's socket is there.
            let before = [first.until("waiting"), second.until("waiting")];
            first.send(b"\n");
            second.send(b"\n");
            for (vm, mut events) in [first, second].into_iter().zip(before) {
                events.extend(vm.run());
                let result = one(&events, "result");
                assert_eq!((&result["ok"], field(result, "rx")), (&true.into(), 1000), "{result}");
                assert_eq!((field(result, "corrupt"), field(result, "bad_csum")), (0, 0), "{result}");
            }
        }
    }
}

const HOST: Mac = Mac([2, 0, 0, 0, 0, 9]);
const GUEST: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
const TO_GUEST: Flow = Flow {
    source_mac: HOST,
    target_mac: GUEST,
    source: [10, 0, 0, 9],
    target: [10, 0, 0, 1],
    source_port: 5555,
    target_port: 9000,
};

/// The host's end of a wire: this test is the other station.
struct Wire {
    socket: UnixDatagram,
    guest: std::path::PathBuf,
}

impl Wire {
    fn new(dir: &Path) -> Self {
        let path = dir.join("host");
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(path).expect("socket");
        socket.set_read_timeout(Some(Duration::from_millis(200))).expect("timeout");
        Self { socket, guest: dir.join("guest") }
    }

    /// Sends a frame and waits for one that `wanted` accepts, again and again: the guest may not listen yet.
    fn ask<T>(&self, frame: &[u8], wanted: impl Fn(&[u8]) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            let _ = self.socket.send_to(frame, &self.guest);
            if let Some(found) = self.next().and_then(|frame| wanted(&frame)) {
                return found;
            }
        }
        panic!("no answer from the guest");
    }

    fn next(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 2048];
        let len = self.socket.recv(&mut frame).ok()?;
        frame.truncate(len);
        Some(frame)
    }
}

#[test]
fn the_host_can_talk_to_an_echo() {
    for (accel, dir) in accels() {
        let wire_end = Wire::new(dir.path());
        let args = wire(dir.path(), "guest", "host", "52:54:00:00:00:01");
        let _vm = Vm::start(accel, &args, "job=net-echo ip=10.0.0.1");

        let mut arp = [0; frame::ARP_LEN];
        frame::arp(&mut arp, HOST, [10, 0, 0, 9], [10, 0, 0, 1], None);
        let mac = wire_end.ask(&arp, |frame| match frame::parse(frame, false) {
            Received::ArpReply { mac, ip: [10, 0, 0, 1] } => Some(mac),
            _ => None,
        });
        assert_eq!(mac, GUEST);

        let mut ping = vec![0; 60];
        frame::datagram(&mut ping, &TO_GUEST, Protocol::Udp, 18, false);
        // From a datagram to an echo request: protocol 1, its checksum, type 8, checksum.
        ping[23] = 1;
        let word = u16::from_be_bytes([ping[24], ping[25]]) + 16;
        ping[24..26].copy_from_slice(&word.to_be_bytes());
        ping[34..].fill(0);
        ping[34] = 8;
        ping[36] = 0xf7;
        ping[37] = 0xff;
        wire_end.ask(&ping, |frame| (frame.len() >= 42 && frame[23] == 1 && frame[34] == 0).then_some(()));

        let mut request = vec![0; frame::UDP_OVERHEAD + 5];
        request[frame::UDP_OVERHEAD..].copy_from_slice(b"hello");
        frame::datagram(&mut request, &TO_GUEST, Protocol::Udp, 5, false);
        let back = wire_end.ask(&request, |frame| match frame::parse(frame, false) {
            Received::Datagram { flow, payload: b"hello", checksum_ok: true, .. } => Some(flow),
            _ => None,
        });
        assert_eq!(back, TO_GUEST.reversed(GUEST));
    }
}

#[test]
fn a_receiver_counts_what_is_wrong() {
    for (accel, dir) in accels() {
        let wire_end = Wire::new(dir.path());
        let args = wire(dir.path(), "guest", "host", "52:54:00:00:00:01");
        let job = "end=triple job=net-recv ip=10.0.0.1 count=4 timeout=20 wait=serial";
        let mut vm = Vm::start(accel, &args, job);
        vm.until("waiting");
        vm.send(b"\n");
        vm.until("io_begin");
        std::thread::sleep(Duration::from_millis(100));
        // Frames 0, 2 (1 is lost), 3 with a byte of its pattern wrong under a right checksum, 4 with a wrong checksum, 5.
        for (sequence, damage) in [(0, 0), (2, 0), (3, 1), (4, 2), (5, 0)] {
            let header = Header { kind: Kind::Data, finished: false, sequence, acknowledged: 0 };
            let mut frame = vec![0; frame::UDP_OVERHEAD + 200];
            header.write(1, &mut frame[frame::UDP_OVERHEAD..]);
            if damage == 1 {
                frame[frame::UDP_OVERHEAD + 100] ^= 1;
            }
            frame::datagram(&mut frame, &TO_GUEST, Protocol::Udp, 200, false);
            if damage == 2 {
                frame[frame::UDP_OVERHEAD + 100] ^= 1;
            }
            wire_end.socket.send_to(&frame, &wire_end.guest).expect("send");
        }
        let events = vm.run();
        let result = one(&events, "result");
        assert_eq!(result["ok"], false, "{result}");
        let counts = ["rx", "corrupt", "bad_csum", "lost"].map(|key| field(result, key));
        assert_eq!(counts, [3, 1, 1, 3], "{result}");
    }
}

#[test]
fn round_trips_are_timed() {
    for (accel, dir) in accels() {
        let echo = wire(dir.path(), "a", "b", "52:54:00:00:00:01");
        let ping = wire(dir.path(), "b", "a", "52:54:00:00:00:02");
        let echo = Vm::start(accel, &echo, "end=triple job=net-echo ip=10.0.0.1 count=200 secs=30 mode=irq");
        let job = "end=triple job=net-pingpong ip=10.0.0.2 peer=10.0.0.1 count=200 hist=1";
        let events = Vm::start(accel, &ping, job).run();
        let result = one(&events, "result");
        assert_eq!((&result["ok"], field(result, "round_trips")), (&true.into(), 200), "{result}");
        assert!(
            field(result, "p50_ns") > 0 && field(result, "p50_ns") <= field(result, "max_ns"),
            "{result}"
        );
        assert_eq!(counted(result), 200, "{result}");
        assert_eq!(one(&echo.run(), "result")["ok"], true);
    }
}

#[test]
fn a_missing_peer_is_a_failure() {
    for (accel, dir) in accels() {
        let _wire = Wire::new(dir.path());
        let args = wire(dir.path(), "guest", "host", "52:54:00:00:00:01");
        let job = "end=triple job=net-exchange ip=10.0.0.1 peer=10.0.0.9 timeout=0.5 mode=irq";
        let events = Vm::start(accel, &args, job).run();
        let result = one(&events, "result");
        assert_eq!((&result["ok"], &result["timed_out"]), (&false.into(), &true.into()), "{result}");
    }
}

#[test]
fn a_stream_is_measured_after_its_warm_up() {
    for (accel, dir) in accels() {
        let receiver = wire(dir.path(), "a", "b", "52:54:00:00:00:01");
        let sender = wire(dir.path(), "b", "a", "52:54:00:00:00:02");
        let job = "end=triple job=net-recv ip=10.0.0.1 warmup=0.2 secs=0.5 timeout=60 wait=serial mode=irq";
        let mut receiver = Vm::start(accel, &receiver, job);
        receiver.until("waiting");
        receiver.send(b"\n");
        receiver.until("io_begin");
        let job = "end=triple job=net-send ip=10.0.0.2 peer=10.0.0.1 rate=2000 warmup=0.2 secs=2 size=100";
        let sent = Vm::start(accel, &sender, job).run();
        let received = receiver.run();
        for result in [one(&sent, "result"), one(&received, "result")] {
            assert_eq!(result["ok"], true, "{result}");
            let ops = field(result, "ops");
            assert!(ops > 0 && ops < field(result, "total_ops"), "{result}");
            assert_eq!(field(result, "bytes"), 100 * ops, "{result}");
        }
        for (result, key) in [(one(&sent, "result"), "kicks"), (one(&received, "result"), "irqs")] {
            let (part, whole) = (field(result, key), field(result, &format!("total_{key}")));
            assert!(part > 0 && part < whole, "{key}: {result}");
        }
        let measured = field(one(&received, "result"), "measured_us");
        assert!((1..=550_000).contains(&measured), "{received:#?}");
    }
}
