//! The configuration of a VM, checked.

use std::collections::BTreeSet;
use std::path::PathBuf;

use proto::error::{Error, ErrorReason};
use proto::v1::{HypervisorConfig, SlotConfig};
use tonic::Code;

use crate::boot::BootSource;
use crate::memory::GRANULE;
use crate::platform::layout;
use crate::slot;

/// Least RAM of a VM, in bytes.
const MIN_MEMORY: u64 = 16 << 20;
/// APIC ids are 8 bits wide without interrupt remapping, and 255 is the broadcast.
pub(super) const MAX_VCPUS: u32 = 254;
/// Devices of a PCI bus, without the host bridge.
const MAX_SLOTS: usize = 31;
/// A configuration whose every field is within bounds. Whether files and sockets are there is found out by using them.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct VmConfig {
    pub(super) vcpus: u8,
    /// Bytes.
    pub(super) memory: u64,
    pub(super) boot: BootSource,
    pub(super) slots: Vec<SlotConfig>,
}

impl VmConfig {
    pub(super) fn check(config: &HypervisorConfig) -> Result<Self, Error> {
        slot::check_id("vm_id", &config.vm_id)?;
        let vcpus = match u8::try_from(config.vcpus) {
            Ok(n) if n > 0 && u32::from(n) <= MAX_VCPUS => n,
            _ => {
                return Err(Error::invalid_field(
                    "vcpus",
                    format!("a VM cannot have {} vCPUs", config.vcpus),
                )
                .remedy(format!("give 1 to {MAX_VCPUS}")));
            }
        };
        let memory = config.memory_bytes;
        if memory < MIN_MEMORY || !memory.is_multiple_of(GRANULE) {
            return Err(Error::invalid_field(
                "memory_bytes",
                format!("a VM cannot have {memory} bytes of RAM"),
            )
            .remedy("give a multiple of 2 MiB, at least 16 MiB"));
        }
        let boot = config.boot.as_ref().ok_or_else(|| {
            Error::invalid_field("boot", "nothing to boot is given").remedy("give boot.kernel_path")
        })?;
        if config.slots.len() > MAX_SLOTS {
            return Err(Error::invalid_field("slots", format!("{} slots are too many", config.slots.len()))
                .remedy(format!("give at most {MAX_SLOTS}")));
        }
        let mut ids = BTreeSet::new();
        for slot in &config.slots {
            slot::check(slot)?;
            if !ids.insert(&slot.id) {
                return Err(Error::invalid_field("slots.id", format!("two slots are called {}", slot.id))
                    .resource(&slot.id)
                    .remedy("give every slot an id of its own"));
            }
        }
        Ok(Self {
            vcpus,
            memory,
            boot: BootSource {
                kernel: path("boot.kernel_path", &boot.kernel_path)?,
                initramfs: match boot.initramfs_path.as_str() {
                    "" => None,
                    given => Some(path("boot.initramfs_path", given)?),
                },
                cmdline: cmdline(&boot.cmdline)?,
            },
            slots: config.slots.clone(),
        })
    }
}

fn path(field: &str, given: &str) -> Result<PathBuf, Error> {
    let path = PathBuf::from(given);
    if path.is_absolute() && !given.contains('\0') {
        return Ok(path);
    }
    let message = if given.is_empty() {
        format!("{field} is missing")
    } else {
        format!("{given:?} is not an absolute path")
    };
    Err(Error::invalid_field(field, message)
        .resource(given)
        .remedy("give the absolute path of a file of the host"))
}

fn cmdline(given: &str) -> Result<String, Error> {
    if given.len() > layout::CMDLINE_MAX {
        return Err(Error::invalid_field(
            "boot.cmdline",
            format!("the kernel command line has {} bytes", given.len()),
        )
        .remedy(format!("shorten it to {} bytes", layout::CMDLINE_MAX)));
    }
    if given.contains('\0') {
        return Err(Error::invalid_field("boot.cmdline", "the kernel command line contains a NUL byte")
            .remedy("remove it"));
    }
    Ok(given.to_owned())
}

/// More RAM than the host has is never going to work.
pub(super) fn check_host_memory(wanted: u64, meminfo: &str) -> Result<(), Error> {
    let total_kib = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:"))
        .and_then(|l| l.trim().strip_suffix("kB"))
        .and_then(|l| l.trim().parse::<u64>().ok());
    let Some(total) = total_kib.map(|kib| kib * 1024) else { return Ok(()) };
    if wanted <= total {
        return Ok(());
    }
    Err(Error::new(
        Code::ResourceExhausted,
        ErrorReason::NotEnoughMemory,
        format!("the VM is to have {} MiB of RAM, the host has {} MiB", wanted >> 20, total >> 20),
    )
    .with("field", "memory_bytes")
    .remedy("give the VM less memory than the host has"))
}

#[cfg(test)]
mod tests {
    use proto::v1::BootSource as ProtoBoot;

    use super::*;

    fn good() -> HypervisorConfig {
        HypervisorConfig {
            vm_id: "vm-1".into(),
            vcpus: 2,
            memory_bytes: 128 << 20,
            boot: Some(ProtoBoot { kernel_path: "/boot/vmlinuz".into(), ..Default::default() }),
            slots: vec![SlotConfig {
                id: "disk0".into(),
                socket_path: "/run/x.sock".into(),
                virtio_device_id: 2,
                ..Default::default()
            }],
        }
    }

    #[test]
    fn a_good_configuration_passes() {
        let config = VmConfig::check(&good()).unwrap();
        assert_eq!((config.vcpus, config.memory, config.slots.len()), (2, 128 << 20, 1));
        assert_eq!(config.boot.initramfs, None);
    }

    #[test]
    fn every_bad_field_is_named() {
        let bad = |field: &str, change: &dyn Fn(&mut HypervisorConfig)| {
            let mut config = good();
            change(&mut config);
            let error = VmConfig::check(&config).unwrap_err();
            assert_eq!(error.reason(), ErrorReason::InvalidField);
            let text = format!("{error:?}");
            assert!(text.contains(&format!("\"field\": \"{field}\"")), "{field}: {text}");
            assert!(text.contains("remedy"), "{text}");
        };
        bad("vm_id", &|c| c.vm_id = String::new());
        bad("vm_id", &|c| c.vm_id = "Über".into());
        bad("vm_id", &|c| c.vm_id = "a".repeat(65));
        bad("vcpus", &|c| c.vcpus = 0);
        bad("vcpus", &|c| c.vcpus = 255);
        bad("vcpus", &|c| c.vcpus = 257);
        bad("memory_bytes", &|c| c.memory_bytes = 0);
        bad("memory_bytes", &|c| c.memory_bytes = (128 << 20) + 4096);
        bad("boot", &|c| c.boot = None);
        bad("boot.kernel_path", &|c| c.boot.as_mut().unwrap().kernel_path = String::new());
        bad("boot.kernel_path", &|c| c.boot.as_mut().unwrap().kernel_path = "vmlinuz".into());
        bad("boot.initramfs_path", &|c| c.boot.as_mut().unwrap().initramfs_path = "initrd".into());
        bad("boot.cmdline", &|c| c.boot.as_mut().unwrap().cmdline = "x".repeat(2048));
        bad("boot.cmdline", &|c| c.boot.as_mut().unwrap().cmdline = "a\0b".into());
        bad("slots", &|c| c.slots = vec![c.slots[0].clone(); 32]);
        bad("slots.id", &|c| c.slots.push(c.slots[0].clone()));
        // What is wrong with a slot, the slot says.
        bad("slots.queue_size", &|c| c.slots[0].queue_size = 100);
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused() {
        let meminfo = "MemTotal:       24630272 kB\nMemFree:        1 kB\n";
        assert!(check_host_memory(24630272 * 1024, meminfo).is_ok());
        let error = check_host_memory(25 << 30, meminfo).unwrap_err();
        assert_eq!(error.reason(), ErrorReason::NotEnoughMemory);
        assert!(error.to_string().contains("the host has 24053 MiB"), "{error}");
        assert!(check_host_memory(25 << 30, "nonsense").is_ok());
    }
}
