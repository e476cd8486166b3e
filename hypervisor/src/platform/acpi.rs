//! ACPI tables (ACPI 6.5): hardware-reduced FADT, MADT, MCFG and a DSDT that describes the PCI root, the serial port, the
//! processors, the power button and the generic event device that tells of it.

use std::ops::RangeInclusive;

use acpi_tables::aml::{
    self, AddressSpaceCacheable, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

use super::{ged, layout, power};
use crate::memory::GuestRam;

const OEM_ID: [u8; 6] = *b"OUTBRD";
const OEM_TABLE_ID: [u8; 8] = *b"OUTBOARD";
const OEM_REVISION: u32 = 1;
const HYPERVISOR_VENDOR: u64 = u64::from_le_bytes(*b"OUTBOARD");

/// IAPC_BOOT_ARCH: VGA not present, PCIe ASPM controls not present, CMOS RTC not present (section 5.2.9.3).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 4 | 1 << 5;

/// Tables are aligned so, in bytes.
const ALIGN: u64 = 16;

/// What the tables describe besides the fixed platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Number of vCPUs; their APIC ids are 0 and up.
    pub vcpus: u8,
    /// Windows of the PCI root bus for memory BARs.
    pub pci_windows: Vec<RangeInclusive<u64>>,
}

/// Writes the tables to [`layout::ACPI_TABLES`] and returns the guest-physical address of the RSDP.
///
/// # Errors
/// If RAM does not reach that far.
pub fn write_tables(ram: &GuestRam, description: &Description) -> vm_memory::GuestMemoryResult<u64> {
    let (tables, rsdp) = build(description);
    ram.memory().write_slice(&tables, GuestAddress(layout::ACPI_TABLES.start))?;
    Ok(rsdp)
}

/// All tables as one piece to be put at [`layout::ACPI_TABLES`], the RSDP first, and the RSDP's address.
fn build(description: &Description) -> (Vec<u8>, u64) {
    let base = layout::ACPI_TABLES.start;
    let mut bytes = vec![0; Rsdp::len().next_multiple_of(ALIGN as usize)];
    let put = |bytes: &mut Vec<u8>, table: &dyn Aml| {
        let address = base + bytes.len() as u64;
        table.to_aml_bytes(bytes);
        bytes.resize(bytes.len().next_multiple_of(ALIGN as usize), 0);
        address
    };
    let dsdt = put(&mut bytes, &Raw(dsdt(description)));
    let fadt = put(&mut bytes, &fadt(dsdt));
    let madt = put(&mut bytes, &madt(description.vcpus));
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(*layout::ECAM.start(), 0, 0, layout::PCI_BUSES - 1);
    let mcfg = put(&mut bytes, &mcfg);
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = put(&mut bytes, &xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    debug_assert!(base + bytes.len() as u64 <= layout::ACPI_TABLES.end);
    (bytes, base)
}

/// A finished table.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn port_register(offset: u64) -> GAS {
    let address = layout::POWER_PORTS.start() + offset;
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer);
    // The button flags mean: there is no fixed-hardware button. Ours is a device of the DSDT.
    for flag in [
        Flags::Wbinvd,
        Flags::ProcC1,
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::ResetRegSup,
        Flags::HwReducedAcpi,
    ] {
        fadt = fadt.flag(flag);
    }
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port_register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port_register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port_register(power::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = HYPERVISOR_VENDOR.into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let lapic = LocalInterruptController::Address(layout::LAPIC as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapic);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // Its id: above those of the local APICs, as it shares their 8-bit space on old hardware.
    madt.add_structure(IoApic::new(vcpus, layout::IOAPIC as u32, 0));
    madt
}

fn dsdt(description: &Description) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut code = Vec::new();
    // Sleep type of S5 (section 7.4.2.6).
    let s5 = aml::Package::new(vec![&power::SLEEP_TYPE_S5]);
    aml::Name::new("_S5_".into(), &s5).to_aml_bytes(&mut code);
    pci_root(description, &mut code);
    motherboard(&mut code);
    serial_port(&mut code);
    processors(description.vcpus, &mut code);
    power_button(&mut code);
    dsdt.append_slice(&code);
    dsdt.as_slice().to_vec()
}

fn pci_root(description: &Description, code: &mut Vec<u8>) {
    let (hid, cid) = (aml::EISAName::new("PNP0A08"), aml::EISAName::new("PNP0A03"));
    let (hid, cid) = (aml::Name::new("_HID".into(), &hid), aml::Name::new("_CID".into(), &cid));
    let bus = aml::Name::new("_BBN".into(), &aml::ZERO);
    let segment = aml::Name::new("_SEG".into(), &aml::ZERO);
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let buses = aml::AddressSpace::new_bus_number(0u16, u16::from(layout::PCI_BUSES) - 1);
    let ports = layout::PCI_CONFIG_PORTS;
    let port = *ports.start() as u16;
    let ports = aml::IO::new(port, port, 1, (ports.end() - ports.start() + 1) as u8);
    let windows: Vec<_> = description
        .pci_windows
        .iter()
        .map(|w| {
            aml::AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                *w.start(),
                *w.end(),
                None,
            )
        })
        .collect();
    let mut resources: Vec<&dyn Aml> = vec![&buses, &ports];
    resources.extend(windows.iter().map(|w| w as &dyn Aml));
    let resources = aml::ResourceTemplate::new(resources);
    let crs = aml::Name::new("_CRS".into(), &resources);
    aml::Device::new("_SB_.PCI0".into(), vec![&hid, &cid, &bus, &segment, &uid, &crs]).to_aml_bytes(code);
}

/// Reserves what no other device claims, ECAM above all: Linux does not use it otherwise.
fn motherboard(code: &mut Vec<u8>) {
    let hid = aml::EISAName::new("PNP0C02");
    let hid = aml::Name::new("_HID".into(), &hid);
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let (start, end) = (*layout::ECAM.start(), *layout::ECAM.end());
    let ecam = aml::Memory32Fixed::new(true, start as u32, (end - start + 1) as u32);
    let (start, end) = (*layout::POWER_PORTS.start(), *layout::POWER_PORTS.end());
    let ports = aml::IO::new(start as u16, start as u16, 1, (end - start + 1) as u8);
    let resources = aml::ResourceTemplate::new(vec![&ecam, &ports]);
    let crs = aml::Name::new("_CRS".into(), &resources);
    aml::Device::new("_SB_.MBRD".into(), vec![&hid, &uid, &crs]).to_aml_bytes(code);
}

fn serial_port(code: &mut Vec<u8>) {
    let hid = aml::EISAName::new("PNP0501");
    let hid = aml::Name::new("_HID".into(), &hid);
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let name = aml::Name::new("_DDN".into(), &"COM1");
    let interrupt = aml::Interrupt::new(true, true, false, false, layout::SERIAL_GSI);
    let (start, end) = (*layout::SERIAL_PORTS.start(), *layout::SERIAL_PORTS.end());
    let ports = aml::IO::new(start as u16, start as u16, 1, (end - start + 1) as u8);
    let resources = aml::ResourceTemplate::new(vec![&interrupt, &ports]);
    let crs = aml::Name::new("_CRS".into(), &resources);
    aml::Device::new("_SB_.COM1".into(), vec![&hid, &uid, &name, &crs]).to_aml_bytes(code);
}

fn processors(vcpus: u8, code: &mut Vec<u8>) {
    for id in 0..vcpus {
        let hid = aml::Name::new("_HID".into(), &"ACPI0007");
        let uid = aml::Name::new("_UID".into(), &id);
        let path = format!("_SB_.C{id:03X}");
        aml::Device::new(path.as_str().into(), vec![&hid, &uid]).to_aml_bytes(code);
    }
}

fn power_button(code: &mut Vec<u8>) {
    let hid = aml::EISAName::new("PNP0C0C");
    let hid = aml::Name::new("_HID".into(), &hid);
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    aml::Device::new("_SB_.PWRB".into(), vec![&hid, &uid]).to_aml_bytes(code);

    // Device (GED) { OperationRegion over the event register; Method (_EVT) takes the events and notifies. }
    let hid = aml::Name::new("_HID".into(), &"ACPI0013");
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let interrupt = aml::Interrupt::new(true, true, false, false, layout::GED_GSI);
    let resources = aml::ResourceTemplate::new(vec![&interrupt]);
    let crs = aml::Name::new("_CRS".into(), &resources);
    let register = *layout::GED.start() as u32;
    let region = aml::OpRegion::new("EVTR".into(), aml::OpRegionSpace::SystemMemory, &register, &4u8);
    let field = aml::Field::new(
        "EVTR".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVTS", 32)],
    );
    let (events, pending) = (aml::Path::new("EVTS"), aml::Local(0));
    let take = aml::Store::new(&pending, &events);
    let pressed = aml::And::new(&aml::ZERO, &pending, &ged::POWER_BUTTON);
    let button = aml::Path::new("\\_SB_.PWRB");
    let notify = aml::Notify::new(&button, &0x80u8);
    let if_pressed = aml::If::new(&pressed, vec![&notify]);
    let method = aml::Method::new("_EVT".into(), 1, true, vec![&take, &if_pressed]);
    aml::Device::new("_SB_.GED_".into(), vec![&hid, &uid, &crs, &region, &field, &method]).to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(vcpus: u8) -> Description {
        Description { vcpus, pci_windows: vec![layout::PCI_WINDOW_32, 64 << 30..=(128 << 30) - 1] }
    }

    /// The tables of a built set by signature, checked for length and checksum.
    fn tables(description: &Description) -> Vec<([u8; 4], Vec<u8>)> {
        let (bytes, rsdp) = build(description);
        assert_eq!(rsdp, layout::ACPI_TABLES.start);
        assert_eq!(&bytes[..8], b"RSD PTR ");
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |a, b| a.wrapping_add(*b));
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let table = |address: u64| {
            let at = (address - layout::ACPI_TABLES.start) as usize;
            let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
            let table = bytes[at..at + length].to_vec();
            assert_eq!(sum(&table), 0, "{:?}", &table[..4]);
            table
        };
        let u64_at = |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap());
        let xsdt = table(u64_at(&bytes, 24));
        let mut all: Vec<_> = xsdt[36..].chunks(8).map(|c| table(u64_at(c, 0))).collect();
        let fadt = all.iter().find(|t| &t[..4] == b"FACP").unwrap().clone();
        all.push(table(u64_at(&fadt, 140)));
        all.into_iter().map(|t| (t[..4].try_into().unwrap(), t)).collect()
    }

    #[test]
    fn all_tables_are_there_with_right_checksums() {
        let names: Vec<_> = tables(&description(2)).iter().map(|(n, _)| *n).collect();
        assert_eq!(names, [*b"FACP", *b"APIC", *b"MCFG", *b"DSDT"]);
    }

    #[test]
    fn the_fadt_is_hardware_reduced_with_reset_and_sleep_registers() {
        let fadt = tables(&description(1)).swap_remove(0).1;
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_ne!(flags & (1 << 20), 0);
        assert_ne!(flags & (1 << 10), 0);
        // Generic address structures: space 1 (I/O), 8 bits, byte access, address.
        assert_eq!(fadt[116..128], [1, 8, 0, 1, 2, 6, 0, 0, 0, 0, 0, 0]);
        assert_eq!(fadt[128], power::RESET_VALUE);
        assert_eq!(fadt[244..256], [1, 8, 0, 1, 0, 6, 0, 0, 0, 0, 0, 0]);
        assert_eq!(fadt[256..268], [1, 8, 0, 1, 1, 6, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn the_madt_has_every_vcpu_and_the_io_apic() {
        let madt = tables(&description(3)).swap_remove(1).1;
        let structures = &madt[44..];
        assert_eq!(structures.len(), 3 * 8 + 12);
        for id in 0..3u8 {
            assert_eq!(structures[usize::from(id) * 8..][..8], [0, 8, id, id, 1, 0, 0, 0]);
        }
        assert_eq!(structures[24..], [1, 12, 3, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    }

    #[test]
    fn the_dsdt_names_every_device() {
        let dsdt = tables(&description(2)).swap_remove(3).1;
        for name in [&b"PCI0"[..], b"MBRD", b"COM1", b"C000", b"C001", b"PWRB", b"GED_", b"_EVT", b"_S5_"] {
            assert!(dsdt.windows(name.len()).any(|w| w == name), "{}", String::from_utf8_lossy(name));
        }
        assert!(!dsdt.windows(4).any(|w| w == b"C002"));
    }

    #[test]
    fn the_largest_machine_fits() {
        let (bytes, _) = build(&description(254));
        assert!(bytes.len() as u64 <= layout::ACPI_TABLES.end - layout::ACPI_TABLES.start);
    }
}
