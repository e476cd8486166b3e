//! The ACPI generic event device (ACPI 6.5 section 5.6.9): one register of pending events and an interrupt.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use crate::exits::Exit;

/// Bit of the event register: the power button was pressed.
pub const POWER_BUTTON: u32 = 1 << 0;

/// The event register, 32 bits at offset 0: reading takes what is pending. The AML of its `_EVT` method is in
/// [`super::acpi`].
#[derive(Debug)]
pub struct EventDevice {
    pending: AtomicU32,
    interrupt: EventFd,
}

impl EventDevice {
    /// A device that interrupts by `interrupt`.
    pub fn new(interrupt: EventFd) -> Self {
        Self { pending: AtomicU32::new(0), interrupt }
    }

    /// Tells the guest of `events`.
    ///
    /// # Errors
    /// If the interrupt's eventfd cannot be written.
    pub fn raise(&self, events: u32) -> io::Result<()> {
        self.pending.fetch_or(events, Ordering::AcqRel);
        self.interrupt.write(1)
    }
}

impl BusDevice for EventDevice {
    fn read(&self, offset: u64, data: &mut [u8]) -> Exit {
        data.fill(0);
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.pending.swap(0, Ordering::AcqRel).to_le_bytes());
        }
        Exit::MmioAcpi
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Exit {
        Exit::MmioAcpi
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_takes_what_is_pending() {
        let device = EventDevice::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        device.raise(POWER_BUTTON).unwrap();
        let mut data = [0xff; 4];
        assert_eq!(device.read(4, &mut data), Exit::MmioAcpi);
        assert_eq!(data, [0; 4]);
        device.read(0, &mut [0; 2]);
        device.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), POWER_BUTTON);
        device.read(0, &mut data);
        assert_eq!(data, [0; 4]);
        assert_eq!(device.interrupt.read().unwrap(), 1);
    }
}
