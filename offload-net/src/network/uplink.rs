//! A network's uplink: its TAP or its interface, or the wish to have it back.

use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use offload_card::event::Event;
use offload_card::poll::Poller;
use proto::error::Error;

use crate::host::link::Link;
use crate::host::netlink::Prefix;
use crate::host::packet::PacketSocket;
use crate::host::tap::Tap;
use crate::mac::MacAddr;

/// How often an uplink that is gone is tried again.
const RETRY: Duration = Duration::from_secs(1);
const STACK_BYTES: usize = 256 * 1024;

/// What a network's uplink is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UplinkSpec {
    /// A TAP of the card's.
    Tap(TapSpec),
    /// An interface of the host's.
    Interface {
        /// Its name.
        name: String,
        /// Largest L3 packet in bytes.
        mtu: u32,
    },
}

/// What the TAP of a network is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapSpec {
    /// Its name.
    pub name: String,
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
    /// Name of the interface.
    pub fn name(&self) -> &str {
        match self {
            Self::Tap(tap) => &tap.name,
            Self::Interface { name, .. } => name,
        }
    }

    /// Makes it, or takes it.
    ///
    /// # Errors
    /// What [`TapSpec::open`] and [`PacketSocket::open`] say.
    pub fn open(&self) -> Result<Link, Error> {
        Ok(match self {
            Self::Tap(tap) => Link::Tap(tap.open()?),
            Self::Interface { name, mtu } => Link::Interface(PacketSocket::open(name, *mtu)?),
        })
    }
}

impl TapSpec {
    /// Makes the TAP or takes it over, and configures it. A TAP that cannot be configured is removed again, unless it
    /// was there before.
    ///
    /// # Errors
    /// What [`Tap::open`] and [`Tap::configure`] say.
    pub fn open(&self) -> Result<Tap, Error> {
        let existed = nix::net::if_::if_nametoindex(self.name.as_str()).is_ok();
        let tap = Tap::open(&self.name)?;
        if let Err(e) = tap.configure(self.mtu, self.mac, &self.addresses, self.nat) {
            if !existed && let Err(e) = tap.remove() {
                tracing::warn!("{e}");
            }
            return Err(e);
        }
        Ok(tap)
    }
}

/// The uplink as the network's thread has it. An interface can go at any time (`ip link del`): the network lives on without,
/// and another thread tries to have it again, because that means to wait for the kernel.
#[derive(Debug)]
pub enum Uplink {
    /// The network has none.
    None,
    /// It works.
    Up(UplinkSpec, Link),
    /// It does not, and is to be made.
    Down(UplinkSpec),
    /// It is being made.
    Awaited(UplinkSpec, Maker),
}

impl Uplink {
    /// Has frames from the host reported as `token`; or, as `new_link`, that the uplink is there again.
    pub fn watch(&mut self, poller: &Poller, token: u64, new_link: u64) {
        match self {
            Self::Up(_, link) => {
                if let Err(e) = poller.add_level(link, token) {
                    self.lost(poller, new_link, &e);
                }
            }
            Self::Down(spec) => match Maker::start(spec.clone(), poller, new_link) {
                Ok(maker) => *self = Self::Awaited(spec.clone(), maker),
                Err(e) => {
                    tracing::error!(
                        uplink = spec.name(),
                        "uplink cannot be made again: no thread for it: {e}"
                    );
                }
            },
            Self::None | Self::Awaited(..) => {}
        }
    }

    /// It may be there again.
    pub fn made(&mut self, poller: &Poller, token: u64, new_link: u64) {
        if let Self::Awaited(spec, maker) = self
            && let Some(link) = maker.take()
        {
            tracing::info!(uplink = spec.name(), "uplink is up again");
            let _ = poller.remove(&maker.shared.event);
            *self = Self::Up(spec.clone(), link);
            self.watch(poller, token, new_link);
        }
    }

    /// It does not work any more.
    pub fn lost(&mut self, poller: &Poller, new_link: u64, why: &std::io::Error) {
        if let Self::Up(spec, link) = self {
            tracing::warn!(
                uplink = spec.name(),
                "uplink lost: {why}; it is made again when that is possible"
            );
            // Closing the only descriptor takes it out of the poller in any case.
            let _ = poller.remove(&*link);
            *self = Self::Down(spec.clone());
            self.watch(poller, 0, new_link);
        }
    }

    /// It, for the one who removes it. One that is still being made is removed by its maker.
    pub fn take(self, poller: &Poller) -> Option<Link> {
        match self {
            Self::Up(_, link) => {
                let _ = poller.remove(&link);
                Some(link)
            }
            Self::Awaited(_, maker) => {
                let _ = poller.remove(&maker.shared.event);
                maker.give_up(true)
            }
            Self::None | Self::Down(_) => None,
        }
    }
}

/// A thread that tries to have an uplink, as often as need be. Dropping this ends it.
#[derive(Debug)]
pub struct Maker {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
    /// Signalled when it is there.
    event: Event,
}

#[derive(Debug)]
enum Progress {
    Trying,
    Made(Link),
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
                (Progress::Trying, Ok(link)) => {
                    *progress = Progress::Made(link);
                    self.event.signal();
                    return;
                }
                (Progress::Trying, Err(e)) => tracing::debug!("{e}"),
                (Progress::GivenUp { remove: true }, Ok(link)) => {
                    if let Err(e) = link.remove() {
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

    fn take(&self) -> Option<Link> {
        let mut progress = self.shared.progress();
        match std::mem::replace(&mut *progress, Progress::Taken) {
            Progress::Made(link) => Some(link),
            other => {
                *progress = other;
                None
            }
        }
    }

    /// Ends it; what it has made, if it has.
    fn give_up(&self, remove: bool) -> Option<Link> {
        let mut progress = self.shared.progress();
        let before = std::mem::replace(&mut *progress, Progress::Taken);
        let (now, link) = match before {
            Progress::Trying => (Progress::GivenUp { remove }, None),
            Progress::Made(link) => (Progress::Taken, Some(link)),
            over @ (Progress::Taken | Progress::GivenUp { .. }) => (over, None),
        };
        *progress = now;
        self.shared.changed.notify_all();
        link
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        self.give_up(false);
    }
}
