//! The other side, for tests: a guest's memory, a driver's rings, and a vhost-user front-end (feature `testing`).
//!
//! Unlike the rest of this crate, what is here panics when something is not as it should be.

mod driver;
mod front;

use std::fs::File;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress};

pub use driver::{Buffer, DriverQueue};
pub use front::{Front, Inflight};

use crate::memory::{GuestMemory, MemoryTable};

/// Where the pretended front-end has the guest's address 0 mapped.
pub const USER_BASE: u64 = 0x7f00_0000_0000;

/// Memory of a guest, one region from address 0, in a memfd that can be shared.
#[derive(Debug, Clone)]
pub struct TestGuest {
    /// The memory as the guest sees it.
    pub memory: Arc<GuestMemory>,
    file: Arc<File>,
    size: u64,
}

impl TestGuest {
    /// With `size` bytes.
    pub fn new(size: u64) -> Self {
        let file = File::from(memfd_create(c"test-guest", MFdFlags::MFD_CLOEXEC).expect("memfd"));
        file.set_len(size).expect("memfd size");
        let mapped = FileOffset::new(file.try_clone().expect("memfd"), 0);
        let range = (GuestAddress(0), size as usize, Some(mapped));
        let memory = Arc::new(GuestMemory::from_ranges_with_files([range]).expect("mapping"));
        Self { memory, file: Arc::new(file), size }
    }

    /// A memory table with just this memory, for an engine in this process.
    pub fn table(&self) -> MemoryTable {
        MemoryTable::from_view(GuestMemory::clone(&self.memory))
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}
