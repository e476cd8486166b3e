//! Where everything is in the guest's physical address space and port space.
//!
//! ```text
//!  0           640K  896K   1M                    3G          3.5G  +1M      3.98G                4G
//!  +------------+-----+------+---------------------+------------+-----+--------+-----+--------------+---------
//!  | RAM        | hole| ACPI | RAM                 | PCI window | ECAM|        | GED | IOAPIC LAPIC | RAM, then
//!  | boot data  |     |tables| kernel ...          | 32-bit     |     |        |     | TSS          | PCI 64-bit
//!  +------------+-----+------+---------------------+------------+-----+--------+-----+--------------+---------
//! ```

use std::ops::{Range, RangeInclusive};

/// What is not RAM below 4 GiB: PCI windows and the platform's registers.
pub const PCI_HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;

/// RAM that does not fit below the hole goes on here.
pub const HIGH_RAM_START: u64 = PCI_HOLE.end;

/// Window for PCI BARs below 4 GiB.
pub const PCI_WINDOW_32: RangeInclusive<u64> = 0xc000_0000..=0xdfff_ffff;

/// PCI Express enhanced configuration access: 1 MiB for each of [`PCI_BUSES`] buses.
pub const ECAM: RangeInclusive<u64> = 0xe000_0000..=0xe00f_ffff;

/// Number of PCI buses.
pub const PCI_BUSES: u8 = 1;

/// Registers of the ACPI generic event device.
pub const GED: RangeInclusive<u64> = 0xfe00_0000..=0xfe00_0fff;

/// I/O APIC (in KVM).
pub const IOAPIC: u64 = 0xfec0_0000;

/// Local APICs (in KVM).
pub const LAPIC: u64 = 0xfee0_0000;

/// One page for KVM's identity map, for hosts without unrestricted guest mode.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;

/// Three pages for KVM's task state segment, for the same hosts.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// End of conventional memory. Bytes from 0.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;

/// Where the ACPI tables are; the RSDP is at its start, where a guest without boot protocol scans for it.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0x10_0000;

/// Where a guest that restarts through the BIOS jumps to in real mode (F000:FFF0); within the range that the memory map
/// reserves for the ACPI tables, which do not come near it.
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// First address above the legacy hole; kernels are loaded from here.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// Global descriptor table for the 64-bit entry.
pub const BOOT_GDT: u64 = 0x500;

/// PVH `hvm_start_info`.
pub const PVH_START_INFO: u64 = 0x6000;

/// PVH module list.
pub const PVH_MODULES: u64 = 0x6100;

/// PVH memory map; room for 64 entries.
pub const PVH_MEMMAP: u64 = 0x6200;

/// Linux zero page (`boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;

/// Top of the stack a kernel is entered with.
pub const BOOT_STACK: u64 = 0x8ff0;

/// Page tables of the 64-bit entry: one PML4, one PDPT, four page directories (identity map of 4 GiB).
pub const BOOT_PAGE_TABLES: u64 = 0x9000;

/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;

/// Longest command line, without its terminating zero. Bytes.
pub const CMDLINE_MAX: usize = 2047;

/// 16550 registers.
pub const SERIAL_PORTS: RangeInclusive<u64> = 0x3f8..=0x3ff;

/// Keyboard controller command and status port, kept for its reset command.
pub const I8042_PORT: RangeInclusive<u64> = 0x64..=0x64;

/// ACPI sleep control, sleep status and reset registers, a byte each.
pub const POWER_PORTS: RangeInclusive<u64> = 0x600..=0x602;

/// PCI configuration address, data, and the reset control register 0xcf9 among them.
pub const PCI_CONFIG_PORTS: RangeInclusive<u64> = 0xcf8..=0xcff;

/// Global system interrupt of the 16550 (ISA IRQ 4).
pub const SERIAL_GSI: u32 = 4;

/// Global system interrupt of the ACPI generic event device.
pub const GED_GSI: u32 = 5;

/// First global system interrupt that is not an I/O APIC pin: MSI routes start here.
pub const FIRST_MSI_GSI: u32 = 24;

/// Guest-physical ranges of `size` bytes of RAM, ascending: up to the hole, and the rest from 4 GiB.
pub fn ram_ranges(size: u64) -> impl Iterator<Item = Range<u64>> {
    let low = 0..size.min(PCI_HOLE.start);
    let high = HIGH_RAM_START..HIGH_RAM_START.saturating_add(size - low.end);
    [low, high].into_iter().filter(|r| !r.is_empty())
}

/// First address above both RAM and the hole for `size` bytes of RAM.
pub fn ram_end(size: u64) -> u64 {
    ram_ranges(size).last().map_or(HIGH_RAM_START, |r| r.end.max(HIGH_RAM_START))
}

/// Window for PCI BARs above RAM: 64 GiB on a 64 GiB boundary where the guest's physical addresses of `address_bits` bits
/// reach that far, what is left above RAM on a 1 GiB boundary where they do not, `None` where nothing is left.
pub fn pci_window_64(ram_size: u64, address_bits: u8) -> Option<RangeInclusive<u64>> {
    const GIB: u64 = 1 << 30;
    let limit = 1u64.checked_shl(u32::from(address_bits)).unwrap_or(u64::MAX);
    let ram_end = ram_end(ram_size);
    let start = ram_end.next_multiple_of(64 * GIB);
    if start.checked_add(64 * GIB).is_some_and(|end| end <= limit) {
        return Some(start..=start + 64 * GIB - 1);
    }
    let start = ram_end.next_multiple_of(GIB);
    (start < limit).then(|| start..=limit - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        let ranges = |size| ram_ranges(size).map(|r| (r.start, r.end)).collect::<Vec<_>>();
        assert_eq!(ranges(16 << 20), [(0, 16 << 20)]);
        assert_eq!(ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ranges((3 << 30) + 1), [(0, 3 << 30), (4 << 30, (4 << 30) + 1)]);
    }

    #[test]
    fn what_is_in_the_hole_does_not_overlap() {
        let page = |start: u64, pages: u64| start..=start + pages * 0x1000 - 1;
        let mut all = [
            PCI_WINDOW_32,
            ECAM,
            GED,
            page(IOAPIC, 1),
            page(LAPIC, 1),
            page(IDENTITY_MAP, 1),
            page(KVM_TSS, 3),
        ];
        all.sort_by_key(|r| *r.start());
        assert!(*all[0].start() >= PCI_HOLE.start && *all[6].end() < PCI_HOLE.end);
        assert!(all.windows(2).all(|w| w[0].end() < w[1].start()));
        assert_eq!(ECAM.end() - ECAM.start() + 1, u64::from(PCI_BUSES) << 20);
    }

    #[test]
    fn boot_data_does_not_overlap() {
        let pieces = [
            BOOT_GDT..BOOT_GDT + 4 * 8,
            PVH_START_INFO..PVH_START_INFO + 56,
            PVH_MODULES..PVH_MODULES + 32,
            PVH_MEMMAP..PVH_MEMMAP + 64 * 24,
            ZERO_PAGE..ZERO_PAGE + 0x1000,
            ZERO_PAGE + 0x1000..BOOT_STACK,
            BOOT_PAGE_TABLES..BOOT_PAGE_TABLES + 6 * 0x1000,
            CMDLINE..CMDLINE + CMDLINE_MAX as u64 + 1,
        ];
        assert!(pieces.windows(2).all(|w| w[0].end <= w[1].start));
        assert!(pieces[pieces.len() - 1].end <= LOW_MEMORY_END);
    }

    #[test]
    fn the_64_bit_window_is_above_ram_and_within_the_address_width() {
        assert_eq!(pci_window_64(128 << 20, 46), Some(64 << 30..=(128 << 30) - 1));
        assert_eq!(pci_window_64(62 << 30, 46), Some(64 << 30..=(128 << 30) - 1));
        assert_eq!(pci_window_64(64 << 30, 46), Some(128 << 30..=(192 << 30) - 1));
        assert_eq!(pci_window_64(128 << 20, 36), Some(4 << 30..=(64 << 30) - 1));
        assert_eq!(pci_window_64(128 << 20, 32), None);
        assert_eq!(pci_window_64(128 << 20, 64), Some(64 << 30..=(128 << 30) - 1));
    }
}
