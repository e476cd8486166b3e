//! Shared files that their owner cuts short.
//!
//! Touching a mapped page behind a file's end kills a process with SIGBUS, and whoever shares a file with us can cut it at
//! any time unless it is sealed, which not every front-end can do. A card serves many guests, so one front-end must not be
//! able to kill it. For mappings guarded here the signal's handler puts an empty page where the file's was: the one who cut
//! it sees rubbish, nobody else sees anything.
//!
//! A file that is sealed against shrinking needs no guard. One that is not, and for which no guard is left, is not mapped.

use std::fs::File;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use vm_memory::MmapRegion;

/// Guarded mappings at a time, of all devices.
const MAX_RANGES: usize = 16384;
/// A slot being filled in.
const RESERVED: usize = 1;
const PAGE_BYTES: usize = 4096;

struct Range {
    /// 0: free.
    start: AtomicUsize,
    length: AtomicUsize,
    /// Unit in which the file can be replaced, if 4 KiB is not possible (huge pages).
    block: AtomicUsize,
    /// Some of it has been replaced.
    replaced: AtomicBool,
}

impl Range {
    const fn free() -> Self {
        Self {
            start: AtomicUsize::new(0),
            length: AtomicUsize::new(0),
            block: AtomicUsize::new(0),
            replaced: AtomicBool::new(false),
        }
    }
}

/// Read by the signal's handler, so there is no lock.
static RANGES: [Range; MAX_RANGES] = [const { Range::free() }; MAX_RANGES];

/// How many guarded mappings one device has. Clones are the same quota.
#[derive(Debug, Clone, Default)]
pub struct Quota(Arc<AtomicUsize>);

impl Quota {
    /// Most of them. Front-ends have a handful.
    pub const LIMIT: usize = 128;

    fn take(&self) -> bool {
        let one_more = |n| (n < Self::LIMIT).then_some(n + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    fn give_back(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keeps a mapping guarded. To be dropped after the mapping.
#[derive(Debug)]
pub(crate) struct Guard(Option<Place>);

#[derive(Debug)]
struct Place {
    slot: usize,
    quota: Quota,
}

/// The file cannot become shorter. One of huge pages can lose them all the same: a hole is punched into it, and there
/// is no page left to fill it when it is touched.
fn cannot_be_cut(file: &File, block: u64) -> bool {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
    block <= PAGE_BYTES as u64 && seals.is_ok_and(|s| s.contains(SealFlag::F_SEAL_SHRINK))
}

/// A free slot, which is reserved then.
fn reserve(ranges: &[Range]) -> Option<usize> {
    ranges.iter().position(|range| {
        range.start.compare_exchange(0, RESERVED, Ordering::Acquire, Ordering::Relaxed).is_ok()
    })
}

impl Guard {
    /// Guards `mapping` of `file`, which has blocks of `block` bytes, if it needs to be.
    ///
    /// # Errors
    /// `QuotaExceeded`: no guard is left for it.
    pub(crate) fn new(mapping: &MmapRegion<()>, file: &File, block: u64, quota: &Quota) -> io::Result<Self> {
        if cannot_be_cut(file, block) { Ok(Self(None)) } else { Self::always(mapping, block, quota) }
    }

    /// As [`Guard::new`], whatever the file is.
    pub(super) fn always(mapping: &MmapRegion<()>, block: u64, quota: &Quota) -> io::Result<Self> {
        let exceeded = |what| io::Error::new(io::ErrorKind::QuotaExceeded, what);
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            if let Err(e) = install() {
                tracing::warn!("a front-end that cuts its memory can kill this process: {e}");
            }
        });
        if !quota.take() {
            return Err(exceeded("the device has too many mappings of such files"));
        }
        let Some(slot) = reserve(&RANGES) else {
            quota.give_back();
            return Err(exceeded("the process has too many mappings of such files"));
        };
        let range = &RANGES[slot];
        range.length.store(mapping.size(), Ordering::Relaxed);
        range.replaced.store(false, Ordering::Relaxed);
        range.block.store(usize::try_from(block).unwrap_or(PAGE_BYTES), Ordering::Relaxed);
        range.start.store(mapping.as_ptr() as usize, Ordering::Release);
        Ok(Self(Some(Place { slot, quota: quota.clone() })))
    }

    /// Some of the mapping is not the file's any more. If it says no, all that was read before it was asked is.
    pub(super) fn has_replaced(&self) -> bool {
        self.0.as_ref().is_some_and(|place| RANGES[place.slot].replaced.load(Ordering::Acquire))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(place) = &self.0 {
            RANGES[place.slot].start.store(0, Ordering::Release);
            place.quota.give_back();
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
    // Before anybody can read the empty page.
    range.replaced.store(true, Ordering::Release);
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
    use super::{Range, reserve};
    use crate::event::Event;
    use crate::ring::{Chain, FEATURES, Ring, RingConfig};
    use crate::testing::{Buffer, DriverQueue, TestGuest};

    #[test]
    fn there_is_an_end_to_the_slots() {
        let ranges = [const { Range::free() }; 3];
        assert_eq!([(); 4].map(|()| reserve(&ranges)), [Some(0), Some(1), Some(2), None]);
    }

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
