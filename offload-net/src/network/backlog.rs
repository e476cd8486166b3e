//! Frames that wait until their receiver has put new buffers there: what a switch's port buffer is.
//!
//! A guest that is not running for a moment, because its vCPU waits for a core, would otherwise lose frames, and TCP
//! would take that for congestion. It costs a second copy, for these frames only.
//!
//! ```text
//!   bytes   [ .. free .. | oldest | ... | newest | .. free .. ]        a frame is never split: one that does not fit
//!                        ▲                       ▲                     behind the newest goes to the beginning, if the
//!                      frames[0].start          end of frames[n]       oldest has left room there
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;

use crate::frame::offload::Offloads;
use crate::frame::{Bytes, Frame, HEAD_MAX, Memory};

/// Bytes one receiver's frames may take. They are allocated when first needed.
const CAPACITY: usize = 1 << 20;

/// How long a frame may wait, when a newer one comes. It is for the moments in which a guest does not run, which can be
/// long on a busy host; a frame that will never fit is not to keep the others from this guest for ever.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// A bounded queue of frames.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: Vec<u8>,
    frames: VecDeque<Stored>,
}

#[derive(Debug)]
struct Stored {
    start: usize,
    len: usize,
    offloads: Offloads,
    since: Instant,
}

impl Backlog {
    /// No frame waits.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Frames that wait.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Copies a frame to the end of the queue; false if there is no room.
    pub fn push(&mut self, frame: &Frame<'_>) -> bool {
        let len = frame.bytes();
        let Some(start) = self.place(len) else { return false };
        if self.bytes.is_empty() {
            self.bytes.resize(CAPACITY, 0);
        }
        let Some(to) = self.bytes.get_mut(start..start + len) else { return false };
        let (head, tail) = to.split_at_mut(frame.head.len());
        head.copy_from_slice(frame.head);
        frame.tail.copy_out(frame.tail_bytes.start, tail);
        self.frames.push_back(Stored { start, len, offloads: frame.offloads, since: Instant::now() });
        true
    }

    /// Where a frame of `len` bytes can go.
    fn place(&self, len: usize) -> Option<usize> {
        let (Some(oldest), Some(newest)) = (self.frames.front(), self.frames.back()) else {
            return (len <= CAPACITY).then_some(0);
        };
        let end = newest.start + newest.len;
        if oldest.start < end {
            // Room behind the newest, or before the oldest.
            if len <= CAPACITY - end { Some(end) } else { (len <= oldest.start).then_some(0) }
        } else {
            // Room between them.
            (len <= oldest.start - end).then_some(end)
        }
    }

    /// Shows the oldest frame to `f`, which says whether it is done with; then it is removed. `None`: there is none.
    pub fn with_oldest(&mut self, f: impl FnOnce(&Frame<'_>) -> bool) -> Option<bool> {
        let oldest = self.frames.front()?;
        let bytes = self.bytes.get_mut(oldest.start..oldest.start + oldest.len)?;
        let (head, tail) = bytes.split_at_mut(oldest.len.min(HEAD_MAX));
        let tail_bytes = Bytes { start: 0, len: tail.len() };
        let tail = [VolatileSlice::from(tail)];
        let done = f(&Frame { head, tail: Memory::Host(&tail), tail_bytes, offloads: oldest.offloads });
        if done {
            self.frames.pop_front();
        }
        Some(done)
    }

    /// Removes frames that have waited for longer than [`PATIENCE`]; how many.
    pub fn expire(&mut self) -> u64 {
        let mut gone = 0;
        while self.frames.front().is_some_and(|f| f.since.elapsed() > PATIENCE) {
            self.frames.pop_front();
            gone += 1;
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What goes in comes out, in order, whatever the sizes; and the bound holds.
        #[test]
        fn first_in_first_out(steps in prop::collection::vec((any::<bool>(), 14..65_000_usize), 1..200)) {
            let mut backlog = Backlog::default();
            let mut model: VecDeque<(usize, u8)> = VecDeque::new();
            let mut data = vec![0; 65_000];
            for (i, (push, len)) in steps.into_iter().enumerate() {
                if push {
                    let seed = i as u8;
                    data[..len].fill(seed);
                    let (head, tail) = data[..len].split_at_mut(len.min(HEAD_MAX));
                    let tail_bytes = Bytes { start: 0, len: tail.len() };
                    let tail = [VolatileSlice::from(tail)];
                    let offloads = Offloads::default();
                    if backlog.push(&Frame { head, tail: Memory::Host(&tail), tail_bytes, offloads }) {
                        model.push_back((len, seed));
                    } else {
                        prop_assert!(model.iter().map(|m| m.0).sum::<usize>() + 2 * 65_000 > CAPACITY);
                    }
                } else {
                    let mut got = None;
                    backlog.with_oldest(|f| {
                        let mut all = f.head.to_vec();
                        all.resize(f.bytes(), 0);
                        f.tail.copy_out(0, &mut all[f.head.len()..]);
                        got = Some(all);
                        true
                    });
                    prop_assert_eq!(got, model.pop_front().map(|(len, seed)| vec![seed; len]));
                }
                prop_assert_eq!(backlog.is_empty(), model.is_empty());
                prop_assert!(backlog.bytes.len() <= CAPACITY);
            }
        }
    }
}
