//! ELF kernels with a PVH entry point: 64-bit little-endian x86-64, loaded by physical address, entered at the address in
//! the note `XEN_ELFNOTE_PHYS32_ENTRY`.

use super::{Image, Invalid};
use crate::platform::layout;

const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: u16 = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// More program headers than any kernel has.
const MAX_PROGRAM_HEADERS: u16 = 256;
/// Longer notes than any kernel has, in bytes.
const MAX_NOTES: u64 = 64 << 10;

/// Note type of the PVH entry point, of owner "Xen".
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// A loadable piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// Guest-physical address.
    pub(super) gpa: u64,
    /// Where it is in the file.
    pub(super) file_offset: u64,
    /// Bytes in the file.
    pub(super) file_size: u64,
    /// Bytes in memory; what the file does not have is zero.
    pub(super) memory_size: u64,
}

/// A checked kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    segments: Vec<Segment>,
    entry: u32,
}

pub(super) fn is_elf(image: &impl Image) -> bool {
    image.array::<4>(0).is_ok_and(|magic| magic == MAGIC)
}

impl Kernel {
    pub(super) fn parse(image: &impl Image) -> Result<Self, Invalid> {
        let header = image.array::<HEADER_SIZE>(0)?;
        if (header[4], header[5], u16_at(&header, 18)) != (CLASS_64, LITTLE_ENDIAN, MACHINE_X86_64) {
            return Err(Invalid::new("is an ELF of another architecture than x86-64"));
        }
        let (offset, size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
        if size != PROGRAM_HEADER_SIZE || count == 0 || count > MAX_PROGRAM_HEADERS {
            return Err(Invalid::new(
                "is an ELF without usable program headers (an object file or a module?)",
            ));
        }
        let file_size = image.size()?;
        let mut segments = Vec::new();
        let mut entry = None;
        for index in 0..u64::from(count) {
            let at = offset
                .checked_add(index * u64::from(PROGRAM_HEADER_SIZE))
                .ok_or_else(|| Invalid::new("is a damaged ELF: its program headers are out of range"))?;
            let program = image.array::<{ PROGRAM_HEADER_SIZE as usize }>(at)?;
            let segment = Segment {
                gpa: u64_at(&program, 24),
                file_offset: u64_at(&program, 8),
                file_size: u64_at(&program, 32),
                memory_size: u64_at(&program, 40),
            };
            if segment.file_offset.checked_add(segment.file_size).is_none_or(|end| end > file_size) {
                return Err(Invalid::new("ends before the kernel in it does: it is cut off"));
            }
            match u32_at(&program, 0) {
                PT_LOAD if segment.memory_size > 0 => segments.push(checked(segment)?),
                // There may be several; the one with the entry counts.
                PT_NOTE if entry.is_none() => {
                    entry = pvh_entry(image, segment, u64_at(&program, 48))?;
                }
                _ => {}
            }
        }
        let entry = entry.ok_or_else(|| {
            Invalid::new(
                "is an ELF without a PVH entry point (a program, or a kernel built without CONFIG_PVH)",
            )
        })?;
        if !segments.iter().any(|s| (s.gpa..s.gpa + s.memory_size).contains(&u64::from(entry))) {
            return Err(Invalid(format!(
                "is a damaged ELF: its entry point {entry:#x} is outside of what it loads"
            )));
        }
        Ok(Self { segments, entry })
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Guest-physical address of the first instruction.
    pub(super) fn entry(&self) -> u32 {
        self.entry
    }

    /// First address above all segments.
    pub(super) fn end(&self) -> u64 {
        self.segments.iter().map(|s| s.gpa + s.memory_size).max().unwrap_or(layout::HIGH_MEMORY_START)
    }
}

/// A segment must be within the addresses where RAM below the hole can be, above our boot data, and not larger in the file.
fn checked(segment: Segment) -> Result<Segment, Invalid> {
    let Segment { gpa, file_size, memory_size, .. } = segment;
    let end = gpa.checked_add(memory_size);
    if gpa < layout::HIGH_MEMORY_START || end.is_none_or(|end| end > layout::PCI_HOLE.start) {
        return Err(Invalid(format!(
            "is an ELF that wants to be loaded at {gpa:#x}, outside of 1 MiB to 3 GiB (a user program?)"
        )));
    }
    if file_size > memory_size {
        return Err(Invalid::new("is a damaged ELF: a segment is larger in the file than in memory"));
    }
    Ok(segment)
}

/// The entry point if the note segment has it.
fn pvh_entry(image: &impl Image, notes: Segment, align: u64) -> Result<Option<u32>, Invalid> {
    if notes.file_size > MAX_NOTES {
        return Err(Invalid::new("is a damaged ELF: its notes are too long"));
    }
    let mut bytes = vec![0; notes.file_size as usize];
    image.read_at(&mut bytes, notes.file_offset)?;
    let align = if align == 8 { 8 } else { 4 };
    let mut rest = bytes.as_slice();
    while rest.len() >= 12 {
        let (name_size, desc_size, kind) = (u32_at(rest, 0), u32_at(rest, 4), u32_at(rest, 8));
        // 32-bit sizes cannot overflow a 64-bit sum.
        let desc_at = (12 + name_size as usize).next_multiple_of(align);
        let desc_end = desc_at + desc_size as usize;
        let (Some(name), Some(desc)) = (rest.get(12..12 + name_size as usize), rest.get(desc_at..desc_end))
        else {
            break;
        };
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            // The descriptor is as wide as the kernel's pointers, the address 32-bit.
            return match desc.first_chunk() {
                Some(address) => Ok(Some(u32::from_le_bytes(*address))),
                None => Err(Invalid::new("is a damaged ELF: its PVH note has no address")),
            };
        }
        rest = rest.get(desc_end.next_multiple_of(align)..).unwrap_or_default();
    }
    Ok(None)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
