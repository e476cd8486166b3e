//! Jobs without a device, and the ways a VM ends.

use crate::memory::Registers;
use crate::stage::{Context, Job, Progress};
use crate::time::{self, Clock};
use crate::{acpi, apic, gate, port, serial};
use alloc::boxed::Box;
use alloc::string::String;
use guest::args::{End as How, Width};
use guest::json::Object;

/// Ends the VM as told; returns if nothing happened.
pub(crate) fn end(clock: &Clock, rsdp: u64, how: How) {
    match how {
        How::Halt => return,
        How::PowerOff => match acpi::power_off(rsdp) {
            Some(register) => end(clock, rsdp, register),
            None => serial::print(Object::event("error").text("what", "ACPI does not say how to power off")),
        },
        How::Reset => {
            // Reset control register: system reset, then the pulse.
            port::write8(0xcf9, 2);
            port::write8(0xcf9, 6);
            clock.delay(50_000);
            end(clock, rsdp, How::I8042);
            gate::triple_fault();
        }
        How::I8042 => port::write8(0x64, 0xfe),
        How::Triple => gate::triple_fault(),
        How::Port(at, Width::Byte, value) => port::write8(at, value as u8),
        How::Port(at, Width::Word, value) => port::write16(at, value as u16),
        How::Port(at, Width::Long, value) => port::write32(at, value),
        How::Memory(at, width, value) => match (Registers::map(at, 4), width) {
            (Ok(registers), Width::Byte) => registers.write(0, value as u8),
            (Ok(registers), Width::Word) => registers.write(0, value as u16),
            (Ok(registers), Width::Long) => registers.write(0, value),
            (Err(what), _) => serial::print(Object::event("error").text("what", what)),
        },
    }
    clock.delay(100_000);
}

/// `idle`
struct Idle {
    clock: Clock,
    micros: u64,
    start: u64,
    before: u64,
}

pub(crate) fn idle<'c>(context: &Context<'_>, micros: u64) -> Result<Box<dyn Job + 'c>, String> {
    apic::enable(&context.clock)?;
    Ok(Box::new(Idle { clock: context.clock, micros, start: 0, before: 0 }))
}

impl Job for Idle {
    fn begin(&mut self, now: u64) {
        self.start = now;
        self.before = gate::interrupts();
    }

    fn poll(&mut self, now: u64) -> Progress {
        if self.micros > 0 && now - self.start >= self.clock.ticks(self.micros) {
            Progress::Done
        } else {
            Progress::Idle
        }
    }

    fn arm(&mut self) -> bool {
        true
    }

    fn patience(&self, now: u64) -> Option<u64> {
        (self.micros > 0).then(|| self.micros.saturating_sub(self.clock.micros(now - self.start)) + 1)
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        (event.number("wakeups", gate::interrupts() - self.before), true)
    }
}

/// `spin`: looks at the clock without a pause; any step of more than a microsecond is time somebody else had.
struct Spin {
    clock: Clock,
    micros: u64,
    start: u64,
    work: u64,
    gaps: u64,
    stolen: u64,
    longest: u64,
}

pub(crate) fn spin<'c>(context: &Context<'_>, micros: u64) -> Box<dyn Job + 'c> {
    let clock = context.clock;
    Box::new(Spin { clock, micros, start: 0, work: 0, gaps: 0, stolen: 0, longest: 0 })
}

impl Job for Spin {
    fn begin(&mut self, now: u64) {
        self.start = now;
    }

    fn poll(&mut self, _now: u64) -> Progress {
        let gap = self.clock.ticks(1);
        // A slice, so that jobs beside this one get on; their time is not counted.
        let begin = time::now();
        let slice = self.clock.ticks(100);
        let mut last = begin;
        while last - begin < slice {
            let now = time::now();
            if now - last > gap {
                self.gaps += 1;
                self.stolen += now - last;
                self.longest = self.longest.max(now - last);
            }
            self.work += 1;
            last = now;
        }
        if last - self.start >= self.clock.ticks(self.micros) { Progress::Done } else { Progress::Busy }
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        let event = event
            .number("work", self.work)
            .number("gaps", self.gaps)
            .number("stolen_us", self.clock.micros(self.stolen))
            .number("max_gap_ns", self.clock.nanos(self.longest));
        (event, true)
    }
}

/// `serial-echo`
#[derive(Default)]
pub(crate) struct SerialEcho {
    bytes: u64,
}

impl Job for SerialEcho {
    fn begin(&mut self, _now: u64) {}

    fn poll(&mut self, _now: u64) -> Progress {
        let Some(byte) = serial::read() else { return Progress::Busy };
        serial::write(&[byte]);
        self.bytes += 1;
        if byte == b'\n' { Progress::Done } else { Progress::Busy }
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        (event.number("bytes", self.bytes), true)
    }
}

/// `panic`
pub(crate) struct Panic;

impl Job for Panic {
    fn begin(&mut self, _now: u64) {}

    fn poll(&mut self, _now: u64) -> Progress {
        panic!("asked to");
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        (event, false)
    }
}

/// `fault`
pub(crate) struct Fault;

impl Job for Fault {
    fn begin(&mut self, _now: u64) {}

    fn poll(&mut self, _now: u64) -> Progress {
        // SAFETY: nothing is mapped there: the exception does not return here.
        unsafe { core::arch::asm!("mov byte ptr [{}], 0", in(reg) 0x7000_0000_0000u64) }
        Progress::Done
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        (event, false)
    }
}

/// `reboot`, `triple-fault`, `poweroff`
pub(crate) struct End {
    pub(crate) clock: Clock,
    pub(crate) rsdp: u64,
    pub(crate) how: How,
}

impl Job for End {
    fn begin(&mut self, _now: u64) {}

    fn poll(&mut self, _now: u64) -> Progress {
        end(&self.clock, self.rsdp, self.how);
        Progress::Done
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        (event.text("first_error", "the VM still runs"), false)
    }
}
