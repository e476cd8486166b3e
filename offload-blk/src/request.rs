//! A virtio-blk request (VirtIO 1.3 section 5.2.6), taken out of a descriptor chain.
//!
//! ```text
//! to be read:     type u32, reserved u32, sector u64, data of a write, or ranges to erase
//! to be written:  data of a read, status u8
//! ```
//!
//! How the driver cuts this into descriptors is its business: only the order counts.

use offload_card::Chain;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::VolatileMemory;

use crate::erase::{self, Range};
use crate::image::SECTOR_BYTES;

/// Length of a request's header in bytes.
pub const HEADER_BYTES: usize = 16;
/// Length of what GET_ID answers, in bytes.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// How a request ended, as the driver is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok,
    /// VIRTIO_BLK_S_IOERR.
    IoError,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

impl Status {
    /// The status byte.
    pub fn byte(self) -> u8 {
        (match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Read `length` bytes from `offset` into what may be written, all but its last byte.
    Read {
        /// Byte offset in the image.
        offset: u64,
        /// Bytes; not 0.
        length: u32,
    },
    /// Write `length` bytes at `offset`, from what is to be read, behind the header.
    Write {
        /// Byte offset in the image.
        offset: u64,
        /// Bytes; not 0.
        length: u32,
    },
    /// Make durable what has been written and answered.
    Flush,
    /// Do away with what is in some ranges of the image, one or more.
    Erase,
    /// Answer the disk's serial number.
    GetId,
    /// Nothing but to answer.
    Done(Status),
}

/// There is no byte for the status: the driver cannot be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoStatus;

/// What a request has to be checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Length of the image in bytes.
    pub size_bytes: u64,
    /// Nothing may be written.
    pub read_only: bool,
    /// DISCARD has been negotiated.
    pub discard: bool,
    /// WRITE_ZEROES has been negotiated.
    pub write_zeroes: bool,
}

/// Understands the request in `chain`. The ranges of a [`Request::Erase`] are put into `ranges`, at most
/// [`crate::MAX_RANGES`].
pub fn parse(chain: &Chain, limits: Limits, ranges: &mut Vec<Range>) -> Result<Request, NoStatus> {
    let Some(writable) = chain.writable_len().checked_sub(1) else {
        return Err(NoStatus);
    };
    // In one piece, nearly always.
    let first = chain.readable_slices().next();
    let header = match first.and_then(|s| Some(s.get_ref::<u128>(0).ok()?.load())) {
        Some(header) => header.to_ne_bytes(),
        None => {
            let mut header = [0; HEADER_BYTES];
            if chain.read_at(0, &mut header) != HEADER_BYTES {
                return Ok(Request::Done(Status::IoError));
            }
            header
        }
    };
    let readable = chain.readable_len() - HEADER_BYTES as u32;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    Ok(match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => match range(sector, writable, limits.size_bytes) {
            Ok((offset, length)) => Request::Read { offset, length },
            Err(status) => Request::Done(status),
        },
        VIRTIO_BLK_T_OUT if limits.read_only => Request::Done(Status::IoError),
        VIRTIO_BLK_T_OUT => match range(sector, readable, limits.size_bytes) {
            Ok((offset, length)) => Request::Write { offset, length },
            Err(status) => Request::Done(status),
        },
        VIRTIO_BLK_T_FLUSH => Request::Flush,
        VIRTIO_BLK_T_GET_ID => Request::GetId,
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if limits.read_only => {
            Request::Done(Status::IoError)
        }
        VIRTIO_BLK_T_DISCARD if limits.discard => erase(chain, true, limits, ranges),
        VIRTIO_BLK_T_WRITE_ZEROES if limits.write_zeroes => erase(chain, false, limits, ranges),
        _ => Request::Done(Status::Unsupported),
    })
}

/// Not inlined: it has room for many ranges on its stack.
#[inline(never)]
fn erase(chain: &Chain, discard: bool, limits: Limits, ranges: &mut Vec<Range>) -> Request {
    match erase::take(chain, discard, limits.size_bytes, ranges) {
        Ok(()) if ranges.is_empty() => Request::Done(Status::Ok),
        Ok(()) => Request::Erase,
        Err(status) => Request::Done(status),
    }
}

/// Offset and length in bytes, if they are whole sectors of the image; a transfer of nothing is done.
fn range(sector: u64, length: u32, size_bytes: u64) -> Result<(u64, u32), Status> {
    if !u64::from(length).is_multiple_of(SECTOR_BYTES) {
        return Err(Status::IoError);
    }
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    let end = offset.checked_add(u64::from(length)).ok_or(Status::IoError)?;
    if end > size_bytes {
        return Err(Status::IoError);
    }
    if length == 0 { Err(Status::Ok) } else { Ok((offset, length)) }
}

#[cfg(test)]
mod tests {
    use offload_card::ring::FEATURES;
    use offload_card::testing::{Buffer, DriverQueue, TestGuest};
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::erase::Erase;

    const LIMITS: Limits =
        Limits { size_bytes: 64 * SECTOR_BYTES, read_only: false, discard: true, write_zeroes: true };

    proptest! {
        /// Any chain with any contents: what is to be done stays within the image and within the chain's memory.
        #[test]
        fn any_chain_is_understood_or_refused(
            kind in prop_oneof![0u32..16, any::<u32>()],
            sector in prop_oneof![0u64..80, any::<u64>()],
            readable in prop::collection::vec(0u32..3000, 0..6),
            writable in prop::collection::vec(0u32..3000, 0..6),
            sectors in any::<bool>(),
            read_only in any::<bool>(),
        ) {
            let guest = TestGuest::new(1 << 20);
            let memory = &guest.memory;
            // The first descriptors may cut the header anywhere; it is contiguous in memory all the same.
            let (mut at, mut buffers) = (0x4_0000u64, Vec::new());
            let round = |n: u32| if sectors { n / 512 * 512 } else { n };
            let mut add = |length: u32, writable: bool| {
                buffers.push(Buffer { address: at, length, writable });
                at += u64::from(length);
            };
            if sectors && !readable.is_empty() {
                add(16, false);
            }
            readable.iter().for_each(|n| add(round(*n), false));
            writable.iter().for_each(|n| add(round(*n), true));
            if sectors && !writable.is_empty() {
                add(1, true);
            }
            if readable.is_empty() && writable.is_empty() {
                add(1, false);
            }
            memory.write_obj(kind, GuestAddress(0x4_0000)).unwrap();
            memory.write_obj(sector, GuestAddress(0x4_0008)).unwrap();
            let mut driver = DriverQueue::new(&guest, 0, 16, FEATURES);
            driver.add(&buffers).unwrap();
            let (mut ring, _) = driver.ring(None).unwrap();
            let mut chain = Chain::new();
            prop_assert!(ring.pop(&mut chain).unwrap());
            let limits = Limits { read_only, ..LIMITS };
            let (read, written) = (chain.readable_len(), chain.writable_len());
            let mut ranges = Vec::new();
            match parse(&chain, limits, &mut ranges) {
                Err(NoStatus) => prop_assert_eq!(written, 0),
                Ok(Request::Read { offset, length }) => {
                    prop_assert_eq!((kind, length), (VIRTIO_BLK_T_IN, written - 1));
                    prop_assert!(offset + u64::from(length) <= limits.size_bytes && length > 0);
                }
                Ok(Request::Write { offset, length }) => {
                    prop_assert_eq!((kind, length), (VIRTIO_BLK_T_OUT, read - 16));
                    prop_assert!(offset + u64::from(length) <= limits.size_bytes && length > 0 && !read_only);
                }
                Ok(Request::Flush) => prop_assert_eq!(kind, VIRTIO_BLK_T_FLUSH),
                Ok(Request::GetId) => prop_assert_eq!(kind, VIRTIO_BLK_T_GET_ID),
                Ok(Request::Erase) => {
                    prop_assert!(matches!(kind, VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) && !read_only);
                    prop_assert!(read > 16 && (read - 16) % 16 == 0);
                }
                Ok(Request::Done(status)) => {
                    prop_assert!(written > 0 && (status != Status::Ok || matches!(kind, 0 | 1 | 11 | 13)));
                }
            }
        }

        /// Ranges of any kind: they are taken as they are or all of them are refused, with the status that is due.
        #[test]
        fn ranges_are_all_good_or_none_is_touched(
            discard in any::<bool>(),
            negotiated in any::<bool>(),
            segments in prop::collection::vec(
                (prop_oneof![0u64..80, any::<u64>()], prop_oneof![0u32..80, any::<u32>()],
                 prop_oneof![4 => 0u32..2, 1 => any::<u32>()]), 0..70),
            extra in prop_oneof![4 => Just(0u32), 1 => 1u32..16],
            cut in 1u32..40,
        ) {
            let guest = TestGuest::new(1 << 20);
            let memory = &guest.memory;
            let kind = if discard { VIRTIO_BLK_T_DISCARD } else { VIRTIO_BLK_T_WRITE_ZEROES };
            memory.write_obj(kind, GuestAddress(0x4_0000)).unwrap();
            for (i, (sector, sectors, flags)) in segments.iter().enumerate() {
                let at = 0x4_0010 + i as u64 * 16;
                memory.write_obj(*sector, GuestAddress(at)).unwrap();
                memory.write_obj(*sectors, GuestAddress(at + 8)).unwrap();
                memory.write_obj(*flags, GuestAddress(at + 12)).unwrap();
            }
            let length = 16 + segments.len() as u32 * 16 + extra;
            let first = cut.min(length);
            let mut buffers = vec![Buffer::readable(0x4_0000, first), Buffer::writable(0x5_0000, 1)];
            if length > first {
                buffers.insert(1, Buffer::readable(0x4_0000 + u64::from(first), length - first));
            }
            let mut driver = DriverQueue::new(&guest, 0, 16, FEATURES);
            driver.add(&buffers).unwrap();
            let (mut ring, _) = driver.ring(None).unwrap();
            let mut chain = Chain::new();
            prop_assert!(ring.pop(&mut chain).unwrap());
            let limits = Limits { discard: negotiated, write_zeroes: negotiated, ..LIMITS };
            let mut ranges = Vec::new();
            let request = parse(&chain, limits, &mut ranges).unwrap();
            let bad_flags = |flags: u32| flags > u32::from(!discard);
            let outside = |s: u64, n: u32| s.checked_add(n.into()).is_none_or(|end| end > 64);
            // The first bad segment decides.
            let bad = segments.iter().find(|(s, n, f)| bad_flags(*f) || outside(*s, *n));
            let expected = match bad {
                _ if !negotiated => Request::Done(Status::Unsupported),
                _ if extra > 0 || segments.is_empty() || segments.len() > 64 => Request::Done(Status::IoError),
                Some((_, _, flags)) if bad_flags(*flags) => Request::Done(Status::Unsupported),
                Some(_) => Request::Done(Status::IoError),
                None if segments.iter().all(|(_, n, _)| *n == 0) => Request::Done(Status::Ok),
                None => Request::Erase,
            };
            prop_assert_eq!(request, expected);
            if request == Request::Erase {
                let taken: Vec<_> = ranges.iter().map(|r| (r.offset / 512, r.length / 512, r.erase)).collect();
                let given: Vec<_> = segments.iter().filter(|(_, n, _)| *n > 0).map(|(s, n, f)| {
                    let erase = match (discard, *f) {
                        (true, _) => Erase::Discard,
                        (false, 0) => Erase::Zero,
                        (false, _) => Erase::Unmap,
                    };
                    (*s, u64::from(*n), erase)
                }).collect();
                prop_assert_eq!(taken, given);
            }
        }
    }

    #[test]
    fn only_whole_sectors_inside_the_image() {
        let size = 8 * SECTOR_BYTES;
        assert_eq!(range(0, 4096, size), Ok((0, 4096)));
        assert_eq!(range(7, 512, size), Ok((3584, 512)));
        assert_eq!(range(8, 0, size), Err(Status::Ok));
        assert_eq!(range(9, 0, size), Err(Status::IoError));
        assert_eq!(range(8, 512, size), Err(Status::IoError));
        assert_eq!(range(7, 1024, size), Err(Status::IoError));
        assert_eq!(range(0, 511, size), Err(Status::IoError));
        assert_eq!(range(u64::MAX, 512, size), Err(Status::IoError));
        assert_eq!(range(u64::MAX / 512, 512, u64::MAX), Err(Status::IoError));
    }
}
