//! The host's side of a network: its TAP interface.

pub mod netlink;
pub mod tap;
mod udev;
