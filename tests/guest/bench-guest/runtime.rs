//! What the compiler and boot.s need from us: memory functions, and what happens after a panic or an exception.

use crate::{gate, serial};
use core::arch::{asm, global_asm};
use core::fmt::Write;
use core::panic::PanicInfo;

global_asm!(include_str!("boot.s"), options(raw));

unsafe extern "C" {
    static exception_info: [u64; 4];
}

/// Text without a heap: whatever went wrong may have been the heap.
struct Plain;

impl Write for Plain {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            match byte {
                b'"' => serial::write(b"'"),
                b'\\' => serial::write(b"/"),
                b' '..=b'~' => serial::write(&[byte]),
                _ => serial::write(b" "),
            }
        }
        Ok(())
    }
}

#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    serial::write(b"{\"event\":\"panic\",\"at\":\"");
    // Plain never fails.
    if let Some(at) = info.location() {
        let _ = write!(Plain, "{}:{}", at.file(), at.line());
    }
    serial::write(b"\",\"message\":\"");
    let _ = write!(Plain, "{}", info.message());
    serial::write(b"\"}\n");
    gate::halt();
}

/// boot.s arrives here, at CPL 3, after an exception.
#[unsafe(no_mangle)]
extern "C" fn guest_exception() -> ! {
    // SAFETY: boot.s has written it and nothing writes it while we read: interrupts are off.
    let [vector, error, rip, cr2] = unsafe { (&raw const exception_info).read_volatile() };
    serial::write(b"{\"event\":\"exception\",\"vector\":");
    let _ = write!(Plain, "{vector}");
    for (name, value) in [("error", error), ("rip", rip), ("cr2", cr2)] {
        serial::write(b",\"");
        let _ = write!(Plain, "{name}");
        serial::write(b"\":\"");
        let _ = write!(Plain, "{value:#x}");
        serial::write(b"\"");
    }
    serial::write(b"}\n");
    gate::halt();
}

// The names and contracts of C's <string.h>, which compiled code calls.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's promise is the C function's: both ranges are valid and do not overlap.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: a forward copy reads each byte before it is overwritten.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: as memcpy; backwards, as `to` lies inside `from`'s range. The direction flag is put back.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") len => _, inout("rdi") to.add(len).wrapping_sub(1) => _,
            inout("rsi") from.add(len).wrapping_sub(1) => _, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller promises the range.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") byte as u8, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    for at in 0..len {
        // SAFETY: the caller promises both ranges.
        let (x, y) = unsafe { (a.add(at).read(), b.add(at).read()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, len) }
}

// The prebuilt `alloc` is compiled to unwind and names these two; nothing here unwinds, so nothing calls them.

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() -> ! {
    gate::halt();
}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    gate::halt();
}
