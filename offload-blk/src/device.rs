//! A disk as an offload device: a thread per queue.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use offload_card::poll::{Sender, mailbox};
use offload_card::ring::QueueShared;
use offload_card::{Busy, Device, Identity, Ring, RingState};
use proto::error::Error;
use proto::v1::ErrorReason;
use tonic::Code;
use tracing::{Span, debug};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::config::{CONFIG_BYTES, Config};
use crate::image::Image;
use crate::request::ID_BYTES;
use crate::worker::{self, Disk, IoEngine, Stop};

/// A queue's thread needs little: its data is on the heap.
const STACK_BYTES: usize = 256 * 1024;

/// What makes a disk.
#[derive(Debug)]
pub struct DiskConfig {
    /// Name for threads and logs.
    pub name: String,
    /// What it stores on.
    pub image: Image,
    /// Request queues, 1 or more.
    pub queues: u16,
    /// Largest ring: a power of two, 4 or more.
    pub queue_size: u16,
    /// What GET_ID answers; what is longer than [`ID_BYTES`] is cut.
    pub serial: String,
    /// How to do I/O.
    pub engine: IoEngine,
}

/// A running queue.
#[derive(Debug)]
struct Queue {
    orders: Sender<Stop>,
    ended: mpsc::Receiver<()>,
    thread: JoinHandle<RingState>,
    shared: Arc<QueueShared>,
}

/// A virtio-blk device.
#[derive(Debug)]
pub struct BlockDevice {
    name: String,
    identity: Identity,
    disk: Arc<Disk>,
    queues: Mutex<Vec<Option<Queue>>>,
    span: Span,
}

impl BlockDevice {
    /// A disk with all queues stopped.
    pub fn new(config: DiskConfig) -> Self {
        let DiskConfig { name, image, queues, queue_size, serial, engine } = config;
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let config = Config::new(*image.geometry(), image.read_only(), queues, queue_size);
        let identity = Identity {
            virtio_id: VIRTIO_ID_BLOCK,
            features: config.features(),
            queues,
            max_queue_size: queue_size,
            config_size: CONFIG_BYTES,
        };
        let disk = Arc::new(Disk { image: Arc::new(image), config, serial: id, engine });
        let span = tracing::info_span!("device", id = name);
        let queues = Mutex::new((0..queues).map(|_| None).collect());
        Self { name, identity, disk, queues, span }
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
        self.disk.config.write(offset, data);
        Ok(())
    }

    fn start_queue(&self, ring: Ring) -> Result<(), Error> {
        let index = ring.index();
        let failed = |what: &str| {
            let message = format!("queue {index} of disk {}: {what}", self.name);
            Error::new(Code::Internal, ErrorReason::Host, message)
        };
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place @ None) = queues.get_mut(usize::from(index)) else {
            return Err(failed("it runs already, or there is no such queue"));
        };
        let (orders, receiver) = mailbox().map_err(|e| failed(&format!("cannot make an eventfd: {e}")))?;
        let (ending, ended) = mpsc::channel();
        let (disk, shared, span) = (self.disk.clone(), ring.shared().clone(), self.span.clone());
        let thread = std::thread::Builder::new()
            .name(format!("blk{index}:{}", self.name))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let state = span.in_scope(|| worker::serve(&disk, ring, receiver));
                // The image goes before anybody hears that the queue has ended.
                drop(disk);
                drop(ending);
                state
            })
            .map_err(|e| failed(&format!("cannot start a thread: {e}")))?;
        *place = Some(Queue { orders, ended, thread, shared });
        Ok(())
    }

    fn stop_queue(&self, index: u16, deadline: Instant) -> Result<RingState, Busy> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = |in_flight| Busy { index, in_flight };
        let Some(place) = queues.get_mut(usize::from(index)) else {
            return Err(busy(0));
        };
        let Some(queue) = place.take() else {
            return Err(busy(0));
        };
        // A thread that has ended needs no order.
        let _ = queue.orders.send(Stop);
        let patience = deadline.saturating_duration_since(Instant::now());
        if queue.ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            let in_flight = u16::try_from(queue.shared.counters.in_flight.get()).unwrap_or(u16::MAX);
            *place = Some(queue);
            return Err(busy(in_flight));
        }
        match queue.thread.join() {
            Ok(state) => Ok(state),
            // A panic has ended the process; there is nothing to answer.
            Err(_) => Err(busy(0)),
        }
    }

    fn reset(&self) {
        self.disk.config.reset();
    }

    fn close(&self) {
        let running = self.queues.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten().count();
        debug!("disk {} closed, {running} queues still busy", self.name);
    }
}
