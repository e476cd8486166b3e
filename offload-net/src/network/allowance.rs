//! What an interface's limits allow ([`offload_card::qos`]): frames from the guest wait in its ring, which is the queue
//! that a shaper needs, and frames to it that are too many are dropped, so that no sender waits for another's limits.

use std::sync::Arc;

use offload_card::clock;
use offload_card::qos::{Kind, NetLimits, Throttle};
use offload_card::ring::{Counter, Ring};
use proto::v1::NetAllowances;

use crate::frame::Frame;
use crate::switch::PortId;

/// A ring that waits is looked at again when there are tokens for more than one frame, but no later than this after the
/// first may go: each look is a wake-up of the network's thread.
const GATHER_NS: u64 = 50_000;

/// What an interface's limits did, under the names that guests on Nitro know. Written by the network's thread, read by
/// anybody.
#[derive(Debug, Default)]
pub struct Exceeded {
    bw_in: Counter,
    bw_out: Counter,
    pps: Counter,
}

impl Exceeded {
    /// All of them.
    pub fn message(&self) -> NetAllowances {
        NetAllowances {
            bw_in_allowance_exceeded: self.bw_in.get(),
            bw_out_allowance_exceeded: self.bw_out.get(),
            pps_allowance_exceeded: self.pps.get(),
        }
    }
}

/// An interface's limits, and what is left of them.
#[derive(Debug)]
pub(super) struct Allowance {
    outgoing: Option<Throttle>,
    incoming: Option<Throttle>,
    exceeded: Arc<Exceeded>,
}

impl Allowance {
    /// `None` without limits. What has been used of those `before` stays used.
    pub(super) fn new(
        limits: NetLimits,
        before: Option<&Self>,
        exceeded: Arc<Exceeded>,
    ) -> Option<Box<Self>> {
        let now = clock::now();
        let outgoing = Throttle::new(limits.outgoing, before.and_then(|b| b.outgoing.as_ref()), now);
        let incoming = Throttle::new(limits.incoming, before.and_then(|b| b.incoming.as_ref()), now);
        (!limits.is_none()).then(|| Box::new(Self { outgoing, incoming, exceeded }))
    }

    /// When the guest's next frame may go, if there is one in `ring` and it may not go now.
    pub(super) fn holds_back(&self, ring: &mut Ring) -> Option<Held> {
        let throttle = self.outgoing.as_ref()?;
        let now = clock::now();
        let short = throttle.short(now)?;
        if !ring.available().is_ok_and(|frames| frames > 0) {
            return None;
        }
        let counter = if short.of == Kind::Bytes { &self.exceeded.bw_out } else { &self.exceeded.pps };
        counter.add(1);
        ring.counters().throttled.add(1);
        Some(Held {
            queue: ring.index(),
            since: now,
            until: short.until + GATHER_NS.min(throttle.slack() / 4),
        })
    }

    /// A frame from the guest has been taken, of so many packets and bytes.
    pub(super) fn sent(&self, (packets, bytes): (u64, u64)) {
        if let Some(throttle) = &self.outgoing {
            throttle.take_many(packets, bytes.saturating_mul(8), clock::now());
        }
    }

    /// Whether a frame goes to the guest. If so, it is paid for; if not, it is counted.
    pub(super) fn admits(&self, frame: &Frame<'_>) -> bool {
        let Some(throttle) = &self.incoming else { return true };
        let now = clock::now();
        if let Some(short) = throttle.short(now) {
            let counter = if short.of == Kind::Bytes { &self.exceeded.bw_in } else { &self.exceeded.pps };
            counter.add(1);
            return false;
        }
        let (packets, bytes) = frame.on_wire();
        throttle.take_many(packets, bytes.saturating_mul(8), now);
        true
    }
}

/// How long a ring waits: times of [`clock::now`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    /// The ring, by its index in the device.
    queue: u16,
    since: u64,
    until: u64,
}

/// The ports whose frames wait for their limits. Few, and none where there are no limits.
#[derive(Debug, Default)]
pub(super) struct Waiting(Vec<(PortId, Held)>);

impl Waiting {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn contains(&self, id: PortId) -> bool {
        self.0.iter().any(|(waiting, _)| *waiting == id)
    }

    pub(super) fn add(&mut self, id: PortId, held: Held) {
        self.0.push((id, held));
    }

    /// Time until the first of them is to be looked at; `None`: there is none.
    pub(super) fn next(&self) -> Option<std::time::Duration> {
        let until = self.0.iter().map(|(_, held)| held.until).min()?;
        Some(std::time::Duration::from_nanos(until.saturating_sub(clock::now())))
    }

    /// Calls `f` for those that need not wait any more, with the index of the ring that did, and how long, in nanoseconds.
    pub(super) fn release(&mut self, mut f: impl FnMut(PortId, u16, u64)) {
        let now = clock::now();
        self.0.retain(|(id, held)| {
            let due = held.until <= now;
            if due {
                f(*id, held.queue, now.saturating_sub(held.since));
            }
            !due
        });
    }

    /// Lets one go; the index of the ring that has waited, and how long, if it did.
    pub(super) fn remove(&mut self, id: PortId) -> Option<(u16, u64)> {
        let place = self.0.iter().position(|(waiting, _)| *waiting == id)?;
        let (_, held) = self.0.swap_remove(place);
        Some((held.queue, clock::now().saturating_sub(held.since)))
    }
}
