//! CPU time, scheduling and placement of other processes' threads.

use std::fs;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// Threads of a process.
pub(super) fn threads(pid: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// vCPU threads of a VMM, by their names: ours and Cloud Hypervisor's `vcpu0`, QEMU's `CPU 0/KVM`, Firecracker's `fc_vcpu 0`.
pub(crate) fn vcpu_threads(pid: u32) -> Vec<u32> {
    let is_vcpu = |tid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).is_ok_and(|name| {
            name.starts_with("vcpu") || name.starts_with("CPU ") || name.starts_with("fc_vcpu")
        })
    };
    threads(pid).into_iter().filter(is_vcpu).collect()
}

/// CPU time of a thread in nanoseconds; 0 if it is gone.
pub(super) fn thread_ns(pid: u32, tid: u32) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat"))
        .ok()
        .and_then(|text| text.split_ascii_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// CPU time of a process, threads that have ended included, in nanoseconds; 0 if it is gone.
pub(super) fn process_ns(pid: u32) -> u64 {
    clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))
        .and_then(clock_gettime)
        .map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// Context switches of all threads of a process.
pub(super) fn switches(pid: u32) -> u64 {
    let of = |tid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
        status
            .lines()
            .filter(|line| line.contains("ctxt_switches"))
            .filter_map(|line| line.split_ascii_whitespace().last()?.parse::<u64>().ok())
            .sum::<u64>()
    };
    threads(pid).into_iter().map(of).sum()
}

/// The set of one processor, or of all.
pub(crate) fn cpu_set(cpu: Option<usize>) -> CpuSet {
    let mut set = CpuSet::new();
    for cpu in cpu.map_or(0..CpuSet::count(), |cpu| cpu..cpu + 1) {
        // A processor beyond what a set can hold is one that this machine has not.
        let _ = set.set(cpu);
    }
    set
}

/// Puts a thread on a processor, or leaves it to the scheduler; one that has ended needs neither.
pub(crate) fn place_thread(tid: u32, cpu: Option<usize>) {
    let _ = sched_setaffinity(Pid::from_raw(tid.cast_signed()), &cpu_set(cpu));
}

/// The same for all threads of a process; those it starts later follow.
pub(crate) fn place_process(pid: u32, cpu: Option<usize>) {
    threads(pid).into_iter().for_each(|tid| place_thread(tid, cpu));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_time_goes_by() {
        let pid = std::process::id();
        let (before, since) = (process_ns(pid), std::time::Instant::now());
        // Others may have the processors meanwhile.
        while process_ns(pid) - before < 5_000_000 {
            assert!(since.elapsed() < std::time::Duration::from_secs(10));
        }
        assert!(threads(pid).into_iter().map(|tid| thread_ns(pid, tid)).sum::<u64>() > 0);
        assert!(switches(pid) > 0);
        assert!(vcpu_threads(pid).is_empty());
    }

    #[test]
    fn a_process_that_is_gone_has_used_nothing() {
        let pid = 4_194_303;
        assert_eq!((process_ns(pid), switches(pid), thread_ns(pid, pid)), (0, 0, 0));
    }
}
