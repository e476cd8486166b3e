//! How a slot works that is not part of its configuration.

use std::sync::Arc;

/// Called on the thread of a vCPU with the number of a queue (below the slot's number of queues) of which the guest says that it
/// has something in it. The queue may be one that the driver has not set up. No lock is held; until this returns, the vCPU waits.
pub type Notify = Arc<dyn Fn(u16) + Send + Sync>;

/// Where the guest's notifications of queues go.
///
/// The hypervisor itself always uses [`Notifications::Kvm`]. The others put this process into the data path, which is what they are
/// for: a benchmark that links this crate compares against them.
#[derive(Clone, Default)]
pub enum Notifications {
    /// KVM signals the device's eventfd (ioeventfd); this process sees none.
    #[default]
    Kvm,
    /// They come to this process, which signals the device's eventfd.
    Exit,
    /// They come to this process, which calls this and signals nothing.
    Call(Notify),
}

impl std::fmt::Debug for Notifications {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Notifications::Kvm => "Kvm",
            Notifications::Exit => "Exit",
            Notifications::Call(_) => "Call",
        })
    }
}

/// How a slot works that is not part of its configuration.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where notifications go.
    pub notifications: Notifications,
}
