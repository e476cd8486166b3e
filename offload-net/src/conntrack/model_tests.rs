//! Random packets against a model that is as plain as can be: what passes was allowed by a rule, or answers what was.

use std::collections::BTreeSet;

use proptest::prelude::*;
use vm_memory::VolatileSlice;

use super::*;
use crate::frame::offload::Offloads;
use crate::frame::{Bytes, Frame, HEAD_MAX, Memory};
use crate::security::rules::{Peer, Protocol, Rule};
use crate::subnet::Interface;

const OWN: [u8; 4] = [10, 0, 0, 1];
const ROOM: usize = 16;
const GROUP: GroupId = GroupId(3);
const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

/// An IPv4 frame; checksums are nobody's business here.
fn ip4(from: [u8; 4], to: [u8; 4], protocol: u8, id: u16, part: u16, body: &[u8]) -> Vec<u8> {
    let mut f = vec![0; 12];
    f.extend([8, 0, 0x45, 0]);
    f.extend((20 + body.len() as u16).to_be_bytes());
    f.extend(id.to_be_bytes());
    f.extend(part.to_be_bytes());
    f.extend([64, protocol, 0, 0]);
    f.extend(from);
    f.extend(to);
    f.extend(body);
    f
}

fn ports(from: u16, to: u16) -> Vec<u8> {
    [from.to_be_bytes(), to.to_be_bytes()].concat()
}

fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut b = ports(from, to);
    b.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0]);
    b
}

fn udp(from: u16, to: u16) -> Vec<u8> {
    let mut b = ports(from, to);
    b.extend([0, 8, 0, 0]);
    b
}

fn echo(kind: u8, id: u16) -> Vec<u8> {
    let mut b = vec![kind, 0, 0, 0];
    b.extend(id.to_be_bytes());
    b.extend([0, 1]);
    b
}

/// An ICMP error about a packet, as much of it as RFC 792 has in it.
fn unreachable(about: &[u8]) -> Vec<u8> {
    let mut b = vec![3, 3, 0, 0, 0, 0, 0, 0];
    b.extend(&about[14..(14 + 28).min(about.len())]);
    b
}

fn with<T>(frame: &[u8], f: impl FnOnce(&Frame<'_>) -> T) -> T {
    let mut frame = frame.to_vec();
    let len = frame.len().min(HEAD_MAX);
    let (head, tail) = frame.split_at_mut(len);
    let tail_bytes = Bytes { start: 0, len: tail.len() };
    let tail = [VolatileSlice::from(tail)];
    f(&Frame { head, tail: Memory::Host(&tail), tail_bytes, offloads: Offloads::default() })
}

fn rule(direction: Direction, protocol: Protocol, ports: (u16, u16), peer: Peer) -> Rule {
    Rule { direction, protocol, ports, peer }
}

fn prefix(address: [u8; 4], len: u32) -> Peer {
    let mask = u128::from(u32::MAX.checked_shl(32 - len).unwrap_or(0));
    Peer::Prefix { v6: false, network: u128::from(u32::from_be_bytes(address)) & mask, mask }
}

fn filter(rules: &[Rule]) -> Filter {
    Filter::in_memory(&[], Arc::new(Rules::new(rules)), ROOM).unwrap()
}

fn passes(filter: &mut Filter, frame: &[u8], direction: Direction, now: u64) -> Result<(), Denied> {
    passes_among(filter, &Members::default(), frame, direction, now)
}

fn passes_among(
    filter: &mut Filter,
    members: &Members,
    frame: &[u8],
    direction: Direction,
    now: u64,
) -> Result<(), Denied> {
    let packet = with(frame, Packet::of).expect("it is understood");
    filter.admit(&packet, direction, members, now)
}

const PEER: [u8; 4] = [10, 0, 0, 2];
const STRANGER: [u8; 4] = [192, 0, 2, 1];
const SYN: u8 = flow::Flags::SYN;
const ACK: u8 = flow::Flags::ACK;
const RST: u8 = flow::Flags::RST;
const ALL: (u16, u16) = (0, u16::MAX);

#[test]
fn only_what_a_rule_allows_comes_in_and_what_answers_it_goes_out() {
    let mut f = filter(&[rule(Direction::In, Protocol::Tcp, (80, 80), prefix(PEER, 24))]);
    let inward = |port, flags| ip4(PEER, OWN, 6, 1, 0, &tcp(999, port, flags));
    let outward = |port, flags| ip4(OWN, PEER, 6, 1, 0, &tcp(port, 999, flags));
    assert_eq!(passes(&mut f, &inward(81, SYN), Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &inward(80, ACK), Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &outward(80, SYN | ACK), Direction::Out, 0), Err(Denied::Rule));
    let stranger = ip4(STRANGER, OWN, 6, 1, 0, &tcp(999, 80, SYN));
    assert_eq!(passes(&mut f, &stranger, Direction::In, 0), Err(Denied::Rule));

    assert_eq!(passes(&mut f, &inward(80, SYN), Direction::In, 0), Ok(()));
    assert_eq!(passes(&mut f, &outward(80, SYN | ACK), Direction::Out, 0), Ok(()));
    assert_eq!(passes(&mut f, &inward(80, ACK), Direction::In, 0), Ok(()));
    // Nothing else goes out, on this connection's ports neither.
    assert_eq!(passes(&mut f, &outward(81, ACK), Direction::Out, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &outward(80, SYN), Direction::Out, 0), Err(Denied::Rule));
    // Four days later it is still there; five and a bit after its last packet it is not.
    let day = 86_400_000;
    assert_eq!(passes(&mut f, &outward(80, ACK), Direction::Out, 4 * day), Ok(()));
    assert_eq!(passes(&mut f, &inward(80, ACK), Direction::In, 9 * day), Err(Denied::Rule));
}

#[test]
fn a_connection_that_is_over_does_not_open_the_way_back() {
    let mut f = filter(&[rule(Direction::Out, Protocol::Tcp, ALL, prefix(PEER, 32))]);
    let out = |flags| ip4(OWN, PEER, 6, 1, 0, &tcp(5000, 443, flags));
    let back = |flags| ip4(PEER, OWN, 6, 1, 0, &tcp(443, 5000, flags));
    let open = |f: &mut Filter, now| {
        assert_eq!(passes(f, &out(SYN), Direction::Out, now), Ok(()));
        assert_eq!(passes(f, &back(SYN | ACK), Direction::In, now), Ok(()));
        assert_eq!(passes(f, &out(ACK), Direction::Out, now), Ok(()));
    };
    open(&mut f, 0);
    // A connection in the other direction between the same ports is another.
    assert_eq!(passes(&mut f, &back(SYN), Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &back(RST), Direction::In, 0), Ok(()));
    assert_eq!(passes(&mut f, &back(SYN), Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &back(ACK), Direction::In, 9_999), Ok(()));
    assert_eq!(passes(&mut f, &back(ACK), Direction::In, 20_000), Err(Denied::Rule));
    open(&mut f, 20_000);
    // The guest has forgotten it and begins anew: its peer answers, and the connection stays known.
    assert_eq!(passes(&mut f, &out(SYN), Direction::Out, 20_000), Ok(()));
    assert_eq!(passes(&mut f, &back(ACK), Direction::In, 60_000), Ok(()));
    assert_eq!(passes(&mut f, &out(RST), Direction::Out, 60_000), Ok(()));
    open(&mut f, 60_000);
    assert_eq!(f.connections(), 1);
}

#[test]
fn errors_about_what_was_sent_come_back_and_no_others() {
    let mut f = filter(&[rule(Direction::Out, Protocol::Udp, ALL, prefix(PEER, 24))]);
    let question = ip4(OWN, PEER, 17, 1, 0, &udp(5000, 53));
    let error = |about: &[u8], to| ip4(STRANGER, to, 1, 1, 0, &unreachable(about));
    assert_eq!(passes(&mut f, &error(&question, OWN), Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &question, Direction::Out, 0), Ok(()));
    assert_eq!(passes(&mut f, &error(&question, OWN), Direction::In, 0), Ok(()));
    // About another packet; about what came from the peer; to another than it is about; and none is sent out.
    let other = ip4(OWN, PEER, 17, 1, 0, &udp(5000, 54));
    assert_eq!(passes(&mut f, &error(&other, OWN), Direction::In, 0), Err(Denied::Rule));
    let answer = ip4(PEER, OWN, 17, 1, 0, &udp(53, 5000));
    assert_eq!(passes(&mut f, &error(&answer, OWN), Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &error(&question, [10, 0, 0, 9]), Direction::In, 0), Err(Denied::Rule));
    // A guest may say that nobody listens.
    let refusal = ip4(OWN, PEER, 1, 1, 0, &unreachable(&answer));
    assert_eq!(passes(&mut f, &refusal, Direction::Out, 0), Ok(()));
    // What is cut off before the ports belongs to nothing.
    let mut cut = error(&question, OWN);
    cut.truncate(14 + 20 + 8 + 22);
    cut[17] = 50;
    assert_eq!(passes(&mut f, &cut, Direction::In, 0), Err(Denied::Rule));
    // It does not keep the connection.
    assert_eq!(passes(&mut f, &error(&question, OWN), Direction::In, 29_999), Ok(()));
    assert_eq!(passes(&mut f, &error(&question, OWN), Direction::In, 30_000), Err(Denied::Rule));
}

#[test]
fn errors_over_ipv6_as_well() {
    let all6 = Peer::Prefix { v6: true, network: 0, mask: 0 };
    let mut f = filter(&[rule(Direction::Out, Protocol::Udp, ALL, all6)]);
    let v6 = |from: u8, to: u8, next: u8, body: &[u8]| {
        let mut f = vec![0; 12];
        f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, body.len() as u8, next, 64]);
        f.extend([from; 16]);
        f.extend([to; 16]);
        f.extend(body);
        f
    };
    let question = v6(1, 2, 17, &udp(5000, 53));
    let too_big = |kind, about: &[u8]| v6(9, 1, 58, &[&[kind, 0, 0, 0, 0, 0, 5, 0], about].concat());
    assert_eq!(passes(&mut f, &too_big(2, &question[14..]), Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &question, Direction::Out, 0), Ok(()));
    for kind in 1..=4 {
        assert_eq!(passes(&mut f, &too_big(kind, &question[14..]), Direction::In, 0), Ok(()));
    }
    // The first fragment of a packet; a later one has no ports.
    let part = |offset| v6(1, 2, 44, &[&[17, 0, 0, offset, 0, 0, 0, 7], &udp(5000, 53)[..]].concat());
    assert_eq!(passes(&mut f, &too_big(2, &part(1)[14..]), Direction::In, 0), Ok(()));
    assert_eq!(passes(&mut f, &too_big(2, &part(9)[14..]), Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &too_big(5, &question[14..]), Direction::In, 0), Err(Denied::Rule));
}

#[test]
fn a_ping_is_answered_and_answers_alone_are_not_let_in() {
    let mut f = filter(&[rule(Direction::Out, Protocol::Icmp, ALL, prefix(PEER, 24))]);
    let frame = |from, to, kind, id| ip4(from, to, 1, 1, 0, &echo(kind, id));
    assert_eq!(passes(&mut f, &frame(PEER, OWN, 0, 7), Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &frame(OWN, PEER, 8, 7), Direction::Out, 0), Ok(()));
    assert_eq!(passes(&mut f, &frame(PEER, OWN, 0, 7), Direction::In, 0), Ok(()));
    assert_eq!(passes(&mut f, &frame(PEER, OWN, 0, 8), Direction::In, 0), Err(Denied::Rule));
    // A question from there with the same number is no answer.
    assert_eq!(passes(&mut f, &frame(PEER, OWN, 8, 7), Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &frame(OWN, PEER, 0, 7), Direction::Out, 0), Err(Denied::Rule));
}

#[test]
fn other_rules_are_in_force_at_the_next_packet() {
    let to_group = rule(Direction::Out, Protocol::Any, ALL, Peer::Group(GROUP));
    let mut members = Members::default();
    let peer = Interface { ipv4: vec![PEER.into()], ..Interface::plain(MAC) };
    members.insert(&peer, &[GROUP]);
    let mut f = filter(&[to_group]);
    let out = ip4(OWN, PEER, 17, 1, 0, &udp(5000, 53));
    let back = ip4(PEER, OWN, 17, 1, 0, &udp(53, 5000));
    assert_eq!(passes_among(&mut f, &members, &out, Direction::Out, 0), Ok(()));
    assert_eq!(passes_among(&mut f, &members, &back, Direction::In, 0), Ok(()));

    f.set_rules(Arc::default());
    assert_eq!(passes_among(&mut f, &members, &back, Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes_among(&mut f, &members, &out, Direction::Out, 0), Err(Denied::Rule));
    // They come back before it is forgotten.
    f.set_rules(Arc::new(Rules::new(&[to_group])));
    assert_eq!(passes_among(&mut f, &members, &back, Direction::In, 59_000), Ok(()));
    // The peer goes, and with it the membership that the rule names.
    members.remove(&peer);
    assert_eq!(passes_among(&mut f, &members, &back, Direction::In, 59_000), Err(Denied::Rule));
    assert_eq!(passes_among(&mut f, &members, &back, Direction::In, 119_000), Err(Denied::Rule));
    members.insert(&peer, &[GROUP]);
    assert_eq!(passes_among(&mut f, &members, &back, Direction::In, 119_000), Err(Denied::Rule));
    assert_eq!(f.connections(), 0);
}

#[test]
fn a_full_table_takes_nothing_new_and_loses_nothing() {
    let mut f = filter(&[rule(Direction::In, Protocol::Any, ALL, prefix(PEER, 0))]);
    let inward = |port: u16| ip4(PEER, OWN, 17, 1, 0, &udp(port, 53));
    for port in 0..ROOM as u16 {
        assert_eq!(passes(&mut f, &inward(port), Direction::In, 0), Ok(()));
    }
    for port in 1000..2000 {
        assert_eq!(passes(&mut f, &inward(port), Direction::In, 0), Err(Denied::Full));
    }
    let answer = ip4(OWN, PEER, 17, 1, 0, &udp(53, 3));
    assert_eq!(passes(&mut f, &answer, Direction::Out, 0), Ok(()));
    assert_eq!((f.connections(), passes(&mut f, &inward(1000), Direction::In, 30_000)), (ROOM, Ok(())));
}

#[test]
fn fragments_go_the_way_of_the_first() {
    let mut f = filter(&[rule(Direction::In, Protocol::Udp, (53, 53), prefix(PEER, 24))]);
    let mut body = udp(999, 53);
    body.resize(64, 0);
    let first = |id, port| {
        let mut body = body.clone();
        body[2..4].copy_from_slice(&u16::to_be_bytes(port));
        ip4(PEER, OWN, 17, id, 0x2000, &body)
    };
    let later = |id, offset: u16| ip4(PEER, OWN, 17, id, offset / 8, &[0; 64]);
    assert_eq!(passes(&mut f, &first(1, 54), Direction::In, 0), Err(Denied::Rule));
    assert_eq!(passes(&mut f, &later(1, 64), Direction::In, 0), Err(Denied::Fragment));
    assert_eq!(passes(&mut f, &first(2, 53), Direction::In, 0), Ok(()));
    assert_eq!(passes(&mut f, &later(2, 64), Direction::In, 0), Ok(()));
    assert_eq!(passes(&mut f, &later(2, 56), Direction::In, 0), Err(Denied::Fragment));
    f.set_rules(Arc::default());
    assert_eq!(passes(&mut f, &later(2, 64), Direction::In, 0), Err(Denied::Fragment));
    // A TCP header that is not all in the first part says nothing.
    let tiny = ip4(PEER, OWN, 6, 3, 0x2000, &tcp(1, 53, SYN)[..16]);
    assert_eq!(with(&tiny, Packet::of), None);
}

/// A packet of the model.
#[derive(Debug, Clone)]
enum Kind {
    Tcp(u8),
    Udp,
    Echo {
        reply: bool,
    },
    /// An ICMP error about a packet of this protocol, that went in this packet's opposite direction.
    Error {
        udp: bool,
    },
    Other,
}

#[derive(Debug, Clone)]
enum Step {
    Send { kind: Kind, inward: bool, peer: u8, local: u16, port: u16 },
    Wait(u64),
    Rules(Vec<(bool, u8, u8, u16)>),
}

fn step() -> impl Strategy<Value = Step> {
    let flags = prop::sample::select(vec![SYN, SYN | ACK, ACK, ACK | 1, RST, 0, SYN | RST]);
    let kind = prop_oneof![
        4 => flags.prop_map(Kind::Tcp),
        2 => Just(Kind::Udp),
        1 => any::<bool>().prop_map(|reply| Kind::Echo { reply }),
        2 => any::<bool>().prop_map(|udp| Kind::Error { udp }),
        1 => Just(Kind::Other),
    ];
    let send = (kind, any::<bool>(), 2..4_u8, 1..3_u16, 1..3_u16)
        .prop_map(|(kind, inward, peer, local, port)| Step::Send { kind, inward, peer, local, port });
    let rule = (any::<bool>(), 0..5_u8, 2..4_u8, 1..3_u16);
    prop_oneof![
        30 => send,
        2 => (1..200_000_u64).prop_map(Step::Wait),
        1 => prop::collection::vec(rule, 0..4).prop_map(Step::Rules),
    ]
}

/// Everything that may be sent on the grounds of what was allowed: flows by protocol, peer and ports, each with who has ever
/// opened it (true: the peer).
#[derive(Default)]
struct Model {
    rules: Vec<(bool, u8, u8, u16)>,
    flows: BTreeSet<((u8, u8, u16, u16), bool)>,
}

impl Model {
    /// Protocols of the model's rules: any, TCP, UDP, ICMP, another one's.
    fn allows(&self, inward: bool, protocol: u8, peer: u8, to: u16) -> bool {
        self.rules.iter().any(|(i, p, a, port)| {
            *i == inward
                && *a == peer
                && match *p {
                    0 => true,
                    1 => protocol == 6 && *port == to,
                    2 => protocol == 17 && *port == to,
                    3 => protocol == 1,
                    _ => false,
                }
        })
    }

    /// There is a flow that the rules of now allow whoever opened it to open.
    fn flow(&self, name: (u8, u8, u16, u16)) -> bool {
        let (protocol, peer, local, port) = name;
        [true, false].into_iter().any(|inward| {
            let to = if inward { local } else { port };
            self.flows.contains(&(name, inward)) && self.allows(inward, protocol, peer, to)
        })
    }

    /// Whether it may pass at all. It may be dropped nevertheless: time is no part of the model.
    fn may_pass(&mut self, kind: &Kind, inward: bool, peer: u8, local: u16, port: u16) -> bool {
        let to = if inward { local } else { port };
        let (protocol, opens, name) = match kind {
            Kind::Tcp(flags) => (6, *flags == SYN, (6, peer, local, port)),
            Kind::Udp => (17, true, (17, peer, local, port)),
            Kind::Other => (132, true, (132, peer, 0, 0)),
            // The identifier is `local`, and who asks is part of the name.
            Kind::Echo { reply } => (1, !reply, (1, peer, local, u16::from(inward != *reply))),
            Kind::Error { udp } => {
                let about = if *udp { 17 } else { 6 };
                return self.allows(inward, 1, peer, 0) || self.flow((about, peer, local, port));
            }
        };
        let known = self.flow(name);
        let allowed = opens && self.allows(inward, protocol, peer, to);
        if allowed {
            self.flows.insert((name, inward));
        }
        allowed || known
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Nothing passes that no rule allows and that belongs to nothing that one has allowed.
    #[test]
    fn nothing_passes_without_a_rule_or_a_connection(steps in prop::collection::vec(step(), 1..120)) {
        let mut f = filter(&[]);
        let mut model = Model::default();
        let mut now = 0;
        for step in steps {
            match step {
                Step::Wait(ms) => now += ms,
                Step::Rules(rules) => {
                    let compiled: Vec<Rule> = rules.iter().map(|(inward, protocol, peer, port)| {
                        let direction = if *inward { Direction::In } else { Direction::Out };
                        let (protocol, ports) = match protocol {
                            0 => (Protocol::Any, ALL),
                            1 => (Protocol::Tcp, (*port, *port)),
                            2 => (Protocol::Udp, (*port, *port)),
                            3 => (Protocol::Icmp, ALL),
                            _ => (Protocol::Icmpv6, ALL),
                        };
                        rule(direction, protocol, ports, prefix([10, 0, 0, *peer], 32))
                    }).collect();
                    f.set_rules(Arc::new(Rules::new(&compiled)));
                    model.rules = rules;
                }
                Step::Send { kind, inward, peer, local, port } => {
                    let peer_ip = [10, 0, 0, peer];
                    let (from, to) = if inward { (peer_ip, OWN) } else { (OWN, peer_ip) };
                    let (sp, dp) = if inward { (port, local) } else { (local, port) };
                    let frame = match &kind {
                        Kind::Tcp(flags) => ip4(from, to, 6, 1, 0, &tcp(sp, dp, *flags)),
                        Kind::Udp => ip4(from, to, 17, 1, 0, &udp(sp, dp)),
                        Kind::Echo { reply } => ip4(from, to, 1, 1, 0, &echo(if *reply { 0 } else { 8 }, local)),
                        Kind::Other => ip4(from, to, 132, 1, 0, &[0; 12]),
                        Kind::Error { udp: about } => {
                            let (protocol, l4) = if *about { (17, udp(dp, sp)) } else { (6, tcp(dp, sp, ACK)) };
                            ip4(from, to, 1, 1, 0, &unreachable(&ip4(to, from, protocol, 1, 0, &l4)))
                        }
                    };
                    let direction = if inward { Direction::In } else { Direction::Out };
                    let may = model.may_pass(&kind, inward, peer, local, port);
                    let passed = passes(&mut f, &frame, direction, now).is_ok();
                    prop_assert!(may || !passed, "{kind:?} inward {inward} {peer} {local} {port}");
                    prop_assert!(f.connections() <= ROOM);
                }
            }
        }
    }

    /// Whatever a frame holds, it is judged, and a filter without rules lets nothing pass.
    #[test]
    fn nothing_passes_a_filter_without_rules(
        frames in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 34..120)), 1..50),
        version in prop::sample::select(vec![[8_u8, 0], [0x86, 0xdd]]),
        protocol in prop::sample::select(vec![1_u8, 6, 17, 44, 58, 132]),
    ) {
        let mut f = filter(&[]);
        for (inward, mut frame) in frames {
            frame[12..14].copy_from_slice(&version);
            if version == [8, 0] {
                (frame[14], frame[16], frame[17], frame[23]) = (0x45, 0, frame.len() as u8 - 14, protocol);
                frame[20] &= 0x20;
            } else if frame.len() > 60 {
                (frame[14], frame[18], frame[19], frame[20]) = (0x60, 0, frame.len() as u8 - 54, protocol);
            }
            let direction = if inward { Direction::In } else { Direction::Out };
            if let Some(packet) = with(&frame, Packet::of) {
                prop_assert!(f.admit(&packet, direction, &Members::default(), 0).is_err());
            }
        }
    }
}
