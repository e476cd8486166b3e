//! Our hypervisor and our engines in one process: what small VMMs are. The program is `in-process-vmm` of this package.

use std::process::Command;

use anyhow::Context;

use super::qemu::OwnNetwork;
use super::{Booted, Setup, Vmm, mac};
use crate::bench::Bench;
use crate::results;
use crate::vm::Guest;
use crate::workload::{Backing, Peer, Workload};

/// Which thread does the I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Host {
    /// One of its own, woken by an ioeventfd.
    Thread,
    /// The vCPU's, on the exit that the guest's notification causes.
    Inline,
}

/// Hypervisor and engines in one process.
pub(crate) struct InProcess {
    host: Host,
    /// What it is called instead, and how much slower it is made, in nanoseconds per batch: for the test of the harness.
    altered: Option<(&'static str, u32)>,
}

impl InProcess {
    pub(crate) fn thread() -> Self {
        Self { host: Host::Thread, altered: None }
    }

    pub(crate) fn inline() -> Self {
        Self { host: Host::Inline, altered: None }
    }

    /// [`InProcess::thread`] under another name, which waits so long before every answer.
    pub(crate) fn slowed(name: &'static str, delay_ns: u32) -> Self {
        Self { host: Host::Thread, altered: Some((name, delay_ns)) }
    }

    fn name(&self) -> &'static str {
        if let Some((name, _)) = self.altered {
            return name;
        }
        self.io()
    }

    fn io(&self) -> &'static str {
        match self.host {
            Host::Thread => "thread",
            Host::Inline => "inline",
        }
    }
}

impl Vmm for InProcess {
    fn about(&self) -> results::System {
        let description = match self.host {
            Host::Thread => {
                "Outboard's hypervisor and the same engine in one process: the engine on a thread of its own, woken by ioeventfd"
            }
            Host::Inline => {
                "Outboard's hypervisor and the same engine in one process: the engine in the vCPU's thread, on the exit of the guest's notification"
            }
        };
        results::System { name: self.name().into(), description: description.into(), version: String::new() }
    }

    fn can_run(&self, workload: &Workload) -> Result<(), String> {
        match (self.host, workload) {
            (Host::Inline, Workload::Network { .. }) => {
                Err("a network is one thread for all its devices, which no vCPU can be".into())
            }
            (Host::Thread, Workload::Network { peer: Peer::Itself, .. }) => {
                Err("this VMM gives its guest one network interface".into())
            }
            _ => Ok(()),
        }
    }

    fn boot(&mut self, bench: &Bench, setup: &Setup) -> anyhow::Result<Booted> {
        let network = OwnNetwork::make(setup)?;
        let mut booted = Booted::default();
        for (n, guest) in setup.guests.iter().enumerate() {
            let mut command = Command::new(e2e::binary("in-process-vmm"));
            command.args(["--io", self.io()]);
            if let Some((_, delay_ns)) = self.altered {
                command.args(["--delay-ns", &delay_ns.to_string()]);
            }
            command.arg("--dir").arg(bench.dir.path().join(format!("{}-{}", self.name(), guest.name)));
            if let Some(disk) = &guest.disk {
                let path = disk.path.to_str().context("the test file's path is not UTF-8")?;
                let spec = match disk.backing {
                    Backing::Null => format!("null={}", disk.bytes),
                    Backing::Buffered => format!("file={path}"),
                    Backing::Direct => format!("direct={path}"),
                };
                command.args(["--disk", &spec, "--queues", &disk.queues.to_string()]);
            }
            if let (Some(last), Some(tap)) =
                (guest.nics.first(), network.as_ref().and_then(|net| net.taps.get(n)))
            {
                command.args(["--tap", tap, "--mac", &mac(*last)]);
            }
            command.arg("--").arg("--kernel").arg(e2e::binary("bench-guest"));
            command.args(["--memory", &format!("{}M", guest.memory_mib), "--cmdline", &guest.cmdline]);
            let cpu = setup.backend_cpu(bench);
            booted.guests.push(Guest::start(command, bench.dir.path(), &guest.name, cpu)?);
        }
        booted.keep.extend(network.map(|net| Box::new(net) as _));
        Ok(booted)
    }
}
