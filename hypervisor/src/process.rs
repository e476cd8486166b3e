//! The process: threads, signals, sockets, and how it ends.

use std::io;
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use proto::v1::{EndReason, VmEnded};

use crate::cli::{ConsoleTarget, Options};
use crate::control::{Control, Listener};
use crate::machine::{Call, Machine, MachineHandle, SlotOptions};
use crate::stdio::Stdio;

/// Stack of the thread that waits for signals, in bytes.
const STACK_SIZE: usize = 64 << 10;

/// Signals that end the VM.
const SIGNALS: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Runs a VM until it ends. `started` is when the process began. Errors are told on standard error.
pub fn run(options: &Options, started: Instant) -> ExitCode {
    run_machine(options, Machine::new(started))
}

/// [`run`] with slots that work in another way than the hypervisor's do (see [`Notifications`](crate::slot::Notifications)): for
/// benchmarks that link this crate.
pub fn run_with(options: &Options, started: Instant, slot_options: SlotOptions) -> ExitCode {
    run_machine(options, Machine::with_slot_options(started, slot_options))
}

fn run_machine(options: &Options, machine: Machine) -> ExitCode {
    match run_until_end(options, machine) {
        Ok(ended) if ended.reason() == EndReason::Failure => {
            say(&ended.detail);
            ExitCode::FAILURE
        }
        Ok(_) => ExitCode::SUCCESS,
        Err(e) => {
            say(&e.to_string());
            ExitCode::FAILURE
        }
    }
}

fn say(what: &str) {
    eprintln!("outboard-hypervisor: {what}");
}

fn run_until_end(options: &Options, mut machine: Machine) -> Result<VmEnded, Box<dyn std::error::Error>> {
    // Before there are other threads, which inherit the mask.
    block_signals()?;
    let listener = match &options.control {
        Some(path) => Some(Listener::bind(path)?),
        None => Listener::activated()?,
    };
    if listener.is_none() && options.boot.is_none() {
        return Err(
            "nothing to do; give --kernel to boot, or --control to wait for orders (see --help)".into()
        );
    }
    wait_for_signals(machine.handle())?;
    let control = match listener {
        Some(listener) => Some(Control::start(listener, machine.handle(), machine.status().clone())?),
        None => None,
    };
    let mut stdio = None;
    if let Some(config) = &options.boot {
        if options.console == ConsoleTarget::Stdio {
            stdio = Some(Stdio::connect(machine.status().console(), machine.handle())?);
        }
        if let Err(e) = machine.start(config) {
            drop(stdio);
            if let Some(control) = control {
                control.finish();
            }
            return Err(e.into());
        }
    }
    // Only matters under a service manager that waits for it.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let ended = machine.run();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    if let Some(stdio) = stdio {
        stdio.finish();
    }
    if let Some(control) = control {
        control.finish();
    }
    Ok(ended)
}

fn signal_set() -> libc::sigset_t {
    // SAFETY: the set is initialised by sigemptyset before use; the signals are valid.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in SIGNALS {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

fn block_signals() -> io::Result<()> {
    let set = signal_set();
    // SAFETY: the set is valid; the former mask is not asked for.
    let r = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if r == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(r)) }
}

/// Passes signals on to the machine, which ends the VM in good order.
fn wait_for_signals(machine: MachineHandle) -> io::Result<()> {
    thread::Builder::new().name("signals".into()).stack_size(STACK_SIZE).spawn(move || {
        let set = signal_set();
        loop {
            let mut signal = 0;
            // SAFETY: set and result are valid for the call.
            if unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
                machine.call(Call::Signal(signal));
            }
        }
    })?;
    Ok(())
}
