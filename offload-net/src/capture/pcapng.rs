//! The file format pcapng (draft-ietf-opsawg-pcapng), as much of it as a capture of one interface needs. Fields are in the
//! byte order of the section, which is little-endian everywhere.

use std::time::Duration;

/// Section header block: the beginning of a file.
const SECTION: u32 = 0x0a0d_0d0a;
const BYTE_ORDER: u32 = 0x1a2b_3c4d;
/// Interface description block.
const INTERFACE: u32 = 1;
/// Interface statistics block.
const STATISTICS: u32 = 5;
/// Enhanced packet block.
const PACKET: u32 = 6;
const LINKTYPE_ETHERNET: u16 = 1;

const END_OF_OPTIONS: u16 = 0;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
const ISB_IFRECV: u16 = 4;
const ISB_IFDROP: u16 = 5;

/// A packet block without the packet: type, length, interface, time, two lengths, the option with the direction, the end of
/// options, length.
const PACKET_OVERHEAD: usize = 8 + 20 + 8 + 4 + 4;
/// A statistics block.
pub(super) const STATISTICS_LEN: usize = 8 + 12 + 12 + 12 + 4 + 4;

/// Which way a frame went, seen from the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the guest.
    Inbound = 1,
    /// From the guest.
    Outbound = 2,
}

/// Bytes of the block of a packet of which so many bytes are kept.
pub(super) fn packet_len(kept: usize) -> usize {
    PACKET_OVERHEAD + kept.next_multiple_of(4)
}

/// The beginning of a file with the packets of one interface.
pub(super) fn beginning(application: &str, interface: &str, snap_bytes: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    block(&mut out, SECTION, |out| {
        out.extend(BYTE_ORDER.to_le_bytes());
        // Version 1.0, of unknown length.
        out.extend([1, 0, 0, 0]);
        out.extend(u64::MAX.to_le_bytes());
        option(out, SHB_USERAPPL, application.as_bytes());
        option(out, END_OF_OPTIONS, &[]);
    });
    block(&mut out, INTERFACE, |out| {
        out.extend(LINKTYPE_ETHERNET.to_le_bytes());
        out.extend([0, 0]);
        out.extend(snap_bytes.to_le_bytes());
        option(out, IF_NAME, interface.as_bytes());
        // Times are in nanoseconds.
        option(out, IF_TSRESOL, &[9]);
        option(out, END_OF_OPTIONS, &[]);
    });
    out
}

/// A packet of `length` bytes, of which `keep` writes the first `kept`, at `time` after the epoch.
pub(super) fn packet(
    out: &mut Vec<u8>,
    time: Duration,
    direction: Direction,
    length: usize,
    kept: usize,
    keep: impl FnOnce(&mut [u8]),
) {
    block(out, PACKET, |out| {
        out.extend(0_u32.to_le_bytes());
        time_stamp(out, time);
        // No frame is longer than 32 bits say.
        out.extend((kept as u32).to_le_bytes());
        out.extend((length as u32).to_le_bytes());
        let start = out.len();
        out.resize(start + kept.next_multiple_of(4), 0);
        if let Some(place) = out.get_mut(start..start + kept) {
            keep(place);
        }
        option(out, EPB_FLAGS, &(direction as u32).to_le_bytes());
        option(out, END_OF_OPTIONS, &[]);
    });
}

/// How many packets there were until `time`, and how many of them are not in the file.
pub(super) fn statistics(out: &mut Vec<u8>, time: Duration, received: u64, dropped: u64) {
    block(out, STATISTICS, |out| {
        out.extend(0_u32.to_le_bytes());
        time_stamp(out, time);
        option(out, ISB_IFRECV, &received.to_le_bytes());
        option(out, ISB_IFDROP, &dropped.to_le_bytes());
        option(out, END_OF_OPTIONS, &[]);
    });
}

fn time_stamp(out: &mut Vec<u8>, time: Duration) {
    let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    out.extend(((nanoseconds >> 32) as u32).to_le_bytes());
    out.extend((nanoseconds as u32).to_le_bytes());
}

/// A block: type, length, body, length.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend(kind.to_le_bytes());
    out.extend([0; 4]);
    body(out);
    let length = (out.len() - start + 4) as u32;
    out.extend(length.to_le_bytes());
    if let Some(place) = out.get_mut(start + 4..start + 8) {
        place.copy_from_slice(&length.to_le_bytes());
    }
}

/// An option: code, length, value, padding. Values are our own, and short.
fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    out.extend(code.to_le_bytes());
    out.extend((value.len() as u16).to_le_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A block of a file, read by the specification and not by what is above.
    #[derive(Debug, PartialEq, Eq)]
    pub(in crate::capture) enum Block {
        Section,
        Interface { snap: u32, name: String },
        Packet { time: u64, flags: u32, length: u32, bytes: Vec<u8> },
        Statistics { received: u64, dropped: u64 },
    }

    fn u16_at(b: &[u8], at: usize) -> u16 {
        u16::from_le_bytes(b[at..at + 2].try_into().unwrap())
    }

    fn u32_at(b: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(b[at..at + 4].try_into().unwrap())
    }

    /// The options from `at` on, which must end where the block does.
    fn options(body: &[u8], mut at: usize) -> Vec<(u16, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            let (code, len) = (u16_at(body, at), usize::from(u16_at(body, at + 2)));
            if code == 0 {
                assert_eq!((len, at + 4), (0, body.len()), "the end of options is the end of the block");
                return all;
            }
            all.push((code, body[at + 4..at + 4 + len].to_vec()));
            at += 4 + len.div_ceil(4) * 4;
        }
    }

    fn value(options: &[(u16, Vec<u8>)], code: u16) -> &[u8] {
        &options.iter().find(|(c, _)| *c == code).expect("the option").1
    }

    /// All blocks of a file or of a piece of one.
    pub(in crate::capture) fn read(mut file: &[u8]) -> Vec<Block> {
        let mut blocks = Vec::new();
        while !file.is_empty() {
            let length = u32_at(file, 4) as usize;
            assert!(length.is_multiple_of(4) && u32_at(file, length - 4) as usize == length);
            let body = &file[8..length - 4];
            blocks.push(match u32_at(file, 0) {
                0x0a0d_0d0a => {
                    assert_eq!((u32_at(body, 0), u16_at(body, 4), u16_at(body, 6)), (0x1a2b_3c4d, 1, 0));
                    options(body, 16);
                    Block::Section
                }
                1 => {
                    let all = options(body, 8);
                    assert_eq!((u16_at(body, 0), value(&all, 9)), (1, &[9_u8][..]));
                    let name = String::from_utf8(value(&all, 2).to_vec()).unwrap();
                    Block::Interface { snap: u32_at(body, 4), name }
                }
                6 => {
                    let kept = u32_at(body, 12) as usize;
                    let all = options(body, 20 + kept.div_ceil(4) * 4);
                    Block::Packet {
                        time: u64::from(u32_at(body, 4)) << 32 | u64::from(u32_at(body, 8)),
                        flags: u32_at(value(&all, 2), 0),
                        length: u32_at(body, 16),
                        bytes: body[20..20 + kept].to_vec(),
                    }
                }
                5 => {
                    let all = options(body, 12);
                    let number = |code| u64::from_le_bytes(value(&all, code).try_into().unwrap());
                    Block::Statistics { received: number(4), dropped: number(5) }
                }
                other => panic!("block {other}"),
            });
            file = &file[length..];
        }
        blocks
    }

    proptest! {
        /// What is written is read, and has the lengths that were said before.
        #[test]
        fn a_file_is_what_the_specification_says(
            snap in any::<u32>(),
            name in "[a-z0-9-]{0,40}",
            packets in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..100), any::<u32>(), any::<bool>()), 0..20),
            (received, dropped) in any::<(u64, u64)>(),
        ) {
            let mut file = beginning("offload-net 1", &name, snap);
            let mut expected = vec![Block::Section, Block::Interface { snap, name }];
            for (bytes, more, inbound) in packets {
                let before = file.len();
                let time = u64::from(more) << 30;
                let length = bytes.len() + (more as usize >> 16);
                let direction = if inbound { Direction::Inbound } else { Direction::Outbound };
                packet(&mut file, Duration::from_nanos(time), direction, length, bytes.len(), |to| {
                    to.copy_from_slice(&bytes);
                });
                prop_assert_eq!(file.len() - before, packet_len(bytes.len()));
                let flags = if inbound { 1 } else { 2 };
                expected.push(Block::Packet { time, flags, length: length as u32, bytes });
            }
            let before = file.len();
            statistics(&mut file, Duration::from_secs(1), received, dropped);
            prop_assert_eq!(file.len() - before, STATISTICS_LEN);
            expected.push(Block::Statistics { received, dropped });
            prop_assert_eq!(read(&file), expected);
        }
    }
}
