//! The host's side of a network: its TAP or an interface of the host's, and NAT.

pub mod link;
pub mod nat;
pub mod netlink;
pub mod packet;
pub mod tap;
mod udev;
