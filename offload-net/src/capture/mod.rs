//! Captures of a device's frames, as pieces of a pcapng file.
//!
//! The network's thread copies frames into a piece of memory and gives it away at the end of its turn, or when it is full.
//! It never waits: as long as the one who reads has not taken the pieces before, and the one being filled is full, frames
//! are not captured, and counted. A device without captures costs a branch per frame.

mod pcapng;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proto::v1::CapturePart;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::frame::{FRAME_MAX, Frame};
use crate::network::Network;
pub use pcapng::Direction;

/// Captures that one device may have at the same time.
pub const PER_DEVICE: usize = 4;
/// Bytes of a piece: at least one frame of any length goes into it.
const PIECE: usize = 128 << 10;
const _: () = assert!(PIECE > FRAME_MAX + 1024);
/// Pieces that may wait to be read.
const PIECES: usize = 32;

/// What is wanted of a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Keep no more than the first so many bytes of a frame; 0: all.
    pub snap_bytes: u32,
    /// End after so many frames; 0: never.
    pub frames: u64,
}

/// The network's thread's end of a capture.
#[derive(Debug)]
pub struct Sink {
    snap: usize,
    /// Frames still wanted.
    left: u64,
    piece: Vec<u8>,
    pieces: mpsc::Sender<CapturePart>,
    frames: u64,
    lost: u64,
    /// What was said of `lost` last.
    lost_told: u64,
    stuck: Arc<AtomicBool>,
}

/// The reader's end.
#[derive(Debug)]
pub struct Source {
    /// The file's beginning, until it has been read.
    beginning: Option<Vec<u8>>,
    pieces: mpsc::Receiver<CapturePart>,
    /// The thread has something for which there was no room.
    stuck: Arc<AtomicBool>,
    /// The network lives as long as its devices need it, and not for the sake of a capture.
    network: Weak<Network>,
}

/// A capture of a device of this name.
pub fn new(device: &str, wanted: Wanted, network: &Arc<Network>) -> (Sink, Source) {
    let (sender, receiver) = mpsc::channel(PIECES);
    let stuck = Arc::<AtomicBool>::default();
    let application = concat!("offload-net ", env!("CARGO_PKG_VERSION"));
    let sink = Sink {
        snap: if wanted.snap_bytes == 0 { usize::MAX } else { wanted.snap_bytes as usize },
        left: if wanted.frames == 0 { u64::MAX } else { wanted.frames },
        piece: Vec::with_capacity(PIECE),
        pieces: sender,
        frames: 0,
        lost: 0,
        lost_told: 0,
        stuck: stuck.clone(),
    };
    let source = Source {
        beginning: Some(pcapng::beginning(application, device, wanted.snap_bytes)),
        pieces: receiver,
        stuck,
        network: Arc::downgrade(network),
    };
    (sink, source)
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl Sink {
    /// Copies a frame, if there is room.
    pub fn add(&mut self, frame: &Frame<'_>, direction: Direction) {
        if self.left == 0 {
            return;
        }
        let length = frame.bytes();
        let kept = length.min(self.snap);
        let room = PIECE - pcapng::STATISTICS_LEN;
        let fits = |piece: &Vec<u8>| piece.len() + pcapng::packet_len(kept) <= room;
        if !fits(&self.piece) {
            self.flush();
        }
        if !fits(&self.piece) {
            self.lost += 1;
            return;
        }
        pcapng::packet(&mut self.piece, now(), direction, length, kept, |to| {
            // There are so many bytes: what is not copied stays zero.
            let _ = frame.copy_out(0, to);
        });
        self.frames += 1;
        self.left -= u64::from(self.left != u64::MAX);
    }

    /// Gives away what has been captured, if the reader has room for it. False: the capture is over.
    pub fn flush(&mut self) -> bool {
        let ends = self.left == 0;
        if self.piece.is_empty() && !ends && self.lost == self.lost_told {
            return !self.pieces.is_closed();
        }
        let filled = self.piece.len();
        if ends || self.lost != self.lost_told {
            pcapng::statistics(&mut self.piece, now(), self.frames + self.lost, self.lost);
        }
        let pcapng = std::mem::take(&mut self.piece);
        match self.send(CapturePart { pcapng, frames: self.frames, lost: self.lost }) {
            Ok(()) => {
                self.lost_told = self.lost;
                if !ends {
                    self.piece.reserve_exact(PIECE);
                }
                !ends
            }
            Err(TrySendError::Full(part)) => {
                self.piece = part.pcapng;
                self.piece.truncate(filled);
                true
            }
            Err(TrySendError::Closed(_)) => false,
        }
    }

    fn send(&self, part: CapturePart) -> Result<(), TrySendError<CapturePart>> {
        match self.pieces.try_send(part) {
            Err(TrySendError::Full(part)) => {
                self.stuck.store(true, Ordering::SeqCst);
                // The reader may have taken everything before it could see that.
                self.pieces.try_send(part)
            }
            result => result,
        }
    }
}

impl Source {
    /// The next piece; `None`: the capture is over.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<CapturePart>> {
        if let Some(pcapng) = self.beginning.take() {
            return Poll::Ready(Some(CapturePart { pcapng, frames: 0, lost: 0 }));
        }
        let part = self.pieces.poll_recv(context);
        if matches!(part, Poll::Ready(Some(_)))
            && self.stuck.swap(false, Ordering::SeqCst)
            && let Some(network) = self.network.upgrade()
        {
            // There is room now, and the thread may be asleep.
            network.flush_captures();
        }
        part
    }
}

#[cfg(test)]
mod tests {
    use offload_card::poll::PollPolicy;
    use vm_memory::VolatileSlice;

    use super::pcapng::tests::{Block, read};
    use super::*;
    use crate::frame::offload::Offloads;
    use crate::frame::{Bytes, HEAD_MAX, Memory};
    use crate::network::uplink::Uplink;

    fn with_frame(bytes: &mut [u8], f: impl FnOnce(&Frame<'_>)) {
        let (head, tail) = bytes.split_at_mut(bytes.len().min(HEAD_MAX));
        let tail_bytes = Bytes { start: 0, len: tail.len() };
        let tail = [VolatileSlice::from(tail)];
        f(&Frame { head, tail: Memory::Host(&tail), tail_bytes, offloads: Offloads::default() });
    }

    fn capture(wanted: Wanted) -> (Sink, Source) {
        let network = Network::start("t", 1500, None, Uplink::None, PollPolicy::default()).unwrap();
        new("vm-nic0", wanted, &Arc::new(network))
    }

    fn next(source: &mut Source) -> Poll<Option<CapturePart>> {
        source.poll(&mut Context::from_waker(std::task::Waker::noop()))
    }

    fn part(source: &mut Source) -> Vec<Block> {
        match next(source) {
            Poll::Ready(Some(part)) => read(&part.pcapng),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn frames_are_cut_counted_and_have_their_direction() {
        let (mut sink, mut source) = capture(Wanted { snap_bytes: 300, frames: 2 });
        let mut bytes: Vec<u8> = (0..1000_u32).map(|i| i as u8).collect();
        with_frame(&mut bytes, |f| sink.add(f, Direction::Outbound));
        assert!(sink.flush());
        with_frame(&mut bytes[..60], |f| sink.add(f, Direction::Inbound));
        // One more than wanted.
        with_frame(&mut bytes[..61], |f| sink.add(f, Direction::Inbound));
        assert!(!sink.flush());
        drop(sink);
        let name = "vm-nic0".to_owned();
        assert_eq!(part(&mut source), [Block::Section, Block::Interface { snap: 300, name }]);
        match &part(&mut source)[..] {
            [Block::Packet { flags: 2, length: 1000, bytes: kept, time }] => {
                assert_eq!(kept, &bytes[..300]);
                assert!(*time > 1_700_000_000_000_000_000);
            }
            other => panic!("{other:?}"),
        }
        match &part(&mut source)[..] {
            [
                Block::Packet { flags: 1, length: 60, bytes: kept, .. },
                Block::Statistics { received: 2, dropped: 0 },
            ] => {
                assert_eq!(kept, &bytes[..60]);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(next(&mut source), Poll::Ready(None));
    }

    #[test]
    fn a_reader_that_does_not_read_costs_frames_that_are_counted_and_bounded_memory() {
        let (mut sink, mut source) = capture(Wanted { snap_bytes: 0, frames: 0 });
        let mut bytes = vec![7; 1514];
        for _ in 0..10_000 {
            with_frame(&mut bytes, |f| sink.add(f, Direction::Outbound));
            assert!(sink.flush());
        }
        assert!(sink.lost > 0 && sink.piece.capacity() <= PIECE, "{} {}", sink.lost, sink.piece.capacity());
        let (mut packets, mut told) = (0, 0);
        loop {
            match next(&mut source) {
                Poll::Ready(Some(part)) => {
                    let blocks = read(&part.pcapng);
                    packets += blocks.iter().filter(|b| matches!(b, Block::Packet { .. })).count() as u64;
                    if let Some(Block::Statistics { received, dropped }) = blocks.last() {
                        assert_eq!((*received, *dropped), (part.frames + part.lost, part.lost));
                        told = *dropped;
                    }
                }
                Poll::Ready(None) => panic!("it is not over"),
                // What there was no room for goes as soon as there is.
                Poll::Pending if packets + sink.lost < 10_000 => assert!(sink.flush()),
                Poll::Pending => break,
            }
        }
        assert_eq!((packets + told, sink.lost), (10_000, told));
        drop(source);
        with_frame(&mut bytes, |f| sink.add(f, Direction::Outbound));
        assert!(!sink.flush());
    }
}
