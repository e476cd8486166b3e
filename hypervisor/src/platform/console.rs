//! The serial console: what the guest writes goes to a ring buffer that any number of subscribers read at their own pace,
//! what they type waits in a bounded queue.
//!
//! A subscriber is a position in the stream of all output, so it costs nothing and a slow one slows nobody: the ring moves on
//! and the subscriber is told how much it missed.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use super::serial::SerialPort;

/// Bytes of output that are kept.
pub const RING_SIZE: usize = 64 << 10;

/// Bytes of input that wait for the guest.
pub const INPUT_SIZE: usize = 4 << 10;

/// Most bytes in one [`Chunk`].
const CHUNK_SIZE: usize = 16 << 10;

/// A piece of output.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chunk {
    /// What the guest wrote.
    pub data: Vec<u8>,
    /// Bytes just before `data` that the ring had lost before they were read.
    pub dropped: u64,
}

/// Console numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Bytes the guest wrote.
    pub written: u64,
    /// Bytes a subscriber missed, and bytes that left the ring while there was none and nobody had read them.
    pub dropped: u64,
}

#[derive(Debug, Default)]
struct Output {
    // Allocated with the first byte.
    ring: Box<[u8]>,
    // Bytes written in all; the ring holds the last RING_SIZE of them.
    end: u64,
    // Bytes read by the foremost subscriber.
    read: u64,
    dropped: u64,
    subscribers: usize,
    // Threads in `wait`.
    waiting: usize,
    closed: bool,
}

impl Output {
    fn start(&self) -> u64 {
        self.end.saturating_sub(RING_SIZE as u64)
    }
}

/// The console of one VM. It lives through guest resets.
#[derive(Debug, Default)]
pub struct Console {
    output: Mutex<Output>,
    written: Condvar,
    written_async: Notify,
    input: Mutex<VecDeque<u8>>,
    input_taken: Notify,
    port: Mutex<Weak<SerialPort>>,
    on_first_byte: Option<Box<FirstByte>>,
}

/// Called once, with the guest's first byte, on a vCPU thread.
struct FirstByte(Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for FirstByte {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FirstByte")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Console {
    /// An empty console. `on_first_byte` is called once, when the guest writes for the first time; it must not block.
    pub fn new(on_first_byte: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        let on_first_byte = Some(Box::new(FirstByte(Box::new(on_first_byte))));
        Arc::new(Self { on_first_byte, ..Self::default() })
    }

    /// The guest writes. Never blocks on a subscriber.
    pub fn write(&self, bytes: &[u8]) {
        let mut output = lock(&self.output);
        if output.ring.is_empty() {
            output.ring = vec![0; RING_SIZE].into_boxed_slice();
            if let Some(first) = &self.on_first_byte {
                first.0();
            }
        }
        let start_before = output.start();
        for &byte in bytes {
            let at = (output.end % RING_SIZE as u64) as usize;
            output.ring[at] = byte;
            output.end += 1;
        }
        if output.subscribers == 0 {
            // What went out of the ring unread.
            output.dropped += output.start().saturating_sub(start_before.max(output.read));
        }
        let wake = output.waiting > 0;
        drop(output);
        if wake {
            self.written.notify_all();
        }
        self.written_async.notify_waiters();
    }

    /// No more output will come: subscribers read what there is and then end.
    pub fn close(&self) {
        lock(&self.output).closed = true;
        self.written.notify_all();
        self.written_async.notify_waiters();
    }

    /// A new subscriber, which begins with what the ring holds or, without `history`, with what comes next.
    pub fn subscribe(self: &Arc<Self>, history: bool) -> Subscriber {
        let mut output = lock(&self.output);
        output.subscribers += 1;
        let position = if history { output.start() } else { output.end };
        Subscriber { console: Arc::clone(self), position }
    }

    /// Numbers since the console was made.
    pub fn counters(&self) -> Counters {
        let output = lock(&self.output);
        Counters { written: output.end, dropped: output.dropped }
    }

    /// Connects the serial port of a new life of the guest. What was typed ahead waits for it.
    pub(super) fn attach(&self, port: &Arc<SerialPort>) {
        *lock(&self.port) = Arc::downgrade(port);
        port.take_input();
    }

    /// Somebody types. Takes as many bytes as there is room for, and says how many.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut input = lock(&self.input);
        let taken = bytes.len().min(INPUT_SIZE - input.len().min(INPUT_SIZE));
        input.extend(&bytes[..taken]);
        drop(input);
        let port = lock(&self.port).upgrade();
        if let Some(port) = port {
            port.take_input();
        }
        taken
    }

    /// Types all of `bytes`, waiting for room as long as it takes.
    pub async fn type_in_all(&self, mut bytes: &[u8]) {
        loop {
            let room = self.input_taken.notified();
            bytes = &bytes[self.type_in(bytes)..];
            if bytes.is_empty() {
                return;
            }
            room.await;
        }
    }

    /// The serial port takes up to `max` bytes that were typed.
    pub(super) fn take_input(&self, max: usize) -> Vec<u8> {
        let mut input = lock(&self.input);
        let taken = max.min(input.len());
        let bytes: Vec<u8> = input.drain(..taken).collect();
        drop(input);
        if !bytes.is_empty() {
            self.input_taken.notify_waiters();
        }
        bytes
    }
}

/// One reader of a console's output.
#[derive(Debug)]
pub struct Subscriber {
    console: Arc<Console>,
    position: u64,
}

impl Subscriber {
    /// Waits until there is output; `false` when no more will come.
    pub async fn ready(&self) -> bool {
        loop {
            let written = self.console.written_async.notified();
            {
                let output = lock(&self.console.output);
                if output.end > self.position {
                    return true;
                }
                if output.closed {
                    return false;
                }
            }
            written.await;
        }
    }

    /// The next piece of output; waits for it. `None` when no more will come.
    pub async fn next(&mut self) -> Option<Chunk> {
        loop {
            let console = Arc::clone(&self.console);
            let written = console.written_async.notified();
            let taken = self.take(&mut lock(&console.output));
            match taken {
                Taken::Chunk(chunk) => return Some(chunk),
                Taken::End => return None,
                Taken::Nothing => written.await,
            }
        }
    }

    /// As [`Subscriber::next`], for a thread: `Some` of an empty chunk if nothing comes within `timeout`.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Option<Chunk> {
        let console = Arc::clone(&self.console);
        let mut output = lock(&console.output);
        loop {
            match self.take(&mut output) {
                Taken::Chunk(chunk) => return Some(chunk),
                Taken::End => return None,
                Taken::Nothing => {}
            }
            output.waiting += 1;
            let timed_out;
            (output, timed_out) = match timeout {
                Some(timeout) => {
                    let (output, result) =
                        console.written.wait_timeout(output, timeout).unwrap_or_else(PoisonError::into_inner);
                    (output, result.timed_out())
                }
                None => (console.written.wait(output).unwrap_or_else(PoisonError::into_inner), false),
            };
            output.waiting -= 1;
            if timed_out {
                return Some(Chunk::default());
            }
        }
    }

    fn take(&mut self, output: &mut Output) -> Taken {
        let dropped = output.start().saturating_sub(self.position);
        self.position += dropped;
        output.dropped += dropped;
        let length = (output.end - self.position).min(CHUNK_SIZE as u64) as usize;
        if length == 0 {
            return if output.closed { Taken::End } else { Taken::Nothing };
        }
        let at = (self.position % RING_SIZE as u64) as usize;
        let first = length.min(RING_SIZE - at);
        let mut data = output.ring[at..at + first].to_vec();
        data.extend_from_slice(&output.ring[..length - first]);
        self.position += length as u64;
        output.read = output.read.max(self.position);
        Taken::Chunk(Chunk { data, dropped })
    }
}

enum Taken {
    Chunk(Chunk),
    Nothing,
    End,
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        lock(&self.console.output).subscribers -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console() -> Arc<Console> {
        Console::new(|| {})
    }

    fn read(s: &mut Subscriber) -> Chunk {
        s.wait(Some(Duration::ZERO)).unwrap()
    }

    #[test]
    fn subscribers_read_independently_and_from_where_they_like() {
        let console = console();
        console.write(b"one ");
        let (mut all, mut new) = (console.subscribe(true), console.subscribe(false));
        console.write(b"two");
        assert_eq!(read(&mut all).data, b"one two");
        assert_eq!(read(&mut new).data, b"two");
        assert_eq!(read(&mut new), Chunk::default());
        console.close();
        assert_eq!(new.wait(None), None);
    }

    #[test]
    fn a_slow_subscriber_is_told_what_it_missed() {
        let console = console();
        let mut slow = console.subscribe(true);
        console.write(b"lost");
        console.write(&[b'x'; RING_SIZE]);
        let chunk = read(&mut slow);
        assert_eq!((chunk.dropped, chunk.data.len()), (4, CHUNK_SIZE));
        assert!(chunk.data.iter().all(|&b| b == b'x'));
        let rest = std::iter::from_fn(|| Some(read(&mut slow)).filter(|c| !c.data.is_empty()));
        assert_eq!(rest.map(|c| c.data.len()).sum::<usize>(), RING_SIZE - CHUNK_SIZE);
        assert_eq!(console.counters(), Counters { written: RING_SIZE as u64 + 4, dropped: 4 });
    }

    #[test]
    fn what_nobody_reads_is_counted_as_dropped_once() {
        let console = console();
        console.write(b"read");
        drop(console.subscribe(true).wait(None));
        console.write(&[0; RING_SIZE + 10]);
        assert_eq!(console.counters().dropped, 10);
    }

    #[test]
    fn input_is_bounded() {
        let console = console();
        assert_eq!(console.type_in(&[1; INPUT_SIZE - 1]), INPUT_SIZE - 1);
        assert_eq!(console.type_in(b"ab"), 1);
        assert_eq!(console.type_in(b"b"), 0);
        assert_eq!(console.take_input(2), [1, 1]);
        assert_eq!(console.type_in(b"cd"), 2);
    }

    #[test]
    fn the_first_byte_is_told_once() {
        let (tx, rx) = std::sync::mpsc::channel();
        let console = Console::new(move || tx.send(()).unwrap());
        assert!(rx.try_recv().is_err());
        console.write(b"a");
        console.write(b"b");
        assert_eq!(rx.try_iter().count(), 1);
    }

    #[test]
    fn a_waiting_thread_is_woken() {
        let console = console();
        let mut subscriber = console.subscribe(true);
        let reader = std::thread::spawn(move || subscriber.wait(None));
        std::thread::sleep(Duration::from_millis(20));
        console.write(b"x");
        assert_eq!(reader.join().unwrap().unwrap().data, b"x");
    }
}
