//! Exits from guests: all of them by KVM's own counters, those to user space by the kernel's tracepoint.
//!
//! Both are the host kernel's, so that they mean the same for every VMM.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use perf_event::events::Tracepoint;
use perf_event::{Builder, Counter};

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

/// Counts exits to user space of some threads.
#[derive(Debug)]
pub(super) struct UserExits(Option<Vec<Counter>>);

impl UserExits {
    /// Begins to count; the kernel may not permit it, or tracefs not be mounted.
    pub(super) fn count(tids: impl Iterator<Item = u32>) -> Self {
        let one = |tid: u32| -> std::io::Result<Counter> {
            let mut counter = Builder::new(Tracepoint::with_name("kvm/kvm_userspace_exit")?)
                .observe_pid(tid.cast_signed())
                .exclude_kernel(false)
                .exclude_hv(false)
                .build()?;
            counter.enable()?;
            Ok(counter)
        };
        Self(
            tids.map(|tid| one(tid).ok()).collect::<Option<Vec<_>>>().filter(|counters| !counters.is_empty()),
        )
    }

    /// So many so far.
    pub(super) fn read(&mut self) -> Option<u64> {
        self.0.as_mut()?.iter_mut().map(|counter| counter.read().ok()).sum()
    }
}
