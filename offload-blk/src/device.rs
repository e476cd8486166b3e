//! A disk as an offload device.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use offload_card::poll::{PollPolicy, Sender, mailbox};
use offload_card::qos::Limits;
use offload_card::ring::QueueShared;
use offload_card::{Busy, Device, Identity, Ring, RingState};
use proto::error::Error;
use proto::v1::ErrorReason;
use tonic::Code;
use tracing::{Span, debug, warn};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::config::{CONFIG_BYTES, Config};
use crate::io::{MapLimit, Register, Seen};
use crate::mode::ModeFile;
use crate::queue::{QueueHost, QueueStart, host_error};
use crate::request::ID_BYTES;
use crate::share::Storage;
use crate::store::Store;
use crate::worker::{Disk, IoEngine, QueueOrder};

/// Smallest ring: a request has a header, a status and at least one segment of data.
pub const MIN_QUEUE_SIZE: u16 = 4;
/// Largest ring. What a queue keeps per entry is bounded by it.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// What makes a disk.
#[derive(Debug)]
pub struct DiskConfig {
    /// Name for threads and logs.
    pub name: String,
    /// What it stores on.
    pub store: Store,
    /// Request queues, 1 or more.
    pub queues: u16,
    /// Largest ring: a power of two from [`MIN_QUEUE_SIZE`] to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// What GET_ID answers; what is longer than [`ID_BYTES`] is cut.
    pub serial: String,
    /// How to do I/O.
    pub engine: IoEngine,
    /// Whether the guest's memory is registered with the kernel.
    pub register: Register,
    /// How much of its image may be mapped, together with those of others, to read what is in the page cache.
    pub map_limit: Arc<MapLimit>,
    /// When its queues poll.
    pub poll: PollPolicy,
    /// Who calls its queues: [`crate::Threads`], if it is all the same.
    pub host: Arc<dyn QueueHost>,
    /// Where it lies, which it shares with other disks.
    pub storage: Arc<Storage>,
    /// Where the cache mode outlives this process; `None`: it need not.
    pub mode_file: Option<ModeFile>,
}

/// A running queue.
#[derive(Debug)]
struct Queue {
    orders: Sender<QueueOrder>,
    ended: mpsc::Receiver<RingState>,
    shared: Arc<QueueShared>,
}

/// A virtio-blk device.
#[derive(Debug)]
pub struct BlockDevice {
    name: String,
    identity: Identity,
    disk: Arc<Disk>,
    poll: PollPolicy,
    host: Arc<dyn QueueHost>,
    queues: Mutex<Vec<Option<Queue>>>,
    resizing: Mutex<()>,
    span: Span,
}

impl BlockDevice {
    /// A disk with all queues stopped.
    ///
    /// # Errors
    /// `InvalidField`: `queues` or `queue_size` is out of its range.
    pub fn new(config: DiskConfig) -> Result<Self, Error> {
        let DiskConfig {
            name,
            store,
            queues,
            queue_size,
            serial,
            engine,
            register,
            map_limit,
            poll,
            host,
            storage,
            mode_file,
        } = config;
        if queues == 0 {
            return Err(Error::invalid_field("queues", "a disk has at least one queue"));
        }
        if !queue_size.is_power_of_two() || !(MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&queue_size) {
            let message = format!(
                "queue size {queue_size} is not a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}"
            );
            return Err(Error::invalid_field("queue_size", message));
        }
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let config =
            Config::new(*store.geometry(), store.read_only(), store.erases(), queues, queue_size, mode_file);
        let identity = Identity {
            virtio_id: VIRTIO_ID_BLOCK,
            features: config.features(),
            queues,
            max_queue_size: queue_size,
            config_size: CONFIG_BYTES,
        };
        let disk = Arc::new(Disk {
            store,
            config,
            serial: id,
            engine,
            register,
            seen: Arc::new(Seen::new(map_limit)),
            limiter: Arc::default(),
            share: storage.share(queues),
        });
        let span = tracing::info_span!("device", id = name);
        let queues = Mutex::new((0..queues).map(|_| None).collect());
        Ok(Self { name, identity, disk, poll, host, queues, resizing: Mutex::default(), span })
    }

    /// Length of the disk in bytes, now.
    pub fn size_bytes(&self) -> u64 {
        self.disk.config.size_bytes()
    }

    /// Makes the disk `size_bytes` long, and its image with it; 0: as long as its image has become. Whoever has the device
    /// then tells the driver that the configuration space has changed, if it has: true. Requests beyond the old end are good
    /// from now on.
    ///
    /// # Errors
    /// `InvalidField`: the size is none, or is less than before. `Host`: the image cannot be made longer. `Unsupported`:
    /// a disk without storage, or a block device that somebody else makes longer.
    pub fn resize(&self, size_bytes: u64) -> Result<bool, Error> {
        // One at a time.
        let _resizing = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.disk.config.size_bytes();
        let now = self.disk.store.resize(before, size_bytes)?;
        self.disk.config.set_size(now);
        Ok(now != before)
    }

    /// Sends an order; `None`: queue `index` does not run.
    fn order(&self, index: u16, order: QueueOrder) -> Option<()> {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = queues.get(usize::from(index))?.as_ref()?;
        // A queue that has ended needs none.
        let _ = queue.orders.send(order);
        drop(queues);
        self.host.order_sent(index);
        Some(())
    }
}

impl Device for BlockDevice {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        self.disk.config.read(offset, data);
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), Error> {
        self.disk.config.write(offset, data).map_err(|e| {
            let message = format!("the cache mode of disk {} cannot be kept: {e}", self.name);
            Error::new(Code::Internal, ErrorReason::Host, message)
                .resource(&self.name)
                .remedy("check the card's runtime directory")
        })
    }

    fn start_queue(&self, ring: Ring) -> Result<(), Error> {
        let index = ring.index();
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place @ None) = queues.get_mut(usize::from(index)) else {
            let message =
                format!("queue {index} of disk {} runs already, or there is no such queue", self.name);
            return Err(Error::new(Code::Internal, ErrorReason::Internal, message));
        };
        let (orders, receiver) =
            mailbox().map_err(|e| host_error(&self.name, index, "cannot make an eventfd", &e))?;
        let (ending, ended) = mpsc::channel();
        let shared = ring.shared().clone();
        let _entered = self.span.enter();
        self.host.serve(QueueStart {
            disk: self.disk.clone(),
            name: self.name.clone(),
            ring,
            orders: receiver,
            queues: self.identity.queues,
            ended: ending,
            policy: self.poll,
            span: self.span.clone(),
        })?;
        *place = Some(Queue { orders, ended, shared });
        Ok(())
    }

    fn begin_stop(&self, index: u16) {
        self.order(index, QueueOrder::Stop);
    }

    fn stop_queue(&self, index: u16, deadline: Instant) -> Result<Option<RingState>, Busy> {
        if self.order(index, QueueOrder::Stop).is_none() {
            return Ok(None);
        }
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = queues.get_mut(usize::from(index)) else { return Ok(None) };
        let Some(queue) = place.as_ref() else { return Ok(None) };
        let busy = |queue: &Queue| {
            let in_flight = u16::try_from(queue.shared.counters.in_flight.get()).unwrap_or(u16::MAX);
            Busy { index, in_flight }
        };
        match queue.ended.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(state) => {
                *place = None;
                Ok(Some(state))
            }
            // Disconnected: it cannot end without saying so but in a panic, which ends the process.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(busy(queue)),
        }
    }

    fn set_limits(&self, limits: Limits) -> Result<(), Error> {
        if self.disk.limiter.set(limits) {
            for index in 0..self.identity.queues {
                self.order(index, QueueOrder::Limits);
            }
        }
        Ok(())
    }

    fn reset(&self) {
        if let Err(e) = self.disk.config.reset() {
            warn!("disk {}: its driver's cache mode stays: {e}", self.name);
        }
    }

    fn prepare_end(&self) {
        self.disk.seen.end();
    }

    fn close(&self) {
        let running = self.queues.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten().count();
        debug!("disk {} closed, {running} queues still busy", self.name);
    }
}
