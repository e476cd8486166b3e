//! What the host has: memory, files, and which boot of it this is.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use proto::error::{Error, ErrorReason};
use tonic::Code;

/// Memory of the host, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// MemTotal.
    pub total: u64,
    /// MemAvailable and free swap: what a new process could get.
    pub available: u64,
}

impl Memory {
    /// Reads /proc/meminfo; `None` where it is not as documented in proc(5).
    pub(crate) fn of_this_host() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/meminfo").ok()?)
    }

    fn parse(meminfo: &str) -> Option<Self> {
        let field = |name: &str| -> Option<u64> {
            let line = meminfo.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
        };
        let swap = field("SwapFree").unwrap_or(0);
        Some(Self { total: field("MemTotal")?, available: field("MemAvailable")?.saturating_add(swap) })
    }
}

/// Refuses a VM that the host could never hold, or whose guest would be stopped by the kernel's OOM killer if it
/// touched all of its memory now.
pub(crate) fn check_memory(wanted: u64, host: Memory) -> Result<(), Error> {
    let error = |message: String, remedy: String| {
        Err(Error::new(Code::ResourceExhausted, ErrorReason::NotEnoughMemory, message)
            .with("field", "memory_bytes")
            .remedy(remedy))
    };
    if wanted > host.total {
        return error(
            format!("the VM wants {} MiB of memory and the host has {} MiB", mib(wanted), mib(host.total)),
            format!("ask for less than {} MiB", mib(host.available)),
        );
    }
    if wanted > host.available {
        return error(
            format!(
                "the VM wants {} MiB of memory and {} of the host's {} MiB are available now",
                mib(wanted),
                mib(host.available),
                mib(host.total)
            ),
            "stop other VMs or give this one less memory".into(),
        );
    }
    Ok(())
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// The id of this boot of the host, or empty.
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|s| s.trim().to_owned())
        .unwrap_or_default()
}

/// Offset of the bzImage header's magic (Linux boot protocol, "The Real-Mode Kernel Header").
const BZIMAGE_MAGIC_AT: u64 = 0x202;

/// Checks that a kernel is there and looks like one the hypervisor boots. A file the controller may not read is left to
/// the hypervisor, which runs as somebody else.
pub(crate) fn check_kernel(path: &str) -> Result<(), Error> {
    let invalid = |what: &str| {
        Error::new(Code::InvalidArgument, ErrorReason::KernelInvalid, format!("{path} is no kernel: {what}"))
            .resource(path)
            .remedy(
                "give an uncompressed vmlinux (ELF with a PVH note) or a bzImage, such as /boot/vmlinuz-*",
            )
    };
    let not_found = || {
        Error::new(Code::NotFound, ErrorReason::KernelNotFound, format!("kernel {path} does not exist"))
            .resource(path)
            .remedy(check_path(path))
    };
    match magic(path) {
        Ok(Magic::Kernel) => Ok(()),
        Ok(Magic::Other) => Err(invalid("it is neither ELF nor a bzImage")),
        Ok(Magic::NoFile) => Err(invalid("it is no regular file")),
        Err(e) => match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Err(not_found()),
            io::ErrorKind::PermissionDenied => Ok(()),
            _ => Err(host_error(path, &e)),
        },
    }
}

fn check_path(path: &str) -> &'static str {
    if path.starts_with("/tmp/") || path.starts_with("/var/tmp/") {
        "check the path; services have a /tmp of their own, so put the file elsewhere"
    } else {
        "check the path; it is a path on the controller's host"
    }
}

enum Magic {
    Kernel,
    Other,
    NoFile,
}

fn magic(path: &str) -> io::Result<Magic> {
    // Not opened before it is known to be a file: opening a FIFO would wait for a writer.
    if !std::fs::metadata(path)?.is_file() {
        return Ok(Magic::NoFile);
    }
    let mut file = File::open(path)?;
    let read = |file: &mut File, at: u64| -> io::Result<[u8; 4]> {
        let mut bytes = [0; 4];
        file.seek(SeekFrom::Start(at))?;
        match file.read_exact(&mut bytes) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok([0; 4]),
            result => result.map(|()| bytes),
        }
    };
    let kernel = read(&mut file, 0)? == *b"\x7fELF" || read(&mut file, BZIMAGE_MAGIC_AT)? == *b"HdrS";
    Ok(if kernel { Magic::Kernel } else { Magic::Other })
}

/// Checks that an initramfs is there.
pub(crate) fn check_initramfs(path: &str) -> Result<(), Error> {
    let error = |what: String| {
        Error::new(Code::NotFound, ErrorReason::InitramfsNotFound, what)
            .resource(path)
            .remedy(check_path(path))
    };
    match std::fs::metadata(Path::new(path)) {
        Ok(m) if m.is_file() => Ok(()),
        Ok(_) => Err(error(format!("initramfs {path} is no regular file"))),
        Err(e) => match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                Err(error(format!("initramfs {path} does not exist")))
            }
            io::ErrorKind::PermissionDenied => Ok(()),
            _ => Err(host_error(path, &e)),
        },
    }
}

/// The host said no.
pub(crate) fn host_error(what: &str, e: &io::Error) -> Error {
    let error = Error::new(Code::Internal, ErrorReason::Host, format!("{what}: {e}"))
        .resource(what)
        .remedy("look at the host: the path and its permissions, free space and memory, the kernel's log");
    match e.raw_os_error() {
        Some(errno) => error.with("errno", errno.to_string()),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_understood() {
        let text = "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    600 kB\nSwapFree:  24 kB\n";
        assert_eq!(Memory::parse(text), Some(Memory { total: 1000 << 10, available: 624 << 10 }));
        assert_eq!(Memory::parse("MemTotal: lots"), None);
        assert!(Memory::of_this_host().is_some());
    }

    #[test]
    fn memory_that_is_not_there_is_refused() {
        let host = Memory { total: 8 << 30, available: 2 << 30 };
        assert!(check_memory(2 << 30, host).is_ok());
        for wanted in [3 << 30, 9 << 30] {
            let e = check_memory(wanted, host).expect_err("too much");
            assert_eq!(e.reason(), ErrorReason::NotEnoughMemory);
        }
    }

    #[test]
    fn what_the_host_refuses_has_a_remedy() {
        let e = host_error("/srv/x", &io::Error::from_raw_os_error(5));
        assert_eq!((e.fact("errno"), e.fact("remedy").is_some()), (Some("5"), true));
        let huge = check_memory(1 << 50, Memory { total: 1, available: 1 }).expect_err("too much");
        assert!(huge.fact("remedy").is_some());
    }

    #[test]
    fn kernels_are_told_from_other_files() {
        let dir = tempfile::tempdir().expect("directory");
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).expect("write");
            path.to_str().expect("path").to_owned()
        };
        let mut bzimage = vec![0; 0x300];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(check_kernel(&file("elf", b"\x7fELF rest")).is_ok());
        assert!(check_kernel(&file("bz", &bzimage)).is_ok());
        for bytes in [b"".as_slice(), b"\x7fEL", b"#!/bin/sh\n", &[0; 0x205]] {
            let e = check_kernel(&file("other", bytes)).expect_err("no kernel");
            assert_eq!(e.reason(), ErrorReason::KernelInvalid);
        }
        let directory = dir.path().to_str().expect("path");
        assert_eq!(check_kernel(directory).expect_err("directory").reason(), ErrorReason::KernelInvalid);
        let missing = dir.path().join("missing");
        let missing = missing.to_str().expect("path");
        assert_eq!(check_kernel(missing).expect_err("missing").reason(), ErrorReason::KernelNotFound);
        assert_eq!(check_initramfs(missing).expect_err("missing").reason(), ErrorReason::InitramfsNotFound);
        assert_eq!(check_initramfs(directory).expect_err("dir").reason(), ErrorReason::InitramfsNotFound);
    }
}
