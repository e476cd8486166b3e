//! A network's uplink: its TAP, or the wish to have it back.

use std::time::{Duration, Instant};

use offload_card::poll::Poller;
use proto::error::Error;

use crate::host::netlink::Prefix;
use crate::host::tap::Tap;

/// How often a TAP that is gone is made again.
const RETRY: Duration = Duration::from_secs(1);

/// What the TAP of a network is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UplinkSpec {
    /// Its name.
    pub tap: String,
    /// Largest L3 packet in bytes.
    pub mtu: u32,
    /// The host's addresses on it.
    pub addresses: Vec<Prefix>,
}

impl UplinkSpec {
    /// Makes the TAP or takes it over, and configures it. A TAP that cannot be configured is removed again, unless it
    /// was there before.
    ///
    /// # Errors
    /// What [`Tap::open`] and [`Tap::configure`] say.
    pub fn open(&self) -> Result<Tap, Error> {
        let existed = nix::net::if_::if_nametoindex(self.tap.as_str()).is_ok();
        let tap = Tap::open(&self.tap)?;
        if let Err(e) = tap.configure(self.mtu, &self.addresses) {
            if !existed && let Err(e) = tap.remove() {
                tracing::warn!("{e}");
            }
            return Err(e);
        }
        Ok(tap)
    }
}

/// The uplink as the network's thread has it. A TAP can go at any time (`ip link del`): the network lives on without,
/// and tries to make it again.
#[derive(Debug)]
pub enum Uplink {
    /// The network has none.
    None,
    /// It works.
    Up(UplinkSpec, Tap),
    /// It does not; made again at this time.
    Down(UplinkSpec, Instant),
}

impl Uplink {
    /// When to call [`Uplink::retry`].
    pub fn retry_in(&self) -> Option<Duration> {
        match self {
            Self::Down(_, at) => Some(at.saturating_duration_since(Instant::now())),
            Self::None | Self::Up(..) => None,
        }
    }

    /// Makes the TAP again if it is time to.
    pub fn retry(&mut self, poller: &Poller, token: u64) {
        let Self::Down(spec, at) = self else { return };
        if Instant::now() < *at {
            return;
        }
        match spec.open() {
            Ok(tap) => {
                tracing::info!(tap = spec.tap, "uplink is up again");
                *self = Self::Up(spec.clone(), tap);
                self.watch(poller, token);
            }
            Err(e) => {
                tracing::debug!("{e}");
                *at = Instant::now() + RETRY;
            }
        }
    }

    /// Has frames from the host reported.
    pub fn watch(&mut self, poller: &Poller, token: u64) {
        if let Self::Up(_, tap) = self
            && let Err(e) = poller.add_level(tap, token)
        {
            self.lost(poller, &e);
        }
    }

    /// The TAP does not work any more.
    pub fn lost(&mut self, poller: &Poller, why: &std::io::Error) {
        if let Self::Up(spec, tap) = self {
            tracing::warn!(tap = spec.tap, "uplink lost: {why}; it is made again when that is possible");
            // Closing the only descriptor takes it out of the poller in any case.
            let _ = poller.remove(&*tap);
            *self = Self::Down(spec.clone(), Instant::now() + RETRY);
        }
    }
}
