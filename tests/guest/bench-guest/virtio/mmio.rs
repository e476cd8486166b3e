//! virtio over MMIO, version 2 (VirtIO 1.3, 4.2).

use super::Doorbell;
use crate::apic::Vector;
use crate::memory::Registers;
use alloc::string::String;
use guest::args::MmioDevice;

const MAGIC: usize = 0;
const VERSION: usize = 4;
const DEVICE_ID: usize = 8;
const DEVICE_FEATURES: usize = 0x10;
const DEVICE_FEATURES_SELECT: usize = 0x14;
const DRIVER_FEATURES: usize = 0x20;
const DRIVER_FEATURES_SELECT: usize = 0x24;
const QUEUE_SELECT: usize = 0x30;
const QUEUE_SIZE_MAX: usize = 0x34;
const QUEUE_SIZE: usize = 0x38;
const QUEUE_READY: usize = 0x44;
const QUEUE_NOTIFY: usize = 0x50;
const INTERRUPT_ACKNOWLEDGE: usize = 0x64;
const STATUS: usize = 0x70;
const QUEUE_DESCRIPTORS: usize = 0x80;
const QUEUE_DRIVER: usize = 0x90;
const QUEUE_DEVICE: usize = 0xa0;
const GENERATION: usize = 0xfc;
const CONFIG: usize = 0x100;
/// Registers and configuration space; QEMU's windows have 512 bytes.
const LEN: usize = 0x200;

/// The registers of one device.
#[derive(Clone)]
pub(super) struct Mmio {
    registers: Registers,
    address: u64,
    irq: u32,
}

impl Mmio {
    /// The device ID and the registers. ID 0 is an empty place.
    pub(super) fn new(device: &MmioDevice) -> Result<(u32, Self), String> {
        let registers = Registers::map(device.address, LEN)?;
        if registers.read::<u32>(MAGIC) != 0x7472_6976 {
            return Err(alloc::format!("there is no virtio-mmio device at {:#x}", device.address));
        }
        let kind = registers.read(DEVICE_ID);
        let version: u32 = registers.read(VERSION);
        if kind != 0 && version != 2 {
            let at = device.address;
            return Err(alloc::format!(
                "the virtio-mmio device at {at:#x} has version {version}, not 2 (QEMU: -global virtio-mmio.force-legacy=false)"
            ));
        }
        Ok((kind, Self { registers, address: device.address, irq: device.irq }))
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn status(&self) -> u8 {
        self.registers.read::<u32>(STATUS) as u8
    }

    pub(super) fn set_status(&self, status: u8) {
        self.registers.write(STATUS, u32::from(status));
    }

    pub(super) fn features(&self) -> u64 {
        let half = |select: u32| {
            self.registers.write(DEVICE_FEATURES_SELECT, select);
            u64::from(self.registers.read::<u32>(DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    pub(super) fn set_features(&self, features: u64) {
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.registers.write(DRIVER_FEATURES_SELECT, select);
            self.registers.write(DRIVER_FEATURES, half);
        }
    }

    pub(super) fn generation(&self) -> u32 {
        self.registers.read(GENERATION)
    }

    pub(super) fn config(&self, offset: usize, out: &mut [u8]) {
        if let Some(window) = self.registers.part(CONFIG, LEN - CONFIG) {
            read_config(&window, offset, out);
        }
    }

    /// The reset does it.
    #[expect(clippy::unused_self, reason = "both transports have the same methods")]
    pub(super) fn disable_interrupts(&self) {}

    pub(super) fn set_config_vector(&self, vector: &Vector) -> Result<(), String> {
        // One line for everything: routed here, and again by each queue; the last vector counts.
        vector.route(self.irq)
    }

    /// Acknowledges both causes, whichever it was: one that came up after a look at the status would keep the level raised, and there
    /// would be no edge any more.
    pub(super) fn acknowledge(&self) {
        self.registers.write(INTERRUPT_ACKNOWLEDGE, 3u32);
    }

    pub(super) fn select_queue(&self, index: u16) -> u16 {
        self.registers.write(QUEUE_SELECT, u32::from(index));
        self.registers.read::<u32>(QUEUE_SIZE_MAX).min(u32::from(u16::MAX)) as u16
    }

    pub(super) fn start_queue(
        &self,
        index: u16,
        size: u16,
        addresses: [u64; 3],
        vector: Option<&Vector>,
    ) -> Result<Doorbell, String> {
        self.registers.write(QUEUE_SIZE, u32::from(size));
        for (at, address) in [QUEUE_DESCRIPTORS, QUEUE_DRIVER, QUEUE_DEVICE].into_iter().zip(addresses) {
            self.registers.write(at, address as u32);
            self.registers.write(at + 4, (address >> 32) as u32);
        }
        if let Some(vector) = vector {
            vector.route(self.irq)?;
        }
        self.registers.write(QUEUE_READY, 1u32);
        let registers =
            self.registers.part(QUEUE_NOTIFY, 4).ok_or("the doorbell is outside the registers")?;
        Ok(Doorbell { registers, queue: index, wide: true })
    }
}

/// Reads configuration bytes by the width their alignment allows: fields of 2 and 4 bytes must be read whole (VirtIO 1.3,
/// 4.2.2.2), 8-byte fields by halves. What is beyond the window reads as zero.
pub(super) fn read_config(window: &Registers, mut offset: usize, out: &mut [u8]) {
    out.fill(0);
    let mut rest = out;
    while !rest.is_empty() && offset < window.len() {
        let room = rest.len().min(window.len() - offset);
        let width = if offset.is_multiple_of(4) && room >= 4 {
            rest[..4].copy_from_slice(&window.read::<u32>(offset).to_le_bytes());
            4
        } else if offset.is_multiple_of(2) && room >= 2 {
            rest[..2].copy_from_slice(&window.read::<u16>(offset).to_le_bytes());
            2
        } else {
            rest[0] = window.read(offset);
            1
        };
        offset += width;
        rest = &mut rest[width..];
    }
}
