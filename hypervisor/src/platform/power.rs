//! Registers by which a guest resets itself or switches itself off: the sleep and reset registers of hardware-reduced ACPI
//! (ACPI 6.5 section 4.8.3.7 and 4.8.4.6), the reset command of the keyboard controller, and the BIOS's reset vector.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryResult};

use super::bus::BusDevice;
use super::layout;
use super::requests::{GuestRequest, Requests};
use crate::exits::Exit;
use crate::memory::GuestRam;

/// Offset of SLEEP_CONTROL_REG.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of SLEEP_STATUS_REG.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;

/// SLP_TYPx of S5, as `\_S5` says.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What to write to the reset register.
pub const RESET_VALUE: u8 = 1;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// Real-mode code at [`layout::RESET_VECTOR`] that writes the reset register: `mov dx, port; mov al, value; out dx, al; cli;
/// halt: hlt; jmp halt`.
///
/// Linux takes hardware-reduced ACPI for a machine with EFI and restarts it through EFI's runtime services; where there are
/// none, it tries neither the reset register nor the keyboard controller but jumps to the BIOS.
const RESET_CODE: [u8; 10] = {
    let [low, high] = ((*layout::POWER_PORTS.start() + RESET) as u16).to_le_bytes();
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xfa, 0xf4, 0xeb, 0xfd]
};

/// Writes the code a guest finds at the BIOS's reset vector.
///
/// # Errors
/// If `ram` does not reach so far.
pub fn write_reset_vector(ram: &GuestRam) -> GuestMemoryResult<()> {
    ram.memory().write_slice(&RESET_CODE, GuestAddress(layout::RESET_VECTOR))
}

/// The ACPI sleep and reset registers: one byte each, at [`super::layout::POWER_PORTS`].
#[derive(Debug)]
pub struct PowerRegisters {
    requests: Arc<Requests>,
}

impl PowerRegisters {
    /// Registers that ask `requests`.
    pub fn new(requests: Arc<Requests>) -> Self {
        Self { requests }
    }
}

impl BusDevice for PowerRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) -> Exit {
        // WAK_STS is never set: there is no sleep to wake up from.
        data.fill(0);
        Exit::IoReset
    }

    fn write(&self, offset: u64, data: &[u8]) -> Exit {
        let Some(&value) = data.first() else { return Exit::IoReset };
        match offset {
            SLEEP_CONTROL
                if value & SLEEP_ENABLE != 0
                    && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SLEEP_TYPE_S5 =>
            {
                self.requests.make(GuestRequest::PowerOff);
            }
            RESET if value == RESET_VALUE => self.requests.make(GuestRequest::Reset),
            _ => {}
        }
        Exit::IoReset
    }
}

/// Command and status port of a keyboard controller without keyboard: only its reset line is wired.
#[derive(Debug)]
pub struct KeyboardController {
    requests: Arc<Requests>,
}

/// Pulse output bit 0 of the controller, which is the reset line.
const PULSE_RESET: u8 = 0xfe;

impl KeyboardController {
    /// A controller that asks `requests`.
    pub fn new(requests: Arc<Requests>) -> Self {
        Self { requests }
    }
}

impl BusDevice for KeyboardController {
    fn read(&self, _offset: u64, data: &mut [u8]) -> Exit {
        // Both buffers empty: a guest that waits for "ready" before the reset command does not wait.
        data.fill(0);
        Exit::IoReset
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Exit {
        if data.first() == Some(&PULSE_RESET) {
            self.requests.make(GuestRequest::Reset);
        }
        Exit::IoReset
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn requests() -> (Arc<Requests>, mpsc::Receiver<GuestRequest>) {
        let (tx, rx) = mpsc::channel();
        (Arc::new(Requests::new(move |r| tx.send(r).unwrap())), rx)
    }

    fn asked(writes: &[(u64, u8)]) -> Vec<GuestRequest> {
        let (requests, rx) = requests();
        let registers = PowerRegisters::new(requests);
        for &(offset, value) in writes {
            assert_eq!(registers.write(offset, &[value]), Exit::IoReset);
        }
        rx.try_iter().collect()
    }

    #[test]
    fn s5_powers_off() {
        assert_eq!(asked(&[(SLEEP_CONTROL, 5 << 2 | 1 << 5)]), [GuestRequest::PowerOff]);
    }

    #[test]
    fn other_sleep_states_and_values_do_nothing() {
        assert_eq!(
            asked(&[(0, 5 << 2), (0, 1 << 5), (0, 3 << 2 | 1 << 5), (1, 0xff), (2, 0), (2, 0xff)]),
            []
        );
    }

    #[test]
    fn the_reset_register_resets() {
        assert_eq!(asked(&[(RESET, RESET_VALUE)]), [GuestRequest::Reset]);
    }

    #[test]
    fn the_keyboard_controller_resets() {
        let (requests, rx) = requests();
        let controller = KeyboardController::new(requests);
        let mut status = [0xff];
        controller.read(0, &mut status);
        assert_eq!(status, [0]);
        controller.write(0, &[0xd1]);
        assert!(rx.try_recv().is_err());
        controller.write(0, &[0xfe]);
        assert_eq!(rx.try_recv(), Ok(GuestRequest::Reset));
    }
}
