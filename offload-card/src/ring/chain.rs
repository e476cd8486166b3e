//! A descriptor chain taken from a ring: where in guest memory a request's data is.

use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::RingError;
use super::spans::Spans;
use crate::memory::View;

/// How often the buffers of a chain may cross from one memory region into the next. A front-end shares a handful of
/// regions, unless it wants our pieces to become many.
const MAX_CROSSINGS: usize = 64;

/// A contiguous piece of a chain, in this process' address space. It is only an address: valid as long as the [`Chain`]
/// it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    address: usize,
    length: u32,
}

// A length of 0 never becomes a segment.
#[allow(clippy::len_without_is_empty)]
impl Segment {
    /// Length in bytes, not 0.
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// The piece as the kernel wants it. Using it is safe as long as the chain is kept.
    pub fn iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.address as *mut libc::c_void, iov_len: self.len() }
    }

    /// The piece as volatile memory.
    ///
    /// # Safety
    ///
    /// The chain it came from, which checked it and keeps its memory mapped, is neither filled anew nor dropped in `'a`.
    unsafe fn volatile<'a>(self) -> VolatileSlice<'a> {
        // SAFETY: `Chain::add` found these bytes in guest memory, and the caller keeps the chain.
        unsafe { VolatileSlice::new(self.address as *mut u8, self.len()) }
    }
}

/// A descriptor chain: first what the driver wants read, then where it wants an answer written.
///
/// A `Chain` is a buffer to be used again and again ([`super::Ring::pop`] fills it): in steady state popping allocates
/// nothing. It keeps the memory it points into mapped.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// How many of the segments come first and are to be read.
    readable: usize,
    readable_len: u32,
    writable_len: u32,
    /// Descriptors it was made of; those of length 0 have no segment.
    descriptors: u16,
    memory: Option<Arc<View>>,
}

impl Chain {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Index of its first descriptor: its name in the ring. [`super::Ring::push`] takes it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What is to be read.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// What is to be written.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// Bytes to be read.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes that may be written.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Descriptors in the ring or in its indirect table, those without a byte included: what it cost to look at it.
    pub fn descriptors(&self) -> u16 {
        self.descriptors
    }

    /// The pieces of this chain as volatile memory, those to be read.
    pub fn readable_slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        // SAFETY: the chain's own segments, and no longer than it is borrowed.
        self.readable().iter().map(|s| unsafe { s.volatile() })
    }

    /// The pieces of this chain as volatile memory, those to be written.
    pub fn writable_slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        // SAFETY: the chain's own segments, and no longer than it is borrowed.
        self.writable().iter().map(|s| unsafe { s.volatile() })
    }

    /// Copies what is to be read from `offset` on into `data`; fewer bytes than asked for if the chain ends.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in from_offset(self.readable_slices(), offset) {
            if done == data.len() {
                break;
            }
            done += slice.copy_to(&mut data[done..]);
        }
        done
    }

    /// Copies `data` to `offset` of what may be written; fewer bytes than given if the chain ends.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in from_offset(self.writable_slices(), offset) {
            if done == data.len() {
                break;
            }
            let part = slice.len().min(data.len() - done);
            slice.copy_from(&data[done..done + part]);
            done += part;
        }
        done
    }

    /// Copies `length` bytes of what is to be read here, from `offset` on, to `target_offset` of what may be written
    /// there: straight from one guest's memory into another's. Fewer if one of the chains ends.
    pub fn copy_to(&self, offset: usize, target: &Chain, target_offset: usize, length: usize) -> usize {
        let mut from = from_offset(self.readable_slices(), offset);
        let mut to = from_offset(target.writable_slices(), target_offset);
        let (mut source, mut destination) = (from.next(), to.next());
        let mut done = 0;
        while done < length {
            let (Some(s), Some(d)) = (source, destination) else {
                break;
            };
            let part = s.len().min(d.len()).min(length - done);
            // `part` is within both, so that neither can fail; if it did, the chain would just end.
            let (Ok(piece), Ok(rest_s), Ok(rest_d)) = (s.subslice(0, part), s.offset(part), d.offset(part))
            else {
                break;
            };
            piece.copy_to_volatile_slice(d);
            done += part;
            source = if rest_s.is_empty() { from.next() } else { Some(rest_s) };
            destination = if rest_d.is_empty() { to.next() } else { Some(rest_d) };
        }
        done
    }

    /// Starts anew with a chain that begins at `head` in `memory`.
    pub(super) fn begin(&mut self, head: u16, memory: &Arc<View>) {
        self.head = head;
        self.segments.clear();
        self.readable = 0;
        self.readable_len = 0;
        self.writable_len = 0;
        self.descriptors = 0;
        // The same memory again, nearly always: then no count is touched.
        if !self.is_in(memory) {
            self.memory = Some(memory.clone());
        }
    }

    /// It keeps `memory`, and no other.
    pub(super) fn is_in(&self, memory: &Arc<View>) -> bool {
        self.memory.as_ref().is_some_and(|m| Arc::ptr_eq(m, memory))
    }

    /// It keeps no memory.
    pub(super) fn is_clear(&self) -> bool {
        self.memory.is_none()
    }

    /// Adds the buffer of one descriptor; `spans` are those of the memory it began with.
    pub(super) fn add(
        &mut self,
        address: u64,
        length: u32,
        writable: bool,
        spans: &mut Spans,
    ) -> Result<(), RingError> {
        if !writable && self.segments.len() > self.readable {
            return Err(RingError::Order { head: self.head });
        }
        // A table has at most 32768 entries.
        self.descriptors = self.descriptors.saturating_add(1);
        let sum = if writable { &mut self.writable_len } else { &mut self.readable_len };
        *sum = sum.checked_add(length).ok_or(RingError::TooLong { head: self.head })?;
        let (mut at, mut left) = (address, length);
        while left > 0 {
            // A buffer may span regions that are neighbours for the guest and strangers here.
            let Some((address, part)) = spans.translate(at, left) else {
                return Err(RingError::Buffer { head: self.head, address, length });
            };
            self.segments.push(Segment { address, length: part });
            // The last byte of the part is in the region, which does not wrap around.
            at = at.wrapping_add(u64::from(part));
            left -= part;
            if left > 0 && self.segments.len() >= usize::from(self.descriptors) + MAX_CROSSINGS {
                return Err(RingError::Pieces { head: self.head });
            }
        }
        if !writable {
            self.readable = self.segments.len();
        }
        Ok(())
    }

    /// Empties it and lets go of the memory it points into, so that a mapping the front-end removed can go. For an
    /// engine that keeps chains for long without using them.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.readable = 0;
        (self.readable_len, self.writable_len, self.descriptors) = (0, 0, 0);
        self.memory = None;
    }
}

/// `slices` without their first `offset` bytes.
fn from_offset<'a>(
    slices: impl Iterator<Item = VolatileSlice<'a>>,
    offset: usize,
) -> impl Iterator<Item = VolatileSlice<'a>> {
    let mut skip = offset;
    slices.filter_map(move |slice| {
        let here = skip.min(slice.len());
        skip -= here;
        slice.offset(here).ok().filter(|rest| !rest.is_empty())
    })
}
