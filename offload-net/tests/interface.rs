//! An interface of the host's as a network's uplink: one end of a veth pair, with a kernel that has the other. Needs root: each
//! test has a network namespace of its own.

mod common;

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Instant;

use common::card::{Card, Link as VhostLink, retry};
use common::*;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sched::{CloneFlags, unshare};
use offload_card::poll::PollPolicy;
use offload_net::frame::header::{self, VnetHeader};
use offload_net::frame::offload::{self, Allowed, Offloads};
use offload_net::frame::{Bytes, Frame, HEAD_MAX, Memory};
use offload_net::host::packet::PacketSocket;
use offload_net::mac::MacAddr;
use offload_net::network::Network;
use offload_net::network::uplink::{Uplink, UplinkSpec};
use offload_net::subnet::{Interface, Subnet};
use proto::v1::device_spec::Kind;
use proto::v1::{CreateDeviceRequest, CreateNetworkRequest, DeviceSpec, NetDeviceSpec, NetworkSpec};
use vm_memory::VolatileSlice;

/// The uplink, and the other end of the cable.
const INSIDE: &str = "inside";
const OUTSIDE: &str = "outside";
/// The kernel that has the other end.
const WORLD: [u8; 4] = [10, 0, 0, 200];
const OWN: [u8; 4] = [10, 0, 0, 11];
const OTHER: [u8; 4] = [10, 0, 0, 12];

/// A cable, of which the kernel has one end as `WORLD`.
fn cable() {
    ip(&format!("link add {INSIDE} type veth peer name {OUTSIDE}"));
    ip(&format!("link set {INSIDE} up"));
    ip(&format!("link set {OUTSIDE} up"));
    ip(&format!("address add 10.0.0.200/24 dev {OUTSIDE}"));
}

fn spec() -> NetworkSpec {
    NetworkSpec {
        id: "lan".to_owned(),
        interface: INSIDE.to_owned(),
        ipv4_prefix: "10.0.0.0/24".to_owned(),
        gateway: "10.0.0.200".to_owned(),
        ipv6_prefix: "fd00::/64".to_owned(),
        ..Default::default()
    }
}

fn start(spec: &NetworkSpec) -> Network {
    let subnet = Subnet::check(spec, 1500, &[]).unwrap();
    let uplink = UplinkSpec::Interface { name: INSIDE.to_owned(), mtu: 1500 };
    let link = uplink.open().unwrap();
    Network::start("test", 1500, subnet, Uplink::Up(uplink, link), PollPolicy::default()).unwrap()
}

/// A guest of the network, with an address.
fn guest(network: &Network, last: u8) -> Guest {
    let mut guest = Guest::new(last, FULL);
    guest.fill_rx(200, 2048);
    let interface = Interface {
        ipv4: vec![[10, 0, 0, last].into()],
        ipv6: vec![format!("fd00::{last:x}").parse().unwrap()],
        ..Interface::plain(MacAddr(guest.mac))
    };
    guest.plug_as(network, interface);
    guest
}

fn asks(guest: &Guest, own: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut f = [BROADCAST, guest.mac].concat();
    f.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    f.extend(guest.mac);
    f.extend(own);
    f.extend([0; 6]);
    f.extend(target);
    f
}

/// Who has `target`? The answer is for the guest alone.
fn find(guest: &mut Guest, own: [u8; 4], target: [u8; 4]) -> [u8; 6] {
    let question = asks(guest, own, target);
    guest.send(&question);
    loop {
        let (_, f) = guest.receive().expect("somebody has it");
        if f[12..14] == [8, 6] {
            assert_eq!((&f[..6], &f[20..22], &f[28..32]), (&guest.mac[..], &[0, 2][..], &target[..]));
            return f[22..28].try_into().unwrap();
        }
    }
}

/// The next IPv4 packet, without what kernels say by themselves.
fn receive_v4(guest: &mut Guest) -> (VnetHeader, Vec<u8>) {
    loop {
        let (header, f) = guest.receive().expect("a packet comes");
        if f[12..14] == [8, 0] {
            return (header, f);
        }
    }
}

fn receives_no_v4(guest: &mut Guest) -> bool {
    let since = Instant::now();
    while since.elapsed() < MOMENT {
        if guest.receive_within(MOMENT).is_some_and(|(_, f)| f[12..14] == [8, 0]) {
            return false;
        }
    }
    true
}

fn world(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::from(WORLD), port)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// The cable's other end, by hand.
fn by_hand() -> PacketSocket {
    PacketSocket::open(OUTSIDE, 1500).unwrap()
}

fn put(socket: &PacketSocket, mut bytes: Vec<u8>) {
    let length = bytes.len().min(HEAD_MAX);
    let (head, tail) = bytes.split_at_mut(length);
    let tail_bytes = Bytes { start: 0, len: tail.len() };
    let tail = [VolatileSlice::from(tail)];
    let frame = Frame { head, tail: Memory::Host(&tail), tail_bytes, offloads: Offloads::default() };
    socket.send(&frame).unwrap();
}

/// The next frame that arrives out there and is `wanted`.
fn take(socket: &PacketSocket, wanted: impl Fn(&[u8]) -> bool) -> Option<(VnetHeader, Vec<u8>)> {
    let mut buf = vec![0; 1 << 17];
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        match socket.read(&mut buf) {
            Ok(n) if n > header::LEN && wanted(&buf[header::LEN..n]) => {
                let head = VnetHeader::from_bytes(buf.first_chunk().unwrap());
                return Some((head, buf[header::LEN..n].to_vec()));
            }
            Ok(_) => {}
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock);
                let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                nix::poll::poll(&mut fds, PollTimeout::from(100_u16)).unwrap();
            }
        }
    }
    None
}

#[test]
fn guests_and_those_behind_the_interface_find_each_other() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    cable();
    let network = start(&spec());
    let (mut guest, mut other) = (guest(&network, 11), guest(&network, 12));
    let mac = find(&mut guest, OWN, WORLD);
    assert_ne!(mac, other.mac);

    // The kernel finds the guest by ARP, which the card answers, and leaves the checksum to whoever has time for it.
    let socket = world(7000);
    socket.send_to(b"question", (Ipv4Addr::from(OWN), 53)).unwrap();
    let (_, f) = receive_v4(&mut guest);
    assert_eq!((&f[..12], &f[42..]), (&[guest.mac, mac].concat()[..], &b"question"[..]));
    guest.send(&udp4((mac, guest.mac), (OWN, 53), (WORLD, 7000), b"answer", false));
    let mut buf = [0; 100];
    let (n, from) = socket.recv_from(&mut buf).unwrap();
    assert_eq!((&buf[..n], from), (&b"answer"[..], SocketAddr::from((OWN, 53))));

    // Devices of the network are found in here, and nobody out there is asked.
    let outside = by_hand();
    assert_eq!(find(&mut guest, OWN, OTHER), other.mac);
    let nobody = asks(&guest, OWN, [10, 0, 0, 77]);
    guest.send(&nobody);
    let (_, first) = take(&outside, |f| f[12..14] == [8, 6]).expect("a question");
    assert_eq!(first, nobody, "and not that for the other guest");
    assert!(receives_no_v4(&mut other));
}

#[test]
fn who_is_behind_the_interface_cannot_speak_as_a_guest_or_as_a_server() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    cable();
    let network = start(&spec());
    let mut guest = guest(&network, 11);
    let other = self::guest(&network, 12);
    let mac = find(&mut guest, OWN, WORLD);
    let outside = by_hand();
    let good = udp4((guest.mac, mac), (WORLD, 1), (OWN, 2), b"good", false);
    let as_other = udp4((guest.mac, mac), (OTHER, 1), (OWN, 2), b"other", false);
    let server = udp4((guest.mac, mac), (WORLD, 67), (OWN, 68), b"lease", false);
    let mut tagged = good.clone();
    tagged.splice(12..12, [0x81, 0, 0, 5]);
    let mut claim = [guest.mac, mac].concat();
    claim.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    claim.extend(mac.iter().chain(&OTHER).chain(&guest.mac).chain(&OWN));
    let service = [169, 254, 169, 254];
    let as_service = udp4((guest.mac, mac), (service, 80), (OWN, 2), b"user data", false);
    let mut service_is = claim.clone();
    service_is[28..32].copy_from_slice(&service);
    let mut reverse = claim.clone();
    reverse[21] = 3;
    reverse[28..32].copy_from_slice(&WORLD);
    for bad in [as_other, as_service, server, tagged, claim, service_is, reverse] {
        put(&outside, bad);
    }
    put(&outside, good.clone());
    let (_, f) = guest.receive().expect("what is good");
    assert_eq!(f, good);
    // The same that was refused, true: a reply about the kernel itself.
    let mut reply = [guest.mac, mac].concat();
    reply.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    reply.extend(mac.iter().chain(&WORLD).chain(&guest.mac).chain(&OWN));
    put(&outside, reply.clone());
    assert_eq!(guest.receive().expect("a reply").1, reply);
    drop(other);
}

#[test]
fn super_frames_go_out_and_come_in_whole() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    cable();
    let network = start(&spec());
    let mut guest = guest(&network, 11);
    let mac = find(&mut guest, OWN, WORLD);
    let outside = by_hand();
    let payload: Vec<u8> = (0..20_000_u32).map(|i| i as u8).collect();
    let (head, mut f) = tcp4_super((mac, guest.mac), &payload, 1448);
    f[26..34].copy_from_slice(&[OWN, WORLD].concat());
    guest.send_pieces(&head, &f, 4096);
    let (got, bytes) = take(&outside, |f| f.len() > 10_000).expect("it is not cut");
    assert_eq!((got.gso_type, got.gso_size), (head.gso_type, 1448));
    assert!(bytes.ends_with(&payload));
    // And back, with the MACs the other way round.
    let (mut frame, header) = (bytes, got);
    let (to, from) = (guest.mac, mac);
    frame[..12].copy_from_slice(&[to, from].concat());
    frame[26..34].copy_from_slice(&[WORLD, OWN].concat());
    let offloads = offload::check(&header, &frame[..HEAD_MAX], frame.len(), 1500, Allowed::HOST).unwrap();
    let (head, tail) = frame.split_at_mut(HEAD_MAX);
    let tail_bytes = Bytes { start: 0, len: tail.len() };
    let tail = [VolatileSlice::from(tail)];
    outside.send(&Frame { head, tail: Memory::Host(&tail), tail_bytes, offloads }).unwrap();
    let (header, f) = receive_v4(&mut guest);
    assert_eq!(header.gso_size, 1448);
    assert!(f.ends_with(&payload) && f.len() > 20_000);
}

#[test]
fn a_plain_network_is_one_with_what_is_behind_its_interface() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    cable();
    let plain = NetworkSpec { id: "plain".into(), interface: INSIDE.into(), ..Default::default() };
    let network = start(&plain);
    let mut guest = Guest::new(11, FULL);
    guest.fill_rx(200, 2048);
    guest.plug(&network);
    // Its kernel answers the guest's question itself, and asks for the guest itself.
    let mac = find(&mut guest, OWN, WORLD);
    let socket = world(7000);
    guest.send(&udp4((mac, guest.mac), (OWN, 53), (WORLD, 7000), b"hello", false));
    let mut buf = [0; 100];
    assert_eq!(socket.recv(&mut buf).unwrap(), 5);
    let mut f = [BROADCAST, guest.mac].concat();
    f.extend([0x88, 0xb5, 1, 2, 3, 4]);
    let outside = by_hand();
    guest.send(&f);
    assert!(take(&outside, |got| got.starts_with(&f)).is_some());
}

async fn refused(card: &Card, spec: NetworkSpec) -> String {
    let request = CreateNetworkRequest { spec: Some(spec), ..Default::default() };
    let status = card.networks().await.create_network(request).await.unwrap_err();
    proto::error::Error::from(status).to_string()
}

#[tokio::test]
async fn what_cannot_be_an_uplink_is_refused_with_its_reason() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let card = Card::start(dir.path());
    assert!(refused(&card, spec()).await.contains("the host has no interface inside"));
    cable();
    ip(&format!("link set {INSIDE} down"));
    assert!(refused(&card, spec()).await.contains("interface inside is down"));
    ip(&format!("link set {INSIDE} up"));
    assert!(refused(&card, NetworkSpec { mtu: 9000, ..spec() }).await.contains("MTU of 1500"));
    assert!(refused(&card, NetworkSpec { tap: "t0".into(), ..spec() }).await.contains("not both"));
    assert!(refused(&card, NetworkSpec { nat: true, ..spec() }).await.contains("no NAT"));
    assert!(refused(&card, NetworkSpec { gateway: "10.0.1.1".into(), ..spec() }).await.contains("10.0.1.1"));
    let alone = NetworkSpec { interface: String::new(), ..spec() };
    assert!(refused(&card, alone).await.contains("no gateway elsewhere"));
    let create = CreateNetworkRequest { spec: Some(spec()), ..Default::default() };
    card.networks().await.create_network(create).await.unwrap();
    let second = NetworkSpec { id: "second".into(), ..spec() };
    assert!(refused(&card, second).await.contains("is the uplink of network lan"));
}

#[tokio::test]
async fn the_uplink_comes_back_with_its_interface_and_with_the_card() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    cable();
    let dir = tempfile::tempdir().unwrap();
    let mut card = Card::start(dir.path());
    let create = CreateNetworkRequest { spec: Some(spec()), ..Default::default() };
    card.networks().await.create_network(create).await.unwrap();
    let mut guest = Guest::new(OWN[3], FULL);
    guest.fill_rx(200, 2048);
    let net = NetDeviceSpec {
        network: "lan".to_owned(),
        mac: guest.mac.to_vec(),
        addresses: vec!["10.0.0.11".to_owned()],
        ..Default::default()
    };
    let device =
        DeviceSpec { id: "guest".to_owned(), kind: Some(Kind::Net(net)), limits: None, net_limits: None };
    let create = CreateDeviceRequest { spec: Some(device), validate_only: false };
    card.devices().await.create_device(create).await.unwrap();
    let mut link: Option<VhostLink> = Some(guest.connect(&card.socket("guest")));
    find(&mut guest, OWN, WORLD);

    // Gone, and another of the same name.
    ip(&format!("link del {INSIDE}"));
    cable();
    let found = |guest: &mut Guest| {
        let question = asks(guest, OWN, WORLD);
        guest.send(&question);
        guest.receive_within(MOMENT).filter(|(_, f)| f[12..14] == [8, 6]).ok_or("no answer")
    };
    retry(|| found(&mut guest));
    // Down, and up.
    ip(&format!("link set {INSIDE} down"));
    ip(&format!("link set {INSIDE} up"));
    retry(|| found(&mut guest));

    drop(link.take());
    card.kill();
    card = Card::start(dir.path());
    link = Some(guest.connect(&card.socket("guest")));
    retry(|| found(&mut guest));
    drop(link);
}
