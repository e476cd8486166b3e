//! What a guest sends to the metadata service, as text and as packets: nothing is told without a token, connections and answers
//! are bounded, and there is always an end.
#![no_main]

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use fuzz::input::Input;
use fuzz::vpc::{self, MAC, SUBNET};
use libfuzzer_sys::fuzz_target;
use offload_net::mac::MacAddr;
use offload_net::metadata::token::Tokens;
use offload_net::metadata::tree::View;
use offload_net::metadata::{ADDRESS_V4, ADDRESS_V6, Endpoints, http};
use offload_net::subnet::Interface;
use proto::v1::{Metadata, SshPublicKey};

const SECRET: &[u8] = b"nobody-is-told-without-a-token";

static INTERFACE: LazyLock<Interface> = LazyLock::new(|| {
    let key = SshPublicKey { name: "k".to_owned(), key: String::from_utf8_lossy(SECRET).into_owned() };
    let metadata = Metadata {
        instance_id: "nobody-is-told-without-a-token".to_owned(),
        ssh_keys: vec![key],
        user_data: SECRET.repeat(100),
        ..Default::default()
    };
    Interface { metadata: Some(Arc::new(metadata)), ..vpc::interface() }
});

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    if input.u8() & 1 == 0 {
        text(input.bytes(usize::MAX));
    } else {
        packets(input);
    }
});

fn text(mut bytes: &[u8]) {
    let metadata = INTERFACE.metadata.as_deref().expect("there is some");
    let view = View { metadata, interface: &INTERFACE, subnet: &SUBNET };
    let (mut tokens, now) = (Tokens::default(), Instant::now());
    let (mut body, mut answer) = (Vec::new(), Vec::new());
    while let Ok(Some(request)) = http::parse(bytes) {
        answer.clear();
        let stays = http::respond(&request, &view, &mut tokens, now, &mut body, &mut answer);
        assert!(answer.starts_with(b"HTTP/1.1 "));
        assert!(!answer.windows(SECRET.len()).any(|w| w == SECRET), "the guest has never been given a token");
        assert!(request.length > 0);
        if !stays {
            return;
        }
        bytes = &bytes[request.length..];
    }
}

/// Packets of a TCP that is right in what can be guessed, and says anything.
fn packets(mut input: Input<'_>) {
    let (mut service, mut now) = (Endpoints::default(), Instant::now());
    // What the service has said last: its sequence number, and what it has acknowledged.
    let (mut sequence, mut acknowledged) = (0_u32, 0_u32);
    while !input.is_empty() {
        let choices = input.u8();
        if choices & 1 != 0 {
            now += Duration::from_millis(u64::from(input.u8()) * 100);
            service.tend(&SUBNET, now, |_, frames| {
                frames.drain(|f| (sequence, acknowledged) = seen(f).unwrap_or((sequence, acknowledged)));
            });
        }
        let flags = input.u8();
        let length = usize::from(input.u8());
        let payload = input.bytes(length);
        let raw = choices & 2 != 0 && choices & 4 != 0;
        let packet =
            if raw { payload.to_vec() } else { segment(choices, flags, sequence, acknowledged, payload) };
        let _ = service.receive(&INTERFACE, &SUBNET, &packet, now);
        if let Some(frames) = service.frames(MacAddr(MAC)) {
            frames.drain(|f| (sequence, acknowledged) = seen(f).unwrap_or((sequence, acknowledged)));
        }
    }
    // Left alone, it comes to rest.
    for _ in 0..1024 {
        match service.next() {
            Some(next) => now = now.max(next),
            None => return,
        }
        service.tend(&SUBNET, now, |_, frames| {
            frames.drain(|f| {
                seen(f);
            })
        });
    }
    panic!("something is always due");
}

fn segment(choices: u8, flags: u8, sequence: u32, acknowledged: u32, payload: &[u8]) -> Vec<u8> {
    let mut tcp = vec![200, u8::from(choices & 8 != 0), 0, 80];
    tcp.extend(acknowledged.to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend([0x50, flags, if choices & 16 != 0 { 0 } else { 64 }, 0, 0, 0, 0, 0]);
    tcp.extend(payload);
    let mut packet = Vec::new();
    if choices & 32 == 0 {
        packet.extend([0x45, 0]);
        packet.extend((20 + tcp.len() as u16).to_be_bytes());
        packet.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 88, 0, 7]);
        packet.extend(ADDRESS_V4.octets());
    } else {
        packet.extend([0x60, 0, 0, 0]);
        packet.extend((tcp.len() as u16).to_be_bytes());
        packet.extend([6, 64]);
        packet.extend(INTERFACE.ipv6[0].octets());
        packet.extend(ADDRESS_V6.octets());
    }
    packet.extend(tcp);
    packet
}

/// What a frame to the guest says: it goes nowhere else, and tells nothing. The next sequence number, and the acknowledgement.
fn seen(frame: &mut [u8]) -> Option<(u32, u32)> {
    assert!(frame[..6] == MAC && frame.len() <= 1514);
    assert!(!frame.windows(SECRET.len()).any(|w| w == SECRET), "the guest has never shown a token");
    let (l4, protocol) = match frame[12..14] {
        [8, 0] => {
            assert_eq!(frame[22], 1, "hop limit");
            (34, frame[23])
        }
        _ => {
            assert_eq!(frame[21], 1, "hop limit");
            (54, frame[20])
        }
    };
    if protocol != 6 {
        return None;
    }
    let number = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().expect("4 bytes"));
    let data = frame.len() - l4 - usize::from(frame[l4 + 12] >> 4) * 4;
    let counts = u32::from(frame[l4 + 13] & 1) + u32::from(frame[l4 + 13] >> 1 & 1);
    Some((number(l4 + 4).wrapping_add(data as u32 + counts), number(l4 + 8)))
}
