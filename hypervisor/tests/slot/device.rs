//! The device's side: a vhost-user device that finishes every request without doing anything, and that misbehaves when told to.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::driver::VERSION_1;

/// Requests by number.
pub(crate) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
}
use request::{
    ADD_MEM_REG, GET_CONFIG, GET_FEATURES, GET_INFLIGHT_FD, GET_MAX_MEM_SLOTS, GET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM, GET_VRING_BASE, RESET_DEVICE, SET_BACKEND_REQ_FD, SET_CONFIG, SET_INFLIGHT_FD,
    SET_MEM_TABLE, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_ERR,
    SET_VRING_KICK, SET_VRING_NUM,
};

const PROTOCOL_FEATURES: u64 = 1 << 30;
pub(crate) const MQ: u64 = 1;
pub(crate) const REPLY_ACK: u64 = 1 << 3;
pub(crate) const BACKEND_REQ: u64 = 1 << 5;
pub(crate) const CONFIG: u64 = 1 << 9;
pub(crate) const INFLIGHT: u64 = 1 << 12;
pub(crate) const RESET: u64 = 1 << 13;
pub(crate) const MEM_SLOTS: u64 = 1 << 15;

/// What the device does instead of answering a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    /// Nothing, for ever.
    Hang,
    /// Closes the connection.
    Close,
    /// Answers that it will not.
    Refuse,
    /// Sends these bytes.
    Say(Vec<u8>),
}

/// What the device is and does. Can be changed while it runs.
#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub(crate) features: u64,
    pub(crate) protocol: u64,
    pub(crate) queues: u64,
    pub(crate) config: Vec<u8>,
    /// At which request to do what.
    pub(crate) fault: Option<(u32, Fault)>,
    /// Keeps its answers to itself until it has received this request.
    pub(crate) mute_until: Option<u32>,
    /// Takes requests but finishes none.
    pub(crate) hold: bool,
    /// Bytes of the configuration that a driver can write.
    pub(crate) writable: std::ops::Range<usize>,
    /// What those bytes are after a reset.
    pub(crate) initial_config: Vec<u8>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            features: VERSION_1,
            protocol: MQ | REPLY_ACK | BACKEND_REQ | CONFIG | INFLIGHT | RESET | MEM_SLOTS,
            queues: 2,
            config: (0..60).collect(),
            fault: None,
            mute_until: None,
            hold: false,
            writable: 0..0,
            initial_config: (0..60).collect(),
        }
    }
}

#[derive(Default)]
struct Shared {
    script: Mutex<Script>,
    log: Mutex<Vec<(u32, Vec<u8>)>>,
    connection: Mutex<Option<UnixStream>>,
    backend: Mutex<Option<UnixStream>>,
    errors: Mutex<Vec<File>>,
    dead: AtomicBool,
}

/// A device that runs until it is killed or dropped.
pub(crate) struct Device {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Device {
    pub(crate) fn start(path: &Path, script: Script) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let shared = Arc::new(Shared { script: Mutex::new(script), ..Default::default() });
        let of_thread = Arc::clone(&shared);
        let thread = thread::spawn(move || serve(&listener, &of_thread));
        Self { path: path.to_owned(), shared, thread: Some(thread) }
    }

    pub(crate) fn script(&self) -> MutexGuard<'_, Script> {
        self.shared.script.lock().unwrap()
    }

    /// Payloads of all messages with this number.
    pub(crate) fn seen(&self, request: u32) -> Vec<Vec<u8>> {
        let log = self.shared.log.lock().unwrap();
        log.iter().filter(|(r, _)| *r == request).map(|(_, payload)| payload.clone()).collect()
    }

    /// The numbers of all messages, in order.
    pub(crate) fn order(&self) -> Vec<u32> {
        self.shared.log.lock().unwrap().iter().map(|(request, _)| *request).collect()
    }

    /// Changes the configuration and tells the front-end, which must acknowledge.
    pub(crate) fn change_config(&self, config: Vec<u8>) {
        self.script().config = config;
        self.say(&[2, 1 | 8, 0]);
        let mut reply = [0; 20];
        let mut backend = self.shared.backend.lock().unwrap();
        backend.as_mut().unwrap().read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], [2, 0, 0, 0]);
        assert_eq!(reply[12..], [0; 8]);
    }

    /// Sends 32-bit words on the device's own channel.
    pub(crate) fn say(&self, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let _ = self.shared.backend.lock().unwrap().as_mut().expect("a channel").write_all(&bytes);
    }

    /// Sends bytes that nobody asked for.
    pub(crate) fn babble(&self) {
        self.shared.connection.lock().unwrap().as_mut().unwrap().write_all(&[0; 5]).unwrap();
    }

    /// Says that a ring is broken.
    pub(crate) fn report_broken_ring(&self) {
        self.shared.errors.lock().unwrap()[0].write_all(&1u64.to_ne_bytes()).unwrap();
    }

    /// Closes the connection, but goes on to take new ones.
    pub(crate) fn disconnect(&self) {
        if let Some(connection) = &*self.shared.connection.lock().unwrap() {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    fn end(&mut self) {
        self.shared.dead.store(true, Ordering::SeqCst);
        self.disconnect();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.end();
    }
}

fn serve(listener: &UnixListener, shared: &Arc<Shared>) {
    while !shared.dead.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                *shared.connection.lock().unwrap() = Some(stream.try_clone().unwrap());
                if shared.dead.load(Ordering::SeqCst) {
                    break;
                }
                let mut connection = Connection::new(stream, Arc::clone(shared));
                while connection.handle().is_ok() {}
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
    *shared.connection.lock().unwrap() = None;
    *shared.backend.lock().unwrap() = None;
}

#[derive(Clone)]
struct Ring {
    size: u16,
    available: u64,
    used: u64,
    base: u16,
    call: Option<Arc<File>>,
}

struct Worker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u16>,
}

struct Connection {
    stream: UnixStream,
    shared: Arc<Shared>,
    // User address, guest-physical address, length.
    regions: Vec<(u64, u64, u64)>,
    mappings: Vec<GuestRegionMmap>,
    memory: Option<Arc<GuestMemoryMmap>>,
    rings: Vec<Ring>,
    workers: Vec<Option<Worker>>,
    inflight: Option<Arc<File>>,
    // Answers not yet given.
    kept: Vec<u8>,
    spoken: bool,
}

fn word(payload: &[u8], index: usize) -> u32 {
    u32::from_ne_bytes(payload[index * 4..index * 4 + 4].try_into().unwrap())
}

fn long(payload: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(payload[offset..offset + 8].try_into().unwrap())
}

impl Connection {
    fn new(stream: UnixStream, shared: Arc<Shared>) -> Self {
        let queues = shared.script.lock().unwrap().queues as usize;
        let ring = Ring { size: 0, available: 0, used: 0, base: 0, call: None };
        Self {
            stream,
            shared,
            regions: Vec::new(),
            mappings: Vec::new(),
            memory: None,
            rings: vec![ring; queues],
            workers: (0..queues).map(|_| None).collect(),
            inflight: None,
            kept: Vec::new(),
            spoken: false,
        }
    }

    /// Takes one message and answers it.
    fn handle(&mut self) -> io::Result<()> {
        let mut header = [0; 12];
        let mut fds = [-1; 8];
        let mut parts = [libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() }];
        // SAFETY: the iovec describes `header`, which outlives the call.
        let (n, count) = unsafe { self.stream.recv_with_fds(&mut parts, &mut fds) }?;
        let files: Vec<File> = fds[..count]
            .iter()
            // SAFETY: the kernel has just made the descriptor for us.
            .map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }.into())
            .collect();
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.stream.read_exact(&mut header[n..])?;
        let (request, flags, size) = (word(&header, 0), word(&header, 1), word(&header, 2));
        let mut payload = vec![0; size as usize];
        self.stream.read_exact(&mut payload)?;
        self.shared.log.lock().unwrap().push((request, payload.clone()));
        let fault = self.shared.script.lock().unwrap().fault.clone();
        match fault {
            Some((at, Fault::Hang)) if at == request => {
                // Until the front-end or the test closes the connection.
                while self.stream.read(&mut header)? > 0 {}
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Some((at, Fault::Close)) if at == request => return Err(io::ErrorKind::Other.into()),
            Some((at, Fault::Refuse)) if at == request => {
                return self.reply(request, &1u64.to_ne_bytes(), None);
            }
            Some((at, Fault::Say(bytes))) if at == request => return self.stream.write_all(&bytes),
            _ => {}
        }
        let script = self.shared.script.lock().unwrap().clone();
        self.spoken |= script.mute_until.is_none_or(|last| last == request);
        match request {
            GET_FEATURES => {
                let bits = script.features | PROTOCOL_FEATURES;
                self.reply(request, &bits.to_ne_bytes(), None)
            }
            GET_PROTOCOL_FEATURES => self.reply(request, &script.protocol.to_ne_bytes(), None),
            GET_QUEUE_NUM => self.reply(request, &script.queues.to_ne_bytes(), None),
            GET_MAX_MEM_SLOTS => self.reply(request, &8u64.to_ne_bytes(), None),
            GET_CONFIG => {
                let length = word(&payload, 1) as usize;
                payload[12..].copy_from_slice(&script.config[..length]);
                self.reply(request, &payload, None)
            }
            GET_VRING_BASE => {
                let index = word(&payload, 0) as usize;
                let base = self.stop(index);
                let reply = [(index as u32).to_ne_bytes(), u32::from(base).to_ne_bytes()].concat();
                self.reply(request, &reply, None)
            }
            GET_INFLIGHT_FD => {
                let file = tempfile::tempfile()?;
                file.set_len(4096)?;
                payload[..8].copy_from_slice(&4096u64.to_ne_bytes());
                self.reply(request, &payload, Some(&file))
            }
            _ => {
                self.set(request, &payload, files);
                if flags & 8 != 0 { self.reply(request, &[0; 8], None) } else { Ok(()) }
            }
        }
    }

    fn set(&mut self, request: u32, payload: &[u8], mut files: Vec<File>) {
        let index = if payload.len() >= 8 { word(payload, 0) as usize } else { 0 };
        match request {
            ADD_MEM_REG => self.map(&payload[8..], files.remove(0)),
            SET_MEM_TABLE => {
                for (i, file) in files.into_iter().enumerate() {
                    self.map(&payload[8 + i * 32..], file);
                }
            }
            SET_VRING_NUM => self.rings[index].size = word(payload, 1) as u16,
            SET_VRING_BASE => self.rings[index].base = word(payload, 1) as u16,
            SET_VRING_ADDR => {
                self.rings[index].used = self.guest(long(payload, 16));
                self.rings[index].available = self.guest(long(payload, 24));
            }
            SET_VRING_CALL => self.rings[index].call = Some(Arc::new(files.remove(0))),
            SET_VRING_ERR => self.shared.errors.lock().unwrap().insert(0, files.remove(0)),
            SET_VRING_KICK => self.start(index, files.remove(0)),
            SET_VRING_ENABLE => assert_eq!(word(payload, 1), 1),
            SET_INFLIGHT_FD => self.inflight = Some(Arc::new(files.remove(0))),
            SET_BACKEND_REQ_FD => {
                *self.shared.backend.lock().unwrap() = Some(OwnedFd::from(files.remove(0)).into());
            }
            SET_CONFIG => {
                let mut script = self.shared.script.lock().unwrap();
                let offset = word(payload, 0) as usize;
                for (i, byte) in payload[12..].iter().enumerate() {
                    if script.writable.contains(&(offset + i)) {
                        script.config[offset + i] = *byte;
                    }
                }
            }
            RESET_DEVICE => {
                assert!(self.workers.iter().all(Option::is_none), "reset while rings run");
                let mut script = self.shared.script.lock().unwrap();
                let initial = script.initial_config.clone();
                for i in script.writable.clone() {
                    script.config[i] = initial[i];
                }
            }
            _ => {}
        }
    }

    fn reply(&mut self, request: u32, payload: &[u8], file: Option<&File>) -> io::Result<()> {
        let mut bytes: Vec<u8> =
            [request, 1 | 4, payload.len() as u32].iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.extend_from_slice(payload);
        let fds: Vec<_> = file.iter().map(|f| f.as_raw_fd()).collect();
        if !self.spoken {
            assert!(fds.is_empty());
            self.kept.extend_from_slice(&bytes);
            return Ok(());
        }
        self.stream.write_all(&std::mem::take(&mut self.kept))?;
        self.stream.send_with_fds(&[&bytes[..]], &fds)?;
        Ok(())
    }

    fn map(&mut self, region: &[u8], file: File) {
        let (gpa, size, user, offset) =
            (long(region, 0), long(region, 8), long(region, 16), long(region, 24));
        self.regions.push((user, gpa, size));
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let mapping =
            MmapRegion::build(Some(FileOffset::new(file, offset)), size as usize, prot, flags).unwrap();
        self.mappings.push(GuestRegionMmap::new(mapping, GuestAddress(gpa)).unwrap());
    }

    fn guest(&self, user: u64) -> u64 {
        let (start, gpa, _) =
            self.regions.iter().find(|(start, _, size)| user >= *start && user - start < *size).unwrap();
        user - start + gpa
    }

    fn start(&mut self, index: usize, kick: File) {
        if !self.mappings.is_empty() {
            let memory = GuestMemoryMmap::from_regions(std::mem::take(&mut self.mappings)).unwrap();
            self.memory = Some(Arc::new(memory));
        }
        assert!(self.workers[index].is_none(), "started twice");
        let stop = Arc::new(AtomicBool::new(false));
        let mut data = Data {
            ring: self.rings[index].clone(),
            kick,
            memory: Arc::clone(self.memory.as_ref().unwrap()),
            shared: Arc::clone(&self.shared),
            inflight: self.inflight.clone().map(|f| (f, index as u64 * 64)),
            taken: BTreeSet::new(),
        };
        let of_thread = Arc::clone(&stop);
        let thread = thread::spawn(move || data.run(&of_thread));
        self.workers[index] = Some(Worker { stop, thread });
    }

    fn stop(&mut self, index: usize) -> u16 {
        let Some(worker) = self.workers[index].take() else { return self.rings[index].base };
        worker.stop.store(true, Ordering::SeqCst);
        worker.thread.join().unwrap()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        for index in 0..self.workers.len() {
            self.stop(index);
        }
    }
}

/// The data path of one ring.
struct Data {
    ring: Ring,
    kick: File,
    memory: Arc<GuestMemoryMmap>,
    shared: Arc<Shared>,
    // A byte per head: 1 while in flight.
    inflight: Option<(Arc<File>, u64)>,
    taken: BTreeSet<u16>,
}

impl Data {
    fn load(&self, address: u64) -> u16 {
        self.memory.load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    fn note(&self, head: u16, in_flight: bool) {
        use std::os::unix::fs::FileExt;
        if let Some((file, offset)) = &self.inflight {
            file.write_all_at(&[u8::from(in_flight)], offset + u64::from(head)).unwrap();
        }
    }

    fn run(&mut self, stop: &AtomicBool) -> u16 {
        use std::os::unix::fs::FileExt;
        let mut next = self.ring.base;
        if let Some((file, offset)) = &self.inflight {
            let mut flags = [0; 64];
            file.read_exact_at(&mut flags, *offset).unwrap();
            self.taken = (0..64).filter(|&h| flags[usize::from(h)] != 0).collect();
            next = self.load(self.ring.used + 2).wrapping_add(self.taken.len() as u16);
        }
        let mut kicked = !self.taken.is_empty();
        while !stop.load(Ordering::SeqCst) {
            // The front-end's eventfds do not block.
            kicked |= self.kick.read(&mut [0; 8]).is_ok();
            let hold = self.shared.script.lock().unwrap().hold;
            if kicked {
                let available = self.load(self.ring.available + 2);
                while next != available {
                    let slot = u64::from(next % self.ring.size);
                    let head = self.load(self.ring.available + 4 + slot * 2);
                    self.note(head, true);
                    self.taken.insert(head);
                    next = next.wrapping_add(1);
                }
                kicked = false;
            }
            if !hold && !self.taken.is_empty() {
                for head in std::mem::take(&mut self.taken) {
                    self.finish(head);
                    self.note(head, false);
                }
                let _ = self.ring.call.as_deref().unwrap().write_all(&1u64.to_ne_bytes());
            }
            thread::sleep(Duration::from_micros(200));
        }
        next
    }

    fn finish(&self, head: u16) {
        let used = self.load(self.ring.used + 2);
        let at = self.ring.used + 4 + u64::from(used % self.ring.size) * 8;
        self.memory.write_obj(u64::from(head), GuestAddress(at)).unwrap();
        let index = GuestAddress(self.ring.used + 2);
        self.memory.store(used.wrapping_add(1), index, Ordering::Release).unwrap();
    }
}
