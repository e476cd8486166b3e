//! Instance metadata: a guest with a TCP of its own asks the card who it is.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::card::{Card, Link, retry};
use common::*;
use offload_card::poll::PollPolicy;
use offload_net::drops::{DropReason, Drops};
use offload_net::mac::MacAddr;
use offload_net::metadata::{ADDRESS_V4, ADDRESS_V6};
use offload_net::network::Network;
use offload_net::network::uplink::Uplink;
use offload_net::subnet::{Interface, Subnet};
use proto::v1::device_spec::Kind;
use proto::v1::{
    CreateDeviceRequest, CreateNetworkRequest, DeviceSpec, GetCardStatsRequest, Metadata, NetDeviceSpec,
    NetworkSpec,
};
use smoltcp::iface::{Config, Interface as Stack, SocketHandle, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

const ID: &str = "/latest/meta-data/instance-id";

fn network_spec() -> NetworkSpec {
    NetworkSpec {
        id: "vpc".to_owned(),
        ipv4_prefix: "10.0.0.0/24".to_owned(),
        ipv6_prefix: "fd00::/64".to_owned(),
        ..Default::default()
    }
}

fn subnet() -> Subnet {
    Subnet::check(&network_spec(), 1500, &[]).unwrap().unwrap()
}

fn network() -> Network {
    Network::start("test", 1500, Some(subnet()), Uplink::None, PollPolicy::default()).unwrap()
}

/// A guest's frames, for its TCP.
struct Wire<'a> {
    guest: &'a mut Guest,
    /// Hop limits of the packets that came over TCP.
    hops: &'a mut Vec<u8>,
}

struct Received(Vec<u8>);
struct Sent<'a>(&'a mut Guest);

impl phy::Device for Wire<'_> {
    type RxToken<'b>
        = Received
    where
        Self: 'b;
    type TxToken<'b>
        = Sent<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: time::Instant) -> Option<(Received, Sent<'_>)> {
        let (_, frame) = self.guest.receive_within(Duration::ZERO)?;
        match (frame[12], frame[13]) {
            (8, 0) => self.hops.push(frame[22]),
            (0x86, 0xdd) if frame[20] == 6 => self.hops.push(frame[21]),
            _ => {}
        }
        Some((Received(frame), Sent(self.guest)))
    }

    fn transmit(&mut self, _: time::Instant) -> Option<Sent<'_>> {
        Some(Sent(self.guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        self.0.send(&frame);
        result
    }
}

/// A guest with TCP, and routes as DHCP and router advertisements make them in a network without a way out: what is not in
/// the prefix is on the link.
struct Instance {
    guest: Guest,
    stack: Stack,
    sockets: SocketSet<'static>,
    hops: Vec<u8>,
    began: Instant,
    port: u16,
}

fn metadata(last: u8) -> Metadata {
    Metadata { instance_id: format!("i-{last}"), user_data: vec![b'#'; 16384], ..Default::default() }
}

impl Instance {
    fn new(last: u8) -> Self {
        let mut guest = Guest::new(last, FULL);
        guest.fill_rx(200, 2048);
        let mut hops = Vec::new();
        let mut wire = Wire { guest: &mut guest, hops: &mut hops };
        let config = Config::new(EthernetAddress(wire.guest.mac).into());
        let mut stack = Stack::new(config, &mut wire, time::Instant::ZERO);
        stack.update_ip_addrs(|addresses| {
            // All of IPv4 and IPv6 is on the link.
            addresses.push(IpCidr::new(IpAddress::v4(10, 0, 0, last), 0)).unwrap();
            addresses.push(IpCidr::new(IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 0, last.into()), 0)).unwrap();
        });
        let sockets = SocketSet::new(Vec::new());
        Self { guest, stack, sockets, hops, began: Instant::now(), port: 49152 }
    }

    fn interface(&self, edit: impl FnOnce(&mut Metadata)) -> Interface {
        let last = self.guest.mac[5];
        let mut metadata = metadata(last);
        edit(&mut metadata);
        Interface {
            ipv4: vec![[10, 0, 0, last].into()],
            ipv6: vec![std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into())],
            hostname: format!("guest-{last}"),
            metadata: Some(Arc::new(metadata)),
            ..Interface::plain(MacAddr(self.guest.mac))
        }
    }

    fn plug(&self, network: &Network, edit: impl FnOnce(&mut Metadata)) -> Arc<Drops> {
        self.guest.plug_as(network, self.interface(edit)).1
    }

    fn poll(&mut self) {
        let clock = time::Instant::from_micros(self.began.elapsed().as_micros() as i64);
        let mut wire = Wire { guest: &mut self.guest, hops: &mut self.hops };
        self.stack.poll(clock, &mut wire, &mut self.sockets);
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Connects and says something; what it hears until the other side closes. `None`: nobody is there.
    fn talk(&mut self, to: IpAddress, request: &str, patience: Duration) -> Option<String> {
        let buffer = || SocketBuffer::new(vec![0; 65536]);
        self.port += 1;
        let mut socket = Socket::new(buffer(), buffer());
        socket.connect(self.stack.context(), (to, 80), self.port).unwrap();
        let handle = self.sockets.add(socket);
        let (until, mut said, mut heard) = (Instant::now() + patience, false, Vec::new());
        while Instant::now() < until {
            self.poll();
            let socket = self.socket(handle);
            if socket.may_send() && !said {
                socket.send_slice(request.as_bytes()).unwrap();
                said = true;
            }
            while socket.can_recv() {
                socket.recv(|b| (b.len(), heard.extend_from_slice(b))).unwrap();
            }
            match socket.state() {
                State::CloseWait => socket.close(),
                State::Closed => break,
                _ => std::thread::sleep(Duration::from_micros(100)),
            }
        }
        self.sockets.remove(handle);
        (!heard.is_empty()).then(|| String::from_utf8(heard).unwrap())
    }

    fn ask(&mut self, request: &str, headers: &str) -> Option<String> {
        let request = format!("{request} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n");
        self.talk(ADDRESS_V4.into(), &request, PATIENCE)
    }

    fn status(&mut self, request: &str, headers: &str) -> u16 {
        self.ask(request, headers).expect("an answer")[9..12].parse().unwrap()
    }

    fn token(&mut self, ttl: u32) -> String {
        let headers = format!("X-aws-ec2-metadata-token-ttl-seconds: {ttl}\r\n");
        let answer = self.ask("PUT /latest/api/token", &headers).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        format!("X-aws-ec2-metadata-token: {}\r\n", body(&answer))
    }
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

#[test]
fn a_guest_with_a_token_learns_who_it_is_and_another_guest_does_not() {
    let network = network();
    let (mut a, mut b) = (Instance::new(11), Instance::new(12));
    let drops = a.plug(&network, |_| {});
    b.plug(&network, |_| {});
    assert_eq!((a.status(&format!("GET {ID}"), ""), a.status("GET /latest/meta-data/", "")), (401, 401));
    assert_eq!(a.status("PUT /latest/api/token", ""), 400);
    let proxied = "X-Forwarded-For: 10.0.0.9\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
    assert_eq!(a.status("PUT /latest/api/token", proxied), 403);
    let token = a.token(60);
    let get = format!("GET {ID}");
    assert_eq!(body(&a.ask(&get, &token).unwrap()), "i-11");
    let hostname = a.ask("GET /2021-03-23/meta-data/local-hostname", &token).unwrap();
    assert_eq!(body(&hostname), "guest-11");
    assert_eq!(a.status("GET /latest/meta-data/nothing", &token), 404);
    assert_eq!(a.status(&format!("POST {ID}"), &token), 405);
    // More than fits into what waits at a time.
    assert_eq!(body(&a.ask("GET /latest/user-data", &token).unwrap()).len(), 16384);
    // A token is its own device's.
    assert_eq!(b.status(&get, &token), 401);
    let own = b.token(60);
    assert_eq!(body(&b.ask(&get, &own).unwrap()), "i-12");
    // Over IPv6, with the same token.
    let request = format!("{get} HTTP/1.1\r\nConnection: close\r\n{token}\r\n");
    assert_eq!(body(&a.talk(ADDRESS_V6.into(), &request, PATIENCE).unwrap()), "i-11");
    // It is good for as long as was asked for.
    let short = a.token(1);
    assert_eq!(a.status(&get, &short), 200);
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(a.status(&get, &short), 401);
    // Nothing of it goes further than to the guest itself.
    assert!(a.hops.len() > 40 && a.hops.iter().all(|hops| *hops == 1), "{:?}", a.hops);
    assert_eq!(drops.message(), proto::v1::NetDrops::default());
}

#[test]
fn who_has_no_metadata_finds_nobody() {
    let network = network();
    let mut a = Instance::new(11);
    let interface = Interface { metadata: None, ..a.interface(|_| {}) };
    let (_, drops) = a.guest.plug_as(&network, interface);
    let moment = Duration::from_millis(300);
    for to in [IpAddress::from(ADDRESS_V4), ADDRESS_V6.into()] {
        assert_eq!(a.talk(to, "GET / HTTP/1.1\r\n\r\n", moment), None);
    }
    // Not even where the frame would have gone to a gateway, and from there to whoever has this address around the host.
    let frame = udp4(
        (subnet().gateway_mac.0, a.guest.mac),
        ([10, 0, 0, 11], 1),
        (ADDRESS_V4.octets(), 80),
        b"x",
        false,
    );
    let before = drops.get(DropReason::NoDestination);
    a.guest.send(&frame);
    retry(|| if drops.get(DropReason::NoDestination) > before { Ok(()) } else { Err("not dropped") });
}

#[test]
fn nobody_asks_in_anothers_name() {
    let network = network();
    let (mut a, mut b) = (Instance::new(11), Instance::new(12));
    let drops = a.plug(&network, |m| m.tokens_optional = true);
    b.plug(&network, |m| m.tokens_optional = true);
    for from in [[10, 0, 0, 12], [10, 0, 0, 99], ADDRESS_V4.octets()] {
        a.guest.send(&udp4(
            (subnet().gateway_mac.0, a.guest.mac),
            (from, 1),
            (ADDRESS_V4.octets(), 80),
            b"x",
            false,
        ));
    }
    retry(|| if drops.get(DropReason::SpoofedAddress) == 3 { Ok(()) } else { Err("not dropped") });
    assert!(b.guest.receives_nothing());
    assert_eq!(body(&b.ask(&format!("GET {ID}"), "").unwrap()), "i-12");
}

#[test]
fn a_flood_is_bounded_and_hurts_nobody_else() {
    let network = network();
    let (mut a, mut b) = (Instance::new(11), Instance::new(12));
    let drops = a.plug(&network, |m| m.packets_per_second = 200);
    b.plug(&network, |m| m.tokens_optional = true);
    let gateway = subnet().gateway_mac.0;
    let syn = |n: u16| {
        let mut f =
            udp4((gateway, a.guest.mac), ([10, 0, 0, 11], n), (ADDRESS_V4.octets(), 80), &[0; 12], false);
        f[23] = 6;
        f[38..54].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 4, 0, 0, 0, 0, 0]);
        f
    };
    let frames: Vec<_> = (0..5000).map(|i| syn(20_000 + i)).collect();
    let mut slowest = Duration::ZERO;
    for (i, frame) in frames.iter().enumerate() {
        a.guest.send(frame);
        if i % 500 == 0 {
            let began = Instant::now();
            assert_eq!(body(&b.ask(&format!("GET {ID}"), "").unwrap()), "i-12");
            slowest = slowest.max(began.elapsed());
        }
    }
    retry(|| match a.guest.shared[1].counters.dropped.get() {
        0 => Err("nothing was dropped"),
        _ => Ok(()),
    });
    // The last frames may still be on their way.
    let message = drops.message();
    let dropped = message.linklocal_allowance_exceeded;
    assert!(dropped > 3000, "{dropped}");
    assert_eq!(message, proto::v1::NetDrops { linklocal_allowance_exceeded: dropped, ..Default::default() });
    assert!(slowest < PATIENCE / 2, "{slowest:?}");
    // It can ask again when it has calmed down.
    std::thread::sleep(Duration::from_secs(1));
    while a.guest.receive_within(Duration::ZERO).is_some() {}
}

#[tokio::test]
async fn a_card_that_was_killed_tells_the_same_to_those_who_ask_for_a_new_token() {
    let directory = tempfile::tempdir().unwrap();
    let card = Card::start(directory.path());
    let request = CreateNetworkRequest { spec: Some(network_spec()), ..Default::default() };
    card.networks().await.create_network(request).await.unwrap();
    let mut a = Instance::new(11);
    let device = |metadata: Option<Metadata>| {
        let net = NetDeviceSpec {
            network: "vpc".to_owned(),
            mac: a.guest.mac.to_vec(),
            addresses: vec!["10.0.0.11".to_owned(), "fd00::b".to_owned()],
            hostname: "guest-11".to_owned(),
            metadata,
            ..Default::default()
        };
        let spec = DeviceSpec { id: "a".to_owned(), kind: Some(Kind::Net(net)), ..Default::default() };
        CreateDeviceRequest { spec: Some(spec), ..Default::default() }
    };
    let mut devices = card.devices().await;
    let refused = devices.create_device(device(Some(Metadata::default()))).await.unwrap_err();
    assert!(refused.message().contains("1 to 64 characters"), "{refused}");
    devices.create_device(device(Some(metadata(11)))).await.unwrap();

    let link: Link = a.guest.connect(&card.socket("a"));
    let get = format!("GET {ID}");
    let token = a.token(21600);
    assert_eq!(body(&a.ask(&get, &token).unwrap()), "i-11");
    drop(link);
    card.kill();
    let card = Card::start(directory.path());
    let _link = a.guest.connect(&card.socket("a"));
    assert_eq!(a.status(&get, &token), 401);
    let token = a.token(21600);
    assert_eq!(body(&a.ask(&get, &token).unwrap()), "i-11");
    let request = GetCardStatsRequest { device_id: "a".to_owned() };
    let stats = card.devices().await.get_stats(request).await.unwrap().into_inner();
    assert_eq!(stats.devices[0].drops.unwrap().linklocal_allowance_exceeded, 0);
}
