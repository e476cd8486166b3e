//! The time stamp counter and its frequency.

use crate::{gate, port};
use core::sync::atomic::{AtomicU64, Ordering};
use guest::histogram::Histogram;
use guest::json::Object;

/// Most entries of a distribution in a result.
const CLASSES: usize = 120;

/// The clock: conversions between TSC ticks and time.
#[derive(Clone, Copy)]
pub(crate) struct Clock {
    khz: u64,
}

/// The time stamp counter.
pub(crate) fn now() -> u64 {
    // SAFETY: CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

impl Clock {
    /// Finds the frequency; the name of what knew it.
    pub(crate) fn find(told: Option<u64>) -> (Self, &'static str) {
        type Source = (&'static str, fn() -> Option<u64>);
        let sources: [Source; 5] = [
            ("cpuid-0x15", crystal),
            ("hypervisor-leaf", hypervisor_leaf),
            ("kvmclock", kvmclock),
            ("pit", pit),
            ("cpuid-0x16", base_frequency),
        ];
        if let Some(khz) = told {
            return (Self { khz }, "tsc_khz");
        }
        for (name, find) in sources {
            if let Some(khz) = find().filter(|khz| (10_000..20_000_000).contains(khz)) {
                return (Self { khz }, name);
            }
        }
        (Self { khz: 1_000_000 }, "guess")
    }

    /// Thousands of ticks per second.
    pub(crate) fn khz(&self) -> u64 {
        self.khz
    }

    /// Ticks in so many microseconds.
    pub(crate) fn ticks(&self, micros: u64) -> u64 {
        (u128::from(micros) * u128::from(self.khz) / 1000).min(u128::from(u64::MAX / 2)) as u64
    }

    /// Microseconds in so many ticks.
    pub(crate) fn micros(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1000 / u128::from(self.khz)) as u64
    }

    /// Nanoseconds in so many ticks.
    pub(crate) fn nanos(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1_000_000 / u128::from(self.khz)) as u64
    }

    /// Adds the quantiles of latencies to a result; `all`: their distribution, too.
    pub(crate) fn report(&self, mut event: Object, latency: &Histogram, all: bool) -> Object {
        for (key, per_mille) in [("p50_ns", 500), ("p90_ns", 900), ("p99_ns", 990), ("p999_ns", 999)] {
            event = event.number(key, self.nanos(latency.quantile(per_mille)));
        }
        event = event.number("max_ns", self.nanos(latency.max()));
        if !all {
            return event;
        }
        let classes = latency.classes(CLASSES).into_iter();
        event.pairs("latency", classes.map(|(upper, count)| (self.nanos(upper), count)))
    }

    /// Spins.
    pub(crate) fn delay(&self, micros: u64) {
        let (start, ticks) = (now(), self.ticks(micros));
        while now() - start < ticks {
            core::hint::spin_loop();
        }
    }
}

/// TSC/crystal ratio and the crystal's frequency (CPUID 0x15).
fn crystal() -> Option<u64> {
    if gate::cpuid(0)[0] < 0x15 {
        return None;
    }
    let [denominator, numerator, hertz, _] = gate::cpuid(0x15);
    (denominator != 0 && hertz != 0)
        .then(|| u64::from(hertz) * u64::from(numerator) / u64::from(denominator) / 1000)
}

/// The processor's base frequency in MHz (CPUID 0x16): near the TSC's, not equal to it.
fn base_frequency() -> Option<u64> {
    (gate::cpuid(0)[0] >= 0x16).then(|| u64::from(gate::cpuid(0x16)[0] & 0xffff) * 1000)
}

fn hypervisor() -> Option<[u32; 4]> {
    (gate::cpuid(1)[2] & 1 << 31 != 0).then(|| gate::cpuid(0x4000_0000))
}

/// VMware's timing leaf, which QEMU and others offer: TSC frequency in kHz.
fn hypervisor_leaf() -> Option<u64> {
    (hypervisor()?[0] >= 0x4000_0010).then(|| u64::from(gate::cpuid(0x4000_0010)[0]))
}

/// kvmclock (Linux: Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW): how KVM converts ticks to nanoseconds.
fn kvmclock() -> Option<u64> {
    const SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    /// `pvclock_vcpu_time_info`, 32 bytes: version u32, pad u32, two u64, then multiplier u32, shift i8.
    static INFO: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];

    let [leaf, b, c, d] = hypervisor()?;
    if [b, c, d] != [0x4b4d_564b, 0x564b_4d56, 0x4d] || leaf < 0x4000_0001 {
        return None;
    }
    // KVM_FEATURE_CLOCKSOURCE2.
    if gate::cpuid(0x4000_0001)[0] & 1 << 3 == 0 {
        return None;
    }
    // The structure must not cross a page; 32 bytes aligned to 32 do not.
    let first = usize::from(!(INFO.as_ptr() as usize).is_multiple_of(32)) * 2;
    let address = &raw const INFO[first] as u64;
    let address = address.next_multiple_of(32);
    let index = (address - INFO.as_ptr() as u64) as usize / 8;
    gate::write_msr(SYSTEM_TIME_NEW, address | 1);
    let word = INFO[index + 3].load(Ordering::Relaxed);
    gate::write_msr(SYSTEM_TIME_NEW, 0);
    let (multiplier, shift) = (u128::from(word as u32), (word >> 32) as i8);
    if multiplier == 0 || !(-31..=31).contains(&shift) {
        return None;
    }
    // nanoseconds = (ticks << shift) * multiplier >> 32
    let per_ms = (1_000_000u128 << 32) / multiplier;
    Some(if shift >= 0 { per_ms >> shift } else { per_ms << -shift } as u64)
}

/// Counts ticks while channel 2 of the PIT counts 10 ms.
fn pit() -> Option<u64> {
    const HERTZ: u64 = 1_193_182;
    const COUNT: u64 = HERTZ / 100;
    // Gate on, speaker off; mode 0, low and high byte.
    port::write8(0x61, port::read8(0x61) & !2 | 1);
    port::write8(0x43, 0xb0);
    port::write8(0x42, COUNT as u8);
    port::write8(0x42, (COUNT >> 8) as u8);
    let start = now();
    // Without a PIT the port reads all ones, or zeros for ever.
    if port::read8(0x61) & 0x20 != 0 {
        return None;
    }
    for _ in 0..1_000_000 {
        if port::read8(0x61) & 0x20 != 0 {
            let khz = (now() - start) * HERTZ / COUNT / 1000;
            return Some(khz);
        }
    }
    None
}
