//! What the network card keeps apart, shown by VMs that send what they must not: each such frame beside one that differs only
//! in what is wrong with it, and arrives.

use std::net::Ipv4Addr;
use std::time::Duration;

use e2e::card::Card;
use e2e::frames::{
    self, ACK, End, SYN, arp, dhcp, icmp_error, neighbour_advertisement, neighbour_solicitation,
    router_advertisement, tcp, udp, udp6,
};
use e2e::station::Station;
use e2e::vm::{Vm, config, slot};
use e2e::{SOON, enter_new_network_namespace, temp_dir, wait_until};
use proto::v1::security_group_rule::Peer;
use proto::v1::{
    Device, NetDeviceSpec, NetDrops, NetworkSpec, RuleProtocol, SecurityGroupRule, SecurityGroupSpec,
    TrafficDirection,
};

/// Of the networks with a prefix.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);

/// A network card in a place of its own.
struct Bench {
    card: Card,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        enter_new_network_namespace();
        let dir = temp_dir();
        Self { card: Card::start("offload-net", dir.path()), dir }
    }

    /// Makes a network, with a prefix of both IP versions or with none.
    fn network(&self, id: &str, prefix: bool) {
        let of = |prefix_of: &str| if prefix { prefix_of.to_owned() } else { String::new() };
        let (ipv4_prefix, ipv6_prefix) = (of("10.9.0.0/24"), of("fd09::/64"));
        let spec = NetworkSpec { id: id.to_owned(), ipv4_prefix, ipv6_prefix, ..Default::default() };
        self.card.create_network(spec).expect("create network");
    }

    /// Makes a device that is number `n` in a network with a prefix, with these security groups and so much room for connections.
    fn device(&self, id: &str, network: &str, n: u8, groups: &[&str], max_connections: u32) -> Device {
        let end = End::new(n);
        let spec = NetDeviceSpec {
            network: network.to_owned(),
            mac: end.mac.to_vec(),
            addresses: vec![end.ip.to_string(), end.ip6.to_string()],
            security_groups: groups.iter().map(|g| (*g).to_owned()).collect(),
            max_connections,
            ..Default::default()
        };
        self.card.create_nic(id, spec).expect("create network device")
    }

    /// A station on such a device.
    fn station(&self, id: &str, network: &str, n: u8, groups: &[&str]) -> Station {
        let device = self.device(id, network, n, groups, 0);
        Station::boot(self.dir.path(), id, n, &device)
    }

    /// What was dropped of a device, all of it.
    fn dropped(&self, device: &str, drops: NetDrops) {
        assert_eq!(self.card.drops(device), drops, "{device}");
    }
}

fn rule(direction: TrafficDirection, protocol: RuleProtocol, port: u32) -> SecurityGroupRule {
    let peer = Some(Peer::Prefix("0.0.0.0/0".to_owned()));
    let (direction, protocol) = (direction.into(), protocol.into());
    SecurityGroupRule { direction, protocol, port_first: port, port_last: 0, peer }
}

fn group(id: &str, rules: &[SecurityGroupRule]) -> SecurityGroupSpec {
    SecurityGroupSpec { id: id.to_owned(), rules: rules.to_vec() }
}

/// Two networks in which the same MAC and IP addresses are others' hear nothing of each other, plain or with a prefix.
#[test]
fn another_network_hears_nothing() {
    let bench = Bench::new();
    for prefix in [false, true] {
        let name = |name: &str| format!("{name}-{prefix}");
        let (red, blue) = (name("red"), name("blue"));
        bench.network(&red, prefix);
        bench.network(&blue, prefix);
        let station = |id: &str, network: &str, n| {
            let id = name(id);
            if prefix {
                return bench.station(&id, network, n, &[]);
            }
            Station::boot(bench.dir.path(), &id, n, &bench.card.nic(&id, network, n))
        };
        let (mut a, mut b) = (station("a", &red, 11), station("b", &red, 12));
        let (mut c, mut d) = (station("c", &blue, 11), station("d", &blue, 12));
        let mut only_blue = station("e", &blue, 13);
        let ports = (1000, 2000);
        // Both ways in both: what came from the other network would be in the way.
        let to_b = udp(&a.end, &b.end, ports, b"red");
        let to_d = udp(&c.end, &d.end, ports, b"blue");
        a.reaches(&mut b, &to_b);
        c.reaches(&mut d, &to_d);
        let to_a = udp(&b.end, &a.end, ports, b"red again");
        let to_c = udp(&d.end, &c.end, ports, b"blue again");
        b.reaches(&mut a, &to_a);
        d.reaches(&mut c, &to_c);
        // An address that only the other network has.
        let third = only_blue.end;
        a.send(&udp(&a.end, &third, ports, b"x"));
        let control = udp(&c.end, &third, ports, b"y");
        c.reaches(&mut only_blue, &control);
        let mut drops = NetDrops { no_destination: 1, ..Default::default() };
        if prefix {
            let question = |of: &Station| arp(&of.end, third.ip, None);
            a.send(&question(&a));
            c.send(&question(&c));
            c.receives(&arp(&third, c.end.ip, Some(&c.end)));
            drops.no_destination += 1;
        } else {
            // To everybody: in the network.
            let broadcast = udp(&a.end, &End::EVERYBODY, ports, b"red broadcast");
            a.reaches(&mut b, &broadcast);
        }
        bench.dropped(&name("a"), drops);
        let last = udp(&c.end, &d.end, ports, b"blue still");
        c.reaches(&mut d, &last);
        let last = udp(&c.end, &third, ports, b"z");
        c.reaches(&mut only_blue, &last);
        let counts = [a, b, c, d, only_blue].map(Station::finish);
        // With a prefix the card itself says something now and then.
        if !prefix {
            assert_eq!(counts, [1, 2, 1, 2, 2]);
        }
    }
}

#[test]
fn a_vm_speaks_as_nobody_else() {
    let bench = Bench::new();
    bench.network("vpc", true);
    let mut a = bench.station("a", "vpc", 11, &[]);
    let mut b = bench.station("b", "vpc", 12, &[]);
    let mut c = bench.station("c", "vpc", 13, &[]);
    let (me, you, other) = (a.end, b.end, c.end);
    let ports = (1000, 2000);
    let with = |mac: [u8; 6], ip: Ipv4Addr| End { mac, ip, ..me };
    let lie = with(other.mac, me.ip);
    a.does_not_reach(&mut b, &udp(&lie, &you, ports, b"MAC"), &udp(&me, &you, ports, b"MAC"));
    let mut drops = NetDrops { spoofed_mac: 1, ..Default::default() };
    bench.dropped("a", drops);

    // That of another VM, of the gateway, none, one of another network.
    for ip in [other.ip, GATEWAY, Ipv4Addr::UNSPECIFIED, [192, 0, 2, 1].into()] {
        let payload = ip.octets();
        let lie = udp(&with(me.mac, ip), &you, ports, &payload);
        a.does_not_reach(&mut b, &lie, &udp(&me, &you, ports, &payload));
        drops.spoofed_address += 1;
    }
    let lie = End { ip6: other.ip6, ..me };
    a.does_not_reach(&mut b, &udp6(&lie, &you, ports, b"IPv6"), &udp6(&me, &you, ports, b"IPv6"));
    drops.spoofed_address += 1;
    bench.dropped("a", drops);

    // ARP in another's name: nobody learns it, and no answer comes, as it does to the truth.
    let lie = with(me.mac, other.ip);
    a.does_not_reach(&mut b, &arp(&lie, you.ip, Some(&you)), &udp(&me, &you, ports, b"1"));
    a.does_not_reach(&mut b, &arp(&lie, you.ip, None), &udp(&me, &you, ports, b"2"));
    a.send(&arp(&me, you.ip, None));
    a.receives(&arp(&you, me.ip, Some(&me)));
    // Neither does b learn it if it asks: the card knows who has the address.
    b.send(&arp(&you, other.ip, None));
    b.receives(&arp(&other, you.ip, Some(&you)));
    drops.spoofed_neighbour += 2;
    // Neighbour discovery.
    let lie = neighbour_advertisement(&me, &you, other.ip6);
    a.does_not_reach(&mut b, &lie, &udp(&me, &you, ports, b"3"));
    drops.spoofed_neighbour += 1;
    a.send(&neighbour_solicitation(&me, &you, you.ip6));
    let answer = a.receive();
    assert_eq!((&answer[6..12], answer[54], &answer[62..78]), (&you.mac[..], 136, &you.ip6.octets()[..]));
    bench.dropped("a", drops);
    // He in whose name all that was hears of nothing.
    a.reaches(&mut c, &udp(&me, &other, ports, b"the truth"));
    bench.dropped("b", NetDrops::default());
    bench.dropped("c", NetDrops::default());
    for station in [a, b, c] {
        station.finish();
    }
}

#[test]
fn no_vm_is_a_dhcp_server_or_a_router() {
    let bench = Bench::new();
    bench.network("vpc", true);
    let mut client = bench.station("client", "vpc", 11, &[]);
    let mut rogue = bench.station("rogue", "vpc", 12, &[]);
    let (me, victim) = (rogue.end, client.end);

    // The client asks everybody, and the card alone hears it and answers.
    let asks = End { ip: Ipv4Addr::UNSPECIFIED, ..victim };
    client.send(&udp(&asks, &End::EVERYBODY, (68, 67), &dhcp(1, victim.mac, Ipv4Addr::UNSPECIFIED)));
    let offer = client.receive();
    assert_eq!((&offer[34..38], &offer[42..45]), (&[0, 67, 0, 68][..], &[2, 1, 6][..]), "{offer:02x?}");
    assert_eq!(offer[58..62], victim.ip.octets(), "the address of its specification");
    client.reaches(&mut rogue, &udp(&victim, &me, (68, 1067), b"nothing before this"));
    bench.dropped("client", NetDrops::default());

    // An offer of another's address, to the client and to everybody; from another port it is a datagram like any other.
    let lie = dhcp(2, victim.mac, me.ip);
    for to in [victim, End { mac: victim.mac, ..End::EVERYBODY }] {
        rogue.does_not_reach(&mut client, &udp(&me, &to, (67, 68), &lie), &udp(&me, &to, (1067, 68), &lie));
    }
    rogue.send(&udp(&me, &End::EVERYBODY, (67, 68), &lie));
    let mut drops = NetDrops { server: 3, ..Default::default() };
    bench.dropped("rogue", drops);
    // A router, and DHCPv6.
    let advertised = router_advertisement(&me, &victim);
    assert!(frames::is_router_advertisement(&advertised));
    rogue.does_not_reach(&mut client, &advertised, &udp6(&me, &victim, (1, 2), b"1"));
    let lie = udp6(&me, &victim, (547, 546), &[2, 0, 0, 0]);
    rogue.does_not_reach(&mut client, &lie, &udp6(&me, &victim, (1547, 546), &[2, 0, 0, 0]));
    drops.server += 2;
    bench.dropped("rogue", drops);
    client.finish();
    rogue.finish();
}

#[test]
fn what_no_rule_allows_does_not_arrive() {
    use {RuleProtocol::Tcp, TrafficDirection::Ingress};
    let bench = Bench::new();
    bench.network("vpc", true);
    bench.card.set_security_groups(vec![group("web", &[rule(Ingress, Tcp, 80)])]);
    let mut server = bench.station("server", "vpc", 11, &["web"]);
    let mut client = bench.station("client", "vpc", 12, &[]);
    let (s, c) = (server.end, client.end);
    // A connection begins with a SYN, on the port that is open, in the protocol that is allowed.
    for (port, denied) in [
        (1000, tcp(&c, &s, (1000, 81), SYN)),
        (1001, tcp(&c, &s, (1001, 80), ACK)),
        (1002, udp(&c, &s, (1002, 80), b"x")),
        (1003, udp6(&c, &s, (1003, 80), b"x")),
    ] {
        client.does_not_reach(&mut server, &denied, &tcp(&c, &s, (port, 80), SYN));
    }
    let denied_in = NetDrops { denied_in: 4, ..Default::default() };
    bench.dropped("server", denied_in);
    // The server answers, and begins nothing by itself.
    let answer = tcp(&s, &c, (80, 1000), SYN | ACK);
    server.does_not_reach(&mut client, &tcp(&s, &c, (80, 999), SYN | ACK), &answer);
    server.does_not_reach(&mut client, &tcp(&s, &c, (1000, 80), SYN), &tcp(&s, &c, (80, 1000), ACK));
    server.does_not_reach(&mut client, &udp(&s, &c, (80, 1000), b"x"), &tcp(&s, &c, (80, 1001), SYN | ACK));
    bench.dropped("server", NetDrops { denied_out: 3, ..denied_in });
    // Its sender is not told who has which rules.
    bench.dropped("client", NetDrops::default());
    server.finish();
    client.finish();
}

/// ICMP errors belong to the connection that they are about, though no rule allows ICMP.
#[test]
fn errors_about_what_was_allowed_arrive_and_others_do_not() {
    use RuleProtocol::{Tcp, Udp};
    use TrafficDirection::{Egress, Ingress};
    let bench = Bench::new();
    bench.network("vpc", true);
    bench.card.set_security_groups(vec![
        group("asker", &[rule(Egress, Udp, 53), rule(Egress, Tcp, 80)]),
        group("server", &[rule(Ingress, Udp, 53), rule(Ingress, Tcp, 80)]),
    ]);
    let mut asker = bench.station("asker", "vpc", 11, &["asker"]);
    let mut server = bench.station("server", "vpc", 12, &["server"]);
    let mut router = bench.station("router", "vpc", 13, &[]);
    let (a, s, r) = (asker.end, server.end, router.end);
    let (unreachable, too_big, exceeded) = ((3, 3), (3, 4), (11, 0));

    let question = udp(&a, &s, (1000, 53), b"who?");
    let opening = tcp(&a, &s, (1001, 80), SYN);
    asker.reaches(&mut server, &question);
    asker.reaches(&mut server, &opening);
    // Of a connection that nobody has opened, of another protocol, of what the receiver has not sent itself.
    let unknown = [
        udp(&a, &s, (1002, 53), b"who?"),
        tcp(&a, &s, (1000, 53), SYN),
        tcp(&a, &s, (1001, 81), SYN),
        udp(&s, &a, (53, 1000), b"who?"),
    ];
    let (mut out, mut inward) = (0, 0);
    for kind in [unreachable, too_big, exceeded] {
        for known in [&question, &opening] {
            for unknown in &unknown {
                // From the other end, which may not send it; from a router on the way, from which it is not let in.
                let control = icmp_error(&s, &a, kind, known);
                server.does_not_reach(&mut asker, &icmp_error(&s, &a, kind, unknown), &control);
                let control = icmp_error(&r, &a, kind, known);
                router.does_not_reach(&mut asker, &icmp_error(&r, &a, kind, unknown), &control);
                (out, inward) = (out + 1, inward + 1);
            }
        }
    }
    // A ping, which is no error, and one that a rule allows nobody.
    let mut ping = icmp_error(&r, &a, (8, 0), &question);
    router.does_not_reach(&mut asker, &ping, &icmp_error(&r, &a, unreachable, &question));
    // A redirect is none either: it would change where packets go.
    ping = icmp_error(&r, &a, (5, 1), &question);
    router.does_not_reach(&mut asker, &ping, &icmp_error(&r, &a, too_big, &opening));
    inward += 2;
    // Errors the other way, about what the server has sent.
    let answer = udp(&s, &a, (53, 1000), b"he");
    server.reaches(&mut asker, &answer);
    let control = icmp_error(&a, &s, unreachable, &answer);
    asker.does_not_reach(&mut server, &icmp_error(&a, &s, unreachable, &unknown[0]), &control);
    bench.dropped("asker", NetDrops { denied_in: inward, denied_out: 1, ..Default::default() });
    bench.dropped("server", NetDrops { denied_out: out, ..Default::default() });
    bench.dropped("router", NetDrops::default());
    for station in [asker, server, router] {
        station.finish();
    }
}

/// Room of a table that is to be full.
const ROOM: u32 = 200;

/// VMs with security groups that allow everything, beside one that opens connections to the first of them without end.
struct Flood {
    bench: Bench,
    victim: Vm,
    friend: Vm,
    newcomer: Vm,
    _flooder: Vm,
    target: &'static str,
}

impl Flood {
    /// `target`: to which of the first two the third is to open connections.
    fn new(flooder: (&[&str], u32), victim_room: u32, target: &'static str) -> Self {
        use RuleProtocol::Any;
        use TrafficDirection::{Egress, Ingress};
        let bench = Bench::new();
        bench.network("vpc", true);
        bench.card.set_security_groups(vec![group("open", &[rule(Ingress, Any, 0), rule(Egress, Any, 0)])]);
        let device = |name: &str, n, (groups, room): (&[&str], u32)| {
            (name.to_owned(), bench.device(name, "vpc", n, groups, room))
        };
        let boot = |(name, device): &(String, Device), job: &str| {
            Vm::boot(bench.dir.path(), config(name, job, vec![slot("nic0", device)]))
        };
        // All are there before one asks for another.
        let victim = device("victim", 11, (&["open"], victim_room));
        let friend = device("friend", 12, (&["open"], 0));
        let flooder = device("flooder", 13, flooder);
        let newcomer = device("newcomer", 14, (&["open"], 0));
        let receiver: u8 = if target == "victim" { 11 } else { 12 };
        // A connection is opened, and carries more later; then others come.
        let jobs = |own: u8, peer: u8| {
            let exchange =
                format!("job=net-exchange ip=10.9.0.{own} peer=10.9.0.{peer} size=1000 mode=irq timeout=60");
            let receive = if own == receiver {
                format!("job=net-recv ip=10.9.0.{own} port=20000 count=500 mode=irq timeout=20 wait=serial")
            } else {
                String::new()
            };
            format!("{exchange} count=100 {exchange} count=20000 wait=serial {receive}")
        };
        let victim = boot(&victim, &jobs(11, 12));
        let friend = boot(&friend, &jobs(12, 11));
        let job = format!(
            "job=net-send ip=10.9.0.14 peer=10.9.0.{receiver} port=20000 flows=500 count=500 rate=5000 mode=irq wait=serial"
        );
        let newcomer = boot(&newcomer, &job);
        for vm in [&victim, &friend, &newcomer] {
            vm.reports.wait("waiting", SOON);
        }
        let job = "job=net-send ip=10.9.0.13 peer=10.9.0.11 port=10000 flows=50000 size=64 rate=20000 secs=600 mode=irq";
        let flooder = boot(&flooder, job);
        Self { bench, victim, friend, newcomer, _flooder: flooder, target }
    }

    /// While connections find no room with `full`, a connection from before carries what it is given, and others are
    /// opened elsewhere.
    fn is_only(&self, full: &str) {
        let exceeded = || self.bench.card.drops(full).conntrack_allowance_exceeded;
        wait_until("a table to be full", SOON, || exceeded() > 1000);
        let before = exceeded();
        self.victim.type_in(b"\n");
        self.friend.type_in(b"\n");
        for vm in [&self.victim, &self.friend] {
            let result = vm.reports.wait_nth("result", 2, Duration::from_secs(60));
            assert_eq!(
                (&result["ok"], &result["rx"], &result["corrupt"]),
                (&true.into(), &20_000.into(), &0.into()),
                "{result:#}"
            );
        }
        let target = if self.target == "victim" { &self.victim } else { &self.friend };
        target.reports.wait_nth("waiting", 2, SOON);
        target.type_in(b"\n");
        target.reports.wait_nth("io_begin", 3, SOON);
        self.newcomer.type_in(b"\n");
        for vm in [&self.newcomer, &self.victim, &self.friend] {
            vm.reports.finish(Duration::from_secs(60));
        }
        assert_eq!(target.reports.all("result")[2]["rx"], 500);
        assert!(exceeded() > before, "the flood was over too early");
        for name in ["victim", "friend", "newcomer", "flooder"].into_iter().filter(|name| *name != full) {
            self.bench.dropped(name, NetDrops::default());
        }
        let conntrack_allowance_exceeded = exceeded();
        let only = NetDrops { conntrack_allowance_exceeded, ..self.bench.card.drops(full) };
        assert_eq!(only, NetDrops { conntrack_allowance_exceeded, ..Default::default() });
    }
}

#[test]
fn a_vm_that_opens_connections_without_end_uses_up_its_own_allowance() {
    Flood::new((&["open"], ROOM), 0, "victim").is_only("flooder");
}

#[test]
fn a_vm_to_which_connections_are_opened_without_end_keeps_those_it_has() {
    Flood::new((&[], 0), ROOM, "friend").is_only("victim");
}
