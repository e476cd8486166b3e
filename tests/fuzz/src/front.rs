//! A vhost-user front-end that says anything: messages with wrong sizes, wrong file descriptors and in any order.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::guest::{Guest, MEMORY, RING};
use crate::input::Input;
use crate::memfd::memfd;

/// Where the front-end says that it has the guest's address 0.
const USER: u64 = 0x7000_0000;
/// Most descriptors with one message; the protocol has 8 at most.
const MAX_FDS: usize = 10;

/// Requests of the protocol (vhost-user, "Front-end message types"): those that take a device into use first.
const REQUESTS: [u32; 44] = [
    3, 1, 2, 15, 16, 5, 8, 9, 10, 13, 14, 12, 18, 11, 31, 32, 24, 25, 21, 34, 36, 37, 38, 17, 4, 6, 7, 19,
    20, 22, 23, 26, 27, 28, 29, 30, 33, 35, 39, 40, 41, 42, 43, 44,
];

/// Files to pass.
pub struct Files {
    guest: File,
    sealed: File,
    inflight: File,
    short: File,
    event: OwnedFd,
    blocking: OwnedFd,
    null: File,
    directory: File,
    socket: UnixStream,
    _peer: UnixStream,
    pipe: OwnedFd,
    _pipe: OwnedFd,
}

impl Files {
    /// The guest's memory, and others.
    pub fn new(guest: &Guest) -> Self {
        let (socket, peer) = UnixStream::pair().expect("socket pair");
        let (pipe, other) = nix::unistd::pipe().expect("pipe");
        let event = |flags| OwnedFd::from(EventFd::from_value_and_flags(0, flags).expect("eventfd"));
        // A count that is full makes the next writer wait, unless he took care not to.
        let blocking = EventFd::from_value_and_flags(0, EfdFlags::empty()).expect("eventfd");
        blocking.write(u64::MAX - 1).expect("eventfd");
        Self {
            guest: guest.file().try_clone().expect("memfd"),
            sealed: memfd(MEMORY, true),
            inflight: memfd(0x2000, false),
            short: memfd(0x10, false),
            event: event(EfdFlags::EFD_NONBLOCK),
            blocking: blocking.into(),
            null: File::open("/dev/null").expect("/dev/null"),
            directory: File::open("/").expect("/"),
            socket,
            _peer: peer,
            pipe,
            _pipe: other,
        }
    }

    fn pick(&self, input: &mut Input<'_>, likely: Kind) -> RawFd {
        let kind = if input.rarely(8) { Kind::Any } else { likely };
        match (kind, input.u8() % 16) {
            (Kind::Event, 0..=13) => self.event.as_raw_fd(),
            (Kind::Memory, 0..=11) => self.guest.as_raw_fd(),
            (Kind::Memory, 12..=14) => self.sealed.as_raw_fd(),
            (Kind::Inflight, 0..=12) => self.inflight.as_raw_fd(),
            (Kind::Socket, 0..=12) => self.socket.as_raw_fd(),
            (_, n) => [
                self.event.as_raw_fd(),
                self.blocking.as_raw_fd(),
                self.guest.as_raw_fd(),
                self.sealed.as_raw_fd(),
                self.inflight.as_raw_fd(),
                self.short.as_raw_fd(),
                self.null.as_raw_fd(),
                self.directory.as_raw_fd(),
                self.socket.as_raw_fd(),
                self.pipe.as_raw_fd(),
            ][usize::from(n) % 10],
        }
    }

    /// The front-end makes a file shorter, or longer again.
    pub fn cut(&self, input: &mut Input<'_>) {
        let file = if input.rarely(3) { &self.inflight } else { &self.guest };
        let _ = file.set_len(if input.rarely(2) { MEMORY } else { input.u16().into() });
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Event,
    Memory,
    Inflight,
    Socket,
    Any,
}

/// A message.
#[derive(Debug, Default)]
pub struct Message {
    /// Header and payload, or something like it.
    pub bytes: Vec<u8>,
    /// What goes with it.
    pub fds: Vec<RawFd>,
}

impl Message {
    /// The next one in `input`.
    pub fn read(input: &mut Input<'_>, files: &Files) -> Self {
        let request = match input.u8() {
            255 => input.u32(),
            // Those that come first are likelier.
            n if n < 200 => REQUESTS[usize::from(n) % 23],
            n => REQUESTS[usize::from(n) % REQUESTS.len()],
        };
        let flags = if input.rarely(16) { input.u32() } else { 1 | u32::from(input.u8() & 1) << 3 };
        let mut fds = Vec::new();
        let mut payload = payload(request, input, files, &mut fds);
        match input.u8() {
            // Descriptors that do not belong there, or too few.
            0..=11 => {
                for _ in 0..usize::from(input.u8()) % MAX_FDS {
                    fds.push(files.pick(input, Kind::Any));
                }
            }
            12..=19 => fds.clear(),
            // Bytes that do not belong there.
            20..=31 => {
                let n = input.u8().into();
                payload.extend_from_slice(input.bytes(n));
            }
            32..=39 => payload.truncate(usize::from(input.u8()) % 16),
            _ => {}
        }
        fds.truncate(MAX_FDS);
        let mut size = payload.len() as u32;
        if input.rarely(24) {
            size = if input.rarely(2) { input.u32() } else { size.wrapping_add(input.u8().into()) };
        }
        let mut bytes = Vec::with_capacity(12 + payload.len());
        for word in [request, flags, size] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(payload);
        Self { bytes, fds }
    }

    /// Sends it, in one piece or in two; false: the device has hung up, or takes nothing more.
    pub fn send(&self, stream: &UnixStream, pieces: bool) -> bool {
        let cut = if pieces { self.bytes.len() / 2 } else { self.bytes.len() };
        let (first, second) = self.bytes.split_at(cut);
        let mut control = Vec::new();
        if !self.fds.is_empty() {
            control.push(ControlMessage::ScmRights(&self.fds));
        }
        send(stream, first, &control) && (second.is_empty() || send(stream, second, &[]))
    }
}

fn send(stream: &UnixStream, bytes: &[u8], control: &[ControlMessage<'_>]) -> bool {
    let flags = MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None) {
            Ok(n) => return n == bytes.len(),
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

fn payload(request: u32, input: &mut Input<'_>, files: &Files, fds: &mut Vec<RawFd>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut put = |value: &[u8]| bytes.extend_from_slice(value);
    let index = |input: &mut Input<'_>| u32::from(if input.rarely(16) { input.u8() } else { input.u8() & 1 });
    match request {
        2 => {
            let features = 1u64 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 9;
            let wrong = if input.rarely(8) { 1 << (input.u8() % 64) } else { 0 };
            put(&(features ^ wrong).to_ne_bytes());
        }
        16 => {
            // REPLY_ACK, MQ, CONFIG, CONFIGURE_MEM_SLOTS, INFLIGHT_SHMFD, BACKEND_REQ, RESET_DEVICE.
            let features = 1u64 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;
            put(&(if input.rarely(6) { input.u64() } else { features }).to_ne_bytes());
        }
        5 => {
            let count = if input.rarely(8) { input.u8() } else { 1 + input.u8() % 2 };
            put(&u32::from(count).to_ne_bytes());
            put(&0u32.to_ne_bytes());
            for n in 0..count.min(12) {
                put(&region(input, u64::from(n) * MEMORY));
                fds.push(files.pick(input, Kind::Memory));
            }
        }
        37 | 38 => {
            put(&0u64.to_ne_bytes());
            let at = MEMORY * u64::from(input.u8() % 4);
            put(&region(input, at));
            if request == 37 {
                fds.push(files.pick(input, Kind::Memory));
            }
        }
        8 | 10 | 11 | 18 => {
            put(&index(input).to_ne_bytes());
            let value = match request {
                8 if !input.rarely(6) => 8,
                18 if !input.rarely(4) => 1,
                _ if input.rarely(8) => input.u32(),
                _ => u32::from(input.u8()) % 4,
            };
            put(&value.to_ne_bytes());
        }
        9 => {
            put(&index(input).to_ne_bytes());
            put(&0u32.to_ne_bytes());
            for at in [RING.descriptors, RING.used, RING.avail, 0] {
                let at = if input.rarely(12) { input.u64() } else { USER + at };
                put(&at.to_ne_bytes());
            }
        }
        12..=14 => {
            let none = input.rarely(16);
            put(&(u64::from(index(input)) | u64::from(none) << 8).to_ne_bytes());
            if !none {
                fds.push(files.pick(input, Kind::Event));
            }
        }
        21 => fds.push(files.pick(input, Kind::Socket)),
        24 | 25 => {
            let size = if input.rarely(6) { input.u32() } else { 60 };
            let offset = if input.rarely(4) { input.u16().into() } else { 0 };
            for word in [offset, size, u32::from(request == 25)] {
                put(&word.to_ne_bytes());
            }
            put(&vec![input.u8(); size.min(512) as usize]);
        }
        31 | 32 => {
            let odd = input.rarely(6);
            let size = if odd { input.u64() } else { 0x1000 };
            let offset = if odd { input.u16().into() } else { 0 };
            put(&size.to_ne_bytes());
            put(&u64::to_ne_bytes(offset));
            put(&(if odd { input.u16() } else { 2 }).to_ne_bytes());
            put(&(if odd { input.u16() } else { 8 }).to_ne_bytes());
            put(&[0; 4]);
            if request == 32 {
                fds.push(files.pick(input, Kind::Inflight));
            }
        }
        1 | 3 | 4 | 15 | 17 | 34 | 36 => {}
        _ => {
            let n = input.u8().into();
            put(input.bytes(n));
        }
    }
    bytes
}

/// Guest address, length, the front-end's address, offset in the file.
fn region(input: &mut Input<'_>, at: u64) -> [u8; 32] {
    let mut words = [at, MEMORY, USER + at, 0];
    if input.rarely(6) {
        words[usize::from(input.u8()) % 4] = if input.rarely(2) { input.u64() } else { input.u16().into() };
    }
    let mut bytes = [0; 32];
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}
