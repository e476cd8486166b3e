//! A device's vhost-user socket.
//!
//! One thread per device listens, serves one front-end at a time, and listens again, for as long as the device exists.
//! It is never in the data path: rings are the engine's.
//!
//! **A second front-end.** While one is connected, another is accepted and closed at once, with a line in the log: a
//! device has one user, and a stranger must not be able to take it away. A front-end that died is not in the way: the
//! kernel closes its socket, which is noticed before the next one is looked at. One that hangs is, until its process
//! ends; deleting the device works all the same.
//!
//! **The end of a connection**, orderly or not, stops all queues as GET_VRING_BASE does: what is in flight is finished
//! and shown to the guest, whose memory and interrupts are still there. The next front-end is served after that, never
//! before: a write that was slow must not land on top of a newer one.

mod handler;
mod wire;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proto::v1::DeviceStats;
use tracing::{info, info_span, warn};

use crate::device::{ConfigNotifier, Device};
use crate::event::Event;
use crate::limit::LogLimit;
use crate::ring::QueueShared;
use handler::Handler;
use wire::Connection;

/// Threads here only pass messages.
const STACK_BYTES: usize = 256 * 1024;

/// What the device's thread and everybody else share.
struct Shared {
    /// For what it counts: the device ends before its thread does, and has then nothing to say.
    device: Weak<dyn Device>,
    queues: Vec<Arc<QueueShared>>,
    connected: AtomicBool,
    connections: AtomicU64,
    stopping: AtomicBool,
    /// Wakes the thread.
    wake: Event,
    config_changed: AtomicBool,
    /// The connection being served, to be cut from outside.
    stream: Mutex<Option<UnixStream>>,
    finished: (Mutex<bool>, Condvar),
    /// Of what a front-end can cause to be logged.
    log: Arc<LogLimit>,
}

/// A device being served.
pub struct DeviceServer(Arc<Shared>);

impl DeviceServer {
    /// Serves `device` on `listener` from now on, in a thread named after `name`.
    pub fn start(
        name: &str,
        device: Arc<dyn Device>,
        listener: UnixListener,
        notifier: &ConfigNotifier,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            device: Arc::downgrade(&device),
            queues: (0..device.identity().queues).map(|_| Arc::default()).collect(),
            connected: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            wake: Event::new()?,
            config_changed: AtomicBool::new(false),
            stream: Mutex::new(None),
            finished: (Mutex::new(false), Condvar::new()),
            log: Arc::default(),
        });
        let (span, thread_shared) = (info_span!("device", id = name), shared.clone());
        std::thread::Builder::new().name(format!("dev:{name}")).stack_size(STACK_BYTES).spawn(move || {
            let _entered = span.enter();
            serve(&thread_shared, &device, &listener);
            device.close();
            // Whoever waits for the end may want what it holds: an image, which is locked.
            drop((device, listener));
            let (finished, changed) = &thread_shared.finished;
            *finished.lock().unwrap_or_else(PoisonError::into_inner) = true;
            changed.notify_all();
        })?;
        let changed = Arc::downgrade(&shared);
        notifier.connect(move || {
            if let Some(shared) = changed.upgrade() {
                shared.config_changed.store(true, Ordering::Release);
                shared.wake.signal();
            }
        });
        Ok(Self(shared))
    }

    /// A front-end is connected.
    pub fn connected(&self) -> bool {
        self.0.connected.load(Ordering::Relaxed)
    }

    /// Why a queue is broken, if one is.
    pub fn broken(&self) -> Option<String> {
        self.0.queues.iter().find_map(|q| q.broken())
    }

    /// Counters of the device under the name `id`.
    pub fn stats(&self, id: &str) -> DeviceStats {
        let queues = (0..).zip(&self.0.queues).map(|(index, queue)| queue.counters.message(index));
        let mut stats = DeviceStats {
            id: id.into(),
            connections: self.0.connections.load(Ordering::Relaxed),
            queues: queues.collect(),
            ..DeviceStats::default()
        };
        if let Some(device) = self.0.device.upgrade() {
            device.add_stats(&mut stats);
        }
        stats
    }

    /// Begins to stop: no new front-end, the connected one is cut off, queues finish. Returns at once.
    pub fn begin_stop(&self) {
        self.0.stopping.store(true, Ordering::Release);
        self.0.wake.signal();
        if let Some(stream) = &*self.0.stream.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Stops. True if everything was finished by `deadline`; else the device ends by itself when it is.
    pub fn stop(&self, deadline: Instant) -> bool {
        self.begin_stop();
        let (finished, changed) = &self.0.finished;
        let guard = finished.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let (guard, _) =
            changed.wait_timeout_while(guard, left, |f| !*f).unwrap_or_else(PoisonError::into_inner);
        *guard
    }
}

impl Drop for DeviceServer {
    fn drop(&mut self) {
        self.begin_stop();
    }
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// Serves front-ends, one after the other, until told to stop.
fn serve(shared: &Arc<Shared>, device: &Arc<dyn Device>, listener: &UnixListener) {
    let mut connection: Option<Connection> = None;
    while !shared.stopping() {
        let (woken, readable, incoming) = wait(&shared.wake, connection.as_ref(), listener);
        if woken {
            shared.wake.take();
            if shared.config_changed.swap(false, Ordering::AcqRel)
                && let Some(connection) = &connection
            {
                connection.handler().config_changed();
            }
        }
        if readable {
            if let Some(serving) = &mut connection
                && let Err(why) = serving.serve_one()
            {
                shared.log.say(|left_out| match why {
                    None => info!("front-end disconnected{left_out}"),
                    Some(e) => warn!("connection dropped: {e}{left_out}"),
                });
                if let Some(ended) = connection.take() {
                    end(shared, &ended);
                }
            }
        } else if incoming {
            match accept(shared, device, listener, connection.is_some()) {
                Ok(Some(accepted)) => connection = Some(accepted),
                Ok(None) => {}
                Err(e) => {
                    shared.log.say(|left_out| warn!("cannot accept a front-end: {e}{left_out}"));
                    // Out of descriptors or memory: trying at once would only burn time.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }
    if let Some(ended) = connection.take() {
        end(shared, &ended);
    }
}

/// Waits for a wake-up, a message or a new front-end.
fn wait(wake: &Event, connection: Option<&Connection>, listener: &UnixListener) -> (bool, bool, bool) {
    let mut fds =
        vec![PollFd::new(wake.as_fd(), PollFlags::POLLIN), PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    fds.extend(connection.map(|c| PollFd::new(c.as_fd(), PollFlags::POLLIN)));
    if poll(&mut fds, PollTimeout::NONE).is_err() {
        // Interrupted; every caller looks at everything anew.
        return (true, false, false);
    }
    let ready = |i: usize| fds.get(i).is_some_and(|fd| fd.any() != Some(false));
    (ready(0), ready(2), ready(1))
}

fn accept(
    shared: &Arc<Shared>,
    device: &Arc<dyn Device>,
    listener: &UnixListener,
    busy: bool,
) -> io::Result<Option<Connection>> {
    let stream = match listener.accept() {
        Ok((stream, _)) => stream,
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    if busy {
        shared.log.say(|left_out| {
            warn!("a second front-end was turned away: the device is in use{left_out}");
        });
        return Ok(None);
    }
    stream.set_nonblocking(false)?;
    let cut = stream.try_clone()?;
    let stop = shared.clone();
    let stopping = Box::new(move || stop.stopping());
    let handler = Handler::new(device.clone(), shared.queues.clone(), shared.log.clone(), stopping);
    let connection = Connection::new(stream, handler, shared.log.clone())?;
    *shared.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(cut);
    shared.connections.fetch_add(1, Ordering::Relaxed);
    shared.connected.store(true, Ordering::Relaxed);
    shared.log.say(|left_out| info!("front-end connected{left_out}"));
    Ok(Some(connection))
}

/// Everything a connection's end entails; returns when nothing of it is in flight any more.
fn end(shared: &Shared, connection: &Connection) {
    *shared.stream.lock().unwrap_or_else(PoisonError::into_inner) = None;
    connection.handler().end();
    shared.connected.store(false, Ordering::Relaxed);
}
