//! Chains in the order in which they were taken, for a ring without an inflight record.
//!
//! After a crash such a ring begins again at the used index: whatever stands in the available ring from there on is
//! done again. That is right only if the used ring says of the available ring "so far, and no further":
//!
//! ```text
//!   available   5 6 7          6 is done first. If the driver were shown that, used = 1, a successor would begin
//!   used        6              at 6: 5 would never be answered, and 6 be done after its buffers were freed.
//! ```
//!
//! So what is done early is kept here until all that was taken before it is done.

/// What is taken, by position, and how it ended, by head. Both are as long as the ring; nothing is allocated later.
#[derive(Debug)]
pub(super) struct InOrder {
    heads: Box<[u16]>,
    written: Box<[u32]>,
}

impl InOrder {
    /// For a ring of `size` entries, a power of two.
    pub(super) fn new(size: u16) -> Self {
        let size = usize::from(size);
        Self { heads: vec![0; size].into(), written: vec![0; size].into() }
    }

    fn wrap(&self, at: u16) -> usize {
        usize::from(at) & (self.heads.len() - 1)
    }

    /// `head` was taken from position `at` of the available ring.
    pub(super) fn taken(&mut self, at: u16, head: u16) {
        let at = self.wrap(at);
        self.heads[at] = head;
    }

    /// `head`, which is below the ring's size, is done, with `written` bytes written.
    pub(super) fn done(&mut self, head: u16, written: u32) {
        self.written[usize::from(head)] = written;
    }

    /// What was taken from position `at`, and how many bytes were written, if it is done.
    pub(super) fn at(&self, at: u16) -> (u16, u32) {
        let head = self.heads[self.wrap(at)];
        (head, self.written[usize::from(head)])
    }
}
