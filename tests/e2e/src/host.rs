//! A whole host under test: both cards, the controller, and the `outboard` command, all in one directory.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::card::Card;
use crate::process::Process;
use crate::{SOON, binary, wait_until};

/// The processes of a host. Dropping it ends them, and every hypervisor the controller has started.
pub struct Host {
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
        let storage = Card::start("offload-blk", dir.path());
        let network = Card::start("offload-net", dir.path());
        let controller = Self::spawn_controller(dir.path(), &storage, &network);
        let host = Self { dir, storage, network, controller };
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
        self.controller.kill9();
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

    /// All that is in the controller's runtime directory and the storage card's devices, to see that nothing is left.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        let dirs = ["run/vms", "offload-blk/devices", "offload-net/devices"].map(|d| self.dir.path().join(d));
        let entries = dirs.iter().filter_map(|d| std::fs::read_dir(d).ok()).flatten();
        entries.filter_map(|e| Some(e.ok()?.path())).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for pid in self.hypervisors() {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
    }
}
