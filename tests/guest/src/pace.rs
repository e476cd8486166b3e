//! Operations at a fixed rate, however long each takes.

/// When the next operation is due. Times are ticks of a clock with `hertz` ticks per second.
#[derive(Debug, Clone)]
pub struct Pace {
    hertz: u64,
    rate: u64,
    start: Option<u64>,
    begun: u64,
    due: u64,
    late: u64,
}

impl Pace {
    /// `rate` operations per second, evenly from the first; at least 1.
    #[must_use]
    pub fn new(hertz: u64, rate: u64) -> Self {
        Self { hertz, rate: rate.max(1), start: None, begun: 0, due: 0, late: 0 }
    }

    /// Whether the next operation is due. If so it counts as begun now.
    pub fn take(&mut self, now: u64) -> bool {
        let start = *self.start.get_or_insert(now);
        // Not reached yet when nothing was begun: `due` is 0.
        if now < self.due {
            return false;
        }
        let period = self.hertz / self.rate;
        self.late += u64::from(self.begun > 0 && now - self.due > period);
        self.begun += 1;
        // From the start, so that a period that is no whole number of ticks does not drift.
        let ticks = u128::from(self.begun) * u128::from(self.hertz) / u128::from(self.rate);
        self.due = start.saturating_add(ticks.min(u128::from(u64::MAX)) as u64);
        true
    }

    /// Operations begun more than one period after they were due.
    #[must_use]
    pub fn late(&self) -> u64 {
        self.late
    }

    /// Counts late ones afresh.
    pub fn forget(&mut self) {
        self.late = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn who_comes_late_catches_up() {
        let mut pace = Pace::new(1000, 100);
        assert!(pace.take(5000) && !pace.take(5000) && !pace.take(5009) && pace.take(5010));
        assert!(pace.take(5030), "due at 5020, one period late: not late yet");
        assert_eq!(pace.late(), 0);
        // Due at 5030, 5040, 5050, 5060.
        for _ in 0..4 {
            assert!(pace.take(5060));
        }
        assert!(!pace.take(5060));
        assert_eq!(pace.late(), 2);
        pace.forget();
        assert!(pace.take(5070));
        assert_eq!(pace.late(), 0);
    }

    proptest! {
        #[test]
        fn the_rate_is_kept(hertz in 1000u64..5_000_000_000, rate in 1u64..1000, start in 0u64..1 << 50) {
            let mut pace = Pace::new(hertz, rate);
            let mut begun = 0;
            // Two seconds, looked at twice per period.
            for step in 0..4 * rate {
                begun += u64::from(pace.take(start + (u128::from(step) * u128::from(hertz) / u128::from(2 * rate)) as u64));
            }
            prop_assert!(begun.abs_diff(2 * rate) <= 1, "{begun} of {}", 2 * rate);
            prop_assert_eq!(pace.late(), 0);
        }
    }
}
