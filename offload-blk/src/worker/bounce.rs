//! Aligned buffers for guests whose buffers O_DIRECT does not take.

/// Buffers of a queue; more requests than this wait.
const MAX_BUFFERS: usize = 16;
const BLOCKS: usize = 32;
const BLOCK_BYTES: usize = 4096;

/// Aligned for every device there is.
#[derive(Debug, Clone)]
#[repr(C, align(4096))]
struct Block([u8; BLOCK_BYTES]);

/// A buffer of 128 KiB.
#[derive(Debug)]
pub(super) struct Buffer(Vec<Block>);

impl Buffer {
    pub(super) fn len(&self) -> usize {
        self.0.len() * BLOCK_BYTES
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }

    /// Its first `length` bytes, in pieces, each with its offset.
    pub(super) fn pieces(&mut self, length: usize) -> impl Iterator<Item = (usize, &mut [u8])> {
        let end = length.min(self.len());
        self.0.iter_mut().enumerate().map_while(move |(i, block)| {
            let at = i * BLOCK_BYTES;
            (at < end).then(|| (at, &mut block.0[..BLOCK_BYTES.min(end - at)]))
        })
    }
}

/// A queue's buffers: made when first needed, then kept.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: Vec<Buffer>,
    made: usize,
}

impl Pool {
    /// A buffer, unless all are in use.
    pub(super) fn take(&mut self) -> Option<Buffer> {
        if let Some(buffer) = self.free.pop() {
            return Some(buffer);
        }
        (self.made < MAX_BUFFERS).then(|| {
            self.made += 1;
            Buffer(vec![Block([0; BLOCK_BYTES]); BLOCKS])
        })
    }

    /// Gives one back.
    pub(super) fn put(&mut self, buffer: Buffer) {
        self.free.push(buffer);
    }
}
