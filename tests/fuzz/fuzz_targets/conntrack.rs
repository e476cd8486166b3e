//! Frames to and from an interface with security groups, through the guard and the filter: nothing comes in but by a rule
//! or in answer to what went out, and the table keeps its bounds. The rules here allow the guest to send anything and
//! nobody to open a connection to it, so what comes in must have been preceded by what it answers.
#![no_main]

use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

use fuzz::input::Input;
use fuzz::vpc::{self, MAC, OWN, OWN6, SUBNET};
use libfuzzer_sys::fuzz_target;
use offload_net::conntrack::Filter;
use offload_net::conntrack::flow::{Content, Direction, Packet};
use offload_net::frame::offload::Offloads;
use offload_net::frame::{Bytes, Frame, HEAD_MAX, Memory};
use offload_net::guard::{self, Verdict};
use offload_net::security::rules::{Members, Peer, Protocol, Rule, Rules};
use offload_net::subnet::Interface;
use vm_memory::VolatileSlice;

const ROOM: usize = 16;

static INTERFACE: LazyLock<Interface> = LazyLock::new(vpc::interface);
static RULES: LazyLock<Arc<Rules>> = LazyLock::new(|| {
    let all = |v6| Rule {
        direction: Direction::Out,
        protocol: Protocol::Any,
        ports: (0, u16::MAX),
        peer: Peer::Prefix { v6, network: 0, mask: 0 },
    };
    Arc::new(Rules::new(&[all(false), all(true)]))
});

/// Who has spoken to whom, from the guest's side: IP version, protocol, its address, the other's; ports where there are.
type Pair = (u8, u8, Vec<u8>, Vec<u8>, Option<(u16, u16)>);

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut filter = Filter::in_memory(&[], RULES.clone(), ROOM).expect("memory");
    let members = Members::default();
    let mut sent: HashSet<Pair> = HashSet::new();
    let mut now = 1;
    for _ in 0..64 {
        let choices = input.u8();
        let length = usize::from(input.u8());
        let mut bytes = input.bytes(length).to_vec();
        if bytes.len() < 34 {
            break;
        }
        let direction = if choices & 1 == 0 { Direction::Out } else { Direction::In };
        now += u64::from(choices >> 4) << (choices & 14);
        address(&mut bytes, direction);
        with(&bytes, |frame| {
            let verdict = match direction {
                Direction::Out => guard::from_device(&SUBNET, &INTERFACE, frame),
                Direction::In => guard::from_uplink(&SUBNET, frame),
            };
            let (Ok(Verdict::Forward), Some(packet)) = (verdict, Packet::of(frame)) else { return };
            let admitted = filter.admit(&packet, direction, &members, now).is_ok();
            match (direction, admitted) {
                (Direction::Out, true) => sent.extend(pair(&bytes, &packet, direction)),
                (Direction::In, true) => answers(&bytes, &packet, &sent),
                (_, false) => {}
            }
        });
        assert!(filter.connections() <= ROOM);
    }
});

/// Guessing addresses is not what is to be found out.
fn address(f: &mut [u8], direction: Direction) {
    let (mac, v4, v6) = match direction {
        Direction::Out => (6, 26, 22),
        Direction::In => (0, 30, 38),
    };
    f[mac..mac + 6].copy_from_slice(&MAC);
    match f[12..14] {
        [8, 0] => f[v4..v4 + 4].copy_from_slice(&OWN),
        [0x86, 0xdd] if f.len() >= 54 => f[v6..v6 + 16].copy_from_slice(&OWN6),
        _ => {}
    }
}

fn with(bytes: &[u8], f: impl FnOnce(&Frame<'_>)) {
    let head_len = bytes.len().min(HEAD_MAX);
    let mut tail = bytes[head_len..].to_vec();
    let tail_bytes = Bytes { start: 0, len: tail.len() };
    let slices = [VolatileSlice::from(tail.as_mut_slice())];
    let offloads = Offloads::default();
    f(&Frame { head: &bytes[..head_len], tail: Memory::Host(&slices), tail_bytes, offloads });
}

/// By other means than the filter's, as far as that goes without parsing all once more: addresses straight from the frame.
fn ends(f: &[u8], direction: Direction) -> (u8, Vec<u8>, Vec<u8>) {
    let (version, from, to) = match f[12..14] {
        [8, 0] => (4, f[26..30].to_vec(), f[30..34].to_vec()),
        _ => (6, f[22..38].to_vec(), f[38..54].to_vec()),
    };
    match direction {
        Direction::Out => (version, from, to),
        Direction::In => (version, to, from),
    }
}

fn pair(f: &[u8], packet: &Packet, direction: Direction) -> Option<Pair> {
    let ports = match (packet.content, direction) {
        (Content::Tcp(from, to, _) | Content::Udp(from, to), Direction::Out) => Some((from, to)),
        (Content::Tcp(from, to, _) | Content::Udp(from, to), Direction::In) => Some((to, from)),
        (Content::Query { .. } | Content::Other, _) => None,
        (Content::Error(_) | Content::Message | Content::Later, _) => return None,
    };
    let (version, local, peer) = ends(f, direction);
    Some((version, packet.protocol, local, peer, ports))
}

fn answers(f: &[u8], packet: &Packet, sent: &HashSet<Pair>) {
    match packet.content {
        // What an error is about was sent by us; a fragment's first may be one, and is judged like any other packet.
        Content::Error(_) | Content::Later => assert!(!sent.is_empty()),
        Content::Message => panic!("a message that no rule allows came in"),
        Content::Query { reply, .. } => {
            assert!(reply && sent.contains(&pair(f, packet, Direction::In).expect("a pair")));
        }
        _ => assert!(sent.contains(&pair(f, packet, Direction::In).expect("a pair")), "{packet:?}"),
    }
}
