//! What a queue's owner and the outside both see of it.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwapOption;

use super::counters::QueueCounters;
use crate::event::Event;
use crate::limit::LogLimit;

/// The part of a queue that outlives its ring's restarts: where to send interrupts, what went wrong, counters. The
/// call descriptor may be changed while the ring runs (a front-end does when the guest masks a vector).
#[derive(Debug, Default)]
pub struct QueueShared {
    /// Signalled for an interrupt; none: the driver polls.
    call: ArcSwapOption<Event>,
    /// Signalled when the queue is broken.
    error: ArcSwapOption<Event>,
    /// Counters.
    pub counters: QueueCounters,
    /// Whatever the guest can cause to be logged about the queue, as often as it likes to start it anew.
    pub log: LogLimit,
    broken: Mutex<Option<String>>,
}

impl QueueShared {
    /// Sets the interrupt's eventfd, and signals it: what was published before, here or by a predecessor that died
    /// between publishing and signalling, may not have been announced. An interrupt too many does no harm.
    pub fn set_call(&self, event: Option<Event>) {
        self.call.store(event.map(Arc::new));
        self.announce();
    }

    /// Interrupts the driver for whatever it may have missed, as at a ring's start.
    pub fn announce(&self) {
        if let Some(call) = &*self.call.load() {
            call.signal();
        }
    }

    /// Sets the error's eventfd. It is signalled at once if the queue is broken already.
    pub fn set_error(&self, event: Option<Event>) {
        self.error.store(event.map(Arc::new));
        if self.broken().is_some() {
            self.signal_error();
        }
    }

    /// Interrupts the driver.
    pub(super) fn call(&self) {
        if let Some(call) = &*self.call.load() {
            call.signal();
            self.counters.calls.add(1);
        }
    }

    /// Why the queue is broken, if it is. It stays so until the queue is started anew.
    pub fn broken(&self) -> Option<String> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Marks the queue broken and tells the front-end by the error eventfd. The first reason stays.
    pub fn set_broken(&self, why: String) {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.signal_error();
    }

    /// Forgets that the queue was broken: it starts anew.
    pub fn clear_broken(&self) {
        *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn signal_error(&self) {
        if let Some(error) = &*self.error.load() {
            error.signal();
        }
    }
}
