//! A request being worked on.

use offload_card::Chain;

use super::bounce::Buffer;
use crate::io::Op;
use crate::request::HEADER_BYTES;

/// Most iovecs a system call takes (IOV_MAX).
const MAX_IOVECS: usize = 1024;

/// A place for a request, used again and again; one per head of the ring.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) chain: Chain,
    op: Op,
    offset: u64,
    length: u32,
    /// Bytes moved so far.
    moved: u32,
    /// The data's memory. Those before `first` are done with, and `first` begins where the next byte goes.
    iovecs: Vec<libc::iovec>,
    first: usize,
    /// The guest's buffers are not aligned as O_DIRECT wants: go through `bounce`.
    unaligned: bool,
    pub(super) bounce: Option<Buffer>,
    bounce_iovec: libc::iovec,
}

const NOWHERE: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

impl Default for Slot {
    fn default() -> Self {
        Self {
            chain: Chain::new(),
            op: Op::Sync,
            offset: 0,
            length: 0,
            moved: 0,
            iovecs: Vec::new(),
            first: 0,
            unaligned: false,
            bounce: None,
            bounce_iovec: NOWHERE,
        }
    }
}

impl Slot {
    /// Takes a new request: `length` bytes at `offset`, with the chain that is there. Memory that is not aligned to
    /// `alignment` bytes is gone around.
    pub(super) fn begin(&mut self, op: Op, offset: u64, length: u32, alignment: u32) {
        (self.op, self.offset, self.length, self.moved, self.first) = (op, offset, length, 0, 0);
        self.iovecs.clear();
        let (segments, mut skip) = match op {
            Op::Read => (self.chain.writable(), 0),
            Op::Write | Op::WriteThrough => (self.chain.readable(), HEADER_BYTES),
            Op::Sync => (&[][..], 0),
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
        let mask = alignment as usize - 1;
        self.unaligned = self.iovecs.iter().any(|v| (v.iov_base as usize | v.iov_len) & mask != 0);
    }

    pub(super) fn op(&self) -> Op {
        self.op
    }

    pub(super) fn length(&self) -> u32 {
        self.length
    }

    /// Where in the image the next transfer begins.
    pub(super) fn next_offset(&self) -> u64 {
        self.offset + u64::from(self.moved)
    }

    /// The memory of the next transfer.
    pub(super) fn next_iovecs(&self) -> &[libc::iovec] {
        if self.unaligned {
            return std::slice::from_ref(&self.bounce_iovec);
        }
        let rest = &self.iovecs[self.first..];
        &rest[..rest.len().min(MAX_IOVECS)]
    }

    pub(super) fn needs_bounce(&self) -> bool {
        self.unaligned
    }

    /// Takes a buffer for the next transfer, and fills it if that is a write.
    pub(super) fn fill_bounce(&mut self, mut buffer: Buffer) {
        let length = buffer.len().min((self.length - self.moved) as usize);
        if self.op != Op::Read {
            for (at, piece) in buffer.pieces(length) {
                self.chain.read_at(HEADER_BYTES + self.moved as usize + at, piece);
            }
        }
        self.bounce_iovec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: length };
        self.bounce = Some(buffer);
    }

    /// `moved` bytes more have been moved. True if that was all.
    pub(super) fn advance(&mut self, moved: u32) -> bool {
        if self.op == Op::Read
            && self.unaligned
            && let Some(buffer) = &mut self.bounce
        {
            for (at, piece) in buffer.pieces(moved as usize) {
                self.chain.write_at(self.moved as usize + at, piece);
            }
        }
        // The kernel moves no more than it was asked for.
        self.moved = self.moved.saturating_add(moved).min(self.length);
        let mut left = moved as usize;
        while let Some(iovec) = self.iovecs.get_mut(self.first).filter(|_| left > 0) {
            let part = left.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(part);
            iovec.iov_len -= part;
            left -= part;
            self.first += usize::from(iovec.iov_len == 0);
        }
        self.moved == self.length
    }

    /// The request is over; gives its buffer back.
    pub(super) fn end(&mut self) -> Option<Buffer> {
        (self.op, self.length, self.unaligned) = (Op::Sync, 0, false);
        self.bounce_iovec = NOWHERE;
        self.bounce.take()
    }
}
