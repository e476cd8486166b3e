//! The daemon as a process of its own, with hypervisors as processes of their own.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::v1::{DeleteVmRequest, ListVmsRequest, VmState};

use crate::support::hypervisor::{Behaviour, Process};
use crate::support::{Client, Setup, client, show, text, until};

/// Not a test: what the script below runs in a hypervisor's place.
#[tokio::test]
#[ignore = "run as a hypervisor by the other tests here"]
async fn a_hypervisor_process() {
    let Some(socket) = std::env::var_os("FAKE_HYPERVISOR_SOCKET") else { return };
    Process::new(Behaviour::default()).serve(Path::new(&socket)).await;
}

struct Daemon {
    child: Child,
    dir: PathBuf,
}

impl Daemon {
    async fn start(setup: &Setup) -> (Self, Client) {
        let dir = setup.dir.path().join("daemon");
        std::fs::create_dir_all(&dir).expect("directory");
        let hypervisor = dir.join("hypervisor");
        let this = text(&std::env::current_exe().expect("own path"));
        let script = format!(
            "#!/bin/sh\nFAKE_HYPERVISOR_SOCKET=\"$2\" exec {this} --exact daemon::a_hypervisor_process --ignored\n"
        );
        std::fs::write(&hypervisor, script).expect("script");
        std::fs::set_permissions(&hypervisor, std::fs::Permissions::from_mode(0o755)).expect("chmod");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).expect("log");
        let child = Command::new(env!("CARGO_BIN_EXE_outboard-mgmt"))
            .args(["--runner", "process", "--hypervisor"])
            .arg(&hypervisor)
            .arg("--api-socket")
            .arg(dir.join("api.sock"))
            .arg("--state-dir")
            .arg(dir.join("state"))
            .arg("--runtime-dir")
            .arg(dir.join("run"))
            .args(["--card", &format!("blk={}", text(&setup.blk.socket()))])
            .args(["--card", &format!("net={}", text(&setup.net.socket()))])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("spawn");
        let socket = dir.join("api.sock");
        let serving = || std::os::unix::net::UnixStream::connect(&socket).is_ok();
        until("the daemon to serve", serving).await;
        let client = client(&socket).await;
        (Self { child, dir }, client)
    }

    fn end(&mut self, signal: Signal) -> Option<i32> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("signal");
        self.child.wait().expect("wait").code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_takes_no_vm_with_it() {
    let (mut setup, _) = Setup::new().await;
    setup.stop().await;
    let (mut daemon, mut client) = Daemon::start(&setup).await;
    let socket = daemon.dir.join("api.sock");
    assert_eq!(std::fs::metadata(&socket).expect("socket").permissions().mode() & 0o777, 0o660);

    let mut request = setup.request("web");
    request.spec.as_mut().expect("spec").nics.clear();
    let id = client.create_vm(request).await.expect("create").into_inner().id;
    let pid = std::fs::read_to_string(daemon.dir.join("run/vms").join(&id).join("pid")).expect("pid file");
    let pid: i32 = pid.split(' ').next().and_then(|p| p.parse().ok()).expect("pid");
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let status = daemon.end(signal);
        assert_eq!(status, (signal == Signal::SIGTERM).then_some(0));
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        (daemon, client) = Daemon::start(&setup).await;
        let vm = show(&mut client, "web").await;
        assert_eq!((vm.state(), &vm.id), (VmState::Running, &id));
    }
    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: true }).await.expect("delete");
    until("the process to be gone", || !Path::new(&format!("/proc/{pid}")).exists()).await;
    assert!(std::fs::read_dir(daemon.dir.join("run/vms")).expect("directory").next().is_none());
    assert!(setup.blk.devices().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hypervisor_that_is_killed_is_a_failed_vm() {
    let (mut setup, _) = Setup::new().await;
    setup.stop().await;
    let (daemon, mut client) = Daemon::start(&setup).await;
    let mut request = setup.request("web");
    request.spec.as_mut().expect("spec").nics.clear();
    let id = client.create_vm(request).await.expect("create").into_inner().id;
    let pid = std::fs::read_to_string(daemon.dir.join("run/vms").join(&id).join("pid")).expect("pid file");
    let pid: i32 = pid.split(' ').next().and_then(|p| p.parse().ok()).expect("pid");
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
    let vm = crate::support::wait_for(&mut client, "web", VmState::Failed).await;
    assert!(vm.detail.contains("was ended by signal 9"), "{}", vm.detail);
    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: false }).await.expect("delete");
    assert!(client.list_vms(ListVmsRequest {}).await.expect("list").into_inner().vms.is_empty());
}

/// Time a process has spent on a CPU, in clock ticks of 10 ms: fields 14 and 15 of proc(5) `/proc/PID/stat`.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let after_name = stat.rsplit_once(')').expect("a name").1;
    let fields = after_name.split_ascii_whitespace().skip(11).take(2);
    fields.map(|f| f.parse::<u64>().expect("ticks")).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_without_file_descriptors_waits_for_some() {
    let (mut setup, _) = Setup::new().await;
    setup.stop().await;
    let (daemon, mut client) = Daemon::start(&setup).await;
    let pid = daemon.child.id();
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("fds").count();
    let limit = format!("--nofile={}", open + 8);
    let set = Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]).status();
    assert!(set.expect("run prlimit (util-linux)").success());
    // The kernel completes connections that nobody takes.
    let connect = || std::os::unix::net::UnixStream::connect(daemon.dir.join("api.sock")).expect("connect");
    let mut connections: Vec<_> = (0..32).map(|_| connect()).collect();
    let log = || std::fs::read_to_string(daemon.dir.join("log")).expect("log");
    until("the daemon to say so", || log().contains("connections cannot be taken")).await;
    // There is room for the next one then, and not for the one after it.
    drop(connections.remove(0));
    let before = cpu_ticks(pid);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let used = cpu_ticks(pid) - before;
    assert!(used < 20, "{used} ticks of CPU in a second");
    assert_eq!(log().matches("connections cannot be taken").count(), 1, "said once, not ten times a second");
    // Who was connected is served meanwhile, and everybody when there are descriptors again.
    client.list_vms(ListVmsRequest {}).await.expect("list");
    drop(connections);
    let mut late = crate::support::client(&daemon.dir.join("api.sock")).await;
    late.list_vms(ListVmsRequest {}).await.expect("list");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_cards_of_one_name_are_refused() {
    let output = Command::new(env!("CARGO_BIN_EXE_outboard-mgmt"))
        .args(["--card", "blk=/a.sock", "--card", "blk=/b.sock", "--state-dir", "/nonexistent/x"])
        .output()
        .expect("run");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("two cards are named blk; give every --card a name of its own"), "{said}");
}

/// Nothing is asked of anybody while nothing happens.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_daemon_uses_no_cpu() {
    let (mut setup, _) = Setup::new().await;
    setup.stop().await;
    let (daemon, mut client) = Daemon::start(&setup).await;
    let mut request = setup.request("web");
    request.spec.as_mut().expect("spec").nics.clear();
    client.create_vm(request).await.expect("create");
    tokio::time::sleep(Duration::from_millis(500)).await;
    let switches = || -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.child.id())).expect("tasks");
        tasks
            .filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("status")).ok())
            .flat_map(|s| {
                let count =
                    |l: &str| l.split_once("ctxt_switches:").and_then(|(_, n)| n.trim().parse::<u64>().ok());
                s.lines().filter_map(count).collect::<Vec<_>>()
            })
            .sum()
    };
    let before = switches();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let wakeups = switches().saturating_sub(before);
    // Idle threads of the blocking pool may just be ending.
    assert!(wakeups <= 6, "{wakeups} wake-ups in 2 s");
    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: true }).await.expect("delete");
}
