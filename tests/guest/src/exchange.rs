//! A reliable exchange of numbered frames over an unreliable link: sliding window, frames taken in any order (nothing but
//! their number is kept), cumulative acknowledgement. When nothing moves, the sender goes back to the first unacknowledged frame,
//! with one frame and ever longer waits until something does: a peer that is only slow must not be buried. A state machine without
//! clock, buffers or I/O.

use crate::payload::{Header, Kind};
use alloc::vec;
use alloc::vec::Vec;

/// The wait for an acknowledgement doubles at most so often.
const MAX_DOUBLINGS: u32 = 4;

/// How the exchange is to go; times in ticks of the clock that the calls pass.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Frames each side sends.
    pub count: u64,
    /// Frames in flight unacknowledged, at least 1; the same on both sides.
    pub window: u64,
    /// Silence after which the first unacknowledged frame is sent again; doubles with every try, up to 16 times this.
    pub resend: u64,
    /// How long a side that is done goes on telling a peer that has not said so.
    pub linger: u64,
}

/// One side of an exchange.
#[derive(Debug)]
pub struct Exchange {
    settings: Settings,
    /// Ours below this are acknowledged.
    acknowledged: u64,
    /// Ours to be sent next, and the highest ever sent.
    next: u64,
    highest: u64,
    /// The peer's below this are here.
    expected: u64,
    /// Which of the peer's `window` frames from there on are here, by number modulo the window.
    ahead: Vec<bool>,
    progress: u64,
    /// Time-outs since the last progress.
    silences: u32,
    answer_due: bool,
    peer_finished: bool,
    told_finished: bool,
    complete_since: Option<u64>,
    retransmits: u64,
    duplicates: u64,
    reordered: u64,
}

impl Exchange {
    /// A side that has neither sent nor received.
    #[must_use]
    pub fn new(settings: Settings, now: u64) -> Self {
        Self {
            settings,
            acknowledged: 0,
            next: 0,
            highest: 0,
            expected: 0,
            ahead: vec![false; settings.window as usize],
            progress: now,
            silences: 0,
            answer_due: false,
            peer_finished: false,
            told_finished: false,
            complete_since: None,
            retransmits: 0,
            duplicates: 0,
            reordered: 0,
        }
    }

    /// What to send now, if anything. Counts as sent.
    pub fn poll(&mut self, now: u64) -> Option<Header> {
        let patience = self.settings.resend << self.silences.min(MAX_DOUBLINGS);
        let silent = now.saturating_sub(self.progress) >= patience;
        if silent && self.next > self.acknowledged {
            self.next = self.acknowledged;
            self.progress = now;
            self.silences += 1;
        }
        let window = if self.silences > 0 { 1 } else { self.settings.window };
        if self.next < self.settings.count && self.next - self.acknowledged < window {
            let sequence = self.next;
            self.next += 1;
            if self.next > self.highest {
                self.highest = self.next;
            } else {
                self.retransmits += 1;
            }
            return Some(self.header(Kind::Data, sequence));
        }
        let tell_again = silent && !self.peer_finished;
        let tell_finished = self.complete() && !self.told_finished;
        if self.answer_due || tell_finished || tell_again {
            self.progress = if tell_again { now } else { self.progress };
            return Some(self.header(Kind::Acknowledgement, 0));
        }
        None
    }

    fn header(&mut self, kind: Kind, sequence: u64) -> Header {
        self.answer_due = false;
        self.told_finished |= self.complete();
        Header { kind, finished: self.complete(), sequence, acknowledged: self.expected }
    }

    /// Takes in a frame of the peer's whose pattern is intact; whether it is a data frame that was not here yet.
    pub fn receive(&mut self, now: u64, header: &Header) -> bool {
        // A number beyond what was sent is no acknowledgement of ours.
        if header.acknowledged > self.acknowledged && header.acknowledged <= self.highest {
            self.acknowledged = header.acknowledged;
            self.next = self.next.max(self.acknowledged);
            self.progress = now;
            self.silences = 0;
        }
        self.peer_finished |= header.finished;
        if header.kind == Kind::Acknowledgement {
            // A peer that is not done but asks: answer, our last word may be lost.
            self.answer_due |= self.complete() && !header.finished;
            return false;
        }
        self.answer_due = true;
        let end = self.expected.saturating_add(self.settings.window).min(self.settings.count);
        if header.sequence >= end {
            // No such frame, or the peer's window is larger than ours.
            return false;
        }
        let at = |sequence: u64| (sequence % self.settings.window) as usize;
        if header.sequence < self.expected || self.ahead[at(header.sequence)] {
            self.duplicates += 1;
            return false;
        }
        self.reordered += u64::from(header.sequence != self.expected);
        self.ahead[at(header.sequence)] = true;
        while core::mem::take(&mut self.ahead[at(self.expected)]) {
            self.expected += 1;
        }
        true
    }

    /// Everything of the peer's is here and everything of ours is acknowledged.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.acknowledged == self.settings.count && self.expected == self.settings.count
    }

    /// Nothing is left to do: complete, told the peer so, and the peer is complete too or had `linger` to say so.
    pub fn finished(&mut self, now: u64) -> bool {
        if !self.complete() || !self.told_finished {
            return false;
        }
        let since = *self.complete_since.get_or_insert(now);
        (self.peer_finished && !self.answer_due) || now.saturating_sub(since) >= self.settings.linger
    }

    /// Frames acknowledged plus frames received: grows as long as the exchange gets on.
    #[must_use]
    pub fn progress(&self) -> u64 {
        self.acknowledged + self.expected
    }

    /// Frames sent more than once.
    #[must_use]
    pub fn retransmits(&self) -> u64 {
        self.retransmits
    }

    /// Frames received that had been received before.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Frames received ahead of one that was missing.
    #[must_use]
    pub fn reordered(&self) -> u64 {
        self.reordered
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::pattern::Random;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// Runs two sides over a link that loses `loss` of 100 frames, and, `shuffled`, delivers them in any order; the time it took.
    fn run(count: u64, window: u64, loss: u64, shuffled: bool, seed: u64) -> u64 {
        let settings = Settings { count, window, resend: 50, linger: 5000 };
        let mut sides = [Exchange::new(settings, 0), Exchange::new(settings, 0)];
        let mut links = [VecDeque::new(), VecDeque::new()];
        let mut taken = [Vec::new(), Vec::new()];
        let mut done = [false, false];
        let mut random = Random::new(seed);
        for now in 0..3_000_000 {
            for me in 0..2 {
                if done[me] {
                    continue;
                }
                while let Some(header) = sides[me].poll(now) {
                    if random.below(100) >= loss {
                        links[1 - me].push_back(header);
                    }
                }
                while !links[me].is_empty() {
                    let at = if shuffled { random.below(links[me].len() as u64) as usize } else { 0 };
                    let header = links[me].remove(at).expect("in range");
                    if sides[me].receive(now, &header) {
                        taken[me].push(header.sequence);
                    }
                }
                done[me] = sides[me].finished(now);
            }
            if done == [true, true] {
                for taken in &mut taken {
                    taken.sort_unstable();
                    assert!(taken.iter().copied().eq(0..count), "each frame once: {taken:?}");
                }
                if loss == 0 {
                    assert_eq!(sides[0].retransmits() + sides[1].retransmits(), 0);
                }
                return now;
            }
        }
        panic!("the exchange does not end: {sides:?}");
    }

    #[test]
    fn a_clean_link_is_quick() {
        assert!(run(1000, 64, 0, false, 1) < 200);
        assert!(run(1000, 64, 0, true, 1) < 200);
        assert!(run(0, 64, 0, false, 1) < 10);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_lossy_link_delivers_everything(count in 1u64..300, window in 1u64..70, loss in 1u64..40, shuffled: bool, seed: u64) {
            run(count, window, loss, shuffled, seed);
        }

        #[test]
        fn any_frame_is_survived(frames: Vec<(bool, bool, u64, u64)>) {
            let settings = Settings { count: 10, window: 4, resend: 50, linger: 100 };
            let mut side = Exchange::new(settings, 0);
            for (now, (data, finished, sequence, acknowledged)) in frames.into_iter().enumerate() {
                let kind = if data { Kind::Data } else { Kind::Acknowledgement };
                side.receive(now as u64, &Header { kind, finished, sequence, acknowledged });
                let _ = side.poll(now as u64);
            }
        }
    }
}
