//! io_uring: a batch of transfers per system call, and one place to wait for everything.
//!
//! Kicks and orders are multishot polls in the same ring, so that the thread sleeps in one `io_uring_enter` that also
//! submits what it has gathered. Nobody reads the eventfds: every signal is one completion. The kernel posts
//! completions only when asked to (DEFER_TASKRUN), and a flag in shared memory says when to ask: polling costs no
//! system call. A thread with several rings waits for all of them by epoll, which does not hear of completions that wait
//! to be asked for; theirs are posted as soon as the thread is in the kernel (COOP_TASKRUN), and end its wait.
//!
//! A sleep with many writes around the page cache under way is for several of them: each is completed by a kernel thread that the
//! queue's thread would interrupt, for one completion at a time.
//!
//! The image is not registered with the ring. The kernel takes a ring down in its own time, tens of milliseconds after its
//! process was killed, and keeps registered files open, and locked, until then: guests would wait for that. An image that
//! is not registered is kept by the transfers under way, and no longer.
//!
//! What only the image's format can do, its own threads do, and say so by an eventfd that is a third poll.
//!
//! What needs no waiting is quicker without a ring: data in the page cache is copied from there if it was seen there
//! before ([`super::cached`]), or read by a preadv2 that must not block, and a small write goes into the page cache by
//! pwritev2, which io_uring would hand to a worker thread.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use offload_card::memory::View;
use tracing::warn;

use super::cached::{Cached, Seen};
use super::registered::{Register, Registered};
use super::{Begun, Completion, Op, Target, Transfer, Used, Wakers, calls};
use crate::image::Image;
use crate::qcow2::{Mailbox, Qcow2, Work};

// Above all tags, which have 16 bits.
const GATHERED: u64 = 1 << 16;
const KICK: u64 = 1 << 32;
const ORDERS: u64 = 2 << 32;
const FORMATTED: u64 = 3 << 32;

/// Transfers handed over by one system call. Many would save calls, but the storage has nothing to do while they are gathered,
/// and then all at once: with 32 requests of 4 KiB under way, batches of 2 to 4 gave a tenth more than batches of 32.
const AT_ONCE: usize = 4;
/// [`Uring::gathered`] writes under way for each completion that a sleep is for.
const UNDER_WAY: usize = 8;
/// Most completions that a sleep is for: what they bring is handed over at once.
const MOST_AWAITED: usize = AT_ONCE;
/// Longest sleep for several completions. The kernel looks at its clock before that anyway; for a shorter time it would set a timer, which
/// costs as much as several completions.
const PATIENCE: Duration = Duration::from_millis(10);
/// Sleeps for any completion that follow on one for several that found fewer: the storage is slow then.
const HASTE: u32 = 1000;
/// Longest write into the page cache that the queue's thread does itself, in bytes.
const WRITE_HERE_BYTES: usize = 64 * 1024;
/// How long the host is given to find memory for a system call that failed for lack of it.
const PAUSE: Duration = Duration::from_millis(10);

/// What the format's own threads do for this queue.
struct Formatted {
    qcow2: Arc<Qcow2>,
    mailbox: Arc<Mailbox>,
    /// Given to them and not yet seen again.
    pending: usize,
    done: Vec<Completion>,
}

/// I/O by io_uring.
pub(crate) struct Uring {
    ring: IoUring,
    image: Arc<Image>,
    formatted: Option<Formatted>,
    wakers: Wakers,
    /// Seen and not yet counted.
    pub(super) kicks: u64,
    /// Reads are tried here first, as long as the file system can say that it would have to wait.
    read_here: bool,
    write_here: bool,
    pub(super) cached: Cached,
    pub(super) registered: Registered,
    /// To be registered from, when nothing is left to be handed over.
    memory: Option<Arc<View>>,
    /// Writes under way that go to a file around the page cache. The kernel (Linux 6.7 and later) completes them one by one in a
    /// thread of its own, on the processor that the queue's thread handed them over from: woken for the first, it would take the
    /// processor from those that follow.
    gathered: usize,
    gathers: bool,
    /// Sleeps that are for any completion.
    haste: u32,
}

impl Uring {
    /// For up to `depth` transfers at a time; belongs to the calling thread. With `here`, what needs no waiting is done
    /// without the ring.
    pub(super) fn new(
        target: Target,
        wakers: Wakers,
        depth: u16,
        here: bool,
        used: Used,
        seen: &Arc<Seen>,
        register: Register,
    ) -> io::Result<Self> {
        let Target { image, qcow2 } = target;
        // One entry per transfer and three for the polls.
        let ring = build(u32::from(depth) + 3, used)?;
        let cached = here && !image.direct();
        // What is copied from or to the page cache costs the same either way.
        let register =
            if image.direct() || register == Register::AtOnce { register } else { Register::Never };
        let formatted = qcow2.map(|qcow2| -> io::Result<_> {
            let mailbox = Arc::new(Mailbox::new(depth)?);
            Ok(Formatted { qcow2, mailbox, pending: 0, done: Vec::with_capacity(depth.into()) })
        });
        let formatted = formatted.transpose()?;
        let mut uring = Self {
            ring,
            cached: Cached::new(seen.clone()),
            registered: Registered::new(register),
            memory: None,
            gathered: 0,
            gathers: image.direct() && !image.geometry().block_device,
            haste: 0,
            image,
            formatted,
            wakers,
            kicks: 0,
            read_here: cached,
            write_here: cached,
        };
        uring.watch(KICK)?;
        uring.watch(ORDERS)?;
        uring.watch(FORMATTED)?;
        // A kernel that has rings may still forbid operations: find out now.
        uring.ring.submit()?;
        // Only what a poll that ended says matters here; signals that are there already come again as edges do not, so
        // whoever begins looks at the ring and at its orders anyway.
        let mut refused = None;
        for entry in uring.ring.completion() {
            if !cqueue::more(entry.flags()) {
                refused = Some(io::Error::from_raw_os_error(-entry.result().min(-1)));
            }
        }
        refused.map_or(Ok(uring), Err)
    }

    /// Puts an entry into the submission queue; false if there is no room even after handing over what is there.
    ///
    /// # Safety
    ///
    /// What the entry points to stays valid until it is complete.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the caller's promise is ours.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return true;
        }
        // Why it fails will be seen when it is tried again.
        let _ = self.ring.submit();
        // SAFETY: as above.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    fn watch(&mut self, token: u64) -> io::Result<()> {
        let event = match (token, &self.formatted) {
            (KICK, _) => &self.wakers.kick,
            (ORDERS, _) => &self.wakers.orders,
            (_, Some(formatted)) => &formatted.mailbox.event,
            (_, None) => return Ok(()),
        };
        let poll = opcode::PollAdd::new(Fd(event.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
        // SAFETY: a poll points to nothing, and `wakers` keeps the descriptor as long as the ring.
        let pushed = unsafe { self.push(&poll.user_data(token)) };
        if pushed { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EBUSY)) }
    }

    /// Watches again what the kernel has ceased to watch: it does so when it had to drop a completion, or has no memory.
    fn watch_again(&mut self, token: u64, result: i32) {
        if result < 0 {
            warn!("a poll ended: {}", io::Error::from_raw_os_error(-result));
            std::thread::sleep(PAUSE);
        }
        while let Err(e) = self.watch(token) {
            warn!("cannot poll again: {e}");
            std::thread::sleep(PAUSE);
        }
    }

    /// Begins a transfer.
    ///
    /// # Safety
    ///
    /// As [`super::Backend::begin`].
    pub(super) unsafe fn begin(&mut self, tag: u16, transfer: &Transfer<'_>) -> Begun {
        if transfer.formatted
            && let Some(formatted) = &mut self.formatted
        {
            formatted.pending += 1;
            // SAFETY: the caller's promise is ours.
            unsafe { formatted.qcow2.submit(tag, Work::new(transfer), &formatted.mailbox) };
            return Begun::Pending;
        }
        // SAFETY: the caller's promise is ours.
        if let Some(result) = unsafe { self.try_here(transfer) } {
            return Begun::Done(result);
        }
        let file = if transfer.unaligned { self.image.buffered() } else { self.image.file() };
        let file = Fd(file.as_raw_fd());
        let (offset, iovecs) = (transfer.offset, transfer.iovecs);
        let (first, count) = (iovecs.as_ptr(), iovecs.len() as u32);
        let flags = if transfer.op == Op::WriteThrough { libc::RWF_DSYNC } else { 0 };
        let entry = match (transfer.op, iovecs) {
            (Op::Read, [one]) => match self.registered.buffer(&self.ring.submitter(), one) {
                Some(buffer) => opcode::ReadFixed::new(file, one.iov_base.cast(), length(one), buffer)
                    .offset(offset)
                    .build(),
                None => opcode::Read::new(file, one.iov_base.cast(), length(one)).offset(offset).build(),
            },
            (Op::Read, _) => opcode::Readv::new(file, first, count).offset(offset).build(),
            (Op::Write | Op::WriteThrough, [one]) => {
                match self.registered.buffer(&self.ring.submitter(), one) {
                    Some(buffer) => opcode::WriteFixed::new(file, one.iov_base.cast(), length(one), buffer)
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                    None => opcode::Write::new(file, one.iov_base.cast(), length(one))
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                }
            }
            (Op::Write | Op::WriteThrough, _) => {
                opcode::Writev::new(file, first, count).offset(offset).rw_flags(flags).build()
            }
            (Op::Punch | Op::Zero | Op::Discard, _) => opcode::Fallocate::new(file, transfer.length)
                .offset(offset)
                .mode(calls::fallocate_mode(transfer.op))
                .build(),
            (Op::Sync, _) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        };
        let gathered = self.gathers && transfer.op == Op::Write && !transfer.unaligned;
        let token = u64::from(tag) | if gathered { GATHERED } else { 0 };
        // SAFETY: the caller keeps what the entry points to until the completion is taken, and `image` the file.
        if !unsafe { self.push(&entry.user_data(token)) } {
            return Begun::Full;
        }
        self.gathered += usize::from(gathered);
        if self.ring.submission().len() >= AT_ONCE {
            // Why it fails will be seen when it is tried again.
            let _ = self.ring.submit();
        }
        Begun::Pending
    }

    /// Does a transfer at once if it needs no waiting.
    ///
    /// # Safety
    ///
    /// The memory that the iovecs name is valid.
    unsafe fn try_here(&mut self, transfer: &Transfer<'_>) -> Option<i32> {
        match transfer.op {
            Op::Read if self.read_here => {
                // SAFETY: the caller's promise is ours.
                let copied = unsafe { self.cached.read(transfer.offset, transfer.iovecs) };
                if copied.is_some() {
                    return copied;
                }
                // SAFETY: as above.
                match -unsafe { calls::transfer(&self.image, transfer, libc::RWF_NOWAIT) } {
                    libc::EAGAIN => None,
                    libc::EOPNOTSUPP => {
                        self.read_here = false;
                        None
                    }
                    // An end that is not there, or an error: the ring's word counts.
                    0.. => None,
                    moved => {
                        self.cached.saw(&self.image, transfer.offset, moved.unsigned_abs() as usize);
                        Some(-moved)
                    }
                }
            }
            Op::Write
                if self.write_here
                    && transfer.iovecs.iter().map(|v| v.iov_len).sum::<usize>() <= WRITE_HERE_BYTES =>
            {
                // SAFETY: as above.
                Some(unsafe { calls::transfer(&self.image, transfer, 0) })
            }
            Op::Read | Op::Write | Op::WriteThrough | Op::Sync | Op::Punch | Op::Zero | Op::Discard => None,
        }
    }

    /// Hands over what was held back, unless that is to be left, and has completions posted that wait for that. True if
    /// something is left.
    pub(super) fn poll(&mut self, leave: bool) -> io::Result<bool> {
        if self.memory.is_some() {
            self.follow_memory();
        }
        let queue = self.ring.submission();
        let left = leave && !queue.is_empty();
        if (left || queue.is_empty()) && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(left);
        }
        drop(queue);
        entered(self.ring.submit()).map(|()| false)
    }

    /// Hands over what was held back, and waits for whatever comes, for at most `timeout`; without one, for several completions
    /// if there are many to come and that does not take long.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let wanted = if timeout.is_none() { self.wanted() } else { 1 };
        self.haste = self.haste.saturating_sub(1);
        let patience = (wanted > 1).then_some(PATIENCE);
        let result = match timeout.or(patience) {
            None => self.ring.submit_and_wait(1),
            Some(timeout) => {
                let timeout = Timespec::from(timeout);
                self.ring.submitter().submit_with_args(wanted, &SubmitArgs::new().timespec(&timeout))
            }
        };
        // The kernel does not say so if it was handed something over.
        if self.ring.completion().len() < wanted && patience.is_some() {
            self.haste = HASTE;
        }
        entered(result)
    }

    /// How many completions, kicks and orders a sleep is for.
    fn wanted(&self) -> usize {
        if self.haste > 0 { 1 } else { (self.gathered / UNDER_WAY).clamp(1, MOST_AWAITED) }
    }

    /// The guest's memory, from now on.
    pub(super) fn use_memory(&mut self, view: &Arc<View>) {
        self.registered.suspend();
        self.memory = Some(view.clone());
        self.follow_memory();
    }

    /// What has not been handed over yet may name registered memory by its number, and has to be before numbers change.
    #[cold]
    fn follow_memory(&mut self) {
        if !self.ring.submission().is_empty() {
            // Why it fails will be seen when it is tried again.
            let _ = self.ring.submit();
        }
        if self.ring.submission().is_empty()
            && let Some(view) = self.memory.take()
        {
            self.registered.use_memory(&self.ring.submitter(), &view);
        }
    }

    /// Can be read when a wait would end.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    /// The next completion of a transfer.
    pub(super) fn completion(&mut self) -> Option<Completion> {
        if let Some(formatted) = &mut self.formatted
            && formatted.pending > 0
        {
            if formatted.done.is_empty() {
                formatted.mailbox.take(&mut formatted.done);
            }
            if let Some(done) = formatted.done.pop() {
                formatted.pending -= 1;
                return Some(done);
            }
        }
        loop {
            let entry = self.ring.completion().next()?;
            let ended = !cqueue::more(entry.flags());
            match entry.user_data() {
                token @ (KICK | ORDERS | FORMATTED) => {
                    self.kicks += u64::from(token == KICK && entry.result() > 0);
                    if ended {
                        self.watch_again(token, entry.result());
                    }
                }
                token => {
                    self.gathered -= usize::from(token & GATHERED != 0);
                    return Some((token as u16, entry.result()));
                }
            }
        }
    }
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

/// A ring with room for `entries` transfers: what the kernel does not know yet is left out, but that a wait has an end
/// (Linux 5.11).
fn build(entries: u32, used: Used) -> io::Result<IoUring> {
    let mut newest = IoUring::builder();
    newest.setup_clamp().setup_single_issuer().setup_taskrun_flag();
    if used == Used::AmongOthers {
        newest.setup_coop_taskrun()
    } else {
        newest.setup_defer_taskrun()
    };
    let built = match newest.build(entries) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::builder().setup_clamp().build(entries),
        built => built,
    }?;
    if built.params().is_feature_ext_arg() { Ok(built) } else { Err(io::ErrorKind::Unsupported.into()) }
}

/// Length of a buffer; the kernel takes no more than this at a time, and the rest is asked for again.
fn length(iovec: &libc::iovec) -> u32 {
    u32::try_from(iovec.iov_len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use offload_card::event::Event;

    use super::*;

    /// A queue with room for so many transfers on a file of so many pages, which it takes for one around the page cache.
    fn gathering(pages: u16) -> (tempfile::NamedTempFile, Event, Uring) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(u64::from(pages) << 12).unwrap();
        let image = Image::open(file.path().to_str().unwrap(), false, false).unwrap();
        let (kick, orders) = (Event::new().unwrap(), Event::new().unwrap());
        let wakers = Wakers { kick: kick.try_clone().unwrap(), orders };
        let (target, seen) =
            (Target { image: Arc::new(image), qcow2: None }, Arc::new(Seen::new(Arc::default())));
        let mut uring =
            Uring::new(target, wakers, pages, false, Used::ByOne, &seen, Register::Never).unwrap();
        uring.gathers = true;
        (file, kick, uring)
    }

    #[test]
    fn a_sleep_is_for_a_part_of_the_writes_under_way() {
        let (_file, _kick, mut uring) = gathering(64);
        let mut page = [7u8; 4096];
        let iovecs = [libc::iovec { iov_base: page.as_mut_ptr().cast(), iov_len: page.len() }];
        let begin = |uring: &mut Uring, op, count: u16| {
            for tag in 0..count {
                let offset = u64::from(tag) << 12;
                let transfer =
                    Transfer { op, offset, formatted: false, length: 0, iovecs: &iovecs, unaligned: false };
                // SAFETY: `page` and `iovecs` are there until all are done.
                assert_eq!(unsafe { uring.begin(tag, &transfer) }, Begun::Pending);
            }
        };
        let end = |uring: &mut Uring, count| {
            let mut left = count;
            while left > 0 {
                uring.wait(None).unwrap();
                while let Some((_, result)) = uring.completion() {
                    assert_eq!(result, 4096);
                    left -= 1;
                }
            }
            // The machine may be busy.
            uring.haste = 0;
            assert_eq!((uring.gathered, uring.wanted()), (0, 1));
        };
        for (writes, wanted) in [(0, 1), (1, 1), (15, 1), (16, 2), (31, 3), (32, 4), (64, 4)] {
            begin(&mut uring, Op::Write, writes);
            assert_eq!((uring.gathered, uring.wanted()), (writes.into(), wanted));
            end(&mut uring, writes);
        }
        for op in [Op::Read, Op::WriteThrough] {
            begin(&mut uring, op, 64);
            assert_eq!((uring.gathered, uring.wanted()), (0, 1), "{op:?}");
            end(&mut uring, 64);
        }
    }

    /// Of 32 writes none is going to be complete soon.
    #[test]
    fn slow_storage_holds_up_what_is_done_for_a_moment_and_not_again_soon() {
        let (_file, kick, mut uring) = gathering(64);
        uring.gathered = 32;
        let sleep = |uring: &mut Uring, timeout| {
            kick.signal();
            let since = Instant::now();
            uring.wait(timeout).unwrap();
            let slept = since.elapsed();
            assert_eq!(uring.completion(), None);
            assert_eq!(std::mem::take(&mut uring.kicks), 1);
            slept
        };
        // It has its own end, and says nothing of the storage.
        sleep(&mut uring, Some(Duration::from_millis(1)));
        assert_eq!((uring.wanted(), uring.haste), (4, 0));
        assert!(sleep(&mut uring, None) >= PATIENCE);
        for left in (0..HASTE).rev() {
            assert_eq!(uring.wanted(), 1);
            sleep(&mut uring, None);
            assert_eq!(uring.haste, left);
        }
        assert_eq!(uring.wanted(), 4);
    }
}
