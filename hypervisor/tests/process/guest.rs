//! Guests of a few instructions: 32-bit code that a PVH entry starts at, assembled by hand.

use std::io::Write;

use tempfile::NamedTempFile;

/// Where the code is loaded.
const ADDRESS: u32 = 0x20_0000;

/// ACPI sleep control, with S5, as the hypervisor's FADT and DSDT have it.
const SLEEP_CONTROL: u16 = 0x600;
const S5: u8 = 5 << 2 | 1 << 5;
const RESET: u16 = 0x602;

/// Code under construction.
#[derive(Default)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub(crate) fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// Writes to the serial port.
    pub(crate) fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(0x3f8, byte))
    }

    /// `cli; hlt; jmp` to the `hlt`.
    pub(crate) fn halt(self) -> Self {
        self.bytes(&[0xfa, 0xf4, 0xeb, 0xfd])
    }

    pub(crate) fn power_off(self) -> Self {
        self.out(SLEEP_CONTROL, S5).halt()
    }

    pub(crate) fn acpi_reset(self) -> Self {
        self.out(RESET, 1).halt()
    }

    /// `ud2`, without an interrupt table.
    pub(crate) fn triple_fault(self) -> Self {
        self.bytes(&[0x0f, 0x0b])
    }

    /// Goes to real mode and jumps to the BIOS's reset vector, as Linux restarts a machine with hardware-reduced ACPI and
    /// without EFI: `lgdt [gdtr]; ljmp 8:real; real: mov eax, cr0; and al, 0xfe; mov cr0, eax; ljmp 0xf000:0xfff0`
    pub(crate) fn restart_by_bios(self) -> Self {
        let real = u32::try_from(self.0.len()).unwrap() + 14;
        let gdt = ADDRESS + real + 13;
        self.bytes(&[0x0f, 0x01, 0x15])
            .bytes(&(gdt + 16).to_le_bytes())
            .bytes(&[0xea])
            .bytes(&real.to_le_bytes())
            .bytes(&[8, 0])
            .bytes(&[0x0f, 0x20, 0xc0, 0x24, 0xfe, 0x0f, 0x22, 0xc0, 0xea, 0xf0, 0xff, 0x00, 0xf0])
            // The GDT: nothing, and a 16-bit code segment that starts at ADDRESS. Then what lgdt loads.
            .bytes(&[0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0x00, 0x00, 0x20, 0x9a, 0x00, 0x00])
            .bytes(&[15, 0])
            .bytes(&gdt.to_le_bytes())
    }

    /// `mov eax, 0xd0000000; jmp eax`: into a hole, where no instruction can be fetched.
    pub(crate) fn jump_into_nothing(self) -> Self {
        self.bytes(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0])
    }

    /// `cmp dword [0x300000], 0; jne dirty; print; mov dword [0x300000], 1; jmp on; dirty: print; on:`
    pub(crate) fn print_whether_memory_is_clean(self) -> Self {
        let clean = Code::default().print("clean\n").bytes(&[0xc7, 0x05, 0, 0, 0x30, 0, 1, 0, 0, 0]).0;
        let dirty = Code::default().print("dirty\n").0;
        let jump = |over: usize| u8::try_from(over).unwrap();
        self.bytes(&[0x83, 0x3d, 0, 0, 0x30, 0, 0, 0x75, jump(clean.len() + 2)])
            .bytes(&clean)
            .bytes(&[0xeb, jump(dirty.len())])
            .bytes(&dirty)
    }

    /// Prints dots for ever, with a pause: `again: out; mov ecx, 5000; loop; jmp again`
    pub(crate) fn print_dots(self) -> Self {
        let dot = Code::default().out(0x3f8, b'.').bytes(&[0xb9, 0x88, 0x13, 0, 0, 0xe2, 0xfe]).0;
        let back = u8::try_from(256 - dot.len() - 2).unwrap();
        self.bytes(&dot).bytes(&[0xeb, back])
    }

    /// Returns what it receives: `again: mov dx, 0x3fd; in al, dx; test al, 1; jz again; mov dx, 0x3f8; in al, dx; out dx, al;
    /// jmp again`
    pub(crate) fn echo(self) -> Self {
        self.bytes(&[
            0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb,
            0xef,
        ])
    }

    /// An ELF file with this code and a PVH note.
    pub(crate) fn kernel(&self) -> NamedTempFile {
        let mut note = Vec::new();
        for word in [4, 4, 18u32] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(ADDRESS.to_le_bytes());

        let headers = 64 + 2 * 56;
        let mut elf = vec![0; 64];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16..20].copy_from_slice(&[2, 0, 62, 0]);
        elf[32..40].copy_from_slice(&64u64.to_le_bytes());
        elf[54..58].copy_from_slice(&[56, 0, 2, 0]);
        let parts = [(4u32, 0, &note), (1, u64::from(ADDRESS), &self.0)];
        let mut offset = headers as u64;
        for (kind, address, part) in parts {
            elf.extend(kind.to_le_bytes());
            elf.extend(7u32.to_le_bytes());
            let size = part.len() as u64;
            for value in [offset, address, address, size, size, 4] {
                elf.extend(value.to_le_bytes());
            }
            offset += size;
        }
        for (_, _, part) in parts {
            elf.extend(part);
        }
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&elf).unwrap();
        file
    }
}
