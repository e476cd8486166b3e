//! What a slot and the thread of its link share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::v1;
use vmm_sys_util::eventfd::EventFd;

use super::common::F_VERSION_1;
use super::device_config::ConfigWrite;
use super::state::{Activation, Fixed, State};
use super::vhost_user::{Cancel, Frontend, LinkError, Offer, Patience};
use super::{FAREWELL, LinkState, Notifications, SlotHost, link};
use crate::memory::GuestRam;

/// A link that stays lost says why at most so often.
const REASONS: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Shared {
    pub(super) fixed: Arc<Fixed>,
    pub(super) patience: Patience,
    pub(super) host: Arc<dyn SlotHost>,
    /// Number of queues, if it came from the device.
    pub(super) queues_of_device: Option<u64>,
    /// There is something to do for the link.
    pub(super) wake: EventFd,
    /// The device found a ring broken (vhost-user SET_VRING_ERR).
    pub(super) error: EventFd,
    /// Ends every wait for the device.
    pub(super) cancel: Cancel,
    pub(super) stopped: AtomicBool,
    pub(super) guarded: Mutex<Guarded>,
    pub(super) changed: Condvar,
}

/// What the lock guards.
pub(super) struct Guarded {
    pub(super) state: State,
    pub(super) link: LinkStatus,
}

/// What is known of the link.
pub(super) struct LinkStatus {
    state: LinkState,
    since: Instant,
    // How far an attempt to connect is, during an outage.
    attempt: Option<LinkState>,
    reconnects: u64,
    last_error: String,
    // Why the link is lost, as it was told last, and when.
    told: Option<(String, Instant)>,
    // The link connects, or starts rings: a reset does not wait for that.
    starting: bool,
    // A reset has waited long enough: the connection is to be dropped.
    cut: bool,
    // A connection was lost while rings ran: a device that does not know may still write to the guest's memory.
    stray: bool,
    keeps_inflight: bool,
    // The protocol features that the device had, if it knew any: those that the next one is expected to have.
    protocol: Option<u64>,
    // The last attempt to connect has failed: the next asks step by step.
    careful: bool,
}

impl LinkStatus {
    /// Of a link whose first connection has been made, to a device that keeps what is in flight in shared memory or does not, and
    /// has these protocol features.
    pub(super) fn new(keeps_inflight: bool, protocol: Option<u64>) -> Self {
        Self {
            state: LinkState::Active,
            since: Instant::now(),
            attempt: None,
            reconnects: 0,
            last_error: String::new(),
            told: None,
            starting: false,
            cut: false,
            stray: false,
            keeps_inflight,
            protocol,
            careful: false,
        }
    }
}

/// What the link has to do next.
pub(super) enum Order {
    /// Give the connection up, for this reason.
    Drop(LinkError),
    /// Stop the rings that run.
    Stop,
    /// Reset the device. No ring runs.
    Reset,
    /// Pass a write to the configuration on.
    Write(ConfigWrite),
    /// Start rings.
    Start(Arc<Activation>),
    /// Nothing.
    Wait,
}

/// What a vCPU or the machine asks.
impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Guarded> {
        self.guarded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The registers ask something of the link.
    pub(super) fn wake(&self, guarded: &Guarded) {
        // They fail only with 2^64 signals in them.
        let _ = self.wake.write(1);
        if guarded.link.starting && guarded.state.orders.resetting {
            let _ = self.cancel.cut.write(1);
        }
    }

    /// The guest has notified a queue, and the notification came here.
    pub(super) fn notify(&self, queue: u16) {
        if let Notifications::Call(call) = &self.fixed.options.notifications {
            call(queue);
        } else if let Some(channel) = self.fixed.channels.get(usize::from(queue)) {
            // It fails only when it is signalled 2^64 times over already.
            let _ = channel.kick.write(1);
        }
    }

    /// See [`Slot::reset`](super::Slot::reset).
    pub(super) fn reset(&self) -> bool {
        let mut shared = self.lock();
        if shared.state.request_reset() {
            self.wake(&shared);
        }
        let mut shared = self.wait_for_reset(shared, self.patience.machine_reset);
        if shared.state.orders.resetting {
            shared.link.cut = true;
            let _ = self.cancel.cut.write(1);
            shared = self.wait_for_reset(shared, FAREWELL);
        }
        if shared.state.orders.resetting {
            // The link's thread does not get to it. Whatever it does later, it does with memory that nobody needs any more.
            shared.link.stray = true;
            shared.state.finish_reset();
        }
        shared.state.power_on();
        !shared.link.stray
    }

    fn wait_for_reset<'a>(&self, shared: MutexGuard<'a, Guarded>, time: Duration) -> MutexGuard<'a, Guarded> {
        let wait = self.changed.wait_timeout_while(shared, time, |s| s.state.orders.resetting);
        wait.unwrap_or_else(PoisonError::into_inner).0
    }

    /// See [`Slot::replace_memory`](super::Slot::replace_memory).
    pub(super) fn replace_memory(&self, ram: Arc<GuestRam>) {
        let mut shared = self.lock();
        shared.state.set_ram(ram);
        shared.link.stray = false;
        self.wake(&shared);
    }

    pub(super) fn info(&self) -> v1::SlotInfo {
        let shared = self.lock();
        let (state, link) = (&shared.state, &shared.link);
        v1::SlotInfo {
            id: self.fixed.params.id.clone(),
            link: link.attempt.unwrap_or(link.state).into(),
            link_state_age_ms: link.since.elapsed().as_millis() as u64,
            reconnects: link.reconnects,
            pci_address: state.placement().map(|p| p.address.to_string()).unwrap_or_default(),
            driver_features: state.driver_features(),
            device_features: state.device_features(),
            driver_ok: state.driver_ok(),
            last_error: link.last_error.clone(),
            keeps_inflight: link.keeps_inflight,
        }
    }

    /// Ends the link, which waits for nothing from now on.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        let _ = self.cancel.stop.write(1);
        let _ = self.wake.write(1);
    }

    /// Waits until the link has ended; says whether it has.
    pub(super) fn wait_until_removed(&self, time: Duration) -> bool {
        let wait = self.changed.wait_timeout_while(self.lock(), time, |s| s.link.state != LinkState::Removed);
        wait.unwrap_or_else(PoisonError::into_inner).0.link.state == LinkState::Removed
    }
}

/// What the link's thread asks and tells.
impl Shared {
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    pub(super) fn link_state(&self) -> LinkState {
        self.lock().link.state
    }

    /// What to do next at a connection where the rings of activation `running` run.
    pub(super) fn order(&self, frontend: &mut Frontend, running: Option<u64>) -> Order {
        let mut shared = self.lock();
        self.begin_step(&mut shared);
        frontend.forget_cut();
        let Guarded { state, link } = &mut *shared;
        let wanted = state.orders.activation.as_ref();
        if link.cut {
            Order::Drop(LinkError::CutByReset)
        } else if running.is_some() && running != wanted.map(|a| a.epoch) {
            Order::Stop
        } else if state.orders.resetting {
            Order::Reset
        } else if frontend.has_other_memory(state.ram()) {
            Order::Drop(LinkError::MemoryReplaced)
        } else if let Some(write) = state.config.next() {
            Order::Write(write.clone())
        } else if let Some(activation) = wanted.filter(|_| running.is_none()) {
            link.starting = true;
            Order::Start(Arc::clone(activation))
        } else {
            Order::Wait
        }
    }

    /// What a reset has interrupted is over.
    fn begin_step(&self, shared: &mut Guarded) {
        shared.link.starting = false;
        if !shared.link.cut {
            let _ = self.cancel.cut.read();
        }
    }

    /// There is no connection: a reset that waits is done.
    pub(super) fn disconnected(&self) {
        let mut shared = self.lock();
        shared.link.cut = false;
        self.begin_step(&mut shared);
        self.finish_reset_locked(&mut shared);
    }

    /// Does a reset that waits for the rings, which are stopped.
    pub(super) fn finish_reset(&self) {
        self.finish_reset_locked(&mut self.lock());
    }

    fn finish_reset_locked(&self, shared: &mut Guarded) {
        if shared.state.orders.resetting {
            shared.state.finish_reset();
            self.changed.notify_all();
        }
    }

    /// One attempt to connect. A reset from now on does not wait for it.
    pub(super) fn connect(&self) -> Result<Frontend, LinkError> {
        let params = &self.fixed.params;
        {
            let mut shared = self.lock();
            shared.link.starting = true;
            shared.link.attempt = Some(LinkState::Connecting);
        }
        let dial = || Frontend::dial(&params.socket, self.patience, self.cancel.clone());
        let mut frontend = dial()?;
        let expected = {
            let mut shared = self.lock();
            shared.link.attempt = Some(LinkState::Negotiating);
            // Until it is seen to work.
            (!std::mem::replace(&mut shared.link.careful, true)).then_some(shared.link.protocol)
        };
        let mut offer = None;
        if let Some(protocol) = expected {
            offer = frontend.negotiate_as(protocol, params.config_size)?;
            if offer.is_none() {
                // Another version of the card, perhaps.
                drop(frontend);
                frontend = dial()?;
            }
        }
        let offer = match offer {
            Some(offer) => offer,
            None => frontend.negotiate(params.config_size)?,
        };
        self.accept(&offer, frontend.has_inflight())?;
        Ok(frontend)
    }

    /// Takes a device that is back, if it can take the place of the one before.
    fn accept(&self, offer: &Offer, keeps_inflight: bool) -> Result<(), LinkError> {
        let mut shared = self.lock();
        let driver = shared.state.driver_features() | F_VERSION_1;
        link::compatible(offer, driver, self.queues_of_device)?;
        shared.link.keeps_inflight = keeps_inflight;
        (shared.link.protocol, shared.link.careful) = (offer.protocol, false);
        shared.state.set_device_features(offer.features);
        shared.state.config.tell_again();
        drop(shared);
        if let Some(config) = &offer.config {
            self.set_config(config, false);
        }
        Ok(())
    }

    pub(super) fn set_config(&self, config: &[u8], always: bool) {
        let news = self.lock().state.set_config(config, always);
        if news {
            self.host.config_changed(&self.fixed.params.id);
        }
    }

    fn set_link(&self, state: LinkState, reason: &str) {
        let mut shared = self.lock();
        shared.link.attempt = None;
        if shared.link.state == state {
            return;
        }
        shared.link.state = state;
        shared.link.since = Instant::now();
        drop(shared);
        self.changed.notify_all();
        self.host.link_changed(&self.fixed.params.id, state, reason);
    }

    pub(super) fn reconnected(&self) {
        let outage = {
            let mut shared = self.lock();
            shared.link.reconnects += 1;
            shared.link.told = None;
            shared.link.since.elapsed()
        };
        self.say(&format!("the device is back after {} ms", outage.as_millis()));
        self.set_link(LinkState::Active, "");
    }

    pub(super) fn removed(&self) {
        self.set_link(LinkState::Removed, "");
    }

    /// The connection is lost, or an attempt to make one failed. `stray`: rings were running, so the device may still use the guest's
    /// memory.
    pub(super) fn lost(&self, error: &LinkError, stray: bool) {
        let reason = error.to_string();
        let now = Instant::now();
        let tell = {
            let mut shared = self.lock();
            let link = &mut shared.link;
            link.stray |= stray;
            link.attempt = None;
            // That nobody listens is what an outage looks like, not why it began.
            if !matches!(error, LinkError::Unreachable(_)) || link.last_error.is_empty() {
                link.last_error.clone_from(&reason);
            }
            let tell = link.told.as_ref().is_none_or(|(before, when)| {
                *before != reason && now.saturating_duration_since(*when) >= REASONS
            });
            if tell {
                link.told = Some((reason.clone(), now));
            }
            tell
        };
        if self.link_state() != LinkState::Lost {
            self.say(&format!("the device is lost: {reason}"));
            self.set_link(LinkState::Lost, &reason);
        } else if tell {
            self.say(&format!("the device is still lost: {reason}"));
            self.host.link_changed(&self.fixed.params.id, LinkState::Lost, &reason);
        }
    }

    fn say(&self, what: &str) {
        eprintln!("outboard-hypervisor: slot {}: {what}", self.fixed.params.id);
    }
}
