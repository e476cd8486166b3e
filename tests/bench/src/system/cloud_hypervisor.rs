//! Cloud Hypervisor, if its binary is on the PATH.

use std::process::Command;

use anyhow::Context;

use super::{Booted, Setup, Vmm, needed, version};
use crate::bench::Bench;
use crate::results;
use crate::vm::Guest;
use crate::workload::{Backing, Block, Workload};

const CLOUD_HYPERVISOR: &str = "cloud-hypervisor";

/// Cloud Hypervisor with its own block device, which uses io_uring.
pub(crate) struct CloudHypervisor {
    version: Option<String>,
}

impl CloudHypervisor {
    pub(crate) fn new() -> Self {
        Self { version: version(CLOUD_HYPERVISOR) }
    }
}

impl Vmm for CloudHypervisor {
    fn about(&self) -> results::System {
        results::System {
            name: "cloud-hypervisor".into(),
            description: "Cloud Hypervisor with its own block device".into(),
            version: self.version.clone().unwrap_or_default(),
        }
    }

    fn can_run(&self, workload: &Workload) -> Result<(), String> {
        needed(CLOUD_HYPERVISOR, self.version.as_ref(), "put it on the PATH")?;
        match workload {
            Workload::Block(Block { backing, .. }) | Workload::Jitter { backing, .. } => {
                if *backing == Backing::Null { Err("it has no disk without storage".into()) } else { Ok(()) }
            }
            Workload::StartUp | Workload::Idle => Ok(()),
            _ => Err("only its disks are compared".into()),
        }
    }

    fn boot(&mut self, bench: &Bench, setup: &Setup) -> anyhow::Result<Booted> {
        let mut booted = Booted::default();
        for guest in &setup.guests {
            let mut command = Command::new(CLOUD_HYPERVISOR);
            command.arg("--kernel").arg(e2e::binary("bench-guest")).args(["--cmdline", &guest.cmdline]);
            command.args(["--cpus", "boot=1", "--memory", &format!("size={}M,shared=on", guest.memory_mib)]);
            command.args(["--serial", "tty", "--console", "off"]);
            if let Some(disk) = &guest.disk {
                let path = disk.path.to_str().context("the test file's path is not UTF-8")?;
                let direct = if disk.backing == Backing::Direct { "on" } else { "off" };
                command.args([
                    "--disk",
                    &format!(
                        "path={path},num_queues={},queue_size=256,direct={direct},image_type=raw",
                        disk.queues
                    ),
                ]);
            }
            booted.guests.push(Guest::start(
                command,
                bench.dir.path(),
                &guest.name,
                setup.backend_cpu(bench),
            )?);
        }
        Ok(booted)
    }
}
