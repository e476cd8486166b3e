//! The page that KVM shares with a vCPU's thread (`struct kvm_run`), as far as crate kvm-ioctls does not give it.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

/// `KVM_INTERNAL_ERROR_*`, by number.
const SUBERRORS: [&str; 4] = ["", "emulation failed", "simultaneous exceptions", "event delivery failed"];

/// The page of one vCPU. Whoever has it keeps the vCPU alive: the page is mapped as long as its `VcpuFd` is.
#[derive(Debug, Clone)]
pub(super) struct RunPage(NonNull<kvm_run>);

// SAFETY: the page is memory shared with the kernel, not bound to a thread. `io_size` and `internal_error` are called by the
// vCPU's own thread; the one field that another thread touches is accessed atomically.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub(super) fn of(fd: &mut VcpuFd) -> Self {
        Self(NonNull::from(fd.get_kvm_run()))
    }

    /// Makes `KVM_RUN` return at once with EINTR, until [`RunPage::clear_exit_request`].
    pub(super) fn request_exit(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Lets the vCPU enter the guest again.
    pub(super) fn clear_exit_request(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped (see the type), the field a byte; the kernel only reads it, and this process only accesses
        // it here.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) }
    }

    /// Bytes of each single access of the I/O exit just seen: 1, 2 or 4.
    pub(super) fn io_size(&self) -> usize {
        // SAFETY: the page is mapped; the exit reason just seen says that `io` is the valid one of the union.
        let size = unsafe { (&raw const (*self.0.as_ptr()).__bindgen_anon_1.io.size).read_volatile() };
        usize::from(size).max(1)
    }

    /// The internal error just seen, for a person.
    pub(super) fn internal_error(&self) -> String {
        // SAFETY: the page is mapped; the exit reason just seen says that `internal` is the valid one of the union.
        let internal = unsafe { (&raw const (*self.0.as_ptr()).__bindgen_anon_1.internal).read_volatile() };
        let name = SUBERRORS.get(internal.suberror as usize).copied().unwrap_or("");
        let data = &internal.data[..(internal.ndata as usize).min(internal.data.len())];
        format!("KVM internal error, suberror {} ({name}), data {data:x?}", internal.suberror)
    }
}
