//! A ring whose driver breaks every rule while the storage engine works on it: descriptors, indices, the memory table and
//! the inflight area change under it, and it is stopped and started again.
//!
//! Whatever happens, the queue stops when it is told to, and has nothing in flight then.
#![no_main]

use std::sync::{Arc, OnceLock};

use fuzz::disk::{self, Disk};
use fuzz::guest::{Front, Guest, RING, Step};
use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;
use offload_blk::IoEngine;
use offload_card::Device;
use offload_card::event::Event;
use offload_card::ring::{FEATURES, InflightArea, QueueShared, Ring, RingConfig};

const MAX_STEPS: usize = 48;
const IMAGE_BYTES: u64 = 64 * 512;

struct Fixture {
    guest: Guest,
    disks: [Disk; 4],
}

fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| Fixture {
        guest: Guest::new(true),
        disks: [
            disk::image(IMAGE_BYTES, IoEngine::Sync, true),
            disk::null(IMAGE_BYTES, true),
            disk::image(IMAGE_BYTES, IoEngine::Auto, false),
            disk::null(IMAGE_BYTES, false),
        ],
    })
}

fuzz_target!(|data: &[u8]| {
    let Fixture { guest, disks } = fixture();
    let mut input = Input::new(data);
    let size = 1 << (input.u8() % 8);
    let features = if input.rarely(4) { input.u64() } else { FEATURES | 1 << 9 };
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
        disk.notify();
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
            disk.stop();
        });
        assert!(shared.broken().is_some() || shared.counters.in_flight.get() == 0);
    }
});
