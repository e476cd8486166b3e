//! vCPUs: plain threads in `KVM_RUN`, and how they are held, stopped and started.

mod control;
mod cpuid;
mod run_page;
mod setup;

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::{io, thread};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::exits::{Exit, ExitCounters};
use crate::platform::bus::Bus;
use crate::platform::requests::{GuestRequest, Requests};

use control::Flow;
pub use control::RunControl;
pub use cpuid::CpuidTemplate;
use run_page::RunPage;
pub use setup::{reset_state, write_boot_tables};

/// Stack of a vCPU thread in bytes: the run loop and the registers it dispatches to need a few KiB.
const STACK_SIZE: usize = 128 << 10;

/// `KVM_SYSTEM_EVENT_*`.
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const SYSTEM_EVENT_RESET: u32 = 2;

/// What all vCPUs of one life of the guest share.
pub struct Environment {
    /// Port space.
    pub ports: Bus,
    /// Memory that is not RAM.
    pub memory: Bus,
    /// Where the guest's wishes go.
    pub requests: Arc<Requests>,
    /// Whether to run, and who does not.
    pub control: RunControl,
    /// Called before the first entry into the guest.
    pub on_first_entry: Box<dyn Fn() + Send + Sync>,
    /// Called when a vCPU cannot go on, with the reason for a person.
    pub on_failure: Box<dyn Fn(String) + Send + Sync>,
}

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Environment").field("control", &self.control).finish_non_exhaustive()
    }
}

/// Installs the handler of the signal that takes vCPUs out of the guest. It does nothing: the interrupted system call is
/// what matters.
///
/// # Errors
/// What the host says.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: an all-zero sigaction is valid; the handler is async-signal-safe as it does nothing. Without SA_RESTART, as
    // KVM_RUN must return.
    let r = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut())
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// A running vCPU thread.
#[derive(Debug)]
pub struct VcpuThread {
    // Comes back with the vCPU, so that `page` is mapped for as long as the handle is not joined.
    thread: Option<JoinHandle<VcpuFd>>,
    page: RunPage,
    environment: Arc<Environment>,
}

impl VcpuThread {
    /// Starts vCPU `index` on a thread of its own. It runs as soon as `environment.control` lets it.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub fn spawn(
        index: u8,
        mut fd: VcpuFd,
        environment: &Arc<Environment>,
        counters: &Arc<ExitCounters>,
    ) -> io::Result<Self> {
        let page = RunPage::of(&mut fd);
        let vcpu = Vcpu {
            page: page.clone(),
            fd,
            is_first: index == 0,
            environment: Arc::clone(environment),
            counters: Arc::clone(counters),
        };
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK_SIZE)
            .spawn(move || vcpu.run())?;
        Ok(Self { thread: Some(thread), page, environment: Arc::clone(environment) })
    }

    /// Takes the vCPU out of the guest, or keeps it from entering, so that it looks at [`RunControl`].
    pub fn kick(&self) {
        let Some(thread) = &self.thread else { return };
        // The flag covers a thread on its way into KVM_RUN, the signal one that is in it already.
        self.page.request_exit();
        // SAFETY: the thread is not joined, so its id is valid; the signal has a handler.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
    }
}

impl Drop for VcpuThread {
    /// Ends the thread and waits for it, which is prompt: a vCPU thread waits for nothing but the guest and `control`.
    fn drop(&mut self) {
        self.environment.control.stop();
        self.kick();
        if let Some(thread) = self.thread.take() {
            // A panic would have ended the process.
            let _ = thread.join();
        }
    }
}

struct Vcpu {
    fd: VcpuFd,
    page: RunPage,
    is_first: bool,
    environment: Arc<Environment>,
    counters: Arc<ExitCounters>,
}

/// What follows an exit.
enum Next {
    /// Into the guest again.
    Enter,
    /// See what [`RunControl`] wants first.
    Consult,
    /// Nothing more to do in this life of the guest.
    Finish,
    /// Cannot go on, because of this.
    Fail(String),
}

impl Vcpu {
    fn run(mut self) -> VcpuFd {
        if self.environment.control.consult(|| {}) == Flow::End {
            return self.fd;
        }
        if self.is_first {
            (self.environment.on_first_entry)();
        }
        loop {
            match self.step() {
                Next::Enter => {}
                Next::Consult => {
                    // A guest that was held must not take the gap for a hang of its own. Not every guest has the clock.
                    let fd = &self.fd;
                    let held = || {
                        let _ = fd.kvmclock_ctrl();
                    };
                    if self.environment.control.consult(held) == Flow::End {
                        return self.fd;
                    }
                }
                Next::Finish => {
                    self.environment.control.wait_for_stop();
                    return self.fd;
                }
                Next::Fail(why) => {
                    self.counters.count(Exit::Failure);
                    let why = format!("{why}; {}", setup::describe_registers(&self.fd));
                    (self.environment.on_failure)(why);
                    self.environment.control.wait_for_stop();
                    return self.fd;
                }
            }
        }
    }

    /// One stay in the guest and what it wants afterwards.
    fn step(&mut self) -> Next {
        let environment = &*self.environment;
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                let mut exit = None;
                // A string instruction brings several accesses at once, each of the size of its operand.
                for access in data.chunks(self.page.io_size()) {
                    exit = environment.ports.write(u64::from(port), access);
                }
                exit.unwrap_or(Exit::IoUnclaimed)
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let mut exit = None;
                for access in data.chunks_mut(self.page.io_size()) {
                    exit = environment.ports.read(u64::from(port), access);
                }
                exit.unwrap_or(Exit::IoUnclaimed)
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                environment.memory.read(address, data).unwrap_or(Exit::MmioUnclaimed)
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                environment.memory.write(address, data).unwrap_or(Exit::MmioUnclaimed)
            }
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            Ok(VcpuExit::Shutdown) => {
                environment.requests.make(GuestRequest::TripleFault);
                Exit::Shutdown
            }
            Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_SHUTDOWN, _)) => {
                environment.requests.make(GuestRequest::PowerOff);
                Exit::SystemEvent
            }
            Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_RESET, _)) => {
                environment.requests.make(GuestRequest::Reset);
                Exit::SystemEvent
            }
            Ok(VcpuExit::InternalError) => return Next::Fail(self.page.internal_error()),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Next::Fail(format!(
                    "KVM could not enter the guest: hardware reason {reason:#x} on CPU {cpu}"
                ));
            }
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                return Next::Fail(format!(
                    "KVM found no memory for {size:#x} bytes at guest address {gpa:#x} (flags {flags:#x})"
                ));
            }
            Ok(other) => {
                return Next::Fail(format!("KVM left the guest for an unexpected reason: {other:?}"));
            }
            Err(e) => match e.errno() {
                libc::EINTR => Exit::Interrupted,
                // A vCPU that was waiting to be started has been.
                libc::EAGAIN => return Next::Consult,
                libc::EFAULT => {
                    return Next::Fail(
                        "KVM could not reach the guest's memory (EFAULT): is the host out of memory?"
                            .to_owned(),
                    );
                }
                _ => return Next::Fail(format!("KVM_RUN failed: {e}")),
            },
        };
        self.counters.count(exit);
        match exit {
            Exit::Interrupted => {
                self.page.clear_exit_request();
                Next::Consult
            }
            Exit::IoReset | Exit::Shutdown | Exit::SystemEvent if environment.requests.is_made() => {
                Next::Finish
            }
            _ => Next::Enter,
        }
    }
}
