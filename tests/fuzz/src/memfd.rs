//! Files in memory.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// A file of `bytes`; if `sealed`, nobody can make it shorter.
pub fn memfd(bytes: u64, sealed: bool) -> File {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_ALLOW_SEALING).expect("memfd"));
    file.set_len(bytes).expect("length of a memfd");
    if sealed {
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("seals of a memfd");
    }
    file
}

/// A path by which it can be opened again in this process.
pub fn path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}
