//! A device's socket, from the outside: well-behaved front-ends, hostile ones, slow engines.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use offload_card::event::Event;
use offload_card::ring::FEATURES;
use offload_card::server::DeviceServer;
use offload_card::testing::{Buffer, DriverQueue, Front, TestGuest, USER_BASE};
use offload_card::{Busy, Chain, ConfigNotifier, Device, Identity, Ring, RingState};
use proptest::prelude::*;
use proto::error::{Error, ErrorReason};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const PATIENCE: Duration = Duration::from_secs(10);
const CONFIG_BYTES: u32 = 8;
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// A device that returns every chain as it is, in the thread that stops or nudges it; and not at all while it is held.
struct Echo {
    identity: Identity,
    rings: Mutex<Vec<Option<Ring>>>,
    config: Mutex<[u8; CONFIG_BYTES as usize]>,
    held: Mutex<bool>,
    /// The host has nothing to start a queue with.
    refuses: Mutex<bool>,
    released: Condvar,
    log: Mutex<Vec<String>>,
}

impl Echo {
    fn new() -> Arc<Self> {
        let identity = Identity {
            virtio_id: 42,
            features: 1 << 5,
            queues: 2,
            max_queue_size: 64,
            config_size: CONFIG_BYTES,
        };
        Arc::new(Self {
            identity,
            rings: Mutex::new(vec![None, None]),
            config: Mutex::new(*b"confspac"),
            held: Mutex::new(false),
            refuses: Mutex::new(false),
            released: Condvar::new(),
            log: Mutex::default(),
        })
    }

    fn log(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }

    fn logged(&self, what: &str) -> bool {
        self.log.lock().unwrap().iter().any(|l| l == what)
    }

    fn hold(&self, held: bool) {
        *self.held.lock().unwrap() = held;
        self.released.notify_all();
    }

    /// Serves what waits in queue `index`.
    fn nudge(&self, index: usize) -> usize {
        self.rings.lock().unwrap()[index].as_mut().map_or(0, echo)
    }

    /// Loses a queue without giving it back, as a crash does.
    fn abandon(&self, index: usize) {
        let mut ring = self.rings.lock().unwrap()[index].take().unwrap();
        let mut chain = Chain::new();
        while ring.pop(&mut chain).unwrap() {}
    }

    fn recovered(&self, index: usize) -> usize {
        self.rings.lock().unwrap()[index].as_ref().map_or(0, Ring::recovered)
    }

    fn running(&self, index: usize) -> bool {
        self.rings.lock().unwrap()[index].is_some()
    }
}

fn echo(ring: &mut Ring) -> usize {
    let (mut chain, mut count) = (Chain::new(), 0);
    while let Ok(true) = ring.pop(&mut chain) {
        ring.push(chain.head(), 0);
        count += 1;
    }
    ring.publish();
    count
}

impl Device for Echo {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let from = offset as usize;
        data.copy_from_slice(&self.config.lock().unwrap()[from..from + data.len()]);
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), Error> {
        if data == b"no" {
            return Err(Error::invalid_field("config", "not this"));
        }
        let from = offset as usize;
        self.config.lock().unwrap()[from..from + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn start_queue(&self, ring: Ring) -> Result<(), Error> {
        self.log(format!("start {}", ring.index()));
        if *self.refuses.lock().unwrap() {
            return Err(Error::new(tonic::Code::ResourceExhausted, ErrorReason::Host, "no thread"));
        }
        let index = usize::from(ring.index());
        assert!(self.rings.lock().unwrap()[index].replace(ring).is_none(), "started twice");
        Ok(())
    }

    fn begin_stop(&self, index: u16) {
        self.log(format!("begin {index}"));
    }

    fn stop_queue(&self, index: u16, deadline: Instant) -> Result<Option<RingState>, Busy> {
        let held = self.held.lock().unwrap();
        let left = deadline.saturating_duration_since(Instant::now());
        let (held, _) = self.released.wait_timeout_while(held, left, |h| *h).unwrap();
        if *held {
            return Err(Busy { index, in_flight: 1 });
        }
        let Some(mut ring) = self.rings.lock().unwrap()[usize::from(index)].take() else {
            return Ok(None);
        };
        echo(&mut ring);
        self.log(format!("stop {index}"));
        Ok(Some(ring.stop()))
    }

    fn reset(&self) {
        self.log("reset");
    }

    fn close(&self) {
        self.log("close");
    }
}

struct Setup {
    device: Arc<Echo>,
    server: DeviceServer,
    notifier: ConfigNotifier,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("d.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let (device, notifier) = (Echo::new(), ConfigNotifier::default());
    let server = DeviceServer::start("echo", device.clone(), listener, &notifier).unwrap();
    Setup { device, server, notifier, socket, _dir: dir }
}

fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is() {
        assert!(since.elapsed() < PATIENCE, "not {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The device still serves a front-end.
fn still_serves(setup: &Setup) {
    let guest = TestGuest::new(1 << 20);
    let mut queue = DriverQueue::new(&guest, 0, 16, FEATURES);
    let mut front = Front::connect_within(&setup.socket, PATIENCE);
    front.set_up(&guest, FEATURES);
    front.start(0, &queue, 0);
    let head = queue.add(&[Buffer::readable(0x8_0000, 1)]).unwrap();
    assert_eq!(setup.device.nudge(0), 1);
    assert_eq!(queue.take_used(), Some((head, 0)));
}

#[test]
fn queues_start_when_all_is_there_and_stop_when_told() {
    let setup = setup();
    let guest = TestGuest::new(1 << 20);
    let mut queue = DriverQueue::new(&guest, 0, 16, FEATURES);
    let mut front = Front::connect(&setup.socket);
    assert!(front.offered & FEATURES == FEATURES && front.offered & 1 << 5 != 0);
    front.set_up(&guest, FEATURES);
    front.start(0, &queue, 0);
    assert!(setup.device.running(0) && !setup.device.running(1));
    for _ in 0..5 {
        queue.add(&[Buffer::readable(0x8_0000, 1)]).unwrap();
    }
    front.frontend.set_vring_enable(0, false).unwrap();
    assert!(!setup.device.running(0));
    assert_eq!(queue.used_idx(), 5);
    queue.add(&[Buffer::readable(0x8_0000, 1)]).unwrap();
    front.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(setup.device.nudge(0), 1);
    assert_eq!(front.stop(0), 6);
    // Enabled alone does not start it: the kick descriptor is gone.
    front.frontend.set_vring_enable(0, true).unwrap();
    assert!(!setup.device.running(0));
    front.start(0, &queue, 6);
    assert!(setup.device.running(0));
    front.frontend.reset_device().unwrap();
    assert!(!setup.device.running(0) && setup.device.logged("reset"));
    front.start(0, &queue, 6);
    drop(front);
    eventually("stopped", || !setup.device.running(0) && !setup.server.connected());
    assert!(setup.server.stop(Instant::now() + PATIENCE) && setup.device.logged("close"));
}

#[test]
fn interrupts_that_a_predecessor_may_have_swallowed_are_made_up_for() {
    let setup = setup();
    let guest = TestGuest::new(1 << 20);
    let queue = DriverQueue::new(&guest, 0, 16, FEATURES);
    let mut front = Front::connect(&setup.socket);
    front.set_up(&guest, FEATURES);
    front.start(0, &queue, 0);
    assert!(queue.call.take() > 0);
    // As when a guest unmasks a vector.
    let call = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    front.frontend.set_vring_call(0, &call).unwrap();
    assert_eq!(call.read().unwrap(), 1);
}

#[test]
fn the_configuration_space_is_read_written_and_announced() {
    let setup = setup();
    let mut front = Front::connect(&setup.socket);
    assert_eq!(front.config(0, 8), b"confspac");
    assert_eq!(front.config(4, 8), b"spac\0\0\0\0");
    assert_eq!(front.config(200, 4), [0; 4]);
    let flags = VhostUserConfigFlags::WRITABLE;
    front.frontend.set_config(1, flags, b"xy").unwrap();
    assert_eq!(front.config(0, 4), b"cxyf");
    assert!(front.frontend.set_config(1, flags, b"no").is_err());
    assert!(front.frontend.set_config(7, flags, b"zz").is_err());
    assert_eq!(front.config(0, 4), b"cxyf");

    let (ours, theirs) = UnixStream::pair().unwrap();
    front.frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    for _ in 0..3 {
        setup.notifier.config_changed();
        let mut message = [0; 12];
        (&ours).read_exact(&mut message).unwrap();
        // CONFIG_CHANGE, version 1, nothing more.
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }
    // Nobody reads any more, or nobody is there: nobody waits.
    drop(ours);
    for _ in 0..10 {
        setup.notifier.config_changed();
    }
    drop(front);
    still_serves(&setup);
    setup.notifier.config_changed();
}

#[test]
fn memory_comes_and_goes_under_a_running_ring() {
    let setup = setup();
    let guest = TestGuest::new(2 << 20);
    let mut queue = DriverQueue::new(&guest, 0, 16, FEATURES);
    let mut front = Front::connect(&setup.socket);
    let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert!(front.protocol_features().contains(slots));
    assert_eq!(front.frontend.get_max_mem_slots().unwrap(), 509);
    front.frontend.set_features(FEATURES | PROTOCOL_FEATURES).unwrap();
    let region = |gpa: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: 1 << 20,
        userspace_addr: USER_BASE + gpa,
        mmap_offset: gpa,
        mmap_handle: guest.file().as_raw_fd(),
    };
    front.frontend.add_mem_region(&region(0)).unwrap();
    front.start(0, &queue, 0);
    front.frontend.add_mem_region(&region(1 << 20)).unwrap();
    let other = VhostUserMemoryRegionInfo { userspace_addr: USER_BASE, ..region(1 << 20) };
    assert!(front.frontend.add_mem_region(&other).is_err());
    queue.add(&[Buffer::readable(1 << 20, 1)]).unwrap();
    assert_eq!(setup.device.nudge(0), 1);
    front.frontend.remove_mem_region(&region(1 << 20)).unwrap();
    assert!(front.frontend.remove_mem_region(&region(1 << 20)).is_err());
    queue.add(&[Buffer::readable(1 << 20, 1)]).unwrap();
    assert_eq!(setup.device.nudge(0), 0);
    assert!(setup.server.broken().unwrap().contains("outside guest memory"));
    assert!(queue.error.take() > 0);
    // Stopped and started again, it is whole.
    front.stop(0);
    let queue = DriverQueue::new(&guest, 0x4_0000, 16, FEATURES);
    front.start(0, &queue, 0);
    assert!(setup.server.broken().is_none());
}

#[test]
fn what_cannot_be_is_refused_and_the_connection_goes_on() {
    let setup = setup();
    let guest = TestGuest::new(1 << 20);
    let queue = DriverQueue::new(&guest, 0, 16, FEATURES);
    let mut front = Front::connect(&setup.socket);
    front.set_up(&guest, FEATURES);
    let f = &mut front.frontend;
    assert!(f.set_features(FEATURES | PROTOCOL_FEATURES | 1 << 50).is_err());
    for size in [0, 3, 128] {
        assert!(f.set_vring_num(0, size).is_err(), "{size}");
    }
    // A descriptor that is no eventfd.
    let null = std::fs::File::open("/dev/null").unwrap();
    // SAFETY: a descriptor of ours, given away.
    let bad = unsafe {
        use std::os::fd::{FromRawFd, IntoRawFd};
        vmm_sys_util::eventfd::EventFd::from_raw_fd(null.into_raw_fd())
    };
    assert!(f.set_vring_call(0, &bad).is_err());
    assert!(f.set_vring_kick(0, &bad).is_err());
    front.start(0, &queue, 0);
    let outside = DriverQueue::new(&guest, 1 << 30, 16, FEATURES);
    assert!(front.try_start(1, &outside, 0).is_err());
    assert!(setup.device.running(0) && !setup.device.running(1));
    // A running ring cannot be moved or resized.
    assert!(front.frontend.set_vring_num(0, 32).is_err());
    assert!(front.frontend.set_vring_base(0, 7).is_err());
    assert!(setup.device.running(0));
}

#[test]
fn what_the_host_cannot_do_now_ends_the_connection_and_not_the_device() {
    let setup = setup();
    let guest = TestGuest::new(1 << 20);
    let mut queue = DriverQueue::new(&guest, 0, 16, FEATURES);
    let mut front = Front::connect(&setup.socket);
    front.set_up(&guest, FEATURES);
    let inflight = front.new_inflight(2, 16);
    front.set_inflight(&inflight);
    front.start(0, &queue, 0);
    let heads: Vec<_> = (0..2).map(|_| queue.add(&[Buffer::readable(0x8_0000, 1)]).unwrap()).collect();
    // Killed with both in flight.
    setup.device.abandon(0);
    drop(front);
    *setup.device.refuses.lock().unwrap() = true;
    for _ in 0..3 {
        let mut front = Front::connect_within(&setup.socket, PATIENCE);
        front.set_up(&guest, FEATURES);
        front.set_inflight(&inflight);
        assert!(front.try_start(0, &queue, 0).is_err());
        // The link is gone, and the driver has been told nothing.
        assert!(front.frontend.get_features().is_err());
        assert_eq!((setup.server.broken(), queue.error.take()), (None, 0));
    }
    *setup.device.refuses.lock().unwrap() = false;
    let mut front = Front::connect_within(&setup.socket, PATIENCE);
    front.set_up(&guest, FEATURES);
    front.set_inflight(&inflight);
    front.start(0, &queue, 0);
    assert_eq!(setup.device.recovered(0), 2);
    assert_eq!(setup.device.nudge(0), 2);
    assert_eq!([queue.take_used(), queue.take_used()], [Some((heads[0], 0)), Some((heads[1], 0))]);
}

#[test]
fn features_do_not_change_under_a_running_queue() {
    let setup = setup();
    let guest = TestGuest::new(1 << 20);
    let queue = DriverQueue::new(&guest, 0, 16, FEATURES);
    let mut front = Front::connect(&setup.socket);
    front.set_up(&guest, FEATURES);
    front.start(0, &queue, 0);
    let f = &mut front.frontend;
    assert!(f.set_features(FEATURES | PROTOCOL_FEATURES | 1 << 5).is_err());
    assert!(f.set_features(FEATURES | PROTOCOL_FEATURES).is_ok());
    assert!(setup.device.running(0));
    front.stop(0);
    front.frontend.set_features(FEATURES | PROTOCOL_FEATURES | 1 << 5).unwrap();
}

#[test]
fn all_queues_have_their_orders_before_one_is_waited_for() {
    let setup = setup();
    let guest = TestGuest::new(1 << 20);
    let mut front = Front::connect(&setup.socket);
    front.set_up(&guest, FEATURES);
    let queues = [0, 0x4_0000].map(|base| DriverQueue::new(&guest, base, 16, FEATURES));
    for (index, queue) in queues.iter().enumerate() {
        front.start(index, queue, 0);
    }
    setup.device.hold(true);
    drop(front);
    eventually("both ordered", || setup.device.logged("begin 0") && setup.device.logged("begin 1"));
    assert!(setup.device.running(0) && setup.device.running(1));
    setup.device.hold(false);
    eventually("both stopped", || !setup.device.running(0) && !setup.device.running(1));
}

#[test]
fn a_queue_that_was_not_started_counts_as_stopped() {
    let setup = setup();
    let guest = TestGuest::new(1 << 20);
    let queue = DriverQueue::new(&guest, 0, 16, FEATURES);
    let mut front = Front::connect(&setup.socket);
    front.set_up(&guest, FEATURES);
    front.start(0, &queue, 0);
    // The engine has lost it.
    setup.device.abandon(0);
    assert_eq!(front.stop(0), 0);
    drop(front);
    still_serves(&setup);
}

#[test]
fn removed_memory_is_unmapped_though_the_queue_is_idle() {
    let setup = setup();
    let guest = TestGuest::new(2 << 20);
    let mut front = Front::connect(&setup.socket);
    front.frontend.set_features(FEATURES | PROTOCOL_FEATURES).unwrap();
    let region = |gpa: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: 1 << 20,
        userspace_addr: USER_BASE + gpa,
        mmap_offset: gpa,
        mmap_handle: guest.file().as_raw_fd(),
    };
    front.frontend.add_mem_region(&region(0)).unwrap();
    front.frontend.add_mem_region(&region(1 << 20)).unwrap();
    let queue = DriverQueue::new(&guest, 0, 16, FEATURES);
    front.start(0, &queue, 0);
    let inode = format!(" {} ", std::os::unix::fs::MetadataExt::ino(&guest.file().metadata().unwrap()));
    let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
    let pages = || {
        let ranges = maps();
        let range = |line: &str| {
            let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
            u64::from_str_radix(to, 16).unwrap() - u64::from_str_radix(from, 16).unwrap()
        };
        ranges.lines().filter(|l| l.contains(&inode)).map(range).sum::<u64>()
    };
    // The guest's own mapping, and ours of both halves.
    assert_eq!(pages(), 4 << 20);
    queue.kick.take();
    front.frontend.remove_mem_region(&region(1 << 20)).unwrap();
    assert!(queue.kick.take() > 0, "the engine is to look");
    setup.device.nudge(0);
    assert_eq!(pages(), 3 << 20);
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [request, 1 | flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
    bytes.extend(payload);
    bytes
}

const NEED_REPLY: u32 = 8;

/// A connection without a library. A front-end that was just cut off may still be served: asks whether we are.
fn raw(setup: &Setup) -> UnixStream {
    let since = Instant::now();
    loop {
        let stream = UnixStream::connect(&setup.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let asked = (&stream).write_all(&message(1, 0, &[]));
        match asked.and_then(|()| (&stream).read_exact(&mut [0; 20])) {
            Ok(()) => return stream,
            Err(e) => assert!(since.elapsed() < PATIENCE, "{e}"),
        }
    }
}

#[test]
fn unknown_requests_are_answered_and_the_link_stays() {
    let setup = setup();
    let stream = raw(&setup);
    // Protocol features with REPLY_ACK and CONFIG, features with bit 30.
    (&stream).write_all(&message(16, 0, &(1u64 << 3 | 1 << 9).to_ne_bytes())).unwrap();
    (&stream).write_all(&message(2, 0, &(FEATURES | PROTOCOL_FEATURES).to_ne_bytes())).unwrap();
    // SET_LOG_FD with a descriptor, SEND_RARP, one that nobody knows: with and without NEED_REPLY.
    let fd = Event::new().unwrap();
    stream.send_with_fd(&message(7, 0, &[])[..], fd.as_raw_fd()).unwrap();
    for (request, payload) in [(7u32, 0usize), (19, 8), (20, 8), (39, 8), (4711, 100)] {
        (&stream).write_all(&message(request, NEED_REPLY, &vec![7; payload])).unwrap();
        let mut reply = [0; 20];
        (&stream).read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], request.to_ne_bytes());
        assert_eq!(reply[12..], 1u64.to_ne_bytes(), "{request}");
    }
    // It goes on.
    (&stream).write_all(&message(1, 0, &[])).unwrap();
    (&stream).read_exact(&mut [0; 20]).unwrap();
    // One that always has an answer, and we have none.
    (&stream).write_all(&message(40, 0, &[])).unwrap();
    assert_eq!((&stream).read(&mut [0; 1]).unwrap(), 0);
    still_serves(&setup);
}

#[test]
fn a_front_end_that_stops_in_the_middle_of_a_message_does_not_hold_up_the_end() {
    let setup = setup();
    for part in [3, 12, 15] {
        let stream = raw(&setup);
        (&stream).write_all(&message(2, 0, &[0; 8])[..part]).unwrap();
    }
    still_serves(&setup);
    let stream = raw(&setup);
    (&stream).write_all(&message(2, 0, &[0; 8])[..15]).unwrap();
    assert!(setup.server.stop(Instant::now() + PATIENCE));
    assert!(setup.device.logged("close"));
}

#[test]
fn a_slow_engine_is_waited_for_and_never_overtaken() {
    let setup = setup();
    let guest = TestGuest::new(1 << 20);
    let mut queue = DriverQueue::new(&guest, 0, 16, FEATURES);
    let mut front = Front::connect(&setup.socket);
    front.set_up(&guest, FEATURES);
    front.start(0, &queue, 0);
    queue.add(&[Buffer::readable(0x8_0000, 1)]).unwrap();
    setup.device.hold(true);
    drop(front);
    // The next front-end is not served before the queue has stopped.
    let stream = UnixStream::connect(&setup.socket).unwrap();
    (&stream).write_all(&message(1, 0, &[])).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let e = (&stream).read(&mut [0; 20]).unwrap_err();
    assert!(matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
    assert_eq!(queue.used_idx(), 0);
    setup.device.hold(false);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (&stream).read_exact(&mut [0; 20]).unwrap();
    assert_eq!(queue.used_idx(), 1);
}

#[test]
fn a_device_whose_engine_hangs_can_be_given_up() {
    let setup = setup();
    let guest = TestGuest::new(1 << 20);
    let queue = DriverQueue::new(&guest, 0, 16, FEATURES);
    let mut front = Front::connect(&setup.socket);
    front.set_up(&guest, FEATURES);
    front.start(0, &queue, 0);
    setup.device.hold(true);
    assert!(!setup.server.stop(Instant::now() + Duration::from_millis(300)));
    assert!(!setup.device.logged("close"));
    // It ends by itself when the engine is done.
    setup.device.hold(false);
    eventually("closed", || setup.device.logged("close"));
}

/// Payload length of well-formed requests, by number.
fn payload_bytes(request: u32) -> usize {
    match request {
        1 | 3 | 4 | 15 | 17 | 34 | 36 => 0,
        5 => 8 + 32,
        9 | 37 | 38 => 40,
        24 | 25 => 12 + 8,
        31 | 32 => 24,
        _ => 8,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a front-end sends, with or without descriptors, the device serves the next one.
    #[test]
    fn any_messages_are_survived(
        messages in prop::collection::vec(
            (0u32..50, any::<u8>(), prop::collection::vec(any::<u8>(), 0..80), any::<bool>(), any::<bool>()), 1..20)
    ) {
        let setup = setup();
        let stream = UnixStream::connect(&setup.socket).unwrap();
        let (fd, memory) = (Event::new().unwrap(), TestGuest::new(1 << 16));
        // With a good beginning they get further.
        (&stream).write_all(&message(16, 0, &u64::from(u32::MAX).to_ne_bytes())).unwrap();
        (&stream).write_all(&message(2, 0, &(FEATURES | PROTOCOL_FEATURES).to_ne_bytes())).unwrap();
        for (request, flags, mut payload, right_size, with_fd) in messages {
            if right_size {
                payload.resize(payload_bytes(request), 0);
                if let [low, rest @ ..] = &mut payload[..] {
                    *low %= 3;
                    rest.iter_mut().take(3).for_each(|b| *b = 0);
                }
            }
            let bytes = message(request, u32::from(flags) & NEED_REPLY, &payload);
            let sent = if with_fd {
                let fd = if flags & 1 == 0 { fd.as_raw_fd() } else { memory.file().as_raw_fd() };
                stream.send_with_fd(&bytes[..], fd).is_ok()
            } else {
                (&stream).write_all(&bytes).is_ok()
            };
            if !sent {
                break;
            }
        }
        drop(stream);
        still_serves(&setup);
    }
}

#[test]
fn a_device_that_has_stopped_holds_nothing_any_more() {
    // The end is told by another thread: once could be luck.
    for _ in 0..200 {
        let Setup { device, server, _dir: dir, .. } = setup();
        let held = Arc::downgrade(&device);
        drop(device);
        assert!(server.stop(Instant::now() + Duration::from_secs(10)));
        assert_eq!(held.strong_count(), 0);
        drop(dir);
    }
}
