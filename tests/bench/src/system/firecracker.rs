//! Firecracker, if its binary is on the PATH.

use std::process::Command;

use anyhow::Context;
use serde_json::json;

use super::{Booted, Setup, Vmm, needed, version};
use crate::bench::Bench;
use crate::results;
use crate::vm::Guest;
use crate::workload::{Backing, Block, Workload};

const FIRECRACKER: &str = "firecracker";

/// Firecracker with its own devices and its io_uring engine.
pub(crate) struct Firecracker {
    version: Option<String>,
}

impl Firecracker {
    pub(crate) fn new() -> Self {
        Self { version: version(FIRECRACKER) }
    }
}

impl Vmm for Firecracker {
    fn about(&self) -> results::System {
        results::System {
            name: "firecracker".into(),
            description: "Firecracker with its own devices, virtio-pci, engine io_uring".into(),
            version: self.version.clone().unwrap_or_default(),
        }
    }

    fn can_run(&self, workload: &Workload) -> Result<(), String> {
        needed(FIRECRACKER, self.version.as_ref(), "put it on the PATH")?;
        match workload {
            Workload::Block(Block { backing: Backing::Buffered, queues: 1, .. }) | Workload::StartUp => {
                Ok(())
            }
            Workload::Jitter { backing: Backing::Buffered, .. } => Ok(()),
            _ => Err("it has only disks with one queue on files in the page cache that compare".into()),
        }
    }

    fn boot(&mut self, bench: &Bench, setup: &Setup) -> anyhow::Result<Booted> {
        let mut booted = Booted::default();
        for guest in &setup.guests {
            let drives: Vec<_> = guest
                .disk
                .iter()
                .map(|disk| {
                    json!({"drive_id": "disk", "path_on_host": disk.path, "is_root_device": false,
                        "is_read_only": false, "io_engine": "Async"})
                })
                .collect();
            let config = json!({
                "boot-source": {"kernel_image_path": e2e::binary("bench-guest"), "boot_args": guest.cmdline},
                "machine-config": {"vcpu_count": 1, "mem_size_mib": guest.memory_mib},
                "drives": drives,
            });
            let path = bench.dir.path().join(format!("{}.json", guest.name));
            std::fs::write(&path, config.to_string()).context("writing Firecracker's configuration")?;
            let mut command = Command::new(FIRECRACKER);
            command.args(["--no-api", "--enable-pci", "--config-file"]).arg(&path);
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
