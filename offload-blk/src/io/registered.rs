//! Guest memory that is registered with io_uring, so that its pages are looked up and held once, and not for each transfer.
//!
//! That is worth it for transfers around the page cache, which go straight to and from the pages: an eighth of what a read of
//! 4 KiB takes. Memory is registered in chunks, where it is used again and again, so that a guest's memory that is used for
//! nothing else stays unused.
//!
//! A registered page is what transfers use from then on, whatever the guest sees at its address. So memory may be registered only
//! if nobody takes pages out of it and puts others there while the queue runs, as balloons and free page reporting do: Outboard's
//! hypervisor promises that ([`proto::memory::GUEST_RAM`]), of other front-ends their users must know.

use std::io;
use std::sync::Arc;

use io_uring::Submitter;
use offload_card::memory::View;
use tracing::info;

/// Whether guest memory is registered with the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Register {
    /// Where its front-end is known to leave its pages in place: Outboard's hypervisor.
    #[default]
    Auto,
    /// With every front-end: none has a balloon, nor gives back memory in another way while disks are in use.
    Always,
    /// Not at all: every transfer looks its pages up.
    Never,
    /// All of it, as soon as it is used, whatever that costs: for tests.
    #[value(skip)]
    AtOnce,
}

/// Smallest chunk, as a power of two: 512 KiB. Registering one takes 8 µs, what 17 requests save, if its pages are there, and
/// 0.3 ms if it has none yet.
const CHUNK_LOG2: u32 = 19;
/// Most chunks of a queue, as many as the kernel takes. Larger memory has larger chunks.
const MAX_CHUNKS: usize = 1 << 14;
/// The largest that the kernel takes.
const MAX_CHUNK_LOG2: u32 = 30;
/// A chunk is registered when it has been used once for so many bytes of it: half its pages.
const BYTES_PER_USE: usize = 8192;
/// What a chunk's count of uses is when it is registered.
const REGISTERED: u32 = u32::MAX;

/// A region that may be registered.
#[derive(Debug)]
struct Area {
    address: usize,
    length: usize,
    /// The number of its first chunk.
    first: usize,
}

/// What of a guest's memory is registered with a ring. Only the ring's thread has it.
#[derive(Debug)]
pub(super) struct Registered {
    register: Register,
    /// Stays mapped, so that no other memory can be where something registered is.
    view: Option<Arc<View>>,
    areas: Vec<Area>,
    chunk_log2: u32,
    /// How often each chunk was used, or [`REGISTERED`].
    uses: Vec<u32>,
    /// After how many uses; `None`: the kernel has refused, or nothing is to be registered.
    worth: Option<u32>,
    /// The kernel has a table for this ring.
    table: bool,
    bytes: u64,
}

impl Registered {
    /// Nothing yet.
    pub(super) fn new(register: Register) -> Self {
        Self {
            register,
            view: None,
            areas: Vec::new(),
            chunk_log2: CHUNK_LOG2,
            uses: Vec::new(),
            worth: None,
            table: false,
            bytes: 0,
        }
    }

    /// Bytes registered now.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Nothing is looked up until the guest's memory is known anew.
    pub(super) fn suspend(&mut self) {
        self.areas.clear();
    }

    /// The guest's memory is `view` from now on: nothing of another one is used any more. What is under way stays valid.
    pub(super) fn use_memory(&mut self, submitter: &Submitter<'_>, view: &Arc<View>) {
        let had_table = self.table;
        *self = Self::new(self.register);
        if had_table && let Err(e) = submitter.unregister_buffers() {
            // Nothing looks at it any more, and no other can be made in its place.
            info!("guest memory is not registered any more, for what was cannot be forgotten: {e}");
            return;
        }
        if self.register == Register::Never {
            return;
        }
        let regions = view.mapped().filter(|region| region.stays || self.register != Register::Auto);
        let regions: Vec<_> = regions.collect();
        let chunks = |log2: u32| regions.iter().map(|r| r.length.div_ceil(1 << log2)).sum::<usize>();
        let fits = |log2: &u32| chunks(*log2) <= MAX_CHUNKS;
        let Some(chunk_log2) = (CHUNK_LOG2..=MAX_CHUNK_LOG2).find(fits) else { return };
        for region in regions {
            let first = self.areas.last().map_or(0, |a| a.first + a.length.div_ceil(1 << chunk_log2));
            self.areas.push(Area { address: region.address, length: region.length, first });
        }
        let Some(last) = self.areas.last() else { return };
        self.uses.resize(last.first + last.length.div_ceil(1 << chunk_log2), 0);
        let worth = if self.register == Register::AtOnce { 1 } else { (1 << chunk_log2) / BYTES_PER_USE };
        self.worth = u32::try_from(worth).ok();
        self.chunk_log2 = chunk_log2;
        self.view = Some(view.clone());
    }

    /// The registered buffer that a transfer's memory is all in; registers it if that has become worth it.
    pub(super) fn buffer(&mut self, submitter: &Submitter<'_>, iovec: &libc::iovec) -> Option<u16> {
        let (number, chunk) = self.chunk(iovec)?;
        let uses = self.uses.get_mut(usize::from(number))?;
        if *uses != REGISTERED {
            let worth = self.worth?;
            *uses += 1;
            if *uses < worth {
                return None;
            }
            *uses = REGISTERED;
            if let Err(e) = self.register(submitter, number, chunk) {
                info!("no more guest memory is registered, which costs CPU time: {e}");
                self.uses[usize::from(number)] = 0;
                self.worth = None;
                return None;
            }
        }
        Some(number)
    }

    fn register(&mut self, submitter: &Submitter<'_>, number: u16, chunk: libc::iovec) -> io::Result<()> {
        if !self.table {
            // Linux 5.19.
            submitter.register_buffers_sparse(u32::try_from(self.uses.len()).unwrap_or(u32::MAX))?;
            self.table = true;
        }
        // SAFETY: it is guest memory, which `view` keeps mapped. The kernel holds its pages from here on, and does not look at the
        // addresses again.
        unsafe { submitter.register_buffers_update(number.into(), &[chunk], None) }?;
        self.bytes += chunk.iov_len as u64;
        Ok(())
    }

    /// The chunk that memory lies in, and its number; `None`: it is not all in one.
    fn chunk(&self, iovec: &libc::iovec) -> Option<(u16, libc::iovec)> {
        let first = iovec.iov_base.addr();
        let last = first.checked_add(iovec.iov_len.checked_sub(1)?)?;
        let area = self.areas.iter().find(|a| a.address <= first && last - a.address < a.length)?;
        let chunk = (first - area.address) >> self.chunk_log2;
        if (last - area.address) >> self.chunk_log2 != chunk {
            return None;
        }
        let from = chunk << self.chunk_log2;
        let iov_len = (1 << self.chunk_log2).min(area.length - from);
        let iov_base = std::ptr::without_provenance_mut(area.address + from);
        Some((u16::try_from(area.first + chunk).ok()?, libc::iovec { iov_base, iov_len }))
    }
}

#[cfg(test)]
mod tests {
    use io_uring::IoUring;
    use offload_card::memory::{GuestMemory, MemoryTable};
    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

    use super::*;

    const CHUNK: usize = 1 << CHUNK_LOG2;

    /// Memory with regions of these sizes, with room between them for the guest; and a queue's ring.
    fn memory(sizes: &[usize], protection: i32) -> (IoUring, Arc<View>) {
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let regions = (0..).zip(sizes).map(|(i, &size)| {
            let mapping = MmapRegion::build(None, size, protection, flags).unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(i << 40)).unwrap()
        });
        let memory = GuestMemory::from_regions(regions.collect()).unwrap();
        (IoUring::new(4).unwrap(), MemoryTable::from_view(memory).view())
    }

    fn at(address: usize, iov_len: usize) -> libc::iovec {
        libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len }
    }

    const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

    #[test]
    fn a_chunk_is_registered_when_half_its_pages_could_have_been_used() {
        let (ring, view) = memory(&[CHUNK + 4096, 2 * CHUNK], READ_WRITE);
        let first = view.mapped().next().unwrap().address;
        let mut registered = Registered::new(Register::Always);
        assert_eq!(registered.buffer(&ring.submitter(), &at(first, 4096)), None, "memory is not known yet");
        registered.use_memory(&ring.submitter(), &view);
        for _ in 1..64 {
            assert_eq!(registered.buffer(&ring.submitter(), &at(first + 8192, 4096)), None);
        }
        assert_eq!(registered.bytes(), 0);
        assert_eq!(registered.buffer(&ring.submitter(), &at(first, 4096)), Some(0));
        assert_eq!((registered.bytes(), registered.chunk(&at(first, 1)).unwrap().0), (CHUNK as u64, 0));
        // Its neighbour is not, and is what is left of the region.
        for _ in 1..64 {
            assert_eq!(registered.buffer(&ring.submitter(), &at(first + CHUNK, 512)), None);
        }
        assert_eq!(registered.buffer(&ring.submitter(), &at(first + CHUNK, 512)), Some(1));
        assert_eq!(registered.bytes(), CHUNK as u64 + 4096);
        // Other memory begins anew, also if it is the same.
        registered.use_memory(&ring.submitter(), &view);
        assert_eq!((registered.bytes(), registered.buffer(&ring.submitter(), &at(first, 4096))), (0, None));
    }

    #[test]
    fn memory_of_others_is_not_registered_unless_told_to() {
        let (ring, view) = memory(&[CHUNK], READ_WRITE);
        let first = view.mapped().next().unwrap().address;
        for (register, number) in
            [(Register::Auto, None), (Register::Never, None), (Register::AtOnce, Some(0))]
        {
            let mut registered = Registered::new(register);
            registered.use_memory(&ring.submitter(), &view);
            assert_eq!(registered.buffer(&ring.submitter(), &at(first, 4096)), number, "{register:?}");
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_not_asked_for_again() {
        let (ring, view) = memory(&[CHUNK, CHUNK], libc::PROT_READ);
        let mut registered = Registered::new(Register::AtOnce);
        registered.use_memory(&ring.submitter(), &view);
        for region in view.mapped() {
            assert_eq!(registered.buffer(&ring.submitter(), &at(region.address, 4096)), None);
        }
        assert_eq!((registered.bytes(), registered.worth), (0, None));
    }

    proptest! {
        /// A number stands for the chunk that all of the memory is in, and for no other.
        #[test]
        fn a_number_is_a_chunk(
            sizes in prop::collection::vec(1usize..5 << 20, 1..4),
            region in any::<prop::sample::Index>(),
            offset in any::<prop::sample::Index>(),
            length in 0usize..2 << 20,
        ) {
            let sizes: Vec<_> = sizes.iter().map(|size| size.next_multiple_of(4096)).collect();
            let (ring, view) = memory(&sizes, READ_WRITE);
            let mut registered = Registered::new(Register::Always);
            registered.use_memory(&ring.submitter(), &view);
            let at_region = region.index(sizes.len());
            let offset = offset.index(sizes[at_region] + 4096);
            let base = view.mapped().nth(at_region).unwrap().address;
            let within = length > 0 && offset + length <= sizes[at_region];
            let one = within && offset / CHUNK == (offset + length - 1) / CHUNK;
            let chunk = registered.chunk(&at(base + offset, length));
            // What lies behind a region may be another one's.
            prop_assert!(offset >= sizes[at_region] || chunk.is_some() == one);
            if let Some((number, chunk)) = chunk.filter(|_| within) {
                let before: usize = sizes[..at_region].iter().map(|size| size.div_ceil(CHUNK)).sum();
                prop_assert_eq!(usize::from(number), before + offset / CHUNK);
                let (from, to) = (chunk.iov_base.addr(), chunk.iov_base.addr() + chunk.iov_len);
                prop_assert!(from <= base + offset && base + offset + length <= to);
                prop_assert!(base <= from && to <= base + sizes[at_region] && chunk.iov_len <= CHUNK);
            }
        }

        /// Whatever there is, the kernel's table has room for it.
        #[test]
        fn large_memory_has_large_chunks(gib in 1u64..20_000) {
            let size = usize::try_from(gib).unwrap() << 30;
            let (ring, view) = memory(&[4096, size], libc::PROT_NONE);
            let mut registered = Registered::new(Register::Always);
            registered.use_memory(&ring.submitter(), &view);
            prop_assert!(registered.uses.len() <= MAX_CHUNKS);
            prop_assert!(registered.uses.is_empty() == (gib > 16_000) || (15_999..=16_384).contains(&gib));
            let region = view.mapped().nth(1).unwrap();
            let last = registered.chunk(&at(region.address + size - 4096, 4096));
            prop_assert!(last.is_none_or(|(number, _)| usize::from(number) + 1 == registered.uses.len()));
        }
    }
}
