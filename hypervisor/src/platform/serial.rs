//! The 16550 UART at COM1's ports, between the guest and the [`Console`].

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use super::console::Console;
use crate::exits::Exit;

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct ToConsole(Arc<Console>);

impl Write for ToConsole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One UART. Every life of the guest has a new one.
pub struct SerialPort {
    uart: Mutex<Serial<Interrupt, NoEvents, ToConsole>>,
    console: Arc<Console>,
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A UART that interrupts by `interrupt`, in place of the console's former one.
    pub fn new(console: &Arc<Console>, interrupt: EventFd) -> Arc<Self> {
        let uart = Serial::new(Interrupt(interrupt), ToConsole(Arc::clone(console)));
        let port = Arc::new(Self { uart: Mutex::new(uart), console: Arc::clone(console) });
        console.attach(&port);
        port
    }

    /// Moves what was typed into the receive FIFO, as far as it has room.
    pub(super) fn take_input(&self) {
        refill(&mut self.uart.lock().unwrap_or_else(PoisonError::into_inner), &self.console);
    }
}

/// Offset of the modem control register, and its bit for loopback.
const MODEM_CONTROL: u8 = 4;
const LOOPBACK: u8 = 1 << 4;

fn refill(uart: &mut Serial<Interrupt, NoEvents, ToConsole>, console: &Console) {
    let room = uart.fifo_capacity();
    // In loopback nothing comes in from outside: it waits in the console until that ends.
    if room == 0 || uart.read(MODEM_CONTROL) & LOOPBACK != 0 {
        return;
    }
    let bytes = console.take_input(room);
    if !bytes.is_empty() {
        // It has the room; and an interrupt that cannot be raised is one the guest will poll for.
        let _ = uart.enqueue_raw_bytes(&bytes);
    }
}

/// Offset of the receive and transmit registers.
const DATA: u64 = 0;

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) -> Exit {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        for (i, byte) in data.iter_mut().enumerate() {
            // A wide access goes to the registers one after the other, as on the ISA bus.
            *byte = uart.read(((offset + i as u64) & 7) as u8);
        }
        if offset == DATA {
            refill(&mut uart, &self.console);
        }
        Exit::IoSerial
    }

    fn write(&self, offset: u64, data: &[u8]) -> Exit {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        for (i, &byte) in data.iter().enumerate() {
            // Only the interrupt can fail, and that the guest will poll for.
            let _ = uart.write(((offset + i as u64) & 7) as u8, byte);
            if offset + i as u64 == u64::from(MODEM_CONTROL) {
                refill(&mut uart, &self.console);
            }
        }
        Exit::IoSerial
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const LINE_STATUS: u64 = 5;
    const INTERRUPT_ENABLE: u64 = 1;

    fn port() -> (Arc<Console>, Arc<SerialPort>, EventFd) {
        let console = Console::new(|| {});
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let port = SerialPort::new(&console, interrupt.try_clone().unwrap());
        (console, port, interrupt)
    }

    fn read(port: &SerialPort, offset: u64) -> u8 {
        let mut byte = [0];
        assert_eq!(port.read(offset, &mut byte), Exit::IoSerial);
        byte[0]
    }

    #[test]
    fn output_reaches_the_console() {
        let (console, port, _) = port();
        let mut subscriber = console.subscribe(true);
        for &byte in b"hi\n" {
            port.write(DATA, &[byte]);
        }
        assert_eq!(subscriber.wait(Some(Duration::ZERO)).unwrap().data, b"hi\n");
        assert_eq!(console.counters().written, 3);
    }

    #[test]
    fn more_input_than_the_fifo_holds_arrives_in_order() {
        let (console, port, interrupt) = port();
        port.write(INTERRUPT_ENABLE, &[1]);
        let typed: Vec<u8> = (0..1000).map(|i| i as u8).collect();
        assert_eq!(console.type_in(&typed), 1000);
        assert!(interrupt.read().unwrap() >= 1);
        let mut seen = Vec::new();
        while read(&port, LINE_STATUS) & 1 != 0 {
            seen.push(read(&port, DATA));
        }
        assert_eq!(seen, typed);
    }

    #[test]
    fn what_is_typed_during_loopback_arrives_after_it() {
        let (console, port, _) = port();
        port.write(u64::from(MODEM_CONTROL), &[LOOPBACK]);
        assert_eq!(console.type_in(b"ab"), 2);
        port.write(DATA, b"x");
        assert_eq!(read(&port, DATA), b'x');
        assert_eq!(read(&port, LINE_STATUS) & 1, 0);
        port.write(u64::from(MODEM_CONTROL), &[0]);
        assert_eq!((read(&port, DATA), read(&port, DATA)), (b'a', b'b'));
    }

    #[test]
    fn what_is_typed_ahead_waits_for_the_next_port() {
        let console = Console::new(|| {});
        console.type_in(b"a");
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let port = SerialPort::new(&console, interrupt);
        assert_eq!(read(&port, LINE_STATUS) & 1, 1);
        assert_eq!(read(&port, DATA), b'a');
    }

    proptest! {
        #[test]
        fn no_access_panics(accesses in proptest::collection::vec((0u64..8, 1usize..=4, any::<bool>(), any::<u32>()), 0..200)) {
            let (console, port, _) = port();
            console.type_in(b"typed");
            for (offset, size, is_write, value) in accesses {
                let mut bytes = value.to_le_bytes();
                if is_write {
                    port.write(offset, &bytes[..size]);
                } else {
                    port.read(offset, &mut bytes[..size]);
                }
            }
        }
    }
}
