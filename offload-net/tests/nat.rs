//! A network with NAT: its guests reach what the host reaches, under the host's address, and nobody begins anything with
//! them. Needs root and nft: the host of a test is a network namespace, and "the internet" another one.

mod common;

use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use common::card::{Card, Link, retry};
use common::*;
use nix::sched::{CloneFlags, unshare};
use offload_net::frame::header::VnetHeader;
use proto::error::{Error, ErrorReason};
use proto::v1::device_spec::Kind;
use proto::v1::{
    CreateDeviceRequest, CreateNetworkRequest, DeleteDeviceRequest, DeleteNetworkRequest, DeviceSpec,
    NetDeviceSpec, NetworkSpec,
};

const TAP: &str = "ob-nat0";
const IN: ([u8; 4], &str) = ([10, 99, 0, 7], "fd99::7");
/// The host's address out there, and somebody else's.
const HOST: (&str, &str) = ("192.0.2.1", "2001:db8::1");
const SERVER: ([u8; 4], &str) = ([192, 0, 2, 2], "2001:db8::2");
const PORT: u16 = 7000;

fn run(command: &str) {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

fn nft(args: &[&str]) -> String {
    let output = Command::new("nft").args(args).output().expect("nft is installed");
    assert!(output.status.success(), "nft {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn forwards() -> [String; 2] {
    ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"]
        .map(|setting| std::fs::read_to_string(setting).unwrap().trim().to_owned())
}

/// Another host, which this one has a link to.
struct Internet {
    /// What it is to send to whom, from its server's port.
    orders: Sender<(Vec<u8>, SocketAddr)>,
    /// What it got, and from whom. It sends everything back.
    heard: Receiver<(Vec<u8>, SocketAddr)>,
}

impl Internet {
    /// The calling thread has a network namespace of its own.
    fn new() -> Self {
        ip("link set lo up");
        ip("link add up0 type veth peer name inet0");
        let (orders, to_send) = channel::<(Vec<u8>, SocketAddr)>();
        let (heard_sender, heard) = channel();
        let (tell, told) = channel();
        let (go, gone) = channel::<()>();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            tell.send(nix::unistd::gettid()).unwrap();
            gone.recv().unwrap();
            ip("link set inet0 up");
            ip("addr add 192.0.2.2/24 dev inet0");
            ip("addr add 2001:db8::2/64 dev inet0 nodad");
            // It knows a way to the guests, and may not use it.
            ip("route add 10.99.0.0/24 via 192.0.2.1");
            let socket = UdpSocket::bind(("::", PORT)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
            tell.send(nix::unistd::gettid()).unwrap();
            let mut buf = [0; 2000];
            loop {
                if let Ok((n, from)) = socket.recv_from(&mut buf) {
                    socket.send_to(&buf[..n], from).unwrap();
                    if heard_sender.send((buf[..n].to_vec(), from)).is_err() {
                        return;
                    }
                }
                while let Ok((bytes, to)) = to_send.try_recv() {
                    let _ = socket.send_to(&bytes, to);
                }
            }
        });
        let thread = told.recv().unwrap();
        ip(&format!("link set inet0 netns {thread}"));
        ip("link set up0 up");
        ip("addr add 192.0.2.1/24 dev up0");
        ip("addr add 2001:db8::1/64 dev up0 nodad");
        go.send(()).unwrap();
        told.recv().unwrap();
        Self { orders, heard }
    }

    fn hears(&self) -> (Vec<u8>, String) {
        let (bytes, from) = self.heard.recv_timeout(PATIENCE).expect("it hears something");
        let from = match from.ip() {
            std::net::IpAddr::V6(a) => a.to_ipv4_mapped().map_or_else(|| a.to_string(), |a| a.to_string()),
            std::net::IpAddr::V4(a) => a.to_string(),
        };
        (bytes, from)
    }

    fn hears_nothing(&self) -> bool {
        self.heard.recv_timeout(MOMENT).is_err()
    }
}

fn network(id: &str, tap: &str, prefix: &str, nat: bool) -> CreateNetworkRequest {
    let spec = NetworkSpec {
        id: id.to_owned(),
        tap: tap.to_owned(),
        ipv4_prefix: format!("{prefix}.0/24"),
        ipv6_prefix: if nat { "fd99::/64".to_owned() } else { String::new() },
        nat,
        ..Default::default()
    };
    CreateNetworkRequest { spec: Some(spec), ..Default::default() }
}

async fn plug(card: &Card, id: &str, network: &str, addresses: &[&str], guest: &mut Guest) -> Link {
    let net = NetDeviceSpec {
        network: network.to_owned(),
        mac: guest.mac.to_vec(),
        addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
        ..Default::default()
    };
    let spec = DeviceSpec { id: id.to_owned(), kind: Some(Kind::Net(net)), ..Default::default() };
    let create = CreateDeviceRequest { spec: Some(spec), ..Default::default() };
    card.devices().await.create_device(create).await.unwrap();
    guest.fill_rx(100, 2048);
    guest.connect(&card.socket(id))
}

/// The MAC address of the gateway, which answers for its address.
fn gateway(guest: &mut Guest, own: [u8; 4], gateway: [u8; 4]) -> [u8; 6] {
    let mut f = BROADCAST.to_vec();
    f.extend(guest.mac);
    f.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    f.extend(guest.mac);
    f.extend(own);
    f.extend([0; 6]);
    f.extend(gateway);
    guest.send(&f);
    loop {
        let (_, f) = guest.receive().expect("the gateway answers");
        if f[12..14] == [8, 6] && f[21] == 2 {
            return f[6..12].try_into().unwrap();
        }
    }
}

/// A UDP packet over IPv6.
fn udp6(macs: ([u8; 6], [u8; 6]), from: Ipv6Addr, to: Ipv6Addr, payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len()) as u16;
    let mut udp =
        [&7_u16.to_be_bytes()[..], &PORT.to_be_bytes(), &length.to_be_bytes(), &[0, 0], payload].concat();
    let pseudo =
        [&from.octets()[..], &to.octets(), &u32::from(length).to_be_bytes(), &[0, 0, 0, 17], &udp].concat();
    udp[6..8].copy_from_slice(&internet_checksum(&pseudo).to_be_bytes());
    let mut f = [macs.0, macs.1].concat();
    f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    f.extend(length.to_be_bytes());
    f.extend([17, 64]);
    f.extend(from.octets());
    f.extend(to.octets());
    f.extend(udp);
    f
}

/// The payload of the next UDP packet from out there, and who it is from. For a second or two after a TAP is made, the host
/// asks for no IPv6 neighbours on it: it checks first whether its own link-local address is another's.
fn receives(guest: &mut Guest) -> Option<(Vec<u8>, Vec<u8>)> {
    receives_within(guest, PATIENCE)
}

fn receives_within(guest: &mut Guest, patience: Duration) -> Option<(Vec<u8>, Vec<u8>)> {
    loop {
        let (_, f) = guest.receive_within(patience)?;
        match [f[12], f[13]] {
            [8, 0] if f[23] == 17 => return Some((f[42..].to_vec(), f[26..30].to_vec())),
            [0x86, 0xdd] if f[20] == 17 => return Some((f[62..].to_vec(), f[22..38].to_vec())),
            _ => {}
        }
    }
}

/// A question to the server and its answer, by both versions.
fn talk(guest: &mut Guest, gateway: [u8; 6], internet: &Internet, seed: u8) {
    let macs = (gateway, guest.mac);
    let question = vec![seed; 400];
    guest.send(&udp4(macs, (IN.0, 7), (SERVER.0, PORT), &question, false));
    assert_eq!(internet.hears(), (question.clone(), HOST.0.to_owned()));
    assert_eq!(receives(guest), Some((question.clone(), SERVER.0.to_vec())));

    let server: Ipv6Addr = SERVER.1.parse().unwrap();
    let f = udp6(macs, IN.1.parse().unwrap(), server, &question);
    guest.send_pieces(&VnetHeader::default(), &f, usize::MAX);
    assert_eq!(internet.hears(), (question.clone(), HOST.1.to_owned()));
    assert_eq!(receives(guest), Some((question, server.octets().to_vec())));
}

#[tokio::test]
async fn guests_reach_the_internet_as_the_host_and_are_reached_by_nobody() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let internet = Internet::new();
    assert_eq!(forwards(), ["0", "0"]);
    let directory = tempfile::tempdir().unwrap();
    let card = Card::start(directory.path());
    let mut networks = card.networks().await;
    networks.create_network(network("nat-net", TAP, "10.99.0", true)).await.unwrap();
    // Again is fine.
    networks.create_network(network("nat-net", TAP, "10.99.0", true)).await.unwrap();
    networks.create_network(network("plain", "ob-nat1", "10.98.0", false)).await.unwrap();
    assert_eq!(forwards(), ["1", "1"]);
    let mut guest = Guest::new(7, BASE);
    let link = plug(&card, "g", "nat-net", &["10.99.0.7", IN.1], &mut guest).await;
    let router = gateway(&mut guest, IN.0, [10, 99, 0, 1]);
    talk(&mut guest, router, &internet, 1);

    // Nobody begins: neither the internet, nor the neighbours, nor this guest with them.
    internet.orders.send((b"hello".to_vec(), "[::ffff:10.99.0.7]:7".parse().unwrap())).unwrap();
    assert_eq!(receives_within(&mut guest, MOMENT), None);
    let mut other = Guest::new(8, BASE);
    let other_ip = [10, 98, 0, 8];
    let _other_link = plug(&card, "o", "plain", &["10.98.0.8"], &mut other).await;
    let other_router = gateway(&mut other, other_ip, [10, 98, 0, 1]);
    for to in [SERVER.0, IN.0] {
        let macs = (other_router, other.mac);
        other.send(&udp4(macs, (other_ip, 7), (to, PORT), b"hello", false));
    }
    guest.send(&udp4((router, guest.mac), (IN.0, 7), (other_ip, PORT), b"hello", false));
    assert!(internet.hears_nothing());
    assert_eq!(receives_within(&mut guest, MOMENT), None);
    assert_eq!(receives_within(&mut other, MOMENT), None);
    // The host itself does reach them.
    let socket = UdpSocket::bind("10.99.0.1:0").unwrap();
    socket.send_to(b"hello", "10.99.0.7:7").unwrap();
    assert_eq!(receives(&mut guest), Some((b"hello".to_vec(), vec![10, 99, 0, 1])));

    // A card that was killed has it again, and so has one whose rules somebody has cleared.
    drop(link);
    card.kill();
    nft(&["delete", "table", "inet", "outboard_nat_nat_net"]);
    let card = Card::start(directory.path());
    let there = || nft(&["list", "tables"]).contains("outboard_nat_nat_net");
    retry(|| if there() { Ok(()) } else { Err("no rules") });
    let _link = guest.connect(&card.socket("g"));
    talk(&mut guest, router, &internet, 2);

    // With the network goes what was done for it.
    for id in ["g", "o"] {
        card.devices().await.delete_device(DeleteDeviceRequest { id: id.to_owned() }).await.unwrap();
    }
    let mut networks = card.networks().await;
    networks.delete_network(DeleteNetworkRequest { id: "nat-net".to_owned() }).await.unwrap();
    assert_eq!((forwards(), nft(&["list", "tables"])), (["0", "0"].map(str::to_owned), String::new()));
}

#[tokio::test]
async fn a_host_that_forwards_is_left_as_it_is() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let internet = Internet::new();
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let card = Card::start(directory.path());
    let mut networks = card.networks().await;
    networks.create_network(network("n", TAP, "10.99.0", true)).await.unwrap();
    let tables = nft(&["list", "tables"]);
    assert!(!tables.contains("table ip outboard_forward"), "{tables}");
    assert!(tables.contains("table ip6 outboard_forward"), "{tables}");
    let mut guest = Guest::new(7, BASE);
    let _link = plug(&card, "g", "n", &["10.99.0.7", IN.1], &mut guest).await;
    let router = gateway(&mut guest, IN.0, [10, 99, 0, 1]);
    talk(&mut guest, router, &internet, 1);
    card.devices().await.delete_device(DeleteDeviceRequest { id: "g".to_owned() }).await.unwrap();

    // What came later may need what we began.
    ip("link add later0 type veth peer name later1");
    networks.delete_network(DeleteNetworkRequest { id: "n".to_owned() }).await.unwrap();
    assert_eq!(forwards(), ["1", "1"]);
    assert_eq!(nft(&["list", "tables"]), "table ip6 outboard_forward\n");
}

#[tokio::test]
async fn without_nft_the_error_says_what_to_install() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
    // A host without it: an empty file, in this test's view of the file system, cannot be run.
    run("mount --make-rprivate /");
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    for nft in ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft"] {
        if std::path::Path::new(nft).exists() {
            run(&format!("mount --bind {} {nft}", empty.display()));
        }
    }
    let card = Card::start(directory.path());
    let mut networks = card.networks().await;
    let e = Error::from(networks.create_network(network("n", TAP, "10.99.0", true)).await.unwrap_err());
    assert_eq!(e.reason(), ErrorReason::Host);
    assert!(e.message().contains("nft") && e.fact("remedy").is_some_and(|r| r.contains("nftables")), "{e}");
    // Nothing is left behind.
    retry(|| nix::net::if_::if_nametoindex(TAP).map_or(Ok(()), Err));
    networks.create_network(network("n", TAP, "10.99.0", false)).await.unwrap();
}

/// As its service runs: a user of its own, and one capability.
#[tokio::test]
async fn a_card_without_root_does_it_by_its_capability() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
    // Everybody may open it, as udev has it; not so in every container.
    run("mount --make-rprivate /");
    run("mount -t tmpfs tmpfs /dev/net");
    run("mknod -m 666 /dev/net/tun c 10 200");
    let internet = Internet::new();
    let directory = tempfile::tempdir().unwrap();
    // Where the program was built may be for root only.
    let program = directory.path().join("offload-net");
    std::fs::copy(env!("CARGO_BIN_EXE_offload-net"), &program).unwrap();
    let nobody = 65_534;
    std::os::unix::fs::chown(directory.path(), Some(nobody), Some(nobody)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]);
    command.args([
        "--inh-caps=-all,+net_admin",
        "--ambient-caps=-all,+net_admin",
        "--bounding-set=-all,+net_admin",
    ]);
    command.arg(&program);
    let card = Card::start_by(command, directory.path());
    let mut networks = card.networks().await;
    networks.create_network(network("n", TAP, "10.99.0", true)).await.unwrap();
    assert_eq!(forwards(), ["1", "1"]);
    let mut guest = Guest::new(7, BASE);
    let _link = plug(&card, "g", "n", &["10.99.0.7", IN.1], &mut guest).await;
    let router = gateway(&mut guest, IN.0, [10, 99, 0, 1]);
    talk(&mut guest, router, &internet, 1);
    card.devices().await.delete_device(DeleteDeviceRequest { id: "g".to_owned() }).await.unwrap();
    networks.delete_network(DeleteNetworkRequest { id: "n".to_owned() }).await.unwrap();
    assert_eq!((forwards(), nft(&["list", "tables"])), (["0", "0"].map(str::to_owned), String::new()));
}
