//! Outboard as it is: the hypervisor in one process, its devices in cards.

mod network;

use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context, anyhow};
use proto::v1::{BlockDeviceSpec, Device, ImageFormat, PollMode};

use super::{Booted, Disk, Setup, Vmm};
use crate::bench::Bench;
use crate::probe::place_process;
use crate::results;
use crate::vm::Guest;
use crate::workload::{Backing, Block, Workload};
use network::Network;

/// When a card's threads poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Poll {
    /// For as long as it pays.
    Adaptive,
    /// Always.
    Always,
    /// Never: they sleep until they are kicked.
    Never,
}

impl Poll {
    /// As the network card's option has it, which is for all its devices.
    fn option(self) -> &'static str {
        match self {
            Self::Adaptive => "adaptive",
            Self::Always => "always",
            Self::Never => "never",
        }
    }

    /// As a disk's specification has it.
    fn mode(self) -> PollMode {
        match self {
            Self::Adaptive => PollMode::Adaptive,
            Self::Always => PollMode::Always,
            Self::Never => PollMode::Never,
        }
    }
}

/// What a system is there to show beside those that differ in [`Poll`] only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Plain,
    /// Disks are in qcow2 files.
    Qcow2,
    /// Network devices have security groups.
    Groups,
}

/// Hypervisor and cards.
pub(crate) struct Card {
    poll: Poll,
    variant: Variant,
    cards: Option<Cards>,
}

/// The card processes of a system, each started when it is first needed. They live as long as the system does; devices come
/// and go with each measurement.
pub(crate) struct Cards {
    directory: PathBuf,
    poll: Poll,
    format: ImageFormat,
    groups: bool,
    storage: Option<Process>,
    network: Option<Process>,
}

struct Process {
    card: Rc<e2e::card::Card>,
    pid: u32,
}

impl Cards {
    /// Cards that keep what they have below a directory of this name.
    pub(crate) fn new(bench: &Bench, name: &str, poll: Poll) -> Self {
        let directory = bench.dir.path().join(name);
        Self { directory, poll, format: ImageFormat::Raw, groups: false, storage: None, network: None }
    }

    /// Makes the devices of `setup`, in the order of its guests; each guard removes its device.
    pub(crate) fn devices(&mut self, bench: &Bench, setup: &Setup) -> anyhow::Result<Vec<Vec<Plugged>>> {
        let (poll, format) = (self.poll, self.format);
        let start = |program: &'static str, arguments: &[&str]| {
            let mut card = e2e::card::Card::start_with(program, &self.directory.join(program), arguments);
            let pid = card.process().pid();
            Process { card: Rc::new(card), pid }
        };
        let network = if setup.guests.iter().any(|guest| !guest.nics.is_empty()) {
            let process =
                self.network.get_or_insert_with(|| start("offload-net", &["--poll", poll.option()]));
            place_process(process.pid, setup.backend_cpu(bench));
            Some(Network::new(&process.card, setup.uplink, self.groups)?)
        } else {
            None
        };
        let mut all = Vec::new();
        for guest in &setup.guests {
            let mut devices = Vec::new();
            if let Some(disk) = &guest.disk {
                let process = self.storage.get_or_insert_with(|| start("offload-blk", &[]));
                place_process(process.pid, setup.backend_cpu(bench));
                let id = format!("{}-disk", guest.name);
                devices.push(Plugged::disk(&process.card, &id, disk, poll, format)?);
            }
            if let Some(network) = &network {
                for &last in &guest.nics {
                    devices.push(Plugged::nic(&format!("{}-nic{last}", guest.name), network, last)?);
                }
            }
            all.push(devices);
        }
        Ok(all)
    }

    /// The network card, if it runs.
    pub(crate) fn network(&self) -> Option<Rc<e2e::card::Card>> {
        self.network.as_ref().map(|process| process.card.clone())
    }

    /// Those that run.
    pub(crate) fn pids(&self) -> Vec<u32> {
        [&self.storage, &self.network].into_iter().flatten().map(|process| process.pid).collect()
    }
}

/// A device of a card that exists. Dropping it removes it.
pub(crate) struct Plugged {
    card: Rc<e2e::card::Card>,
    id: String,
    _network: Option<Rc<Network>>,
    /// As the card describes it.
    pub(crate) device: Device,
}

impl Plugged {
    fn disk(
        card: &Rc<e2e::card::Card>,
        id: &str,
        disk: &Disk,
        poll: Poll,
        format: ImageFormat,
    ) -> anyhow::Result<Self> {
        let (queues, poll) = (u32::from(disk.queues), poll.mode().into());
        let spec = match disk.backing {
            Backing::Null => BlockDeviceSpec { null_bytes: disk.bytes, queues, poll, ..Default::default() },
            backing => BlockDeviceSpec {
                path: disk.path.to_str().context("the test file's path is not UTF-8")?.to_owned(),
                queues,
                poll,
                direct: backing == Backing::Direct,
                format: format.into(),
                ..Default::default()
            },
        };
        let device =
            card.create_block(id, spec).map_err(|e| anyhow!("creating disk {id}: {}", e.message()))?;
        Ok(Self { card: card.clone(), id: id.to_owned(), _network: None, device })
    }

    fn nic(id: &str, network: &Rc<Network>, last: u8) -> anyhow::Result<Self> {
        let card = &network.card;
        let device = card
            .create_nic(id, network.nic(last))
            .map_err(|e| anyhow!("creating network device {id}: {}", e.message()))?;
        Ok(Self { card: card.clone(), id: id.to_owned(), _network: Some(network.clone()), device })
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        if let Err(e) = self.card.delete(&self.id) {
            eprintln!("offload-bench: removing device {}: {}", self.id, e.message());
        }
    }
}

/// `outboard-hypervisor` for a guest with these devices.
pub(crate) fn hypervisor(guest: &super::GuestSetup, slots: &[String]) -> Command {
    let mut command = Command::new(e2e::binary("outboard-hypervisor"));
    command.arg("--kernel").arg(e2e::binary("bench-guest"));
    command.arg("--memory").arg(format!("{}M", guest.memory_mib));
    command.arg("--cmdline").arg(&guest.cmdline);
    for slot in slots {
        command.arg("--device").arg(slot);
    }
    command
}

/// The slot for a card's device, as the hypervisor's option has it.
pub(crate) fn slot(device: &Device) -> String {
    format!(
        "{},id={},queues={},queue-size={},config-size={}",
        device.socket_path, device.virtio_device_id, device.queues, device.queue_size, device.config_size
    )
}

impl Card {
    pub(crate) fn new(poll: Poll) -> Self {
        Self { poll, variant: Variant::Plain, cards: None }
    }

    /// With the test file's content in a qcow2 file without a backing file, all of it allocated.
    pub(crate) fn qcow2() -> Self {
        Self { poll: Poll::Always, variant: Variant::Qcow2, cards: None }
    }

    /// With security groups, whose rules allow all that the guests send: every packet is one of a tracked connection, at its
    /// sender and at its receiver.
    pub(crate) fn with_groups() -> Self {
        Self { poll: Poll::Adaptive, variant: Variant::Groups, cards: None }
    }

    fn name(&self) -> &'static str {
        match (self.variant, self.poll) {
            (Variant::Qcow2, _) => "card-qcow2",
            (Variant::Groups, _) => "card-groups",
            (Variant::Plain, Poll::Adaptive) => "card",
            (Variant::Plain, Poll::Always) => "card-poll",
            (Variant::Plain, Poll::Never) => "card-irq",
        }
    }
}

impl Vmm for Card {
    fn about(&self) -> results::System {
        let how = match (self.variant, self.poll) {
            (Variant::Qcow2, _) => {
                "cards poll all the time, and the disk is a qcow2 file with the same content"
            }
            (Variant::Groups, _) => {
                "cards poll while it pays, and the guests have security groups and tracked connections"
            }
            (Variant::Plain, Poll::Adaptive) => "cards poll while it pays (their default)",
            (Variant::Plain, Poll::Always) => "cards poll all the time",
            (Variant::Plain, Poll::Never) => "cards sleep until they are kicked",
        };
        results::System {
            name: self.name().into(),
            description: format!("Outboard: hypervisor and cards in processes of their own; {how}"),
            version: String::new(),
        }
    }

    fn can_run(&self, workload: &Workload) -> Result<(), String> {
        match (self.variant, workload) {
            (Variant::Plain, _) | (Variant::Groups, Workload::Network { .. }) => Ok(()),
            (Variant::Groups, _) => Err("it is there to show what security groups cost in a network".into()),
            (
                Variant::Qcow2,
                Workload::Block(Block { backing: Backing::Buffered, block_bytes: 4096, .. }),
            ) => {
                super::needed("qemu-img", super::version("qemu-img").as_ref(), "Debian's package qemu-utils")
            }
            (Variant::Qcow2, _) => {
                Err("it is there to compare qcow2 with raw in the page cache, requests of 4 KiB".into())
            }
        }
    }

    fn boot(&mut self, bench: &Bench, setup: &Setup) -> anyhow::Result<Booted> {
        let (name, poll) = (self.name(), self.poll);
        let cards = self.cards.get_or_insert_with(|| Cards::new(bench, name, poll));
        cards.groups = self.variant == Variant::Groups;
        let mut setup = setup.clone();
        if self.variant == Variant::Qcow2 {
            cards.format = ImageFormat::Qcow2;
            for disk in setup.guests.iter_mut().filter_map(|guest| guest.disk.as_mut()) {
                disk.path = bench.qcow2()?;
            }
        }
        let setup = &setup;
        let devices = cards.devices(bench, setup)?;
        let mut guests = Vec::new();
        for (guest, devices) in setup.guests.iter().zip(&devices) {
            let slots: Vec<_> = devices.iter().map(|plugged| slot(&plugged.device)).collect();
            let command = hypervisor(guest, &slots);
            guests.push(Guest::start(command, bench.dir.path(), &guest.name, setup.backend_cpu(bench))?);
        }
        let keep = devices.into_iter().flatten().map(|d| Box::new(d) as _).collect();
        Ok(Booted { guests, backends: cards.pids(), network: cards.network(), keep })
    }
}
