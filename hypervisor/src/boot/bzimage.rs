//! Linux bzImages, entered by the 64-bit boot protocol (Linux's Documentation/arch/x86/boot.rst).

use vm_memory::{Bytes, GuestAddress, GuestMemoryResult};

use super::{BootData, Image, Invalid, memory_map};
use crate::memory::GuestRam;
use crate::platform::layout;

/// Where the protected-mode part is loaded.
pub(super) const LOAD_ADDRESS: u64 = layout::HIGH_MEMORY_START;

/// The 64-bit entry is so many bytes into the protected-mode part.
const ENTRY_64_OFFSET: u64 = 0x200;

/// Guest-physical address of the first instruction.
pub(super) const ENTRY: u64 = LOAD_ADDRESS + ENTRY_64_OFFSET;

const SECTOR: u64 = 512;
/// Protocol 2.12 has `xloadflags`: Linux 3.8.
const MIN_VERSION: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1 << 0;
const LOADED_HIGH: u8 = 1 << 0;
/// "A boot loader without an assigned id".
const LOADER_UNDEFINED: u8 = 0xff;

/// Where the setup header starts, in the file and in the zero page.
const HEADER_START: usize = 0x1f1;
/// The setup header ends at most here; the zero page goes on with other things.
const HEADER_MAX_END: usize = 0x290;

/// Fields, as offsets in file and zero page.
mod field {
    pub(super) const SETUP_SECTS: usize = 0x1f1;
    pub(super) const JUMP_OFFSET: usize = 0x201;
    pub(super) const MAGIC: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22c;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    /// Only in the zero page.
    pub(super) const ACPI_RSDP_ADDR: usize = 0x70;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const E820_TABLE: usize = 0x2d0;
}

/// A checked kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    /// The file's first sectors, up to the end of the setup header.
    header: Box<[u8; HEADER_MAX_END]>,
    header_end: usize,
    payload_offset: u64,
    payload_size: u64,
    end: u64,
}

pub(super) fn is_bzimage(image: &impl Image) -> bool {
    image.array::<4>(field::MAGIC as u64).is_ok_and(|magic| magic == *b"HdrS")
}

impl Kernel {
    pub(super) fn parse(image: &impl Image) -> Result<Self, Invalid> {
        let header = Box::new(image.array::<HEADER_MAX_END>(0)?);
        let version = u16::from_le_bytes(field(&header, field::VERSION));
        if version < MIN_VERSION {
            return Err(Invalid(format!(
                "is a bzImage of boot protocol {}.{:02}, older than 2.12 (Linux 3.8)",
                version >> 8,
                version & 0xff
            )));
        }
        if header[field::LOADFLAGS] & LOADED_HIGH == 0 {
            return Err(Invalid::new("is a zImage, which is loaded below 1 MiB"));
        }
        if u16::from_le_bytes(field(&header, field::XLOADFLAGS)) & XLF_KERNEL_64 == 0 {
            return Err(Invalid::new("is a bzImage of a 32-bit kernel"));
        }
        let sectors = match header[field::SETUP_SECTS] {
            0 => 4,
            n => u64::from(n),
        };
        let payload_offset = (sectors + 1) * SECTOR;
        let payload_size = image.size()?.checked_sub(payload_offset).filter(|&size| size > ENTRY_64_OFFSET);
        let payload_size =
            payload_size.ok_or_else(|| Invalid::new("ends before the kernel in it does: it is cut off"))?;
        // The kernel moves itself to its preferred address (or to its alignment above where it is) and unpacks there.
        let alignment = u64::from(u32::from_le_bytes(field(&header, field::KERNEL_ALIGNMENT)));
        let preferred = u64::from_le_bytes(field(&header, field::PREF_ADDRESS));
        let init_size = u64::from(u32::from_le_bytes(field(&header, field::INIT_SIZE)));
        let runs_at =
            LOAD_ADDRESS.next_multiple_of(alignment.max(1)).max(preferred.min(layout::PCI_HOLE.start));
        let end = (runs_at + init_size).max(LOAD_ADDRESS + payload_size);
        if end > layout::PCI_HOLE.start {
            return Err(Invalid::new("is a bzImage that needs more than 3 GiB of RAM to start"));
        }
        let header_end = (field::MAGIC + usize::from(header[field::JUMP_OFFSET])).min(HEADER_MAX_END);
        Ok(Self { header, header_end, payload_offset, payload_size, end })
    }

    /// Offset and size of the protected-mode part in the file.
    pub(super) fn payload(&self) -> (u64, u64) {
        (self.payload_offset, self.payload_size)
    }

    /// First address above what the kernel needs to unpack itself.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Last address that the initial RAM disk may use.
    pub(super) fn initramfs_max(&self) -> u64 {
        u64::from(u32::from_le_bytes(field(&self.header, field::INITRD_ADDR_MAX)))
    }

    /// Writes the zero page.
    pub(super) fn write_boot_params(&self, ram: &GuestRam, boot: &BootData<'_>) -> GuestMemoryResult<()> {
        let mut page = [0u8; 0x1000];
        page[HEADER_START..self.header_end].copy_from_slice(&self.header[HEADER_START..self.header_end]);
        page[field::TYPE_OF_LOADER] = LOADER_UNDEFINED;
        put(&mut page, field::CMD_LINE_PTR, &low32(layout::CMDLINE));
        if let Some(initramfs) = &boot.initramfs {
            put(&mut page, field::RAMDISK_IMAGE, &low32(initramfs.start));
            put(&mut page, field::RAMDISK_SIZE, &low32(initramfs.end - initramfs.start));
        }
        put(&mut page, field::ACPI_RSDP_ADDR, &boot.rsdp.to_le_bytes());
        let map = memory_map(ram.size());
        page[field::E820_ENTRIES] = map.len() as u8;
        for (i, entry) in map.iter().enumerate() {
            let at = field::E820_TABLE + i * 20;
            put(&mut page, at, &entry.start.to_le_bytes());
            put(&mut page, at + 8, &entry.size.to_le_bytes());
            put(&mut page, at + 16, &(entry.kind as u32).to_le_bytes());
        }
        ram.memory().write_slice(&page, GuestAddress(layout::ZERO_PAGE))
    }
}

/// `N` bytes of the header; every field is within it.
fn field<const N: usize>(header: &[u8; HEADER_MAX_END], at: usize) -> [u8; N] {
    std::array::from_fn(|i| header[at + i])
}

fn put(page: &mut [u8; 0x1000], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Everything the zero page points to is below 4 GiB.
fn low32(address: u64) -> [u8; 4] {
    (address as u32).to_le_bytes()
}
