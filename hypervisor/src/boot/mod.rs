//! Direct kernel boot: an ELF by the PVH protocol or a bzImage by Linux's 64-bit protocol.
//!
//! The files are opened, checked, and copied into guest RAM at every boot. They come from the host's user, who may have named
//! anything: nothing in them is believed before it is checked.

mod bzimage;
mod elf;
mod memmap;
mod pvh;
mod sniff;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use proto::error::{Error, ErrorReason};
use tonic::Code;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GRANULE, GuestRam};
use crate::platform::layout;

pub use memmap::{MapEntry, MapKind, memory_map};

/// What to boot, as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootSource {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initial RAM disk's file.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line, at most [`layout::CMDLINE_MAX`] bytes without NUL.
    pub cmdline: String,
}

/// Where and how the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, `ebx` pointing to the start info (PVH).
    Pvh {
        /// First instruction.
        eip: u32,
        /// Guest-physical address of `hvm_start_info`.
        start_info: u64,
    },
    /// 64-bit mode with the identity map, `rsi` pointing to the zero page (Linux boot protocol, 64-bit).
    Linux64 {
        /// First instruction.
        rip: u64,
        /// Guest-physical address of `boot_params`.
        zero_page: u64,
    },
}

/// Random access to a file that may be a kernel. Implemented for files and, in tests, for byte slices.
trait Image {
    fn size(&self) -> io::Result<u64>;
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// The first `N` bytes at `offset`.
    fn array<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}

impl Image for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }
}

/// What is wrong with a kernel: half a sentence that follows the file's name.
#[derive(Debug, PartialEq, Eq)]
struct Invalid(String);

impl Invalid {
    fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

impl From<io::Error> for Invalid {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::UnexpectedEof => Self::new("ends before the kernel in it does: it is cut off"),
            _ => Self(format!("cannot be read: {e}")),
        }
    }
}

/// A kernel, checked.
#[derive(Debug)]
enum Kernel {
    Elf(elf::Kernel),
    BzImage(bzimage::Kernel),
}

impl Kernel {
    fn parse(image: &impl Image) -> Result<Self, Invalid> {
        if elf::is_elf(image) {
            return elf::Kernel::parse(image).map(Kernel::Elf);
        }
        if bzimage::is_bzimage(image) {
            return bzimage::Kernel::parse(image).map(Kernel::BzImage);
        }
        Err(Invalid(format!("is {}", sniff::what_is(image))))
    }

    /// First address above all that the kernel needs before it reads its memory map.
    fn end(&self) -> u64 {
        match self {
            Kernel::Elf(k) => k.end(),
            Kernel::BzImage(k) => k.end(),
        }
    }

    /// Last address that an initial RAM disk may use.
    fn initramfs_max(&self) -> u64 {
        match self {
            Kernel::Elf(_) => u64::from(u32::MAX),
            Kernel::BzImage(k) => k.initramfs_max(),
        }
    }
}

/// The opened files of a [`BootSource`]. They stay open for as long as the VM may boot again, so that it boots the same when other
/// files have been put in their place.
#[derive(Debug)]
pub struct BootFiles {
    source: BootSource,
    kernel: File,
    initramfs: Option<File>,
}

/// What is in the files now.
struct Contents {
    kernel: Kernel,
    // Length of the initial RAM disk in bytes; 0 if there is none.
    initramfs: u64,
}

impl BootFiles {
    /// Opens the files.
    ///
    /// # Errors
    /// `KERNEL_NOT_FOUND`, `INITRAMFS_NOT_FOUND`, `PERMISSION_DENIED`, each naming the file.
    pub fn open(source: BootSource) -> Result<Self, Error> {
        let kernel = open(&source.kernel, "kernel", ErrorReason::KernelNotFound, "boot.kernel_path")?;
        let initramfs = match &source.initramfs {
            None => None,
            Some(path) => {
                Some(open(path, "initramfs", ErrorReason::InitramfsNotFound, "boot.initramfs_path")?)
            }
        };
        Ok(Self { source, kernel, initramfs })
    }

    /// Looks at the files anew each time: whoever wrote into them since should not get half of the old and half of the new.
    fn contents(&self) -> Result<Contents, Error> {
        let kernel = Kernel::parse(&self.kernel).map_err(|Invalid(what)| {
            let path = self.source.kernel.display();
            Error::new(Code::InvalidArgument, ErrorReason::KernelInvalid, format!("kernel {path} {what}"))
                .resource(path.to_string())
                .with("field", "boot.kernel_path")
                .remedy("give a bzImage (Debian: /boot/vmlinuz-*) or an ELF kernel with a PVH entry point")
        })?;
        let initramfs = match (&self.initramfs, &self.source.initramfs) {
            (Some(file), Some(path)) => file.size().map_err(|e| unreadable(path, "initramfs", &e))?,
            _ => 0,
        };
        Ok(Contents { kernel, initramfs })
    }

    /// Checks that the kernel is one and that `ram_size` bytes of RAM hold it and the initial RAM disk.
    ///
    /// # Errors
    /// `KERNEL_INVALID`; `INVALID_FIELD` for `memory_bytes`, saying how much is needed.
    pub fn check(&self, ram_size: u64) -> Result<(), Error> {
        self.contents()?.place_initramfs(ram_size).map(|_| ())
    }

    /// Copies the files and the boot data into `ram`, which must be zeroed.
    ///
    /// # Errors
    /// As [`BootFiles::check`]; `HOST` if a file cannot be read.
    pub fn load(&self, ram: &GuestRam, rsdp: u64) -> Result<Entry, Error> {
        let contents = self.contents()?;
        let initramfs_at = contents.place_initramfs(ram.size())?;
        let failed = |e: vm_memory::GuestMemoryError| {
            let path = self.source.kernel.display();
            Error::new(Code::FailedPrecondition, ErrorReason::Host, format!("cannot load {path}: {e}"))
                .resource(path.to_string())
                .remedy("check that the file is not being changed")
        };
        let mut initramfs = None;
        if let (Some(file), Some(at)) = (&self.initramfs, initramfs_at) {
            let size = contents.initramfs;
            copy(ram, at, file, 0, size).map_err(|e| {
                let path = self.source.initramfs.as_deref().unwrap_or(Path::new(""));
                unreadable(path, "initramfs", &io::Error::other(e))
            })?;
            initramfs = Some(at..at + size);
        }
        let boot = BootData { cmdline: self.source.cmdline.as_bytes(), initramfs, rsdp };
        boot.write_cmdline(ram).map_err(failed)?;
        match &contents.kernel {
            Kernel::Elf(kernel) => {
                for segment in kernel.segments() {
                    copy(ram, segment.gpa, &self.kernel, segment.file_offset, segment.file_size)
                        .map_err(failed)?;
                }
                pvh::write_start_info(ram, &boot).map_err(failed)?;
                Ok(Entry::Pvh { eip: kernel.entry(), start_info: layout::PVH_START_INFO })
            }
            Kernel::BzImage(kernel) => {
                let (offset, size) = kernel.payload();
                copy(ram, bzimage::LOAD_ADDRESS, &self.kernel, offset, size).map_err(failed)?;
                kernel.write_boot_params(ram, &boot).map_err(failed)?;
                Ok(Entry::Linux64 { rip: bzimage::ENTRY, zero_page: layout::ZERO_PAGE })
            }
        }
    }
}

impl Contents {
    /// Where the initial RAM disk goes: as high as possible below the PCI hole, page-aligned.
    fn place_initramfs(&self, ram_size: u64) -> Result<Option<u64>, Error> {
        let size = self.initramfs;
        let low_end = ram_size.min(layout::PCI_HOLE.start);
        let top = low_end.min(self.kernel.initramfs_max().saturating_add(1));
        let at = top.checked_sub(size).map(|at| at & !0xfff).filter(|&at| at >= self.kernel.end());
        match at {
            Some(_) if size == 0 => Ok(None),
            Some(at) => Ok(Some(at)),
            None => {
                let needed = self.kernel.end().saturating_add(size).saturating_add(0xfff);
                let needed_mib = needed.div_ceil(GRANULE).saturating_mul(GRANULE >> 20);
                Err(Error::invalid_field(
                    "memory_bytes",
                    format!("{} MiB of RAM do not hold kernel and initramfs", ram_size >> 20),
                )
                .remedy(format!("give the VM at least {needed_mib} MiB, and some more to work with")))
            }
        }
    }
}

/// What both boot protocols hand to the kernel.
struct BootData<'a> {
    cmdline: &'a [u8],
    /// Guest-physical addresses of the initial RAM disk.
    initramfs: Option<std::ops::Range<u64>>,
    /// Guest-physical address of the ACPI root pointer.
    rsdp: u64,
}

impl BootData<'_> {
    fn write_cmdline(&self, ram: &GuestRam) -> vm_memory::GuestMemoryResult<()> {
        let cmdline = &self.cmdline[..self.cmdline.len().min(layout::CMDLINE_MAX)];
        ram.memory().write_slice(cmdline, GuestAddress(layout::CMDLINE))?;
        ram.memory().write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))
    }
}

/// Copies `size` bytes of `file` from `offset` to guest-physical address `to`, without a buffer between.
fn copy(ram: &GuestRam, to: u64, file: &File, offset: u64, size: u64) -> vm_memory::GuestMemoryResult<()> {
    use std::io::{Seek, SeekFrom};
    // The position is nobody else's: the file was opened here, and machines load one after the other.
    let mut file = file;
    file.seek(SeekFrom::Start(offset)).map_err(vm_memory::GuestMemoryError::IOError)?;
    let size = usize::try_from(size).map_err(|_| vm_memory::GuestMemoryError::InvalidBackendAddress)?;
    ram.memory().read_exact_volatile_from(GuestAddress(to), &mut file, size)
}

fn open(path: &Path, what: &str, not_found: ErrorReason, field: &str) -> Result<File, Error> {
    // Not to wait for the other end of a FIFO; regular files do not know the flag.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = opened.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            Error::new(Code::NotFound, not_found, format!("{what} {} does not exist", path.display()))
                .resource(path.display().to_string())
                .with("field", field)
                .remedy("check the path; it is a path of the host the VM runs on")
        }
        _ => unreadable(path, what, &e),
    })?;
    let kind = file.metadata().map_err(|e| unreadable(path, what, &e))?.file_type();
    if !kind.is_file() {
        let is = if kind.is_dir() { "is a directory" } else { "is not a regular file" };
        let reason = if not_found == ErrorReason::KernelNotFound {
            ErrorReason::KernelInvalid
        } else {
            ErrorReason::InvalidField
        };
        return Err(Error::new(Code::InvalidArgument, reason, format!("{what} {} {is}", path.display()))
            .resource(path.display().to_string())
            .with("field", field)
            .remedy("give the path of a file"));
    }
    Ok(file)
}

fn unreadable(path: &Path, what: &str, e: &io::Error) -> Error {
    let message = format!("cannot read {what} {}: {e}", path.display());
    let error = match e.kind() {
        io::ErrorKind::PermissionDenied => {
            Error::new(Code::PermissionDenied, ErrorReason::PermissionDenied, message)
                .remedy("make the file readable for the user the hypervisor runs as")
        }
        _ => Error::new(Code::FailedPrecondition, ErrorReason::Host, message)
            .with("errno", e.raw_os_error().unwrap_or(0).to_string())
            .remedy("check the file and the file system it is on"),
    };
    error.resource(path.display().to_string())
}

#[cfg(test)]
mod tests;
