//! A histogram of latencies with a relative error below 1/32, without allocation per sample.

use alloc::vec;
use alloc::vec::Vec;

/// Sub-buckets per power of two.
const SUB: u64 = 32;

/// Counts values of 64 bits in buckets whose width is 1/32 of their magnitude.
#[derive(Debug, Clone)]
pub struct Histogram {
    buckets: Vec<u32>,
    count: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; (60 * SUB) as usize], count: 0, max: 0 }
    }
}

const fn bucket(value: u64) -> usize {
    if value < SUB {
        return value as usize;
    }
    let shift = value.ilog2() - SUB.ilog2();
    (shift as u64 * SUB + (value >> shift)) as usize
}

const fn lower_bound(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * SUB {
        return bucket;
    }
    let shift = bucket / SUB - 1;
    (bucket - shift * SUB) << shift
}

impl Histogram {
    /// Counts one value.
    pub fn record(&mut self, value: u64) {
        let last = self.buckets.len() - 1;
        self.buckets[bucket(value).min(last)] += 1;
        self.count += 1;
        self.max = self.max.max(value);
    }

    /// Values counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The greatest value counted, exactly; 0 if none.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The value that `per_mille` thousandths of all values do not exceed (to the bucket's width); 0 if none was counted.
    #[must_use]
    pub fn quantile(&self, per_mille: u64) -> u64 {
        let rank = (self.count * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= rank {
                return lower_bound(index).min(self.max);
            }
        }
        self.max
    }

    /// What was counted, as (greatest value of the class, values in it), ascending, without empty classes. Neighbours are merged
    /// evenly until there are at most `most` classes.
    #[must_use]
    pub fn classes(&self, most: usize) -> Vec<(u64, u64)> {
        let mut merged = 0;
        loop {
            let mut classes: Vec<(u64, u64)> = Vec::new();
            for (number, group) in self.buckets.chunks(1 << merged).enumerate() {
                let count = group.iter().copied().map(u64::from).sum();
                if count > 0 {
                    let next = (number + 1) << merged;
                    let upper = if next < self.buckets.len() { lower_bound(next) - 1 } else { u64::MAX };
                    classes.push((upper.min(self.max), count));
                }
            }
            if classes.len() <= most.max(1) {
                return classes;
            }
            merged += 1;
        }
    }

    /// Adds what `other` counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.max = self.max.max(other.max);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantiles_of_a_ramp() {
        let mut histogram = Histogram::default();
        for value in 1..=1000 {
            histogram.record(value);
        }
        assert_eq!(histogram.count(), 1000);
        assert_eq!(histogram.max(), 1000);
        for (per_mille, expected) in [(500, 500), (900, 900), (990, 990), (1000, 1000)] {
            let got = histogram.quantile(per_mille);
            assert!(got <= expected && got >= expected - expected / 31, "{per_mille}: {got}");
        }
        assert_eq!(Histogram::default().quantile(500), 0);
    }

    proptest! {
        #[test]
        fn classes_hold_every_value(
            values in proptest::collection::vec((any::<u64>(), 0u32..64).prop_map(|(value, by)| value >> by), 0..500),
            most in 1usize..200,
        ) {
            let mut histogram = Histogram::default();
            for value in &values {
                histogram.record(*value);
            }
            let classes = histogram.classes(most);
            prop_assert!(classes.len() <= most);
            prop_assert!(classes.is_sorted_by(|a, b| a.0 < b.0));
            let mut seen = 0;
            for (upper, count) in classes {
                seen += count;
                prop_assert!(count > 0);
                prop_assert_eq!(seen, values.iter().filter(|value| **value <= upper).count() as u64);
            }
            prop_assert_eq!(seen, values.len() as u64);
        }

        #[test]
        fn a_bucket_holds_its_bounds(value in 0u64..1 << 62) {
            let low = lower_bound(bucket(value));
            prop_assert!(low <= value);
            prop_assert!(value - low <= low / SUB);
            prop_assert_eq!(bucket(low), bucket(value));
        }

        #[test]
        fn any_value_can_be_recorded(values: Vec<u64>) {
            let mut histogram = Histogram::default();
            for value in &values {
                histogram.record(*value);
            }
            prop_assert_eq!(histogram.max(), values.iter().copied().max().unwrap_or(0));
            prop_assert!(histogram.quantile(500) <= histogram.max());
        }
    }
}
