//! A vhost-user connection on which anything is said, to a disk with two queues and a guest that has requests for it.
//!
//! Whatever is said, the device ends the connection when the front-end does, serves the next one, and keeps no file and
//! no thread.
#![no_main]

use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fuzz::PATIENCE;
use fuzz::disk::{self, Disk};
use fuzz::front::{Files, Message};
use fuzz::guest::{Front, Guest, Step};
use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;
use offload_blk::IoEngine;
use offload_card::ConfigNotifier;
use offload_card::memory::MemoryTable;
use offload_card::server::DeviceServer;

const MAX_MESSAGES: usize = 64;
/// As the messages have it.
const QUEUE_SIZE: u16 = 8;
/// Unread answers that fill a socket are not what this is about.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

struct Fixture {
    socket: PathBuf,
    server: DeviceServer,
    notifier: ConfigNotifier,
    /// Open files and threads while no front-end is there.
    idle: (usize, usize),
}

fn count(what: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{what}")).map_or(0, Iterator::count)
}

fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let socket = std::env::temp_dir().join(format!("fuzz-vhost-user-{}.sock", std::process::id()));
        let (store, file) = disk::raw(64 * 512);
        let device = Arc::new(Disk::new(store, IoEngine::Auto, false, 2).device);
        let (listener, notifier) = (UnixListener::bind(&socket).expect("socket"), ConfigNotifier::default());
        let server = DeviceServer::start("fuzz", device, listener, &notifier).expect("server");
        drop(file);
        Fixture { socket, server, notifier, idle: (count("fd"), count("task")) }
    })
}

fuzz_target!(|data: &[u8]| {
    let Fixture { socket, server, notifier, idle } = fixture();
    let mut input = Input::new(data);
    let guest = Guest::new(false);
    let (nobody, table) = (|| {}, MemoryTable::new());
    let front = Front { kick: &nobody, table: &table, inflight: None };
    for _ in 0..input.u8() % 8 {
        Step::read(&mut input).perform(&guest, QUEUE_SIZE, &front);
    }
    let mut files = Some(Files::new(&guest));
    let reads = !input.rarely(4);

    let mut stream = UnixStream::connect(socket).expect("the device listens");
    stream.set_write_timeout(Some(SEND_TIMEOUT)).expect("timeout");
    let mut answers = [0; 4096];
    for _ in 0..MAX_MESSAGES {
        let Some(files) = files.as_ref().filter(|_| !input.is_empty()) else { break };
        match input.u8() {
            0..=5 => files.cut(&mut input),
            6 | 7 => notifier.config_changed(),
            8 => drop(UnixStream::connect(socket)),
            _ => {}
        }
        let pieces = input.rarely(32);
        if !Message::read(&mut input, files).send(&stream, pieces) {
            break;
        }
        if reads {
            stream.set_nonblocking(true).expect("mode");
            while matches!(stream.read(&mut answers), Ok(1..)) {}
            stream.set_nonblocking(false).expect("mode");
        }
    }

    // The end, in the middle of a message or not.
    let _ = stream.shutdown(Shutdown::Write);
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    loop {
        match stream.read(&mut answers) {
            Ok(1..) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("the device does not end the connection");
            }
            Ok(0) | Err(_) => break,
        }
    }
    drop((stream, files.take(), guest, table));
    let since = Instant::now();
    while server.connected() || (count("fd"), count("task")) > *idle {
        if since.elapsed() > PATIENCE {
            let files = std::fs::read_dir("/proc/self/fd").into_iter().flatten();
            let files: Vec<_> = files.filter_map(|f| std::fs::read_link(f.ok()?.path()).ok()).collect();
            panic!("{idle:?} files and threads became {} of {files:?}", count("task"));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
});
