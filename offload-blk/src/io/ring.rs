//! A thread's io_uring: what hands transfers over, and waits for everything.
//!
//! A queue has a [`Place`] in it. One that is alone in its thread has the ring for itself; those that share a thread share its ring,
//! too: one system call hands over what all of them have gathered, and waits for all of them.
//!
//! Kicks and orders are multishot polls, so that the thread sleeps in one `io_uring_enter`. Nobody reads the eventfds: every
//! signal is one completion. The kernel posts completions only when asked to (DEFER_TASKRUN), and a flag in shared memory
//! says when to ask: polling costs no system call.
//!
//! A sleep with many writes around the page cache under way is for several of them: each is completed by a kernel thread that the
//! queue's thread would interrupt, for one completion at a time.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use offload_card::event::Event;
use offload_card::memory::View;
use tracing::warn;

use super::registered::{Register, Registered};

/// Transfers handed over by one system call. Many would save calls, but the storage has nothing to do while they are gathered,
/// and then all at once: with 32 requests of 4 KiB under way, batches of 2 to 4 gave a tenth more than batches of 32.
const AT_ONCE: usize = 4;
/// Gathered writes under way for each completion that a sleep is for.
const UNDER_WAY: usize = 8;
/// Most completions that a sleep is for: what they bring is handed over at once.
const MOST_AWAITED: usize = AT_ONCE;
/// Longest sleep for several completions. The kernel looks at its clock before that anyway; for a shorter time it would set a timer, which
/// costs as much as several completions.
const PATIENCE: Duration = Duration::from_millis(10);
/// Sleeps for any completion that follow on one for several that found fewer: the storage is slow then.
const HASTE: u32 = 1000;
/// How long the host is given to find memory for a system call that failed for lack of it.
const PAUSE: Duration = Duration::from_millis(10);

// An entry's user data: | number of the place | what it is | token, 16 bits |
const GATHERED: u64 = 1 << 16;
const POLL: u64 = 1 << 17;
const PLACE_SHIFT: u32 = 32;
/// The ring's own number. Places have others, each for once.
const OWN: u32 = 0;
/// Whose completions tell nothing.
const NOBODY: u32 = u32::MAX;

/// A ring. It stays in the thread that made it.
pub(crate) struct IoRing(Rc<RefCell<Inner>>);

/// A queue's place in a ring.
pub(super) struct Place {
    ring: Rc<RefCell<Inner>>,
    number: u32,
    /// Tokens of its polls, and what they are of.
    polls: Vec<(u16, RawFd)>,
}

// SAFETY: places of one ring are made and used by one thread, that of the `IoRing`, which is not `Send`. A queue that may go elsewhere
// is alone in its ring (`Used::ByOne`), whose `IoRing` is gone: nobody else has the reference count or what it counts.
unsafe impl Send for Place {}

/// What ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The transfer with this token: bytes moved or a negative errno.
    Transfer(u16, i32),
    /// What the poll with this token is of was signalled.
    Signal(u16),
}

struct Inner {
    io: IoUring,
    /// Places by number, and what has ended of theirs that they have not asked for yet.
    places: Vec<(u32, VecDeque<cqueue::Entry>)>,
    next_number: u32,
    /// Of all places.
    kept: usize,
    /// What the ring itself polls.
    watched: Option<RawFd>,
    /// Writes under way that go to a file around the page cache. The kernel (Linux 6.7 and later) completes them one by one in a
    /// thread of its own, on the processor that the queue's thread handed them over from: woken for the first, it would take the
    /// processor from those that follow.
    gathered: usize,
    /// Sleeps that are for any completion.
    haste: u32,
    registered: Registered,
    /// The guest's memory.
    view: Option<Arc<View>>,
    /// It is to be registered from, when nothing is left to be handed over.
    follows: bool,
}

impl IoRing {
    /// With room for so many entries, or what the kernel allows.
    pub(super) fn new(entries: u32, register: Register) -> io::Result<Self> {
        Ok(Self(Rc::new(RefCell::new(Inner {
            io: build(entries)?,
            places: Vec::new(),
            next_number: OWN + 1,
            kept: 0,
            watched: None,
            gathered: 0,
            haste: 0,
            registered: Registered::new(register),
            view: None,
            follows: false,
        }))))
    }

    /// One more place in it.
    pub(super) fn place(&self) -> Place {
        let mut ring = self.0.borrow_mut();
        let number = ring.next_number;
        // Not that many queues are started in a thread's life.
        ring.next_number = number.wrapping_add(1);
        ring.places.push((number, VecDeque::new()));
        Place { ring: self.0.clone(), number, polls: Vec::new() }
    }

    /// Signals of `event`, which is open as long as the ring is used, end waits. To be told once is enough.
    pub(crate) fn watch(&self, event: &Event) -> io::Result<()> {
        let mut ring = self.0.borrow_mut();
        if ring.watched.is_none() {
            ring.watch(OWN, 0, event.as_raw_fd())?;
            ring.watched = Some(event.as_raw_fd());
        }
        Ok(())
    }

    /// Hands over what was held back, and waits until there is something for any place, or what the ring itself watches was signalled,
    /// for at most `timeout`.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.borrow_mut().wait(timeout)
    }
}

impl Place {
    /// Polls what has this descriptor, which is open as long as there is the place.
    pub(super) fn watch(&mut self, token: u16, fd: RawFd) -> io::Result<()> {
        self.ring.borrow_mut().watch(self.number, token, fd)?;
        self.polls.push((token, fd));
        Ok(())
    }

    /// Hands the polls over.
    ///
    /// # Errors
    /// The kernel refuses one: one that has rings may still forbid operations.
    pub(super) fn begin(&self) -> io::Result<()> {
        let ring = &mut *self.ring.borrow_mut();
        ring.io.submit()?;
        // Only what a poll that ended says matters here; signals that are there already come again as edges do not, so
        // whoever begins looks at the ring and at its orders anyway.
        while let Some(entry) = ring.next(self.number) {
            if !cqueue::more(entry.flags()) {
                return Err(io::Error::from_raw_os_error(-entry.result().min(-1)));
            }
        }
        Ok(())
    }

    /// Begins a transfer, perhaps with some others; false if there is no room.
    ///
    /// # Safety
    ///
    /// What the entry points to stays valid until it has ended.
    pub(super) unsafe fn transfer(&self, entry: squeue::Entry, token: u16, gathered: bool) -> bool {
        let ring = &mut *self.ring.borrow_mut();
        let what = u64::from(token) | if gathered { GATHERED } else { 0 };
        // SAFETY: the caller's promise is ours.
        if !unsafe { ring.push(&entry.user_data(u64::from(self.number) << PLACE_SHIFT | what)) } {
            return false;
        }
        ring.gathered += usize::from(gathered);
        if ring.io.submission().len() >= AT_ONCE {
            ring.hand_over();
        }
        true
    }

    /// Hands over what was held back, unless that is to be left, and has completions posted that wait for that. True if
    /// something is left.
    pub(super) fn poll(&self, leave: bool) -> io::Result<bool> {
        let ring = &mut *self.ring.borrow_mut();
        if ring.follows {
            ring.follow_memory();
        }
        let queue = ring.io.submission();
        let left = leave && !queue.is_empty();
        if (left || queue.is_empty()) && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(left);
        }
        drop(queue);
        entered(ring.io.submit()).map(|()| false)
    }

    /// As [`IoRing::wait`].
    pub(super) fn wait(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.ring.borrow_mut().wait(timeout)
    }

    /// What has ended of the place's.
    pub(super) fn ended(&self) -> Option<Ended> {
        let ring = &mut *self.ring.borrow_mut();
        loop {
            let entry = ring.next(self.number)?;
            let token = entry.user_data() as u16;
            if entry.user_data() & POLL == 0 {
                return Some(Ended::Transfer(token, entry.result()));
            }
            if !cqueue::more(entry.flags())
                && let Some((_, fd)) = self.polls.iter().find(|(of, _)| *of == token)
            {
                ring.watch_again(self.number, token, *fd, entry.result());
            }
            if entry.result() > 0 {
                return Some(Ended::Signal(token));
            }
        }
    }

    /// The guest's memory, from now on.
    pub(super) fn use_memory(&self, view: &Arc<View>) {
        let ring = &mut *self.ring.borrow_mut();
        // Another queue may have said so.
        if !ring.view.as_ref().is_some_and(|known| Arc::ptr_eq(known, view)) {
            ring.registered.suspend();
            (ring.view, ring.follows) = (Some(view.clone()), true);
            ring.follow_memory();
        }
    }

    /// The registered buffer that a transfer's memory is in.
    pub(super) fn buffer(&self, memory: &libc::iovec) -> Option<u16> {
        let Inner { io, registered, .. } = &mut *self.ring.borrow_mut();
        registered.buffer(&io.submitter(), memory)
    }

    /// Bytes of the guest's memory that are registered; 0 if another place of the ring says so.
    pub(super) fn registered_bytes(&self) -> u64 {
        let ring = self.ring.borrow();
        let first = ring.places.first().is_some_and(|(number, _)| *number == self.number);
        if first { ring.registered.bytes() } else { 0 }
    }
}

impl Drop for Place {
    /// What is polled for it is polled no more. No transfer is under way.
    fn drop(&mut self) {
        let ring = &mut *self.ring.borrow_mut();
        if let Some(place) = ring.places.iter().position(|(number, _)| *number == self.number) {
            ring.kept -= ring.places.remove(place).1.len();
        }
        // With the last place the ring goes, or is used no more.
        if !ring.places.is_empty() {
            for (token, _) in &self.polls {
                let poll = poll_data(self.number, *token);
                let remove =
                    opcode::PollRemove::new(poll).build().user_data(u64::from(NOBODY) << PLACE_SHIFT);
                // SAFETY: it points to nothing. If there is no room, what the poll says goes unheard.
                unsafe { ring.push(&remove) };
            }
        }
    }
}

impl Inner {
    /// Puts an entry into the submission queue; false if there is no room even after handing over what is there.
    ///
    /// # Safety
    ///
    /// What the entry points to stays valid until it is complete.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the caller's promise is ours.
        if unsafe { self.io.submission().push(entry) }.is_ok() {
            return true;
        }
        self.hand_over();
        // SAFETY: as above.
        unsafe { self.io.submission().push(entry) }.is_ok()
    }

    fn hand_over(&mut self) {
        // Why it fails will be seen when it is tried again.
        let _ = self.io.submit();
    }

    fn watch(&mut self, number: u32, token: u16, fd: RawFd) -> io::Result<()> {
        let poll = opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).multi(true).build();
        // SAFETY: a poll points to nothing.
        let pushed = unsafe { self.push(&poll.user_data(poll_data(number, token))) };
        if pushed { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EBUSY)) }
    }

    /// Watches again what the kernel has ceased to watch: it does so when it had to drop a completion, or has no memory.
    fn watch_again(&mut self, number: u32, token: u16, fd: RawFd, result: i32) {
        if result < 0 {
            warn!("a poll ended: {}", io::Error::from_raw_os_error(-result));
            std::thread::sleep(PAUSE);
        }
        while let Err(e) = self.watch(number, token, fd) {
            warn!("cannot poll again: {e}");
            std::thread::sleep(PAUSE);
        }
    }

    /// The next completion of a place. Those of others are kept for them.
    fn next(&mut self, number: u32) -> Option<cqueue::Entry> {
        if self.kept > 0
            && let Some((_, kept)) = self.places.iter_mut().find(|(of, _)| *of == number)
            && let Some(entry) = kept.pop_front()
        {
            self.kept -= 1;
            return Some(entry);
        }
        loop {
            let entry = self.io.completion().next()?;
            self.gathered -= usize::from(entry.user_data() & GATHERED != 0);
            let of = (entry.user_data() >> PLACE_SHIFT) as u32;
            if of == number {
                return Some(entry);
            }
            if let Some((_, kept)) = self.places.iter_mut().find(|(number, _)| *number == of) {
                kept.push_back(entry);
                self.kept += 1;
            } else if of == OWN
                && !cqueue::more(entry.flags())
                && let Some(fd) = self.watched
            {
                self.watch_again(OWN, 0, fd, entry.result());
            }
        }
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if self.kept > 0 {
            return Ok(());
        }
        // With a time of its own it says nothing of the storage.
        let wanted = if timeout.is_none() { self.wanted() } else { 1 };
        self.haste = self.haste.saturating_sub(1);
        let patience = (wanted > 1).then_some(PATIENCE);
        let result = match timeout.or(patience) {
            None => self.io.submit_and_wait(1),
            Some(timeout) => {
                let timeout = Timespec::from(timeout);
                self.io.submitter().submit_with_args(wanted, &SubmitArgs::new().timespec(&timeout))
            }
        };
        // The kernel does not say so if it was handed something over.
        if self.io.completion().len() < wanted && patience.is_some() {
            self.haste = HASTE;
        }
        entered(result)
    }

    /// How many completions, kicks and orders a sleep is for.
    fn wanted(&self) -> usize {
        if self.haste > 0 { 1 } else { (self.gathered / UNDER_WAY).clamp(1, MOST_AWAITED) }
    }

    /// What has not been handed over yet may name registered memory by its number, and has to be before numbers change.
    #[cold]
    fn follow_memory(&mut self) {
        if !self.io.submission().is_empty() {
            self.hand_over();
        }
        if self.io.submission().is_empty()
            && let Some(view) = &self.view
        {
            self.follows = false;
            self.registered.use_memory(&self.io.submitter(), view);
        }
    }
}

fn poll_data(number: u32, token: u16) -> u64 {
    u64::from(number) << PLACE_SHIFT | POLL | u64::from(token)
}

/// What came of handing over and waiting.
fn entered(result: io::Result<usize>) -> io::Result<()> {
    let Err(e) = result else { return Ok(()) };
    match e.raw_os_error() {
        // Interrupted, time is up, or the kernel wants completions taken first.
        Some(libc::EINTR | libc::ETIME | libc::EBUSY) => Ok(()),
        // Nothing is lost: what was not taken stays in the submission queue.
        Some(libc::EAGAIN | libc::ENOMEM) => {
            std::thread::sleep(PAUSE);
            Ok(())
        }
        _ => Err(e),
    }
}

/// A ring with room for so many entries: what the kernel does not know yet is left out, but that a wait has an end
/// (Linux 5.11).
fn build(entries: u32) -> io::Result<IoUring> {
    let mut newest = IoUring::builder();
    newest.setup_clamp().setup_single_issuer().setup_taskrun_flag().setup_defer_taskrun();
    let built = match newest.build(entries) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::builder().setup_clamp().build(entries),
        built => built,
    }?;
    if built.params().is_feature_ext_arg() { Ok(built) } else { Err(io::ErrorKind::Unsupported.into()) }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const ZEROS: [u8; 4096] = [0; 4096];

    /// Writes nothing to nowhere, `count` times.
    fn begin(place: &Place, file: &std::fs::File, count: u16, gathered: bool) {
        for token in 0..count {
            let write = opcode::Write::new(Fd(file.as_raw_fd()), ZEROS.as_ptr(), 4096).build();
            // SAFETY: what it writes stays where it is.
            assert!(unsafe { place.transfer(write, token, gathered) });
        }
    }

    /// Takes what `count` of its transfers say, waiting.
    fn end(place: &Place, count: u16) {
        let mut seen = std::collections::BTreeSet::new();
        while seen.len() < count.into() {
            match place.ended() {
                None => place.wait(None).unwrap(),
                Some(Ended::Transfer(token, 4096)) => assert!(token < count && seen.insert(token)),
                Some(other) => panic!("{other:?}"),
            }
        }
    }

    fn null() -> std::fs::File {
        std::fs::File::options().write(true).open("/dev/null").unwrap()
    }

    fn ring() -> IoRing {
        IoRing::new(64, Register::Never).unwrap()
    }

    #[test]
    fn a_sleep_is_for_a_part_of_the_gathered_writes_under_way() {
        let (ring, file) = (ring(), null());
        let place = ring.place();
        let state = || (ring.0.borrow().gathered, ring.0.borrow().wanted());
        for (writes, wanted) in [(0, 1), (1, 1), (15, 1), (16, 2), (31, 3), (32, 4), (64, 4)] {
            begin(&place, &file, writes, true);
            assert_eq!(state(), (writes.into(), wanted));
            end(&place, writes);
            assert_eq!(state(), (0, 1));
        }
        begin(&place, &file, 64, false);
        assert_eq!(state(), (0, 1));
        end(&place, 64);
    }

    /// Of 32 writes none is going to be complete soon.
    #[test]
    fn slow_storage_holds_up_what_is_done_for_a_moment_and_not_again_soon() {
        let (ring, event) = (ring(), Event::new().unwrap());
        let mut place = ring.place();
        place.watch(7, event.as_raw_fd()).unwrap();
        place.begin().unwrap();
        ring.0.borrow_mut().gathered = 32;
        let state = || (ring.0.borrow().wanted(), ring.0.borrow().haste);
        let sleep = |timeout| {
            event.signal();
            let since = Instant::now();
            place.wait(timeout).unwrap();
            let slept = since.elapsed();
            assert_eq!((place.ended(), place.ended()), (Some(Ended::Signal(7)), None));
            slept
        };
        // It has its own end, and says nothing of the storage.
        sleep(Some(Duration::from_secs(60)));
        assert_eq!(state(), (4, 0));
        assert!(sleep(None) >= PATIENCE);
        for left in (0..HASTE).rev() {
            assert_eq!(state().0, 1);
            sleep(None);
            assert_eq!(state().1, left);
        }
        assert_eq!(state(), (4, 0));
    }

    /// Each place hears of what is its own, whoever looks first, and nobody of what was another's that has gone.
    #[test]
    fn places_of_a_ring_have_their_own_and_leave_nothing_behind() {
        let (ring, file, own) = (ring(), null(), Event::new().unwrap());
        ring.watch(&own).unwrap();
        ring.watch(&own).unwrap();
        let events: Vec<_> = (0..3).map(|_| Event::new().unwrap()).collect();
        let polled = |token: u16| {
            let mut place = ring.place();
            place.watch(token, events[usize::from(token)].as_raw_fd()).unwrap();
            place.begin().unwrap();
            place
        };
        let (first, second) = (polled(0), polled(1));
        let kept = || ring.0.borrow().kept;
        begin(&first, &file, 10, false);
        begin(&second, &file, 20, false);
        end(&first, 10);
        end(&second, 20);
        assert_eq!((first.ended(), second.ended(), kept()), (None, None, 0));
        begin(&second, &file, 3, false);
        assert!(!first.poll(false).unwrap(), "who hands over does so for all");
        assert_eq!((first.ended(), kept()), (None, 3));
        ring.wait(None).unwrap();
        drop((first, second));
        assert_eq!(kept(), 0);
        // The ring's own signals end a wait, and are nobody's.
        let third = polled(2);
        own.signal();
        ring.wait(None).unwrap();
        events[0].signal();
        events[1].signal();
        assert_eq!(third.ended(), None);
        begin(&third, &file, 5, false);
        end(&third, 5);
        assert_eq!(third.ended(), None);
        events[2].signal();
        ring.wait(None).unwrap();
        assert_eq!((third.ended(), third.ended()), (Some(Ended::Signal(2)), None));
    }
}
