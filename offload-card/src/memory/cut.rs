//! Shared files that their owner cuts short.
//!
//! Touching a mapped page behind a file's end kills a process with SIGBUS, and whoever shares a file with us can cut it at
//! any time unless it is sealed, which not every front-end can do. A card serves many guests, so one front-end must not be
//! able to kill it. For mappings guarded here the signal's handler puts an empty page where the file's was: the one who cut
//! it sees rubbish, nobody else sees anything.

use std::io;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::MmapRegion;

/// Guarded mappings at a time. One that does not fit is simply not guarded.
const MAX_RANGES: usize = 4096;
/// A slot being filled in.
const RESERVED: usize = 1;
const PAGE_BYTES: usize = 4096;

struct Range {
    /// 0: free.
    start: AtomicUsize,
    length: AtomicUsize,
    /// Unit in which the file can be replaced, if 4 KiB is not possible (huge pages).
    block: AtomicUsize,
}

/// Read by the signal's handler, so there is no lock.
static RANGES: [Range; MAX_RANGES] =
    [const { Range { start: AtomicUsize::new(0), length: AtomicUsize::new(0), block: AtomicUsize::new(0) } };
        MAX_RANGES];

/// Keeps a mapping guarded. To be dropped after the mapping.
#[derive(Debug)]
pub(crate) struct Guard(Option<usize>);

impl Guard {
    /// Guards `mapping` of a file with blocks of `block` bytes.
    pub(crate) fn new(mapping: &MmapRegion<()>, block: u64) -> Self {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            if let Err(e) = install() {
                tracing::warn!("a front-end that cuts its memory can kill this process: {e}");
            }
        });
        let free = |range: &Range| {
            range.start.compare_exchange(0, RESERVED, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let slot = RANGES.iter().position(free);
        if let Some(range) = slot.and_then(|i| RANGES.get(i)) {
            range.length.store(mapping.size(), Ordering::Relaxed);
            range.block.store(usize::try_from(block).unwrap_or(PAGE_BYTES), Ordering::Relaxed);
            range.start.store(mapping.as_ptr() as usize, Ordering::Release);
        }
        Self(slot)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(range) = self.0.and_then(|i| RANGES.get(i)) {
            range.start.store(0, Ordering::Release);
        }
    }
}

fn install() -> io::Result<()> {
    // SAFETY: plain old data, for which zeros are valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_bus_error as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is valid, and the handler only does what is allowed in one.
    let done = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Handles SIGBUS. Only system calls and atomics: it may have interrupted anything.
extern "C" fn on_bus_error(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo, and SIGBUS has an address.
    let (address, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    if code == libc::BUS_ADRERR && mend(address) {
        return;
    }
    // Not ours: the access is tried again when this returns, and ends the process.
    // SAFETY: the default action is a valid one.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

/// Puts an empty page at `address`, if that is in a guarded mapping.
fn mend(address: usize) -> bool {
    let inside = |range: &&Range| {
        let start = range.start.load(Ordering::Acquire);
        start > RESERVED && address.wrapping_sub(start) < range.length.load(Ordering::Relaxed)
    };
    let Some(range) = RANGES.iter().find(inside) else {
        return false;
    };
    let block = range.block.load(Ordering::Relaxed);
    [PAGE_BYTES, block].into_iter().filter(|b| b.is_power_of_two()).any(|bytes| {
        let page = (address & !(bytes - 1)) as *mut libc::c_void;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the page is of a mapping that is shared with a guest, to which nobody here has a Rust reference other
        // than to atomics, and it could not be accessed before.
        unsafe { libc::mmap(page, bytes, protection, flags, -1, 0) != libc::MAP_FAILED }
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::{MemoryTable, Region};
    use crate::event::Event;
    use crate::ring::{Chain, FEATURES, Ring, RingConfig};
    use crate::testing::{Buffer, DriverQueue, TestGuest};

    #[test]
    fn a_front_end_that_cuts_its_memory_only_hurts_itself() {
        let guest = TestGuest::new(1 << 20);
        let mut driver = DriverQueue::new(&guest, 0, 16, FEATURES);
        let table = MemoryTable::new();
        let share = |file: &File| file.try_clone().unwrap();
        table.add(Region::map(0, 0x8_0000, 0, share(guest.file()), 0).unwrap()).unwrap();
        let other = tempfile::tempfile().unwrap();
        other.set_len(0x8_0000).unwrap();
        table.add(Region::map(0x10_0000, 0x8_0000, 0, share(&other), 0).unwrap()).unwrap();
        let mut ring = Ring::new(RingConfig {
            index: 0,
            size: 16,
            features: FEATURES,
            addresses: driver.addresses,
            base: 0,
            kick: Event::new().unwrap(),
            memory: table.clone(),
            shared: Arc::default(),
            inflight: None,
        })
        .unwrap();
        driver.add(&[Buffer::readable(0x10_1000, 0x2000), Buffer::writable(0x10_4000, 0x1000)]).unwrap();
        let mut chain = Chain::new();
        assert!(ring.pop(&mut chain).unwrap());
        other.set_len(0x1000).unwrap();
        let mut data = [1; 0x2000];
        assert_eq!(chain.read_at(0, &mut data), 0x2000);
        assert!(data.iter().all(|b| *b == 0));
        assert_eq!(chain.write_at(0, &[7; 0x1000]), 0x1000);
        // What is left of the file is untouched.
        table.view().write_obj(5u8, GuestAddress(0x10_0000)).unwrap();
        let mut first = [0];
        other.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [5]);
    }
}
