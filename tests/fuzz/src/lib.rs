//! What the fuzz targets share: reading an input as choices, a guest whose memory is small enough for random addresses to
//! mean something, the files a front-end may
//! pass, and a network with an interface.

pub mod disk;
pub mod front;
pub mod guest;
pub mod input;
pub mod memfd;
pub mod vpc;

use std::time::Duration;

/// How long what must not hang may take, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(10);
