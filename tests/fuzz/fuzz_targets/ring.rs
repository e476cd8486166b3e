//! A ring whose driver breaks every rule while the storage engine works on it: descriptors, indices, the memory table and
//! the inflight area change under it, and it is stopped and started again.
//!
//! Whatever happens, the queue stops when it is told to, and has nothing in flight then.
#![no_main]

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use fuzz::PATIENCE;
use fuzz::guest::{Front, Guest, MAX_SIZE, RING, Step};
use fuzz::input::Input;
use fuzz::memfd::{memfd, path};
use libfuzzer_sys::fuzz_target;
use offload_blk::{BlockDevice, DiskConfig, Image, Inline, IoEngine, QueueHost, Store, Threads};
use offload_card::Device;
use offload_card::event::Event;
use offload_card::poll::{PollMode, PollPolicy};
use offload_card::ring::{FEATURES, InflightArea, QueueShared, Ring, RingConfig};

const MAX_STEPS: usize = 48;
const IMAGE_BYTES: u64 = 64 * 512;

struct Disk {
    device: BlockDevice,
    /// `None`: its queues have threads.
    inline: Option<Arc<Inline>>,
}

struct Fixture {
    guest: Guest,
    disks: [Disk; 4],
}

fn disk(store: Store, engine: IoEngine, inline: bool) -> Disk {
    let inline = inline.then(|| Arc::new(Inline::new(1)));
    let host: Arc<dyn QueueHost> = match &inline {
        Some(inline) => inline.clone(),
        None => Arc::new(Threads),
    };
    let config = DiskConfig {
        name: "fuzz".into(),
        store,
        queues: 1,
        queue_size: MAX_SIZE,
        serial: "fuzz".into(),
        engine,
        poll: PollPolicy { mode: PollMode::Never, ..Default::default() },
        host,
        storage: Arc::default(),
        mode_file: None,
    };
    Disk { device: BlockDevice::new(config).expect("device"), inline }
}

fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let image = || {
            let file = memfd(IMAGE_BYTES, false);
            Store::Image(Arc::new(Image::open(&path(&file), false, false).expect("image")))
        };
        let null = || Store::null(IMAGE_BYTES, false).expect("null store");
        Fixture {
            guest: Guest::new(true),
            disks: [
                disk(image(), IoEngine::Sync, true),
                disk(null(), IoEngine::Sync, true),
                disk(image(), IoEngine::Auto, false),
                disk(null(), IoEngine::Auto, false),
            ],
        }
    })
}

fuzz_target!(|data: &[u8]| {
    let Fixture { guest, disks } = fixture();
    let mut input = Input::new(data);
    let size = 1 << (input.u8() % 8);
    let features = if input.rarely(4) { input.u64() } else { FEATURES | 1 << 9 | 3 << 13 };
    let disk = &disks[usize::from(input.u8()) % disks.len()];
    let (base, rounds, laps) = (input.u8().into(), 1 + input.u8() % 3, 1 + input.u8() % 8);
    let area = input.rarely(2).then(|| InflightArea::create(1, size).expect("inflight area"));
    let before: Vec<_> = (0..input.u8() % 16).map(|_| Step::read(&mut input)).collect();
    let mut during = Vec::new();
    while !input.is_empty() && during.len() < MAX_STEPS {
        during.push(Step::read(&mut input));
    }

    guest.clear();
    let (event, table) = (Event::new().expect("eventfd"), guest.table(0));
    let kick = || {
        event.signal();
        if let Some(inline) = &disk.inline {
            inline.notify(0);
        }
    };
    let silent = || event.signal();
    let front = |kick| Front { kick, table: &table, inflight: area.as_ref().map(|(_, file)| file) };
    for step in before {
        step.perform(guest, size, &front(&silent));
    }
    for _ in 0..rounds {
        let shared = Arc::new(QueueShared::default());
        let ring = Ring::new(RingConfig {
            index: 0,
            size,
            features,
            addresses: RING,
            base,
            kick: event.try_clone().expect("eventfd"),
            memory: table.clone(),
            shared: shared.clone(),
            inflight: area.as_ref().and_then(|(area, _)| area.queue(0, size)),
        });
        let Ok(ring) = ring else { return };
        // The driver goes on while the queue starts, works and stops.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..laps {
                    during.iter().for_each(|step| step.perform(guest, size, &front(&silent)));
                }
                silent();
            });
            disk.device.start_queue(ring).expect("the queue starts");
            kick();
            disk.device.begin_stop(0);
            let stopped = disk.device.stop_queue(0, Instant::now() + PATIENCE);
            assert!(stopped.expect("the queue stops").is_some());
        });
        assert!(shared.broken().is_some() || shared.counters.in_flight.get() == 0);
    }
});
