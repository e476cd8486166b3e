//! The front-end's side of the vhost-user protocol ("Vhost-user Protocol" of the QEMU project's interoperability
//! documentation).
//!
//! The other end is a process that may be slow, dead, hung or hostile: every wait has a deadline and ends at once when the slot
//! is shut down, every length is checked before it is believed, and any surprise costs the peer its connection.

mod connection;
mod frontend;
mod message;

use std::fmt;
use std::io;

pub(super) use connection::Cancel;
pub(super) use frontend::{Frontend, Inflight, Offer, Patience, RingSetup};

/// Feature bit that says that the peer speaks protocol features; not a feature of the device, and not for the guest.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Why a connection cannot be made or used any more.
#[derive(Debug)]
pub(super) enum LinkError {
    /// Nobody takes the connection.
    Unreachable(io::Error),
    /// The device has closed the connection.
    Closed,
    /// No answer to this request in time.
    TimedOut(&'static str),
    /// What came is not what the protocol allows here.
    Violation(&'static str, String),
    /// The device answered this request with an error.
    Refused(&'static str),
    /// The device is not the one that the guest knows.
    Incompatible(String),
    /// The slot is being shut down.
    Cancelled,
    /// A reset of the guest does not wait for the device.
    CutByReset,
    /// The guest has new memory, and the connection is about the old.
    MemoryReplaced,
    /// The host said no.
    Io(io::Error),
}

impl fmt::Display for LinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LinkError::Unreachable(e) => write!(f, "cannot connect: {e}"),
            LinkError::Closed => f.write_str("the device closed the connection"),
            LinkError::TimedOut(request) => write!(f, "the device did not answer {request} in time"),
            LinkError::Violation(request, what) => {
                write!(f, "the device broke the vhost-user protocol at {request}: {what}")
            }
            LinkError::Refused(request) => write!(f, "the device refused {request}"),
            LinkError::Incompatible(why) => f.write_str(why),
            LinkError::Cancelled => f.write_str("the slot is shut down"),
            LinkError::CutByReset => f.write_str("the guest was reset while the device kept it waiting"),
            LinkError::MemoryReplaced => f.write_str("the guest was reset and has new memory"),
            LinkError::Io(e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for LinkError {}

impl From<io::Error> for LinkError {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => LinkError::Closed,
            _ => LinkError::Io(e),
        }
    }
}
