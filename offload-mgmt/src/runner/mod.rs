//! Where a VM's hypervisor process comes from and where it goes.
//!
//! A runner starts processes that outlive the controller, finds out whether one is still there, and makes sure that one
//! is gone. What the process does is none of its business: that is asked over the process's control socket.

use std::path::PathBuf;
use std::time::Duration;

use proto::error::Error;

mod process;
mod systemd;

pub use process::ProcessRunner;
pub use systemd::SystemdRunner;

/// Whether a VM's hypervisor process is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Liveness {
    /// It is.
    Alive,
    /// It is not.
    Ended(Exit),
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exit {
    /// It is known to have ended well: on purpose, with status 0.
    pub clean: bool,
    /// How, as a clause that fits behind "the hypervisor process "; empty if not known.
    pub how: String,
    /// The last it said, or empty.
    pub last_words: String,
}

/// Starts and ends hypervisor processes. `vm` is always a VM's id: 12 characters of [a-z0-9].
#[tonic::async_trait]
pub trait Runner: Send + Sync + 'static {
    /// Where the VM's control socket is, once its process runs.
    fn control_socket(&self, vm: &str) -> PathBuf;

    /// Where to read what the VM's process wrote, as a clause for a person.
    fn log_hint(&self, vm: &str) -> String;

    /// Starts a process. It may not listen yet when this returns.
    ///
    /// # Errors
    /// It cannot be started: HOST with the reason.
    async fn start(&self, vm: &str) -> Result<(), Error>;

    /// Whether it is there, without asking it.
    async fn liveness(&self, vm: &str) -> Liveness;

    /// Makes sure it is gone: waits up to `grace` for it to end by itself, then ends it. No process is no error.
    ///
    /// # Errors
    /// It does not end even so.
    async fn stop(&self, vm: &str, grace: Duration) -> Result<(), Error>;

    /// Removes what a process that is gone has left: directories, logs, a failed unit.
    async fn clean(&self, vm: &str);
}
