//! Physical memory: what the VMM gave us, the heap, memory for devices, and mappings of devices above 4 GiB.
//!
//! Everything is identity mapped and there is one CPU, so a physical address is a pointer.

use alloc::string::String;
use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicUsize, Ordering};

/// Memory used for heap and buffers ends here: above are devices (and what a VMM puts under its PCI hole).
const END: u64 = 3 << 30;
const HUGE: u64 = 2 << 20;
const GIB4: u64 = 4 << 30;
/// Pages for page tables above 4 GiB: each gigabyte with devices needs one, plus one or two to get there.
const TABLE_PAGES: usize = 32;

unsafe extern "C" {
    static image_end: u8;
    static mut boot_pml4: [u64; 512];
}

/// `hvm_start_info` (PVH: xen/include/public/arch-x86/hvm/start_info.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    _flags: u32,
    _modules: u32,
    _module_list: u64,
    cmdline: u64,
    rsdp: u64,
    memmap: u64,
    memmap_entries: u32,
    _reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MemmapEntry {
    address: u64,
    size: u64,
    kind: u32,
    _reserved: u32,
}

const START_MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

/// What the VMM told us.
pub(crate) struct Boot {
    /// The command line (what does not fit or is not ASCII is cut off).
    pub(crate) cmdline: &'static str,
    /// Address of the ACPI root pointer; 0 if none.
    pub(crate) rsdp: u64,
    /// Bytes of RAM for heap and buffers.
    pub(crate) usable: u64,
}

/// Reads a plain value from low memory.
pub(crate) fn read<T: Copy>(address: u64) -> Option<T> {
    if address == 0 || address.checked_add(size_of::<T>() as u64)? > GIB4 {
        return None;
    }
    // SAFETY: below 4 GiB everything is mapped; callers read structures of integers that the VMM or firmware wrote.
    Some(unsafe { (address as usize as *const T).read_unaligned() })
}

/// Bytes of low memory that nothing of ours covers.
pub(crate) fn bytes(address: u64, len: u64) -> Option<&'static [u8]> {
    if address == 0 || address.checked_add(len)? > GIB4 {
        return None;
    }
    // SAFETY: below 4 GiB everything is mapped; callers read tables that the VMM or firmware wrote and nobody changes.
    Some(unsafe { core::slice::from_raw_parts(address as usize as *const u8, len as usize) })
}

/// Takes over: copies the command line to safety and finds memory.
pub(crate) fn init(start_info: u32) -> Result<Boot, &'static str> {
    static mut CMDLINE: [u8; 4096] = [0; 4096];

    let info: StartInfo = read(u64::from(start_info)).ok_or("no PVH start info")?;
    if info.magic != START_MAGIC {
        return Err("the PVH start info has no magic number");
    }
    // SAFETY: called once, before anything else runs.
    let copy: &mut [u8; 4096] = unsafe { (&raw mut CMDLINE).as_mut_unchecked() };
    let mut len = 0;
    while let Some(byte) = read::<u8>(info.cmdline.wrapping_add(len as u64)) {
        if info.cmdline == 0 || byte == 0 || !byte.is_ascii() || len == copy.len() {
            break;
        }
        copy[len] = byte;
        len += 1;
    }
    let cmdline = core::str::from_utf8(&copy[..len]).unwrap_or_default();

    let image = (&raw const image_end) as u64;
    let entries = if info.version >= 1 { info.memmap_entries } else { 0 };
    let end = (0..u64::from(entries))
        .filter_map(|n| read::<MemmapEntry>(info.memmap + n * size_of::<MemmapEntry>() as u64))
        .filter(|e| e.kind == RAM && (e.address..e.address.saturating_add(e.size)).contains(&image))
        .map(|e| (e.address + e.size).min(END))
        .next()
        .ok_or("the PVH memory map has no RAM behind this image")?;
    let usable = end - image;
    if usable < 24 << 20 {
        return Err("less than 24 MiB of RAM: give the VM 32 MiB or more");
    }
    // An eighth for the heap, 16 MiB at most: tables of generations are the largest things in it.
    let heap_end = image + (usable / 8).min(16 << 20);
    HEAP.start(image as usize, heap_end as usize);
    ARENA.start((heap_end as usize).next_multiple_of(4096), end as usize);
    Ok(Boot { cmdline, rsdp: info.rsdp, usable })
}

/// A region that is given out from the bottom up.
struct Bump {
    next: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
}

impl Bump {
    const fn new() -> Self {
        Self { next: AtomicUsize::new(0), start: AtomicUsize::new(0), end: AtomicUsize::new(0) }
    }

    fn start(&self, start: usize, end: usize) {
        self.next.store(start, Ordering::Relaxed);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
    }

    fn take(&self, size: usize, align: usize) -> Option<usize> {
        let at = self.next.load(Ordering::Relaxed).checked_next_multiple_of(align)?;
        let next = at.checked_add(size).filter(|next| *next <= self.end.load(Ordering::Relaxed))?;
        self.next.store(next, Ordering::Relaxed);
        Some(at)
    }

    fn left(&self) -> usize {
        self.end.load(Ordering::Relaxed) - self.next.load(Ordering::Relaxed)
    }
}

static HEAP: Bump = Bump::new();
static ARENA: Bump = Bump::new();

struct Heap;

#[global_allocator]
static ALLOCATOR: Heap = Heap;

// SAFETY: one CPU, no allocation in interrupt stubs; blocks come from RAM nothing else uses and do not overlap, as `next` only
// moves back when the topmost block is returned.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HEAP.take(layout.size(), layout.align()).map_or(core::ptr::null_mut(), |at| at as *mut u8)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if block as usize + layout.size() == HEAP.next.load(Ordering::Relaxed) {
            HEAP.next.store(block as usize, Ordering::Relaxed);
        }
    }
}

/// Bytes left on the heap.
pub(crate) fn heap_left() -> usize {
    HEAP.left()
}

/// Memory that a device reads and writes.
pub(crate) struct Dma {
    base: *mut u8,
    len: usize,
}

impl Dma {
    /// Takes `len` bytes, aligned to a page, filled with zeros (so that the host has given us the pages before the I/O phase).
    pub(crate) fn new(len: usize) -> Result<Self, String> {
        let at = ARENA.take(len, 4096).ok_or_else(|| {
            alloc::format!(
                "{len} bytes of buffers needed, {} left: fewer queues, a lower qd or bs, or more RAM",
                ARENA.left()
            )
        })?;
        let base = at as *mut u8;
        // SAFETY: RAM that nobody else has.
        unsafe { base.write_bytes(0, len) };
        Ok(Self { base, len })
    }

    /// Guest-physical address of byte `offset`.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        self.base as u64 + offset as u64
    }

    /// The memory itself, for a ring.
    pub(crate) fn pointer(&self) -> *mut u8 {
        self.base
    }

    /// Bytes that no request in flight covers.
    pub(crate) fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "outside the buffer");
        // SAFETY: inside the block; a device that keeps to its requests does not write here now.
        unsafe { core::slice::from_raw_parts(self.base.add(offset), len) }
    }

    /// The same, to write.
    pub(crate) fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "outside the buffer");
        // SAFETY: as above, and this block is borrowed for writing.
        unsafe { core::slice::from_raw_parts_mut(self.base.add(offset), len) }
    }

    /// Writes a value where a device will read it.
    pub(crate) fn put<T: Copy>(&mut self, offset: usize, value: T) {
        assert!(offset + size_of::<T>() <= self.len, "outside the buffer");
        // SAFETY: inside the block.
        unsafe { self.base.add(offset).cast::<T>().write_unaligned(value) }
    }

    /// Reads a byte that a device may be writing.
    pub(crate) fn get(&self, offset: usize) -> u8 {
        assert!(offset < self.len, "outside the buffer");
        // SAFETY: inside the block.
        unsafe { self.base.add(offset).read_volatile() }
    }
}

/// Gives all device memory back. No [`Dma`] and no ring may be in use any more.
pub(crate) fn release_dma() {
    ARENA.next.store(ARENA.start.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// A window of device registers.
#[derive(Clone, Copy)]
pub(crate) struct Registers {
    base: *mut u8,
    len: usize,
}

impl Registers {
    /// Maps `len` bytes of registers at a guest-physical address.
    pub(crate) fn map(address: u64, len: usize) -> Result<Self, String> {
        let end = address.checked_add(len as u64).filter(|end| *end <= 1 << 47);
        let end = end.ok_or_else(|| alloc::format!("a device at {address:#x} cannot be mapped"))?;
        let mut page = address & !(HUGE - 1);
        while page < end {
            map_page(page).ok_or("no page tables left to map devices above 4 GiB")?;
            page += HUGE;
        }
        Ok(Self { base: address as *mut u8, len })
    }

    /// A part of the window.
    pub(crate) fn part(&self, offset: usize, len: usize) -> Option<Self> {
        offset.checked_add(len).filter(|end| *end <= self.len)?;
        Some(Self { base: self.base.wrapping_add(offset), len })
    }

    /// Size of the window in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.len, "register {offset:#x} is outside the device");
        self.base.wrapping_add(offset).cast()
    }

    /// Reads a register of 8, 16 or 32 bits.
    pub(crate) fn read<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: mapped by `map`, inside the window; reading a register has no effect on memory safety.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    /// Writes a register of 8, 16 or 32 bits.
    pub(crate) fn write<T: Copy>(&self, offset: usize, value: T) {
        // SAFETY: as above; the drivers keep to the devices' rules about addresses they write there.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }
}

/// A page table.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Table([u64; 512]);

/// Makes the 2 MiB page at `page` accessible, uncached.
fn map_page(page: u64) -> Option<()> {
    #[unsafe(link_section = ".bss.noinit")]
    static mut TABLES: [Table; TABLE_PAGES] = [Table([0; 512]); TABLE_PAGES];
    static TAKEN: AtomicUsize = AtomicUsize::new(0);
    // Present, writable, user, accessed.
    const TABLE: u64 = 0x27;
    // Also dirty, huge, uncached.
    const LEAF: u64 = 0xff;

    if page < GIB4 {
        return Some(());
    }
    let mut table: *mut u64 = (&raw mut boot_pml4).cast();
    for shift in [39, 30] {
        // SAFETY: `table` is a page table of 512 entries: the first from boot.s, later ones from entries that boot.s or
        // this loop made. New entries only go from not present to present, so no TLB entry is stale.
        table = unsafe {
            let entry = table.add((page >> shift) as usize & 511);
            if entry.read_volatile() & 1 == 0 {
                let number = TAKEN.fetch_add(1, Ordering::Relaxed);
                if number >= TABLE_PAGES {
                    return None;
                }
                let fresh = (&raw mut TABLES).cast::<Table>().add(number);
                fresh.write(Table([0; 512]));
                entry.write_volatile(fresh as u64 | TABLE);
            }
            (entry.read_volatile() & 0x000f_ffff_ffff_f000) as *mut u64
        };
    }
    // SAFETY: as above.
    unsafe { table.add((page >> 21) as usize & 511).write_volatile(page | LEAF) };
    Some(())
}
