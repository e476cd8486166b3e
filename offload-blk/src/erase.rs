//! DISCARD and WRITE_ZEROES: ranges of the image to be given up or to become zeros (VirtIO 1.3 section 5.2.6).

use offload_card::Chain;

use crate::image::SECTOR_BYTES;
use crate::request::{HEADER_BYTES, Status};

/// Ranges in one request, at most (`max_discard_seg`, `max_write_zeroes_seg`).
pub const MAX_RANGES: usize = 64;
/// Length of a range, at most, in sectors (`max_discard_sectors`, `max_write_zeroes_sectors`): 1 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Length of a range as the driver gives it (struct `virtio_blk_discard_write_zeroes`), in bytes.
const SEGMENT_BYTES: usize = 16;
/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP.
const FLAG_UNMAP: u32 = 1;

/// What is to become of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erase {
    /// The driver does not need what is there: its space may be given back, and it may read as anything.
    Discard,
    /// It reads as zeros, and its space may be given back.
    Unmap,
    /// It reads as zeros, and keeps its space.
    Zero,
}

/// A range of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Its first byte.
    pub offset: u64,
    /// Its length in bytes, not 0.
    pub length: u64,
    /// What is to become of it.
    pub erase: Erase,
}

/// Takes the ranges of a request out of `chain`, all of them before any is used, and each once. Those of no length are left
/// out. `discard`: it is a DISCARD.
pub(crate) fn take(
    chain: &Chain,
    discard: bool,
    size_bytes: u64,
    ranges: &mut Vec<Range>,
) -> Result<(), Status> {
    ranges.clear();
    let length = (chain.readable_len() as usize).saturating_sub(HEADER_BYTES);
    if length == 0 || !length.is_multiple_of(SEGMENT_BYTES) || length > MAX_RANGES * SEGMENT_BYTES {
        return Err(Status::IoError);
    }
    let mut bytes = [0; MAX_RANGES * SEGMENT_BYTES];
    let bytes = &mut bytes[..length];
    if chain.read_at(HEADER_BYTES, bytes) != length {
        return Err(Status::IoError);
    }
    for segment in bytes.as_chunks::<SEGMENT_BYTES>().0 {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *segment;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let erase = match (discard, u32::from_le_bytes(flags)) {
            (true, 0) => Erase::Discard,
            (false, 0) => Erase::Zero,
            (false, FLAG_UNMAP) => Erase::Unmap,
            _ => return Err(Status::Unsupported),
        };
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
        let length = u64::from(sectors) * SECTOR_BYTES;
        if sectors > MAX_RANGE_SECTORS || offset.checked_add(length).is_none_or(|end| end > size_bytes) {
            return Err(Status::IoError);
        }
        if length > 0 {
            ranges.push(Range { offset, length, erase });
        }
    }
    Ok(())
}
