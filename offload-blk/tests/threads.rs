//! The threads of a disk: as many as there are queues, or processors for them.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{DRIVER, Guest, OK, PATIENCE, T_FLUSH, T_IN, T_OUT, pattern};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use offload_blk::{BlockDevice, DiskConfig, Image, IoEngine, Register, Store, Threads};
use offload_card::Device;
use offload_card::poll::{PollMode, PollPolicy};
use offload_card::qos::Limits;
use offload_card::testing::DriverQueue;
use proto::v1::DeviceLimits;
use vm_memory::{Bytes, GuestAddress};

const QUEUES: u16 = 4;

/// Gives the calling thread, and those it starts, `cpus` processors; false if there are not so many.
fn confine(cpus: usize) -> bool {
    let own = Pid::from_raw(0);
    let all = sched_getaffinity(own).unwrap();
    let mut some = CpuSet::new();
    let chosen = (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu).unwrap()).take(cpus);
    let found = chosen.map(|cpu| some.set(cpu).unwrap()).count();
    sched_setaffinity(own, &some).unwrap();
    found == cpus
}

/// Threads that turn queues of the disk `name`.
fn threads(name: &str) -> usize {
    let of = format!(":{name}");
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .filter(|comm| comm.starts_with("blk") && comm.trim_end().ends_with(&of))
        .count()
}

fn file() -> (tempfile::NamedTempFile, Store) {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let image = Image::open(file.path().to_str().unwrap(), false, false).unwrap();
    (file, Store::Image(Arc::new(image)))
}

fn disk(name: &str, store: Store, engine: IoEngine, mode: PollMode) -> BlockDevice {
    BlockDevice::new(config(name, store, engine, mode)).unwrap()
}

fn config(name: &str, store: Store, engine: IoEngine, mode: PollMode) -> DiskConfig {
    DiskConfig {
        name: name.into(),
        store,
        queues: QUEUES,
        queue_size: 256,
        serial: "serial".into(),
        engine,
        register: Default::default(),
        map_limit: Arc::default(),
        poll: PollPolicy { mode, ..Default::default() },
        host: Arc::new(Threads::default()),
        storage: Arc::default(),
        mode_file: None,
    }
}

fn start(disk: &BlockDevice, guest: &Guest, index: u16) {
    disk.start_queue(guest.queues[usize::from(index)].ring(None).unwrap().0).unwrap();
}

fn stop(disk: &BlockDevice, index: u16) {
    assert!(disk.stop_queue(index, Instant::now() + PATIENCE).unwrap().is_some(), "it was started");
}

/// Waits until a disk has no threads any more.
fn gone(name: &str) {
    let since = Instant::now();
    while threads(name) > 0 {
        assert!(since.elapsed() < PATIENCE, "{} threads are left", threads(name));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn queues_that_are_more_than_the_processors_share_threads_and_all_are_served() {
    for cpus in [1, 2] {
        if !confine(cpus) {
            return;
        }
        for mode in [PollMode::Never, PollMode::Adaptive, PollMode::Always] {
            for engine in [IoEngine::IoUring, IoEngine::Auto, IoEngine::Sync] {
                let name = format!("{cpus}cpu");
                let (_file, store) = file();
                let disk = disk(&name, store, engine, mode);
                let mut guest = Guest::new(QUEUES.into(), 64, DRIVER);
                (0..QUEUES).for_each(|index| start(&disk, &guest, index));
                assert_eq!(threads(&name), cpus);
                for queue in 0..usize::from(QUEUES) {
                    let sector = 8 * queue as u64;
                    let data = pattern(sector, 1, 4096);
                    guest.set_data(0, &data);
                    assert_eq!(guest.run(queue, T_OUT, sector, 4096), OK, "{mode:?} {engine:?}");
                    guest.set_data(0, &[0; 4096]);
                    // By another queue, which may be another thread's.
                    assert_eq!(guest.run((queue + 1) % 4, T_FLUSH, 0, 0), OK);
                    assert_eq!(guest.run((queue + 1) % 4, T_IN, sector, 4096), OK);
                    assert!(guest.data(0, 4096) == data);
                }
                // All at once.
                for slot in 0..64 {
                    guest.begin(slot as usize % 4, slot, T_IN, 0, 4096);
                }
                for slot in 0..64 {
                    assert!(guest.queues[slot % 4].wait_used(PATIENCE).is_some(), "{mode:?} {engine:?}");
                }
                (0..QUEUES).for_each(|index| stop(&disk, index));
                gone(&name);
                // Again and again: a queue may come just when the thread leaves.
                for _ in 0..50 {
                    let mut guest = Guest::new(QUEUES.into(), 64, DRIVER);
                    start(&disk, &guest, 1);
                    assert_eq!(guest.run(1, T_IN, 0, 4096), OK);
                    stop(&disk, 1);
                }
                // The next disk has the same name.
                gone(&name);
            }
        }
    }
}

#[test]
fn a_queue_of_a_shared_thread_stops_and_starts_while_the_others_go_on() {
    confine(1);
    let (_file, store) = file();
    let disk = disk("stops", store, IoEngine::Auto, PollMode::Adaptive);
    // Each queue is another guest's, which can have a new one.
    let guest = || Guest::new(QUEUES.into(), 64, DRIVER);
    let mut guests: Vec<_> = (0..QUEUES).map(|_| guest()).collect();
    (0..QUEUES).for_each(|index| start(&disk, &guests[usize::from(index)], index));
    for index in 0..QUEUES {
        stop(&disk, index);
        for queue in (0..usize::from(QUEUES)).filter(|queue| *queue != usize::from(index)) {
            assert_eq!(guests[queue].run(queue, T_IN, 0, 4096), OK);
        }
        guests[usize::from(index)] = guest();
        start(&disk, &guests[usize::from(index)], index);
        assert_eq!(guests[usize::from(index)].run(index.into(), T_IN, 0, 4096), OK);
    }
    // When all of them have stopped the thread ends, and there is another for the next one.
    (0..QUEUES).for_each(|index| stop(&disk, index));
    gone("stops");
    let mut guest = guest();
    start(&disk, &guest, 2);
    assert_eq!(guest.run(2, T_IN, 0, 4096), OK);
    stop(&disk, 2);
    gone("stops");
}

/// The guest's memory is replaced while all of them use it, and one of them goes.
#[test]
fn queues_of_a_thread_register_memory_once_and_forget_it_together() {
    confine(1);
    let (_file, store) = file();
    let config = DiskConfig {
        register: Register::AtOnce,
        ..config("registers", store, IoEngine::IoUring, PollMode::Adaptive)
    };
    let disk = BlockDevice::new(config).unwrap();
    let mut guest = Guest::new(QUEUES.into(), 64, DRIVER);
    let table = guest.memory.table();
    let shared: Vec<_> = (0..QUEUES)
        .map(|index| {
            let (ring, shared) = guest.queues[usize::from(index)].ring_in(table.clone(), None).unwrap();
            disk.start_queue(ring).unwrap();
            shared
        })
        .collect();
    let registered = || shared.iter().map(|queue| queue.counters.registered.get()).collect::<Vec<_>>();
    // Queues say so after their answers.
    let wait_for = |guest: &Guest, what: &str, holds: &dyn Fn(&[u64]) -> bool| {
        let since = Instant::now();
        while !holds(&registered()) {
            assert!(since.elapsed() < PATIENCE, "{what}: {:?}", registered());
            guest.queues.iter().for_each(DriverQueue::kick);
            std::thread::yield_now();
        }
    };
    let mut first = 0;
    for round in 0..6 {
        for queue in first..usize::from(QUEUES) {
            let data = pattern(8, round, 4096);
            guest.set_data(0, &data);
            assert_eq!(guest.run(queue, T_OUT, 8, 4096), OK);
            guest.set_data(0, &[0; 4096]);
            assert_eq!(guest.run(queue, T_IN, 8, 4096), OK);
            assert!(guest.data(0, 4096) == data, "round {round}");
        }
        let one =
            |queues: &[u64]| queues[first] > 0 && queues.iter().filter(|bytes| **bytes > 0).count() == 1;
        wait_for(&guest, "one of them says what is registered", &one);
        if round == 3 {
            stop(&disk, 0);
            first = 1;
            continue;
        }
        // What is in the old memory now is nobody's.
        let old = guest.memory.clone();
        guest.move_to(&table);
        old.memory.write_slice(&[0xee; 1 << 20], GuestAddress(0x20_0000)).unwrap();
        wait_for(&guest, "it is forgotten", &|queues| queues.iter().all(|bytes| *bytes == 0));
    }
    (1..QUEUES).for_each(|index| stop(&disk, index));
    assert_eq!(registered(), [0; QUEUES as usize]);
    gone("registers");
}

#[test]
fn a_shared_thread_does_what_the_limit_allows_and_no_more() {
    confine(1);
    for mode in [PollMode::Never, PollMode::Adaptive] {
        let (_file, store) = file();
        let disk = disk("limited", store, IoEngine::Auto, mode);
        let limits = DeviceLimits { operations_per_second: 1000, operations_burst: 10, ..Default::default() };
        disk.set_limits(Limits::new(Some(&limits)).unwrap()).unwrap();
        let mut guest = Guest::new(QUEUES.into(), 64, DRIVER);
        (0..QUEUES).for_each(|index| start(&disk, &guest, index));
        let since = Instant::now();
        for slot in 0..60 {
            guest.begin(slot as usize % 4, slot, T_IN, 0, 4096);
        }
        for slot in 0..60 {
            assert!(guest.queues[slot % 4].wait_used(PATIENCE).is_some());
        }
        // One per queue may go beyond it.
        let least = Duration::from_millis(60 - 10 - u64::from(QUEUES));
        assert!(since.elapsed() >= least && since.elapsed() < PATIENCE, "{:?}", since.elapsed());
        (0..QUEUES).for_each(|index| stop(&disk, index));
    }
}
