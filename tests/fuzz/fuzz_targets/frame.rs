//! A frame that a guest sends: its vnet header against its headers, and the segments or the checksum that follow.
//!
//! What passes the check is cut without losing a byte, into frames that fit the MTU.
#![no_main]

use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;
use offload_net::frame::header::{LEN, VnetHeader};
use offload_net::frame::offload::{Allowed, check};
use offload_net::frame::segment::{HeadBuf, Segments, complete_csum};
use offload_net::frame::{Bytes, ETH_OVERHEAD, Frame, HEAD_MAX, Memory};
use vm_memory::VolatileSlice;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let choices = input.u8();
    let allowed = Allowed {
        csum: choices & 1 == 0,
        tso4: choices & 2 == 0,
        tso6: choices & 4 == 0,
        verified: choices & 8 == 0,
    };
    let mtu = if choices & 16 == 0 { 1500 } else { usize::from(input.u16().max(68)) };
    // More payload than an input has bytes.
    let padding = if choices & 32 == 0 { 0 } else { usize::from(input.u16()) };
    let Some(header) = input.bytes(LEN).first_chunk().map(VnetHeader::from_bytes) else { return };
    let mut bytes = input.bytes(usize::MAX).to_vec();
    bytes.resize(bytes.len() + padding, 0x5a);
    let head_len = bytes.len().min(HEAD_MAX);
    let Ok(offloads) = check(&header, &bytes[..head_len], bytes.len(), mtu, allowed) else { return };
    let mut tail = bytes.split_off(head_len);
    let tail_len = tail.len();
    let slices = [VolatileSlice::from(tail.as_mut_slice())];
    let tail = Memory::Host(&slices);
    let frame = Frame { head: &bytes, tail, tail_bytes: Bytes { start: 0, len: tail_len }, offloads };
    let mut buf: HeadBuf = [0; HEAD_MAX];
    let Some(gso) = offloads.gso else {
        let done = complete_csum(frame, &mut buf);
        assert!(done.bytes() == frame.bytes() && done.offloads.csum.is_none());
        return;
    };
    let headers = usize::from(gso.headers);
    let mut segments = Segments::new(frame, gso);
    let mut payload = 0;
    while let Some(segment) = segments.next(&mut buf) {
        assert!(segment.bytes() > headers && segment.bytes() <= mtu + ETH_OVERHEAD);
        assert!(segment.offloads.gso.is_none());
        payload += segment.bytes() - headers;
    }
    assert_eq!(payload, frame.bytes() - headers);
});
