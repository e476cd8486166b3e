//! Median and spread of repeated measurements.

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

#[cfg(test)]
mod tests {
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
}
