//! Slots: virtio-pci functions whose devices are served by other processes over vhost-user.
//!
//! A slot knows no type of device. What a device offers (features, number of queues, configuration space) it learns from the device
//! itself, shows it to the guest, and passes back what the guest's driver chose; then the guest's rings are between the guest and
//! the device, in shared memory, with eventfds that KVM serves. What stays here are registers ([`state`]), and a thread per slot
//! ([`link`]) that keeps the connection.
//!
//! ```text
//!  vCPU thread ── configuration space, BAR ──► State (registers) ── orders ──► Link (thread) ── vhost-user ──► device
//!                 answered at once                  ▲                            │
//!                                                   └──── configuration, reset done
//! ```
//!
//! A vCPU never waits for a device: registers are answered from here. A device may die, hang or lie: the link is dropped and made
//! again, for ever, and requests wait in their rings meanwhile. What cannot be helped: a device process that is dropped because it
//! hangs still has the guest's memory mapped, and if it wakes up after a reset it may write into a ring that was.

mod common;
mod layout;
mod link;
mod params;
mod ring;
mod signals;
mod state;
mod sys;
mod vhost_user;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;
use proto::error::{Error, ErrorReason};
use proto::v1;
use tonic::Code;
use vmm_sys_util::eventfd::EventFd;

pub use proto::v1::LinkState;

use crate::exits::Exit;
use crate::memory::GuestRam;
use crate::platform::irq::IrqRouter;
use crate::platform::pci::{PciFunction, Placement};
use link::Link;
use params::Params;
use signals::{Binding, Channel};
use state::{Effect, Fixed, State};
use vhost_user::{Frontend, LinkError, Offer, Patience};

/// Stack of a link's thread in bytes. Its deepest frame holds one message.
const STACK: usize = 128 << 10;

/// How long to try to reach a device at first, when its process may just be starting.
const FIRST_CONTACT: Duration = Duration::from_secs(1);
const FIRST_CONTACT_PAUSE: Duration = Duration::from_millis(10);

/// How long a shutdown waits for the thread, which has nothing to wait for itself.
const FAREWELL: Duration = Duration::from_secs(1);

/// Who hears what happens to slots. Called from the links' threads, without any lock held; must not wait for
/// anything, least of all for a slot.
pub trait SlotHost: Send + Sync {
    /// The link of `slot` is in this state now; `reason` says why, for [`LinkState::Lost`].
    fn link_changed(&self, slot: &str, state: LinkState, reason: &str);

    /// The device of `slot` has changed its configuration space.
    fn config_changed(&self, slot: &str);
}

/// Called on the thread of a vCPU with the number of a queue (below the slot's number of queues) of which the guest says that it
/// has something in it. The queue may be one that the driver has not set up. No lock is held; until this returns, the vCPU waits.
pub type Notify = Arc<dyn Fn(u16) + Send + Sync>;

/// Where the guest's notifications of queues go.
///
/// The hypervisor itself always uses [`Notifications::Kvm`]. The others put this process into the data path, which is what they are
/// for: a benchmark that links this crate compares against them.
#[derive(Clone, Default)]
pub enum Notifications {
    /// KVM signals the device's eventfd (ioeventfd); this process sees none.
    #[default]
    Kvm,
    /// They come to this process, which signals the device's eventfd.
    Exit,
    /// They come to this process, which calls this and signals nothing.
    Call(Notify),
}

impl std::fmt::Debug for Notifications {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Notifications::Kvm => "Kvm",
            Notifications::Exit => "Exit",
            Notifications::Call(_) => "Call",
        })
    }
}

/// How a slot works that is not part of its configuration.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where notifications go.
    pub notifications: Notifications,
}

/// A virtio-pci function and its link to a device.
pub struct Slot {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot").field("id", &self.shared.fixed.params.id).finish_non_exhaustive()
    }
}

/// What the slot and its link's thread share.
struct Shared {
    fixed: Arc<Fixed>,
    patience: Patience,
    host: Arc<dyn SlotHost>,
    // Number of queues, if it came from the device.
    queues_of_device: Option<u64>,
    // There is something to do for the link.
    wake: EventFd,
    // The device found a ring broken (vhost-user SET_VRING_ERR).
    error: EventFd,
    // Signalled once and for all at shutdown; ends every wait.
    stop: Arc<EventFd>,
    stopped: AtomicBool,
    guarded: Mutex<Guarded>,
    changed: Condvar,
}

/// What the lock guards.
struct Guarded {
    state: State,
    link: LinkStatus,
}

struct LinkStatus {
    state: LinkState,
    since: Instant,
    reconnects: u64,
    last_error: String,
}

impl Slot {
    /// Connects to the device of `config` and learns what it is; the link lives from then on until [`Slot::shutdown`]. Takes a few
    /// seconds at most.
    ///
    /// # Errors
    /// `INVALID_FIELD` for a configuration that cannot work, `DEVICE_UNREACHABLE` if nobody answers at the socket or what answers is
    /// no vhost-user device that can be used.
    pub fn connect(
        config: &v1::SlotConfig,
        ram: Arc<GuestRam>,
        host: Arc<dyn SlotHost>,
    ) -> Result<Arc<Self>, Error> {
        Self::connect_with(config, ram, host, Options::default())
    }

    /// [`Slot::connect`] with options that the hypervisor itself does not use.
    ///
    /// # Errors
    /// As [`Slot::connect`].
    pub fn connect_with(
        config: &v1::SlotConfig,
        ram: Arc<GuestRam>,
        host: Arc<dyn SlotHost>,
        options: Options,
    ) -> Result<Arc<Self>, Error> {
        let patience = Patience::default();
        let params = Params::new(config)?;
        let id = params.id.clone();
        let of_host = |e: io::Error| {
            let errno = e.raw_os_error().unwrap_or(0).to_string();
            Error::new(Code::Internal, ErrorReason::Host, format!("slot {id}: {e}")).with("errno", errno)
        };
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let stop = Arc::new(event().map_err(of_host)?);
        let (frontend, offer) = first_contact(&params, patience, &stop)?;
        let (queues, queues_of_device) = match (params.queues, offer.queues) {
            (Some(n), _) => (n, None),
            (None, Some(n)) if n > 0 => {
                let queues = n.min(u64::from(layout::MAX_QUEUES));
                (queues as u16, Some(queues))
            }
            (None, _) => {
                let message = format!("slot {id}: the device does not say how many queues it has");
                return Err(Error::invalid_field("slots.queues", message)
                    .remedy("set the number of queues in the slot's configuration"));
            }
        };
        let channels =
            (0..queues).map(|_| Channel::new()).collect::<io::Result<Vec<_>>>().map_err(of_host)?;
        // What a device does not say about its configuration was said by whoever configured the slot.
        let config_writable = offer.config.is_some();
        let mut device_config = offer.config.unwrap_or_else(|| {
            let mut fixed = params.static_config.clone();
            if !fixed.is_empty() {
                fixed.resize(fixed.len().max(params.config_size), 0);
            }
            fixed
        });
        device_config.truncate(layout::MAX_CONFIG);
        let fixed = Arc::new(Fixed { params, options, ram, channels });
        let state = State::new(Arc::clone(&fixed), offer.features, device_config, config_writable);
        let shared = Arc::new(Shared {
            fixed,
            patience,
            host,
            queues_of_device,
            wake: event().map_err(of_host)?,
            error: event().map_err(of_host)?,
            stop,
            stopped: AtomicBool::new(false),
            guarded: Mutex::new(Guarded {
                state,
                link: LinkStatus {
                    state: LinkState::Active,
                    since: Instant::now(),
                    reconnects: 0,
                    last_error: String::new(),
                },
            }),
            changed: Condvar::new(),
        });
        let link = Link::new(Arc::clone(&shared), frontend);
        let thread = thread::Builder::new()
            .name(format!("slot:{id}"))
            .stack_size(STACK)
            .spawn(move || link.run())
            .map_err(of_host)?;
        Ok(Arc::new(Self { shared, thread: Mutex::new(Some(thread)) }))
    }

    /// Lets the guest of a KVM VM use the slot: notifications and interrupts go through KVM from now on.
    pub fn bind(&self, vm: &Arc<VmFd>, router: &Arc<IrqRouter>) {
        let binding = Binding::new(Arc::clone(vm), Arc::clone(router));
        self.shared.lock().state.bind(binding);
    }

    /// Undoes [`Slot::bind`], before the KVM VM goes away. No vCPU may run.
    pub fn unbind(&self) {
        self.shared.lock().state.unbind();
    }

    /// Puts the slot into the state after power-on, as a reset of the machine does. Returns when the device has stopped using the
    /// rings, or has lost its connection for not doing so in time: after a few seconds at most. No vCPU may run.
    pub fn reset(&self) {
        let mut shared = self.shared.lock();
        if shared.state.request_reset() {
            self.shared.wake();
        }
        let mut shared = self
            .shared
            .changed
            .wait_while(shared, |s| s.state.orders.resetting)
            .unwrap_or_else(PoisonError::into_inner);
        shared.state.power_on();
    }

    /// State and counters.
    pub fn info(&self) -> v1::SlotInfo {
        let shared = self.shared.lock();
        let (state, link) = (&shared.state, &shared.link);
        v1::SlotInfo {
            id: self.shared.fixed.params.id.clone(),
            link: link.state.into(),
            link_state_age_ms: link.since.elapsed().as_millis() as u64,
            reconnects: link.reconnects,
            pci_address: state.placement().map(|p| p.address.to_string()).unwrap_or_default(),
            driver_features: state.driver_features(),
            device_features: state.device_features(),
            driver_ok: state.driver_ok(),
            last_error: link.last_error.clone(),
        }
    }

    /// Closes the connection for good. Works in every state of the link, and never waits for the device. Idempotent.
    pub fn shutdown(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        // Neither can fail with less than 2^64 signals in it.
        let _ = self.shared.stop.write(1);
        self.shared.wake();
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let shared = self.shared.lock();
        let (shared, _) = self
            .shared
            .changed
            .wait_timeout_while(shared, FAREWELL, |s| s.link.state != LinkState::Removed)
            .unwrap_or_else(PoisonError::into_inner);
        let removed = shared.link.state == LinkState::Removed;
        drop(shared);
        if removed {
            // It has said its last word; an error would be a panic, which ends the process.
            let _ = thread.join();
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// The first handshake. A device whose process is just starting (or starting again) gets some time.
fn first_contact(
    params: &Params,
    patience: Patience,
    stop: &Arc<EventFd>,
) -> Result<(Frontend, Offer), Error> {
    let path = params.socket.display();
    let unreachable = |why: &dyn std::fmt::Display| {
        Error::new(
            Code::Unavailable,
            ErrorReason::DeviceUnreachable,
            format!("slot {}: no device at {path}: {why}", params.id),
        )
        .resource(params.socket.display().to_string())
    };
    let start = Instant::now();
    let (frontend, offer) = loop {
        match Frontend::connect(&params.socket, params.config_size, patience, Arc::clone(stop)) {
            Ok(connected) => break connected,
            Err(LinkError::Unreachable(_) | LinkError::Closed) if start.elapsed() < FIRST_CONTACT => {
                thread::sleep(FIRST_CONTACT_PAUSE);
            }
            Err(e @ LinkError::Refused("GET_CONFIG")) => {
                return Err(unreachable(&e).remedy(format!(
                    "set config_size to the length of the device's configuration space ({} bytes were asked for)",
                    params.config_size
                )));
            }
            Err(e) => {
                let remedy = "check that the card runs and serves a device at this path";
                return Err(unreachable(&e).remedy(remedy));
            }
        }
    };
    if offer.features & common::F_VERSION_1 == 0 {
        let why = format!("it offers features {:#x}, without VIRTIO_F_VERSION_1", offer.features);
        return Err(unreachable(&why).remedy("use a device that follows VirtIO 1.0 or later"));
    }
    Ok((frontend, offer))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Guarded> {
        self.guarded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // It fails only with 2^64 signals in it.
        let _ = self.wake.write(1);
    }

    /// The guest has notified a queue, and the notification came here.
    fn notify(&self, queue: u16) {
        if let Notifications::Call(call) = &self.fixed.options.notifications {
            call(queue);
        } else if let Some(channel) = self.fixed.channels.get(usize::from(queue)) {
            // It fails only when it is signalled 2^64 times over already.
            let _ = channel.kick.write(1);
        }
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn link_state(&self) -> LinkState {
        self.lock().link.state
    }

    /// One attempt to connect.
    fn connect(&self) -> Result<(Frontend, Offer), LinkError> {
        let params = &self.fixed.params;
        Frontend::connect(&params.socket, params.config_size, self.patience, Arc::clone(&self.stop))
    }

    /// Takes a device that is back, if it can take the place of the one before.
    fn accept(&self, offer: &Offer) -> Result<(), LinkError> {
        let mut shared = self.lock();
        let driver = shared.state.driver_features() | common::F_VERSION_1;
        link::compatible(offer, driver, self.queues_of_device)?;
        shared.state.set_device_features(offer.features);
        drop(shared);
        if let Some(config) = &offer.config {
            self.set_config(config, false);
        }
        Ok(())
    }

    fn set_config(&self, config: &[u8], always: bool) {
        if self.lock().state.set_config(config, always) {
            self.host.config_changed(&self.fixed.params.id);
        }
    }

    /// Does a reset that waits for the rings, which are stopped.
    fn finish_reset(&self) {
        let mut shared = self.lock();
        if shared.state.orders.resetting {
            shared.state.finish_reset();
            self.changed.notify_all();
        }
    }

    fn set_link(&self, state: LinkState, reason: &str) {
        let mut shared = self.lock();
        if shared.link.state == state {
            return;
        }
        shared.link.state = state;
        shared.link.since = Instant::now();
        drop(shared);
        self.changed.notify_all();
        self.host.link_changed(&self.fixed.params.id, state, reason);
    }

    fn reconnected(&self) {
        self.lock().link.reconnects += 1;
        self.set_link(LinkState::Active, "");
    }

    /// The connection is lost, or an attempt to make one failed.
    fn lost(&self, error: &LinkError) {
        let reason = error.to_string();
        {
            let mut shared = self.lock();
            let link = &mut shared.link;
            // That nobody listens is what an outage looks like, not why it began.
            let news = !matches!(error, LinkError::Unreachable(_)) || link.last_error.is_empty();
            if news {
                link.last_error.clone_from(&reason);
            }
        }
        self.set_link(LinkState::Lost, &reason);
    }
}

impl PciFunction for Slot {
    fn read_config(&self, offset: u8, data: &mut [u8]) {
        let window = self.shared.lock().state.window(offset, data.len());
        if let Some(access) = window {
            let mut bytes = [0xff; 4];
            if let Some((at, length)) = access {
                self.read_bar(at, &mut bytes[..length]);
            }
            self.shared.lock().state.set_window_data(&bytes);
        }
        self.shared.lock().state.read_pci(offset, data);
    }

    fn write_config(&self, offset: u8, data: &[u8]) {
        let (window, bytes) = {
            let mut shared = self.shared.lock();
            let window = shared.state.window(offset, data.len());
            shared.state.write_pci(offset, data);
            (window, shared.state.window_data())
        };
        if let Some(Some((at, length))) = window {
            self.write_bar(at, &bytes[..length]);
        }
    }

    fn bar_size(&self) -> u64 {
        layout::bar_size(self.shared.fixed.channels.len() as u16)
    }

    fn bar(&self) -> Option<u64> {
        self.shared.lock().state.bar()
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) -> Exit {
        self.shared.lock().state.read_bar(offset, data)
    }

    fn write_bar(&self, offset: u64, data: &[u8]) -> Exit {
        let (exit, effect) = self.shared.lock().state.write_bar(offset, data);
        match effect {
            Effect::Nothing => {}
            Effect::Wake => self.shared.wake(),
            Effect::Notify(queue) => self.shared.notify(queue),
        }
        exit
    }

    fn place(&self, placement: Placement) {
        self.shared.lock().state.place(placement);
    }
}
