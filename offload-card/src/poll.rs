//! What a data thread's loop is made of: waiting for kicks, completions and orders, or looking for them.

mod awake;
mod contention;
mod pace;

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, TryRecvError};
use std::time::Duration;

pub use awake::cpus;
pub use pace::{Awaited, DEFAULT_MAX, Next, Pacer, PollArgs, PollMode, PollPolicy};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

use crate::event::Event;

/// How many descriptors one wait reports at most; the rest come with the next.
const BATCH: usize = 64;

/// Waits for any of many descriptors; each is named by a number of the caller's choice.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
    /// What the last wait reported.
    tokens: Vec<u64>,
}

impl Poller {
    /// An empty one.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Self { epoll, tokens: Vec::with_capacity(BATCH) })
    }

    /// Reports `token` once for every new signal on `fd`, without anybody having to read it: for eventfds (kicks,
    /// completions). One signalled before this call is reported, too.
    pub fn add_edge(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token), EventFlags::IN | EventFlags::ET)?)
    }

    /// Reports `token` as long as `fd` can be read.
    pub fn add_level(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token), EventFlags::IN)?)
    }

    /// Reports `fd` no more. To be called before it is closed, if anybody else has it open.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Waits until something is to be reported, for at most `timeout` (`None`: for ever; zero: not at all; what is between
    /// is exact, so Linux 5.11 is needed), and answers the tokens.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<impl Iterator<Item = u64> + '_> {
        self.tokens.clear();
        // Longer than a Timespec holds is for ever.
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        let mut room = [MaybeUninit::uninit(); BATCH];
        match epoll::wait(&self.epoll, &mut room, timeout.as_ref()) {
            Ok((events, _)) => self.tokens.extend(events.iter().map(|event| event.data.u64())),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(self.tokens.iter().copied())
    }
}

/// Can be read when a wait would end at once: for a wait for several of them.
impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// A way to send orders to a data thread, which finds them by a [`Poller`].
#[derive(Debug)]
pub struct Sender<T> {
    /// `None` only while being dropped.
    queue: Option<mpsc::Sender<T>>,
    bell: Arc<Bell>,
}

/// Says that there is something to take: to those who wait, and to those who look.
#[derive(Debug)]
struct Bell {
    event: Event,
    rung: AtomicU32,
}

impl Bell {
    fn ring(&self) {
        self.rung.fetch_add(1, Ordering::Release);
        self.event.signal();
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), bell: self.bell.clone() }
    }
}

impl<T> Sender<T> {
    /// Sends, and wakes the thread; gives the order back if the thread has ended.
    pub fn send(&self, order: T) -> Result<(), T> {
        match &self.queue {
            Some(queue) => queue.send(order).map_err(|e| e.0)?,
            None => return Err(order),
        }
        self.bell.ring();
        Ok(())
    }
}

impl<T> Drop for Sender<T> {
    /// The thread may be waiting for the end: first make it true, then wake.
    fn drop(&mut self) {
        self.queue = None;
        self.bell.ring();
    }
}

/// What a [`Sender`] may have sent.
#[derive(Debug)]
pub enum Order<T> {
    /// This.
    Some(T),
    /// Nothing now.
    None,
    /// Nothing ever: all senders are gone.
    Closed,
}

/// A data thread's end.
#[derive(Debug)]
pub struct Receiver<T> {
    queue: mpsc::Receiver<T>,
    bell: Arc<Bell>,
    /// What the bell had counted when there were no orders last.
    heard: Cell<u32>,
}

impl<T> Receiver<T> {
    /// To be given to [`Poller::add_edge`]. Whenever it is reported, take orders until there are none.
    pub fn event(&self) -> &Event {
        &self.bell.event
    }

    /// There may be an order: worth a [`Receiver::take`]. Costs a load, for a thread that polls.
    pub fn pending(&self) -> bool {
        self.bell.rung.load(Ordering::Relaxed) != self.heard.get()
    }

    /// The next order, without waiting.
    pub fn take(&self) -> Order<T> {
        let rung = self.bell.rung.load(Ordering::Acquire);
        match self.queue.try_recv() {
            Ok(order) => Order::Some(order),
            Err(TryRecvError::Empty) => {
                self.heard.set(rung);
                Order::None
            }
            Err(TryRecvError::Disconnected) => Order::Closed,
        }
    }
}

impl<T> Receiver<T> {
    /// Waits for an order, or for the end of all senders.
    pub fn wait(&self) -> Order<T> {
        self.queue.recv().map_or(Order::Closed, Order::Some)
    }
}

/// A new way to send orders to a data thread.
pub fn mailbox<T>() -> io::Result<(Sender<T>, Receiver<T>)> {
    let (sender, receiver) = mpsc::channel();
    let bell = Arc::new(Bell { event: Event::new()?, rung: AtomicU32::new(0) });
    Ok((
        Sender { queue: Some(sender), bell: bell.clone() },
        Receiver { queue: receiver, bell, heard: Cell::new(0) },
    ))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn tokens(poller: &mut Poller, timeout: Duration) -> Vec<u64> {
        poller.wait(Some(timeout)).unwrap().collect()
    }

    #[test]
    fn edges_are_reported_once_each_and_without_reading() {
        let event = Event::new().unwrap();
        let mut poller = Poller::new().unwrap();
        event.signal();
        poller.add_edge(&event, 7).unwrap();
        assert_eq!(tokens(&mut poller, Duration::ZERO), [7]);
        assert!(tokens(&mut poller, Duration::ZERO).is_empty());
        event.signal();
        assert_eq!(tokens(&mut poller, Duration::ZERO), [7]);
        event.signal();
        poller.remove(&event).unwrap();
        assert!(tokens(&mut poller, Duration::ZERO).is_empty());
    }

    #[test]
    fn a_wait_ends_when_it_is_to_and_not_at_the_next_millisecond() {
        let mut poller = Poller::new().unwrap();
        let wait = Duration::from_micros(300);
        // The machine may be busy, but not each time.
        let exact = (0..1000).any(|_| {
            let since = Instant::now();
            assert!(tokens(&mut poller, wait).is_empty());
            let waited = since.elapsed();
            assert!(waited >= wait, "{waited:?}");
            waited < Duration::from_millis(1)
        });
        assert!(exact);
    }

    #[test]
    fn an_order_is_pending_until_it_is_taken_and_the_end_for_ever() {
        let (sender, receiver) = mailbox().unwrap();
        assert!(!receiver.pending());
        sender.send(1).unwrap();
        sender.send(2).unwrap();
        for n in [1, 2] {
            assert!(receiver.pending() && matches!(receiver.take(), Order::Some(m) if m == n));
        }
        assert!(matches!(receiver.take(), Order::None) && !receiver.pending());
        drop(sender);
        assert!(receiver.pending() && matches!(receiver.take(), Order::Closed) && receiver.pending());
    }

    #[test]
    fn orders_wake_and_so_does_the_last_senders_end() {
        let (sender, receiver) = mailbox().unwrap();
        let mut poller = Poller::new().unwrap();
        poller.add_edge(receiver.event(), 1).unwrap();
        let other = sender.clone();
        let thread = std::thread::spawn(move || {
            other.send(5).unwrap();
            sender.send(6).unwrap();
        });
        let (mut got, mut closed) = (Vec::new(), false);
        while !closed {
            assert_eq!(tokens(&mut poller, Duration::from_secs(10)), [1]);
            loop {
                match receiver.take() {
                    Order::Some(n) => got.push(n),
                    Order::None => break,
                    Order::Closed => {
                        closed = true;
                        break;
                    }
                }
            }
        }
        thread.join().unwrap();
        assert_eq!(got, [5, 6]);
    }
}
