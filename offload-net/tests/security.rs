//! Security groups in a network with a prefix: what no rule allows does not arrive, and what answers does.

mod common;

use std::sync::Arc;

use common::*;
use offload_card::poll::PollPolicy;
use offload_net::conntrack::Filter;
use offload_net::conntrack::flow::{Direction, Flags};
use offload_net::drops::{DropReason, Drops};
use offload_net::mac::MacAddr;
use offload_net::network::Network;
use offload_net::network::uplink::Uplink;
use offload_net::security::rules::{GroupId, Peer, Protocol, Rule, Rules};
use offload_net::subnet::{Interface, Subnet};
use offload_net::switch::PortId;
use proto::v1::NetworkSpec;

const SYN: u8 = Flags::SYN;
const ACK: u8 = Flags::ACK;
const WEB: GroupId = GroupId(1);
const OTHER: GroupId = GroupId(2);
const ALL: (u16, u16) = (0, u16::MAX);

fn network() -> Network {
    let spec =
        NetworkSpec { id: "vpc".to_owned(), ipv4_prefix: "10.0.0.0/24".to_owned(), ..Default::default() };
    let subnet = Subnet::check(&spec, 1500, &[]).unwrap();
    Network::start("test", 1500, subnet, Uplink::None, PollPolicy::default()).unwrap()
}

fn everybody() -> Peer {
    Peer::Prefix { v6: false, network: 0, mask: 0 }
}

fn allow(direction: Direction, protocol: Protocol, ports: (u16, u16), peer: Peer) -> Rule {
    Rule { direction, protocol, ports, peer }
}

struct Member {
    guest: Guest,
    port: PortId,
    drops: Arc<Drops>,
    last: u8,
}

impl Member {
    /// A guest with a group and rules; `None`: with neither.
    fn new(network: &Network, last: u8, security: Option<(GroupId, &[Rule])>) -> Self {
        Self::with_room(network, last, security, 1000)
    }

    fn with_room(network: &Network, last: u8, security: Option<(GroupId, &[Rule])>, room: usize) -> Self {
        let mut guest = Guest::new(last, FULL);
        guest.fill_rx(200, 2048);
        let interface =
            Interface { ipv4: vec![[10, 0, 0, last].into()], ..Interface::plain(MacAddr(guest.mac)) };
        let filter = security.map(|(group, rules)| {
            Box::new(Filter::in_memory(&[group], Arc::new(Rules::new(rules)), room).unwrap())
        });
        let (port, drops) = guest.plug_behind(network, interface, filter);
        Self { guest, port, drops, last }
    }

    fn udp(&self, to: &Self, from_port: u16, to_port: u16) -> Vec<u8> {
        let macs = (to.guest.mac, self.guest.mac);
        udp4(macs, ([10, 0, 0, self.last], from_port), ([10, 0, 0, to.last], to_port), b"data", false)
    }

    fn tcp(&self, to: &Self, from_port: u16, to_port: u16, flags: u8) -> Vec<u8> {
        let (_, mut f) = tcp4_super((to.guest.mac, self.guest.mac), b"data", 1448);
        f[26..34].copy_from_slice(&[10, 0, 0, self.last, 10, 0, 0, to.last]);
        f[34..36].copy_from_slice(&from_port.to_be_bytes());
        f[36..38].copy_from_slice(&to_port.to_be_bytes());
        f[47] = flags;
        f
    }

    /// An ICMP error: nobody listens on the port that `about` went to.
    fn refusal(&self, to: &Self, about: &[u8]) -> Vec<u8> {
        let mut f = [to.guest.mac, self.guest.mac].concat();
        f.extend([8, 0, 0x45, 0, 0, 56, 0, 1, 0, 0, 64, 1, 0, 0, 10, 0, 0, self.last, 10, 0, 0, to.last]);
        f.extend([3, 3, 0, 0, 0, 0, 0, 0]);
        f.extend(&about[14..42]);
        f
    }
}

/// Sends a frame that arrives.
fn arrives(from: &mut Member, to: &mut Member, frame: &[u8]) {
    from.guest.send(frame);
    assert_eq!(to.guest.receive().expect("it arrives").1, frame);
}

/// Sends a frame that its sender's groups do not let out.
fn is_kept(from: &mut Member, frame: &[u8], why: DropReason) {
    let before = from.drops.get(why);
    from.guest.send(frame);
    card::retry(|| if from.drops.get(why) > before { Ok(()) } else { Err(format!("{:?}", from.drops)) });
}

/// Sends a frame that its receiver's groups do not let in; the sender does not learn of it.
fn is_shut_out(from: &mut Member, to: &mut Member, frame: &[u8], why: DropReason) {
    let (before, sender) = (to.drops.get(why), from.guest.shared[1].counters.dropped.get());
    from.guest.send(frame);
    card::retry(|| if to.drops.get(why) > before { Ok(()) } else { Err(format!("{:?}", to.drops)) });
    assert_eq!(from.guest.shared[1].counters.dropped.get(), sender);
    assert!(to.guest.rx.used().is_none());
}

#[test]
fn what_no_rule_allows_does_not_arrive_and_answers_do() {
    let network = network();
    let rules = [allow(Direction::In, Protocol::Tcp, (80, 80), everybody())];
    let mut server = Member::new(&network, 11, Some((WEB, &rules)));
    let mut client = Member::new(&network, 12, None);

    // Another port, another protocol, no SYN.
    for frame in [
        client.tcp(&server, 999, 81, SYN),
        client.udp(&server, 999, 80),
        client.tcp(&server, 999, 80, ACK),
        client.tcp(&server, 999, 80, SYN | ACK),
    ] {
        is_shut_out(&mut client, &mut server, &frame, DropReason::DeniedIn);
    }
    // Nothing goes out that answers nothing.
    let frame = server.tcp(&client, 80, 999, ACK);
    is_kept(&mut server, &frame, DropReason::DeniedOut);

    let frame = client.tcp(&server, 999, 80, SYN);
    arrives(&mut client, &mut server, &frame);
    let frame = server.tcp(&client, 80, 999, SYN | ACK);
    arrives(&mut server, &mut client, &frame);
    for _ in 0..3 {
        let frame = client.tcp(&server, 999, 80, ACK);
        arrives(&mut client, &mut server, &frame);
        let frame = server.tcp(&client, 80, 999, ACK);
        arrives(&mut server, &mut client, &frame);
    }
    let frame = server.tcp(&client, 80, 998, ACK);
    is_kept(&mut server, &frame, DropReason::DeniedOut);
    assert_eq!((server.drops.get(DropReason::DeniedIn), server.drops.get(DropReason::DeniedOut)), (4, 2));
    assert_eq!(server.guest.shared[1].counters.dropped.get(), 2);
    assert_eq!(server.guest.shared[1].counters.errors.get(), 0);
}

#[test]
fn both_ends_must_allow_it() {
    let network = network();
    let (out, inward) = (
        [allow(Direction::Out, Protocol::Udp, (53, 53), everybody())],
        [allow(Direction::In, Protocol::Udp, (53, 54), everybody())],
    );
    let mut asker = Member::new(&network, 11, Some((WEB, &out)));
    let mut server = Member::new(&network, 12, Some((OTHER, &inward)));
    // The sender may not, though the receiver would; and the other way round.
    let frame = asker.udp(&server, 999, 54);
    is_kept(&mut asker, &frame, DropReason::DeniedOut);
    let mut free = Member::new(&network, 13, None);
    let frame = free.udp(&server, 999, 55);
    is_shut_out(&mut free, &mut server, &frame, DropReason::DeniedIn);
    let frame = asker.udp(&server, 999, 53);
    arrives(&mut asker, &mut server, &frame);
    let answer = server.udp(&asker, 53, 999);
    arrives(&mut server, &mut asker, &answer);
    // An error about what was sent comes back; one about what was not does not.
    let refusal = server.refusal(&asker, &frame);
    arrives(&mut server, &mut asker, &refusal);
    let never = asker.udp(&server, 998, 53);
    let refusal = server.refusal(&asker, &never);
    is_kept(&mut server, &refusal, DropReason::DeniedOut);
    let refusal = free.refusal(&asker, &never);
    is_shut_out(&mut free, &mut asker, &refusal, DropReason::DeniedIn);
}

#[test]
fn a_group_as_peer_is_whoever_has_it_now() {
    let network = network();
    let rules = [allow(Direction::In, Protocol::Udp, ALL, Peer::Group(WEB))];
    let mut db = Member::new(&network, 11, Some((OTHER, &rules)));
    let egress = [allow(Direction::Out, Protocol::Any, ALL, everybody())];
    let mut web = Member::new(&network, 12, Some((WEB, &egress)));
    let mut stranger = Member::new(&network, 13, Some((OTHER, &egress)));
    let frame = web.udp(&db, 999, 5432);
    arrives(&mut web, &mut db, &frame);
    let frame = stranger.udp(&db, 999, 5432);
    is_shut_out(&mut stranger, &mut db, &frame, DropReason::DeniedIn);

    // Somebody else gets the address, and not the group.
    for index in 0..2 {
        network.stop_queue(web.port, index, std::time::Instant::now() + PATIENCE).unwrap();
    }
    network.unplug(web.port);
    let mut heir = Member::new(&network, 12, None);
    let frame = heir.udp(&db, 999, 5432);
    is_shut_out(&mut heir, &mut db, &frame, DropReason::DeniedIn);
}

#[test]
fn other_rules_cut_what_they_do_not_allow() {
    let network = network();
    let rules = |port| Rules::new(&[allow(Direction::In, Protocol::Tcp, (port, port), everybody())]);
    let one = [allow(Direction::In, Protocol::Tcp, (80, 80), everybody())];
    let mut server = Member::new(&network, 11, Some((WEB, &one)));
    let mut client = Member::new(&network, 12, None);
    let port = server.port;
    let set = |to| network.set_rules(port, vec![WEB], Arc::new(rules(to)));
    let opening = client.tcp(&server, 999, 80, SYN);
    arrives(&mut client, &mut server, &opening);
    let answer = server.tcp(&client, 80, 999, SYN | ACK);
    arrives(&mut server, &mut client, &answer);
    // Those of a device that is not there any more are not this one's.
    network.set_rules(port, vec![OTHER], Arc::default()).unwrap();
    arrives(&mut server, &mut client, &answer);
    set(81).unwrap();
    let data = client.tcp(&server, 999, 80, ACK);
    is_shut_out(&mut client, &mut server, &data, DropReason::DeniedIn);
    is_kept(&mut server, &answer, DropReason::DeniedOut);
    let opening = client.tcp(&server, 999, 81, SYN);
    arrives(&mut client, &mut server, &opening);
    set(80).unwrap();
    arrives(&mut client, &mut server, &data);
}

#[test]
fn a_flooded_table_is_its_own_interfaces_trouble() {
    const ROOM: usize = 64;
    let network = network();
    let all = [allow(Direction::In, Protocol::Udp, ALL, everybody())];
    let mut victim = Member::with_room(&network, 11, Some((WEB, &all)), ROOM);
    let mut other = Member::with_room(&network, 12, Some((WEB, &all)), ROOM);
    let mut flooder = Member::new(&network, 13, None);
    let first = flooder.udp(&victim, 1, 7);
    arrives(&mut flooder, &mut victim, &first);
    for port in 2..=1000 {
        let frame = flooder.udp(&victim, port, 7);
        flooder.guest.send(&frame);
    }
    let exceeded = 1000 - ROOM as u64;
    card::retry(|| match victim.drops.get(DropReason::ConntrackAllowanceExceeded) {
        n if n == exceeded => Ok(()),
        n => Err(n),
    });
    for _ in 1..ROOM {
        assert!(victim.guest.receive().is_some());
    }
    assert!(victim.guest.receives_nothing());
    // What was there goes on, both ways; the other interface takes new connections as before.
    arrives(&mut flooder, &mut victim, &first);
    let answer = victim.udp(&flooder, 7, 1);
    arrives(&mut victim, &mut flooder, &answer);
    for port in 1..=10 {
        let frame = flooder.udp(&other, port, 7);
        arrives(&mut flooder, &mut other, &frame);
    }
    assert_eq!(other.drops.get(DropReason::ConntrackAllowanceExceeded), 0);
    assert_eq!(flooder.guest.shared[1].counters.dropped.get(), 0);
}

#[test]
fn fragments_without_their_first_do_not_arrive() {
    let network = network();
    let rules = [allow(Direction::In, Protocol::Udp, (53, 53), everybody())];
    let mut server = Member::new(&network, 11, Some((WEB, &rules)));
    let mut client = Member::new(&network, 12, None);
    let part = |port, offset: u16, more: bool| {
        let macs = (server.guest.mac, client.guest.mac);
        let mut f = udp4(macs, ([10, 0, 0, 12], 999), ([10, 0, 0, 11], port), &[1; 56], false);
        f[18..20].copy_from_slice(&port.to_be_bytes());
        f[20..22].copy_from_slice(&((offset / 8) | (u16::from(more) << 13)).to_be_bytes());
        f
    };
    let (good, bad) = ((part(53, 0, true), part(53, 64, false)), (part(54, 0, true), part(54, 64, false)));
    let over = part(53, 8, false);
    is_shut_out(&mut client, &mut server, &good.1, DropReason::Fragment);
    is_shut_out(&mut client, &mut server, &bad.0, DropReason::DeniedIn);
    is_shut_out(&mut client, &mut server, &bad.1, DropReason::Fragment);
    arrives(&mut client, &mut server, &good.0);
    arrives(&mut client, &mut server, &good.1);
    is_shut_out(&mut client, &mut server, &over, DropReason::Fragment);
}
