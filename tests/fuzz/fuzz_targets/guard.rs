//! A frame that a guest sends into a network with a prefix: what is let through is in the guest's own name and meant for
//! one receiver, and what is answered is answered with the truth. The same frame from behind an uplink: what is let through is
//! in nobody's name who is here.
#![no_main]

use std::net::Ipv6Addr;
use std::sync::LazyLock;

use fuzz::input::Input;
use fuzz::vpc::{self, MAC, OWN, OWN6, SUBNET};
use libfuzzer_sys::fuzz_target;
use offload_net::answer::{self, dhcp, dhcp6};
use offload_net::frame::offload::Offloads;
use offload_net::frame::{Bytes, ETH_HEADER, Frame, HEAD_MAX, Memory};
use offload_net::guard::{self, Question, Verdict};
use offload_net::metadata::{ADDRESS_V4, ADDRESS_V6};
use offload_net::subnet::{Interface, Neighbours};
use vm_memory::VolatileSlice;

static INTERFACE: LazyLock<Interface> = LazyLock::new(vpc::interface);
static NEIGHBOURS: LazyLock<Neighbours> = LazyLock::new(|| {
    let mut neighbours = Neighbours::default();
    neighbours.insert(&INTERFACE).expect("nobody else is there");
    neighbours
});

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let choices = input.u8();
    let mut bytes = input.bytes(usize::MAX).to_vec();
    if bytes.len() < ETH_HEADER {
        return;
    }
    // Guessing six bytes is not what is to be found out.
    if choices & 1 == 0 {
        bytes[6..12].copy_from_slice(&MAC);
    }
    let head_len = bytes.len().min(HEAD_MAX);
    let mut tail = bytes[head_len..].to_vec();
    let tail_len = tail.len();
    let slices = [VolatileSlice::from(tail.as_mut_slice())];
    let frame = Frame {
        head: &bytes[..head_len],
        tail: Memory::Host(&slices),
        tail_bytes: Bytes { start: 0, len: tail_len },
        offloads: Offloads::default(),
    };
    let _ = guard::from_uplink(&SUBNET, &frame);
    if guard::from_outside(&SUBNET, &NEIGHBOURS, &frame) == Ok(Verdict::Forward) {
        from_outside(&bytes);
    }
    match guard::from_device(&SUBNET, &INTERFACE, &frame) {
        Err(_) => {}
        Ok(Verdict::Forward) => forwarded(&bytes),
        Ok(Verdict::Answer(Question::Arp(request))) => {
            assert!(request.operation == 1 && request.sender_mac.0 == MAC && bytes[6..12] == MAC);
        }
        Ok(Verdict::Answer(Question::Neighbour { from, .. })) => {
            assert!(from.is_unspecified() || own6(from));
        }
        Ok(Verdict::Answer(Question::Router(from))) => {
            assert!(from.is_unspecified() || own6(from));
        }
        Ok(Verdict::Answer(Question::Dhcp6 { from, message })) => {
            assert!(own6(from));
            let message = copied(&frame, &bytes, message);
            let mut buffer = [0; answer::MAX];
            let _ = dhcp6::reply(&message, from, &INTERFACE, &SUBNET, &mut buffer);
        }
        Ok(Verdict::Answer(Question::Metadata(part))) => {
            let packet = copied(&frame, &bytes, part);
            assert!(packet[12..16] == OWN || own6(first16(&packet[8..]).into()));
        }
        Ok(Verdict::Answer(Question::Dhcp(part))) => {
            let message = copied(&frame, &bytes, part);
            let mut buffer = [0; answer::MAX];
            if let Ok(Some(length)) = dhcp::reply(&message, &INTERFACE, &SUBNET, &mut buffer) {
                let reply = &buffer[42..length];
                assert!([[0; 4], OWN].contains(&reply[16..20].try_into().expect("4 bytes")));
                assert_eq!(reply[28..34], MAC);
            }
        }
    }
});

fn own6(address: Ipv6Addr) -> bool {
    address.octets() == OWN6 || address == INTERFACE.link_local()
}

fn first16(bytes: &[u8]) -> [u8; 16] {
    bytes[..16].try_into().expect("16 bytes")
}

/// A part of the frame that the guard has found.
fn copied(frame: &Frame<'_>, bytes: &[u8], part: Bytes) -> Vec<u8> {
    let mut copy = vec![0; part.len];
    assert!(frame.copy_out(part.start, &mut copy), "it lies in the frame");
    assert_eq!(copy, bytes[part.start..part.start + part.len]);
    copy
}

/// By other means than the guard's.
fn from_outside(f: &[u8]) {
    assert!(f[0] & 1 == 0);
    match f[12..14] {
        [8, 0] => {
            assert!(f[26..30] != OWN && f[26..30] != ADDRESS_V4.octets());
            let l4 = 14 + usize::from(f[14] & 15) * 4;
            let first = f[20] & 0x1f == 0 && f[21] == 0;
            assert!(!(f[23] == 17 && first && f[l4..l4 + 4] == [0, 67, 0, 68]), "a DHCP server");
        }
        [0x86, 0xdd] => {
            assert!(!own6(first16(&f[22..]).into()) && f[22..38] != ADDRESS_V6.octets());
            assert!(!(f[20] == 58 && [134, 135, 137].contains(&f[54])), "a router, or a question");
            assert!(!(f[20] == 58 && f[54] == 136 && own6(first16(&f[62..]).into())), "our address");
            assert!(!(f[20] == 17 && f[54..58] == [2, 35, 2, 34]), "a DHCPv6 server");
        }
        [8, 6] => {
            assert!(f[20..22] == [0, 2] && f[22..28] == f[6..12]);
            assert!(f[28..32] != OWN && f[28..32] != ADDRESS_V4.octets());
        }
        _ => panic!("another protocol"),
    }
}

/// By other means than the guard's.
fn forwarded(f: &[u8]) {
    assert!(f[0] & 1 == 0 && f[6..12] == MAC);
    match f[12..14] {
        [8, 0] => {
            assert_eq!(f[26..30], OWN);
            assert_ne!(f[30..34], ADDRESS_V4.octets(), "the metadata service is nowhere else");
            let l4 = 14 + usize::from(f[14] & 15) * 4;
            let first = f[20] & 0x1f == 0 && f[21] == 0;
            assert!(!(f[23] == 17 && first && f[l4..l4 + 4] == [0, 67, 0, 68]), "a DHCP server");
        }
        [0x86, 0xdd] => {
            assert!(own6(first16(&f[22..]).into()));
            assert_ne!(f[38..54], ADDRESS_V6.octets(), "the metadata service is nowhere else");
            assert!(!(f[20] == 58 && (134..=137).contains(&f[54])), "neighbour discovery");
            assert!(!(f[20] == 17 && f[54..58] == [2, 35, 2, 34]), "a DHCPv6 server");
        }
        _ => panic!("another protocol"),
    }
}
