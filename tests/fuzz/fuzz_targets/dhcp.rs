//! A DHCP message, of either version, as a guest sends it: whatever it says, it is given its own addresses and no others, and
//! the answer is one that can be read to its end.
#![no_main]

use std::sync::{Arc, LazyLock};

use fuzz::input::Input;
use fuzz::vpc::{self, MAC, OWN, OWN6, SUBNET};
use libfuzzer_sys::fuzz_target;
use offload_net::answer::{self, dhcp, dhcp6};
use offload_net::subnet::Interface;

/// Ethernet, IP and UDP.
const HEADERS: usize = 14 + 20 + 8;
const HEADERS6: usize = 14 + 40 + 8;

static INTERFACE: LazyLock<Interface> =
    LazyLock::new(|| Interface { metadata: Some(Arc::default()), ..vpc::interface() });

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let choices = input.u8();
    let mut message = input.bytes(usize::MAX).to_vec();
    let mut buffer = [0; answer::MAX];
    if choices & 1 == 0 {
        // Guessing what every message has is not what is to be found out.
        if choices & 2 == 0 && message.len() >= 240 {
            message[..3].copy_from_slice(&[1, 1, 6]);
            message[24..28].fill(0);
            message[28..34].copy_from_slice(&MAC);
            message[236..240].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
        }
        if let Ok(Some(length)) = dhcp::reply(&message, &INTERFACE, &SUBNET, &mut buffer) {
            version4(&buffer[HEADERS..length]);
        }
        return;
    }
    if choices & 2 == 0 {
        // To this server.
        message.extend([0, 2, 0, 10, 0, 3, 0, 1]);
        message.extend(SUBNET.gateway_mac.0);
    }
    if let Ok(Some(length)) = dhcp6::reply(&message, INTERFACE.link_local(), &INTERFACE, &SUBNET, &mut buffer)
    {
        assert_eq!(usize::from(u16::from_be_bytes([buffer[18], buffer[19]])), length - 54);
        let reply = &buffer[HEADERS6..length];
        assert!([2, 7].contains(&reply[0]) && reply[1..4] == message[1..4]);
        options6(&reply[4..]);
    }
});

fn version4(reply: &[u8]) {
    assert!([[0; 4], OWN].contains(&reply[16..20].try_into().expect("4 bytes")));
    assert_eq!(reply[28..34], MAC);
    let mut rest = &reply[240..];
    loop {
        match rest {
            [255, ..] => break,
            [0, more @ ..] => rest = more,
            [_, length, more @ ..] => rest = &more[usize::from(*length)..],
            _ => panic!("options without an end"),
        }
    }
}

/// Options, and those within: no address but the client's own is good for a second.
fn options6(mut rest: &[u8]) {
    while !rest.is_empty() {
        let length = usize::from(u16::from_be_bytes([rest[2], rest[3]]));
        let (code, data) = (u16::from_be_bytes([rest[0], rest[1]]), &rest[4..4 + length]);
        match code {
            3 | 25 => options6(&data[12..]),
            4 => options6(&data[4..]),
            5 => assert!(data[..16] == OWN6 || data[16..24] == [0; 8]),
            _ => {}
        }
        rest = &rest[4 + length..];
    }
}
