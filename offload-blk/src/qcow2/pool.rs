//! The threads that read and write an image's tables.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use offload_card::event::Event;
use vm_memory::VolatileSlice;

use super::{Inner, LEARN_BYTES};
use crate::io::{Completion, Op, Transfer};
use crate::suspect;

/// Threads of a disk, at most: one that writes, and some that read. They are started as they are needed.
const MAX_THREADS: usize = 4;
/// Requests that are written to the tables at a time, at most.
const MAX_BATCH: usize = 64;
/// Bytes that pass through a thread's buffer at a time.
const BUFFER_BYTES: usize = 256 << 10;
const STACK_BYTES: usize = 512 * 1024;

/// A transfer that needs the image's tables.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    op: Op,
    /// Byte offset on the disk.
    offset: u64,
    /// Bytes.
    length: u64,
    iovecs: *const libc::iovec,
    count: usize,
}

// SAFETY: the memory it names is valid until it is completed, as whoever submits it promises, for any thread.
unsafe impl Send for Work {}

impl Work {
    pub(crate) fn new(transfer: &Transfer<'_>) -> Self {
        let moved: u64 = transfer.iovecs.iter().map(|v| v.iov_len as u64).sum();
        Self {
            op: transfer.op,
            offset: transfer.offset,
            length: if transfer.iovecs.is_empty() { transfer.length } else { moved },
            iovecs: transfer.iovecs.as_ptr(),
            count: transfer.iovecs.len(),
        }
    }

    fn reads(&self) -> bool {
        self.op == Op::Read
    }
}

/// Where a queue finds what has been done for it.
#[derive(Debug)]
pub(crate) struct Mailbox {
    done: Mutex<Vec<Completion>>,
    /// Signalled for each.
    pub(crate) event: Event,
}

impl Mailbox {
    /// With room for `depth` completions.
    pub(crate) fn new(depth: u16) -> io::Result<Self> {
        Ok(Self { done: Mutex::new(Vec::with_capacity(depth.into())), event: Event::new()? })
    }

    /// Moves what is there to `to`.
    pub(crate) fn take(&self, to: &mut Vec<Completion>) {
        to.append(&mut self.done.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn put(&self, completion: Completion) {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).push(completion);
        self.event.signal();
    }
}

#[derive(Debug)]
struct Job {
    tag: u16,
    work: Work,
    done: Arc<Mailbox>,
}

#[derive(Debug, Default)]
struct Jobs {
    reads: VecDeque<Job>,
    writes: VecDeque<Job>,
    /// Somebody may change the tables, and nobody else.
    exclusive: bool,
    /// The tables were changed, and are not in the file.
    dirty: bool,
    threads: usize,
    idle: usize,
    ended: bool,
}

#[derive(Debug)]
struct Shared {
    inner: Inner,
    /// Where a panic over the image leaves its mark.
    mark: Option<Arc<Path>>,
    jobs: Mutex<Jobs>,
    /// There is a job, or nobody has the tables any more, or all is over.
    changed: Condvar,
}

/// The threads of a disk; they end with it.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

impl Pool {
    /// A panic over the image leaves the mark that one of the calling thread would.
    pub(super) fn new(inner: Inner) -> io::Result<Self> {
        let mark = suspect::current();
        let shared = Arc::new(Shared { inner, mark, jobs: Mutex::default(), changed: Condvar::new() });
        let pool = Self { shared, handles: Mutex::default() };
        // One at least there must be.
        pool.spawn(&mut pool.shared.jobs())?;
        Ok(pool)
    }

    pub(super) fn inner(&self) -> &Inner {
        &self.shared.inner
    }

    fn spawn(&self, jobs: &mut Jobs) -> io::Result<()> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name("qcow2".into()).stack_size(STACK_BYTES);
        let handle = thread.spawn(move || suspect::watched(shared.mark.clone(), || shared.run()))?;
        jobs.threads += 1;
        self.handles.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
        Ok(())
    }

    /// The caller keeps the memory of `work` until it is done.
    pub(super) fn submit(&self, tag: u16, work: Work, done: &Arc<Mailbox>) {
        let mut jobs = self.shared.jobs();
        let list = if work.reads() { &mut jobs.reads } else { &mut jobs.writes };
        list.push_back(Job { tag, work, done: done.clone() });
        if jobs.idle == 0 && jobs.threads < MAX_THREADS {
            // Those that are there do it otherwise.
            let _ = self.spawn(&mut jobs);
        }
        drop(jobs);
        self.shared.changed.notify_one();
    }

    pub(super) fn perform(&self, work: &Work) -> i32 {
        suspect::watched(self.shared.mark.clone(), || self.perform_watched(work))
    }

    fn perform_watched(&self, work: &Work) -> i32 {
        let mut buffer = vec![0; BUFFER_BYTES.min(work.length as usize)];
        if work.reads() {
            let result = self.shared.inner.read(work, &mut buffer);
            self.shared.learn_read(work);
            return result;
        }
        let mut result = [0];
        let held = self.shared.hold();
        self.shared.write(&[*work], &mut buffer, &mut result);
        drop(held);
        result[0]
    }

    /// Does something that changes the tables.
    pub(super) fn exclusively<T>(&self, change: impl FnOnce(&Inner) -> T) -> T {
        let held = self.shared.hold();
        let done = suspect::watched(self.shared.mark.clone(), || change(&self.shared.inner));
        drop(held);
        done
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.jobs().ended = true;
        self.shared.changed.notify_all();
        for handle in self.handles.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = handle.join();
        }
    }
}

/// The right to change the tables.
struct Held<'a>(&'a Shared);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.jobs().exclusive = false;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody else has the tables.
    fn hold(&self) -> Held<'_> {
        let jobs = self.jobs();
        let mut jobs = self.changed.wait_while(jobs, |j| j.exclusive).unwrap_or_else(PoisonError::into_inner);
        jobs.exclusive = true;
        Held(self)
    }

    /// A thread's main function.
    fn run(&self) {
        let mut buffer = vec![0; BUFFER_BYTES];
        let (mut batch, mut works) = (Vec::with_capacity(MAX_BATCH), Vec::with_capacity(MAX_BATCH));
        let mut results = Vec::with_capacity(MAX_BATCH);
        let mut jobs = self.jobs();
        loop {
            if !jobs.exclusive && !jobs.writes.is_empty() {
                jobs.exclusive = true;
                let count = jobs.writes.len().min(MAX_BATCH);
                batch.extend(jobs.writes.drain(..count));
                drop(jobs);
                let held = Held(self);
                works.clear();
                works.extend(batch.iter().map(|j: &Job| j.work));
                results.clear();
                results.resize(batch.len(), 0);
                self.write(&works, &mut buffer, &mut results);
                drop(held);
                for (job, result) in batch.drain(..).zip(&results) {
                    job.done.put((job.tag, *result));
                }
                jobs = self.jobs();
            } else if let Some(job) = jobs.reads.pop_front() {
                drop(jobs);
                let result = self.inner.read(&job.work, &mut buffer);
                // Before the queue asks for its neighbours.
                self.learn_read(&job.work);
                job.done.put((job.tag, result));
                jobs = self.jobs();
            } else if jobs.ended {
                return;
            } else {
                jobs.idle += 1;
                jobs = self.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                jobs.idle -= 1;
            }
        }
    }

    /// Enters what was read, and what is around it, into the map; not while somebody changes the tables.
    fn learn_read(&self, work: &Work) {
        let mut jobs = self.jobs();
        if jobs.exclusive || jobs.dirty {
            return;
        }
        jobs.exclusive = true;
        drop(jobs);
        let held = Held(self);
        // What is not entered is looked up again.
        let _ = self.inner.learn(work.offset, work.length.max(LEARN_BYTES));
        drop(held);
    }

    /// Does `works`, which change the tables, and writes the tables to the file. The caller holds the tables.
    fn write(&self, works: &[Work], buffer: &mut [u8], results: &mut [i32]) {
        self.jobs().dirty = true;
        for (work, result) in works.iter().zip(results.iter_mut()) {
            *result = match work.op {
                Op::Punch | Op::Zero | Op::Discard => {
                    errno(self.inner.erase(work.op, work.offset, work.length).map(|()| 0))
                }
                _ => self.inner.write(work, buffer),
            };
        }
        self.inner.unsynced.store(true, Ordering::Relaxed);
        let mut written = self.inner.access.flush();
        if written.is_ok() {
            self.jobs().dirty = false;
            if works.iter().any(|w| w.op == Op::WriteThrough) {
                written = self.inner.image.file().sync_data();
                if written.is_ok() {
                    self.inner.unsynced.store(false, Ordering::Relaxed);
                }
            }
        }
        if written.is_err() {
            let e = errno(written.map(|()| 0));
            results.iter_mut().filter(|r| **r >= 0).for_each(|r| *r = e);
            return;
        }
        for work in works {
            let _ = self.inner.learn(work.offset, work.length);
        }
    }
}

impl Inner {
    fn read(&self, work: &Work, buffer: &mut [u8]) -> i32 {
        let mut memory = Memory::of(work);
        pieces(work, buffer, |piece, at| {
            self.access.read(&mut *piece, at)?;
            memory.put(piece);
            Ok(())
        })
    }

    fn write(&self, work: &Work, buffer: &mut [u8]) -> i32 {
        let mut memory = Memory::of(work);
        pieces(work, buffer, |piece, at| {
            memory.get(piece);
            self.access.write(&*piece, at)
        })
    }
}

/// Goes through `work` piece by piece, each with that much of `buffer`.
fn pieces(work: &Work, buffer: &mut [u8], mut each: impl FnMut(&mut [u8], u64) -> io::Result<()>) -> i32 {
    let length = work.length.min(i32::MAX as u64) as usize;
    let mut done = 0;
    while done < length {
        let part = buffer.len().min(length - done);
        if let Err(e) = each(&mut buffer[..part], work.offset + done as u64) {
            return errno(Err(e));
        }
        done += part;
    }
    done as i32
}

fn errno(result: io::Result<i32>) -> i32 {
    result.unwrap_or_else(|e| {
        tracing::debug!("image tables: {e}");
        -e.raw_os_error().filter(|e| *e > 0).unwrap_or(libc::EIO)
    })
}

/// The guest's memory of a transfer, from beginning to end.
struct Memory<'a> {
    iovecs: &'a [libc::iovec],
    /// Bytes of the first that are done with.
    done: usize,
}

impl<'a> Memory<'a> {
    fn of(work: &'a Work) -> Self {
        if work.count == 0 {
            return Self { iovecs: &[], done: 0 };
        }
        // SAFETY: the vectors are valid while the work is, as whoever submitted it promised.
        let iovecs = unsafe { std::slice::from_raw_parts(work.iovecs, work.count) };
        Self { iovecs, done: 0 }
    }

    /// The next piece, of at most `length` bytes.
    fn next(&mut self, length: usize) -> Option<VolatileSlice<'a>> {
        let (iovec, rest) = self.iovecs.split_first()?;
        let part = length.min(iovec.iov_len - self.done);
        // SAFETY: within the vector, whose memory is valid as long as the work is; the guest may use it, too.
        let slice = unsafe { VolatileSlice::new(iovec.iov_base.cast::<u8>().add(self.done), part) };
        self.done += part;
        if self.done == iovec.iov_len {
            (self.iovecs, self.done) = (rest, 0);
        }
        Some(slice)
    }

    fn put(&mut self, mut data: &[u8]) {
        while !data.is_empty()
            && let Some(slice) = self.next(data.len())
        {
            slice.copy_from(&data[..slice.len()]);
            data = &data[slice.len()..];
        }
    }

    fn get(&mut self, data: &mut [u8]) {
        let mut at = 0;
        while at < data.len()
            && let Some(slice) = self.next(data.len() - at)
        {
            at += slice.copy_to(&mut data[at..]);
        }
    }
}
