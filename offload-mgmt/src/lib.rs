//! Outboard's management: the controller daemon `outboard-mgmt` and the command `outboard`.
//!
//! The controller is the only component with an outside API and the only one that dials the control sockets of cards
//! and hypervisors; they never dial it. So it can die at any moment and nothing that runs stops:
//!
//! ```text
//!   outboard, other clients ──gRPC, Unix socket──► controller::service
//!                                                       │
//!            controller::registry (names, tokens, MACs) │ one actor per VM: controller::vm
//!            controller::store    (redb)                │
//!                     ┌─────────────────────────────────┼──────────────────────┐
//!                     ▼                                 ▼                      ▼
//!              controller::card                      runner                 rpc to the
//!        devices and networks, kept as wanted   systemd or child      hypervisor's socket
//! ```
//!
//! What is true of a VM is asked of its hypervisor process; the database only says which VMs exist and what was being
//! done to them. After a restart every VM's control socket is dialled, and the answers decide ([`controller::vm`]).

pub mod cli;
pub mod controller;
pub mod runner;

/// Version of this build, as `--version` prints it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
