//! The Internet checksum (RFC 1071).

use super::{Bytes, Memory};

/// A running ones' complement sum over bytes that may arrive in pieces of any length.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum {
    sum: u64,
    odd: bool,
}

impl Sum {
    /// Nothing summed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes that follow those added before.
    pub fn add(&mut self, mut bytes: &[u8]) {
        if self.odd
            && let Some((first, rest)) = bytes.split_first()
        {
            self.sum += u64::from(*first);
            self.odd = false;
            bytes = rest;
        }
        // Eight bytes at a time: 32-bit halves added into 64 bits cannot overflow for any frame (2^16 bytes).
        let mut words = bytes.chunks_exact(8);
        for w in &mut words {
            let w = w.iter().fold(0_u64, |acc, b| acc << 8 | u64::from(*b));
            self.sum += (w >> 32) + (w & 0xffff_ffff);
        }
        let mut pairs = words.remainder().chunks_exact(2);
        for p in &mut pairs {
            self.sum += p.iter().fold(0, |acc, b| acc << 8 | u64::from(*b));
        }
        if let [last] = pairs.remainder() {
            self.sum += u64::from(*last) << 8;
            self.odd = true;
        }
    }

    /// Adds one 16-bit word; only where an even number of bytes was added before.
    pub fn add_u16(&mut self, word: u16) {
        debug_assert!(!self.odd);
        self.sum += u64::from(word);
    }

    /// Adds bytes `range` of memory that a guest may be changing meanwhile: each piece is copied, then summed.
    pub fn add_memory(&mut self, memory: Memory<'_>, range: Bytes) {
        let mut piece = [0_u8; 1024];
        memory.for_each(range, |part| {
            let mut at = 0;
            while at < part.len() {
                let n = (part.len() - at).min(piece.len());
                if let (Ok(sub), Some(piece)) = (part.subslice(at, n), piece.get_mut(..n)) {
                    sub.copy_to(piece);
                    self.add(piece);
                }
                at += n;
            }
        });
    }

    /// The sum folded to 16 bits, not complemented: what a driver leaves in a checksum field that the device
    /// completes (VirtIO 1.3 section 5.1.6.2).
    pub fn fold(self) -> u16 {
        let mut s = self.sum;
        while s > 0xffff {
            s = (s & 0xffff) + (s >> 16);
        }
        // s <= 0xffff here.
        s as u16
    }

    /// The checksum: the complement of the folded sum.
    pub fn finish(self) -> u16 {
        !self.fold()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::VolatileSlice;

    use super::*;

    fn plain(bytes: &[u8]) -> u16 {
        let mut s = 0_u32;
        for p in bytes.chunks(2) {
            s += u32::from(p[0]) << 8 | u32::from(*p.get(1).unwrap_or(&0));
        }
        while s > 0xffff {
            s = (s & 0xffff) + (s >> 16);
        }
        !(s as u16)
    }

    #[test]
    fn the_example_of_rfc_1071() {
        let mut s = Sum::new();
        s.add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(s.fold(), 0xddf2);
    }

    proptest! {
        #[test]
        fn pieces_sum_like_the_whole(bytes in prop::collection::vec(any::<u8>(), 0..4000), cut in 0..4000_usize) {
            let cut = cut.min(bytes.len());
            let mut s = Sum::new();
            s.add(&bytes[..cut]);
            s.add(&bytes[cut..]);
            prop_assert_eq!(s.finish(), plain(&bytes));
        }

        #[test]
        fn guest_memory_sums_like_bytes(
            mut bytes in prop::collection::vec(any::<u8>(), 1..5000), a in 0..5000_usize, b in 0..5000_usize,
        ) {
            let copy = bytes.clone();
            let a = a % bytes.len();
            let (one, two) = bytes.split_at_mut(a);
            let slices = [VolatileSlice::from(one), VolatileSlice::from(two)];
            let start = b % copy.len();
            let mut s = Sum::new();
            s.add_memory(Memory::Host(&slices), Bytes { start, len: copy.len() - start });
            prop_assert_eq!(s.finish(), plain(&copy[start..]));
        }
    }
}
