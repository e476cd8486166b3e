//! The card as a front-end and a controller see it.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{
    Card, DRIVER, Guest, IOERR, OK, PATIENCE, T_FLUSH, T_GET_ID, T_IN, T_OUT, UNSUPP, connect, image,
    pattern, spec,
};
use offload_card::ring::FEATURES;
use offload_card::testing::{Buffer, Front};
use proto::v1::{BlockDeviceSpec, ErrorReason};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

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
