//! The card's process as a front-end and a controller see it.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Card, DRIVER, Guest, PATIENCE, T_FLUSH, T_GET_ID, T_IN, T_OUT, image, pattern, spec};
use offload_card::ring::FEATURES;
use offload_card::testing::{Buffer, Front};
use proto::v1::{BlockDeviceSpec, DeviceLimits, ErrorReason};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn connect(device: &proto::v1::Device) -> Front {
    Front::connect_within(Path::new(&device.socket_path), PATIENCE)
}

/// Writes, reads back and flushes through every queue, by one way of doing I/O.
fn does_io(arguments: &[&str], direct: bool) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = image(dir.path(), "disk.img", 8 << 20);
    let card = Card::start(dir.path(), arguments);
    let block = BlockDeviceSpec { path: path.clone(), queues: 2, direct, ..Default::default() };
    let device = card.create(&spec("vm-disk0", block)).unwrap();
    assert_eq!((device.virtio_device_id, device.queues, device.queue_size), (2, 2, 256));
    let mut front = connect(&device);
    let mut guest = Guest::new(2, 64, DRIVER);
    guest.connect(&mut front);
    // Front-ends pass the used index; a fresh ring has 0.
    let step = 4096 / 512;
    for queue in 0..2 {
        for i in 0..16u64 {
            let sector = (queue as u64 * 16 + i) * step;
            guest.set_data(0, &pattern(sector, 1, 4096));
            assert_eq!(guest.run(queue, T_OUT, sector, 4096), OK);
        }
        assert_eq!(guest.run(queue, T_FLUSH, 0, 0), OK);
        for i in 0..16u64 {
            let sector = (queue as u64 * 16 + i) * step;
            guest.set_data(0, &[0; 4096]);
            assert_eq!(guest.run(queue, T_IN, sector, 4096), OK);
            assert!(guest.data(0, 4096) == pattern(sector, 1, 4096));
        }
    }
    // A big one.
    let big = pattern(4096, 2, 256 << 10);
    guest.set_data(0, &big);
    assert_eq!(guest.run(0, T_OUT, 4096, 256 << 10), OK);
    let mut on_disk = vec![0; 256 << 10];
    fs::File::open(&path).unwrap().read_exact_at(&mut on_disk, 4096 * 512).unwrap();
    assert!(on_disk == big);
    let stats = card.stats("vm-disk0").unwrap();
    assert_eq!((stats.connections, stats.queues.len()), (1, 2));
    assert_eq!((stats.queues[0].requests, stats.queues[1].requests), (34, 33));
    assert_eq!(stats.queues[1].bytes_in, 16 * 4096);
    assert_eq!(stats.queues[0].bytes_out, 16 * 4096 + (256 << 10));
    assert_eq!((stats.queues[0].in_flight, stats.queues[0].errors), (0, 0));
    assert!(stats.queues[0].kicks > 0 && stats.queues[0].calls > 0);
    assert_eq!(front.stop(0), 34);
    assert_eq!(front.stop(1), 33);
}

#[test]
fn io_by_io_uring() {
    does_io(&["--io", "io-uring"], false);
}

#[test]
fn io_by_system_calls() {
    does_io(&["--io", "sync"], false);
}

#[test]
fn direct_io() {
    does_io(&[], true);
}

/// Memory is registered where it is used again and again, and not any more when the queue has stopped.
#[test]
fn direct_io_with_registered_memory() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for (when, registers) in [("always", true), ("auto", false), ("never", false)] {
        let path = image(dir.path(), &format!("{when}.img"), 8 << 20);
        let runtime_dir = dir.path().join(when);
        fs::create_dir(&runtime_dir).unwrap();
        let card = Card::start(&runtime_dir, &["--register-memory", when]);
        let block = BlockDeviceSpec { path: path.clone(), direct: true, ..Default::default() };
        let device = card.create(&spec("d", block)).unwrap();
        let mut front = connect(&device);
        let mut guest = Guest::new(1, 64, DRIVER);
        guest.connect(&mut front);
        let registered = || card.stats("d").unwrap().queues[0].bytes_registered;
        for version in 0..200 {
            let sector = version * 8;
            guest.set_data(0, &pattern(sector, version, 4096));
            assert_eq!(guest.run(0, T_OUT, sector, 4096), OK);
            guest.set_data(0, &[0; 4096]);
            assert_eq!(guest.run(0, T_IN, sector, 4096), OK);
            assert!(guest.data(0, 4096) == pattern(sector, version, 4096));
        }
        assert_eq!(registered() > 0, registers, "{when}");
        let mut on_disk = vec![0; 4096];
        let file = fs::File::open(&path).unwrap();
        for version in 0..200 {
            file.read_exact_at(&mut on_disk, version * 4096).unwrap();
            assert!(on_disk == pattern(version * 8, version, 4096), "block {version} on disk");
        }
        front.stop(0);
        assert_eq!(registered(), 0);
    }
}

#[test]
fn direct_io_with_unaligned_buffers() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = image(dir.path(), "disk.img", 8 << 20);
    let card = Card::start(dir.path(), &[]);
    let block = BlockDeviceSpec { path, direct: true, ..Default::default() };
    let device = card.create(&spec("d", block)).unwrap();
    let mut front = connect(&device);
    let mut guest = Guest::new(1, 128, DRIVER);
    guest.connect(&mut front);
    // 200 KiB in pieces of odd sizes at odd addresses: more than one bounce buffer's worth.
    let length = 200 << 10;
    let data = pattern(0, 7, length as usize);
    let pieces = |data: u64, writable: bool| {
        let sizes = [1u32, 511, 3000, 70_001, 100_000];
        let mut at = 0;
        let mut buffers: Vec<_> = sizes
            .into_iter()
            .map(|size| {
                let buffer = Buffer { address: data + u64::from(at), length: size, writable };
                at += size;
                buffer
            })
            .collect();
        buffers.push(Buffer { address: data + u64::from(at), length: length - at, writable });
        buffers
    };
    for slot in 0..20 {
        guest.set_data(slot, &data);
        let (header, status, at) = guest.write_header(slot, T_OUT, 512 * slot);
        let mut buffers = vec![Buffer::readable(header, 16)];
        buffers.extend(pieces(at, false));
        buffers.push(Buffer::writable(status, 1));
        while guest.queues[0].free() < buffers.len() {
            guest.queues[0].wait_used(PATIENCE).unwrap();
        }
        guest.queues[0].add(&buffers).unwrap();
        guest.queues[0].kick();
    }
    while guest.queues[0].free() < 128 {
        guest.queues[0].wait_used(PATIENCE).unwrap();
    }
    for slot in 0..20 {
        assert_eq!(guest.status(slot), OK);
        guest.set_data(slot, &vec![0; length as usize]);
        let (header, status, at) = guest.write_header(slot, T_IN, 512 * slot);
        let mut buffers = vec![Buffer::readable(header, 16)];
        buffers.extend(pieces(at, true));
        buffers.push(Buffer::writable(status, 1));
        guest.queues[0].add_indirect(0x10_0000, &buffers).unwrap();
        guest.queues[0].kick();
        guest.queues[0].wait_used(PATIENCE).unwrap();
        assert_eq!(guest.status(slot), OK);
        assert!(guest.data(slot, length as usize) == data);
    }
}

#[test]
fn what_the_device_says_of_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let card = Card::start(dir.path(), &[]);
    let block = BlockDeviceSpec {
        path,
        read_only: true,
        queues: 4,
        queue_size: 128,
        serial: "serial-7".into(),
        ..Default::default()
    };
    let device = card.create(&spec("ro", block)).unwrap();
    assert_eq!(device.config_size, 60);
    let mut front = connect(&device);
    let wanted = Protocol::REPLY_ACK
        | Protocol::MQ
        | Protocol::CONFIG
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::INFLIGHT_SHMFD
        | Protocol::BACKEND_REQ;
    assert!(front.protocol_features().contains(wanted));
    assert!(!front.protocol_features().contains(Protocol::LOG_SHMFD));
    assert_eq!(front.frontend.get_queue_num().unwrap(), 4);
    for bit in [2, 5, 6, 9, 10, 11, 12, 28, 29, 32] {
        assert!(front.offered & 1 << bit != 0, "feature {bit}");
    }
    let config = front.config(0, 60);
    assert_eq!(config[..8], 2048u64.to_le_bytes());
    assert_eq!(config[12..16], 126u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[34..36], 4u16.to_le_bytes());
    // QEMU's idea of the space may be longer than ours.
    let longer = front.config(0, 96);
    assert_eq!((&longer[..60], &longer[60..]), (&config[..], &[0; 36][..]));

    let mut guest = Guest::new(1, 128, DRIVER | 1 << 5);
    guest.connect(&mut front);
    assert_eq!(guest.run(0, T_GET_ID, 0, 20), OK);
    assert_eq!(guest.data(0, 20), b"serial-7\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(guest.run(0, T_IN, 0, 512), OK);
    assert_eq!(guest.run(0, T_OUT, 0, 512), IOERR);
    assert_eq!(guest.run(0, T_FLUSH, 0, 0), OK);
}

#[test]
fn malformed_requests_get_the_right_status_or_break_only_their_queue() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let card = Card::start(dir.path(), &[]);
    let device = card.create(&spec("d", BlockDeviceSpec { path, queues: 2, ..Default::default() })).unwrap();
    let mut front = connect(&device);
    let mut guest = Guest::new(2, 16, DRIVER);
    guest.connect(&mut front);
    assert_eq!(guest.run(0, 99, 0, 512), UNSUPP);
    assert_eq!(guest.run(0, T_IN, 2048, 512), IOERR);
    assert_eq!(guest.run(0, T_IN, 2047, 1024), IOERR);
    assert_eq!(guest.run(0, T_OUT, u64::MAX, 512), IOERR);
    assert_eq!(guest.run(0, T_IN, 0, 100), IOERR);
    assert_eq!(guest.run(0, T_IN, 0, 0), OK);
    // A header that is too short.
    let (header, status, data) = guest.write_header(1, T_IN, 0);
    let queue = &mut guest.queues[0];
    queue.add(&[Buffer::readable(header, 15), Buffer::writable(status, 1)]).unwrap();
    queue.kick();
    queue.wait_used(PATIENCE).unwrap();
    assert_eq!(guest.status(1), IOERR);
    // Header, data and status cut anywhere.
    let (header, status, data2) = guest.write_header(2, T_IN, 0);
    let queue = &mut guest.queues[0];
    let mut cut: Vec<_> = (0..16).map(|i| Buffer::readable(header + i, 1)).collect();
    cut.extend([Buffer::writable(data2, 1), Buffer::writable(data2 + 1, 511), Buffer::writable(status, 1)]);
    queue.add_indirect(data, &cut).unwrap();
    queue.kick();
    queue.wait_used(PATIENCE).unwrap();
    assert_eq!(guest.status(2), OK);
    assert!(card.list()[0].broken.is_empty());
    // No status byte at all: nobody can be told but by the error descriptor.
    let queue = &mut guest.queues[0];
    queue.add(&[Buffer::readable(header, 16)]).unwrap();
    queue.kick();
    let since = Instant::now();
    while guest.queues[0].error.take() == 0 {
        assert!(since.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(card.list()[0].broken.contains("queue 0"), "{}", card.list()[0].broken);
    // The other queue does not mind.
    assert_eq!(guest.run(1, T_IN, 0, 512), OK);
    // A reset mends it.
    front.stop(0);
    front.stop(1);
    let mut guest = Guest::new(2, 16, DRIVER);
    guest.connect(&mut front);
    assert_eq!(guest.run(0, T_IN, 0, 512), OK);
    assert!(card.list()[0].broken.is_empty());
}

#[test]
fn a_second_front_end_is_turned_away_and_a_dead_one_is_not_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let card = Card::start(dir.path(), &[]);
    let device = card.create(&spec("d", BlockDeviceSpec { path, ..Default::default() })).unwrap();
    let mut guest = Guest::new(1, 16, DRIVER);
    for round in 1..=5 {
        let mut front = connect(&device);
        assert!(Front::try_connect(Path::new(&device.socket_path)).is_err());
        guest.connect(&mut front);
        assert_eq!(guest.run(0, T_IN, 0, 512), OK);
        assert!(card.list()[0].connected);
        assert_eq!(card.stats("d").unwrap().connections, round);
        // Dies without a word; the next one goes on with the same rings.
        drop(front);
    }
    let since = Instant::now();
    while card.list()[0].connected {
        assert!(since.elapsed() < PATIENCE);
    }
}

#[test]
fn devices_are_created_once_kept_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let mut card = Card::start(dir.path(), &[]);
    let info = card.identify();
    assert_eq!((info.kind.as_str(), info.devices), ("offload-blk", 0));
    let wanted = spec("d", BlockDeviceSpec { path: path.clone(), ..Default::default() });
    let checked = card.create_or_check(&wanted, true).unwrap();
    assert_eq!((checked.queues, card.list().len()), (1, 0));
    let device = card.create(&wanted).unwrap();
    assert_eq!(card.create(&wanted).unwrap(), device);
    let other = spec("d", BlockDeviceSpec { path: path.clone(), read_only: true, ..Default::default() });
    assert_eq!(card.create(&other).unwrap_err().reason(), ErrorReason::DeviceExists);
    let twice = spec("e", BlockDeviceSpec { path: path.clone(), ..Default::default() });
    assert_eq!(card.create(&twice).unwrap_err().reason(), ErrorReason::DiskInUse);
    assert_eq!(card.inspect(&path).unwrap().size_bytes, 1 << 20);

    card.crash();
    assert_eq!(card.list(), std::slice::from_ref(&device));
    assert!(card.terminate().success());
    assert!(!dir.path().join("control.sock").exists() && !Path::new(&device.socket_path).exists());
    card.restart();
    assert_eq!(card.list(), [device]);
    connect(&card.list()[0]);

    card.delete("d").unwrap();
    assert_eq!(card.delete("d").unwrap_err().reason(), ErrorReason::DeviceNotFound);
    assert_eq!(fs::read_dir(dir.path().join("devices")).unwrap().count(), 0);
    // The image is free again.
    card.create(&twice).unwrap();
}

#[test]
fn a_device_whose_image_is_gone_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let mut card = Card::start(dir.path(), &[]);
    card.create(&spec("d", BlockDeviceSpec { path: path.clone(), ..Default::default() })).unwrap();
    card.kill();
    let moved = dir.path().join("moved.img");
    fs::rename(&path, &moved).unwrap();
    card.restart();
    let lost = card.list();
    assert!(lost[0].broken.contains("does not exist"), "{}", lost[0].broken);
    fs::rename(&moved, &path).unwrap();
    let since = Instant::now();
    while !card.list()[0].broken.is_empty() {
        assert!(since.elapsed() < PATIENCE, "it does not come back");
        std::thread::sleep(Duration::from_millis(20));
    }
    connect(&card.list()[0]);
}

#[test]
fn bad_specifications_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let card = Card::start(dir.path(), &[]);
    let good = image(dir.path(), "good.img", 1 << 20);
    let odd = image(dir.path(), "odd.img", 1000);
    let gone = dir.path().join("none.img").to_str().unwrap().to_owned();
    let block = |path: &str| BlockDeviceSpec { path: path.into(), ..Default::default() };
    let cases = [
        (spec("", block(&good)), ErrorReason::InvalidField),
        (spec("../x", block(&good)), ErrorReason::InvalidField),
        (spec("UPPER", block(&good)), ErrorReason::InvalidField),
        (spec("d", block(&gone)), ErrorReason::DiskNotFound),
        (spec("d", block(&odd)), ErrorReason::DiskInvalid),
        (spec("d", block(dir.path().to_str().unwrap())), ErrorReason::DiskInvalid),
        (spec("d", BlockDeviceSpec { queues: 65, ..block(&good) }), ErrorReason::InvalidField),
        (spec("d", BlockDeviceSpec { queue_size: 100, ..block(&good) }), ErrorReason::InvalidField),
        (spec("d", BlockDeviceSpec { queue_size: 65536, ..block(&good) }), ErrorReason::InvalidField),
        (spec("d", BlockDeviceSpec { serial: "x".repeat(21), ..block(&good) }), ErrorReason::InvalidField),
        (
            proto::v1::DeviceSpec { id: "d".into(), kind: None, limits: None, net_limits: None },
            ErrorReason::InvalidField,
        ),
    ];
    for (wanted, reason) in cases {
        for validate_only in [true, false] {
            assert_eq!(
                card.create_or_check(&wanted, validate_only).unwrap_err().reason(),
                reason,
                "{wanted:?}"
            );
        }
    }
    assert_eq!(card.inspect(&gone).unwrap_err().reason(), ErrorReason::DiskNotFound);
    assert!(card.list().is_empty());
    assert_eq!(fs::read_dir(dir.path().join("devices")).unwrap().count(), 0);
}

/// SIGKILL at any time: every request that was in flight is done, exactly the data the guest wrote is there.
fn survives_kills(arguments: &[&str], direct: bool, rounds: u32) {
    const DEPTH: u64 = 16;
    const BLOCK: u32 = 4096;
    const BLOCKS: u64 = 2048;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = image(dir.path(), "disk.img", BLOCKS * u64::from(BLOCK));
    let mut card = Card::start(dir.path(), arguments);
    let block = BlockDeviceSpec { path: path.clone(), queues: 2, direct, ..Default::default() };
    let device = card.create(&spec("d", block)).unwrap();
    let mut guest = Guest::new(2, 64, DRIVER);
    let mut front = connect(&device);
    let area = front.new_inflight(2, 64);
    front.set_inflight(&area);
    guest.connect(&mut front);

    // Version of each block that was answered last, and requests by queue and head: slot, block, version, whether a
    // read. Only one request per block at a time, so that the outcome is certain.
    let mut versions = vec![0u64; BLOCKS as usize];
    let mut busy = vec![false; BLOCKS as usize];
    let mut flying: [std::collections::HashMap<u16, (u64, u64, u64, bool)>; 2] = Default::default();
    let mut free: Vec<u64> = (0..2 * DEPTH).collect();
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let (mut version, mut done, mut pauses) = (0, 0u64, Vec::new());
    for round in 0..rounds {
        let until = Instant::now() + Duration::from_micros(next() % 20_000);
        let (mut drained_at, mut pause) = (0, None);
        let mut since = Instant::now();
        let mut killed = false;
        // Some load before the kill; after it, at least as many requests as were in flight.
        while !killed || done < drained_at {
            if !killed && Instant::now() >= until {
                since = Instant::now();
                pause = Some(since);
                card.crash();
                front = Front::connect_within(Path::new(&device.socket_path), PATIENCE);
                front.set_inflight(&area);
                guest.connect(&mut front);
                killed = true;
                drained_at = done + 2 * DEPTH;
            }
            while let Some(slot) = free.pop() {
                let at = next() % BLOCKS;
                if busy[at as usize] {
                    free.push(slot);
                    break;
                }
                busy[at as usize] = true;
                let read = next() % 2 == 0;
                version += 1;
                let queue = (slot % 2) as usize;
                let sector = at * u64::from(BLOCK) / 512;
                guest.set_data(
                    slot,
                    &if read { vec![0; BLOCK as usize] } else { pattern(sector, version, BLOCK as usize) },
                );
                let head = guest.begin(queue, slot, if read { T_IN } else { T_OUT }, sector, BLOCK);
                flying[queue].insert(head, (slot, at, version, read));
            }
            for (queue, flying) in flying.iter_mut().enumerate() {
                while let Some((head, _)) = guest.queues[queue].take_used() {
                    let (slot, at, version, read) = flying.remove(&head).expect("answered once");
                    assert_eq!(guest.status(slot), OK, "round {round}");
                    if read {
                        let known = versions[at as usize];
                        let sector = at * u64::from(BLOCK) / 512;
                        let want = if known == 0 {
                            vec![0; BLOCK as usize]
                        } else {
                            pattern(sector, known, BLOCK as usize)
                        };
                        assert!(
                            guest.data(slot, BLOCK as usize) == want,
                            "round {round}: block {at} is not as written"
                        );
                    } else {
                        versions[at as usize] = version;
                    }
                    busy[at as usize] = false;
                    free.push(slot);
                    pauses.extend(pause.take().map(|since| since.elapsed()));
                    done += 1;
                }
            }
            // The driver polls: it wants no interrupts, and the device's kicks are by EVENT_IDX.
            assert!(since.elapsed() < PATIENCE, "round {round}: {flying:?} do not come back");
        }
    }
    pauses.sort_unstable();
    let resubmitted: u64 = card.stats("d").unwrap().queues.iter().map(|q| q.resubmitted).sum();
    println!(
        "{rounds} kills, {done} requests, longest pauses {:?}",
        pauses.iter().rev().take(3).collect::<Vec<_>>()
    );
    println!("{resubmitted} done again by the last one");
    for (queue, flying) in flying.iter_mut().enumerate() {
        while !flying.is_empty() {
            let (head, _) = guest.queues[queue].wait_used(PATIENCE).expect("everything comes back");
            let (slot, at, version, read) = flying.remove(&head).unwrap();
            assert_eq!(guest.status(slot), OK);
            if !read {
                versions[at as usize] = version;
            }
        }
        // Stopped where the guest is.
        assert_eq!(front.stop(queue), guest.queues[queue].used_idx());
    }
    let file = fs::File::open(&path).unwrap();
    for (at, &version) in versions.iter().enumerate() {
        let mut block = vec![0; BLOCK as usize];
        file.read_exact_at(&mut block, at as u64 * u64::from(BLOCK)).unwrap();
        let sector = at as u64 * u64::from(BLOCK) / 512;
        let want =
            if version == 0 { vec![0; BLOCK as usize] } else { pattern(sector, version, BLOCK as usize) };
        assert!(block == want, "block {at} on disk");
    }
}

#[test]
fn nothing_is_lost_by_kills_with_io_uring() {
    survives_kills(&["--io", "io-uring"], false, 25);
}

#[test]
fn nothing_is_lost_by_kills_with_direct_io() {
    survives_kills(&["--io", "io-uring", "--register-memory", "always"], true, 25);
}

#[test]
fn nothing_is_lost_by_kills_with_system_calls() {
    survives_kills(&["--io", "sync"], false, 25);
}

#[test]
fn a_driver_without_flush_gets_durable_writes_and_one_without_version_1_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let card = Card::start(dir.path(), &[]);
    let device = card.create(&spec("d", BlockDeviceSpec { path, ..Default::default() })).unwrap();
    let mut front = connect(&device);
    let mut guest = Guest::new(1, 16, FEATURES);
    guest.connect(&mut front);
    guest.set_data(0, &pattern(3, 9, 512));
    assert_eq!(guest.run(0, T_OUT, 3, 512), OK);
    front.stop(0);
    let guest = Guest::new(1, 16, 0);
    front.set_up(&guest.memory, 0);
    front.start(0, &guest.queues[0], 0);
    assert!(guest.queues[0].error.take() > 0);
    assert!(card.list()[0].broken.contains("VERSION_1"));
}

/// A driver that switched the cache off never flushes: a card that is killed must not forget it.
#[test]
fn a_write_through_cache_stays_so_when_the_card_is_killed() {
    use vhost::vhost_user::message::VhostUserConfigFlags;
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let mut card = Card::start(dir.path(), &[]);
    let wanted = spec("d", BlockDeviceSpec { path, ..Default::default() });
    let device = card.create(&wanted).unwrap();
    let mut front = connect(&device);
    assert_eq!(front.config(32, 1), [1]);
    front.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    card.crash();
    let mut front = connect(&device);
    assert_eq!(front.config(32, 1), [0]);
    // A reset ends it, and so does the device's end.
    front.frontend.reset_device().unwrap();
    assert_eq!(front.config(32, 1), [1]);
    front.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    card.delete("d").unwrap();
    let mut front = connect(&card.create(&wanted).unwrap());
    assert_eq!(front.config(32, 1), [1]);
}

#[test]
fn an_image_that_somebody_cuts_gives_errors_and_nothing_worse() {
    for arguments in [["--io", "io-uring"], ["--io", "sync"]] {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), "disk.img", 1 << 20);
        let card = Card::start(dir.path(), &arguments);
        let block = BlockDeviceSpec { path: path.clone(), ..Default::default() };
        let device = card.create(&spec("d", block)).unwrap();
        let mut front = connect(&device);
        let mut guest = Guest::new(1, 16, DRIVER);
        guest.connect(&mut front);
        fs::File::options().write(true).open(&path).unwrap().set_len(6 * 512).unwrap();
        assert_eq!(guest.run(0, T_IN, 0, 512), OK);
        assert_eq!(guest.run(0, T_IN, 8, 512), IOERR);
        // Half of it is there.
        assert_eq!(guest.run(0, T_IN, 4, 2048), IOERR);
        assert_eq!(card.stats("d").unwrap().queues[0].errors, 2);
        assert_eq!(guest.run(0, T_OUT, 8, 512), OK);
    }
}

/// SIGTERM under load: what was begun is finished before the process ends, without an error.
#[test]
fn a_graceful_stop_drains() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = image(dir.path(), "disk.img", 8 << 20);
    let mut card = Card::start(dir.path(), &[]);
    let block = BlockDeviceSpec { path, direct: true, ..Default::default() };
    let device = card.create(&spec("d", block)).unwrap();
    let mut front = connect(&device);
    let area = front.new_inflight(1, 64);
    front.set_inflight(&area);
    let mut guest = Guest::new(1, 64, DRIVER);
    guest.connect(&mut front);
    for slot in 0..20 {
        guest.begin(0, slot, T_OUT, slot * 512, 256 << 10);
    }
    assert!(card.terminate().success());
    let mut answered = 0;
    while guest.queues[0].take_used().is_some() {
        answered += 1;
    }
    assert!((0..20).filter(|slot| guest.status(*slot) == OK).count() == answered);
    // The successor does the rest.
    card.restart();
    let mut front = connect(&device);
    front.set_inflight(&area);
    guest.connect(&mut front);
    while answered < 20 {
        guest.queues[0].wait_used(PATIENCE).unwrap();
        answered += 1;
    }
    assert!((0..20).all(|slot| guest.status(slot) == OK));
    let stats = card.stats("d").unwrap();
    assert_eq!((stats.queues[0].resubmitted, stats.queues[0].in_flight), (0, 0));
}

#[test]
fn systemd_passes_the_socket_and_is_told_when_the_card_is_ready() {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control.sock");
    let listener = std::os::unix::net::UnixListener::bind(&control).unwrap();
    let notify = std::os::unix::net::UnixDatagram::bind(dir.path().join("notify.sock")).unwrap();
    notify.set_read_timeout(Some(PATIENCE)).unwrap();
    let heard = || {
        let mut buffer = [0; 256];
        let length = notify.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    // The socket goes to descriptor 3, as systemd does it.
    let mut child = std::process::Command::new("sh")
        .args(["-c", r#"LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@" 3<&0 </dev/null"#])
        .arg(env!("CARGO_BIN_EXE_offload-blk"))
        .args(["--control", "/nowhere/control.sock", "--runtime-dir"])
        .arg(dir.path())
        .env("NOTIFY_SOCKET", dir.path().join("notify.sock"))
        .stdin(std::os::fd::OwnedFd::from(listener))
        .spawn()
        .unwrap();
    assert!(heard().contains("READY=1"));
    let card = Card::adopt(dir.path(), child.id());
    assert_eq!(card.identify().devices, 0);
    card.signal("TERM");
    assert!(heard().contains("STOPPING=1"));
    assert!(child.wait().unwrap().success());
    // It is systemd's: it stays.
    assert!(control.exists());
}

#[test]
fn a_card_that_cannot_start_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let card = Card::start(dir.path(), &[]);
    card.identify();
    let run = |control: &Path, runtime_dir: &Path, log: &str| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_offload-blk"))
            .args(["--log", log, "--control"])
            .arg(control)
            .arg("--runtime-dir")
            .arg(runtime_dir)
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let other = tempfile::tempdir().unwrap();
    let socket = dir.path().join("control.sock");
    let served = run(&socket, other.path(), "info");
    assert!(
        served.contains("another process serves it") && served.contains(socket.to_str().unwrap()),
        "{served}"
    );
    let nowhere = run(Path::new("/nowhere/c.sock"), other.path(), "info");
    assert!(nowhere.contains("/nowhere/c.sock") && nowhere.contains("directory"), "{nowhere}");
    let file = other.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(run(&other.path().join("c.sock"), &file, "info").contains(file.to_str().unwrap()));
    assert!(run(&other.path().join("c.sock"), other.path(), "=!").contains("log filter"));
}

/// They are kept, and hold for the next process; creating the device again with others sets them.
#[test]
fn limits_are_set_at_run_time_and_outlive_the_process() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = image(dir.path(), "disk.img", 8 << 20);
    let mut card = Card::start(dir.path(), &[]);
    let mut wanted = spec("d", BlockDeviceSpec { path, ..Default::default() });
    let device = card.create(&wanted).unwrap();
    let limited = DeviceLimits { operations_per_second: 20, operations_burst: 1, ..Default::default() };
    let refused = card.set_limits("d", DeviceLimits { bytes_per_second: 1, ..limited }).unwrap_err();
    assert_eq!(refused.fact("field"), Some("limits.bytes_per_second"));
    assert_eq!(card.set_limits("none", limited).unwrap_err().reason(), ErrorReason::DeviceNotFound);
    assert_eq!(card.set_limits("d", limited).unwrap().spec.unwrap().limits, Some(limited));
    card.crash();
    assert_eq!(card.list()[0].spec.as_ref().unwrap().limits, Some(limited));
    let mut front = connect(&device);
    let mut guest = Guest::new(1, 64, DRIVER);
    let since = Instant::now();
    guest.connect(&mut front);
    for _ in 0..5 {
        assert_eq!(guest.run(0, T_IN, 0, 4096), OK);
    }
    assert!(since.elapsed() >= Duration::from_millis(4 * 50), "{:?}", since.elapsed());
    let stats = card.stats("d").unwrap().queues.remove(0);
    assert!(stats.throttled > 0 && stats.throttled_ns > 0, "{stats:?}");
    wanted.limits = None;
    assert_eq!(card.create(&wanted).unwrap().spec.unwrap().limits, None);
    let since = Instant::now();
    for _ in 0..20 {
        assert_eq!(guest.run(0, T_IN, 0, 4096), OK);
    }
    assert!(since.elapsed() < Duration::from_millis(19 * 50), "{:?}", since.elapsed());
    card.crash();
    assert_eq!(card.list()[0].spec.as_ref().unwrap().limits, None);
    let refused = card.create(&spec("d", BlockDeviceSpec { path: "/other".into(), ..Default::default() }));
    assert_eq!(refused.unwrap_err().reason(), ErrorReason::DeviceExists);
}

/// What Prometheus reads: over the Unix socket, and the loopback address if asked for.
#[test]
fn numbers_are_served_to_prometheus() {
    use std::io::{Read, Write};
    let ask = |mut stream: Box<dyn ReadWrite>| {
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    trait ReadWrite: Read + Write {}
    impl<T: Read + Write> ReadWrite for T {}
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // A port that is free now; nothing else on this host is likely to take it meanwhile.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let address = port.to_string();
    let mut card = Card::start(dir.path(), &["--metrics-listen", &address]);
    let path = image(dir.path(), "disk.img", 8 << 20);
    let device = card.create(&spec("d", BlockDeviceSpec { path, queues: 2, ..Default::default() })).unwrap();
    let mut front = connect(&device);
    let mut guest = Guest::new(2, 64, DRIVER);
    guest.connect(&mut front);
    assert_eq!(guest.run(1, T_OUT, 0, 4096), OK);
    let unix = || std::os::unix::net::UnixStream::connect(dir.path().join("metrics.sock")).unwrap();
    let tcp = || std::net::TcpStream::connect(port).unwrap();
    // An answer is counted when it has been shown to the driver.
    let line = "outboard_blk_requests_total{device=\"d\",queue=\"1\",op=\"write\"} 1\n";
    let since = Instant::now();
    while !ask(Box::new(unix())).contains(line) {
        assert!(since.elapsed() < PATIENCE, "{}", ask(Box::new(unix())));
    }
    assert!(ask(Box::new(tcp())).contains(line));
    // A crash leaves the socket behind, which is in nobody's way.
    card.crash();
    card.identify();
    assert!(ask(Box::new(unix())).contains("outboard_blk_devices{state=\"served\"} 1\n"));
    assert!(card.terminate().success());
    assert!(!dir.path().join("metrics.sock").exists());
}
