//! How ranges are done away with: piece by piece, in the best way that the image's file system has.

use crate::erase::{Erase, Range};
use crate::image::Image;
use crate::io::Op;
use crate::store::Store;

/// What is written where nothing better can make zeros.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// Longest write of zeros, in bytes: others want the storage, too.
const MAX_WRITE_BYTES: u64 = 1 << 20;
/// Longest piece that is left to the image's format, in bytes, for the same reason.
const MAX_FORMATTED_BYTES: u64 = 64 << 20;

/// One transfer. `Write` writes zeros, `Sync` has neither offset nor length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) op: Op,
    pub(super) offset: u64,
    pub(super) length: u64,
}

const SYNC: Piece = Piece { op: Op::Sync, offset: 0, length: 0 };

/// Ranges being worked on.
#[derive(Debug, Default)]
pub(super) struct Erasing {
    pub(super) ranges: Vec<Range>,
    /// Those before it are done with, and `done` bytes of it.
    range: usize,
    done: u64,
    /// A sync is still to follow.
    sync: bool,
}

impl Erasing {
    /// Begins with what is in `ranges`; with `durable`, the last piece is a sync.
    pub(super) fn begin(&mut self, durable: bool) {
        (self.range, self.done, self.sync) = (0, 0, durable);
    }

    /// What is to be done next; `None`: nothing any more.
    pub(super) fn next(&mut self, store: &Store) -> Option<Piece> {
        match store {
            Store::Image(image) => self.next_in_file(image),
            Store::Qcow2(_) => self.next_formatted(),
            // It does not offer any of this.
            Store::Null(_) => None,
        }
    }

    /// How a range is done away with is up to the format.
    fn next_formatted(&mut self) -> Option<Piece> {
        while let Some(range) = self.ranges.get(self.range) {
            let (offset, left) = (range.offset + self.done, range.length - self.done);
            if left > 0 {
                let op = match range.erase {
                    Erase::Discard => Op::Discard,
                    Erase::Unmap => Op::Punch,
                    Erase::Zero => Op::Zero,
                };
                return Some(Piece { op, offset, length: left.min(MAX_FORMATTED_BYTES) });
            }
            self.range += 1;
            self.done = 0;
        }
        self.sync.then_some(SYNC)
    }

    fn next_in_file(&mut self, image: &Image) -> Option<Piece> {
        let align = image.geometry().erase_alignment();
        while let Some(range) = self.ranges.get(self.range) {
            let (offset, left) = (range.offset + self.done, range.length - self.done);
            let op = match range.erase {
                _ if left == 0 => None,
                Erase::Discard | Erase::Unmap if image.punches() => Some(Op::Punch),
                // It was a hint.
                Erase::Discard => None,
                Erase::Unmap | Erase::Zero if image.zeroes() => Some(Op::Zero),
                Erase::Unmap | Erase::Zero => Some(Op::Write),
            };
            match op {
                None => {
                    self.range += 1;
                    self.done = 0;
                }
                Some(Op::Write) => return Some(write(offset, left)),
                Some(op) if offset.is_multiple_of(align) && left >= align => {
                    return Some(Piece { op, offset, length: left - left % align });
                }
                Some(_) => {
                    // Up to the next boundary, or what is behind the last.
                    let to_boundary = offset.next_multiple_of(align) - offset;
                    let edge = if to_boundary == 0 { left } else { to_boundary.min(left) };
                    if range.erase != Erase::Discard {
                        return Some(write(offset, edge));
                    }
                    self.done += edge;
                }
            }
        }
        self.sync.then_some(SYNC)
    }

    /// `piece`, the last that [`Erasing::next`] gave, ended with `result`.
    ///
    /// # Errors
    /// An errno: the request has failed.
    pub(super) fn ended(&mut self, piece: Piece, result: i32, store: &Store) -> Result<(), i32> {
        match (piece.op, result, store) {
            (Op::Punch, e, Store::Image(image)) if unsupported(e) => image.cannot_punch(),
            (Op::Zero, e, Store::Image(image)) if unsupported(e) => image.cannot_zero(),
            (_, e, _) if e < 0 => return Err(-e),
            (Op::Punch | Op::Zero | Op::Discard, ..) => self.done += piece.length,
            (Op::Sync, ..) => self.sync = false,
            // Nothing of it was written.
            (_, 0, _) => return Err(libc::EIO),
            (_, written, _) => self.done += u64::from(written.unsigned_abs()).min(piece.length),
        }
        Ok(())
    }
}

fn unsupported(result: i32) -> bool {
    matches!(-result, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
}

fn write(offset: u64, length: u64) -> Piece {
    Piece { op: Op::Write, offset, length: length.min(MAX_WRITE_BYTES) }
}

/// Fills `iovecs` with `length` bytes of zeros to be written, at most [`MAX_WRITE_BYTES`].
pub(super) fn zeros(length: u64, iovecs: &mut Vec<libc::iovec>) {
    iovecs.clear();
    let mut left = length.min(MAX_WRITE_BYTES) as usize;
    while left > 0 {
        let part = left.min(ZEROS.len());
        // Only ever read.
        iovecs.push(libc::iovec { iov_base: ZEROS.as_ptr().cast_mut().cast(), iov_len: part });
        left -= part;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::image::Geometry;

    fn image(block: u32) -> Store {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let geometry = Geometry {
            size_bytes: 1 << 20,
            logical_block: block,
            physical_block: 4096,
            block_device: true,
            memory_alignment: 1,
        };
        Store::Image(Arc::new(Image::for_test(file, geometry)))
    }

    proptest! {
        /// Whatever the file system can do and however the ranges lie: every byte that must become zero does, once, and no
        /// other is touched; what is asked of the block layer is aligned as it wants it.
        #[test]
        fn ranges_are_covered(
            given in prop::collection::vec((0u64..64, 1u64..64, 0u8..3), 1..5),
            big in any::<bool>(),
            punches in any::<bool>(),
            zeroes in any::<bool>(),
            durable in any::<bool>(),
            short in 1i32..5000,
        ) {
            let align = if big { 4096 } else { 512 };
            let image = image(align as u32);
            let ranges: Vec<_> = given.iter().map(|(s, n, e)| Range {
                offset: s * 512,
                length: n * 512,
                erase: [Erase::Discard, Erase::Unmap, Erase::Zero][usize::from(*e)],
            }).collect();
            let mut erasing = Erasing { ranges: ranges.clone(), ..Default::default() };
            erasing.begin(durable);
            let mut hit = vec![0u32; 128 * 512];
            let (mut syncs, mut pieces) = (0, 0);
            while let Some(piece) = erasing.next(&image) {
                pieces += 1;
                // A byte at a time, at worst.
                prop_assert!(pieces < 4 * 64 * 512 + 100, "it does not end");
                let (able, whole) = match piece.op {
                    Op::Punch => (punches, true),
                    Op::Zero => (zeroes, true),
                    Op::Write => (true, false),
                    Op::Sync => { syncs += 1; (true, true) }
                    other => panic!("{other:?}"),
                };
                prop_assert!(!matches!(piece.op, Op::Punch | Op::Zero)
                    || (piece.offset % align == 0 && piece.length % align == 0 && piece.length > 0));
                let result = if !able { -libc::EOPNOTSUPP } else if whole { 0 } else { short };
                let moved = if whole { piece.length } else { piece.length.min(short as u64) };
                if able {
                    (piece.offset..piece.offset + moved).for_each(|b| hit[b as usize] += 1);
                }
                prop_assert_eq!(erasing.ended(piece, result, &image), Ok(()));
            }
            prop_assert_eq!(syncs, u32::from(durable));
            for (byte, times) in hit.iter().enumerate() {
                let inside = |r: &&Range| (r.offset..r.offset + r.length).contains(&(byte as u64));
                let all = ranges.iter().filter(inside).count() as u32;
                let musts = ranges.iter().filter(inside).filter(|r| r.erase != Erase::Discard).count() as u32;
                prop_assert!((musts..=all).contains(times), "byte {byte}: {times} times");
            }
        }
    }

    #[test]
    fn a_failure_is_one() {
        let image = image(512);
        let range = Range { offset: 0, length: 4096, erase: Erase::Unmap };
        let mut erasing = Erasing { ranges: vec![range], ..Default::default() };
        erasing.begin(true);
        let piece = erasing.next(&image).unwrap();
        assert_eq!(erasing.ended(piece, -libc::ENOSPC, &image), Err(libc::ENOSPC));
        // First the one way turns out not to be there, then the other.
        for op in [Op::Punch, Op::Zero] {
            let piece = erasing.next(&image).unwrap();
            assert_eq!((piece.op, erasing.ended(piece, -libc::EOPNOTSUPP, &image)), (op, Ok(())));
        }
        let piece = erasing.next(&image).unwrap();
        assert_eq!(piece, Piece { op: Op::Write, offset: 0, length: 4096 });
        assert_eq!(erasing.ended(piece, 0, &image), Err(libc::EIO));
    }
}
