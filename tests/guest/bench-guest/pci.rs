//! PCI functions of bus 0: configuration space, capabilities, BARs, MSI-X.

use crate::memory::Registers;
use crate::{acpi, port};
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use guest::args::PciAccess;

const COMMAND: u16 = 4;
const STATUS: u16 = 6;
const HEADER_TYPE: u16 = 0xe;
const FIRST_BAR: u16 = 0x10;
const FIRST_CAPABILITY: u16 = 0x34;
/// Capability IDs.
pub(crate) const VENDOR_CAPABILITY: u8 = 9;
const MSIX_CAPABILITY: u8 = 0x11;

/// Where there is neither RAM nor anything else on the PC platforms of QEMU: behind the ECAM, before the I/O APIC.
const BARS: core::ops::Range<u64> = 0xc000_0000..0xfe00_0000;
static NEXT_BAR: AtomicU64 = AtomicU64::new(BARS.start);

/// How configuration space is reached.
#[derive(Clone, Copy)]
enum Access {
    Ecam(Registers),
    Ports,
}

/// One function.
#[derive(Clone, Copy)]
pub(crate) struct Function {
    access: Access,
    device: u8,
    function: u8,
    /// Vendor in the low, device in the high half.
    pub(crate) id: u32,
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.device, self.function)
    }
}

/// All functions of bus 0.
pub(crate) fn scan(how: PciAccess, rsdp: u64) -> Result<Vec<Function>, String> {
    let ecam = |address| Registers::map(address, 1 << 20).map(Access::Ecam);
    let access = match how {
        PciAccess::Off => return Ok(Vec::new()),
        PciAccess::Ecam(address) => ecam(address)?,
        PciAccess::Ports => Access::Ports,
        PciAccess::Auto => match acpi::ecam(rsdp) {
            Some(address) => ecam(address)?,
            None => Access::Ports,
        },
    };
    let mut found = Vec::new();
    for device in 0..32 {
        for function in 0..8 {
            let mut this = Function { access, device, function, id: 0 };
            this.id = this.read32(0);
            if this.id & 0xffff != 0xffff {
                found.push(this);
            }
            let multi = function > 0 || (this.id & 0xffff != 0xffff && this.read8(HEADER_TYPE) & 0x80 != 0);
            if !multi {
                break;
            }
        }
    }
    Ok(found)
}

impl Function {
    fn offset(&self, register: u16) -> usize {
        usize::from(self.device) << 15 | usize::from(self.function) << 12 | usize::from(register)
    }

    fn select(&self, register: u16) {
        let address =
            u32::from(self.device) << 11 | u32::from(self.function) << 8 | u32::from(register & 0xfc);
        port::write32(0xcf8, 1 << 31 | address);
    }

    /// Reads 32 bits.
    pub(crate) fn read32(&self, register: u16) -> u32 {
        match self.access {
            Access::Ecam(registers) => registers.read(self.offset(register)),
            Access::Ports => {
                self.select(register);
                port::read32(0xcfc)
            }
        }
    }

    /// Reads 8 bits.
    pub(crate) fn read8(&self, register: u16) -> u8 {
        (self.read32(register & !3) >> (8 * (register & 3))) as u8
    }

    /// Reads 16 bits.
    pub(crate) fn read16(&self, register: u16) -> u16 {
        (self.read32(register & !3) >> (8 * (register & 2))) as u16
    }

    fn write16(&self, register: u16, value: u16) {
        match self.access {
            Access::Ecam(registers) => registers.write(self.offset(register), value),
            Access::Ports => {
                self.select(register);
                port::write16(0xcfc + (register & 2), value);
            }
        }
    }

    fn write32(&self, register: u16, value: u32) {
        match self.access {
            Access::Ecam(registers) => registers.write(self.offset(register), value),
            Access::Ports => {
                self.select(register);
                port::write32(0xcfc, value);
            }
        }
    }

    /// Lets the function decode memory and be a bus master, without legacy interrupts.
    pub(crate) fn enable(&self) {
        self.write16(COMMAND, self.read16(COMMAND) | 0x406);
    }

    /// IDs and places of the capabilities.
    pub(crate) fn capabilities(&self) -> Vec<(u8, u16)> {
        let mut found = Vec::new();
        if self.read16(STATUS) & 0x10 == 0 {
            return found;
        }
        let mut at = u16::from(self.read8(FIRST_CAPABILITY)) & 0xfc;
        // A list that goes in circles ends after as many as fit.
        while at >= 0x40 && found.len() < 48 {
            let word = self.read16(at);
            found.push((word as u8, at));
            at = word >> 8 & 0xfc;
        }
        found
    }

    /// The address in a memory BAR.
    pub(crate) fn bar(&self, number: u8) -> Result<u64, String> {
        if number > 5 {
            return Err(alloc::format!("{self} names BAR {number}"));
        }
        let register = FIRST_BAR + 4 * u16::from(number);
        let low = self.read32(register);
        let wide = low & 6 == 4 && number < 5;
        let mut address = u64::from(low & !0xf);
        if wide {
            address |= u64::from(self.read32(register + 4)) << 32;
        }
        if low & 1 == 0 && address == 0 {
            address = self.assign(register, wide);
        }
        if low & 1 != 0 || address == 0 {
            return Err(alloc::format!("BAR {number} of {self} is no memory or has no address"));
        }
        Ok(address)
    }

    /// Gives a memory BAR an address, where the firmware leaves that to the operating system (PCI 3.0, 6.2.5.1). 0: there is
    /// no such BAR, or no room.
    fn assign(&self, register: u16, wide: bool) -> u64 {
        let command = self.read16(COMMAND);
        self.write16(COMMAND, command & !2);
        self.write32(register, u32::MAX);
        let size = u64::from((!(self.read32(register) & !0xf)).wrapping_add(1));
        let address = NEXT_BAR.load(Relaxed).next_multiple_of(size.max(0x1000));
        let assigned = if size > 0 && address + size <= BARS.end {
            NEXT_BAR.store(address + size, Relaxed);
            address
        } else {
            0
        };
        self.write32(register, assigned as u32);
        if wide {
            self.write32(register + 4, 0);
        }
        self.write16(COMMAND, command);
        assigned
    }

    /// The MSI-X table, if there is one.
    pub(crate) fn msix(&self, capabilities: &[(u8, u16)]) -> Result<Option<Msix>, String> {
        let Some((_, at)) = capabilities.iter().find(|(id, _)| *id == MSIX_CAPABILITY) else {
            return Ok(None);
        };
        let entries = (self.read16(at + 2) & 0x7ff) + 1;
        let place = self.read32(at + 4);
        let address = self.bar(place as u8 & 7)? + u64::from(place & !7);
        let table = Registers::map(address, 16 * usize::from(entries))?;
        Ok(Some(Msix { function: *self, capability: *at, table, entries }))
    }
}

/// The MSI-X table of a function (PCI 3.0, 6.8.2).
#[derive(Clone, Copy)]
pub(crate) struct Msix {
    function: Function,
    capability: u16,
    table: Registers,
    /// Entries of the table.
    pub(crate) entries: u16,
}

impl Msix {
    /// Fills and unmasks an entry.
    pub(crate) fn set(&self, entry: u16, address: u64, data: u32) {
        let at = 16 * usize::from(entry);
        self.table.write(at, address as u32);
        self.table.write(at + 4, (address >> 32) as u32);
        self.table.write(at + 8, data);
        self.table.write(at + 12, 0u32);
    }

    /// Turns MSI-X on or off.
    pub(crate) fn enable(&self, on: bool) {
        let register = self.capability + 2;
        let control = self.function.read16(register) & 0x3fff;
        self.function.write16(register, control | if on { 0x8000 } else { 0 });
    }
}
