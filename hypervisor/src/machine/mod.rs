//! The machine: what a VM is made of, and its way from configuration to its end.
//!
//! One thread owns it and does one thing after the other; everybody else sends it [`Message`]s through a
//! [`MachineHandle`] or reads its [`Status`]. vCPU threads only send, so nothing here can make a vCPU wait.

mod config;
mod kvm;
mod life;
mod slots;
mod status;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use kvm_ioctls::Kvm;
use proto::error::{Error, ErrorReason};
use proto::v1::{
    EndReason, HypervisorConfig, HypervisorInfo, HypervisorState, ResetReason, ShutdownMode, SlotConfig,
    VmEnded, VmReset,
};
use tonic::Code;

use crate::boot::BootFiles;
use crate::exits::ExitCounters;
use crate::memory::GuestRam;
use crate::platform::acpi;
use crate::platform::irq::IrqRouter;
use crate::platform::pci::PciRoot;
use crate::platform::requests::{GuestRequest, Requests};
use crate::platform::{ged, layout, power};
use crate::slot::{self, Slot};
use crate::vcpu::{self, CpuidTemplate};
use config::VmConfig;
use life::{BareVm, Life, Parts};

pub use status::{EventSubscription, Status};

/// Takes the answer to a call, on the machine's thread; it must not block.
pub type Reply<T> = Box<dyn FnOnce(Result<T, Error>) + Send>;

/// What options a slot with this configuration has. Called from several threads, once for each slot.
pub type SlotOptions = Arc<dyn Fn(&SlotConfig) -> slot::Options + Send + Sync>;

/// What is asked of the machine.
pub enum Call {
    /// Hypervisor.Configure.
    Configure(Box<HypervisorConfig>, Reply<HypervisorInfo>),
    /// Hypervisor.Boot.
    Boot(Reply<()>),
    /// Hypervisor.Pause.
    Pause(Reply<()>),
    /// Hypervisor.Resume.
    Resume(Reply<()>),
    /// Hypervisor.Reset.
    Reset(Reply<()>),
    /// Hypervisor.Shutdown.
    Shutdown(ShutdownMode, Reply<()>),
    /// The process got this signal.
    Signal(i32),
    /// The person at the console wants to leave.
    Leave,
}

/// What the machine's thread is sent. A life's number keeps the last words of one life from ending the next.
enum Message {
    Call(Call),
    Guest { life: u64, request: GuestRequest },
    VcpuFailed { life: u64, why: String },
}

/// Sends calls to the machine.
#[derive(Clone)]
pub struct MachineHandle(Sender<Message>);

impl MachineHandle {
    /// Sends a call. One that comes after the end gets no answer: its reply is dropped.
    pub fn call(&self, call: Call) {
        let _ = self.0.send(Message::Call(call));
    }
}

impl std::fmt::Debug for MachineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MachineHandle")
    }
}

/// What Configure made.
struct Configured {
    kvm: Kvm,
    cpuid: CpuidTemplate,
    config: VmConfig,
    boot: BootFiles,
    ram: Arc<GuestRam>,
    requests: Arc<Requests>,
    // Number of the current life, as vCPU threads see it.
    life_number: Arc<AtomicU64>,
    counters: Vec<Arc<ExitCounters>>,
    pci: Arc<PciRoot>,
    slots: Vec<Arc<Slot>>,
    life: Option<Life>,
}

/// The machine. See the module.
pub struct Machine {
    inbox: Receiver<Message>,
    outbox: Sender<Message>,
    status: Arc<Status>,
    slot_options: SlotOptions,
    configured: Option<Configured>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("status", &self.status).finish_non_exhaustive()
    }
}

impl Machine {
    /// An unconfigured machine of a process that started at `started`.
    pub fn new(started: Instant) -> Self {
        Self::with_slot_options(started, Arc::new(|_| slot::Options::default()))
    }

    /// [`Machine::new`] with slots that work in another way than the hypervisor's do (see [`slot::Notifications`]).
    pub fn with_slot_options(started: Instant, slot_options: SlotOptions) -> Self {
        let (outbox, inbox) = channel();
        Self { inbox, outbox, status: Status::new(started), slot_options, configured: None }
    }

    /// For sending calls from other threads.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle(self.outbox.clone())
    }

    /// What is known of the machine.
    pub fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// Serves calls and the guest's wishes until the VM ends. Everything of the VM is gone when this returns.
    pub fn run(mut self) -> VmEnded {
        let ended = loop {
            // `self` holds a sender, so there is always one.
            let Ok(message) = self.inbox.recv() else {
                break ended(EndReason::Failure, "nobody is left to give orders");
            };
            if let Some(ended) = self.handle_message(message) {
                break ended;
            }
        };
        if let Some(configured) = &mut self.configured {
            configured.life = None;
            slots::for_each(&configured.slots, Slot::shutdown);
        }
        self.status.end(ended.clone());
        self.status.console().close();
        self.configured = None;
        ended
    }

    /// Does what the message asks; `Some` if that ends the VM.
    fn handle_message(&mut self, message: Message) -> Option<VmEnded> {
        match message {
            Message::Call(Call::Configure(config, reply)) => reply(self.configure(&config)),
            Message::Call(Call::Boot(reply)) => reply(self.boot()),
            Message::Call(Call::Pause(reply)) => reply(self.pause()),
            Message::Call(Call::Resume(reply)) => reply(self.resume()),
            Message::Call(Call::Reset(reply)) => match self.reset(ResetReason::Requested) {
                Ok(()) => reply(Ok(())),
                Err(e) => {
                    let lost = self.life_lost();
                    let end = ended(EndReason::Failure, format!("the guest could not be reset: {e}"));
                    reply(Err(e));
                    return lost.then_some(end);
                }
            },
            Message::Call(Call::Shutdown(mode, reply)) => return self.shutdown(mode, reply),
            Message::Call(Call::Signal(signal)) => {
                return Some(ended(EndReason::Signal, format!("the process got signal {signal}")));
            }
            Message::Call(Call::Leave) => {
                return Some(ended(EndReason::Shutdown, "the console was left"));
            }
            Message::Guest { life, request } if self.is_current(life) => {
                let reason = match request {
                    GuestRequest::PowerOff => {
                        return Some(ended(EndReason::GuestPowerOff, "the guest powered off"));
                    }
                    GuestRequest::Reset => ResetReason::Guest,
                    GuestRequest::TripleFault => ResetReason::TripleFault,
                };
                if let Err(e) = self.reset(reason) {
                    return Some(ended(EndReason::Failure, format!("the guest could not be reset: {e}")));
                }
            }
            Message::VcpuFailed { life, why } if self.is_current(life) => {
                return Some(ended(EndReason::Failure, why));
            }
            Message::Guest { .. } | Message::VcpuFailed { .. } => {}
        }
        None
    }

    /// Configure and boot at once, before [`Machine::run`].
    ///
    /// # Errors
    /// As Hypervisor.Configure and Hypervisor.Boot.
    pub fn start(&mut self, config: &HypervisorConfig) -> Result<(), Error> {
        self.configure(config)?;
        self.boot()
    }

    fn configure(&mut self, given: &HypervisorConfig) -> Result<HypervisorInfo, Error> {
        if self.configured.is_some() {
            return Err(wrong_state(
                "the VM is configured already",
                "start another hypervisor for another VM",
            ));
        }
        let config = VmConfig::check(given)?;
        // What is likely to be wrong and quickly found comes first.
        let boot = BootFiles::open(config.boot.clone())?;
        boot.check(config.memory)?;
        if let Ok(meminfo) = std::fs::read_to_string("/proc/meminfo") {
            config::check_host_memory(config.memory, &meminfo)?;
        }
        let kvm = kvm::open()?;
        let max = kvm.get_max_vcpus().min(config::MAX_VCPUS as usize);
        if usize::from(config.vcpus) > max {
            return Err(Error::invalid_field(
                "vcpus",
                format!("a VM cannot have {} vCPUs on this host", config.vcpus),
            )
            .remedy(format!("give at most {max}")));
        }
        vcpu::install_kick_handler().map_err(|e| kvm::failed("installing a signal handler", e))?;
        let cpuid =
            CpuidTemplate::new(&kvm, config.vcpus).map_err(|e| kvm::failed("KVM_GET_SUPPORTED_CPUID", e))?;
        let ram = new_ram(config.memory)?;
        let life_number = Arc::new(AtomicU64::new(0));
        let (outbox, current) = (self.outbox.clone(), Arc::clone(&life_number));
        let requests = Arc::new(Requests::new(move |request| {
            let _ = outbox.send(Message::Guest { life: current.load(Ordering::Acquire), request });
        }));
        let counters: Vec<_> = (0..config.vcpus).map(|_| Arc::new(ExitCounters::default())).collect();
        let asking = Arc::clone(&requests);
        let windows = pci_windows(config.memory, &cpuid);
        let pci = PciRoot::new(&windows, Box::new(move || asking.make(GuestRequest::Reset)));
        let slots = slots::connect(&config.slots, &ram, &self.status, &self.slot_options)?;
        slots::check_vectors(&slots)?;
        for slot in &slots {
            pci.plug(Arc::clone(slot) as _).map_err(|e| {
                Error::invalid_field("slots", e.to_string()).remedy("give the VM fewer slots")
            })?;
        }
        self.configured = Some(Configured {
            kvm,
            cpuid,
            config,
            boot,
            ram,
            requests,
            life_number,
            counters: counters.clone(),
            pci,
            slots: slots.clone(),
            life: None,
        });
        self.status.configured(given.clone(), counters, slots);
        Ok(self.status.info())
    }

    fn boot(&mut self) -> Result<(), Error> {
        match self.status.state() {
            HypervisorState::Configured => {}
            HypervisorState::Unconfigured => return Err(not_configured()),
            _ => return Err(wrong_state("the VM is booted already", "use Reset to boot it anew")),
        }
        self.begin_life(false)?;
        self.status.set_state(HypervisorState::Running);
        Ok(())
    }

    /// Loads the kernel into zeroed RAM and starts vCPUs on it. After an error there is no life, and RAM is zeroed.
    fn begin_life(&mut self, held: bool) -> Result<(), Error> {
        let (status, outbox) = (Arc::clone(&self.status), self.outbox.clone());
        let configured = self.configured.as_mut().ok_or_else(not_configured)?;
        let result = configured.begin_life(held, status, outbox);
        if result.is_err() {
            // It has run on nothing yet, so devices have seen none of its memory.
            configured.end_life();
            let _ = configured.ram.scrub();
        }
        result
    }

    fn reset(&mut self, reason: ResetReason) -> Result<(), Error> {
        let held = match self.status.state() {
            HypervisorState::Running => false,
            HypervisorState::Paused => true,
            HypervisorState::Unconfigured => return Err(not_configured()),
            _ => return Err(not_booted()),
        };
        let configured = self.configured.as_mut().ok_or_else(not_configured)?;
        let quiet = configured.end_life();
        configured.ram.scrub().map_err(|e| kvm::failed("giving the guest's memory back", e))?;
        if !quiet {
            configured.replace_memory()?;
        }
        self.begin_life(held)?;
        self.status.counted_reset(VmReset { reason: reason.into() });
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Error> {
        let life = self.life()?;
        life.hold();
        self.status.set_state(HypervisorState::Paused);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        let life = self.life()?;
        life.release();
        self.status.set_state(HypervisorState::Running);
        Ok(())
    }

    fn shutdown(&mut self, mode: ShutdownMode, reply: Reply<()>) -> Option<VmEnded> {
        match mode {
            ShutdownMode::Unspecified => {
                reply(Err(Error::invalid_field("mode", "the mode of the shutdown is missing")
                    .remedy("give POWER_BUTTON or IMMEDIATE")));
                None
            }
            ShutdownMode::PowerButton => {
                reply(self.life().and_then(|life| life.raise(ged::POWER_BUTTON)));
                None
            }
            ShutdownMode::Immediate => {
                reply(Ok(()));
                Some(ended(EndReason::Shutdown, "shutdown was requested"))
            }
        }
    }

    fn life(&self) -> Result<&Life, Error> {
        let configured = self.configured.as_ref().ok_or_else(not_configured)?;
        configured.life.as_ref().ok_or_else(not_booted)
    }

    /// Whether a booted VM has lost its life: a reset failed half-way.
    fn life_lost(&self) -> bool {
        matches!(self.status.state(), HypervisorState::Running | HypervisorState::Paused)
            && self.life().is_err()
    }

    fn is_current(&self, life: u64) -> bool {
        self.configured
            .as_ref()
            .is_some_and(|c| c.life.is_some() && c.life_number.load(Ordering::Acquire) == life)
    }
}

impl Configured {
    fn begin_life(&mut self, held: bool, status: Arc<Status>, outbox: Sender<Message>) -> Result<(), Error> {
        let ram = &*self.ram;
        let pci_windows = pci_windows(self.config.memory, &self.cpuid);
        let description = acpi::Description { vcpus: self.config.vcpus, pci_windows };
        let rsdp = acpi::write_tables(ram, &description).map_err(|e| {
            Error::new(Code::Internal, ErrorReason::Internal, format!("cannot write ACPI tables: {e}"))
        })?;
        power::write_reset_vector(ram).map_err(|e| {
            Error::new(Code::Internal, ErrorReason::Internal, format!("cannot write the reset vector: {e}"))
        })?;
        let entry = self.boot.load(ram, rsdp)?;
        vcpu::write_boot_tables(ram, entry).map_err(|e| {
            Error::new(Code::Internal, ErrorReason::Internal, format!("cannot write page tables: {e}"))
        })?;

        let bare = BareVm::new(&self.kvm, ram)?;
        let router = Arc::new(IrqRouter::new(Arc::clone(bare.vm())));
        for slot in &self.slots {
            slot.bind(bare.vm(), &router);
        }
        // No vCPU runs now, so nobody is asking: a request from here on is of the new life.
        let number = self.life_number.fetch_add(1, Ordering::AcqRel) + 1;
        self.requests.rearm();
        let console = Arc::clone(status.console());
        let parts = Parts {
            cpuid: &self.cpuid,
            console: &console,
            requests: &self.requests,
            counters: &self.counters,
            ports: vec![(layout::PCI_CONFIG_PORTS, self.pci.config_ports())],
            memory: std::iter::once((layout::ECAM, self.pci.ecam())).chain(self.pci.windows()).collect(),
            on_first_entry: Box::new(move || status.entered()),
            on_failure: Box::new(move |why| {
                let _ = outbox.send(Message::VcpuFailed { life: number, why });
            }),
        };
        self.life = Some(bare.live(parts, entry, held)?);
        Ok(())
    }

    /// Stops the vCPUs and puts all devices into the state after power-on, those of dead or hung processes too. Says whether no
    /// device can be writing to the guest's memory any more (see [`Slot::reset`]).
    fn end_life(&mut self) -> bool {
        self.life = None;
        let quiet = slots::all(&self.slots, |slot| {
            let quiet = slot.reset();
            slot.unbind();
            quiet
        });
        self.pci.reset();
        quiet
    }

    /// Goes on with new memory, of which devices that were dropped know nothing. There is no life.
    fn replace_memory(&mut self) -> Result<(), Error> {
        self.ram = new_ram(self.config.memory)?;
        for slot in &self.slots {
            slot.replace_memory(Arc::clone(&self.ram));
        }
        Ok(())
    }
}

fn new_ram(bytes: u64) -> Result<Arc<GuestRam>, Error> {
    let ram = GuestRam::new(bytes).map_err(|e| {
        Error::new(
            Code::ResourceExhausted,
            ErrorReason::NotEnoughMemory,
            format!("cannot get memory for the guest: {e}"),
        )
        .with("field", "memory_bytes")
        .with("errno", e.raw_os_error().unwrap_or(0).to_string())
        .remedy("give the VM less memory, or raise the limits of the hypervisor's process")
    })?;
    Ok(Arc::new(ram))
}

/// Windows for BARs, the one below 4 GiB first: every guest reaches that.
fn pci_windows(ram_size: u64, cpuid: &CpuidTemplate) -> Vec<std::ops::RangeInclusive<u64>> {
    let high = layout::pci_window_64(ram_size, cpuid.address_bits());
    std::iter::once(layout::PCI_WINDOW_32).chain(high).collect()
}

fn ended(reason: EndReason, detail: impl Into<String>) -> VmEnded {
    VmEnded { reason: reason.into(), detail: detail.into() }
}

fn wrong_state(message: &str, remedy: &str) -> Error {
    Error::new(Code::FailedPrecondition, ErrorReason::WrongState, message).remedy(remedy)
}

fn not_configured() -> Error {
    wrong_state("the VM is not configured", "call Configure first")
}

fn not_booted() -> Error {
    wrong_state("the VM is not booted", "call Boot first")
}
