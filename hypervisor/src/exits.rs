//! Exits from `KVM_RUN` to this process, counted by reason.
//!
//! Each vCPU counts for itself, so that counting costs no shared cache line; readers sum up.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a vCPU left the guest for this process. What a card serves must not show up here: see [`Exit::is_data_path`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Exit {
    /// 16550 registers.
    IoSerial,
    /// PCI configuration access by ports 0xcf8 to 0xcff.
    IoPciConfig,
    /// Reset and power registers (0xcf9, keyboard controller, ACPI sleep control).
    IoReset,
    /// A port nobody answers.
    IoUnclaimed,
    /// PCI configuration access by ECAM.
    MmioPciConfig,
    /// ACPI generic event device and sleep registers.
    MmioAcpi,
    /// virtio-pci common configuration.
    MmioSlotCommon,
    /// virtio-pci device-specific configuration.
    MmioSlotDevice,
    /// virtio-pci ISR status.
    MmioSlotIsr,
    /// A queue notification that reached this process instead of its eventfd, by the BAR or by the window in configuration space.
    MmioSlotNotify,
    /// MSI-X table and pending bits.
    MmioMsix,
    /// Memory nobody answers.
    MmioUnclaimed,
    /// Triple fault.
    Shutdown,
    /// KVM_EXIT_SYSTEM_EVENT.
    SystemEvent,
    /// A signal to the vCPU thread (pause, stop).
    Interrupted,
    /// KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY.
    Failure,
}

impl Exit {
    /// Every reason, in the order of the counters.
    pub const ALL: [Exit; 16] = [
        Exit::IoSerial,
        Exit::IoPciConfig,
        Exit::IoReset,
        Exit::IoUnclaimed,
        Exit::MmioPciConfig,
        Exit::MmioAcpi,
        Exit::MmioSlotCommon,
        Exit::MmioSlotDevice,
        Exit::MmioSlotIsr,
        Exit::MmioSlotNotify,
        Exit::MmioMsix,
        Exit::MmioUnclaimed,
        Exit::Shutdown,
        Exit::SystemEvent,
        Exit::Interrupted,
        Exit::Failure,
    ];

    /// The name in `HypervisorStats.userspace_exits`.
    pub fn as_str(self) -> &'static str {
        match self {
            Exit::IoSerial => "io:serial",
            Exit::IoPciConfig => "io:pci-config",
            Exit::IoReset => "io:reset",
            Exit::IoUnclaimed => "io:unclaimed",
            Exit::MmioPciConfig => "mmio:pci-config",
            Exit::MmioAcpi => "mmio:acpi",
            Exit::MmioSlotCommon => "mmio:slot-common",
            Exit::MmioSlotDevice => "mmio:slot-device",
            Exit::MmioSlotIsr => "mmio:slot-isr",
            Exit::MmioSlotNotify => "mmio:slot-notify",
            Exit::MmioMsix => "mmio:msix",
            Exit::MmioUnclaimed => "mmio:unclaimed",
            Exit::Shutdown => "shutdown",
            Exit::SystemEvent => "system-event",
            Exit::Interrupted => "intr",
            Exit::Failure => "failure",
        }
    }

    /// Whether such an exit means that this process stood in the data path (invariant 1): notifications, and the ISR status, which
    /// a driver without MSI-X reads after each interrupt.
    pub fn is_data_path(self) -> bool {
        matches!(self, Exit::MmioSlotNotify | Exit::MmioSlotIsr)
    }
}

/// The counters of one vCPU.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; Exit::ALL.len()]);

impl ExitCounters {
    /// Counts one.
    pub fn count(&self, exit: Exit) {
        self.0[exit as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many so far.
    pub fn get(&self, exit: Exit) -> u64 {
        self.0[exit as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_counter_and_name() {
        let counters = ExitCounters::default();
        for exit in Exit::ALL {
            counters.count(exit);
        }
        assert!(Exit::ALL.iter().all(|&e| counters.get(e) == 1));
        let names: std::collections::BTreeSet<_> = Exit::ALL.iter().map(|e| e.as_str()).collect();
        assert_eq!(names.len(), Exit::ALL.len());
    }
}
