//! A disk image as a file that nobody else writes to: raw files and block devices.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use proto::error::Error;
use proto::v1::ErrorReason;
use tonic::Code;

/// Unit of a virtio-blk request, in bytes (VirtIO 1.3 section 5.2.6).
pub const SECTOR_BYTES: u64 = 512;

/// Longest image, in bytes: what a file offset can say, in blocks of any size.
const MAX_BYTES: u64 = 1 << 62;

/// How long a locked image is waited for. The kernel keeps a lock until the last request of a process that was killed is
/// done with: so its successor waits here, and no old write can land on top of a new one.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// What a disk image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Length in bytes, a multiple of the logical block size.
    pub size_bytes: u64,
    /// Smallest unit of I/O in bytes: 512 or more, a power of two.
    pub logical_block: u32,
    /// Unit below which a write costs a read, in bytes; a multiple of the logical block size.
    pub physical_block: u32,
    /// A block device, not a file.
    pub block_device: bool,
    /// Alignment that buffers must have in memory, in bytes: 1 unless opened with O_DIRECT.
    pub memory_alignment: u32,
}

impl Geometry {
    /// Unit in which ranges can be given back or zeroed without writing, in bytes.
    pub(crate) fn erase_alignment(&self) -> u64 {
        // A file system zeroes parts of blocks by itself.
        if self.block_device { u64::from(self.logical_block) } else { 1 }
    }
}

/// An open disk image.
#[derive(Debug)]
pub struct Image {
    path: String,
    file: File,
    /// The same without O_DIRECT, if `file` has it: for what is not aligned. The kernel keeps both in step.
    buffered: Option<File>,
    geometry: Geometry,
    read_only: bool,
    /// Space can be given back, and ranges can be zeroed without writing, as far as is known.
    punches: AtomicBool,
    zeroes: AtomicBool,
}

impl Image {
    /// Opens and locks `path`: one writer, or any number of readers.
    pub fn open(path: &str, read_only: bool, direct: bool) -> Result<Self, Error> {
        let image = Self::open_unlocked(path, read_only, direct)?;
        check_size(path, &image.geometry)?;
        image.lock(path)?;
        Ok(image)
    }

    /// As [`Image::open`], for a file that has a disk in it, and any size of its own.
    pub(crate) fn open_container(path: &str, read_only: bool, direct: bool) -> Result<Self, Error> {
        let image = Self::open_unlocked(path, read_only, direct)?;
        image.lock(path)?;
        Ok(image)
    }

    /// Looks at `path` without locking it, as at a raw image.
    pub fn inspect(path: &str) -> Result<Geometry, Error> {
        let geometry = Self::peek(path)?.geometry;
        check_size(path, &geometry)?;
        Ok(geometry)
    }

    /// Opens `path` without locking it, to look at it.
    pub(crate) fn peek(path: &str) -> Result<Self, Error> {
        Self::open_unlocked(path, true, false)
    }

    fn open_unlocked(path: &str, read_only: bool, direct: bool) -> Result<Self, Error> {
        if !Path::new(path).is_absolute() {
            let message = format!("disk image path {path:?} is not absolute");
            return Err(Error::invalid_field("path", message)
                .resource(path)
                .remedy("give the path from / on"));
        }
        // Before opening: opening a FIFO would wait, opening a device may do something.
        let kind = std::fs::metadata(path).map_err(|e| open_error(path, read_only, direct, &e))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() { "a directory" } else { "neither a file nor a block device" };
            return Err(invalid(path, what).remedy("give a raw image file or a block device"));
        }
        let mut flags = libc::O_CLOEXEC | libc::O_NOCTTY;
        if direct {
            flags |= libc::O_DIRECT;
        }
        if kind.is_block_device() && !read_only {
            // The kernel then refuses a device that is mounted or part of something.
            flags |= libc::O_EXCL;
        }
        let file =
            patiently(|| OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path))
                .map_err(|e| open_error(path, read_only, direct, &e))?;
        // Only for its owner, and nobody minds if not: every read would look whether it is time to note when it was read.
        let _ = fcntl(
            &file,
            FcntlArg::F_SETFL(OFlag::O_NOATIME | OFlag::from_bits_truncate(flags & libc::O_DIRECT)),
        );
        let geometry = geometry(path, &file, direct)?;
        let buffered = direct.then(|| {
            // The very same file, whatever the path names by now.
            let again = format!("/proc/self/fd/{}", file.as_raw_fd());
            OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_CLOEXEC).open(again)
        });
        let buffered = buffered.transpose().map_err(|e| host("open", path, &e))?;
        let punches = AtomicBool::new(!read_only && (geometry.block_device || sys::punches_holes(&file)));
        Ok(Self {
            path: path.into(),
            file,
            buffered,
            geometry,
            read_only,
            punches,
            zeroes: AtomicBool::new(true),
        })
    }

    /// `file` as an image, without looking at it.
    #[cfg(test)]
    pub(crate) fn for_test(file: File, geometry: Geometry) -> Self {
        let (punches, zeroes) = (AtomicBool::new(true), AtomicBool::new(true));
        Self { path: String::new(), file, buffered: None, geometry, read_only: false, punches, zeroes }
    }

    fn lock(&self, path: &str) -> Result<(), Error> {
        let lock = libc::flock {
            l_type: (if self.read_only { libc::F_RDLCK } else { libc::F_WRLCK }) as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        let set = || fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)).map(drop).map_err(io::Error::from);
        patiently(set).map_err(|e| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::PermissionDenied | ErrorKind::ResourceBusy => in_use(path),
            _ => host("lock", path, &e),
        })
    }

    /// What it was opened as.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Length of the file now, in bytes.
    pub(crate) fn length(&self) -> io::Result<u64> {
        length(&self.file)
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The open file, by way of the page cache.
    pub fn buffered(&self) -> &File {
        self.buffered.as_ref().unwrap_or(&self.file)
    }

    /// [`Image::file`] goes around the page cache.
    pub fn direct(&self) -> bool {
        self.buffered.is_some()
    }

    /// What it is.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Nothing can be written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Makes an image that is `from` bytes long `to` bytes long; 0: as long as it has become. Its length then.
    pub(crate) fn resize(&self, from: u64, to: u64) -> Result<u64, Error> {
        let path = &self.path;
        let now = length(&self.file).map_err(|e| host("measure", path, &e))?;
        let block = u64::from(self.geometry.logical_block);
        // A file may have been made longer by hand, and not yet be whole.
        let to = if to == 0 { now - now % block } else { to };
        self.check_resize(from, to, MAX_BYTES)?;
        if to > now {
            if self.geometry.block_device {
                let message = format!("block device {path} is {now} bytes long, which is less than {to}");
                return Err(Error::new(Code::FailedPrecondition, ErrorReason::DiskInvalid, message)
                    .resource(path)
                    .remedy("make the device longer first (e.g. lvextend), then resize without a size"));
            }
            if self.read_only {
                return Err(invalid(path, "read-only").remedy("make the file longer yourself (truncate -s)"));
            }
            self.file.set_len(to).map_err(|e| host("make longer", path, &e))?;
        }
        Ok(to)
    }

    /// A disk of `from` bytes on it can become `to` bytes long, of `max`.
    pub(crate) fn check_resize(&self, from: u64, to: u64, max: u64) -> Result<(), Error> {
        let (path, block) = (&self.path, u64::from(self.geometry.logical_block));
        if to < from {
            let message =
                format!("disk image {path} is {from} bytes long for its guest, and {to} bytes are less");
            return Err(Error::invalid_field("size_bytes", message)
                .resource(path)
                .remedy("a disk only grows; copy what you need to a smaller one"));
        }
        if !to.is_multiple_of(block) || to > max {
            let message = format!("{to} bytes are not a multiple of {block} up to {max}");
            return Err(Error::invalid_field("size_bytes", message).resource(path));
        }
        Ok(())
    }

    /// Space can be given back (fallocate's PUNCH_HOLE).
    pub(crate) fn punches(&self) -> bool {
        self.punches.load(Ordering::Relaxed)
    }

    /// It cannot.
    pub(crate) fn cannot_punch(&self) {
        self.punches.store(false, Ordering::Relaxed);
    }

    /// Ranges can be zeroed without writing (fallocate's ZERO_RANGE).
    pub(crate) fn zeroes(&self) -> bool {
        self.zeroes.load(Ordering::Relaxed)
    }

    /// They cannot.
    pub(crate) fn cannot_zero(&self) {
        self.zeroes.store(false, Ordering::Relaxed);
    }
}

/// Tries again while somebody else has it, for [`LOCK_PATIENCE`].
fn patiently<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let since = Instant::now();
    loop {
        match attempt() {
            Err(e)
                if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ResourceBusy)
                    && since.elapsed() < LOCK_PATIENCE =>
            {
                // Guests wait for it.
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return other,
        }
    }
}

/// Length of a file or a block device in bytes.
fn length(file: &File) -> io::Result<u64> {
    // Nobody else uses its position.
    (&*file).seek(SeekFrom::End(0))
}

fn geometry(path: &str, file: &File, direct: bool) -> Result<Geometry, Error> {
    let metadata = file.metadata().map_err(|e| host("look at", path, &e))?;
    let block_device = metadata.file_type().is_block_device();
    let size = length(file).map_err(|e| host("measure", path, &e))?;
    let (size_bytes, mut logical_block, mut physical_block) = if block_device {
        let (logical, physical) = sys::block_sizes(file).map_err(|e| host("measure", path, &e))?;
        (size, logical, physical)
    } else {
        // The page cache and the file system work in blocks of this size.
        (size, 512, u32::try_from(metadata.blksize()).unwrap_or(4096))
    };
    let mut memory_alignment = 1;
    if direct {
        let (memory, offset) = sys::direct_alignment(file).map_err(|e| host("measure", path, &e))?;
        memory_alignment = memory;
        logical_block = logical_block.max(offset);
    }
    if !physical_block.is_power_of_two() || physical_block < logical_block {
        physical_block = logical_block;
    }
    Ok(Geometry { size_bytes, logical_block, physical_block, block_device, memory_alignment })
}

/// Whether a disk of this size can be served.
pub(crate) fn check_size(path: &str, geometry: &Geometry) -> Result<(), Error> {
    let Geometry { size_bytes, logical_block, .. } = *geometry;
    if size_bytes == 0 {
        return Err(invalid(path, "empty").remedy(format!("give it a size: truncate -s 10G {path}")));
    }
    if !size_bytes.is_multiple_of(SECTOR_BYTES) {
        let what = format!("{size_bytes} bytes long, which is not a multiple of {SECTOR_BYTES}");
        let remedy = format!("extend it with zeros: truncate -s %{SECTOR_BYTES} {path}");
        return Err(invalid(path, &what).remedy(remedy));
    }
    if !size_bytes.is_multiple_of(u64::from(logical_block)) {
        let what =
            format!("{size_bytes} bytes long, and direct I/O on it works in blocks of {logical_block}");
        let remedy =
            format!("extend it with zeros (truncate -s %{logical_block} {path}), or do without direct");
        return Err(invalid(path, &what).remedy(remedy));
    }
    Ok(())
}

/// The few calls that std and nix have not.
mod sys {
    use super::{AsRawFd, File, io};

    nix::ioctl_read_bad!(logical_block_size, libc::BLKSSZGET, libc::c_int);
    nix::ioctl_read_bad!(physical_block_size, libc::BLKPBSZGET, libc::c_uint);

    /// Logical and physical block size of a block device, in bytes.
    pub(super) fn block_sizes(file: &File) -> io::Result<(u32, u32)> {
        let (mut logical, mut physical) = (0, 0);
        // SAFETY: both write one integer to where the reference points.
        unsafe {
            logical_block_size(file.as_raw_fd(), &raw mut logical)?;
            physical_block_size(file.as_raw_fd(), &raw mut physical)?;
        }
        let logical = u32::try_from(logical).ok().filter(|b| b.is_power_of_two() && *b >= 512);
        Ok((logical.ok_or_else(|| io::Error::other("the kernel gave no block size"))?, physical))
    }

    /// The file's file system gives space back. Nothing is changed by asking: behind its end there is nothing.
    pub(super) fn punches_holes(file: &File) -> bool {
        let Ok(end) = file.metadata().map(|m| m.len()) else { return false };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let offset = end.next_multiple_of(4096) as libc::off_t;
        // SAFETY: it takes no pointers.
        unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, 4096) == 0 }
    }

    /// How O_DIRECT wants memory and offsets aligned, in bytes.
    pub(super) fn direct_alignment(file: &File) -> io::Result<(u32, u32)> {
        // SAFETY: plain old data, for which zeros are valid.
        let mut stat: libc::statx = unsafe { std::mem::zeroed() };
        let mask = libc::STATX_DIOALIGN;
        // SAFETY: the path is a C string, and `stat` is one statx buffer.
        let done =
            unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut stat) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
        if stat.stx_mask & mask != 0 && memory.is_power_of_two() && offset.is_power_of_two() {
            return Ok((memory, offset.max(512)));
        }
        // A kernel or file system that does not say (before Linux 6.1): a page is right for all of them.
        Ok((4096, 4096))
    }
}

fn invalid(path: &str, what: &str) -> Error {
    Error::new(Code::FailedPrecondition, ErrorReason::DiskInvalid, format!("disk image {path} is {what}"))
        .resource(path)
}

fn in_use(path: &str) -> Error {
    Error::new(
        Code::FailedPrecondition,
        ErrorReason::DiskInUse,
        format!("disk image {path} is in use elsewhere"),
    )
    .resource(path)
    .remedy("stop what uses it (a VM, a mount, another tool), or attach it read-only everywhere")
}

fn host(what: &str, path: &str, e: &io::Error) -> Error {
    let error =
        Error::new(Code::Internal, ErrorReason::Host, format!("cannot {what} disk image {path}: {e}"));
    let error = error.resource(path).remedy("look at the host's kernel log");
    match e.raw_os_error() {
        Some(errno) => error.with("errno", errno.to_string()),
        None => error,
    }
}

fn open_error(path: &str, read_only: bool, direct: bool, e: &io::Error) -> Error {
    let access = if read_only { "read" } else { "read and write" };
    match e.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => Error::new(
            Code::NotFound,
            ErrorReason::DiskNotFound,
            format!("disk image {path} does not exist"),
        )
        .resource(path)
        .remedy("check the path; the storage card must see it, too"),
        ErrorKind::PermissionDenied => Error::new(
            Code::PermissionDenied,
            ErrorReason::PermissionDenied,
            format!("the storage card may not {access} disk image {path}"),
        )
        .resource(path)
        .remedy("let its user (outboard-blk) do so, e.g. by setfacl -m u:outboard-blk:rw, and pass the directories"),
        ErrorKind::ReadOnlyFilesystem => {
            invalid(path, "on a read-only file system").remedy("attach it read-only")
        }
        ErrorKind::ResourceBusy => in_use(path),
        ErrorKind::InvalidInput if direct => Error::new(
            Code::FailedPrecondition,
            ErrorReason::Unsupported,
            format!("the file system of disk image {path} has no direct I/O"),
        )
        .resource(path)
        .remedy("create the disk without direct"),
        _ => host("open", path, e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    fn reason(result: Result<Image, Error>) -> ErrorReason {
        result.unwrap_err().reason()
    }

    #[test]
    fn bad_images_are_named() {
        let open = |path: &str| Image::open(path, false, false);
        assert_eq!(reason(open("/nowhere/x.img")), ErrorReason::DiskNotFound);
        assert_eq!(reason(open("x.img")), ErrorReason::InvalidField);
        assert_eq!(reason(open("/tmp")), ErrorReason::DiskInvalid);
        assert_eq!(reason(open("/dev/null")), ErrorReason::DiskInvalid);
        for size in [0, 511, 1000] {
            let file = image(size);
            let e = open(file.path().to_str().unwrap()).unwrap_err();
            assert_eq!(e.reason(), ErrorReason::DiskInvalid);
            assert!(e.to_string().contains(file.path().to_str().unwrap()), "{e}");
            assert!(e.to_string().contains("truncate"), "{e}");
        }
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(4096);
        let path = file.path().to_str().unwrap();
        let open = |read_only| Image::open(path, read_only, false);
        let writer = open(false).unwrap();
        assert_eq!(reason(open(false)), ErrorReason::DiskInUse);
        assert_eq!(reason(open(true)), ErrorReason::DiskInUse);
        assert_eq!(Image::inspect(path).unwrap().size_bytes, 4096);
        drop(writer);
        let (first, second) = (open(true).unwrap(), open(true).unwrap());
        assert_eq!(reason(open(false)), ErrorReason::DiskInUse);
        drop((first, second));
        open(false).unwrap();
    }

    #[test]
    fn geometry_of_a_file() {
        let file = image(1 << 20);
        let g = Image::inspect(file.path().to_str().unwrap()).unwrap();
        assert_eq!((g.size_bytes, g.logical_block, g.memory_alignment), (1 << 20, 512, 1));
        assert!(g.physical_block >= 512 && g.physical_block.is_power_of_two() && !g.block_device);
    }
}
