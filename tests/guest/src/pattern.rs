//! The deterministic contents of sectors and frames.
//!
//! A sector's bytes are a function of (seed, sector number, generation), so that data of another sector, of an
//! earlier write of the same sector or of another run never compares equal.

/// Bytes in a sector of a virtio block device (VirtIO 1.3, 5.2: always 512).
pub const SECTOR: usize = 512;

/// Distance between successive 64-bit words of a pattern; odd, so the words of one pattern never repeat.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's output function: a bijection that spreads every input bit over the word.
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A small generator of pseudo-random numbers (SplitMix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator whose sequence depends on `seed` only.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 pseudo-random bits.
    pub fn word(&mut self) -> u64 {
        let value = mix(self.0);
        self.0 = self.0.wrapping_add(STEP);
        value
    }

    /// A pseudo-random number below `bound` (0 if `bound` is 0).
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.word()) * u128::from(bound)) >> 64) as u64
    }
}

const fn sector_key(seed: u64, sector: u64, generation: u64) -> u64 {
    mix(mix(mix(seed) ^ sector) ^ generation)
}

fn fill(mut word: u64, out: &mut [u8]) {
    let mut chunks = out.chunks_exact_mut(8);
    for chunk in &mut chunks {
        chunk.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_add(STEP);
    }
    let rest = chunks.into_remainder();
    let len = rest.len();
    rest.copy_from_slice(&word.to_le_bytes()[..len]);
}

/// Compares `data` with the pattern that starts with `word`; the offset of the first byte that differs.
fn check(mut word: u64, data: &[u8]) -> Option<usize> {
    let mut chunks = data.chunks_exact(8);
    for (index, chunk) in (&mut chunks).enumerate() {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(chunk);
        let difference = u64::from_le_bytes(bytes) ^ word;
        if difference != 0 {
            return Some(index * 8 + difference.trailing_zeros() as usize / 8);
        }
        word = word.wrapping_add(STEP);
    }
    let expected = word.to_le_bytes();
    let start = data.len() - chunks.remainder().len();
    chunks.remainder().iter().zip(expected).position(|(a, b)| *a != b).map(|at| start + at)
}

/// Fills whole sectors from sector number `sector` on with their pattern; `out` may be any multiple of 512 bytes (what is
/// beyond the last whole sector gets the beginning of the next sector's pattern).
pub fn fill_sectors(seed: u64, sector: u64, generation: u64, out: &mut [u8]) {
    for (number, bytes) in (sector..).zip(out.chunks_mut(SECTOR)) {
        fill(sector_key(seed, number, generation), bytes);
    }
}

/// The offset of the first byte of `data` that differs from what [`fill_sectors`] writes.
#[must_use]
pub fn check_sectors(seed: u64, sector: u64, generation: u64, data: &[u8]) -> Option<usize> {
    (sector..).zip(data.chunks(SECTOR)).enumerate().find_map(|(index, (number, bytes))| {
        check(sector_key(seed, number, generation), bytes).map(|at| index * SECTOR + at)
    })
}

/// Fills the patterned part of the payload of frame `sequence`.
pub fn fill_payload(seed: u64, sequence: u64, out: &mut [u8]) {
    fill(sector_key(!seed, sequence, 0), out);
}

/// The offset of the first byte of `data` that differs from what [`fill_payload`] writes.
#[must_use]
pub fn check_payload(seed: u64, sequence: u64, data: &[u8]) -> Option<usize> {
    check(sector_key(!seed, sequence, 0), data)
}

/// Visits 0..`len` once each in a scattered order: `(start + step * k) mod len` with `step` coprime to `len`.
#[derive(Debug, Clone, Copy)]
pub struct Shuffle {
    len: u64,
    step: u64,
    start: u64,
}

impl Shuffle {
    /// An order of 0..`len` that depends on `seed`.
    #[must_use]
    pub fn new(len: u64, seed: u64) -> Self {
        let mut random = Random::new(seed);
        // Near the golden section of len neighbours in time are far apart in place.
        let mut step = (len / 2 + random.below(len / 8 + 1)).max(1);
        while gcd(step, len) != 1 {
            step += 1;
        }
        Self { len, step, start: random.below(len) }
    }

    /// The position visited as number `k` (taken modulo the length; 0 if there is nothing to visit).
    #[must_use]
    pub fn at(&self, k: u64) -> u64 {
        if self.len == 0 {
            return 0;
        }
        ((u128::from(self.start) + u128::from(self.step) * u128::from(k)) % u128::from(self.len)) as u64
    }
}

const fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_filled_checks(seed: u64, sector in 0..u64::MAX / 2, generation: u64, sectors in 1usize..4) {
            let mut data = vec![0; sectors * SECTOR];
            fill_sectors(seed, sector, generation, &mut data);
            prop_assert_eq!(check_sectors(seed, sector, generation, &data), None);
            prop_assert!(check_sectors(seed, sector, generation.wrapping_add(1), &data).is_some());
            prop_assert!(check_sectors(seed, sector + 1, generation, &data).is_some());
            prop_assert!(check_sectors(seed.wrapping_add(1), sector, generation, &data).is_some());
        }

        #[test]
        fn every_changed_byte_is_found(seed: u64, len in 1usize..200, at in 0usize..200, flip in 1u8..) {
            let at = at % len;
            let mut data = vec![0; len];
            fill_payload(seed, 7, &mut data);
            data[at] ^= flip;
            prop_assert_eq!(check_payload(seed, 7, &data), Some(at));
        }

        #[test]
        fn a_shuffle_visits_everything_once(len in 0u64..2000, seed: u64) {
            let shuffle = Shuffle::new(len, seed);
            let mut seen = vec![false; len as usize];
            for k in 0..len {
                seen[shuffle.at(k) as usize] = true;
            }
            prop_assert!(seen.iter().all(|s| *s));
        }

        #[test]
        fn below_is_below(seed: u64, bound in 1u64..) {
            prop_assert!(Random::new(seed).below(bound) < bound);
        }
    }
}
