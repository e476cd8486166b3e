//! QEMU from Debian: with its own devices, with our cards, and its storage daemon behind our hypervisor.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use proto::v1::device_spec::Kind;

use super::card::{Cards, Plugged, Poll, hypervisor};
use super::{Booted, Disk, GuestSetup, HOST_IP, Setup, Vmm, mac, needed, version};
use crate::bench::Bench;
use crate::results;
use crate::vm::{Guest, tie};
use crate::workload::{Backing, Workload};

const QEMU: &str = "qemu-system-x86_64";

/// The TAP by which guests reach the host, and the bridge that takes its place between two guests of QEMU.
pub(crate) const TAP: &str = "benchtap0";
const BRIDGE: &str = "benchbr0";

/// Who serves a QEMU's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Devices {
    Own,
    Cards,
    StorageDaemon,
}

/// QEMU, one process per guest.
pub(crate) struct Qemu {
    devices: Devices,
    version: Option<String>,
    cards: Option<Cards>,
}

impl Qemu {
    /// Its own devices: virtio-blk on an iothread with io_uring, virtio-net on TAPs and a bridge.
    pub(crate) fn in_process() -> Self {
        Self { devices: Devices::Own, version: version(QEMU), cards: None }
    }

    /// Our cards by vhost-user.
    pub(crate) fn with_card() -> Self {
        Self { devices: Devices::Cards, version: version(QEMU), cards: None }
    }

    /// Its own storage daemon by vhost-user.
    pub(crate) fn with_daemon() -> Self {
        Self { devices: Devices::StorageDaemon, version: version(QEMU), cards: None }
    }
}

impl Vmm for Qemu {
    fn about(&self) -> results::System {
        let (name, description) = match self.devices {
            Devices::Own => (
                "qemu",
                "QEMU with its own devices: virtio-blk on an iothread with io_uring; virtio-net on TAPs and a bridge",
            ),
            Devices::Cards => ("qemu-card", "QEMU as front-end of Outboard's cards (adaptive polling)"),
            Devices::StorageDaemon => {
                ("qemu-qsd", "QEMU with qemu-storage-daemon's vhost-user-blk export as back-end")
            }
        };
        results::System {
            name: name.into(),
            description: description.into(),
            version: self.version.clone().unwrap_or_default(),
        }
    }

    fn can_run(&self, workload: &Workload) -> Result<(), String> {
        needed(QEMU, self.version.as_ref(), "Debian's package qemu-system-x86")?;
        if self.devices == Devices::StorageDaemon { daemon_can_run(workload) } else { Ok(()) }
    }

    fn boot(&mut self, bench: &Bench, setup: &Setup) -> anyhow::Result<Booted> {
        let mut booted = Booted::default();
        let (devices, own_network) = match self.devices {
            Devices::Own => (Vec::new(), OwnNetwork::make(setup)?),
            Devices::Cards => {
                let cards = self.cards.get_or_insert_with(|| Cards::new(bench, "qemu-card", Poll::Adaptive));
                let devices = cards.devices(bench, setup)?;
                booted.backends = cards.pids();
                booted.network = cards.network();
                (devices, None)
            }
            Devices::StorageDaemon => (Vec::new(), None),
        };
        let mut taps = own_network.iter().flat_map(|net| &net.taps);
        for (n, guest) in setup.guests.iter().enumerate() {
            let microvm = setup.quick_start && self.devices == Devices::Own;
            let mut command = qemu(guest, microvm);
            match self.devices {
                Devices::Own => {
                    own_devices(&mut command, guest, &mut taps, microvm)?;
                }
                Devices::Cards => {
                    for (m, plugged) in devices[n].iter().enumerate() {
                        vhost_user(&mut command, m, plugged)?;
                    }
                }
                Devices::StorageDaemon => {
                    if let Some(disk) = &guest.disk {
                        let socket = Daemon::start_for(bench, setup, guest, disk, &mut booted)?;
                        vhost_user_blk(&mut command, 0, &socket, u32::from(disk.queues));
                    }
                }
            }
            booted.guests.push(Guest::start(
                command,
                bench.dir.path(),
                &guest.name,
                setup.backend_cpu(bench),
            )?);
        }
        booted.keep.extend(devices.into_iter().flatten().map(|d| Box::new(d) as _));
        booted.keep.extend(own_network.map(|net| Box::new(net) as _));
        Ok(booted)
    }
}

fn qemu(guest: &GuestSetup, microvm: bool) -> Command {
    let memory = guest.memory_mib;
    let mut command = Command::new(QEMU);
    // Without ACPI it tells the guest on the command line where its devices are.
    let machine = if microvm { "microvm,acpi=off,x-option-roms=off,rtc=off" } else { "q35" };
    command.args(["-name", "bench,debug-threads=on"]);
    command.args(["-M", &format!("{machine},accel=kvm,memory-backend=ram")]);
    if let Some(firmware) = e2e::qemu::firmware().filter(|_| !microvm) {
        command.args(["-bios", firmware]);
    }
    command.args(["-cpu", "host,migratable=off,-arch-capabilities", "-smp", "1", "-m", &memory.to_string()]);
    // Shared with whoever serves the devices; otherwise like any other memory.
    command.args(["-object", &format!("memory-backend-memfd,id=ram,size={memory}M,share=on")]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]);
    command.arg("-kernel").arg(e2e::binary("bench-guest")).args(["-append", &guest.cmdline]);
    command
}

/// The best that QEMU 7.2 has for each.
fn own_devices<'a>(
    command: &mut Command,
    guest: &GuestSetup,
    taps: &mut impl Iterator<Item = &'a String>,
    microvm: bool,
) -> anyhow::Result<()> {
    if microvm {
        command.args(["-global", "virtio-mmio.force-legacy=false"]);
    }
    if let Some(disk) = &guest.disk {
        let device =
            if microvm { "virtio-blk-device" } else { "virtio-blk-pci,disable-legacy=on,queue-size=256" };
        command.args(["-object", "iothread,id=io0", "-blockdev", &blockdev(disk)?]);
        command.args(["-device", &format!("{device},drive=disk,iothread=io0,num-queues={}", disk.queues)]);
    }
    for (n, (&last, tap)) in guest.nics.iter().zip(taps).enumerate() {
        command.args(["-netdev", &format!("tap,id=n{n},ifname={tap},script=no,downscript=no,vhost=off")]);
        command.args([
            "-device",
            &format!("virtio-net-pci,netdev=n{n},mac={},disable-legacy=on,romfile=", mac(last)),
        ]);
    }
    Ok(())
}

/// A block node named `disk`.
fn blockdev(disk: &Disk) -> anyhow::Result<String> {
    Ok(match disk.backing {
        Backing::Null => format!("driver=null-co,node-name=disk,size={},read-zeroes=off", disk.bytes),
        backing => {
            let direct = if backing == Backing::Direct { "on" } else { "off" };
            let path = disk.path.to_str().context("the test file's path is not UTF-8")?;
            format!("driver=file,node-name=disk,filename={path},aio=io_uring,cache.direct={direct}")
        }
    })
}

fn vhost_user_blk(command: &mut Command, n: usize, socket: &str, queues: u32) {
    command.args(["-chardev", &format!("socket,id=c{n},path={socket}")]);
    command.args([
        "-device",
        &format!("vhost-user-blk-pci,chardev=c{n},num-queues={queues},queue-size=256,disable-legacy=on"),
    ]);
}

fn vhost_user(command: &mut Command, n: usize, plugged: &Plugged) -> anyhow::Result<()> {
    let device = &plugged.device;
    match device.spec.as_ref().and_then(|spec| spec.kind.as_ref()) {
        Some(Kind::Block(_)) => vhost_user_blk(command, n, &device.socket_path, device.queues),
        Some(Kind::Net(spec)) => {
            command.args(["-chardev", &format!("socket,id=c{n},path={}", device.socket_path)]);
            let last = spec.mac.last().copied().context("a network device without a MAC address")?;
            command.args(["-netdev", &format!("vhost-user,id=n{n},chardev=c{n}")]);
            command.args([
                "-device",
                &format!("virtio-net-pci,netdev=n{n},mac={},disable-legacy=on,romfile=", mac(last)),
            ]);
        }
        None => bail!("the card does not say what device {} is", device.socket_path),
    }
    Ok(())
}

/// TAPs for QEMU's own network devices, and a bridge between them.
pub(crate) struct OwnNetwork {
    pub(crate) taps: Vec<String>,
    bridge: bool,
}

impl OwnNetwork {
    pub(crate) fn make(setup: &Setup) -> anyhow::Result<Option<Self>> {
        let count = setup.guests.iter().map(|guest| guest.nics.len()).sum();
        if count == 0 {
            return Ok(None);
        }
        let mut net = Self { taps: Vec::new(), bridge: false };
        for n in 0..count {
            let tap = if n == 0 { TAP.to_owned() } else { format!("benchtap{n}") };
            ip(&["tuntap", "add", "dev", &tap, "mode", "tap", "vnet_hdr"])?;
            net.taps.push(tap.clone());
            ip(&["link", "set", &tap, "up"])?;
        }
        if setup.uplink {
            ip(&["address", "add", &format!("{HOST_IP}/24"), "dev", TAP])?;
        } else {
            net.bridge = true;
            ip(&["link", "add", BRIDGE, "type", "bridge", "stp_state", "0"])?;
            ip(&["link", "set", BRIDGE, "up"])?;
            for tap in &net.taps {
                ip(&["link", "set", tap, "master", BRIDGE])?;
            }
        }
        Ok(Some(net))
    }
}

impl Drop for OwnNetwork {
    fn drop(&mut self) {
        let bridge = self.bridge.then(|| BRIDGE.to_owned());
        for link in self.taps.iter().chain(&bridge) {
            if let Err(e) = ip(&["link", "delete", link]) {
                eprintln!("offload-bench: {e:#}");
            }
        }
    }
}

/// Runs `ip` of iproute2.
fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("running ip (Debian's package iproute2)")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

const STORAGE_DAEMON: &str = "qemu-storage-daemon";

/// Why a system with the storage daemon is not measured with a workload.
fn daemon_can_run(workload: &Workload) -> Result<(), String> {
    let found = version(STORAGE_DAEMON);
    needed(STORAGE_DAEMON, found.as_ref(), "Debian's packages qemu-system-common or qemu-utils")?;
    match workload {
        Workload::Network { .. } => Err("the storage daemon serves disks only".into()),
        Workload::Scale { .. } => {
            Err("a storage daemon of its own for every guest is no shared back-end".into())
        }
        _ => Ok(()),
    }
}

/// Our hypervisor with QEMU's storage daemon as back-end.
pub(crate) struct StorageDaemon {
    version: Option<String>,
}

impl StorageDaemon {
    pub(crate) fn new() -> Self {
        Self { version: version(STORAGE_DAEMON) }
    }
}

impl Vmm for StorageDaemon {
    fn about(&self) -> results::System {
        results::System {
            name: "outboard-qsd".into(),
            description: "Outboard's hypervisor with qemu-storage-daemon's vhost-user-blk export as back-end"
                .into(),
            version: self.version.clone().unwrap_or_default(),
        }
    }

    fn can_run(&self, workload: &Workload) -> Result<(), String> {
        daemon_can_run(workload)
    }

    fn boot(&mut self, bench: &Bench, setup: &Setup) -> anyhow::Result<Booted> {
        let mut booted = Booted::default();
        for guest in &setup.guests {
            let mut slots = Vec::new();
            if let Some(disk) = &guest.disk {
                let socket = Daemon::start_for(bench, setup, guest, disk, &mut booted)?;
                slots.push(format!("{socket},id=2,queues={}", disk.queues));
            }
            let command = hypervisor(guest, &slots);
            booted.guests.push(Guest::start(
                command,
                bench.dir.path(),
                &guest.name,
                setup.backend_cpu(bench),
            )?);
        }
        Ok(booted)
    }
}

/// A storage daemon. Dropping it ends it.
struct Daemon(std::process::Child);

impl Daemon {
    /// Starts one for a guest's disk; it lives as long as the guest. Its socket is the result.
    fn start_for(
        bench: &Bench,
        setup: &Setup,
        guest: &GuestSetup,
        disk: &Disk,
        booted: &mut Booted,
    ) -> anyhow::Result<String> {
        let socket = bench.dir.path().join(format!("{}-qsd.sock", guest.name));
        let daemon = Self::start(&socket, disk, setup.backend_cpu(bench))?;
        booted.backends.push(daemon.0.id());
        booted.keep.push(Box::new(daemon));
        Ok(socket.to_str().context("the temporary directory's path is not UTF-8")?.to_owned())
    }

    fn start(socket: &Path, disk: &Disk, cpu: Option<usize>) -> anyhow::Result<Self> {
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new(STORAGE_DAEMON);
        command.args(["--object", "iothread,id=io0", "--blockdev", &blockdev(disk)?]);
        command.args([
            "--export",
            &format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io0,num-queues={},addr.type=unix,addr.path={}",
                disk.queues,
                socket.display()
            ),
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        tie(&mut command, cpu);
        let mut daemon = Self(command.spawn().with_context(|| format!("starting {STORAGE_DAEMON}"))?);
        let patience = Instant::now() + e2e::SOON;
        while !socket.exists() {
            if let Some(status) = daemon.0.try_wait()? {
                bail!("{STORAGE_DAEMON} has ended: {status}; its message is above");
            }
            if Instant::now() > patience {
                bail!("{STORAGE_DAEMON} made no socket within {:?}", e2e::SOON);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
