//! What is known of the VM: its state, its events and its numbers. Written by whoever knows, read by the control service at
//! any time, also while the machine is busy.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use proto::v1::hypervisor_event::Event;
use proto::v1::{
    HypervisorConfig, HypervisorEvent, HypervisorInfo, HypervisorState, HypervisorStats, LinkChanged,
    LinkState, VmEnded, VmReset,
};
use tokio::sync::broadcast;

use crate::exits::{Exit, ExitCounters};
use crate::platform::console::Console;
use crate::slot::{Slot, SlotHost};

/// Events that a subscriber may lag behind before it loses the oldest; it sees that by the gap in `sequence`.
const EVENT_QUEUE: usize = 64;

/// Microseconds after the start of the process, or 0 for "not yet".
#[derive(Debug, Default)]
struct Moment(AtomicU64);

impl Moment {
    fn set_once(&self, started: Instant) {
        let now = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
        let _ = self.0.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Status {
    started: Instant,
    first_entry: Moment,
    first_console_byte: Arc<Moment>,
    console: Arc<Console>,
    events: broadcast::Sender<HypervisorEvent>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    sequence: u64,
    state: HypervisorState,
    ended: Option<HypervisorEvent>,
    config: Option<HypervisorConfig>,
    resets: u64,
    counters: Vec<Arc<ExitCounters>>,
    slots: Vec<Arc<Slot>>,
}

/// A subscription to events: the state as it is, and what comes after it.
#[derive(Debug)]
pub struct EventSubscription {
    /// The current state, as the first event.
    pub current: HypervisorEvent,
    /// How the VM ended, if it has: nothing will come after it.
    pub ended: Option<HypervisorEvent>,
    /// Later events.
    pub later: broadcast::Receiver<HypervisorEvent>,
}

impl Status {
    /// The status of a process that started at `started` and is not configured yet.
    pub fn new(started: Instant) -> Arc<Self> {
        let first_console_byte = Arc::new(Moment::default());
        let first_byte = Arc::clone(&first_console_byte);
        let status = Self {
            started,
            first_entry: Moment::default(),
            first_console_byte,
            console: Console::new(move || first_byte.set_once(started)),
            events: broadcast::Sender::new(EVENT_QUEUE),
            inner: Mutex::new(Inner {
                sequence: 0,
                state: HypervisorState::Unspecified,
                ended: None,
                config: None,
                resets: 0,
                counters: Vec::new(),
                slots: Vec::new(),
            }),
        };
        status.set_state(HypervisorState::Unconfigured);
        Arc::new(status)
    }

    /// The VM's console.
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    /// Tells subscribers.
    pub fn publish(&self, event: Event) {
        self.publish_locked(&mut self.lock(), event);
    }

    /// Changes the state and tells subscribers.
    pub fn set_state(&self, state: HypervisorState) {
        let mut inner = self.lock();
        if inner.state != state {
            inner.state = state;
            self.publish_locked(&mut inner, Event::State(state.into()));
        }
    }

    /// The state now.
    pub fn state(&self) -> HypervisorState {
        self.lock().state
    }

    /// How the VM ended.
    pub fn ended(&self) -> Option<HypervisorEvent> {
        self.lock().ended.clone()
    }

    /// A subscriber's first event, and the others.
    pub fn subscribe(&self) -> EventSubscription {
        let inner = self.lock();
        EventSubscription {
            current: event(inner.sequence, Event::State(inner.state.into())),
            ended: inner.ended.clone(),
            later: self.events.subscribe(),
        }
    }

    pub(super) fn configured(
        &self,
        config: HypervisorConfig,
        counters: Vec<Arc<ExitCounters>>,
        slots: Vec<Arc<Slot>>,
    ) {
        let mut inner = self.lock();
        inner.config = Some(config);
        inner.counters = counters;
        inner.slots = slots;
        drop(inner);
        self.set_state(HypervisorState::Configured);
    }

    pub(super) fn counted_reset(&self, reset: VmReset) {
        let mut inner = self.lock();
        inner.resets += 1;
        self.publish_locked(&mut inner, Event::Reset(reset));
    }

    pub(super) fn end(&self, ended: VmEnded) {
        self.set_state(HypervisorState::Ended);
        let mut inner = self.lock();
        let event = self.publish_locked(&mut inner, Event::Ended(ended));
        inner.ended = Some(event);
        // They hold this as their host.
        let slots = std::mem::take(&mut inner.slots);
        drop(inner);
        drop(slots);
    }

    pub(super) fn entered(&self) {
        self.first_entry.set_once(self.started);
    }

    /// What the VM is.
    pub fn info(&self) -> HypervisorInfo {
        // Asked without our lock, as a slot may be telling us something.
        let slots = self.lock().slots.clone().iter().map(|s| s.info()).collect();
        let inner = self.lock();
        HypervisorInfo {
            vm_id: inner.config.as_ref().map(|c| c.vm_id.clone()).unwrap_or_default(),
            state: inner.state.into(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            config: inner.config.clone(),
            slots,
            resets: inner.resets,
        }
    }

    /// The numbers.
    pub fn stats(&self) -> HypervisorStats {
        let counters = self.lock().counters.clone();
        let sum = |e: Exit| counters.iter().map(|c| c.get(e)).sum::<u64>();
        let by_reason: Vec<_> = Exit::ALL.into_iter().map(|e| (e, sum(e))).filter(|(_, n)| *n > 0).collect();
        let console = self.console.counters();
        HypervisorStats {
            userspace_exits_total: by_reason.iter().map(|(_, n)| n).sum(),
            data_path_exits: by_reason.iter().filter(|(e, _)| e.is_data_path()).map(|(_, n)| n).sum(),
            userspace_exits: by_reason
                .iter()
                .map(|(e, n)| (e.as_str().to_owned(), *n))
                .collect::<HashMap<_, _>>(),
            vcpu_userspace_exits: counters
                .iter()
                .map(|c| Exit::ALL.into_iter().map(|e| c.get(e)).sum())
                .collect(),
            console_bytes: console.written,
            console_dropped_bytes: console.dropped,
            first_entry_us: self.first_entry.get(),
            first_console_byte_us: self.first_console_byte.get(),
        }
    }

    fn publish_locked(&self, inner: &mut Inner, what: Event) -> HypervisorEvent {
        inner.sequence += 1;
        let event = event(inner.sequence, what);
        // Nobody listening is fine.
        let _ = self.events.send(event.clone());
        event
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SlotHost for Status {
    fn link_changed(&self, slot: &str, state: LinkState, reason: &str) {
        self.publish(Event::Link(LinkChanged {
            slot_id: slot.to_owned(),
            state: state.into(),
            reason: reason.to_owned(),
        }));
    }

    fn config_changed(&self, slot: &str) {
        self.publish(Event::ConfigChangedSlot(slot.to_owned()));
    }
}

fn event(sequence: u64, event: Event) -> HypervisorEvent {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let time_us = i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX);
    HypervisorEvent { sequence, time_us, event: Some(event) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subscribers_see_the_state_and_then_every_change() {
        let status = Status::new(Instant::now());
        let mut subscription = status.subscribe();
        assert_eq!(subscription.current.sequence, 1);
        assert_eq!(subscription.current.event, Some(Event::State(HypervisorState::Unconfigured.into())));
        status.set_state(HypervisorState::Running);
        status.set_state(HypervisorState::Running);
        status.end(VmEnded::default());
        let later: Vec<_> = std::iter::from_fn(|| subscription.later.try_recv().ok()).collect();
        assert_eq!(later.iter().map(|e| e.sequence).collect::<Vec<_>>(), [2, 3, 4]);
        assert_eq!(status.subscribe().ended, later.last().cloned());
    }

    #[test]
    fn numbers_are_summed_over_vcpus() {
        let status = Status::new(Instant::now());
        let counters = [(); 2].map(|()| Arc::new(ExitCounters::default()));
        status.configured(HypervisorConfig::default(), counters.to_vec(), Vec::new());
        counters[0].count(Exit::IoSerial);
        counters[1].count(Exit::IoSerial);
        counters[1].count(Exit::MmioSlotNotify);
        status.console().write(b"abc");
        let stats = status.stats();
        assert_eq!(stats.userspace_exits["io:serial"], 2);
        assert_eq!(stats.userspace_exits.len(), 2);
        assert_eq!((stats.userspace_exits_total, stats.data_path_exits), (3, 1));
        assert_eq!(stats.vcpu_userspace_exits, [1, 2]);
        assert_eq!(stats.console_bytes, 3);
        assert!(stats.first_console_byte_us > 0);
        assert_eq!(stats.first_entry_us, 0);
    }
}
