//! A request being worked on.

use offload_card::Chain;

use super::erasing::{Erasing, Piece, zeros};
use crate::image::Geometry;
use crate::io::{Op, Transfer};
use crate::qcow2::Qcow2;
use crate::request::HEADER_BYTES;
use crate::store::{Qcow2Store, Store};

/// Most iovecs a system call takes (IOV_MAX).
const MAX_IOVECS: usize = 1024;

/// A place for a request, used again and again; one per head of the ring.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) chain: Chain,
    /// It holds a request.
    pub(super) active: bool,
    /// How often the host has put the next transfer off.
    pub(super) retries: u8,
    /// What its transfer that is under way counts as, see [`crate::share::cost`].
    pub(super) cost: u32,
    op: Op,
    offset: u64,
    length: u32,
    /// Bytes moved so far.
    moved: u32,
    /// The data's memory. Those before `first` are done with, and `first` begins where the next byte goes.
    iovecs: Vec<libc::iovec>,
    first: usize,
    /// Their beginning, if the next transfer is of a part of them only.
    part: Vec<libc::iovec>,
    /// The next transfer is not aligned as O_DIRECT wants.
    unaligned: bool,
    /// The ranges to be done away with, if it is a request of that kind.
    pub(super) erasing: Erasing,
    /// The piece of them that is next, then.
    piece: Option<Piece>,
}

// SAFETY: `iovecs` are addresses in guest memory that `chain`, which goes with them, keeps mapped; any thread may use
// them.
unsafe impl Send for Slot {}

impl Default for Slot {
    fn default() -> Self {
        Self {
            chain: Chain::new(),
            active: false,
            retries: 0,
            cost: 0,
            op: Op::Sync,
            offset: 0,
            length: 0,
            moved: 0,
            iovecs: Vec::new(),
            first: 0,
            part: Vec::new(),
            unaligned: false,
            erasing: Erasing::default(),
            piece: None,
        }
    }
}

impl Slot {
    /// Takes a new request: `length` bytes at `offset`, with the chain that is there.
    pub(super) fn begin(&mut self, op: Op, offset: u64, length: u32, geometry: &Geometry) {
        (self.active, self.retries) = (true, 0);
        (self.op, self.offset, self.length, self.moved, self.first) = (op, offset, length, 0, 0);
        self.iovecs.clear();
        self.piece = None;
        let (segments, mut skip) = match op {
            Op::Read => (self.chain.writable(), 0),
            Op::Write | Op::WriteThrough => (self.chain.readable(), HEADER_BYTES),
            Op::Sync | Op::Punch | Op::Zero | Op::Discard => (&[][..], 0),
        };
        let mut left = length as usize;
        for segment in segments {
            let mut iovec = segment.iovec();
            let skipped = skip.min(iovec.iov_len);
            skip -= skipped;
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(skipped);
            iovec.iov_len = (iovec.iov_len - skipped).min(left);
            left -= iovec.iov_len;
            if iovec.iov_len > 0 {
                self.iovecs.push(iovec);
            }
        }
        self.align(geometry);
    }

    /// Takes a new request: the ranges of `erasing`, made durable if it says so. False if there is nothing to do for it.
    pub(super) fn begin_erase(&mut self, durable: bool, store: &Store) -> bool {
        (self.active, self.retries) = (true, 0);
        (self.op, self.offset, self.length, self.moved, self.first) = (Op::Punch, 0, 0, 0, 0);
        self.erasing.begin(durable);
        self.next_piece(store)
    }

    fn next_piece(&mut self, store: &Store) -> bool {
        self.piece = self.erasing.next(store);
        self.iovecs.clear();
        if let Some(Piece { op: Op::Write, length, .. }) = self.piece {
            zeros(length, &mut self.iovecs);
        }
        self.piece.is_some()
    }

    /// A piece of the ranges ended with `result`. True if that was all.
    ///
    /// # Errors
    /// An errno: the request has failed.
    pub(super) fn erased(&mut self, result: i32, store: &Store) -> Result<bool, i32> {
        self.retries = 0;
        let Some(piece) = self.piece else { return Ok(true) };
        self.erasing.ended(piece, result, store)?;
        Ok(!self.next_piece(store))
    }

    /// It does away with ranges.
    pub(super) fn erases(&self) -> bool {
        self.piece.is_some()
    }

    /// Finds out whether what is left can go around the page cache: before Linux 6.18 every piece must be whole blocks.
    fn align(&mut self, geometry: &Geometry) {
        if geometry.memory_alignment == 1 {
            return;
        }
        let (memory, block) = (geometry.memory_alignment as usize - 1, geometry.logical_block as usize - 1);
        self.unaligned = self.next_offset() & block as u64 != 0
            || self.iovecs[self.first..]
                .iter()
                .any(|v| v.iov_base as usize & memory != 0 || v.iov_len & block != 0);
    }

    pub(super) fn op(&self) -> Op {
        self.op
    }

    pub(super) fn length(&self) -> u32 {
        self.length
    }

    /// Bytes still to be moved.
    pub(super) fn left(&self) -> u32 {
        self.length - self.moved
    }

    /// Bytes moved so far.
    pub(super) fn moved(&self) -> u32 {
        self.moved
    }

    /// Where in the image the next transfer begins.
    pub(super) fn next_offset(&self) -> u64 {
        self.piece.map_or(self.offset + u64::from(self.moved), |piece| piece.offset)
    }

    /// The next transfer, of `most` bytes at most; that is a multiple of what O_DIRECT wants.
    pub(super) fn transfer(&mut self, store: &Store, most: u32) -> Transfer<'_> {
        let (op, offset) = (self.op, self.next_offset());
        let plain =
            Transfer { op, offset, formatted: false, length: 0, iovecs: &[], unaligned: self.unaligned };
        if let Some(Piece { op, offset, length }) = self.piece {
            let formatted = matches!(store, Store::Qcow2(_)) && op != Op::Sync;
            let iovecs = &self.iovecs[..];
            return Transfer { op, offset, formatted, length, iovecs, unaligned: true };
        }
        match store {
            Store::Qcow2(Qcow2Store(qcow2)) if op != Op::Sync => self.placed(qcow2, plain, most),
            _ => Transfer { iovecs: self.first_bytes(u64::from(most)), ..plain },
        }
    }

    /// What is left of the memory, as far as it can be in one transfer.
    fn rest(&self) -> &[libc::iovec] {
        let rest = &self.iovecs[self.first..];
        &rest[..rest.len().min(MAX_IOVECS)]
    }

    /// The next transfer where its clusters are, if that is known and nothing else is to be done.
    fn placed<'a>(&'a mut self, qcow2: &Qcow2, plain: Transfer<'a>, most: u32) -> Transfer<'a> {
        let place = if plain.op == Op::WriteThrough && qcow2.unsynced() {
            None
        } else {
            qcow2.run(plain.offset, u64::from(self.left()))
        };
        match place {
            None => Transfer { formatted: true, iovecs: self.rest(), ..plain },
            Some((offset, run)) => {
                Transfer { offset, iovecs: self.first_bytes(run.min(u64::from(most))), ..plain }
            }
        }
    }

    /// What is left of the memory, as far as it can be in one transfer and is no more than `most` bytes.
    fn first_bytes(&mut self, mut most: u64) -> &[libc::iovec] {
        if most >= u64::from(self.left()) {
            return self.rest();
        }
        self.part.clear();
        for iovec in self.iovecs[self.first..].iter().take(MAX_IOVECS) {
            if most == 0 {
                break;
            }
            let iov_len = iovec.iov_len.min(usize::try_from(most).unwrap_or(usize::MAX));
            most -= iov_len as u64;
            self.part.push(libc::iovec { iov_len, ..*iovec });
        }
        &self.part
    }

    /// `moved` bytes more have been moved. True if that was all.
    pub(super) fn advance(&mut self, moved: u32, geometry: &Geometry) -> bool {
        self.retries = 0;
        // The kernel moves no more than it was asked for.
        self.moved = self.moved.saturating_add(moved).min(self.length);
        if self.moved == self.length {
            return true;
        }
        let mut left = moved as usize;
        while let Some(iovec) = self.iovecs.get_mut(self.first).filter(|_| left > 0) {
            let part = left.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(part);
            iovec.iov_len -= part;
            left -= part;
            self.first += usize::from(iovec.iov_len == 0);
        }
        self.align(geometry);
        false
    }
}

#[cfg(test)]
mod tests {
    use offload_card::ring::FEATURES;
    use offload_card::testing::{Buffer, DriverQueue, TestGuest};

    use super::*;

    /// A write of `buffers` at `offset`, behind a header; memory is as aligned as in the guest up to a page.
    fn slot(buffers: &[(u64, u32)], offset: u64, geometry: &Geometry) -> Slot {
        let guest = TestGuest::new(1 << 20);
        let mut driver = DriverQueue::new(&guest, 0, 16, FEATURES);
        let mut chain = vec![Buffer::readable(0x4_0000, HEADER_BYTES as u32)];
        chain.extend(buffers.iter().map(|(address, length)| Buffer::readable(*address, *length)));
        chain.push(Buffer::writable(0x4_1000, 1));
        driver.add(&chain).unwrap();
        let (mut ring, _) = driver.ring(None).unwrap();
        let mut slot = Slot::default();
        assert!(ring.pop(&mut slot.chain).unwrap());
        let length = buffers.iter().map(|(_, length)| length).sum();
        slot.begin(Op::Write, offset, length, geometry);
        slot
    }

    fn store() -> Store {
        Store::null(1 << 30, false).unwrap()
    }

    const BLOCKS: Geometry = Geometry {
        size_bytes: 1 << 30,
        logical_block: 4096,
        physical_block: 4096,
        block_device: true,
        memory_alignment: 512,
    };

    #[test]
    fn what_is_not_whole_blocks_goes_by_the_page_cache() {
        let unaligned = |buffers: &[(u64, u32)], offset| {
            slot(buffers, offset, &BLOCKS).transfer(&store(), u32::MAX).unaligned
        };
        assert!(!unaligned(&[(0x5_0000, 4096)], 0));
        assert!(!unaligned(&[(0x5_0200, 4096), (0x6_0000, 8192)], 8192));
        // A sector is less than a block, and so is where it is.
        assert!(unaligned(&[(0x5_0000, 512)], 0));
        assert!(unaligned(&[(0x5_0000, 4096)], 512));
        // Blocks in all, but not in each piece; and memory.
        assert!(unaligned(&[(0x5_0000, 512), (0x6_0000, 3584)], 0));
        assert!(unaligned(&[(0x5_0100, 4096)], 0));
        let cached = Geometry { memory_alignment: 1, ..BLOCKS };
        assert!(!slot(&[(0x5_0001, 511)], 512, &cached).transfer(&store(), u32::MAX).unaligned);
    }

    #[test]
    fn a_transfer_that_stops_short_of_a_block_goes_on_by_the_page_cache() {
        let mut slot = slot(&[(0x5_0000, 4096), (0x6_0000, 4096)], 0, &BLOCKS);
        assert!(!slot.advance(4096, &BLOCKS));
        assert_eq!(
            (
                slot.transfer(&store(), u32::MAX).unaligned,
                slot.transfer(&store(), u32::MAX).offset,
                slot.transfer(&store(), u32::MAX).iovecs.len()
            ),
            (false, 4096, 1)
        );
        assert!(!slot.advance(1024, &BLOCKS));
        assert_eq!(
            (
                slot.transfer(&store(), u32::MAX).unaligned,
                slot.transfer(&store(), u32::MAX).offset,
                slot.transfer(&store(), u32::MAX).iovecs[0].iov_len
            ),
            (true, 5120, 3072)
        );
        assert!(slot.advance(3072, &BLOCKS));
        assert_eq!(slot.moved(), 8192);
    }
}
