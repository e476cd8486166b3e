//! Guest RAM: one sealed memfd, mapped here and by every device that serves the guest.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use proto::memory::GUEST_RAM;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::platform::layout;

/// RAM comes in multiples of this, so that huge pages fit without remainder. Bytes.
pub const GRANULE: u64 = 2 << 20;

/// A piece of RAM that is contiguous in guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// Offset of its first byte in the memfd.
    pub memfd_offset: u64,
    /// Address of its first byte in this process. Devices are not told it: they get user addresses that the slot makes up.
    pub host_address: u64,
}

/// The RAM of one guest.
///
/// It lives through guest resets, so that devices keep their mappings; but for a reset after which a device that was dropped might
/// still write to it.
#[derive(Debug)]
pub struct GuestRam {
    memfd: Arc<File>,
    regions: Vec<RamRegion>,
    memory: GuestMemoryMmap,
}

impl GuestRam {
    /// Makes `size` bytes of zeroed RAM around the PCI hole. No page is backed until it is touched.
    ///
    /// # Errors
    /// What the host says to creating, sizing, sealing or mapping the memfd. `InvalidInput` if `size` is 0 or no
    /// multiple of [`GRANULE`].
    pub fn new(size: u64) -> io::Result<Self> {
        if size == 0 || !size.is_multiple_of(GRANULE) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let memfd = Arc::new(sealed_memfd(size)?);
        let mut regions = Vec::with_capacity(2);
        let mut mappings = Vec::with_capacity(2);
        let mut memfd_offset = 0;
        for range in layout::ram_ranges(size) {
            let length = range.end - range.start;
            let bytes = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mapping = MmapRegion::build(
                Some(FileOffset::from_arc(Arc::clone(&memfd), memfd_offset)),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
            )
            .map_err(io::Error::other)?;
            // A crash dump of this process must not carry the guest's memory. Best effort: a kernel without it dumps more.
            // SAFETY: the range is the mapping just made, which nobody else knows yet.
            unsafe { libc::madvise(mapping.as_ptr().cast(), bytes, libc::MADV_DONTDUMP) };
            regions.push(RamRegion {
                gpa: range.start,
                size: length,
                memfd_offset,
                host_address: mapping.as_ptr() as u64,
            });
            mappings.push(
                GuestRegionMmap::new(mapping, GuestAddress(range.start))
                    .ok_or(io::ErrorKind::InvalidInput)?,
            );
            memfd_offset += length;
        }
        let memory = GuestMemoryMmap::from_regions(mappings).map_err(io::Error::other)?;
        Ok(Self { memfd, regions, memory })
    }

    /// The memory behind it all: sealed against resizing, so that no peer can make an access of ours fault.
    pub fn memfd(&self) -> &Arc<File> {
        &self.memfd
    }

    /// Its pieces, by ascending address: one below the PCI hole and, if there is more, one from 4 GiB.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Checked access by guest-physical address.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Length of all regions in bytes.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|r| r.size).sum()
    }

    /// Gives every page back to the host; the RAM reads as zeroes then, here and in every process that maps it. Only while no
    /// device's queue runs on it, for those may hold on to its pages ([`GUEST_RAM`]); or else it is used no more.
    ///
    /// # Errors
    /// What the host says to punching the hole.
    pub fn scrub(&self) -> io::Result<()> {
        let size = libc::off_t::try_from(self.size()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a plain system call on a file descriptor that `self` owns.
        let r = unsafe {
            libc::fallocate(
                self.memfd.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                0,
                size,
            )
        };
        if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

fn sealed_memfd(size: u64) -> io::Result<File> {
    // SAFETY: the name is a C string; the result is checked before use.
    let fd = unsafe { libc::memfd_create(GUEST_RAM.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: a plain system call on a file descriptor owned by `file`.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    #[test]
    fn a_small_guest_has_one_region_from_zero() {
        let ram = GuestRam::new(128 << 20).unwrap();
        assert_eq!(ram.regions().len(), 1);
        assert_eq!((ram.regions()[0].gpa, ram.regions()[0].size), (0, 128 << 20));
        assert_eq!(ram.size(), 128 << 20);
    }

    #[test]
    fn a_large_guest_goes_around_the_pci_hole() {
        let ram = GuestRam::new(5 << 30).unwrap();
        let pieces: Vec<_> = ram.regions().iter().map(|r| (r.gpa, r.size, r.memfd_offset)).collect();
        assert_eq!(pieces, [(0, 3 << 30, 0), (4 << 30, 2 << 30, 3 << 30)]);
        assert!(!ram.memory().address_in_range(GuestAddress(layout::PCI_HOLE.start)));
        assert!(!ram.memory().address_in_range(GuestAddress(6 << 30)));
        assert!(ram.memory().address_in_range(GuestAddress((6 << 30) - 1)));
    }

    #[test]
    fn the_memfd_cannot_be_resized_nor_unsealed() {
        let ram = GuestRam::new(GRANULE).unwrap();
        assert!(ram.memfd().set_len(0).is_err());
        assert!(ram.memfd().set_len(2 * GRANULE).is_err());
        // SAFETY: a plain system call on a file descriptor that `ram` owns.
        let r = unsafe { libc::fcntl(ram.memfd().as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
        assert_eq!(r, -1);
    }

    #[test]
    fn scrubbing_zeroes_every_region() {
        let ram = GuestRam::new(4 << 30).unwrap();
        for address in [0x1000, layout::PCI_HOLE.start - 8, 4 << 30] {
            ram.memory().write_obj(0x1234_u64, GuestAddress(address)).unwrap();
        }
        ram.scrub().unwrap();
        for address in [0x1000, layout::PCI_HOLE.start - 8, 4 << 30] {
            assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(address)).unwrap(), 0);
        }
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert!(GuestRam::new(0).is_err());
        assert!(GuestRam::new(GRANULE + 4096).is_err());
    }
}
