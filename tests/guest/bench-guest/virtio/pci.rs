//! virtio over PCI, modern devices only (VirtIO 1.3, 4.1).

use super::Doorbell;
use crate::apic::Vector;
use crate::memory::Registers;
use crate::pci::{Function, Msix, VENDOR_CAPABILITY};
use alloc::string::{String, ToString};

const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const DEVICE: u8 = 4;
const NO_VECTOR: u16 = 0xffff;

/// `virtio_pci_common_cfg` (4.1.4.3).
mod register {
    pub(super) const DEVICE_FEATURE_SELECT: usize = 0;
    pub(super) const DEVICE_FEATURE: usize = 4;
    pub(super) const DRIVER_FEATURE_SELECT: usize = 8;
    pub(super) const DRIVER_FEATURE: usize = 12;
    pub(super) const CONFIG_VECTOR: usize = 16;
    pub(super) const STATUS: usize = 20;
    pub(super) const GENERATION: usize = 21;
    pub(super) const QUEUE_SELECT: usize = 22;
    pub(super) const QUEUE_SIZE: usize = 24;
    pub(super) const QUEUE_VECTOR: usize = 26;
    pub(super) const QUEUE_ENABLE: usize = 28;
    pub(super) const QUEUE_NOTIFY_OFF: usize = 30;
    pub(super) const QUEUE_ADDRESSES: usize = 32;
    pub(super) const LEN: usize = 56;
}

/// The registers of one function.
#[derive(Clone)]
pub(super) struct Pci {
    function: Function,
    common: Registers,
    notify: Registers,
    notify_multiplier: usize,
    device: Option<Registers>,
    msix: Option<Msix>,
}

/// The virtio device ID of a function, if it is a virtio device.
pub(super) fn kind(function: &Function) -> Option<u32> {
    let (vendor, device) = (function.id & 0xffff, function.id >> 16);
    match (vendor, device) {
        (0x1af4, 0x1040..=0x107f) => Some(device - 0x1040),
        // Transitional devices have modern registers too.
        (0x1af4, 0x1000) => Some(1),
        (0x1af4, 0x1001) => Some(2),
        _ => None,
    }
}

impl Pci {
    pub(super) fn new(function: Function) -> Result<Self, String> {
        function.enable();
        let capabilities = function.capabilities();
        let window = |kind: u8| -> Result<Option<(Registers, u16)>, String> {
            for (_, at) in capabilities.iter().filter(|(id, _)| *id == VENDOR_CAPABILITY) {
                if function.read8(at + 3) == kind {
                    let (offset, len) = (function.read32(at + 8), function.read32(at + 12));
                    let address = function.bar(function.read8(at + 4))? + u64::from(offset);
                    return Ok(Some((Registers::map(address, len as usize)?, *at)));
                }
            }
            Ok(None)
        };
        let missing = || {
            alloc::format!("{function} lacks a virtio capability: it is a legacy device (disable-legacy=on)")
        };
        let (common, _) = window(COMMON)?.filter(|(w, _)| w.len() >= register::LEN).ok_or_else(missing)?;
        let (notify, at) = window(NOTIFY)?.ok_or_else(missing)?;
        Ok(Self {
            common,
            notify,
            notify_multiplier: function.read32(at + 16) as usize,
            device: window(DEVICE)?.map(|(w, _)| w),
            msix: function.msix(&capabilities)?,
            function,
        })
    }

    pub(super) fn function(&self) -> &Function {
        &self.function
    }

    pub(super) fn status(&self) -> u8 {
        self.common.read(register::STATUS)
    }

    pub(super) fn set_status(&self, status: u8) {
        self.common.write(register::STATUS, status);
    }

    pub(super) fn features(&self) -> u64 {
        let half = |select: u32| {
            self.common.write(register::DEVICE_FEATURE_SELECT, select);
            u64::from(self.common.read::<u32>(register::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    pub(super) fn set_features(&self, features: u64) {
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.common.write(register::DRIVER_FEATURE_SELECT, select);
            self.common.write(register::DRIVER_FEATURE, half);
        }
    }

    pub(super) fn generation(&self) -> u32 {
        u32::from(self.common.read::<u8>(register::GENERATION))
    }

    pub(super) fn config(&self, offset: usize, out: &mut [u8]) {
        if let Some(device) = &self.device {
            super::mmio::read_config(device, offset, out);
        }
    }

    pub(super) fn disable_interrupts(&self) {
        if let Some(msix) = &self.msix {
            msix.enable(false);
        }
    }

    fn vector(&self, entry: u16, vector: &Vector) -> Result<u16, String> {
        let Some(msix) = &self.msix else {
            return Err("mode=irq needs MSI-X, which the device has not".to_string());
        };
        // Too few entries: the queues share the last one.
        let entry = entry.min(msix.entries - 1);
        let (address, data) = vector.message()?;
        msix.set(entry, address, data);
        msix.enable(true);
        Ok(entry)
    }

    fn set_vector(&self, register: usize, entry: u16) -> Result<(), String> {
        self.common.write(register, entry);
        match self.common.read::<u16>(register) {
            NO_VECTOR => Err(alloc::format!("the device refuses MSI-X vector {entry}")),
            _ => Ok(()),
        }
    }

    pub(super) fn set_config_vector(&self, vector: &Vector) -> Result<(), String> {
        let entry = self.vector(0, vector)?;
        self.set_vector(register::CONFIG_VECTOR, entry)
    }

    pub(super) fn select_queue(&self, index: u16) -> u16 {
        self.common.write(register::QUEUE_SELECT, index);
        self.common.read(register::QUEUE_SIZE)
    }

    pub(super) fn start_queue(
        &self,
        index: u16,
        size: u16,
        addresses: [u64; 3],
        vector: Option<&Vector>,
    ) -> Result<Doorbell, String> {
        self.common.write(register::QUEUE_SIZE, size);
        if let Some(vector) = vector {
            let entry = self.vector(index + 1, vector)?;
            self.set_vector(register::QUEUE_VECTOR, entry)?;
        }
        let mut at = register::QUEUE_ADDRESSES;
        for address in addresses {
            // Halves: Firecracker takes no 8-byte writes.
            self.common.write(at, address as u32);
            self.common.write(at + 4, (address >> 32) as u32);
            at += 8;
        }
        let offset =
            usize::from(self.common.read::<u16>(register::QUEUE_NOTIFY_OFF)) * self.notify_multiplier;
        self.common.write(register::QUEUE_ENABLE, 1u16);
        let registers = self.notify.part(offset, 2).ok_or("the doorbell is outside its BAR")?;
        Ok(Doorbell { registers, queue: index, wide: false })
    }
}
