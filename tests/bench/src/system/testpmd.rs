//! DPDK's `testpmd` behind our hypervisor: frames from one vhost port to the other, and nothing else. It has no tables, checks
//! no address and keeps no connection: what a network card can hope for at most.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::card::hypervisor;
use super::{Booted, GuestSetup, Setup, Vmm, needed};
use crate::bench::Bench;
use crate::results;
use crate::vm::{Guest, tie};
use crate::workload::{Peer, Traffic, Workload};

const PROGRAM: &str = "dpdk-testpmd";
/// Where DPDK keeps what it would else leave in /var/run.
const RUN: &str = "RUNTIME_DIRECTORY";
/// No devices of the host, no other processes of DPDK, and one memfd instead of huge pages.
const ALONE: [&str; 4] = ["--no-huge", "--no-pci", "--no-shconf", "--no-telemetry"];

/// Our hypervisor with `testpmd` as the back-end.
pub(crate) struct Testpmd {
    version: Option<String>,
}

impl Testpmd {
    pub(crate) fn new() -> Self {
        Self { version: version() }
    }
}

/// "DPDK 22.11.11", if it is installed. It says so when it starts only.
fn version() -> Option<String> {
    let directory = e2e::temp_dir();
    let output = Command::new(PROGRAM)
        .env(RUN, directory.path())
        .args(["-v", "--lcores", "0", "-m", "16"])
        .args(ALONE)
        .args(["--", "--help"])
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let version = text.lines().find_map(|line| line.split_once("RTE Version: "));
    Some(version.map_or_else(String::new, |(_, version)| version.trim_matches('\'').to_owned()))
}

impl Vmm for Testpmd {
    fn about(&self) -> results::System {
        results::System {
            name: "testpmd".into(),
            description: "Outboard's hypervisor with DPDK's testpmd as back-end, which hands frames from one vhost port to the other (io)"
                .into(),
            version: self.version.clone().unwrap_or_default(),
        }
    }

    fn can_run(&self, workload: &Workload) -> Result<(), String> {
        needed(PROGRAM, self.version.as_ref(), "Debian's package dpdk-dev")?;
        match workload {
            Workload::Network { traffic: Traffic::Packets | Traffic::Frames, peer: Peer::Itself, .. } => {
                Ok(())
            }
            Workload::Network { peer: Peer::Guest, .. } => {
                Err("its thread always polls, and beside two guests has no processor of its own".into())
            }
            _ => Err("it hands frames from port to port and does nothing else".into()),
        }
    }

    fn boot(&mut self, bench: &Bench, setup: &Setup) -> anyhow::Result<Booted> {
        let mut booted = Booted::default();
        let path = |nic: &u8| bench.dir.path().join(format!("vhost{nic}.sock"));
        let sockets: Vec<_> = setup.guests.iter().flat_map(|guest| &guest.nics).map(path).collect();
        let cpu = setup.backend_cpu(bench);
        let forwarder = Forwarder::start(bench.dir.path(), &sockets, cpu)?;
        booted.backends.push(forwarder.0.id());
        for guest in &setup.guests {
            // Its network devices have no configuration space: the guest makes MAC addresses of its IP addresses, and is not
            // to look for the MTU that is offered there.
            let slot = |nic: &u8| format!("{},id=1,queues=2,config-size=0", path(nic).display());
            let slots: Vec<_> = guest.nics.iter().map(slot).collect();
            let cmdline = guest.cmdline.replace(" dev=", " no=mtu dev=");
            let command = hypervisor(&GuestSetup { cmdline, ..guest.clone() }, &slots);
            booted.guests.push(Guest::start(command, bench.dir.path(), &guest.name, cpu)?);
        }
        booted.keep.push(Box::new(forwarder));
        Ok(booted)
    }
}

/// A running `testpmd`. Dropping it ends it.
struct Forwarder(Child);

impl Forwarder {
    fn start(directory: &Path, sockets: &[PathBuf], cpu: Option<usize>) -> anyhow::Result<Self> {
        let mut command = Command::new(PROGRAM);
        command.env(RUN, directory);
        // Two threads, of which the first sleeps.
        let on = cpu.map_or("(0,1)".into(), |cpu| cpu.to_string());
        command.args(["--lcores", &format!("0@{on},1@{on}"), "-m", "256"]).args(ALONE);
        for (n, socket) in sockets.iter().enumerate() {
            let _ = std::fs::remove_file(socket);
            command.args(["--vdev", &format!("net_vhost{n},iface={}", socket.display())]);
        }
        command.args(["--", "--auto-start", "--forward-mode=io", "--total-num-mbufs=8192"]);
        let log = directory.join("testpmd.log");
        let out = std::fs::File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let err = out.try_clone().context("a second descriptor of its log")?;
        // It ends when its standard input does.
        command.stdin(Stdio::piped()).stdout(out).stderr(err);
        tie(&mut command, cpu);
        let mut forwarder = Self(command.spawn().with_context(|| format!("starting {PROGRAM}"))?);
        let patience = Instant::now() + e2e::SOON;
        while !sockets.iter().all(|socket| socket.exists()) {
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(status) = forwarder.0.try_wait()? {
                bail!("{PROGRAM} has ended: {status}; it said: {}", said());
            }
            if Instant::now() > patience {
                bail!("{PROGRAM} made no sockets within {:?}; it said: {}", e2e::SOON, said());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(forwarder)
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
