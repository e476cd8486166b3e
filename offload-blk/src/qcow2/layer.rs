//! One file of a chain, as crate `imago` wants it: read and written by way of the page cache.

use std::fmt;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use crate::image::Image;
use crate::io::{Op, erase_now};

/// Zeros to be written where nothing better makes them.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

#[derive(Debug)]
pub(super) struct Layer {
    image: Arc<Image>,
    helper: CommonStorageHelper,
}

impl Layer {
    pub(super) fn new(image: Arc<Image>) -> Self {
        Self { image, helper: CommonStorageHelper::default() }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.image.path())
    }
}

impl Storage for Layer {
    fn size(&self) -> io::Result<u64> {
        self.image.length()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut buffer in bufv.into_inner() {
            read(&self.image, &mut buffer, offset)?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        for buffer in bufv.into_inner() {
            self.image.buffered().write_all_at(&buffer, offset)?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        zero(&self.image, Op::Punch, offset, length)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        zero(&self.image, Op::Zero, offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.image.buffered().sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}

/// Fills `buffer` from `offset` on, with zeros behind the end.
pub(super) fn read(image: &Image, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match image.buffered().read_at(buffer, offset) {
            Ok(0) => {
                buffer.fill(0);
                return Ok(());
            }
            Ok(n) => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Makes a range zeros, by the best way there is: `how` is [`Op::Punch`] or [`Op::Zero`].
pub(super) fn zero(image: &Image, how: Op, mut offset: u64, mut length: u64) -> io::Result<()> {
    let align = image.geometry().erase_alignment();
    if offset.is_multiple_of(align) && length.is_multiple_of(align) {
        if how == Op::Punch && image.punches() {
            match erase_now(image, Op::Punch, offset, length) {
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => image.cannot_punch(),
                done => return done,
            }
        }
        if image.zeroes() {
            match erase_now(image, Op::Zero, offset, length) {
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => image.cannot_zero(),
                done => return done,
            }
        }
    }
    while length > 0 {
        let part = length.min(ZEROS.len() as u64);
        image.buffered().write_all_at(&ZEROS[..part as usize], offset)?;
        offset += part;
        length -= part;
    }
    Ok(())
}
