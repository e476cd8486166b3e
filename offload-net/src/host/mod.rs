//! The host's side of a network: its TAP interface, and NAT.

pub mod nat;
pub mod netlink;
pub mod tap;
mod udev;
