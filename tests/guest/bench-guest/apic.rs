//! The local APIC, its timer, interrupt vectors and the IO-APIC.

use crate::memory::Registers;
use crate::time::{self, Clock};
use crate::{gate, port};
use alloc::string::String;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

const LOCAL: u64 = 0xfee0_0000;
const ID: usize = 0x20;
const SPURIOUS: usize = 0xf0;
const TIMER: usize = 0x320;
const TIMER_INITIAL: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;
const TIMER_VECTOR: u8 = 0x20;
const FIRST_VECTOR: u8 = 0x30;
/// Up to where boot.s has interrupt stubs without a gap.
const LAST_VECTOR: u8 = 0xef;

static NEXT_VECTOR: AtomicU8 = AtomicU8::new(FIRST_VECTOR);
/// Timer counts per second, after division; 0: not set up.
static TIMER_HERTZ: AtomicU64 = AtomicU64::new(0);

fn local() -> Result<Registers, String> {
    Registers::map(LOCAL, 0x1000)
}

/// Turns interrupts on (once), with the legacy controller silenced, and measures the timer.
pub(crate) fn enable(clock: &Clock) -> Result<(), String> {
    if TIMER_HERTZ.load(Ordering::Relaxed) != 0 {
        return Ok(());
    }
    let apic = local()?;
    // Firmware may have left the PIT ticking through the 8259s, on vectors that are exceptions here.
    port::write8(0x21, 0xff);
    port::write8(0xa1, 0xff);
    apic.write::<u32>(SPURIOUS, 0x1ff);
    // Divide by 16, masked.
    apic.write::<u32>(TIMER_DIVIDE, 3);
    apic.write::<u32>(TIMER, 1 << 16 | u32::from(TIMER_VECTOR));
    apic.write::<u32>(TIMER_INITIAL, u32::MAX);
    let start = time::now();
    clock.delay(1000);
    let counted = u64::from(u32::MAX - apic.read::<u32>(TIMER_CURRENT));
    let nanos = clock.nanos(time::now() - start).max(1);
    apic.write::<u32>(TIMER_INITIAL, 0);
    apic.write::<u32>(TIMER, u32::from(TIMER_VECTOR));
    TIMER_HERTZ.store((counted * 1_000_000_000 / nanos).max(1), Ordering::Relaxed);
    gate::enable_interrupts();
    Ok(())
}

/// Interrupts once, in `micros` microseconds or as late as the timer can. Needs [`enable`].
pub(crate) fn timer(micros: u64) {
    let count = u128::from(micros) * u128::from(TIMER_HERTZ.load(Ordering::Relaxed)) / 1_000_000;
    if let Ok(apic) = local() {
        apic.write::<u32>(TIMER_INITIAL, count.clamp(1, u128::from(u32::MAX)) as u32);
    }
}

/// Whether the timer has interrupted since it was last asked.
pub(crate) fn timer_fired() -> bool {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    let count = gate::interrupts_of(TIMER_VECTOR);
    SEEN.swap(count, Ordering::Relaxed) != count
}

/// Stops the timer.
pub(crate) fn stop_timer() {
    if TIMER_HERTZ.load(Ordering::Relaxed) != 0
        && let Ok(apic) = local()
    {
        apic.write::<u32>(TIMER_INITIAL, 0);
    }
}

/// An interrupt vector and how many interrupts it had before it was ours.
#[derive(Clone, Copy)]
pub(crate) struct Vector {
    number: u8,
    before: u64,
}

impl Vector {
    /// Takes the next free vector. The last one is shared by all that come too late.
    pub(crate) fn take() -> Self {
        let number = NEXT_VECTOR.load(Ordering::Relaxed);
        NEXT_VECTOR.store((number + 1).min(LAST_VECTOR), Ordering::Relaxed);
        Self { number, before: gate::interrupts_of(number) }
    }

    /// Interrupts taken since.
    pub(crate) fn count(&self) -> u64 {
        gate::interrupts_of(self.number) - self.before
    }

    /// Address and data of the message that raises it on this CPU (Intel SDM 3, 11.11).
    pub(crate) fn message(&self) -> Result<(u64, u32), String> {
        let id = local()?.read::<u32>(ID) >> 24;
        Ok((LOCAL | u64::from(id) << 12, u32::from(self.number)))
    }

    /// Routes a global system interrupt here, edge triggered.
    pub(crate) fn route(&self, irq: u32) -> Result<(), String> {
        // The first IO-APIC, and the second one of QEMU's microvm.
        for address in [0xfec0_0000, 0xfec1_0000] {
            let registers = Registers::map(address, 0x20)?;
            let read = |index: u32| {
                registers.write(0, index);
                registers.read::<u32>(0x10)
            };
            let entries = (read(1) >> 16 & 0xff) + 1;
            let base = if address == 0xfec0_0000 { 0 } else { 24 };
            if let Some(pin) = irq.checked_sub(base).filter(|pin| *pin < entries && *pin < 120) {
                let id = local()?.read::<u32>(ID) >> 24;
                registers.write(0, 0x11 + 2 * pin);
                registers.write(0x10, id << 24);
                registers.write(0, 0x10 + 2 * pin);
                registers.write(0x10, u32::from(self.number));
                return Ok(());
            }
        }
        Err(alloc::format!("interrupt {irq} is not on an IO-APIC"))
    }
}

/// Gives all vectors back. No device may use one any more.
pub(crate) fn release_vectors() {
    NEXT_VECTOR.store(FIRST_VECTOR, Ordering::Relaxed);
}
