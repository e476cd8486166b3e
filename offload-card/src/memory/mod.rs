//! Guest memory as a front-end shares it: the table that says which file is mapped where, changing under running rings.
//!
//! The rules of memory that a guest can change at any time: copy out, check the copy, use the copy. Nothing here hands
//! out a Rust reference into it.

mod cut;
mod window;

use std::fs::File;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use proto::memory::GUEST_RAM;
use thiserror::Error;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

pub(crate) use cut::Guard;
pub use cut::Quota;
pub use window::Window;

/// Guest memory as crate `vm-memory` has it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Bytes that a processor fetches at once.
pub(crate) const CACHE_LINE: usize = 64;

/// Has the processor fetch what is at an address, and does not wait for it.
pub(crate) fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing and cannot fault, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address as *const i8);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// One consistent view of a guest's memory. Views are kept alive by whoever works on them: what a chain points into
/// stays mapped until the chain is dropped, cleared or filled anew, whatever the front-end removes meanwhile.
#[derive(Debug, Default)]
pub struct View {
    memory: GuestMemory,
    /// Dropped after the mappings, as fields are in order.
    _guards: Vec<Arc<Guard>>,
}

/// A region of guest memory in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// Where it begins.
    pub address: usize,
    /// Its length in bytes.
    pub length: usize,
    /// Its pages are not replaced by others as long as a queue runs: it is of Outboard's hypervisor ([`GUEST_RAM`]). A front-end
    /// that says so falsely harms its own guest.
    pub stays: bool,
}

impl View {
    /// Its regions, as they are mapped here.
    pub fn mapped(&self) -> impl Iterator<Item = Mapped> {
        self.memory.iter().map(|region| Mapped {
            address: region.as_ptr().addr(),
            length: region.size(),
            stays: region.file_offset().is_some_and(|offset| is_guest_ram(offset.file())),
        })
    }
}

/// A file has the name of the hypervisor's memfds, as /proc shows it.
fn is_guest_ram(file: &File) -> bool {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    name.is_ok_and(|name| {
        let name = name.as_os_str().as_bytes().strip_prefix(b"/memfd:");
        name.and_then(|name| name.strip_suffix(b" (deleted)")) == Some(GUEST_RAM.to_bytes())
    })
}

impl Deref for View {
    type Target = GuestMemory;

    fn deref(&self) -> &GuestMemory {
        &self.memory
    }
}

/// A memory table that could not be taken over.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The file does not reach as far as the region says: touching the rest would kill us.
    #[error("memory region at {gpa:#x} ends {missing} bytes behind its file's end")]
    FileTooShort {
        /// Guest-physical address of the region.
        gpa: u64,
        /// Bytes that are not there.
        missing: u64,
    },
    /// Something that is not a file in memory or on disk.
    #[error("memory region at {gpa:#x} is not a regular file")]
    NotAFile {
        /// Guest-physical address of the region.
        gpa: u64,
    },
    /// Sizes or addresses that cannot be: empty, or wrapping around.
    #[error("memory region at {gpa:#x} of {size} bytes is out of range")]
    OutOfRange {
        /// Guest-physical address of the region.
        gpa: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// Two regions share addresses.
    #[error("memory region at {gpa:#x} overlaps another")]
    Overlap {
        /// Guest-physical address of the region.
        gpa: u64,
    },
    /// There is no such region to remove.
    #[error("there is no memory region at {gpa:#x} of {size} bytes")]
    Unknown {
        /// Guest-physical address asked for.
        gpa: u64,
        /// Length asked for in bytes.
        size: u64,
    },
    /// Its file can be cut under us, and there are too many such already.
    #[error("memory region at {gpa:#x} is of a file that is not sealed against shrinking: {source}")]
    Unsealed {
        /// Guest-physical address of the region.
        gpa: u64,
        /// Why it is not taken.
        #[source]
        source: std::io::Error,
    },
    /// The kernel refused to look at or map the file.
    #[error("memory region at {gpa:#x} cannot be mapped")]
    Map {
        /// Guest-physical address of the region.
        gpa: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// One region of a front-end's memory table.
#[derive(Debug, Clone)]
pub struct Region {
    /// Where the front-end itself has it mapped: ring addresses come in these terms.
    user_address: u64,
    mapping: Arc<GuestRegionMmap<()>>,
    guard: Arc<Guard>,
    /// How often it was added more than it was removed: QEMU 7.2 does both once per queue pair of a network device.
    times: u32,
}

impl Region {
    /// Maps `size` bytes of `file` from `offset` as guest-physical `gpa`.
    pub fn map(gpa: u64, size: u64, user_address: u64, file: File, offset: u64) -> Result<Self, MemoryError> {
        Self::map_within(&Quota::default(), gpa, size, user_address, file, offset)
    }

    /// As [`Region::map`], for a device that has this quota of files that can be cut.
    pub fn map_within(
        quota: &Quota,
        gpa: u64,
        size: u64,
        user_address: u64,
        file: File,
        offset: u64,
    ) -> Result<Self, MemoryError> {
        let out_of_range = || MemoryError::OutOfRange { gpa, size };
        let map = |source| MemoryError::Map { gpa, source };
        if size == 0 || gpa.checked_add(size).is_none() || user_address.checked_add(size).is_none() {
            return Err(out_of_range());
        }
        let end = offset.checked_add(size).ok_or_else(out_of_range)?;
        let length = usize::try_from(size).map_err(|_| out_of_range())?;
        let metadata = file.metadata().map_err(map)?;
        if !metadata.is_file() {
            return Err(MemoryError::NotAFile { gpa });
        }
        if metadata.len() < end {
            return Err(MemoryError::FileTooShort { gpa, missing: end - metadata.len() });
        }
        let file = FileOffset::new(file, offset);
        let mapping =
            MmapRegion::from_file(file.clone(), length).map_err(|e| map(std::io::Error::other(e)))?;
        let guard = Guard::new(&mapping, file.file(), metadata.blksize(), quota)
            .map_err(|source| MemoryError::Unsealed { gpa, source })?;
        let guard = Arc::new(guard);
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or_else(out_of_range)?;
        Ok(Self { user_address, mapping: Arc::new(mapping), guard, times: 1 })
    }

    fn gpa(&self) -> u64 {
        self.mapping.start_addr().0
    }

    /// Where it is for the guest, its length, and where it is for the front-end.
    fn addresses(&self) -> (u64, u64, u64) {
        (self.gpa(), self.size(), self.user_address)
    }

    fn size(&self) -> u64 {
        self.mapping.len()
    }
}

/// A guest's memory table, shared by the connection that changes it and the rings that work on it. Clones are the same
/// table.
#[derive(Debug, Clone)]
pub struct MemoryTable(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Changes with every change of the table; a ring compares it on every pop, which costs one load.
    generation: AtomicU64,
    regions: ArcSwap<Vec<Region>>,
    view: ArcSwap<View>,
}

impl Default for MemoryTable {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryTable {
    /// An empty table.
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            generation: AtomicU64::new(0),
            regions: ArcSwap::default(),
            view: ArcSwap::default(),
        }))
    }

    /// Memory that somebody mapped already, e.g. a VMM that runs an engine in its own process.
    pub fn from_view(memory: GuestMemory) -> Self {
        let table = Self::new();
        table.0.view.store(Arc::new(View { memory, _guards: Vec::new() }));
        table
    }

    /// Replaces all regions.
    pub fn replace(&self, regions: Vec<Region>) -> Result<(), MemoryError> {
        let view = view_of(&regions)?;
        self.0.regions.store(Arc::new(regions));
        self.0.view.store(Arc::new(view));
        self.0.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Adds one region. One that is there, with exactly these addresses, stays until it has been removed as often as it was
    /// added.
    pub fn add(&self, region: Region) -> Result<(), MemoryError> {
        let mut regions = Vec::clone(&self.0.regions.load());
        match regions.iter_mut().find(|r| r.addresses() == region.addresses()) {
            Some(there) => {
                there.times = there.times.saturating_add(1);
                self.0.regions.store(Arc::new(regions));
                Ok(())
            }
            None => {
                regions.push(region);
                self.replace(regions)
            }
        }
    }

    /// Removes the region with exactly these addresses.
    pub fn remove(&self, gpa: u64, size: u64, user_address: u64) -> Result<(), MemoryError> {
        let mut regions = Vec::clone(&self.0.regions.load());
        let found = regions.iter().position(|r| r.addresses() == (gpa, size, user_address));
        let found = found.ok_or(MemoryError::Unknown { gpa, size })?;
        match regions.get_mut(found).filter(|region| region.times > 1) {
            Some(region) => {
                region.times -= 1;
                self.0.regions.store(Arc::new(regions));
                Ok(())
            }
            None => {
                regions.remove(found);
                self.replace(regions)
            }
        }
    }

    /// The regions in the table.
    pub fn len(&self) -> usize {
        self.0.regions.load().len()
    }

    /// Nothing is in the table.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The guest-physical address of what the front-end has at `user_address`.
    pub fn translate(&self, user_address: u64) -> Option<u64> {
        self.0.regions.load().iter().find_map(|r| {
            let offset = user_address.checked_sub(r.user_address)?;
            (offset < r.size()).then(|| r.gpa() + offset)
        })
    }

    /// A number that changes with every change of the table.
    pub fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// The memory as it is now.
    pub fn view(&self) -> Arc<View> {
        self.0.view.load_full()
    }
}

fn view_of(regions: &[Region]) -> Result<View, MemoryError> {
    let mut sorted: Vec<&Region> = regions.iter().collect();
    sorted.sort_by_key(|r| r.gpa());
    for pair in sorted.windows(2) {
        if pair[0].gpa() + pair[0].size() > pair[1].gpa() {
            return Err(MemoryError::Overlap { gpa: pair[1].gpa() });
        }
    }
    if sorted.is_empty() {
        return Ok(View::default());
    }
    let gpa = sorted[0].gpa();
    let guards = sorted.iter().map(|r| r.guard.clone()).collect();
    let memory = GuestMemory::from_arc_regions(sorted.into_iter().map(|r| r.mapping.clone()).collect())
        .map_err(|e| MemoryError::Map { gpa, source: std::io::Error::other(e) })?;
    Ok(View { memory, _guards: guards })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn regions_come_and_go() {
        let table = MemoryTable::new();
        let first = table.generation();
        table.replace(vec![Region::map(0, 0x2000, 0x7000_0000, file(0x2000), 0).unwrap()]).unwrap();
        table.add(Region::map(0x10_0000, 0x1000, 0x7100_0000, file(0x3000), 0x2000).unwrap()).unwrap();
        assert_ne!(table.generation(), first);
        assert_eq!(table.len(), 2);
        assert_eq!(table.translate(0x7100_0010), Some(0x10_0010));
        assert_eq!(table.translate(0x7000_2000), None);
        let held = table.view();
        assert!(table.remove(0x10_0000, 0x1000, 0).is_err());
        table.remove(0x10_0000, 0x1000, 0x7100_0000).unwrap();
        assert_eq!(table.translate(0x7100_0010), None);
        assert_eq!((held.num_regions(), table.view().num_regions()), (2, 1));
    }

    #[test]
    fn a_region_that_is_added_twice_is_removed_twice() {
        let table = MemoryTable::new();
        let add = || table.add(Region::map(0x1000, 0x1000, 0x7000, file(0x1000), 0).unwrap());
        add().unwrap();
        let generation = table.generation();
        add().unwrap();
        assert_eq!((table.len(), table.view().num_regions(), table.generation()), (1, 1, generation));
        table.remove(0x1000, 0x1000, 0x7000).unwrap();
        assert_eq!((table.len(), table.generation()), (1, generation));
        table.remove(0x1000, 0x1000, 0x7000).unwrap();
        assert!(table.is_empty() && table.remove(0x1000, 0x1000, 0x7000).is_err());
        // Others with some of its addresses are others.
        add().unwrap();
        assert!(table.add(Region::map(0x1000, 0x1000, 0x8000, file(0x1000), 0).unwrap()).is_err());
    }

    #[test]
    fn files_that_can_be_cut_are_counted_and_sealed_ones_are_not() {
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let memfd = File::from(memfd_create(c"region", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        memfd.set_len(0x1000).unwrap();
        let quota = Quota::default();
        let map = || Region::map_within(&quota, 0, 0x1000, 0, memfd.try_clone().unwrap(), 0);
        let mut regions: Vec<_> = (0..Quota::LIMIT).map(|_| map().unwrap()).collect();
        assert!(matches!(map(), Err(MemoryError::Unsealed { .. })));
        // Other devices are not concerned; and what is given back can be had again.
        assert!(Region::map(0, 0x1000, 0, memfd.try_clone().unwrap(), 0).is_ok());
        regions.pop();
        regions.push(map().unwrap());
        assert!(map().is_err());
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        regions.extend((0..100).map(|_| map().unwrap()));
    }

    #[test]
    fn memory_of_the_hypervisors_is_known_by_its_name() {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let stays = |file: File| {
            file.set_len(0x2000).unwrap();
            let table = MemoryTable::new();
            table.add(Region::map(0, 0x1000, 0, file, 0x1000).unwrap()).unwrap();
            let view = table.view();
            let mapped: Vec<_> = view.mapped().collect();
            assert_eq!((mapped.len(), mapped[0].length), (1, 0x1000));
            let address = view.get_host_address(GuestAddress(0)).unwrap();
            assert_eq!(mapped[0].address, address.addr());
            mapped[0].stays
        };
        let memfd = |name: &std::ffi::CStr| File::from(memfd_create(name, MFdFlags::empty()).unwrap());
        assert!(stays(memfd(GUEST_RAM)));
        assert!(!stays(memfd(c"memory-backend-memfd")) && !stays(memfd(c"outboard-ram2")) && !stays(file(0)));
    }

    #[test]
    fn impossible_regions_are_refused() {
        let map = |gpa, size, offset| Region::map(gpa, size, 0x1000, file(0x2000), offset);
        assert!(matches!(map(0, 0x3000, 0), Err(MemoryError::FileTooShort { missing: 0x1000, .. })));
        assert!(matches!(map(0, 0x1000, 0x2000), Err(MemoryError::FileTooShort { .. })));
        assert!(matches!(map(0, 0, 0), Err(MemoryError::OutOfRange { .. })));
        assert!(matches!(map(u64::MAX, 2, 0), Err(MemoryError::OutOfRange { .. })));
        assert!(matches!(map(0, 0x1000, u64::MAX), Err(MemoryError::OutOfRange { .. })));
        let null = File::open("/dev/zero").unwrap();
        assert!(matches!(Region::map(0, 0x1000, 0, null, 0), Err(MemoryError::NotAFile { .. })));
        let table = MemoryTable::new();
        table.add(map(0, 0x2000, 0).unwrap()).unwrap();
        assert!(matches!(table.add(map(0x1000, 0x1000, 0).unwrap()), Err(MemoryError::Overlap { .. })));
        assert_eq!(table.len(), 1);
    }
}
