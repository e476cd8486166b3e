//! What an engine is to whoever runs it: the [`Device`] trait.
//!
//! An engine moves data between rings and the world. It knows nothing of vhost-user, sockets or control; the card's
//! vhost-user server drives it, and a VMM that wants the same engine in its own process drives it the same way.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use proto::error::Error;
use proto::v1::{DeviceStats, ErrorReason};
use thiserror::Error as ThisError;
use tonic::Code;

use crate::qos::{Limits, NetLimits};
use crate::ring::{Ring, RingState};

/// What a device is, fixed from its creation to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Virtio device id (VirtIO 1.3 section 5): 1 network, 2 block.
    pub virtio_id: u32,
    /// Device and transport feature bits the engine offers. Ring features (VIRTIO_F_VERSION_1, EVENT_IDX, INDIRECT_DESC)
    /// are added by the runtime: see [`crate::ring::FEATURES`].
    pub features: u64,
    /// Virtqueues, at least 1.
    pub queues: u16,
    /// Largest ring, a power of two.
    pub max_queue_size: u16,
    /// Length of the device configuration space in bytes.
    pub config_size: u32,
}

/// A queue could not be given back in time: requests are still being worked on.
#[derive(Debug, ThisError, PartialEq, Eq)]
#[error("queue {index} still has {in_flight} requests in flight")]
pub struct Busy {
    /// The queue.
    pub index: u16,
    /// Requests taken and not yet returned.
    pub in_flight: u16,
}

/// One virtio device of an engine.
///
/// **Threads.** Methods are called by one control thread at a time (a connection's, or the VMM's), never by a data
/// thread. A started ring belongs to exactly one thread of the engine's choice until it is given back; which thread, and
/// whether it owns one ring or those of many devices, is the engine's business.
///
/// **Order.** `start_queue` and `stop_queue` alternate for one index; queues start and stop independently. `reset` is
/// called with all queues stopped. `close` is called once, last, with all queues stopped or [`Busy`].
pub trait Device: Send + Sync {
    /// What it is. Always the same answer.
    fn identity(&self) -> &Identity;

    /// Fills `data` from the configuration space at `offset`. The caller has checked that both lie within
    /// [`Identity::config_size`].
    fn read_config(&self, offset: u32, data: &mut [u8]);

    /// The driver writes to the configuration space; bounds are checked as in `read_config`. What may not be written is
    /// ignored or refused, as the device type's specification says.
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), Error>;

    /// From now on `ring` is the engine's. It looks at the ring at once, not only after the first kick: requests may be
    /// waiting, and some may be left from a predecessor's crash (the ring pops those first). Returns without waiting for
    /// any I/O. An error is the host's (what is wrong with the ring was found before): the ring has been dropped with its
    /// inflight record as it was, the queue counts as stopped, and the front-end will try again.
    fn start_queue(&self, ring: Ring) -> Result<(), Error>;

    /// Orders queue `index` to take no more requests and to finish what is in flight. Returns at once: `stop_queue`
    /// follows, when all queues that are to stop have their orders. An engine whose queues stop without waiting for
    /// anything has nothing to do here.
    fn begin_stop(&self, _index: u16) {}

    /// Takes no more requests from queue `index`, finishes what is in flight, publishes it, and gives the ring's state
    /// back: nothing touches the guest's memory for this queue afterwards. `None`: it was not started. Past `deadline` it
    /// answers [`Busy`], takes no new requests all the same, and is called again until it succeeds: a storage that hangs
    /// must not let a write land after the guest was told that the queue has stopped.
    fn stop_queue(&self, index: u16, deadline: Instant) -> Result<Option<RingState>, Busy>;

    /// From now on the device does no more than `limits` allow ([`crate::qos`]), over all its queues; what waits for older
    /// ones goes by these. Limits are kept by the caller. Called at any time, queues started or not, once before the first
    /// start.
    ///
    /// # Errors
    /// `Unsupported`: it cannot be limited.
    fn set_limits(&self, limits: Limits) -> Result<(), Error> {
        if limits.is_none() { Ok(()) } else { Err(not_limited()) }
    }

    /// The same of a network device, both ways.
    ///
    /// # Errors
    /// `Unsupported`: it is none.
    fn set_net_limits(&self, limits: NetLimits) -> Result<(), Error> {
        if limits.is_none() { Ok(()) } else { Err(not_limited()) }
    }

    /// Back to the state after creation, as far as the driver can change it (a written configuration space).
    fn reset(&self);

    /// Adds what only this kind of device counts.
    fn add_stats(&self, _stats: &mut DeviceStats) {}

    /// The card ends soon. What takes time to give up, and is not needed to go on, is given up now, while guests are still
    /// served: they wait from when their queues stop until the next process serves them.
    fn prepare_end(&self) {}

    /// Ends threads and gives up what the device holds. Does not wait for requests still in flight: what they need
    /// stays until they are done.
    fn close(&self);
}

/// A device was to have limits that devices of its kind do not have.
pub fn not_limited() -> Error {
    Error::new(Code::Unimplemented, ErrorReason::Unsupported, "devices of this kind have no such limits")
        .remedy("limit a disk by `limits`, a network device by `net_limits`")
}

/// An engine's way to tell the driver that the configuration space has changed (a disk grew, a link went down).
///
/// Before a front-end is connected a change needs no telling, so nothing is kept.
#[derive(Clone, Default)]
pub struct ConfigNotifier(Arc<Mutex<Option<Notify>>>);

type Notify = Box<dyn Fn() + Send>;

impl ConfigNotifier {
    /// The configuration space has changed. Never blocks: the message is sent by the device's own control thread.
    pub fn config_changed(&self) {
        if let Some(notify) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            notify();
        }
    }

    /// Sets what a change calls; used by whoever runs the device.
    pub fn connect(&self, notify: impl Fn() + Send + 'static) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(notify));
    }

    /// Changes go nowhere from now on.
    pub fn disconnect(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl std::fmt::Debug for ConfigNotifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConfigNotifier")
    }
}
