//! The state a vCPU starts with.

use std::fmt::Write;
use std::io;

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryResult};

use crate::boot::Entry;
use crate::memory::GuestRam;
use crate::platform::layout;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1 << 0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Page table entry bits: present, writable; and in a directory: a 2 MiB page.
const PTE_PRESENT_WRITABLE: u64 = 3;
const PDE_LARGE: u64 = 1 << 7;

/// Selectors Linux's 64-bit boot protocol wants: `__BOOT_CS` and `__BOOT_DS`.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Puts what the 64-bit entry needs into RAM: a GDT and an identity map of the first 4 GiB.
///
/// # Errors
/// If RAM does not reach that far.
pub fn write_boot_tables(ram: &GuestRam, entry: Entry) -> GuestMemoryResult<()> {
    let Entry::Linux64 { .. } = entry else { return Ok(()) };
    let memory = ram.memory();
    memory.write_slice(&GDT.map(u64::to_le_bytes).concat(), GuestAddress(layout::BOOT_GDT))?;
    let (pml4, pdpt, directories) =
        (layout::BOOT_PAGE_TABLES, layout::BOOT_PAGE_TABLES + 0x1000, layout::BOOT_PAGE_TABLES + 0x2000);
    memory.write_obj(pdpt | PTE_PRESENT_WRITABLE, GuestAddress(pml4))?;
    for i in 0..4 {
        memory.write_obj((directories + i * 0x1000) | PTE_PRESENT_WRITABLE, GuestAddress(pdpt + i * 8))?;
    }
    let entries: Vec<u8> =
        (0..4 * 512u64).flat_map(|i| (i << 21 | PTE_PRESENT_WRITABLE | PDE_LARGE).to_le_bytes()).collect();
    memory.write_slice(&entries, GuestAddress(directories))
}

/// Gives a vCPU its registers. The first one starts at `entry`, the others wait to be started by it as KVM made them.
///
/// # Errors
/// What KVM says.
pub fn reset_state(fd: &VcpuFd, index: u8, entry: Entry) -> io::Result<()> {
    // Memory types as firmware would leave them. A KVM that does not know such an MSR does without.
    for (msr, data) in
        [(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK), (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS)]
    {
        let entry = kvm_msr_entry { index: msr, data, ..Default::default() };
        if let Ok(msrs) = Msrs::from_entries(&[entry]) {
            let _ = fd.set_msrs(&msrs);
        }
    }
    fd.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() })?;
    if index != 0 {
        return Ok(());
    }
    let mut sregs = fd.get_sregs()?;
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    let data = segment(BOOT_DS, 0x3);
    let (code, cr0) = match entry {
        Entry::Pvh { eip, start_info } => {
            regs.rip = u64::from(eip);
            regs.rbx = start_info;
            sregs.cr4 = 0;
            sregs.efer = 0;
            (segment(BOOT_CS, 0xb), CR0_PE | CR0_ET)
        }
        Entry::Linux64 { rip, zero_page } => {
            regs.rip = rip;
            regs.rsi = zero_page;
            regs.rsp = layout::BOOT_STACK;
            sregs.gdt.base = layout::BOOT_GDT;
            sregs.gdt.limit = (GDT.len() * 8 - 1) as u16;
            sregs.cr3 = layout::BOOT_PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            let code = kvm_segment { l: 1, db: 0, ..segment(BOOT_CS, 0xb) };
            (code, CR0_PE | CR0_ET | CR0_PG)
        }
    };
    sregs.cr0 = cr0;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    fd.set_sregs(&sregs)?;
    fd.set_regs(&regs)?;
    Ok(())
}

/// A flat 4 GiB segment.
fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// Registers that tell where a vCPU got stuck, on one line.
pub(super) fn describe_registers(fd: &VcpuFd) -> String {
    let mut line = String::new();
    // Writing to a String does not fail.
    if let Ok(r) = fd.get_regs() {
        let _ = write!(
            line,
            "rip {:#x} rsp {:#x} rflags {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} rdi {:#x}",
            r.rip, r.rsp, r.rflags, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi
        );
    }
    if let Ok(s) = fd.get_sregs() {
        let _ = write!(
            line,
            " cs {:#x} ss {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
            s.cs.selector, s.ss.selector, s.cr0, s.cr2, s.cr3, s.cr4, s.efer
        );
    }
    line
}
