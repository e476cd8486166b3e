//! How a queue's thread moves data between guest memory and the image, and what it waits with.

mod sync;
mod uring;

use std::io;
use std::sync::Arc;

use offload_card::event::Event;

pub(crate) use sync::SyncBackend;
pub(crate) use uring::UringBackend;

use crate::image::Image;

/// What is to be done with the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// From the image into memory.
    Read,
    /// From memory into the image.
    Write,
    /// As `Write`, and durable when complete.
    WriteThrough,
    /// Make everything written and completed durable.
    Sync,
}

/// One transfer.
#[derive(Debug)]
pub(crate) struct Transfer<'a> {
    pub(crate) op: Op,
    /// Byte offset in the image.
    pub(crate) offset: u64,
    /// Where in memory; at most `IOV_MAX`. Nothing for `Sync`.
    pub(crate) iovecs: &'a [libc::iovec],
}

/// A transfer that ended: its tag, and bytes moved or a negative errno.
pub(crate) type Completion = (u16, i32);

/// What a queue's thread waits for beside completions.
#[derive(Debug)]
pub(crate) struct Wakers {
    /// The driver's kicks.
    pub(crate) kick: Event,
    /// Orders to the thread.
    pub(crate) orders: Event,
}

/// A way to do I/O. One per queue, used by its thread only.
pub(crate) trait Backend: Sized {
    /// For up to `depth` transfers at a time on `image`.
    fn new(image: Arc<Image>, wakers: Wakers, depth: u16) -> io::Result<Self>;

    /// Begins a transfer. It may be held back until the next [`Backend::wait`]. Every transfer ends with one completion.
    ///
    /// # Safety
    ///
    /// `iovecs` and the memory they name stay valid until the completion has been taken.
    unsafe fn submit(&mut self, tag: u16, transfer: &Transfer<'_>);

    /// Begins what was held back, and waits until there is a completion, a kick or an order. Answers how many kicks it
    /// saw.
    fn wait(&mut self) -> io::Result<u64>;

    /// Moves completions into `done`.
    fn completions(&mut self, done: &mut Vec<Completion>);
}
