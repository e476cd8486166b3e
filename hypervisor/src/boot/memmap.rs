//! The memory map both boot protocols hand over (PVH `hvm_memmap_table_entry`, Linux e820): same kinds, same numbers.

use crate::platform::layout;

/// What a range of the map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// Usable RAM.
    Ram = 1,
    /// Not for the guest to use as RAM.
    Reserved = 2,
}

/// One range of guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// What it is.
    pub kind: MapKind,
}

/// The map of a guest with `ram_size` bytes of RAM, ascending.
pub fn memory_map(ram_size: u64) -> Vec<MapEntry> {
    let entry = |start: u64, end: u64, kind| MapEntry { start, size: end - start, kind };
    let mut map = vec![
        entry(0, layout::LOW_MEMORY_END, MapKind::Ram),
        entry(layout::ACPI_TABLES.start, layout::ACPI_TABLES.end, MapKind::Reserved),
    ];
    for (i, range) in layout::ram_ranges(ram_size).enumerate() {
        if i == 1 {
            map.push(ecam());
        }
        let start = range.start.max(if i == 0 { layout::HIGH_MEMORY_START } else { 0 });
        map.push(entry(start, range.end, MapKind::Ram));
    }
    if map.len() == 3 {
        map.push(ecam());
    }
    map
}

/// Linux uses ECAM only where the map (or a motherboard device) reserves it.
fn ecam() -> MapEntry {
    let (start, end) = (*layout::ECAM.start(), *layout::ECAM.end());
    MapEntry { start, size: end - start + 1, kind: MapKind::Reserved }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(ram_size: u64) {
        let map = memory_map(ram_size);
        assert!(map.windows(2).all(|w| w[0].start + w[0].size <= w[1].start), "{map:#x?}");
        let ram: u64 = map.iter().filter(|e| e.kind == MapKind::Ram).map(|e| e.size).sum();
        // All RAM but the legacy hole, where the tables are.
        assert_eq!(ram, ram_size - (layout::HIGH_MEMORY_START - layout::LOW_MEMORY_END));
        assert_eq!(map.iter().filter(|e| e.start == *layout::ECAM.start()).count(), 1);
    }

    #[test]
    fn the_map_is_ascending_and_has_all_ram() {
        for mib in [16, 128, 3072, 3074, 8192] {
            check(mib << 20);
        }
    }
}
