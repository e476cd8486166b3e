//! Foreign peers from Debian's QEMU: another front-end for our cards, another back-end for our slots.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use proto::v1::{Device, SlotConfig};

use crate::card::mac_of;
use crate::guest::Reports;
use crate::process::Process;
use crate::{SOON, binary, wait_until};

/// A QEMU that boots the bench guest with vhost-user devices.
pub struct Qemu {
    _process: Process,
    /// What the guest said.
    pub reports: Reports,
}

/// QEMU's smallest firmware, which does nothing but boot a kernel: SeaBIOS takes seconds where firmware is emulated. `None`: it
/// is not installed.
pub fn firmware() -> Option<&'static str> {
    const QBOOT: &str = "/usr/share/qemu/qboot.rom";
    Path::new(QBOOT).exists().then_some(QBOOT)
}

impl Qemu {
    /// Boots with each device plugged in by `-device KIND,...`: `vhost-user-blk-pci` or `virtio-net-pci` on a vhost-user
    /// netdev, as its virtio id says.
    pub fn boot(dir: &Path, cmdline: &str, devices: &[&Device]) -> Self {
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-enable-kvm",
            "-cpu",
            "host,migratable=off,-arch-capabilities",
            "-smp",
            "1",
            "-m",
            "128",
        ]);
        // Guest RAM must be shared with the card.
        command.args([
            "-object",
            "memory-backend-memfd,id=ram,size=128M,share=on",
            "-M",
            "q35,memory-backend=ram",
        ]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
        ]);
        if let Some(firmware) = firmware() {
            command.args(["-bios", firmware]);
        }
        command.arg("-kernel").arg(binary("bench-guest")).args(["-append", cmdline]);
        for (n, device) in devices.iter().enumerate() {
            command.args(["-chardev", &format!("socket,id=c{n},path={},reconnect=1", device.socket_path)]);
            match device.virtio_device_id {
                2 => {
                    let queues = device.queues;
                    command
                        .args(["-device", &format!("vhost-user-blk-pci,chardev=c{n},num-queues={queues}")]);
                }
                1 => {
                    let spec = device.spec.as_ref().and_then(|s| s.kind.as_ref());
                    let Some(proto::v1::device_spec::Kind::Net(spec)) = spec else {
                        panic!("no network device")
                    };
                    let mac = mac_of(device);
                    let pairs = spec.queue_pairs.max(1);
                    // Its own default number of vectors is too small.
                    let multi =
                        if pairs > 1 { format!(",mq=on,vectors={}", 2 * pairs + 2) } else { String::new() };
                    command.args(["-netdev", &format!("vhost-user,id=n{n},chardev=c{n},queues={pairs}")]);
                    command.args([
                        "-device",
                        &format!("virtio-net-pci,netdev=n{n},mac={mac},disable-legacy=on,rombar=0{multi}"),
                    ]);
                }
                other => panic!("no QEMU device for virtio id {other}"),
            }
        }
        let (process, mut stdout) = Process::spawn_piped(&mut command, &dir.join("qemu.log"));
        let reports = Reports::default();
        let feed = reports.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut buffer) {
                feed.feed(&buffer[..n]);
            }
            feed.close();
        });
        Self { _process: process, reports }
    }
}

/// `qemu-storage-daemon` exporting a raw image by vhost-user-blk.
pub struct StorageDaemon {
    /// The process.
    pub process: Process,
    socket: PathBuf,
    queues: u32,
    image: PathBuf,
    dir: PathBuf,
}

impl StorageDaemon {
    /// Starts it.
    pub fn start(dir: &Path, image: &Path, queues: u32) -> Self {
        let socket = dir.join("qsd.sock");
        let process = Self::spawn(dir, image, &socket, queues);
        Self { process, socket, queues, image: image.to_owned(), dir: dir.to_owned() }
    }

    fn spawn(dir: &Path, image: &Path, socket: &Path, queues: u32) -> Process {
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", &format!("driver=file,node-name=file,filename={}", image.display())]);
        command.args([
            "--export",
            &format!(
                "type=vhost-user-blk,id=e,node-name=file,writable=on,num-queues={queues},addr.type=unix,addr.path={}",
                socket.display()
            ),
        ]);
        let _ = std::fs::remove_file(socket);
        let process = Process::spawn(&mut command, &dir.join("qsd.log"));
        wait_until("qemu-storage-daemon's socket", SOON, || socket.exists());
        process
    }

    /// SIGKILL, and starts it again.
    pub fn kill9_and_restart(&mut self) {
        self.process.kill9();
        self.process = Self::spawn(&self.dir, &self.image, &self.socket, self.queues);
    }

    /// The slot for it.
    pub fn slot(&self) -> SlotConfig {
        SlotConfig {
            id: "foreign".to_owned(),
            socket_path: self.socket.to_str().expect("path").to_owned(),
            virtio_device_id: 2,
            queues: self.queues,
            ..Default::default()
        }
    }
}
