//! The few things this guest reads from ACPI tables (ACPI 6.5, 5.2): where PCI's configuration space is, and how to power off.

use crate::memory;
use guest::args::{End, Width};

const FADT_DSDT: u64 = 40;
const FADT_PM1A_CONTROL: u64 = 64;
const FADT_FLAGS: u64 = 112;
const FADT_X_DSDT: u64 = 140;
const FADT_SLEEP_CONTROL: u64 = 244;
const HW_REDUCED: u32 = 1 << 20;

/// Address of the first table with this signature.
fn table(rsdp: u64, signature: [u8; 4]) -> Option<u64> {
    let rsdp = if rsdp == 0 { search()? } else { rsdp };
    let revision: u8 = memory::read(rsdp + 15)?;
    let xsdt: u64 = if revision >= 2 { memory::read(rsdp + 24)? } else { 0 };
    let (root, width) = if xsdt != 0 { (xsdt, 8) } else { (u64::from(memory::read::<u32>(rsdp + 16)?), 4) };
    let length = u64::from(memory::read::<u32>(root + 4)?).min(4096);
    for entry in (36..length).step_by(width) {
        let table = if width == 8 {
            memory::read::<u64>(root + entry)?
        } else {
            u64::from(memory::read::<u32>(root + entry)?)
        };
        if memory::read::<[u8; 4]>(table)? == signature {
            return Some(table);
        }
    }
    None
}

/// The root pointer in the BIOS area, where firmware puts it when the start info does not say.
fn search() -> Option<u64> {
    (0xe_0000..0x10_0000).step_by(16).find(|at| memory::read::<[u8; 8]>(*at) == Some(*b"RSD PTR "))
}

/// Address of bus 0 of segment 0 in the ECAM area (table MCFG: PCI Firmware 3.3, 4.1.2).
pub(crate) fn ecam(rsdp: u64) -> Option<u64> {
    let mcfg = table(rsdp, *b"MCFG")?;
    // The first allocation: base, segment, first bus.
    let base: u64 = memory::read(mcfg + 44)?;
    let (segment, bus): (u16, u8) = (memory::read(mcfg + 52)?, memory::read(mcfg + 54)?);
    (segment == 0 && bus == 0).then_some(base)
}

/// The register write that enters S5 (4.8.3.2.1; hardware-reduced: 4.8.3.7).
pub(crate) fn power_off(rsdp: u64) -> Option<End> {
    let fadt = table(rsdp, *b"FACP")?;
    let length: u32 = memory::read(fadt + 4)?;
    let wide: u64 = if length >= 148 { memory::read(fadt + FADT_X_DSDT)? } else { 0 };
    let dsdt = if wide != 0 { wide } else { u64::from(memory::read::<u32>(fadt + FADT_DSDT)?) };
    let dsdt_length: u32 = memory::read(dsdt + 4)?;
    let sleep_type = u32::from(guest::s5::sleep_type(memory::bytes(dsdt, u64::from(dsdt_length))?)?);

    let flags: u32 = memory::read(fadt + FADT_FLAGS)?;
    if flags & HW_REDUCED == 0 {
        let port: u32 = memory::read(fadt + FADT_PM1A_CONTROL)?;
        return Some(End::Port(port as u16, Width::Word, sleep_type << 10 | 1 << 13));
    }
    // Generic address: space (0 memory, 1 I/O), width, offset, access size, address.
    let space: u8 = memory::read(fadt + FADT_SLEEP_CONTROL)?;
    let address: u64 = memory::read(fadt + FADT_SLEEP_CONTROL + 4)?;
    let value = sleep_type << 2 | 1 << 5;
    match space {
        0 => Some(End::Memory(address, Width::Byte, value)),
        1 => Some(End::Port(address as u16, Width::Byte, value)),
        _ => None,
    }
}
