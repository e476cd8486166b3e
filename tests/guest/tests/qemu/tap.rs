//! The bench guest on TAP devices in a network namespace of its own: several queue pairs, checksums and segmentation left to the
//! device, a host that pings. Needs root.
//!
//! Skipped, with a message, where a namespace cannot be made or `qemu-system-x86_64` is not installed.

use crate::vm::{Accel, Vm, accels, field, one};
use std::process::{Command, Stdio};

/// A namespace with a bridge (10.0.0.254) and TAP devices t1 and t2 on it. Dropping it removes everything.
struct Network(String);

impl Network {
    fn new() -> Option<Self> {
        let this = Self(format!("bench-guest-{}", std::process::id()));
        if !this.ip(&["netns", "add", &this.0]) {
            eprintln!("SKIPPED: `ip netns add` failed (needs root and iproute2)");
            // Nothing to remove.
            std::mem::forget(this);
            return None;
        }
        let inside = |words: &str| {
            let words: Vec<&str> = ["-n", &this.0].into_iter().chain(words.split(' ')).collect();
            assert!(this.ip(&words), "ip {words:?} failed");
        };
        inside("link add br0 type bridge");
        inside("address add 10.0.0.254/24 dev br0");
        inside("link set br0 up");
        for tap in ["t1", "t2"] {
            inside(&format!("tuntap add dev {tap} mode tap multi_queue vnet_hdr"));
            inside(&format!("link set {tap} master br0 up"));
        }
        Some(this)
    }

    #[expect(clippy::unused_self, reason = "only while the namespace exists")]
    fn ip(&self, words: &[&str]) -> bool {
        Command::new("ip").args(words).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    }

    /// Starts guest `number` (1 or 2) on its TAP device, with two queue pairs.
    fn guest(&self, accel: Accel, number: u8, cmdline: &str) -> Vm {
        let netdev = format!("tap,id=n0,ifname=t{number},script=no,downscript=no,queues=2,vhost=off");
        let device = format!(
            "virtio-net-pci,netdev=n0,disable-legacy=on,mq=on,vectors=8,romfile=,mac=52:54:00:00:00:0{number}"
        );
        let args = ["-M", "q35", "-netdev", &netdev, "-device", &device].map(str::to_owned);
        Vm::start_by(&["ip", "netns", "exec", &self.0], accel, &args, cmdline)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.ip(&["netns", "delete", &self.0]);
    }
}

#[test]
fn two_queue_pairs_and_partial_checksums() {
    for (accel, _dir) in accels().into_iter().take(1) {
        let Some(network) = Network::new() else { return };
        let job = |own: u8, peer: u8, more: &str| {
            format!(
                "end=poweroff job=net-exchange ip=10.0.0.{own} peer=10.0.0.{peer} count=2000 queues=2 {more}"
            )
        };
        let first = network.guest(accel, 1, &job(1, 2, "offload=csum"));
        let second = network.guest(accel, 2, &job(2, 1, "mode=irq"));
        for vm in [first, second] {
            let events = vm.run();
            assert_eq!(field(one(&events, "device"), "queues"), 2);
            let result = one(&events, "result");
            assert_eq!((&result["ok"], field(result, "rx")), (&true.into(), 2000), "{result}");
            assert_eq!(field(result, "bad_csum"), 0, "{result}");
        }
    }
}

#[test]
fn super_frames_pass_whole() {
    for (accel, _dir) in accels().into_iter().take(1) {
        let Some(network) = Network::new() else { return };
        let receive = "end=poweroff job=net-recv ip=10.0.0.2 count=50 timeout=60 offload=csum,tso";
        let mut receiver = network.guest(accel, 2, receive);
        receiver.until("io_begin");
        let send = "end=poweroff job=net-send ip=10.0.0.1 peer=10.0.0.2 proto=tcp size=30000 count=50 rate=100 offload=csum,tso";
        let events = network.guest(accel, 1, send).run();
        assert_eq!(one(&events, "done")["ok"], true, "{events:#?}");
        let events = receiver.run();
        let result = one(&events, "result");
        assert_eq!((&result["ok"], field(result, "rx_bytes")), (&true.into(), 50 * 30_000), "{result}");
    }
}

#[test]
fn the_host_pings() {
    for (accel, _dir) in accels().into_iter().take(1) {
        let Some(network) = Network::new() else { return };
        let mut vm =
            network.guest(accel, 1, "end=poweroff job=net-echo ip=10.0.0.1 count=3 secs=60 mode=irq");
        vm.until("io_begin");
        let ping = ["netns", "exec", &network.0, "ping", "-c", "3", "-i", "0.2", "-W", "10", "10.0.0.1"];
        let answered = Command::new("ip").args(ping).stdout(Stdio::null()).status();
        let events = vm.run();
        assert_eq!(one(&events, "done")["ok"], true, "ping: {answered:?}; {events:#?}");
    }
}
