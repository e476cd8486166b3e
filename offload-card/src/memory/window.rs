//! Files of the host's, mapped for reading.

use std::fs::File;
use std::io;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::cut::{Guard, Quota};
use super::{CACHE_LINE, prefetch};

/// The beginning of a file, mapped: what of it is in the page cache can be copied into guest memory without a system call.
/// If somebody cuts the file meanwhile, or its storage fails, that is found out.
#[derive(Debug)]
pub struct Window {
    mapping: MmapRegion<()>,
    /// Dropped after the mapping, as fields are in order.
    guard: Guard,
}

impl Window {
    /// Maps the first `bytes` of a file.
    ///
    /// # Errors
    /// The file cannot be mapped, or too many mappings are guarded already.
    pub fn new(file: &File, bytes: usize) -> io::Result<Self> {
        let file = FileOffset::new(file.try_clone()?, 0);
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let mapping =
            MmapRegion::build(Some(file), bytes, libc::PROT_READ, flags).map_err(io::Error::other)?;
        let guard = Guard::always(&mapping, 0, &Quota::default())?;
        // If something is not there after all, only that is to be read, and not what is around it. No more than advice.
        // SAFETY: it is our mapping, whose content stays as it is.
        unsafe { libc::madvise(mapping.as_ptr().cast(), bytes, libc::MADV_RANDOM) };
        Ok(Self { mapping, guard })
    }

    /// Length in bytes.
    pub fn size(&self) -> usize {
        self.mapping.size()
    }

    /// Has the processor fetch the beginning of what is at `offset`, and does not wait for it. It finds the rest by itself.
    pub fn prefetch(&self, offset: usize) {
        if let Ok(slice) = self.mapping.get_slice(offset, 2 * CACHE_LINE) {
            let address = slice.ptr_guard().as_ptr() as usize;
            prefetch(address);
            prefetch(address + CACHE_LINE);
        }
    }

    /// Copies what is at `offset` into memory; waits for the storage if it must. False: it is not all there, and the memory has
    /// rubbish. The window is of no use any more then. Behind the end of a file, in its last page, there are zeros, as in all
    /// mappings.
    ///
    /// # Safety
    ///
    /// The memory that the iovecs name is valid.
    pub unsafe fn read(&self, mut offset: usize, iovecs: &[libc::iovec]) -> bool {
        for iovec in iovecs {
            let Ok(from) = self.mapping.get_slice(offset, iovec.iov_len) else { return false };
            // SAFETY: the caller's promise is ours.
            let to = unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) };
            from.copy_to_volatile_slice(to);
            offset += iovec.iov_len;
        }
        // What puts other pages there says so before it does.
        fence(Ordering::Acquire);
        !self.guard.has_replaced()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(pages: usize) -> File {
        let file = tempfile::tempfile().unwrap();
        for page in 0..pages {
            file.write_all_at(&[page as u8 + 1; 4096], page as u64 * 4096).unwrap();
        }
        file
    }

    fn read(window: &Window, offset: usize, data: &mut [u8]) -> bool {
        let (first, second) = data.split_at_mut(data.len() / 2);
        let iovecs =
            [first, second].map(|d| libc::iovec { iov_base: d.as_mut_ptr().cast(), iov_len: d.len() });
        // SAFETY: both are slices of `data`.
        unsafe { window.read(offset, &iovecs) }
    }

    #[test]
    fn what_is_written_is_read_and_nothing_beyond() {
        let file = file(4);
        let window = Window::new(&file, 4 * 4096).unwrap();
        let mut data = [0; 4096];
        assert!(read(&window, 2048, &mut data));
        assert_eq!((data[0], data[2047], data[2048], data[4095]), (1, 1, 2, 2));
        file.write_all_at(&[9; 10], 4096).unwrap();
        assert!(read(&window, 2048, &mut data));
        assert_eq!((data[2047], data[2048], data[2058]), (1, 9, 2));
        assert!(!read(&window, 3 * 4096 + 1, &mut data));
    }

    #[test]
    fn a_file_that_is_cut_is_found_out() {
        let file = file(4);
        let (window, other) = (Window::new(&file, 4 * 4096).unwrap(), Window::new(&file, 4 * 4096).unwrap());
        let mut data = [0; 4096];
        file.set_len(2 * 4096).unwrap();
        assert!(read(&window, 4096, &mut data));
        assert!(!read(&window, 2 * 4096, &mut data));
        // For good, as what has been put there stays.
        file.set_len(4 * 4096).unwrap();
        assert!(!read(&window, 2 * 4096, &mut data) && !read(&window, 0, &mut data));
        assert!(read(&other, 2 * 4096, &mut data) && data == [0; 4096]);
        drop(window);
        // Its place among the guards knows nothing of it.
        assert!(read(&Window::new(&file, 4 * 4096).unwrap(), 0, &mut data));
    }
}
