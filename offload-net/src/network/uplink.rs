//! A network's uplink: its TAP, or the wish to have it back.

use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use offload_card::event::Event;
use offload_card::poll::Poller;
use proto::error::Error;

use crate::host::netlink::Prefix;
use crate::host::tap::Tap;
use crate::mac::MacAddr;

/// How often a TAP that is gone is made again.
const RETRY: Duration = Duration::from_secs(1);
const STACK_BYTES: usize = 256 * 1024;

/// What the TAP of a network is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UplinkSpec {
    /// Its name.
    pub tap: String,
    /// Largest L3 packet in bytes.
    pub mtu: u32,
    /// The host's addresses on it.
    pub addresses: Vec<Prefix>,
    /// Its MAC address; `None`: the kernel's choice.
    pub mac: Option<MacAddr>,
    /// Its network has NAT.
    pub nat: bool,
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
        if let Err(e) = tap.configure(self.mtu, self.mac, &self.addresses, self.nat) {
            if !existed && let Err(e) = tap.remove() {
                tracing::warn!("{e}");
            }
            return Err(e);
        }
        Ok(tap)
    }
}

/// The uplink as the network's thread has it. A TAP can go at any time (`ip link del`): the network lives on without,
/// and another thread tries to make it again, because that means to wait for the kernel.
#[derive(Debug)]
pub enum Uplink {
    /// The network has none.
    None,
    /// It works.
    Up(UplinkSpec, Tap),
    /// It does not, and is to be made.
    Down(UplinkSpec),
    /// It is being made.
    Awaited(UplinkSpec, Maker),
}

impl Uplink {
    /// Has frames from the host reported as `token`; or, as `new_tap`, that there is a new TAP.
    pub fn watch(&mut self, poller: &Poller, token: u64, new_tap: u64) {
        match self {
            Self::Up(_, tap) => {
                if let Err(e) = poller.add_level(tap, token) {
                    self.lost(poller, new_tap, &e);
                }
            }
            Self::Down(spec) => match Maker::start(spec.clone(), poller, new_tap) {
                Ok(maker) => *self = Self::Awaited(spec.clone(), maker),
                Err(e) => {
                    tracing::error!(tap = spec.tap, "uplink cannot be made again: no thread for it: {e}");
                }
            },
            Self::None | Self::Awaited(..) => {}
        }
    }

    /// A new TAP may be there.
    pub fn made(&mut self, poller: &Poller, token: u64, new_tap: u64) {
        if let Self::Awaited(spec, maker) = self
            && let Some(tap) = maker.take()
        {
            tracing::info!(tap = spec.tap, "uplink is up again");
            let _ = poller.remove(&maker.shared.event);
            *self = Self::Up(spec.clone(), tap);
            self.watch(poller, token, new_tap);
        }
    }

    /// The TAP does not work any more.
    pub fn lost(&mut self, poller: &Poller, new_tap: u64, why: &std::io::Error) {
        if let Self::Up(spec, tap) = self {
            tracing::warn!(tap = spec.tap, "uplink lost: {why}; it is made again when that is possible");
            // Closing the only descriptor takes it out of the poller in any case.
            let _ = poller.remove(&*tap);
            *self = Self::Down(spec.clone());
            self.watch(poller, 0, new_tap);
        }
    }

    /// Its TAP, for the one who removes it. One that is still being made is removed by its maker.
    pub fn take(self, poller: &Poller) -> Option<Tap> {
        match self {
            Self::Up(_, tap) => {
                let _ = poller.remove(&tap);
                Some(tap)
            }
            Self::Awaited(_, maker) => {
                let _ = poller.remove(&maker.shared.event);
                maker.give_up(true)
            }
            Self::None | Self::Down(_) => None,
        }
    }
}

/// A thread that makes a TAP, as often as need be. Dropping this ends it.
#[derive(Debug)]
pub struct Maker {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
    /// Signalled when the TAP is there.
    event: Event,
}

#[derive(Debug)]
enum Progress {
    Trying,
    Made(Tap),
    /// The network has it.
    Taken,
    /// Nobody wants it any more; one that comes late is to be removed, or to stay for the next process.
    GivenUp {
        remove: bool,
    },
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self, spec: &UplinkSpec) {
        loop {
            let made = spec.open();
            let mut progress = self.progress();
            match (&*progress, made) {
                (Progress::Trying, Ok(tap)) => {
                    *progress = Progress::Made(tap);
                    self.event.signal();
                    return;
                }
                (Progress::Trying, Err(e)) => tracing::debug!("{e}"),
                (Progress::GivenUp { remove: true }, Ok(tap)) => {
                    if let Err(e) = tap.remove() {
                        tracing::warn!("{e}");
                    }
                    return;
                }
                _ => return,
            }
            let trying = |p: &mut Progress| matches!(p, Progress::Trying);
            let waited = self.changed.wait_timeout_while(progress, RETRY, trying);
            if !matches!(*waited.unwrap_or_else(PoisonError::into_inner).0, Progress::Trying) {
                return;
            }
        }
    }
}

impl Maker {
    fn start(spec: UplinkSpec, poller: &Poller, token: u64) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            progress: Mutex::new(Progress::Trying),
            changed: Condvar::new(),
            event: Event::new()?,
        });
        poller.add_edge(shared.event.as_fd(), token)?;
        let theirs = shared.clone();
        std::thread::Builder::new()
            .name("uplink".into())
            .stack_size(STACK_BYTES)
            .spawn(move || theirs.make(&spec))?;
        Ok(Self { shared })
    }

    fn take(&self) -> Option<Tap> {
        let mut progress = self.shared.progress();
        match std::mem::replace(&mut *progress, Progress::Taken) {
            Progress::Made(tap) => Some(tap),
            other => {
                *progress = other;
                None
            }
        }
    }

    /// Ends it; the TAP, if it is there.
    fn give_up(&self, remove: bool) -> Option<Tap> {
        let mut progress = self.shared.progress();
        let before = std::mem::replace(&mut *progress, Progress::Taken);
        let (now, tap) = match before {
            Progress::Trying => (Progress::GivenUp { remove }, None),
            Progress::Made(tap) => (Progress::Taken, Some(tap)),
            over @ (Progress::Taken | Progress::GivenUp { .. }) => (over, None),
        };
        *progress = now;
        self.shared.changed.notify_all();
        tap
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        self.give_up(false);
    }
}
