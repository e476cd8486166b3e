//! What a device's limits may be: the same to whoever asks for them and to whoever enforces them.

use crate::error::Error;
use crate::v1::DeviceLimits;

/// Largest rate per second. More is no limit.
pub const MAX_RATE: u64 = 1 << 40;
/// Smallest rate in bytes per second: what the largest request owes is to be paid in this life.
pub const MIN_BYTES_RATE: u64 = 4096;
/// Longest burst, in seconds at the limit's rate.
pub const MAX_BURST_SECONDS: u64 = 86_400;

impl DeviceLimits {
    /// There are none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Whether they can be enforced.
    ///
    /// # Errors
    /// INVALID_FIELD, by name: a rate or a burst is out of its range.
    pub fn check(&self) -> Result<(), Error> {
        check("operations", self.operations_per_second, self.operations_burst, 1)?;
        check("bytes", self.bytes_per_second, self.bytes_burst, MIN_BYTES_RATE)
    }
}

fn check(what: &str, per_second: u64, burst: u64, least: u64) -> Result<(), Error> {
    let refuse = |field: &str, message: String| {
        Err(Error::invalid_field(&format!("limits.{what}_{field}"), message)
            .remedy("leave it out, or 0, for no limit"))
    };
    if per_second == 0 && burst != 0 {
        return refuse("burst", format!("a burst of {burst} {what} without a limit means nothing"));
    }
    if per_second != 0 && !(least..=MAX_RATE).contains(&per_second) {
        return refuse("per_second", format!("{per_second} {what} per second are not {least} to {MAX_RATE}"));
    }
    let most = per_second.saturating_mul(MAX_BURST_SECONDS);
    if burst > most {
        return refuse("burst", format!("a burst of {burst} {what} is more than the {most} of a day"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let none = DeviceLimits::default();
        assert!(none.check().is_ok() && none.is_none());
        let refused = |limits: DeviceLimits| {
            let e = limits.check().unwrap_err();
            format!("{} {}", e.fact("field").unwrap(), e.message())
        };
        let e = refused(DeviceLimits { operations_burst: 1, ..none });
        assert!(e.contains("limits.operations_burst") && e.contains("without a limit"), "{e}");
        let e = refused(DeviceLimits { bytes_per_second: 4095, ..none });
        assert!(e.contains("limits.bytes_per_second") && e.contains("4096"), "{e}");
        let e = refused(DeviceLimits { operations_per_second: u64::MAX, ..none });
        assert!(e.contains("limits.operations_per_second"), "{e}");
        let e = refused(DeviceLimits { operations_per_second: 1, operations_burst: 86_401, ..none });
        assert!(e.contains("of a day"), "{e}");
    }
}
