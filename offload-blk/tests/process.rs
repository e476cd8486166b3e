//! The card's process begins, ends and is killed, and what outlives it.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Card, DRIVER, Guest, OK, PATIENCE, T_IN, T_OUT, connect, image, pattern, spec};
use offload_card::testing::Front;
use proto::v1::{BlockDeviceSpec, DeviceLimits, ErrorReason};
use vhost::vhost_user::VhostUserFrontend;

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
