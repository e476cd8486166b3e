//! A whole host under test: both cards, the controller, and the `outboard` command, all in one directory.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::card::Card;
use crate::process::Process;
use crate::{SOON, binary, wait_until};

/// Ends the hypervisors of a host whose test was killed: they are no children of ours, and outlive the controller on
/// purpose. Its standard input ends when the test does, however that came; it has a process group of its own, so that it is not
/// killed with it.
const GUARDIAN: &str = r#"
cat >/dev/null
for process in /proc/[0-9]*; do
    if tr '\0' '\n' <"$process/cmdline" 2>/dev/null | grep -qF -- "$1/run/vms/"; then
        kill -9 "${process#/proc/}"
    fi
done
"#;

/// The processes of a host. Dropping it ends them, and every hypervisor the controller has started.
pub struct Host {
    guardian: Child,
    dir: tempfile::TempDir,
    /// The storage card.
    pub storage: Card,
    /// The network card.
    pub network: Card,
    controller: Process,
}

impl Host {
    /// Starts everything, with an empty state. The calling thread should be in a network namespace of its own.
    pub fn start() -> Self {
        let dir = crate::temp_dir();
        let mut guardian = Command::new("sh");
        guardian.args(["-c", GUARDIAN, "guardian"]).arg(dir.path()).process_group(0);
        guardian.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let guardian = guardian.spawn().expect("start sh");
        let storage = Card::start("offload-blk", dir.path());
        let network = Card::start("offload-net", dir.path());
        let controller = Self::spawn_controller(dir.path(), &storage, &network);
        let host = Self { guardian, dir, storage, network, controller };
        host.wait_for_controller();
        host
    }

    fn spawn_controller(dir: &Path, storage: &Card, network: &Card) -> Process {
        let mut command = Command::new(binary("outboard-mgmt"));
        command.arg("--api-socket").arg(dir.join("api.sock"));
        command.arg("--state-dir").arg(dir.join("state")).arg("--runtime-dir").arg(dir.join("run"));
        command.arg("--runner").arg("process");
        command.arg("--card").arg(format!("blk={}", storage.control_socket().display()));
        command.arg("--card").arg(format!("net={}", network.control_socket().display()));
        Process::spawn(&mut command, &dir.join("controller.log"))
    }

    fn wait_for_controller(&self) {
        wait_until("the controller to answer", SOON, || self.outboard(&["vm", "ls"]).status.success());
    }

    /// The directory of it all.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// SIGKILL to the controller, and a new one.
    pub fn kill9_controller_and_restart(&mut self) {
        self.kill9_controller();
        self.start_controller();
    }

    /// SIGKILL to the controller; there is none until [`Host::start_controller`].
    pub fn kill9_controller(&mut self) {
        self.controller.kill9();
    }

    /// A new controller, after [`Host::kill9_controller`].
    pub fn start_controller(&mut self) {
        self.controller = Self::spawn_controller(self.dir.path(), &self.storage, &self.network);
        self.wait_for_controller();
    }

    /// The command with its global options, for a test that runs it in its own way.
    pub fn command(&self) -> Command {
        let mut command = Command::new(binary("outboard"));
        command.arg("--socket").arg(self.dir.path().join("api.sock"));
        command
    }

    /// Runs `outboard ARGS`.
    pub fn outboard(&self, args: &[&str]) -> Output {
        self.command().args(args).output().expect("run outboard")
    }

    /// Runs `outboard ARGS --output json` and parses what it prints.
    ///
    /// # Panics
    /// If it fails.
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.command().args(["--output", "json"]).args(args).output().expect("run outboard");
        let stdout = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "outboard {args:?}: {} {stderr}", output.status);
        serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("outboard {args:?} printed {stdout:?}: {e}"))
    }

    /// Runs `outboard ARGS`, which must fail, and returns what it says.
    pub fn error(&self, args: &[&str]) -> String {
        let output = self.outboard(args);
        assert!(!output.status.success(), "outboard {args:?} succeeded");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// `outboard vm create` of a VM that boots the bench guest.
    pub fn create(&self, name: &str, cmdline: &str, more: &[&str]) -> Value {
        let kernel = binary("bench-guest");
        let kernel = kernel.to_str().expect("path");
        let mut args =
            vec!["vm", "create", name, "--kernel", kernel, "--memory", "128M", "--cmdline", cmdline];
        args.extend(more);
        self.json(&args)
    }

    /// Pids of hypervisor processes of this host.
    pub fn hypervisors(&self) -> Vec<u32> {
        let mark = self.dir.path().to_str().expect("path");
        let entries = std::fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
        let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command);
            command.contains("outboard-hypervisor") && command.contains(mark)
        })
        .collect()
    }

    /// Waits until `outboard vm show NAME` tells `state`.
    pub fn wait_state(&self, name: &str, state: &str, limit: Duration) {
        wait_until(&format!("{name} to be {state}"), limit, || {
            self.json(&["vm", "show", name])["state"] == state
        });
    }

    /// The control socket of a VM's hypervisor, for what goes on while no controller runs.
    pub fn hypervisor_socket(&self, id: &str) -> PathBuf {
        self.dir.path().join("run/vms").join(id).join("control.sock")
    }

    /// What is left of VMs once there should be none: files of the controller and the cards. A VM must have been started.
    ///
    /// # Panics
    /// If a directory is not where it should be: then nothing would ever be found in it.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        self.entries(&["run/vms", "offload-blk/devices", "offload-net/devices"])
    }

    /// The same of networks: files of the card, and interfaces of the calling thread's network namespace.
    pub fn network_leftovers(&self) -> Vec<PathBuf> {
        const KEPT: &str = "offload-net/networks";
        let mut left =
            self.entries(&[KEPT, &format!("{KEPT}/connections"), &format!("{KEPT}/security-groups")]);
        left.retain(|path| !path.is_dir());
        let interfaces = std::fs::read_to_string("/proc/thread-self/net/dev").expect("interfaces");
        assert!(interfaces.contains("lo:"), "no namespace without a loopback: {interfaces}");
        let names = interfaces.lines().filter_map(|l| Some(l.split_once(':')?.0.trim()));
        left.extend(names.filter(|n| *n != "lo").map(PathBuf::from));
        left
    }

    fn entries(&self, dirs: &[&str]) -> Vec<PathBuf> {
        let read = |d: &&str| {
            let dir = self.dir.path().join(d);
            std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        };
        dirs.iter().flat_map(read).map(|e| e.expect("directory entry").path()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for pid in self.hypervisors() {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
        drop(self.guardian.stdin.take());
        let _ = self.guardian.wait();
    }
}
