//! Exits from guests by KVM's own counters, which mean the same for every VMM.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Mounts the file systems that the counters are in, where they are not mounted, for this process and its children only. To be
/// called before there are other threads.
///
/// # Errors
/// What the kernel has against it. Exits will not be counted then.
pub(crate) fn mount_counters() -> nix::Result<()> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    // What is mounted from now on stays with us.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    for (kind, path, sign) in
        [("debugfs", "/sys/kernel/debug", "kvm"), ("tracefs", "/sys/kernel/tracing", "events")]
    {
        if !Path::new(path).join(sign).exists() {
            mount(Some(kind), path, Some(kind), MsFlags::empty(), none)?;
        }
    }
    Ok(())
}

/// Exits of the VMs of some processes; `None` where debugfs is not mounted.
pub(super) fn exits(pids: &[u32]) -> Option<u64> {
    let entries = fs::read_dir("/sys/kernel/debug/kvm").ok()?;
    let mut sum = None;
    for entry in entries.filter_map(Result::ok) {
        // PID-FD
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.split_once('-')?.0.parse().ok());
        if pid.is_some_and(|pid| pids.contains(&pid))
            && let Ok(text) = fs::read_to_string(entry.path().join("exits"))
        {
            *sum.get_or_insert(0) += text.trim().parse::<u64>().unwrap_or(0);
        }
    }
    sum
}
