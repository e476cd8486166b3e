//! The guest's console on standard input and output.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use crate::machine::{Call, MachineHandle};
use crate::platform::console::{Console, Subscriber};

/// Ctrl-], as telnet has it.
const ESCAPE: u8 = 0x1d;

/// Stacks of the two threads, in bytes.
const STACK_SIZE: usize = 64 << 10;

/// How long the reader of standard output may take for the last bytes.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long to wait when the guest does not take its input.
const INPUT_PAUSE: Duration = Duration::from_millis(5);

/// A terminal in raw mode, to be restored.
struct RawTerminal(libc::termios);

impl RawTerminal {
    /// Puts standard input into raw mode if it is a terminal.
    fn new() -> Option<Self> {
        let fd = io::stdin().as_raw_fd();
        if !io::stdin().is_terminal() {
            return None;
        }
        // SAFETY: an all-zero termios is valid memory for tcgetattr to fill in; the descriptor is open.
        unsafe {
            let mut before: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(fd, &raw mut before) != 0 {
                return None;
            }
            let mut raw = before;
            libc::cfmakeraw(&raw mut raw);
            (libc::tcsetattr(fd, libc::TCSANOW, &raw const raw) == 0).then_some(Self(before))
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // SAFETY: the settings are those read before.
        unsafe { libc::tcsetattr(io::stdin().as_raw_fd(), libc::TCSANOW, &raw const self.0) };
    }
}

/// The running connection of console and standard streams.
pub struct Stdio {
    terminal: Option<RawTerminal>,
    written: Receiver<()>,
}

impl std::fmt::Debug for Stdio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stdio")
    }
}

impl Stdio {
    /// Connects them. Standard input is put into raw mode if it is a terminal, where Ctrl-] then asks `machine` to end.
    ///
    /// # Errors
    /// If the host gives no threads.
    pub fn connect(console: &Arc<Console>, machine: MachineHandle) -> io::Result<Self> {
        let terminal = RawTerminal::new();
        let (done, written) = channel();
        let subscriber = console.subscribe(true);
        thread::Builder::new().name("stdout".into()).stack_size(STACK_SIZE).spawn(move || {
            // A reader that has gone must not end the VM.
            let _ = copy_out(subscriber);
            let _ = done.send(());
        })?;
        let (console, escapes) = (Arc::clone(console), terminal.is_some());
        thread::Builder::new().name("stdin".into()).stack_size(STACK_SIZE).spawn(move || {
            copy_in(&console, escapes.then_some(&machine));
        })?;
        Ok(Self { terminal, written })
    }

    /// Writes out what is left once the console is closed, for a bounded time, and restores the terminal.
    pub fn finish(self) {
        let _ = self.written.recv_timeout(FAREWELL);
        drop(self.terminal);
    }
}

fn copy_out(mut subscriber: Subscriber) -> io::Result<()> {
    // Not io::stdout(): its buffer would have to be flushed for every byte.
    let mut out = io::stdout().lock();
    while let Some(chunk) = subscriber.wait(None) {
        out.write_all(&chunk.data)?;
        out.flush()?;
    }
    Ok(())
}

fn copy_in(console: &Console, escape: Option<&MachineHandle>) {
    let mut input = io::stdin().lock();
    let mut buffer = [0u8; 256];
    // At the end of input, or if it fails, the VM goes on without.
    while let Ok(length @ 1..) = input.read(&mut buffer) {
        let mut typed = &buffer[..length];
        if let (Some(machine), true) = (escape, typed.contains(&ESCAPE)) {
            machine.call(Call::Leave);
            return;
        }
        loop {
            typed = &typed[console.type_in(typed)..];
            if typed.is_empty() {
                break;
            }
            thread::sleep(INPUT_PAUSE);
        }
    }
}
