//! The network jobs (VirtIO 1.3, 5.1).

mod exchange;
mod jobs;
mod port;
mod raw;
mod station;

pub(crate) use exchange::exchange;
pub(crate) use jobs::{echo, ping_pong, receive, send};
pub(crate) use raw::raw;
