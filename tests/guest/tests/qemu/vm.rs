//! A bench guest under QEMU, for tests.

use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// No guest of these tests takes longer.
const PATIENCE: Duration = Duration::from_secs(150);

const QBOOT: &str = "/usr/share/qemu/qboot.rom";

/// How QEMU runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accel {
    /// On the host's CPU.
    Kvm,
    /// By emulation.
    Tcg,
}

/// The ways to run a guest here, each with an empty directory.
pub(crate) fn accels() -> Vec<(Accel, TempDir)> {
    let installed = Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if installed.is_err() {
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed (apt-get install qemu-system-x86)");
        return Vec::new();
    }
    let mut accels = vec![Accel::Tcg];
    if File::options().read(true).write(true).open("/dev/kvm").is_ok() {
        accels.insert(0, Accel::Kvm);
    } else {
        eprintln!("/dev/kvm cannot be opened: emulation only");
    }
    accels.into_iter().map(|accel| (accel, tempfile::tempdir().expect("temporary directory"))).collect()
}

/// An empty raw disk image.
pub(crate) fn disk(dir: &TempDir, bytes: u64) -> PathBuf {
    let path = dir.path().join("disk.img");
    let _ = std::fs::remove_file(&path);
    File::create(&path).and_then(|file| file.set_len(bytes)).expect("image");
    path
}

/// The first event of a name.
pub(crate) fn one<'a>(events: &'a [Value], name: &str) -> &'a Value {
    events
        .iter()
        .find(|event| event["event"] == name)
        .unwrap_or_else(|| panic!("no {name} event in {events:#?}"))
}

/// A number in an event.
pub(crate) fn field(event: &Value, key: &str) -> i64 {
    event[key].as_i64().unwrap_or_else(|| panic!("no number {key} in {event}"))
}

/// Values in the distribution of latencies of a result, which must end with the greatest of them.
pub(crate) fn counted(result: &Value) -> i64 {
    let classes = result["latency"].as_array().unwrap_or_else(|| panic!("no latency in {result}"));
    assert!((1..=120).contains(&classes.len()), "{result}");
    assert_eq!(classes.last().map(|class| &class[0]), Some(&result["max_ns"]), "{result}");
    classes.iter().map(|class| class[1].as_i64().expect("a count")).sum()
}

/// A running guest. Dropping it ends QEMU.
pub(crate) struct Vm {
    qemu: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    deadline: Instant,
}

impl Vm {
    /// Starts QEMU with these arguments and this command line for the guest.
    pub(crate) fn start(accel: Accel, args: &[String], cmdline: &str) -> Self {
        Self::start_by(&[], accel, args, cmdline)
    }

    /// The same through a command that executes QEMU.
    pub(crate) fn start_by(by: &[&str], accel: Accel, args: &[String], cmdline: &str) -> Self {
        let words: Vec<&str> = by.iter().copied().chain(["qemu-system-x86_64"]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        match accel {
            Accel::Kvm => command.args(["-enable-kvm", "-cpu", "host,migratable=off,-arch-capabilities"]),
            // As if there could be a second CPU: with one, QEMU before 8.1 leaves the guest's memory barriers out, although its
            // devices are other threads. Now and then the guest does not see that a kick is wanted, then.
            Accel::Tcg => command.args(["-accel", "tcg", "-smp", "1,maxcpus=2"]),
        };
        // QEMU's smallest firmware. SeaBIOS takes seconds where firmware is emulated.
        if Path::new(QBOOT).exists() {
            command.args(["-bios", QBOOT]);
        }
        command.args(["-m", "128", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]);
        command.args(["-kernel", env!("CARGO_BIN_EXE_bench-guest"), "-append", cmdline]).args(args);
        let mut qemu =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("qemu-system-x86_64 starts");
        let input = qemu.stdin.take().expect("a pipe");
        let output = BufReader::new(qemu.stdout.take().expect("a pipe"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self { qemu, input, lines, deadline: Instant::now() + PATIENCE }
    }

    fn event(&mut self) -> Option<Value> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            // Firmware writes no lines with -nodefaults; everything is an event.
            Ok(line) => {
                Some(serde_json::from_str(&line).unwrap_or_else(|e| panic!("not JSON ({e}): {line}")))
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the guest is not done within {PATIENCE:?}"),
        }
    }

    /// Events up to the first of a name.
    pub(crate) fn until(&mut self, name: &str) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(event) = self.event() {
            let found = event["event"] == name;
            events.push(event);
            if found {
                return events;
            }
        }
        panic!("the guest ended before {name}: {events:#?}");
    }

    /// Writes to the guest's serial port.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.input.write_all(bytes).and_then(|()| self.input.flush()).expect("QEMU reads");
    }

    /// All events until QEMU exits.
    pub(crate) fn run(mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(event) = self.event() {
            events.push(event);
        }
        let status = self.qemu.wait().expect("QEMU ends");
        assert!(status.success(), "QEMU: {status}; events: {events:#?}");
        events
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
