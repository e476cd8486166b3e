//! Devices that others made: the storage daemon and the file system daemon of QEMU.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Driver, Machine, VERSION_1, config, until};

const DAEMON: &str = "qemu-storage-daemon";

/// The daemon, which ends with the test.
struct Daemon(Child);

impl Daemon {
    fn start(dir: &Path) -> Self {
        let _ = std::fs::remove_file(dir.join("s.sock"));
        let child = Command::new(DAEMON)
            .current_dir(dir)
            .args(["--blockdev", "driver=file,node-name=f,filename=disk.img"])
            .args(["--export", "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path=s.sock,num-queues=2,writable=on"])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon (Debian package qemu-system-common or qemu-utils) is needed");
        until("its device", || dir.join("s.sock").exists());
        Self(child)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn disk() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(dir.path().join("disk.img")).unwrap();
    file.set_len(8 << 20).unwrap();
    dir
}

/// Writes or reads 4 KiB at `sector` by queue 0 or 1, to or from guest memory at `buffer`, and returns the status byte.
fn transfer(driver: &mut Driver<'_>, queue: u16, write: bool, sector: u64, buffer: u64) -> u8 {
    let header = driver.buffers(queue);
    let ram = driver.machine.ram.memory();
    ram.write_obj(u64::from(write), GuestAddress(header)).unwrap();
    ram.write_obj(sector, GuestAddress(header + 8)).unwrap();
    ram.write_obj(0xffu8, GuestAddress(header + 16)).unwrap();
    driver.submit(queue, 0, &[(header, 16, false), (buffer, 4096, !write), (header + 16, 1, true)]);
    driver.notify(queue);
    assert_eq!(driver.wait(queue, 1), [0]);
    ram.read_obj(GuestAddress(header + 16)).unwrap()
}

fn write_and_verify(driver: &mut Driver<'_>, seed: u8) {
    for queue in 0..2u16 {
        let (from, to) = (driver.buffers(queue) + 0x2000, driver.buffers(queue) + 0x4000);
        let pattern: Vec<u8> = (0..4096u32).map(|i| (i as u8).wrapping_mul(7).wrapping_add(seed)).collect();
        let sector = u64::from(queue) * 8;
        driver.machine.ram.memory().write_slice(&pattern, GuestAddress(from)).unwrap();
        assert_eq!(transfer(driver, queue, true, sector, from), 0);
        assert_eq!(transfer(driver, queue, false, sector, to), 0);
        let mut back = vec![0; 4096];
        driver.machine.ram.memory().read_slice(&mut back, GuestAddress(to)).unwrap();
        assert_eq!(back, pattern);
    }
}

#[test]
fn it_serves_a_slot_through_resets_and_its_own_death() {
    let dir = disk();
    let daemon = Daemon::start(dir.path());
    let machine = Machine::new(&config(&dir.path().join("s.sock")));
    let mut driver = Driver::start(&machine, VERSION_1, 2);
    assert_eq!(driver.num_queues(), 2);
    assert_eq!(u64::from_le_bytes(driver.device_config(0)), (8 << 20) / 512);
    write_and_verify(&mut driver, 1);
    driver.reset();
    let mut driver = Driver::start(&machine, VERSION_1, 2);
    write_and_verify(&mut driver, 2);
    drop(daemon);
    until("loss", || machine.events.has("LOST"));
    let _daemon = Daemon::start(dir.path());
    write_and_verify(&mut driver, 3);
    until("connection", || machine.slot.info().reconnects == 1);
    let _ = machine.slot.reset();
    let mut driver = Driver::start(&machine, VERSION_1, 2);
    write_and_verify(&mut driver, 4);
}

/// A device without configuration space, that serves one connection and ends.
#[test]
fn a_file_system_daemon_serves_a_slot() {
    const DAEMON: &str = "/usr/lib/qemu/virtiofsd";
    let dir = tempfile::tempdir().unwrap();
    let (socket, shared) = (dir.path().join("f.sock"), dir.path().join("shared"));
    std::fs::create_dir(&shared).unwrap();
    let child = Command::new(DAEMON)
        .arg(format!("--socket-path={}", socket.display()))
        .args(["-o", &format!("source={},sandbox=chroot", shared.display())])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("virtiofsd (Debian package qemu-system-common) is needed");
    let mut daemon = Daemon(child);
    until("its device", || socket.exists());
    let mut config = config(&socket);
    config.virtio_device_id = 26;
    config.queues = 2;
    let mut tag = b"shared".to_vec();
    tag.resize(36, 0);
    tag.extend_from_slice(&1u32.to_le_bytes());
    config.config_size = tag.len() as u32;
    config.static_config = tag;
    let machine = Machine::new(&config);
    assert_eq!(machine.config_read(0), 0x105a_1af4);
    for _ in 0..2 {
        let mut driver = Driver::start(&machine, VERSION_1, 2);
        assert_eq!(&driver.device_config::<8>(0), b"shared\0\0");
        // FUSE_INIT, version 7.31: header of 40 bytes, four words; answered by a header of 16 bytes (length, error, unique).
        let (request, reply) = (driver.buffers(1), driver.buffers(1) + 0x1000);
        let words = [56u32, 26, 77, 0, 0, 0, 0, 0, 0, 0, 7, 31, 65536, 0];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        machine.ram.memory().write_slice(&bytes, GuestAddress(request)).unwrap();
        driver.submit(1, 0, &[(request, 56, false), (reply, 80, true)]);
        driver.notify(1);
        assert_eq!(driver.wait(1, 1), [0]);
        let answer: [u32; 4] = std::array::from_fn(|i| {
            machine.ram.memory().read_obj(GuestAddress(reply + 4 * i as u64)).unwrap()
        });
        assert_eq!((answer[1], answer[2]), (0, 77), "{answer:?}");
        driver.reset();
    }
    // It has a child, which both end with the connection.
    machine.slot.shutdown();
    until("its end", || daemon.0.try_wait().unwrap().is_some());
}
