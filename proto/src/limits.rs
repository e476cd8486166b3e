//! What a device's limits may be: the same to whoever asks for them and to whoever enforces them.

use crate::error::Error;
use crate::v1::{DeviceLimits, NetLimits};

/// Largest rate per second. More is no limit.
pub const MAX_RATE: u64 = 1 << 40;
/// Smallest rate in bytes per second: what the largest request owes is to be paid in this life.
pub const MIN_BYTES_RATE: u64 = 4096;
/// Smallest rate in bits per second: a super-frame of 64 KiB is paid for in 16 seconds.
pub const MIN_BITS_RATE: u64 = 8 * MIN_BYTES_RATE;
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
        check("operations", "", self.operations_per_second, self.operations_burst, 1)?;
        check("bytes", "", self.bytes_per_second, self.bytes_burst, MIN_BYTES_RATE)
    }
}

impl NetLimits {
    /// There are none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Whether they can be enforced.
    ///
    /// # Errors
    /// As [`DeviceLimits::check`].
    pub fn check(&self) -> Result<(), Error> {
        check("bits", "_out", self.bits_per_second_out, self.bits_burst_out, MIN_BITS_RATE)?;
        check("packets", "_out", self.packets_per_second_out, self.packets_burst_out, 1)?;
        check("bits", "_in", self.bits_per_second_in, self.bits_burst_in, MIN_BITS_RATE)?;
        check("packets", "_in", self.packets_per_second_in, self.packets_burst_in, 1)
    }
}

fn check(what: &str, direction: &str, per_second: u64, burst: u64, least: u64) -> Result<(), Error> {
    let refuse = |field: &str, message: String| {
        Err(Error::invalid_field(&format!("limits.{what}_{field}{direction}"), message)
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

        let none = NetLimits::default();
        assert!(none.check().is_ok() && none.is_none());
        let refused = |limits: NetLimits| {
            let e = limits.check().unwrap_err();
            format!("{} {}", e.fact("field").unwrap(), e.message())
        };
        let e = refused(NetLimits { bits_per_second_in: 32_767, ..none });
        assert!(e.contains("limits.bits_per_second_in") && e.contains("32768"), "{e}");
        let e = refused(NetLimits { bits_per_second_out: MAX_RATE + 1, ..none });
        assert!(e.contains("limits.bits_per_second_out"), "{e}");
        let e = refused(NetLimits { packets_burst_out: 1, ..none });
        assert!(e.contains("limits.packets_burst_out") && e.contains("without a limit"), "{e}");
        let e = refused(NetLimits { packets_per_second_in: 1, packets_burst_in: 86_401, ..none });
        assert!(e.contains("limits.packets_burst_in") && e.contains("of a day"), "{e}");
    }
}
