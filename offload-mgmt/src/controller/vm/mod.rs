//! One VM: a handle that everybody has, and an actor that alone changes anything.
//!
//! ```text
//!                 create                       Boot answered
//!      (nothing) ───────► STARTING ───────────────────────────► RUNNING ◄──► PAUSED
//!          ▲                 │ ▲                                   │
//!          │ failed create   │ │ start         stop: power button, │  the process ended
//!          └─────────────────┘ │               then at once        ▼  by itself
//!                              │                               STOPPING ───┐
//!                           STOPPED / FAILED ◄─────────────────────┴───────┘
//! ```
//!
//! Operations on one VM are done one after the other by its actor ([`actor`]); different VMs know nothing of each other.
//! Only ending a VM at once jumps the queue: it interrupts a start and a graceful stop.

use std::sync::Arc;
use std::time::Duration;

use proto::error::{Error, ErrorReason};
use proto::v1::{self, DeviceLimits, NetLimits, SlotInfo, VmSpec, VmState};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Code;
use tonic::transport::Channel;

use super::registry::vm_not_found;
use super::store::VmRecord;

mod actor;
mod ending;
mod limits;
mod recover;
mod start;

pub(crate) use actor::{Begin, spawn};
use limits::NewLimits;

/// A VM as everybody may see it.
#[derive(Debug)]
pub(crate) struct Vm {
    /// Its id.
    pub id: String,
    /// With every default filled in, as it was when this controller came to know it: see [`Vm::current_spec`].
    pub spec: VmSpec,
    /// The token of the client that made it, or empty.
    pub token: String,
    /// The request the token came with.
    pub request: Vec<u8>,
    /// Unix time in microseconds.
    pub created_us: i64,
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<View>,
}

/// What changes about a VM.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// Its state.
    pub state: VmState,
    /// One sentence about it.
    pub detail: String,
    /// Unix time in microseconds of its last start; 0: never.
    pub started_us: i64,
    /// Its hypervisor's process id; 0: none.
    pub pid: u32,
    /// Guest resets since its start.
    pub resets: u64,
    /// It failed and its process may be there still, with its devices: its images are in use.
    pub remains: bool,
    /// How far its creation is.
    pub creation: Creation,
    /// A connection to its hypervisor while it runs.
    pub hypervisor: Option<Channel>,
    /// Limits of its disks, in their order.
    pub limits: Vec<Option<DeviceLimits>>,
    /// Those of its network interfaces.
    pub nic_limits: Vec<Option<NetLimits>>,
}

/// How far a VM's creation is.
#[derive(Debug, Clone)]
pub(crate) enum Creation {
    /// Not answered yet.
    Pending,
    /// It exists.
    Done,
    /// It did not come to be, and nothing is left of it.
    Failed(Error),
}

type Reply = oneshot::Sender<Result<(), Error>>;

/// What an actor is asked to do.
#[derive(Debug)]
enum Command {
    Start(Reply),
    Stop { graceful: bool, timeout: Duration, reply: Reply },
    Reboot(Reply),
    Delete { force: bool, reply: Reply },
    SetLimits { device: String, limits: NewLimits, reply: Reply },
}

impl Command {
    /// Ends the VM at once, whatever is being done.
    fn jumps_the_queue(&self) -> bool {
        matches!(self, Self::Stop { graceful: false, .. } | Self::Delete { force: true, .. })
    }
}

impl Vm {
    /// A handle and what its actor needs.
    fn new(record: &VmRecord, view: View) -> (Arc<Self>, watch::Sender<View>, mpsc::Receiver<Command>) {
        let (commands, receiver) = mpsc::channel(64);
        let (sender, view) = watch::channel(view);
        let vm = Self {
            id: record.id.clone(),
            spec: record.spec.clone().unwrap_or_default(),
            token: record.client_token.clone(),
            request: record.request.clone(),
            created_us: record.created_us,
            commands,
            view,
        };
        (Arc::new(vm), sender, receiver)
    }

    /// What it is now.
    pub(crate) fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Its specification, with what has been changed since.
    pub(crate) fn current_spec(&self) -> VmSpec {
        let mut spec = self.spec.clone();
        let view = self.view.borrow();
        for (disk, limits) in spec.disks.iter_mut().zip(&view.limits) {
            disk.limits = *limits;
        }
        for (nic, limits) in spec.nics.iter_mut().zip(&view.nic_limits) {
            nic.limits = *limits;
        }
        drop(view);
        spec
    }

    /// What it is now, as the API has it.
    pub(crate) fn message(&self, slots: Vec<SlotInfo>) -> v1::Vm {
        let view = self.view();
        v1::Vm {
            id: self.id.clone(),
            spec: Some(self.current_spec()),
            state: view.state.into(),
            detail: view.detail,
            created_us: self.created_us,
            started_us: view.started_us,
            hypervisor_pid: view.pid,
            slots,
            resets: view.resets,
        }
    }

    /// Its hypervisor.
    ///
    /// # Errors
    /// WRONG_STATE if it has none.
    pub(crate) fn hypervisor(&self) -> Result<Channel, Error> {
        let view = self.view();
        view.hypervisor.ok_or_else(|| {
            if matches!(view.state, VmState::Running | VmState::Paused | VmState::Stopping) {
                unreachable_hypervisor(&self.spec.name, "the connection to it is lost")
            } else {
                self.wrong_state(
                    "does not run",
                    format!("start it with: outboard vm start {}", self.spec.name),
                )
            }
        })
    }

    /// The VM's state does not allow what was asked.
    fn wrong_state(&self, what: &str, remedy: String) -> Error {
        Error::new(Code::FailedPrecondition, ErrorReason::WrongState, format!("VM {} {what}", self.spec.name))
            .resource(self.spec.name.clone())
            .with("state", self.view().state.as_str_name())
            .remedy(remedy)
    }

    /// Waits until its creation has been decided.
    ///
    /// # Errors
    /// Why it does not exist.
    pub(crate) async fn created(&self) -> Result<(), Error> {
        let mut view = self.view.clone();
        let decided = view.wait_for(|v| !matches!(v.creation, Creation::Pending)).await;
        match decided.map(|v| v.creation.clone()) {
            Ok(Creation::Failed(e)) => Err(e),
            Ok(_) => Ok(()),
            Err(_) => Err(vm_not_found(&self.spec.name)),
        }
    }

    /// Starts it; answers when the guest runs.
    ///
    /// # Errors
    /// WRONG_STATE, or why it cannot be started.
    pub(crate) async fn start(&self) -> Result<(), Error> {
        self.ask(Command::Start).await
    }

    /// Stops it; answers when it has stopped.
    ///
    /// # Errors
    /// HYPERVISOR_UNREACHABLE when the power button cannot be pressed, or the process does not end.
    pub(crate) async fn stop(&self, graceful: bool, timeout: Duration) -> Result<(), Error> {
        self.ask(|reply| Command::Stop { graceful, timeout, reply }).await
    }

    /// Resets the guest.
    ///
    /// # Errors
    /// WRONG_STATE, or what the hypervisor answers.
    pub(crate) async fn reboot(&self) -> Result<(), Error> {
        self.ask(Command::Reboot).await
    }

    /// Sets what it may do with a disk per second.
    ///
    /// # Errors
    /// INVALID_FIELD, DEVICE_NOT_FOUND if it has no such disk, or why its card does not do it.
    pub(crate) async fn set_disk_limits(
        &self,
        disk: &str,
        limits: Option<DeviceLimits>,
    ) -> Result<(), Error> {
        limits.unwrap_or_default().check()?;
        let limits = NewLimits::Disk(limits);
        self.ask(|reply| Command::SetLimits { device: disk.to_owned(), limits, reply }).await
    }

    /// The same with a network interface.
    ///
    /// # Errors
    /// As [`Vm::set_disk_limits`].
    pub(crate) async fn set_nic_limits(&self, nic: &str, limits: Option<NetLimits>) -> Result<(), Error> {
        limits.unwrap_or_default().check()?;
        let limits = NewLimits::Nic(limits);
        self.ask(|reply| Command::SetLimits { device: nic.to_owned(), limits, reply }).await
    }

    /// Removes it.
    ///
    /// # Errors
    /// WRONG_STATE if it runs and `force` is not set.
    pub(crate) async fn delete(&self, force: bool) -> Result<(), Error> {
        self.ask(|reply| Command::Delete { force, reply }).await
    }

    async fn ask(&self, command: impl FnOnce(Reply) -> Command) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let gone = || vm_not_found(&self.spec.name);
        self.commands.send(command(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// A VM's hypervisor does not answer.
pub(crate) fn unreachable_hypervisor(vm: &str, why: &str) -> Error {
    Error::new(
        Code::Unavailable,
        ErrorReason::HypervisorUnreachable,
        format!("the hypervisor of VM {vm} does not answer: {why}"),
    )
    .resource(vm)
    .remedy(format!("end the VM with: outboard vm stop --force {vm}"))
}
