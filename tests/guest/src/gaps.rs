//! Times in which nothing came, where something should have.

use alloc::vec::Vec;

/// Most of them that are kept.
const MAX: usize = 4096;

/// The longest gap, and those that are to be kept. Times are ticks of any clock that does not go backwards.
#[derive(Debug, Clone, Default)]
pub struct Gaps {
    longest: u64,
    /// Those of at least so many ticks are kept; `None`: none.
    kept_from: Option<u64>,
    /// When they ended, and how long they were. Its room is there before I/O begins.
    kept: Vec<(u64, u64)>,
}

impl Gaps {
    /// Gaps of which those of at least `ticks` are kept, if any.
    #[must_use]
    pub fn new(ticks: Option<u64>) -> Self {
        let kept = Vec::with_capacity(ticks.map_or(0, |_| MAX));
        Self { longest: 0, kept_from: ticks, kept }
    }

    /// Counts one that ends now.
    pub fn add(&mut self, now: u64, ticks: u64) {
        self.longest = self.longest.max(ticks);
        if self.kept_from.is_some_and(|from| ticks >= from) && self.kept.len() < MAX {
            self.kept.push((now, ticks));
        }
    }

    /// Forgets all until now.
    pub fn clear(&mut self) {
        self.longest = 0;
        self.kept.clear();
    }

    /// The longest.
    #[must_use]
    pub fn longest(&self) -> u64 {
        self.longest
    }

    /// Those that are kept: when they ended, and how long they were. `None`: none are to be.
    #[must_use]
    pub fn kept(&self) -> Option<&[(u64, u64)]> {
        self.kept_from.map(|_| &self.kept[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_is_known_and_long_ones_are_kept_within_a_bound() {
        let mut gaps = Gaps::new(Some(10));
        for (now, ticks) in [(100, 3), (200, 10), (300, 9), (400, 50), (500, 20)] {
            gaps.add(now, ticks);
        }
        assert_eq!(gaps.longest(), 50);
        assert_eq!(gaps.kept(), Some(&[(200, 10), (400, 50), (500, 20)][..]));
        gaps.clear();
        assert_eq!((gaps.longest(), gaps.kept()), (0, Some(&[][..])));
        for now in 0..2 * MAX as u64 {
            gaps.add(now, 11);
        }
        assert_eq!(gaps.kept().unwrap().len(), MAX);
        let mut none = Gaps::new(None);
        none.add(1, 1);
        assert_eq!((none.longest(), none.kept()), (1, None));
    }
}
