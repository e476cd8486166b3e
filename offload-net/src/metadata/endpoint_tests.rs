use std::collections::VecDeque;

use proptest::prelude::*;
use proto::v1::NetworkSpec;
use smoltcp::wire::IpEndpoint;

use super::*;
use crate::frame::ETH_HEADER;
use crate::mac::MacAddr;
use crate::metadata::Endpoints;

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 7]);

/// A guest's TCP on one side, the service on the other, and the time as the test says.
struct Test {
    service: Endpoints,
    interface: Interface,
    subnet: Subnet,
    stack: Stack,
    sockets: SocketSet<'static>,
    to_guest: VecDeque<Vec<u8>>,
    frames: Frames,
    epoch: Instant,
    now: Instant,
    /// Packets that the service has refused.
    refused: usize,
    port: u16,
}

impl Test {
    fn new(edit: impl FnOnce(&mut Metadata)) -> Self {
        let spec = NetworkSpec {
            id: "n".to_owned(),
            ipv4_prefix: "10.88.0.0/24".to_owned(),
            ipv6_prefix: "fd00:88::/64".to_owned(),
            ..Default::default()
        };
        let mut metadata = Metadata { instance_id: "i-1".to_owned(), ..Default::default() };
        metadata.tokens_optional = true;
        edit(&mut metadata);
        let mut interface = Interface { metadata: Some(Arc::new(metadata)), ..Interface::plain(MAC) };
        interface.ipv4 = vec![[10, 88, 0, 7].into()];
        interface.ipv6 = vec!["fd00:88::7".parse().unwrap()];
        let mut frames = Frames::new(MAC, MAC);
        let mut wire = Wire { packet: None, frames: &mut frames, mtu: 1500 };
        let mut stack = Stack::new(Config::new(HardwareAddress::Ip), &mut wire, time::Instant::ZERO);
        stack.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(interface.ipv4[0].into(), 24)).unwrap();
            addresses.push(IpCidr::new(interface.ipv6[0].into(), 64)).unwrap();
        });
        stack.routes_mut().add_default_ipv4_route([10, 88, 0, 1].into()).unwrap();
        stack.routes_mut().add_default_ipv6_route("fd00:88::1".parse().unwrap()).unwrap();
        let now = Instant::now();
        Self {
            service: Endpoints::default(),
            interface,
            subnet: Subnet::check(&spec, 1500, &[]).unwrap().unwrap(),
            stack,
            sockets: SocketSet::new(Vec::new()),
            to_guest: VecDeque::new(),
            frames,
            epoch: now,
            now,
            refused: 0,
            port: 49152,
        }
    }

    /// Both sides do what they can, until neither has more to do.
    fn run(&mut self) {
        loop {
            let clock = time::Instant::from_micros((self.now - self.epoch).as_micros() as i64);
            let packet = self.to_guest.pop_front();
            let mut wire = Wire { packet: packet.as_deref(), frames: &mut self.frames, mtu: 1500 };
            self.stack.poll(clock, &mut wire, &mut self.sockets);
            let idle = packet.is_none() && self.frames.is_empty();
            let mut sent = Vec::new();
            self.frames.drain(|f| sent.push(f[ETH_HEADER..].to_vec()));
            for packet in sent {
                self.send(&packet);
            }
            if idle {
                return;
            }
        }
    }

    fn send(&mut self, packet: &[u8]) {
        let taken = self.service.receive(&self.interface, &self.subnet, packet, self.now);
        self.refused += usize::from(taken == Err(DropReason::LinkLocalAllowance));
        if let Some(frames) = self.service.frames(MAC) {
            frames.drain(|f| self.to_guest.push_back(checked(f)));
        }
    }

    /// Time passes, and the service does what is due.
    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.service.tend(&self.subnet, self.now, |mac, frames| {
            assert_eq!(mac, MAC);
            frames.drain(|f| self.to_guest.push_back(checked(f)));
        });
        self.run();
    }

    fn connect(&mut self, to: impl Into<IpEndpoint>) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 65536]);
        let mut socket = Socket::new(buffer(), buffer());
        self.port += 1;
        socket.connect(self.stack.context(), to.into(), self.port).unwrap();
        let handle = self.sockets.add(socket);
        self.run();
        handle
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn say(&mut self, handle: SocketHandle, bytes: &[u8]) {
        assert_eq!(self.socket(handle).send_slice(bytes), Ok(bytes.len()));
        self.run();
    }

    fn hear(&mut self, handle: SocketHandle) -> String {
        let mut text = Vec::new();
        while self.socket(handle).can_recv() {
            self.socket(handle).recv(|b| (b.len(), text.extend_from_slice(b))).unwrap();
            self.run();
        }
        String::from_utf8(text).unwrap()
    }

    /// As `curl` does.
    fn get(&mut self, path: &str) -> String {
        let handle = self.connect((ADDRESS_V4, 80));
        self.say(handle, format!("GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n").as_bytes());
        let answer = self.hear(handle);
        self.socket(handle).close();
        self.run();
        answer
    }

    fn connections(&self) -> usize {
        let engine = self.service.by_mac.get(&MAC).and_then(|e| e.engine.as_ref());
        engine.map_or(0, |e| e.connections.len())
    }
}

/// What goes to a guest goes no further, and has a header that says so truly.
fn checked(frame: &[u8]) -> Vec<u8> {
    let packet = &frame[ETH_HEADER..];
    assert_eq!((&frame[..6], packet.len() <= 1500), (&MAC.0[..], true));
    match (frame[12], packet[0]) {
        (0x08, 0x45) => {
            let mut sum = crate::frame::checksum::Sum::new();
            sum.add(&packet[..20]);
            assert_eq!((packet[8], sum.finish()), (1, 0));
        }
        (0x86, 0x60) => assert_eq!(packet[7], 1),
        other => panic!("{other:?}"),
    }
    packet.to_vec()
}

const GET: &[u8] = b"GET /latest/meta-data/instance-id HTTP/1.1\r\n\r\n";

#[test]
fn a_guest_is_answered_over_both_protocols_as_often_as_it_asks() {
    let mut t = Test::new(|_| {});
    for to in [IpEndpoint::from((ADDRESS_V4, 80)), (ADDRESS_V6, 80).into()] {
        let handle = t.connect(to);
        for _ in 0..20 {
            t.say(handle, GET);
            assert!(t.hear(handle).ends_with("\r\n\r\ni-1"));
        }
        // Two at once, and one in pieces.
        t.say(handle, &GET.repeat(2));
        assert_eq!(t.hear(handle).matches("200 OK").count(), 2);
        let (one, two) = GET.split_at(9);
        t.say(handle, one);
        assert_eq!(t.hear(handle), "");
        t.say(handle, two);
        assert!(t.hear(handle).ends_with("i-1"));
        t.socket(handle).close();
        t.run();
    }
    // More connections, one after the other, than there may be at a time, without a pause in between.
    for _ in 0..5 * CONNECTIONS_MAX {
        assert!(t.get("/latest/meta-data/mac").ends_with("52:54:00:00:00:07"));
    }
    assert_eq!((t.connections(), t.refused), (0, 0));
}

#[test]
fn a_large_answer_arrives_whole() {
    let data: Vec<u8> = (0..16384_u32).map(|i| b'a' + (i % 23) as u8).collect();
    let mut t = Test::new(|m| m.user_data = data.clone());
    let answer = t.get("/latest/user-data");
    assert!(answer.contains("Content-Length: 16384\r\n") && answer.as_bytes().ends_with(&data));
}

#[test]
fn another_port_refuses() {
    let mut t = Test::new(|_| {});
    let handle = t.connect((ADDRESS_V4, 81));
    assert_eq!(t.socket(handle).state(), State::Closed);
}

#[test]
fn connections_are_bounded_and_those_that_only_stay_are_ended() {
    let mut t = Test::new(|_| {});
    let all: Vec<_> = (0..=CONNECTIONS_MAX).map(|_| t.connect((ADDRESS_V4, 80))).collect();
    let state = |t: &mut Test, i: usize| t.socket(all[i]).state();
    assert_eq!((state(&mut t, 0), state(&mut t, CONNECTIONS_MAX)), (State::Established, State::Closed));
    // One asks, one has half a question, the others say nothing.
    t.say(all[0], GET);
    t.say(all[1], b"GET /");
    t.pass(PATIENCE / 2);
    t.say(all[0], GET);
    t.pass(PATIENCE / 2);
    assert_eq!((state(&mut t, 0), state(&mut t, 1)), (State::Established, State::Closed));
    assert_eq!(state(&mut t, 2), State::CloseWait);
    // And if they do not even go then, they are dropped.
    t.pass(PATIENCE);
    assert_eq!((state(&mut t, 2), t.connections()), (State::Closed, 1));
    t.pass(PATIENCE);
    t.pass(PATIENCE);
    assert_eq!(t.connections(), 0);
    // What nobody uses is not kept.
    assert!(t.service.by_mac.is_empty() && t.service.next().is_none());
    assert!(t.get("/latest/meta-data/instance-id").ends_with("i-1"));
}

#[test]
fn an_answer_that_is_lost_is_sent_again() {
    let mut t = Test::new(|_| {});
    let handle = t.connect((ADDRESS_V4, 80));
    t.socket(handle).send_slice(GET).unwrap();
    let clock = time::Instant::from_micros((t.now - t.epoch).as_micros() as i64);
    let mut wire = Wire { packet: None, frames: &mut t.frames, mtu: 1500 };
    t.stack.poll(clock, &mut wire, &mut t.sockets);
    let mut sent = Vec::new();
    t.frames.drain(|f| sent.push(f[ETH_HEADER..].to_vec()));
    t.send(&sent[0]);
    assert!(!t.to_guest.is_empty());
    t.to_guest.clear();
    let due = t.service.next().unwrap();
    assert!(due > t.now && due < t.now + Duration::from_secs(3));
    t.pass(due - t.now);
    assert!(t.hear(handle).ends_with("i-1"));
}

#[test]
fn more_packets_than_it_may_send_in_a_second_are_refused() {
    let mut t = Test::new(|m| m.packets_per_second = 100);
    for _ in 0..100 {
        // As large as may come, and no packet of any protocol.
        t.send(&[0x45; 4096]);
    }
    assert_eq!(t.refused, 0);
    t.send(&[0x45; 40]);
    assert_eq!(t.refused, 1);
    t.pass(Duration::from_secs(1));
    assert!(t.get("/latest/meta-data/instance-id").ends_with("i-1"));
}

#[test]
fn tokens_outlive_connections_and_nothing_else_does() {
    let mut t = Test::new(|m| m.tokens_optional = false);
    let handle = t.connect((ADDRESS_V4, 80));
    t.say(handle, b"PUT /latest/api/token HTTP/1.0\r\nX-aws-ec2-metadata-token-ttl-seconds: 100\r\n\r\n");
    let token = t.hear(handle).rsplit("\r\n\r\n").next().unwrap().to_owned();
    t.socket(handle).close();
    t.run();
    t.pass(PATIENCE);
    let endpoint = t.service.by_mac.get(&MAC).unwrap();
    assert!(endpoint.engine.is_none());
    let get = |t: &mut Test| {
        let handle = t.connect((ADDRESS_V4, 80));
        t.say(
            handle,
            format!("GET /latest HTTP/1.0\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n").as_bytes(),
        );
        let answer = t.hear(handle);
        t.socket(handle).close();
        t.run();
        answer[9..12].to_owned()
    };
    assert_eq!(get(&mut t), "200");
    t.now += Duration::from_secs(90);
    assert_eq!(get(&mut t), "401");
    t.pass(PATIENCE);
    assert!(t.service.by_mac.is_empty());
}

proptest! {
    /// Whatever packets come, the service lives, what it sends is right, and it is not due again and again.
    #[test]
    fn any_packets_are_borne(
        packets in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 0..120), 0..3_u8, any::<u8>(), 0..20_u64), 0..30,
        ),
    ) {
        let mut t = Test::new(|_| {});
        for (mut p, kind, flags, wait) in packets {
            if p.len() >= 60 && kind > 0 {
                if kind == 1 {
                    p[..4].copy_from_slice(&[0x45, 0, 0, 0]);
                    let len = (p.len() as u16).to_be_bytes();
                    p[2..4].copy_from_slice(&len);
                    (p[6], p[7], p[8], p[9]) = (0, 0, 64, 6);
                    p[12..16].copy_from_slice(&[10, 88, 0, 7]);
                    p[16..20].copy_from_slice(&ADDRESS_V4.octets());
                    (p[22], p[23], p[32], p[33]) = (0, 80, 0x50, flags);
                } else {
                    p[0] = 0x60;
                    let len = (p.len() as u16 - 40).to_be_bytes();
                    p[4..6].copy_from_slice(&len);
                    p[6] = 6;
                    p[8..24].copy_from_slice(&t.interface.ipv6[0].octets());
                    p[24..40].copy_from_slice(&ADDRESS_V6.octets());
                    (p[42], p[43], p[52], p[53]) = (0, 80, 0x50, flags);
                }
            }
            t.send(&p);
            prop_assert!(t.connections() <= CONNECTIONS_MAX);
            t.to_guest.clear();
            t.pass(Duration::from_secs(wait));
            // Once more, if there were frames to be sent first.
            t.pass(Duration::ZERO);
            if let Some(next) = t.service.next() {
                prop_assert!(next > t.now);
            }
        }
    }
}
