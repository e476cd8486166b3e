//! The doors between CPL 3, where this program runs, and the few instructions of boot.s that need CPL 0.

use core::arch::asm;

unsafe extern "C" {
    static irq_total: u64;
    static irq_counts: [u64; 256];
    fn gate_wait();
    fn gate_halt();
    fn gate_enable();
    fn gate_wrmsr();
    fn gate_cpuid();
    fn gate_triple();
}

/// Interrupts taken so far.
pub(crate) fn interrupts() -> u64 {
    // SAFETY: a word in boot.s that interrupt stubs increment with one instruction.
    unsafe { (&raw const irq_total).read_volatile() }
}

/// Interrupts taken so far on one vector.
pub(crate) fn interrupts_of(vector: u8) -> u64 {
    // SAFETY: as above; the table has an entry for every vector.
    unsafe { (&raw const irq_counts).cast::<u64>().add(usize::from(vector)).read_volatile() }
}

/// What boot.s looks for to tell a gate from a real invalid instruction.
const MAGIC: u64 = 0x4f42_4731;

/// Sleeps until the next interrupt, unless one was taken since [`interrupts`] returned `seen`.
pub(crate) fn sleep(seen: u64) {
    // SAFETY: the gate changes no register and runs on the stack of the TSS. Memory may have changed when it returns.
    unsafe { asm!("ud2", in("r10") MAGIC, in("r11") gate_wait as *const (), in("rdi") seen) }
}

/// Stops the CPU for good.
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: the gate does not return.
        unsafe { asm!("ud2", in("r10") MAGIC, in("r11") gate_halt as *const ()) }
    }
}

/// Lets interrupts through from now on.
pub(crate) fn enable_interrupts() {
    // SAFETY: the gate sets IF in the flags it returns with; every vector has a stub.
    unsafe { asm!("ud2", in("r10") MAGIC, in("r11") gate_enable as *const ()) }
}

/// Writes a model-specific register; #GP (so an `exception` event) if there is none of that number.
pub(crate) fn write_msr(register: u32, value: u64) {
    // SAFETY: the gate changes no register; the only caller gives KVM the address of a static of ours.
    unsafe {
        asm!("ud2", in("r10") MAGIC, in("r11") gate_wrmsr as *const (),
            in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32);
    }
}

/// CPUID as CPL 0 sees it: without hardware virtualization CPL 3 may get the host's. Returns eax, ebx, ecx, edx.
pub(crate) fn cpuid(leaf: u32) -> [u32; 4] {
    let (eax, ebx, ecx, edx): (u32, u64, u32, u32);
    // SAFETY: the gate changes these four registers; rbx is saved for the compiler.
    unsafe {
        asm!("xchg {b}, rbx", "ud2", "xchg {b}, rbx", b = inout(reg) 0u64 => ebx,
            in("r10") MAGIC, in("r11") gate_cpuid as *const (),
            inout("eax") leaf => eax, inout("ecx") 0 => ecx, out("edx") edx);
    }
    [eax, ebx as u32, ecx, edx]
}

/// Loads an empty IDT and faults.
pub(crate) fn triple_fault() -> ! {
    loop {
        // SAFETY: the gate does not return.
        unsafe { asm!("ud2", in("r10") MAGIC, in("r11") gate_triple as *const ()) }
    }
}
