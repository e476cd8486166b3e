//! The link: one thread per slot that talks to the device, connects again whenever the connection is lost, and does what the
//! registers ask.
//!
//! ```text
//!     Slot::connect ──────────────► Active
//!     (connecting, negotiating)     │    ▲
//!     closed, hung, broken protocol ▼    │ connected again, features as before, rings go on
//!                                   Lost ┘            (any state) ── shutdown ──► Removed
//! ```
//!
//! During an outage, attempts pass through Connecting and Negotiating and back to Lost; the age of the state is the length of the
//! outage all the while. Nobody waits for it: notifications of the guest gather in the eventfds, a slot can be shut down at any
//! instant, and a reset is done at once, as nobody is there who would have to stop. (Whether what was there has stopped is another
//! question: see [`Slot::reset`](super::Slot::reset).)

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::LinkState;
use super::ring;
use super::shared::{Order, Shared};
use super::state::Activation;
use super::sys::{self, Seen, Wait, Watch};
use super::vhost_user::{Frontend, Inflight, LinkError, Offer};

/// First pause before connecting again, doubled after each failure.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// Longest pause while the outage is short: a card restarts within it.
const SHORT_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const LONG_PAUSE: Duration = Duration::from_secs(1);
/// How long an outage is short, and how long a connection has to last to count as one that works: then the next attempt is made at
/// once, as a card that is started again may have its socket kept for it, and nothing tells when it is there.
const SETTLED: Duration = Duration::from_secs(10);
const WORKED: Duration = Duration::from_millis(100);
/// How often a device's configuration is read at most, however often it says that it has changed.
const CONFIG_PAUSE: Duration = Duration::from_millis(50);

/// When to connect again.
#[derive(Debug)]
struct Backoff {
    pause: Duration,
    lost_since: Instant,
    next: Instant,
}

impl Backoff {
    fn new(now: Instant) -> Self {
        Self { pause: FIRST_PAUSE, lost_since: now, next: now }
    }

    /// A connection that had been made at `since` is lost.
    fn lost(&mut self, since: Instant, now: Instant) {
        if now.saturating_duration_since(since) >= WORKED {
            *self = Self::new(now);
        } else {
            self.failed(now);
        }
    }

    /// An attempt failed.
    fn failed(&mut self, now: Instant) {
        let short = now.saturating_duration_since(self.lost_since) < SETTLED;
        self.next = now + self.pause;
        self.pause = (self.pause * 2).min(if short { SHORT_PAUSE } else { LONG_PAUSE });
    }

    /// The device's socket was made anew: it is worth trying now, and again soon, as nobody may listen on it yet.
    fn hint(&mut self, now: Instant) {
        self.pause = FIRST_PAUSE;
        self.next = self.next.min(now);
    }
}

/// The link's own state, which only its thread has.
pub(super) struct Link {
    shared: Arc<Shared>,
    frontend: Option<Frontend>,
    active_since: Instant,
    // What runs at the device over this connection.
    running: Option<Arc<Activation>>,
    // Rings run at the device, or may.
    touched: bool,
    // The last activation whose rings a device has had: they go on from their used index.
    started: Option<u64>,
    inflight: Option<Inflight>,
    backoff: Backoff,
    // When the configuration may be read again because it has changed.
    next_config: Instant,
    // While lost: tells when the device's socket may be there again.
    watch: Option<Watch>,
}

impl Link {
    /// A link whose first connection is there.
    pub(super) fn new(shared: Arc<Shared>, frontend: Frontend) -> Self {
        let now = Instant::now();
        Self {
            shared,
            frontend: Some(frontend),
            active_since: now,
            running: None,
            touched: false,
            started: None,
            inflight: None,
            backoff: Backoff::new(now),
            next_config: now,
            watch: None,
        }
    }

    /// Runs until the slot is shut down.
    pub(super) fn run(mut self) {
        // If it may not, it runs later.
        let _ = sys::run_soon();
        while !self.shared.is_stopped() {
            let result = match self.frontend.take() {
                Some(frontend) => self.serve(frontend),
                None => self.reconnect(),
            };
            match result {
                Ok(frontend) => self.frontend = frontend,
                Err(LinkError::Cancelled) => break,
                Err(e) => self.lose(&e),
            }
        }
        self.frontend = None;
        // A reset that still waits must not wait for ever, nor must one that comes later.
        self.shared.lock().state.orders.abandoned = true;
        self.shared.finish_reset();
        self.shared.removed();
    }

    fn lose(&mut self, error: &LinkError) {
        let now = Instant::now();
        if self.shared.link_state() == LinkState::Active {
            self.backoff.lost(self.active_since, now);
        } else {
            self.backoff.failed(now);
        }
        self.running = None;
        self.shared.lost(error, std::mem::take(&mut self.touched));
    }

    /// Does what is asked, then waits until something happens, once.
    fn serve(&mut self, mut frontend: Frontend) -> Result<Option<Frontend>, LinkError> {
        self.follow_orders(&mut frontend)?;
        let mut pause = None;
        if frontend.config_changed() {
            let now = Instant::now();
            pause = self.next_config.checked_duration_since(now).filter(|p| !p.is_zero());
            if pause.is_none() {
                self.next_config = now + CONFIG_PAUSE;
                frontend.drain_backend()?;
                frontend.take_config_changed();
                self.refresh_config(&mut frontend, true)?;
                return Ok(Some(frontend));
            }
        }
        let waits = [
            Wait::event(&self.shared.wake),
            Wait::readable(frontend.main()),
            // A device that says it again and again is not heard during the pause.
            Wait::optional(frontend.backend().filter(|_| pause.is_none())),
            Wait::event(&self.shared.error),
        ];
        let [woken, gone, told, broken] = sys::poll(waits, pause)?;
        if woken {
            // What for, the orders say.
            let _ = self.shared.wake.read();
        }
        if gone {
            return Err(match sys::receive(frontend.main(), &mut [0; 1]) {
                Ok((0, _)) => LinkError::Closed,
                Ok(_) => LinkError::Violation("no request", "an answer to nothing".into()),
                Err(e) => e.into(),
            });
        }
        if told {
            frontend.serve_backend()?;
        }
        if broken && self.shared.error.read().is_ok() && self.running.is_some() {
            self.shared.lock().state.set_needs_reset();
        }
        Ok(Some(frontend))
    }

    /// Without a connection: does what needs none, waits until it is time, and tries to connect.
    fn reconnect(&mut self) -> Result<Option<Frontend>, LinkError> {
        self.shared.disconnected();
        let left = self.backoff.next.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            if self.watch.is_none() {
                // Without one, the pauses bound how late we notice.
                self.watch = Watch::new(&self.shared.fixed.params.socket).ok();
            }
            let created = Wait::optional(self.watch.as_ref().map(Watch::fd));
            let [woken, created] = sys::poll([Wait::event(&self.shared.wake), created], Some(left))?;
            if woken {
                let _ = self.shared.wake.read();
            }
            if created && let Some(watch) = self.watch.take() {
                match watch.take() {
                    Seen::Nothing => self.watch = Some(watch),
                    Seen::Created => {
                        self.watch = Some(watch);
                        self.backoff.hint(Instant::now());
                    }
                    // The directory that takes its place is watched from the next pause on.
                    Seen::Gone => {}
                }
            }
            return Ok(None);
        }
        let mut frontend = self.shared.connect()?;
        // What the previous connection reported last is not about this one.
        let _ = self.shared.error.read();
        self.follow_orders(&mut frontend)?;
        self.active_since = Instant::now();
        self.watch = None;
        self.shared.reconnected();
        Ok(Some(frontend))
    }

    /// Makes the device do what the registers ask.
    fn follow_orders(&mut self, frontend: &mut Frontend) -> Result<(), LinkError> {
        loop {
            match self.shared.order(frontend, self.running.as_ref().map(|r| r.epoch)) {
                Order::Drop(why) => return Err(why),
                Order::Stop => {
                    if let Some(running) = self.running.take() {
                        let rings: Vec<_> = running.rings.iter().map(|r| r.index).collect();
                        frontend.stop_rings(&rings)?;
                        self.touched = false;
                    }
                }
                Order::Reset => {
                    self.inflight = None;
                    // One that cannot has stopped at least; what it says then is what it is.
                    refused_is_fine(frontend.reset_device())?;
                    self.refresh_config(frontend, false)?;
                    self.shared.finish_reset();
                }
                Order::Write(write) => {
                    let taken = refused_is_fine(frontend.set_config(write.offset, &write.data))?;
                    self.shared.lock().state.config.answered(&write, taken);
                    self.refresh_config(frontend, false)?;
                }
                Order::Start(activation) => {
                    frontend.limit(Some(self.shared.patience.start));
                    self.start(frontend, &activation)?;
                    frontend.limit(None);
                    self.running = Some(activation);
                }
                Order::Wait => return Ok(()),
            }
        }
    }

    /// Starts the rings: from the beginning if no device has had them yet, else from where the device before left them.
    fn start(&mut self, frontend: &mut Frontend, activation: &Activation) -> Result<(), LinkError> {
        let again = self.started == Some(activation.epoch);
        if !again {
            self.inflight = None;
        }
        let Some(queue_size) = activation.rings.iter().map(|r| r.size).max() else { return Ok(()) };
        frontend.set_features(activation.features)?;
        frontend.set_memory(&activation.ram)?;
        if frontend.has_inflight() {
            if self.inflight.is_none() {
                let queues = self.shared.fixed.channels.len() as u16;
                self.inflight = frontend.get_inflight(queues, queue_size)?;
            }
            if let Some(area) = &self.inflight {
                frontend.set_inflight(area)?;
            }
        }
        // From here on a device may have taken requests, even if it dies before we hear of it.
        self.started = Some(activation.epoch);
        self.touched = true;
        for ring in &activation.rings {
            let Some(channel) = self.shared.fixed.channels.get(usize::from(ring.index)) else { continue };
            // A device with memory of what is in flight finds there what was taken and not done, and the used index tells it what
            // else is new. Without that memory the used index is right if requests were done in order: of those that were not,
            // some are done twice and some not at all. The available index would skip all that were in flight.
            let base = if again { ring::used_index(ring, &activation.ram) } else { 0 };
            frontend.start_ring(ring, base, &channel.kick, &channel.call, &self.shared.error)?;
        }
        frontend.synchronize()?;
        if again {
            // The device before may have taken a notification without serving it, and served requests without an interrupt.
            for ring in &activation.rings {
                if let Some(channel) = self.shared.fixed.channels.get(usize::from(ring.index)) {
                    let _ = channel.kick.write(1);
                    let _ = channel.call.write(1);
                }
            }
        }
        Ok(())
    }

    fn refresh_config(&self, frontend: &mut Frontend, always: bool) -> Result<(), LinkError> {
        let size = self.shared.fixed.params.config_size;
        if !frontend.has_config() {
            return Ok(());
        }
        match frontend.get_config(size) {
            Ok(config) => self.shared.set_config(&config, always),
            Err(LinkError::Refused(_)) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }
}

/// Whether the device did it; that it refused is no error.
fn refused_is_fine(result: Result<(), LinkError>) -> Result<bool, LinkError> {
    match result {
        Ok(()) => Ok(true),
        Err(LinkError::Refused(_)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Whether a device that offers this can take the place of the one that the slot was made for. `driver`: features that the
/// driver uses; `queues`: how many the guest sees, if their number came from the device.
pub(super) fn compatible(offer: &Offer, driver: u64, queues: Option<u64>) -> Result<(), LinkError> {
    let missing = driver & !offer.features;
    if missing != 0 {
        let why =
            format!("the device came back without features {missing:#x}, which the guest's driver uses");
        return Err(LinkError::Incompatible(why));
    }
    if let Some(queues) = queues
        && offer.queues.is_none_or(|now| now < queues)
    {
        let now = offer.queues.map_or("an unknown number of".into(), |n| n.to_string());
        let why = format!("the device came back with {now} queues instead of {queues}");
        return Err(LinkError::Incompatible(why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_a_limit_that_grows_with_the_outage() {
        let start = Instant::now();
        let mut backoff = Backoff::new(start);
        let mut now = start;
        let mut pauses = Vec::new();
        for _ in 0..200 {
            backoff.failed(now);
            pauses.push((backoff.next - now).as_millis());
            now = backoff.next;
        }
        assert_eq!(pauses[..9], [1, 2, 4, 8, 16, 32, 64, 100, 100]);
        assert_eq!(pauses[199], 1000);
    }

    #[test]
    fn a_connection_that_fails_at_once_does_not_start_over() {
        let start = Instant::now();
        let mut backoff = Backoff::new(start);
        for _ in 0..5 {
            backoff.failed(start);
        }
        backoff.lost(start, start + WORKED / 2);
        assert_eq!(backoff.pause, Duration::from_millis(64));
        backoff.lost(start, start + WORKED);
        assert_eq!(backoff.pause, FIRST_PAUSE);
        assert_eq!(backoff.next, start + WORKED);
    }

    #[test]
    fn a_device_with_less_is_not_the_same() {
        let offer = Offer { features: 0b110, queues: Some(2), config: None, protocol: None };
        assert!(compatible(&offer, 0b100, Some(2)).is_ok());
        assert!(compatible(&offer, 0b1, None).is_err());
        assert!(compatible(&offer, 0, Some(3)).is_err());
        assert!(compatible(&Offer { queues: None, ..offer }, 0, Some(1)).is_err());
    }
}
