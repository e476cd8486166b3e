//! What is compared. A system is whatever boots the bench guest and serves its devices; another VMM is one more file here.

mod card;
mod cloud_hypervisor;
mod fio;
mod firecracker;
pub(crate) mod in_process;
pub(crate) mod qemu;
mod testpmd;

use std::any::Any;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::rc::Rc;

use crate::bench::Bench;
use crate::results;
use crate::results::Sample;
use crate::vm::Guest;
use crate::workload::{Backing, Workload};

/// Something that can be measured.
pub(crate) trait System {
    /// Name, description, version.
    fn about(&self) -> results::System;

    /// Why it is not measured with this workload.
    ///
    /// # Errors
    /// The reason, for a person.
    fn can_run(&self, workload: &Workload) -> Result<(), String>;

    /// One measurement.
    ///
    /// # Errors
    /// If something did not work: the run goes on without this sample.
    fn sample(&mut self, bench: &Bench, workload: &Workload) -> anyhow::Result<Sample>;

    /// Writes to the test file and reads it back: a system that loses data is fast for nothing.
    ///
    /// # Errors
    /// If not every byte came back as it was written, or the guest does not say so.
    fn verify(&mut self, bench: &Bench) -> anyhow::Result<()>;
}

/// A system that boots bench guests.
pub(crate) trait Vmm {
    /// See [`System::about`].
    fn about(&self) -> results::System;

    /// See [`System::can_run`].
    ///
    /// # Errors
    /// The reason, for a person.
    fn can_run(&self, workload: &Workload) -> Result<(), String>;

    /// Boots guests that belong together.
    ///
    /// # Errors
    /// If something cannot be started.
    fn boot(&mut self, bench: &Bench, setup: &Setup) -> anyhow::Result<Booted>;
}

/// Guests that are booted together.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) guests: Vec<GuestSetup>,
    /// The guests' network reaches the host by a TAP with [`HOST_IP`].
    pub(crate) uplink: bool,
    /// How fast it starts is what counts: a VMM that has a machine without firmware takes that.
    pub(crate) quick_start: bool,
}

impl Setup {
    /// Where everything but the vCPU runs, if that is not left to the scheduler: several guests have no processor each.
    pub(crate) fn backend_cpu(&self, bench: &Bench) -> Option<usize> {
        bench.placement.filter(|_| self.guests.len() == 1).map(|placement| placement.backend)
    }
}

/// One guest.
#[derive(Debug, Clone)]
pub(crate) struct GuestSetup {
    /// For logs, and devices.
    pub(crate) name: String,
    pub(crate) memory_mib: u32,
    pub(crate) cmdline: String,
    pub(crate) disk: Option<Disk>,
    /// Its network interfaces, by what their MAC addresses end with.
    pub(crate) nics: Vec<u8>,
}

/// A guest's disk.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    pub(crate) backing: Backing,
    /// Used unless the backing is [`Backing::Null`].
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) queues: u16,
}

/// The host's address in the network of guests.
pub(crate) const HOST_IP: &str = "10.9.0.1";

/// Guests that run, and who serves them.
#[derive(Default)]
pub(crate) struct Booted {
    pub(crate) guests: Vec<Guest>,
    /// Processes other than the VMMs that do their I/O.
    pub(crate) backends: Vec<u32>,
    /// The network card of ours among them.
    pub(crate) network: Option<Rc<e2e::card::Card>>,
    /// Devices and helpers that go when the guests are gone.
    pub(crate) keep: Vec<Box<dyn Any>>,
}

/// Every system, whether or not it is installed here, in the order in which tables show them.
pub(crate) fn all() -> Vec<Box<dyn System>> {
    use card::{Card, Poll};
    vec![
        crate::sample::on(Card::new(Poll::Adaptive)),
        crate::sample::on(Card::new(Poll::Always)),
        crate::sample::on(Card::new(Poll::Never)),
        crate::sample::on(Card::qcow2()),
        crate::sample::on(Card::with_groups()),
        crate::sample::on(in_process::InProcess::thread()),
        crate::sample::on(in_process::InProcess::inline()),
        crate::sample::on(qemu::Qemu::in_process()),
        crate::sample::on(qemu::Qemu::with_card()),
        crate::sample::on(qemu::Qemu::with_daemon()),
        crate::sample::on(qemu::StorageDaemon::new()),
        crate::sample::on(testpmd::Testpmd::new()),
        crate::sample::on(firecracker::Firecracker::new()),
        crate::sample::on(cloud_hypervisor::CloudHypervisor::new()),
        Box::new(fio::Fio::new()),
    ]
}

/// The first line of what `PROGRAM --version` prints, if there is such a program.
fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().filter(|_| output.status.success()).map(|line| line.trim().to_owned())
}

/// Says that a program is not there.
fn needed(program: &str, found: Option<&String>, package: &str) -> Result<(), String> {
    match found {
        Some(_) => Ok(()),
        None => Err(format!("{program} is not installed ({package})")),
    }
}

/// `02:00:00:00:0b:NN`
fn mac(last: u8) -> String {
    format!("02:00:00:00:0b:{last:02x}")
}
