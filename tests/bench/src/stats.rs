//! Median and spread of repeated measurements, and how far apart two series are.
//!
//! Ratios are of medians, with a percentile bootstrap over rounds. A bootstrap cannot know more than its samples: the interval
//! of a median never reaches beyond the smallest and the largest of them, so that with `n` rounds it holds the true median in
//! at most 1 − 2^(1−n) of all runs ([`coverage_bound`]): 94 % with 5 rounds, 75 % with 3. Whoever prints an interval of few
//! rounds says so.

use serde::Serialize;

/// What is said of a series: the median, and the range that holds the middle half of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) p25: f64,
    pub(crate) p75: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Summary {
    /// # Panics
    /// If there is no sample.
    pub(crate) fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len() - 1;
        let at = |percent: usize| {
            // Linear interpolation between the two nearest ranks.
            let (rank, part) = (last * percent / 100, (last * percent % 100) as f64 / 100.0);
            sorted[rank] + (sorted[(rank + 1).min(last)] - sorted[rank]) * part
        };
        Self { median: at(50), p25: at(25), p75: at(75), min: sorted[0], max: sorted[last] }
    }
}

/// How many times the first series is the second, or by how much it is more.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Estimate {
    /// Of the medians.
    pub(crate) value: f64,
    /// Ends of the 95 % interval.
    pub(crate) low: f64,
    pub(crate) high: f64,
    /// Rounds behind it, of the series that has fewer.
    pub(crate) rounds: usize,
}

impl Estimate {
    /// Whether the interval lies wholly on one side of `value`: what was seen is more than the scatter of rounds.
    pub(crate) fn excludes(&self, value: f64) -> bool {
        self.rounds >= FEWEST_ROUNDS && (self.low > value || self.high < value)
    }
}

/// With fewer rounds an interval says nothing (of one round, it is a point).
pub(crate) const FEWEST_ROUNDS: usize = 3;

/// Resamples of a bootstrap.
const RESAMPLES: usize = 4000;

/// Share of runs in which an interval of the median of `rounds` samples can hold the true median at best.
pub(crate) fn coverage_bound(rounds: usize) -> f64 {
    1.0 - 2f64.powi(1 - i32::try_from(rounds).unwrap_or(i32::MAX))
}

/// Ratio of the medians of two series that were measured in the same rounds: what slowed a whole round down slows both.
///
/// `None` if there is no round, or if the reference is zero too often for a ratio to mean something.
pub(crate) fn paired_ratio(pairs: &[(f64, f64)]) -> Option<Estimate> {
    paired(pairs, |a, b| (b > 0.0).then(|| a / b))
}

/// Difference of the medians of two series that were measured in the same rounds; `None` if there is no round.
pub(crate) fn paired_difference(pairs: &[(f64, f64)]) -> Option<Estimate> {
    paired(pairs, |a, b| Some(a - b))
}

fn paired(pairs: &[(f64, f64)], of_medians: impl Fn(f64, f64) -> Option<f64>) -> Option<Estimate> {
    let (a, b): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
    bootstrap(&a, &b, true, of_medians)
}

/// The median of a series with its interval; `None` if there is no sample.
pub(crate) fn median_interval(samples: &[f64]) -> Option<Estimate> {
    paired_difference(&samples.iter().map(|&s| (s, 0.0)).collect::<Vec<_>>())
}

/// Ratio of the medians of two series that have no rounds in common.
///
/// `None` if one is empty, or if the reference is zero too often for a ratio to mean something.
pub(crate) fn unpaired_ratio(a: &[f64], b: &[f64]) -> Option<Estimate> {
    bootstrap(a, b, false, |a, b| (b > 0.0).then(|| a / b))
}

/// Percentile bootstrap. The seed is fixed: the same samples always give the same interval.
fn bootstrap(
    a: &[f64],
    b: &[f64],
    paired: bool,
    of_medians: impl Fn(f64, f64) -> Option<f64>,
) -> Option<Estimate> {
    if a.is_empty() || b.is_empty() {
        return None;
    }
    let value = of_medians(median(&mut a.to_vec()), median(&mut b.to_vec()))?;
    let mut random = SplitMix64(0x6f75_7462_6f61_7264);
    let (mut drawn_a, mut drawn_b) = (vec![0.0; a.len()], vec![0.0; b.len()]);
    let mut values = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        if paired {
            for (into_a, into_b) in drawn_a.iter_mut().zip(&mut drawn_b) {
                let i = random.below(a.len());
                (*into_a, *into_b) = (a[i], b[i]);
            }
        } else {
            drawn_a.fill_with(|| a[random.below(a.len())]);
            drawn_b.fill_with(|| b[random.below(b.len())]);
        }
        values.push(of_medians(median(&mut drawn_a), median(&mut drawn_b))?);
    }
    values.sort_unstable_by(f64::total_cmp);
    let at = |permille: usize| values[(RESAMPLES - 1) * permille / 1000];
    Some(Estimate { value, low: at(25), high: at(975), rounds: a.len().min(b.len()) })
}

/// Median of samples, of which there is one; it sorts them.
fn median(samples: &mut [f64]) -> f64 {
    samples.sort_unstable_by(f64::total_cmp);
    let (low, high) = (samples[(samples.len() - 1) / 2], samples[samples.len() / 2]);
    low + (high - low) / 2.0
}

/// Steele, Lea and Flood's generator: enough for drawing rounds, and the same on every machine.
struct SplitMix64(u64);

impl SplitMix64 {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        // The high half of the product: no bias that a few thousand draws could show.
        ((u128::from(z) * end as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quartiles_are_interpolated() {
        let s = Summary::of(&[4.0, 1.0, 3.0, 2.0]);
        assert_eq!(s, Summary { median: 2.5, p25: 1.75, p75: 3.25, min: 1.0, max: 4.0 });
    }

    #[test]
    fn one_sample_is_its_own_median() {
        assert_eq!(Summary::of(&[7.0]), Summary { median: 7.0, p25: 7.0, p75: 7.0, min: 7.0, max: 7.0 });
    }

    #[test]
    fn what_slows_a_round_slows_both_of_a_pair() {
        // Rounds differ by half, the systems always by a tenth.
        let pairs = [100.0, 150.0, 80.0, 120.0, 60.0].map(|b| (b * 1.1, b));
        let together = paired_ratio(&pairs).unwrap();
        assert!((together.low - 1.1).abs() < 1e-9 && (together.high - 1.1).abs() < 1e-9, "{together:?}");
        let (a, b): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let apart = unpaired_ratio(&a, &b).unwrap();
        assert!(apart.low < 1.0 && apart.high > 1.2, "{apart:?}");
    }

    #[test]
    fn five_rounds_give_the_whole_range() {
        let pairs = [98.0, 103.0, 100.0, 97.0, 110.0].map(|a| (a, 100.0));
        let ratio = paired_ratio(&pairs).unwrap();
        assert_eq!((ratio.value, ratio.low, ratio.high, ratio.rounds), (1.0, 0.97, 1.1, 5));
        assert_eq!(coverage_bound(5), 0.9375);
    }

    #[test]
    fn a_ratio_to_nothing_is_none() {
        assert_eq!(paired_ratio(&[]), None);
        assert_eq!(paired_ratio(&[(1.0, 0.0); 5]), None);
        assert_eq!(unpaired_ratio(&[1.0], &[]), None);
        assert_eq!(paired_difference(&[(1.0, 0.0); 5]).unwrap().value, 1.0);
    }

    #[test]
    fn one_or_two_rounds_never_show_a_difference() {
        assert!(!paired_ratio(&[(2.0, 1.0); 2]).unwrap().excludes(1.0));
        assert!(paired_ratio(&[(2.0, 1.0); 3]).unwrap().excludes(1.0));
    }

    /// Of runs of one system against itself, about as many as promised must have an interval that holds 1.
    #[test]
    fn a_against_a_holds_one_as_often_as_promised() {
        let mut random = SplitMix64(7);
        let mut noise = || 100.0 + (0..12).map(|_| random.below(1000) as f64 / 1000.0).sum::<f64>();
        for rounds in [5, 15] {
            let runs = 200;
            let held = (0..runs)
                .filter(|_| {
                    let pairs: Vec<_> = (0..rounds).map(|_| (noise(), noise())).collect();
                    !paired_ratio(&pairs).unwrap().excludes(1.0)
                })
                .count();
            assert!(held * 100 >= runs * 90, "{held} of {runs} with {rounds} rounds");
        }
    }

    fn samples() -> impl Strategy<Value = Vec<f64>> {
        proptest::collection::vec(1.0..1e9, 1..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn a_summary_is_in_order_and_within_the_samples(samples in samples()) {
            let s = Summary::of(&samples);
            prop_assert!(s.min <= s.p25 && s.p25 <= s.median && s.median <= s.p75 && s.p75 <= s.max);
            prop_assert!(samples.contains(&s.min) && samples.contains(&s.max));
            prop_assert!((s.median - median(&mut samples.clone())).abs() <= 1e-6 * s.median);
        }

        #[test]
        fn an_interval_holds_the_ratio_and_stays_within_reach(a in samples(), b in samples()) {
            let (sa, sb) = (Summary::of(&a), Summary::of(&b));
            let ratio = unpaired_ratio(&a, &b).unwrap();
            prop_assert!(ratio.low <= ratio.high);
            prop_assert!(ratio.low >= sa.min / sb.max && ratio.high <= sa.max / sb.min);
            prop_assert_eq!(ratio, unpaired_ratio(&a, &b).unwrap());
        }

        #[test]
        fn the_ratio_does_not_depend_on_the_unit(a in samples(), b in samples()) {
            let pairs: Vec<_> = a.iter().copied().zip(b).collect();
            let scaled: Vec<_> = pairs.iter().map(|(a, b)| (a * 1024.0, b * 1024.0)).collect();
            prop_assert_eq!(paired_ratio(&pairs), paired_ratio(&scaled));
        }

        #[test]
        fn a_series_against_itself_is_one(a in samples()) {
            let pairs: Vec<_> = a.iter().map(|&a| (a, a)).collect();
            let ratio = paired_ratio(&pairs).unwrap();
            prop_assert_eq!((ratio.value, ratio.low, ratio.high), (1.0, 1.0, 1.0));
            prop_assert!(!ratio.excludes(1.0));
        }
    }
}
