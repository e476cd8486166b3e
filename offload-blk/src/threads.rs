//! The threads that turn a disk's queues.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use offload_card::poll::{
    Awaited, Next, Order, Pacer, PollMode, PollPolicy, Poller, Receiver, Sender, cpus, mailbox,
};
use offload_card::schedule::{self, Turn};
use proto::error::Error;
use tracing::{Span, error};

use crate::io::IoRing;
use crate::queue::{BlockQueue, Progress, QueueHost, QueueStart, host_error};
use crate::worker::Worker;

/// A thread needs little: its data is on the heap.
const STACK_BYTES: usize = 256 * 1024;
/// What the poller calls the thread's orders; queues are called by their places.
const JOINING: u64 = u64::MAX;

/// Threads of a disk: one per queue, or, if those were more than the processors that they may use, one per processor, each
/// with several queues and one io_uring for them. Two threads on one processor would take turns as the scheduler pleases, and a
/// queue would wait as long.
#[derive(Debug, Default)]
pub struct Threads {
    shared: Arc<Mutex<Teams>>,
}

/// Threads with several queues, by number. A queue is sent while this is locked, and a thread that has none locks it to leave.
type Teams = HashMap<u16, Sender<Box<Joining>>>;

/// A queue for a thread.
struct Joining {
    queue: QueueStart,
    /// Hears whether the queue is served.
    opened: mpsc::SyncSender<Result<(), Error>>,
}

impl fmt::Debug for Joining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.queue.fmt(f)
    }
}

impl QueueHost for Threads {
    fn serve(&self, queue: QueueStart) -> Result<(), Error> {
        let (index, disk) = (queue.index(), queue.device().to_owned());
        let cannot = |what: &str, e: &io::Error| host_error(&disk, index, what, e);
        let cpus = u16::try_from(cpus()).unwrap_or(u16::MAX).max(1);
        let (policy, span) = (queue.policy, queue.span.clone());
        let spawn = |name: u16, first: Option<Box<Joining>>, shared: Option<Shared>| {
            let span = span.clone();
            std::thread::Builder::new()
                .name(format!("blk{name}:{disk}"))
                .stack_size(STACK_BYTES)
                .spawn(move || Thread::new(policy, span, shared).run(first))
                .map(drop)
                .map_err(|e| cannot("cannot start a thread", &e))
        };
        let (opening, opened) = mpsc::sync_channel(1);
        let joining = Box::new(Joining { queue, opened: opening });
        if joining.queue.queues <= cpus {
            spawn(index, Some(joining), None)?;
        } else {
            let name = index % cpus;
            let mut teams = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
            let thread = match teams.entry(name) {
                Entry::Occupied(thread) => thread.into_mut(),
                Entry::Vacant(place) => {
                    let (sender, thread) = Shared::new(name, self.shared.clone())
                        .map_err(|e| cannot("cannot make an eventfd", &e))?;
                    spawn(name, None, Some(thread))?;
                    place.insert(sender)
                }
            };
            // If it has died there is nobody to open the queue, which is then said.
            drop(thread.send(joining));
        }
        opened.recv().unwrap_or_else(|e| Err(cannot("its thread has ended", &io::Error::other(e))))
    }
}

/// How a thread with several queues gets more of them, and what it waits with if they have no ring.
struct Shared {
    name: u16,
    teams: Arc<Mutex<Teams>>,
    /// More queues to come.
    joining: Receiver<Box<Joining>>,
    poller: Poller,
}

impl Shared {
    fn new(name: u16, teams: Arc<Mutex<Teams>>) -> io::Result<(Sender<Box<Joining>>, Self)> {
        let (sender, joining) = mailbox()?;
        let poller = Poller::new()?;
        poller.add_edge(joining.event(), JOINING)?;
        Ok((sender, Self { name, teams, joining, poller }))
    }

    /// Nobody sends a queue any more; false if one has been sent.
    fn leave(&self) -> bool {
        let mut teams = self.teams.lock().unwrap_or_else(PoisonError::into_inner);
        let leaves = !self.joining.pending();
        if leaves {
            teams.remove(&self.name);
        }
        leaves
    }
}

/// A thread and its queues, by place.
struct Thread {
    policy: PollPolicy,
    span: Span,
    pacer: Pacer,
    queues: Vec<Option<BlockQueue>>,
    shared: Option<Shared>,
    /// Of all of them, if there can be several and they work by io_uring.
    ring: Option<IoRing>,
}

impl Thread {
    fn new(policy: PollPolicy, span: Span, shared: Option<Shared>) -> Self {
        Self { policy, span, pacer: Pacer::new(policy), queues: Vec::new(), shared, ring: None }
    }

    /// Turns `first`, and those that join, until all have ended: the thread's main function.
    fn run(mut self, first: Option<Box<Joining>>) {
        let span = self.span.clone();
        let _entered = span.enter();
        if let Some(first) = first {
            self.join(*first);
        }
        // The thread that started this one is of those that run soon; from here on it is about throughput.
        let _ = schedule::set(Turn::Usual);
        loop {
            self.take_joining();
            match self.turn() {
                Progress::Worked => self.pacer.worked(),
                // Until when is known: there is nothing to learn, and nothing to look for.
                Progress::Throttled if self.policy.mode != PollMode::Always => self.sleep(),
                Progress::Throttled => std::hint::spin_loop(),
                progress @ (Progress::Waiting | Progress::Idle) => {
                    let waiting = progress == Progress::Waiting;
                    let awaited = if waiting { Awaited::Completions } else { Awaited::Driver };
                    let sleepy = self.workers().any(|worker| worker.should_sleep());
                    if sleepy || self.pacer.idle(awaited) == Next::Sleep {
                        self.sleep();
                    }
                }
                // There is no queue.
                Progress::Ended if self.shared.as_ref().is_none_or(Shared::leave) => return,
                Progress::Ended => {}
            }
        }
    }

    fn workers(&mut self) -> impl Iterator<Item = &mut Worker> {
        self.queues.iter_mut().flatten().filter_map(BlockQueue::worker)
    }

    fn take_joining(&mut self) {
        while let Some(shared) = self.shared.as_ref().filter(|shared| shared.joining.pending())
            && let Order::Some(joining) = shared.joining.take()
        {
            self.join(*joining);
        }
    }

    /// Opens a queue, which is the thread's from now on, and says what came of it.
    fn join(&mut self, joining: Joining) {
        let Joining { queue, opened } = joining;
        let (index, disk) = (queue.index(), queue.device().to_owned());
        let place = self.queues.iter().position(Option::is_none).unwrap_or(self.queues.len());
        let queue = match &self.shared {
            None => queue.open(),
            Some(shared) => queue.open_among_others(&mut self.ring).and_then(|mut queue| {
                let watched = match (queue.worker().and_then(|worker| worker.waits_on()), &self.ring) {
                    (Some(fd), _) => shared.poller.add_level(fd, place as u64),
                    (None, Some(ring)) => ring.watch(shared.joining.event()),
                    (None, None) => Ok(()),
                };
                watched
                    .map_err(|e| host_error(&disk, index, "its thread cannot wait for it", &e))
                    .map(|()| queue)
            }),
        };
        let result = queue.map(|queue| match self.queues.get_mut(place) {
            Some(free) => *free = Some(queue),
            None => self.queues.push(Some(queue)),
        });
        let _ = opened.send(result);
    }

    /// Turns each queue once. [`Progress::Ended`] if there is none.
    fn turn(&mut self) -> Progress {
        let hit = self.pacer.looks_in_vain();
        let sleeps_next = self.pacer.sleeps_next();
        let mut all = Progress::Ended;
        for place in &mut self.queues {
            let Some(queue) = place else { continue };
            let progress = queue.turn_before_sleep(sleeps_next);
            match progress {
                Progress::Ended => *place = None,
                Progress::Worked if hit => {
                    if let Some(worker) = queue.worker() {
                        worker.ring().counters().poll_hits.add(1);
                    }
                }
                Progress::Worked | Progress::Waiting | Progress::Throttled | Progress::Idle => {}
            }
            all = more(all, progress);
        }
        if all == Progress::Ended {
            // What is registered of a guest's memory is not for the next.
            self.ring = None;
        }
        all
    }

    /// Sleeps until there may be something to do, unless there is already.
    fn sleep(&mut self) {
        self.pacer.sleeps();
        match &self.shared {
            None => self.queues.iter_mut().flatten().for_each(|queue| {
                queue.sleep();
            }),
            Some(_) => self.sleep_for_all(),
        }
        self.pacer.woke();
    }

    fn sleep_for_all(&mut self) {
        let mut timeout: Option<Duration> = None;
        for worker in self.workers() {
            let Some(sleep) = worker.prepare_sleep() else { return };
            timeout = [timeout, sleep.timeout].into_iter().flatten().min();
        }
        if self.shared.as_ref().is_some_and(|shared| shared.joining.pending()) {
            return;
        }
        self.workers().for_each(|worker| worker.ring().counters().sleeps.add(1));
        let Self { shared: Some(shared), queues, ring, .. } = self else { return };
        let waited = match ring {
            Some(ring) => ring.wait(timeout).map(|()| None),
            None => shared.poller.wait(timeout).map(Some),
        };
        match waited {
            Ok(tokens) => {
                let tokens = tokens.into_iter().flatten();
                for token in tokens.filter(|token| *token != JOINING) {
                    if let Some(Some(queue)) = queues.get_mut(token as usize)
                        && let Some(worker) = queue.worker()
                    {
                        worker.woken();
                    }
                }
            }
            // As with one queue: nothing more can be known about what is in flight.
            Err(e) => {
                error!("cannot wait for I/O: {e}");
                std::process::abort();
            }
        }
    }
}

/// What a thread does next whose queues found `one` and `other`.
fn more(one: Progress, other: Progress) -> Progress {
    use Progress::{Ended, Idle, Throttled, Waiting, Worked};
    let rank = |progress| match progress {
        Ended => 0,
        Throttled => 1,
        Idle => 2,
        Waiting => 3,
        Worked => 4,
    };
    if rank(one) >= rank(other) { one } else { other }
}
