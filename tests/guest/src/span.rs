//! What is measured of a stream of operations: those after a warm-up, from its end to the last of them.

/// Counts operations. Times are ticks of any clock that does not go backwards.
#[derive(Debug, Clone, Default)]
pub struct Span {
    warmup: u64,
    /// When the warm-up began.
    first: Option<u64>,
    measuring: bool,
    last: u64,
    ops: u64,
    bytes: u64,
    total: u64,
}

impl Span {
    /// A span whose first `warmup` ticks do not count.
    #[must_use]
    pub fn new(warmup: u64) -> Self {
        Self { warmup, ..Self::default() }
    }

    /// The stream begins now, unless it has begun; how long ago that was.
    pub fn start(&mut self, now: u64) -> u64 {
        now.saturating_sub(*self.first.get_or_insert(now))
    }

    /// Counts an operation, the first of which begins the stream; whether it came after the warm-up.
    pub fn count(&mut self, now: u64, bytes: usize) -> bool {
        self.total += 1;
        let counts = self.start(now) >= self.warmup;
        if counts {
            self.ops += 1;
            self.bytes += bytes as u64;
            self.last = now;
        }
        counts
    }

    /// True once, when there was a warm-up and it is over.
    pub fn warm(&mut self, now: u64) -> bool {
        let over = self.warmup > 0 && self.measured_from().is_some_and(|from| now >= from);
        over && !core::mem::replace(&mut self.measuring, true)
    }

    fn measured_from(&self) -> Option<u64> {
        Some(self.first?.saturating_add(self.warmup))
    }

    /// Whether the measurement has lasted `limit` ticks; never if that is 0.
    #[must_use]
    pub fn expired(&self, now: u64, limit: u64) -> bool {
        limit > 0 && self.measured_from().is_some_and(|from| now.saturating_sub(from) >= limit)
    }

    /// Ticks until the measurement has [lasted](Self::expired) `limit` ticks; `None` if that is 0 or nothing has begun.
    #[must_use]
    pub fn left(&self, now: u64, limit: u64) -> Option<u64> {
        let from = self.measured_from().filter(|_| limit > 0)?;
        Some(from.saturating_add(limit).saturating_sub(now))
    }

    /// Operations after the warm-up.
    #[must_use]
    pub fn ops(&self) -> u64 {
        self.ops
    }

    /// Their bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All operations.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Ticks from the end of the warm-up to the last operation.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        self.measured_from().map_or(0, |from| self.last.saturating_sub(from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warm_up_does_not_count() {
        let mut span = Span::new(100);
        assert!(!span.warm(1000) && !span.expired(1000, 1), "nothing has begun");
        assert!(!span.count(1000, 10));
        assert!(!span.count(1099, 10) && !span.warm(1099));
        assert!(span.warm(1105) && !span.warm(1106), "once");
        assert!(span.count(1110, 7) && span.count(1150, 7));
        assert_eq!((span.ops(), span.bytes(), span.total(), span.ticks()), (2, 14, 4, 50));
        assert_eq!(
            (span.left(1040, 50), span.left(1200, 50), span.left(1040, 0)),
            (Some(110), Some(0), None)
        );
        assert!(!span.expired(1149, 50) && span.expired(1150, 50) && !span.expired(1150, 0));
    }

    #[test]
    fn without_one_everything_counts() {
        let mut span = Span::new(0);
        assert_eq!(span.start(500), 0);
        assert!(span.count(510, 1) && !span.warm(510));
        assert_eq!((span.ops(), span.total(), span.ticks(), span.start(530)), (1, 1, 10, 30));
        assert_eq!(Span::new(5).ticks(), 0);
    }
}
