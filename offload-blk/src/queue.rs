//! A started queue, and who calls it.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use offload_card::poll::{PollPolicy, Receiver};
use offload_card::{Ring, RingState};
use proto::error::Error;
use proto::v1::ErrorReason;
use tonic::Code;
use tracing::{Span, warn};

use crate::io::{Backend, IoRing, Used, Wakers};
use crate::worker::{Disk, QueueOrder, Worker};

/// What a [`BlockQueue::turn`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Work, and there may be more: turn again.
    Worked,
    /// Nothing, and requests are under way.
    Waiting,
    /// Nothing, because requests have to wait until the disk's limits allow them: sleep, or turn again later.
    Throttled,
    /// Nothing, and nothing is under way.
    Idle,
    /// The queue has been stopped; nothing is to be done ever.
    Ended,
}

/// A started queue of a [`crate::BlockDevice`].
///
/// Whoever has it calls [`BlockQueue::turn`] as long as there is work; kicks are not asked for meanwhile. When there is
/// none, [`BlockQueue::sleep`] asks for kicks and waits; or somebody else waits for the driver's notification, and then
/// calls `turn`. When the device is told to stop the queue, `turn` gives the ring back and answers
/// [`Progress::Ended`]. Dropped before that, it finishes what is under way first.
pub struct BlockQueue {
    /// `None`: it has ended.
    worker: Option<Box<Worker>>,
    ended: Option<mpsc::Sender<RingState>>,
    index: u16,
}

impl BlockQueue {
    /// Index of the queue in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// One look at everything there may be: orders, completions, requests. Takes a batch, begins and answers what it can
    /// without waiting for the storage, except where the queue works by system calls.
    pub fn turn(&mut self) -> Progress {
        self.turn_before_sleep(false)
    }

    /// The same; with `sleeps_next`, the caller calls [`BlockQueue::sleep`] if nothing is found and something is under way.
    pub(crate) fn turn_before_sleep(&mut self, sleeps_next: bool) -> Progress {
        let Some(worker) = &mut self.worker else { return Progress::Ended };
        let progress = worker.turn(sleeps_next);
        if progress == Progress::Ended
            && let Some(worker) = self.worker.take()
        {
            // The image goes, with the worker, before anybody hears that the queue has ended.
            let state = worker.end();
            if let Some(ended) = self.ended.take() {
                let _ = ended.send(state);
            }
        }
        progress
    }

    /// Asks the driver for kicks and waits until there may be work or an order, or the disk's limits allow what waits for
    /// them. False if there was no need to wait.
    pub fn sleep(&mut self) -> bool {
        self.worker.as_mut().is_some_and(|w| w.sleep())
    }

    /// Asks the driver for kicks, as [`BlockQueue::sleep`] does, but does not wait. True if there is work already, of which
    /// the driver may not tell: then turn again.
    pub fn ask_for_kicks(&mut self) -> bool {
        self.worker.as_mut().is_some_and(|w| w.ask_for_kicks())
    }

    /// Takes nothing more, finishes what is under way, and gives the ring back.
    pub fn stop(&mut self) {
        if let Some(worker) = &mut self.worker {
            worker.order_stop();
        }
        while self.turn() != Progress::Ended {
            self.sleep();
        }
    }

    pub(crate) fn worker(&mut self) -> Option<&mut Worker> {
        self.worker.as_deref_mut()
    }
}

impl Drop for BlockQueue {
    /// What is under way has the guest's memory.
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for BlockQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockQueue").field("index", &self.index).finish_non_exhaustive()
    }
}

/// A queue about to be started.
pub struct QueueStart {
    pub(crate) disk: Arc<Disk>,
    pub(crate) name: String,
    pub(crate) ring: Ring,
    pub(crate) orders: Receiver<QueueOrder>,
    /// How many the disk has.
    pub(crate) queues: u16,
    pub(crate) ended: mpsc::Sender<RingState>,
    pub(crate) policy: PollPolicy,
    pub(crate) span: Span,
}

impl QueueStart {
    /// Index of the queue in its device.
    pub fn index(&self) -> u16 {
        self.ring.index()
    }

    /// Name of the device.
    pub fn device(&self) -> &str {
        &self.name
    }

    /// Makes the queue, to be used by the calling thread only: io_uring insists on that.
    ///
    /// # Errors
    /// `Host`: no file descriptors, no memory, no io_uring though it was demanded. The ring is dropped as it was.
    pub fn open(self) -> Result<BlockQueue, Error> {
        self.open_as(Used::ByOne)
    }

    /// Makes the queue, to be used by any thread, one at a time. It does its I/O by system calls, so a
    /// [`BlockQueue::turn`] waits for the storage.
    ///
    /// # Errors
    /// As [`QueueStart::open`].
    pub fn open_unbound(self) -> Result<BlockQueue, Error> {
        self.open_as(Used::ByAny)
    }

    /// Makes the queue, to be used by the calling thread only, which has others beside it and waits for all of them: for `ring`, if
    /// there is one, which the first of them makes.
    ///
    /// # Errors
    /// As [`QueueStart::open`].
    pub(crate) fn open_among_others(self, ring: &mut Option<IoRing>) -> Result<BlockQueue, Error> {
        let queues = self.queues;
        self.open_as(Used::AmongOthers(ring, queues))
    }

    fn open_as(self, used: Used<'_>) -> Result<BlockQueue, Error> {
        let Self { disk, name, ring, orders, ended, .. } = self;
        let index = ring.index();
        let wakers = || -> io::Result<Wakers> {
            Ok(Wakers { kick: ring.kick().try_clone()?, orders: orders.event().try_clone()? })
        };
        let made = wakers().and_then(|w| {
            Backend::new(&disk.store, w, ring.size(), disk.engine, used, &disk.seen, disk.register)
        });
        let (backend, refused) = made.map_err(|e| host_error(&name, index, "no I/O is possible", &e))?;
        if let Some(e) = refused {
            warn!(
                "queue {index}: io_uring is not available ({e}); falling back to system calls, which is slower"
            );
        }
        let worker = Some(Box::new(Worker::new(disk, ring, orders, backend)));
        Ok(BlockQueue { worker, ended: Some(ended), index })
    }
}

impl fmt::Debug for QueueStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueStart")
            .field("device", &self.name)
            .field("index", &self.index())
            .finish_non_exhaustive()
    }
}

/// The host said no to queue `index` of a disk.
pub(crate) fn host_error(disk: &str, index: u16, what: &str, e: &io::Error) -> Error {
    let message = format!("queue {index} of disk {disk}: {what}: {e}");
    let error = Error::new(Code::Internal, ErrorReason::Host, message);
    match e.raw_os_error() {
        Some(errno) => error.with("errno", errno.to_string()),
        None => error,
    }
}

/// Who calls the queues of a disk.
pub trait QueueHost: Send + Sync + fmt::Debug {
    /// From now on turns the queue whenever there may be work, until it has ended.
    ///
    /// # Errors
    /// `Host`: the queue cannot be served now. It has been dropped, and the front-end will try again.
    fn serve(&self, queue: QueueStart) -> Result<(), Error>;

    /// Queue `index` has an order: it is to be turned soon. One that sleeps wakes up by itself.
    fn order_sent(&self, _index: u16) {}
}

/// No threads: queues are turned by whoever calls [`Inline::notify`], as small VMMs do it in a vCPU's thread when the guest
/// writes the notification register.
///
/// ```no_run
/// # use std::sync::Arc;
/// # use offload_blk::{BlockDevice, DiskConfig, Inline};
/// # fn vmm(config: DiskConfig) -> Result<(), proto::error::Error> {
/// let inline = Arc::new(Inline::new(config.queues));
/// let disk = BlockDevice::new(DiskConfig { host: inline.clone(), ..config })?;
/// // The driver has set the rings up: disk.start_queue(ring). On a notification of queue 0:
/// inline.notify(0);
/// // The guest's requests are answered.
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Inline(Vec<Mutex<Option<BlockQueue>>>);

impl Inline {
    /// For a disk of `queues` queues.
    pub fn new(queues: u16) -> Self {
        Self((0..queues).map(|_| Mutex::new(None)).collect())
    }

    /// Does what waits in queue `index`, all of it, and returns when nothing is under way any more. If the disk has limits
    /// that may take long.
    pub fn notify(&self, index: u16) {
        let Some(place) = self.0.get(usize::from(index)) else { return };
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = place.as_mut() else { return };
        loop {
            match queue.turn() {
                Progress::Worked | Progress::Waiting => {}
                // It holds the guest up, which is what limits are for.
                Progress::Throttled => {
                    queue.sleep();
                }
                // The driver is to notify us again; what has come just before, it will not notify us of.
                Progress::Idle if queue.ask_for_kicks() => {}
                Progress::Idle => return,
                Progress::Ended => {
                    *place = None;
                    return;
                }
            }
        }
    }
}

impl QueueHost for Inline {
    fn serve(&self, queue: QueueStart) -> Result<(), Error> {
        let index = queue.index();
        let queue = queue.open_unbound()?;
        let Some(place) = self.0.get(usize::from(index)) else {
            let e = io::ErrorKind::InvalidInput.into();
            return Err(host_error("", index, "there is no place for it", &e));
        };
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(queue);
        // Requests may be waiting.
        self.notify(index);
        Ok(())
    }

    fn order_sent(&self, index: u16) {
        self.notify(index);
    }
}
