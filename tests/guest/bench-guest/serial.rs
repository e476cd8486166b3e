//! COM1: lines out, single bytes in.

use crate::port;
use core::sync::atomic::{AtomicBool, Ordering};
use guest::json::Object;

const DATA: u16 = 0x3f8;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_STATUS: u16 = DATA + 5;
/// What a 16550 takes without another look at its status.
const FIFO: usize = 16;

static FIFO_ON: AtomicBool = AtomicBool::new(false);

/// Prints one event.
pub(crate) fn print(event: Object) {
    let mut line = event.finish();
    line.push('\n');
    write(line.as_bytes());
}

/// Writes bytes. Each costs an exit to the VMM.
pub(crate) fn write(bytes: &[u8]) {
    if !FIFO_ON.swap(true, Ordering::Relaxed) {
        port::write8(FIFO_CONTROL, 1);
    }
    for chunk in bytes.chunks(FIFO) {
        // Transmitter empty. A VMM whose reader is slow keeps it full for a while.
        while port::read8(LINE_STATUS) & 0x20 == 0 {
            core::hint::spin_loop();
        }
        port::write_all(DATA, chunk);
    }
}

/// A byte that has arrived.
pub(crate) fn read() -> Option<u8> {
    (port::read8(LINE_STATUS) & 1 != 0).then(|| port::read8(DATA))
}
