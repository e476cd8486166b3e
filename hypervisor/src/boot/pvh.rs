//! What a PVH kernel is handed: `hvm_start_info`, its module list and memory map
//! (Xen's `arch-x86/hvm/start_info.h`, version 1).

use vm_memory::{Bytes, GuestAddress, GuestMemoryResult};

use super::{BootData, memory_map};
use crate::memory::GuestRam;
use crate::platform::layout;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// Writes the structures at their places in [`layout`].
pub(super) fn write_start_info(ram: &GuestRam, boot: &BootData<'_>) -> GuestMemoryResult<()> {
    let memory = ram.memory();
    let map = memory_map(ram.size());
    let mut table = Vec::with_capacity(map.len() * 24);
    for entry in &map {
        table.extend(entry.start.to_le_bytes());
        table.extend(entry.size.to_le_bytes());
        table.extend((entry.kind as u32).to_le_bytes());
        table.extend(0u32.to_le_bytes());
    }
    memory.write_slice(&table, GuestAddress(layout::PVH_MEMMAP))?;

    let mut modules = 0u32;
    if let Some(initramfs) = &boot.initramfs {
        let module = [initramfs.start, initramfs.end - initramfs.start, 0, 0];
        memory.write_slice(&module.map(u64::to_le_bytes).concat(), GuestAddress(layout::PVH_MODULES))?;
        modules = 1;
    }

    let mut info = Vec::with_capacity(56);
    for word in [MAGIC, VERSION, 0, modules] {
        info.extend(word.to_le_bytes());
    }
    let module_list = if modules == 0 { 0 } else { layout::PVH_MODULES };
    for address in [module_list, layout::CMDLINE, boot.rsdp, layout::PVH_MEMMAP] {
        info.extend(address.to_le_bytes());
    }
    info.extend(u32::try_from(map.len()).unwrap_or(0).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    memory.write_slice(&info, GuestAddress(layout::PVH_START_INFO))
}
