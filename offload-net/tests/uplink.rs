//! Security groups between a guest and the host, over a TAP: the host is one more peer, with no groups of its own. Needs root:
//! the test has a network namespace of its own.

mod common;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use common::card::{Card, Link};
use common::groups::{device, drops, everybody, group, make, rule, set, tcp_in};
use common::*;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};
use proto::v1::security_group_rule::Peer;
use proto::v1::{CreateNetworkRequest, NetDrops, NetworkSpec, RuleProtocol, TrafficDirection};

const HOST: [u8; 4] = [10, 0, 0, 1];
const OWN: [u8; 4] = [10, 0, 0, 11];
const SYN: u8 = 2;
const ACK: u8 = 16;
const FIN: u8 = 1;

/// A guest behind rules, and the host.
struct Pair {
    card: Card,
    guest: Guest,
    host_mac: [u8; 6],
    link: Option<Link>,
}

/// What arrives, as far as it is looked at: the protocol, its ports (of ICMP: type and code), and what is behind its header.
type Seen = (u8, (u16, u16), Vec<u8>);

impl Pair {
    async fn new(directory: &std::path::Path) -> Self {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let card = Card::start(directory);
        let spec = NetworkSpec {
            id: "lan".to_owned(),
            ipv4_prefix: "10.0.0.0/24".to_owned(),
            tap: "ob-uplink0".to_owned(),
            ..Default::default()
        };
        let create = CreateNetworkRequest { spec: Some(spec), ..Default::default() };
        card.networks().await.create_network(create).await.unwrap();
        let mut guest = Guest::new(OWN[3], BASE);
        let host_only = Peer::Prefix("10.0.0.1/32".to_owned());
        let rules = vec![
            tcp_in(80, host_only),
            rule(TrafficDirection::Ingress, RuleProtocol::Udp, 53, everybody()),
            rule(TrafficDirection::Egress, RuleProtocol::Udp, 9000, everybody()),
        ];
        set(&card, vec![group("web", rules)]).await.unwrap();
        make(&card, device("guest", &guest, &["web"])).await.unwrap();
        guest.fill_rx(100, 2048);
        let link = Some(guest.connect(&card.socket("guest")));
        let mut pair = Self { card, guest, host_mac: [0; 6], link };
        pair.host_mac = pair.find_host();
        pair
    }

    /// ARP is answered whatever the rules say.
    fn find_host(&mut self) -> [u8; 6] {
        let mut f = [BROADCAST, self.guest.mac].concat();
        f.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        f.extend(self.guest.mac);
        f.extend(OWN);
        f.extend([0; 6]);
        f.extend(HOST);
        self.guest.send(&f);
        let (_, f) = self.guest.receive().expect("the gateway answers");
        assert_eq!(f[20..22], [0, 2]);
        f[6..12].try_into().unwrap()
    }

    /// The next packet from the host.
    fn receive(&mut self) -> Seen {
        let (_, f) = self.guest.receive().expect("a packet comes");
        assert_eq!(
            (&f[..14], &f[26..34]),
            (&[&self.guest.mac[..], &self.host_mac, &[8, 0]].concat()[..], &[HOST, OWN].concat()[..])
        );
        let word = |at: usize| u16::from_be_bytes([f[at], f[at + 1]]);
        match f[23] {
            1 => (1, (f[34].into(), f[35].into()), f[42..].to_vec()),
            6 => (6, (word(34), word(36)), f[38..48].to_vec()),
            protocol => (protocol, (word(34), word(36)), f[42..].to_vec()),
        }
    }

    /// The next TCP segment with these flags and no others; a kernel that waits for an answer sends the one before again.
    fn receive_tcp(&mut self, flags: u8) -> ((u16, u16), Vec<u8>) {
        loop {
            let (protocol, ports, rest) = self.receive();
            assert_eq!((protocol, ports.1), (6, 80));
            if rest[9] == flags {
                return (ports, rest);
            }
        }
    }

    fn sends(&mut self, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
        let f = udp4((self.host_mac, self.guest.mac), (OWN, ports.0), (HOST, ports.1), payload, false);
        self.guest.send(&f);
        f
    }

    async fn drops(&self) -> NetDrops {
        drops(&self.card, "guest").await
    }
}

fn host_socket(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((std::net::Ipv4Addr::from(HOST), port)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn hears(socket: &UdpSocket) -> (Vec<u8>, u16) {
    let mut buf = [0; 2000];
    let (n, from) = socket.recv_from(&mut buf).expect("the host hears something");
    (buf[..n].to_vec(), from.port())
}

fn guest_at(port: u16) -> SocketAddr {
    (OWN, port).into()
}

#[tokio::test]
async fn the_rules_hold_between_a_guest_and_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let mut pair = Pair::new(dir.path()).await;
    let host = host_socket(7000);

    // To the guest: by the rule, and not; then the answer, and what answers nothing.
    host.send_to(b"denied", guest_at(54)).unwrap();
    host.send_to(b"allowed", guest_at(53)).unwrap();
    assert_eq!(pair.receive(), (17, (7000, 53), b"allowed".to_vec()));
    let denied_in = NetDrops { denied_in: 1, ..Default::default() };
    assert_eq!(pair.drops().await, denied_in);
    pair.sends((54, 7000), b"denied");
    pair.sends((53, 7001), b"denied");
    pair.sends((53, 7000), b"answer");
    assert_eq!(hears(&host), (b"answer".to_vec(), 53));
    assert_eq!(pair.drops().await, NetDrops { denied_out: 2, ..denied_in });

    // From the guest.
    let (open, shut) = (host_socket(9000), host_socket(9001));
    pair.sends((1000, 9001), b"denied");
    pair.sends((1000, 9000), b"allowed");
    assert_eq!(hears(&open), (b"allowed".to_vec(), 1000));
    assert_eq!(pair.drops().await, NetDrops { denied_out: 3, ..denied_in });
    open.send_to(b"answer", guest_at(1000)).unwrap();
    assert_eq!(pair.receive(), (17, (9000, 1000), b"answer".to_vec()));
    // From another port of the host it answers nothing.
    shut.send_to(b"denied", guest_at(1000)).unwrap();
    open.send_to(b"again", guest_at(1000)).unwrap();
    assert_eq!(pair.receive(), (17, (9000, 1000), b"again".to_vec()));
    assert_eq!(pair.drops().await, NetDrops { denied_in: 2, denied_out: 3, ..Default::default() });
    shut.set_nonblocking(true).unwrap();
    assert_eq!(shut.recv(&mut [0; 10]).unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[tokio::test]
async fn the_hosts_tcp_reaches_the_port_that_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let mut pair = Pair::new(dir.path()).await;
    let connect =
        |port, patience| std::thread::spawn(move || TcpStream::connect_timeout(&guest_at(port), patience));
    let denied = connect(81, 5 * MOMENT);
    let connected = connect(80, PATIENCE);
    let ((from, _), rest) = pair.receive_tcp(SYN);
    let sequence = u32::from_be_bytes(rest[..4].try_into().unwrap()).wrapping_add(1);
    let answer = |pair: &mut Pair, flags: u8| {
        let mut f = [pair.host_mac, pair.guest.mac].concat();
        f.extend([8, 0, 0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0]);
        f.extend([OWN, HOST].concat());
        let sum = internet_checksum(&f[14..34]);
        f[24..26].copy_from_slice(&sum.to_be_bytes());
        f.extend(80_u16.to_be_bytes().iter().chain(&from.to_be_bytes()));
        f.extend([0, 0, 0, 1].iter().chain(&sequence.to_be_bytes()));
        f.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        let pseudo = [&f[26..34], &[0, 6, 0, 20], &f[34..]].concat();
        let sum = internet_checksum(&pseudo);
        f[50..52].copy_from_slice(&sum.to_be_bytes());
        pair.guest.send(&f);
    };
    answer(&mut pair, SYN | ACK);
    let stream = connected.join().unwrap().expect("the host is connected");
    assert_eq!(pair.receive_tcp(ACK).0, (from, 80));
    assert!(denied.join().unwrap().is_err(), "nobody has heard of it");
    // As often as the kernel has tried.
    let drops = pair.drops().await;
    assert!(drops.denied_in >= 1, "{drops:?}");
    assert_eq!(drops, NetDrops { denied_in: drops.denied_in, ..Default::default() });
    drop(stream);
    assert_eq!(pair.receive_tcp(FIN | ACK).0, (from, 80));
}

#[tokio::test]
async fn the_hosts_icmp_errors_are_let_in_if_they_are_about_what_was_sent() {
    let dir = tempfile::tempdir().unwrap();
    let mut pair = Pair::new(dir.path()).await;
    // Nobody listens: the kernel says so, and no rule allows ICMP.
    let sent = pair.sends((1000, 9000), b"anybody?");
    let (protocol, kind, about) = pair.receive();
    assert_eq!((protocol, kind), (1, (3, 3)));
    assert_eq!((about[9], &about[12..24]), (17, &sent[26..38]), "it quotes what was sent");

    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), SockProtocol::Icmp).unwrap();
    let [a, b, c, d] = OWN;
    let says = |about: &[u8]| {
        let mut message = vec![3, 3, 0, 0, 0, 0, 0, 0];
        message.extend(&about[14..42]);
        let sum = internet_checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        sendto(raw.as_raw_fd(), &message, &SockaddrIn::new(a, b, c, d, 0), MsgFlags::empty()).unwrap();
    };
    let never = udp4((pair.host_mac, pair.guest.mac), (OWN, 1001), (HOST, 9000), b"anybody?", false);
    says(&never);
    says(&sent);
    let (protocol, kind, about) = pair.receive();
    assert_eq!((protocol, kind, &about[20..24]), (1, (3, 3), &sent[34..38]));
    assert_eq!(pair.drops().await, NetDrops { denied_in: 1, ..Default::default() });
}

#[tokio::test]
async fn a_killed_card_leaves_neither_the_connection_nor_the_rules() {
    let dir = tempfile::tempdir().unwrap();
    let mut pair = Pair::new(dir.path()).await;
    let host = host_socket(7000);
    host.send_to(b"allowed", guest_at(53)).unwrap();
    assert_eq!(pair.receive(), (17, (7000, 53), b"allowed".to_vec()));
    drop(pair.link.take());
    pair.card.kill();
    pair.card = Card::start(dir.path());
    pair.link = Some(pair.guest.connect(&pair.card.socket("guest")));
    pair.sends((53, 7001), b"denied");
    pair.sends((53, 7000), b"answer");
    assert_eq!(hears(&host), (b"answer".to_vec(), 53));
    host.send_to(b"denied", guest_at(54)).unwrap();
    host.send_to(b"again", guest_at(53)).unwrap();
    assert_eq!(pair.receive(), (17, (7000, 53), b"again".to_vec()));
    assert_eq!(pair.drops().await, NetDrops { denied_in: 1, denied_out: 1, ..Default::default() });
}
