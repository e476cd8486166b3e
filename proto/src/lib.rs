//! The gRPC services of Outboard: package `outboard.v1`.
//!
//! [`v1`] is generated from the `.proto` files beside this crate, which are the documentation of the API. Servers and
//! messages are always there; clients only with the feature `client`, so that the processes that answer and never ask
//! do not carry an HTTP/2 client. Beside them is what all who speak them do in the same way: errors, limits,
//! sockets, guest memory.

/// Messages and services of package `outboard.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, unused_qualifications)]
pub mod v1 {
    tonic::include_proto!("outboard.v1");
}

mod drops;
pub mod error;
pub mod limits;
pub mod memory;
pub mod metadata;
pub mod socket;
