//! What a guest asks of its platform: to be reset, to be switched off.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

/// A wish of the guest's that ends its current life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestRequest {
    /// ACPI reset register, port 0xcf9, the keyboard controller.
    Reset,
    /// A vCPU could not handle an exception of its exception handlers.
    TripleFault,
    /// ACPI S5.
    PowerOff,
}

/// Takes guest requests on vCPU threads and hands on the first one: the guest's life ends once.
pub struct Requests {
    made: AtomicBool,
    sink: Box<dyn Fn(GuestRequest) + Send + Sync>,
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Requests").field("made", &self.made).finish_non_exhaustive()
    }
}

impl Requests {
    /// `sink` must not block.
    pub fn new(sink: impl Fn(GuestRequest) + Send + Sync + 'static) -> Self {
        Self { made: AtomicBool::new(false), sink: Box::new(sink) }
    }

    /// The guest asks. Later requests of the same life are ignored.
    pub fn make(&self, request: GuestRequest) {
        if !self.made.swap(true, Ordering::AcqRel) {
            (self.sink)(request);
        }
    }

    /// Whether the guest has asked: its vCPUs have no business any more.
    pub fn is_made(&self) -> bool {
        self.made.load(Ordering::Acquire)
    }

    /// A new life begins. No vCPU runs now.
    pub fn rearm(&self) {
        self.made.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_first_request_of_a_life_counts() {
        let (tx, rx) = mpsc::channel();
        let requests = Requests::new(move |r| tx.send(r).unwrap());
        requests.make(GuestRequest::PowerOff);
        requests.make(GuestRequest::Reset);
        assert!(requests.is_made());
        requests.rearm();
        requests.make(GuestRequest::TripleFault);
        assert_eq!(rx.try_iter().collect::<Vec<_>>(), [GuestRequest::PowerOff, GuestRequest::TripleFault]);
    }
}
