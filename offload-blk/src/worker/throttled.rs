//! How a queue takes requests of a disk that has limits.

use offload_card::clock;

use super::{MAX_TAKEN, Worker};
use crate::request::HEADER_BYTES;

/// Requests wait until the disk's limits allow the next one. Times of [`clock::now`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Throttled {
    since: u64,
    pub(super) until: u64,
}

impl Worker {
    /// [`Worker::take_requests`], of a disk that has limits.
    #[cold]
    pub(super) fn take_as_allowed(&mut self) -> bool {
        let now = clock::now();
        let mut taken = 0;
        while taken < MAX_TAKEN && self.may_take() {
            // A predecessor has paid for what it left.
            let free = self.ring.recovered() > 0;
            if !(free || self.is_allowed(now)) || !self.pop() {
                break;
            }
            if taken == 0 {
                self.begin_batch();
            }
            taken += 1;
            if let Some(throttle) = self.tap.throttle().filter(|_| !free) {
                let bytes = self.spare.readable_len() + self.spare.writable_len();
                throttle.take(u64::from(bytes.saturating_sub(HEADER_BYTES as u32 + 1)), now);
            }
            self.begin();
            if !self.stopping && self.orders.pending() {
                break;
            }
        }
        self.go_on_with_begun();
        if self.stopping {
            self.end_wait(now);
        }
        taken > 0
    }

    /// The disk's limits allow a request at `now`. If they do not and one waits, it is noted until when.
    fn is_allowed(&mut self, now: u64) -> bool {
        let until = self.tap.throttle().map_or(0, |t| t.ready());
        if until <= now {
            self.end_wait(now);
            return true;
        }
        // An error breaks the ring, which then has nothing.
        if self.ring.available().is_ok_and(|waiting| waiting > 0) {
            let since = self.throttled.map_or(now, |t| t.since);
            self.throttled = Some(Throttled { since, until });
        } else {
            self.end_wait(now);
        }
        false
    }

    /// The limits hold nothing up any more.
    fn end_wait(&mut self, now: u64) {
        if let Some(throttled) = self.throttled.take() {
            let counters = self.ring.counters();
            counters.throttled.add(1);
            counters.throttled_ns.add(now.saturating_sub(throttled.since));
        }
    }
}
