//! What the host can tell of a system while its guest works: CPU time by thread and process, exits from the guest.
//!
//! A [`Probe`] is set on processes once their guests have begun; two [`Reading`]s, when the I/O phase begins and when it
//! ends, give what was used in between. Nothing of it is in the way of what is measured: the kernel counts anyway.

mod cpu;
mod kvm;
mod link;
mod memory;
mod perf;

use std::time::Instant;

pub(crate) use cpu::{cpu_set, place_process, place_thread, vcpu_threads};
pub(crate) use kvm::mount_counters;
pub(crate) use memory::beyond_guest_ram;
use perf::ThreadCounters;

/// The processes of one booted system.
#[derive(Debug)]
pub(crate) struct Probe {
    /// VMM processes, one per guest.
    vmms: Vec<u32>,
    /// Processes that do the I/O of the guests, if others do.
    backends: Vec<u32>,
    /// vCPU threads, as (process, thread).
    vcpus: Vec<(u32, u32)>,
    user_exits: ThreadCounters,
    cycles: ThreadCounters,
    /// A network interface whose frames are counted.
    link: Option<&'static str>,
}

/// Counts at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    at: Instant,
    vcpu_ns: u64,
    vmm_ns: u64,
    backend_ns: u64,
    exits: Option<u64>,
    user_exits: Option<u64>,
    cycles: Option<u64>,
    wakeups: u64,
    link: link::Received,
}

/// What happened between two readings.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Used {
    pub(crate) seconds: f64,
    /// CPU time of vCPU threads.
    pub(crate) vcpu_ns: f64,
    /// CPU time of whatever does the I/O: back-end processes, or where there are none, the other threads of the VMMs.
    pub(crate) backend_ns: f64,
    /// CPU time of the VMMs' other threads where there are back-end processes.
    pub(crate) other_ns: f64,
    /// Exits from the guests, if KVM's counters can be read.
    pub(crate) exits: Option<f64>,
    /// Exits to user space, if the kernel lets them be counted.
    pub(crate) user_exits: Option<f64>,
    /// Cycles of all the processes, if the processor lets them be counted.
    pub(crate) cycles: Option<f64>,
    /// Times a thread of a VMM gave up its processor to wait and was woken, or was preempted.
    pub(crate) wakeups: f64,
    /// Frames and bytes that the host got through the interface of [`Probe::watch`].
    pub(crate) frames: f64,
    pub(crate) frame_bytes: f64,
}

impl Probe {
    /// For VMMs whose vCPU threads exist.
    pub(crate) fn new(vmms: Vec<u32>, backends: Vec<u32>) -> Self {
        let vcpus: Vec<(u32, u32)> =
            vmms.iter().flat_map(|&pid| vcpu_threads(pid).into_iter().map(move |tid| (pid, tid))).collect();
        let user_exits = ThreadCounters::user_exits(vcpus.iter().map(|&(_, tid)| tid));
        let all = vmms.iter().chain(&backends).flat_map(|&pid| cpu::threads(pid));
        let cycles = ThreadCounters::cycles(all);
        Self { vmms, backends, vcpus, user_exits, cycles, link: None }
    }

    /// Counts the frames of a network interface, too.
    pub(crate) fn watch(&mut self, link: &'static str) {
        self.link = Some(link);
    }

    /// Counts now. The clock is read first: what the reading itself costs falls behind it.
    pub(crate) fn read(&mut self) -> Reading {
        Reading {
            at: Instant::now(),
            vcpu_ns: self.vcpus.iter().map(|&(pid, tid)| cpu::thread_ns(pid, tid)).sum(),
            vmm_ns: self.vmms.iter().map(|&pid| cpu::process_ns(pid)).sum(),
            backend_ns: self.backends.iter().map(|&pid| cpu::process_ns(pid)).sum(),
            exits: kvm::exits(&self.vmms),
            user_exits: self.user_exits.read(),
            cycles: self.cycles.read(),
            wakeups: self.vmms.iter().map(|&pid| cpu::switches(pid)).sum(),
            link: self.link.map(link::received).unwrap_or_default(),
        }
    }

    /// What was used from `a` to `b`.
    pub(crate) fn used(&self, a: Reading, b: Reading) -> Used {
        let less = |a: u64, b: u64| b.saturating_sub(a) as f64;
        let vcpu_ns = less(a.vcpu_ns, b.vcpu_ns);
        let rest = (less(a.vmm_ns, b.vmm_ns) - vcpu_ns).max(0.0);
        let (backend_ns, other_ns) =
            if self.backends.is_empty() { (rest, 0.0) } else { (less(a.backend_ns, b.backend_ns), rest) };
        Used {
            seconds: b.at.duration_since(a.at).as_secs_f64(),
            vcpu_ns,
            backend_ns,
            other_ns,
            exits: a.exits.zip(b.exits).map(|(a, b)| less(a, b)),
            user_exits: a.user_exits.zip(b.user_exits).map(|(a, b)| less(a, b)),
            cycles: a.cycles.zip(b.cycles).map(|(a, b)| less(a, b)),
            wakeups: less(a.wakeups, b.wakeups),
            frames: less(a.link.frames, b.link.frames),
            frame_bytes: less(a.link.bytes, b.link.bytes),
        }
    }
}
