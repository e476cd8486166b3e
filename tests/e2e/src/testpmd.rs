//! Foreign peers from DPDK: `dpdk-testpmd`, whose ports are virtio-user front-ends of our devices.
//!
//! Its memory is one memfd instead of huge pages (`--no-huge`), so that it takes nothing that would have to be given back.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ChildStdin, Command, ExitStatus};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use proto::v1::Device;

use crate::SOON;
use crate::card::mac_of;
use crate::process::Process;

const PROGRAM: &str = "dpdk-testpmd";

/// What it prints when it has done what it was told.
const PROMPT: &str = "testpmd> ";

/// Frames of one port, as it has counted them since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Frames it got.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames that it could not receive as it should.
    pub rx_errors: u64,
    /// Frames it sent.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
}

/// A `dpdk-testpmd` at its prompt.
pub struct Testpmd {
    process: Process,
    input: ChildStdin,
    output: Receiver<String>,
}

impl Testpmd {
    /// Starts it with a port for each device, in their order, and waits for its prompt. `virtio` are more options of each
    /// port (`mrg_rxbuf=0`), `options` more of the program.
    ///
    /// # Panics
    /// If it does not come so far.
    pub fn start(dir: &Path, devices: &[&Device], virtio: &str, options: &[&str]) -> Self {
        // By line, as if to a terminal: else what it prints comes when it ends.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", PROGRAM]);
        // What it would leave in /var/run goes with the test.
        command.env("RUNTIME_DIRECTORY", dir);
        command.args(["-l", "0,1", "--no-huge", "-m", "128", "--no-pci", "--no-shconf", "--no-telemetry"]);
        for (n, device) in devices.iter().enumerate() {
            let (path, mac) = (&device.socket_path, mac_of(device));
            command.args(["--vdev", &format!("net_virtio_user{n},path={path},mac={mac}{virtio}")]);
        }
        command.args(["--", "--interactive", "--total-num-mbufs=4096", "--no-lsc-interrupt"]).args(options);
        let (process, input, output) = Process::spawn_talking(&mut command, &dir.join("testpmd.log"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || read(BufReader::new(output), &sender));
        let testpmd = Self { process, input, output: lines };
        testpmd.answer();
        testpmd
    }

    /// Gives an order; what it prints to that.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn order(&mut self, order: &str) -> Vec<String> {
        writeln!(self.input, "{order}").expect("testpmd reads");
        self.answer()
    }

    /// What it prints up to its next prompt.
    fn answer(&self) -> Vec<String> {
        let end = Instant::now() + SOON;
        let mut lines = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(line) if line == PROMPT => return lines,
                Ok(line) => lines.push(line),
                Err(e) => panic!("no prompt from {PROGRAM} ({e}); it said:\n{}", lines.join("\n")),
            }
        }
    }

    /// A port's counters.
    pub fn stats(&mut self, port: usize) -> PortStats {
        let lines = self.order(&format!("show port stats {port}"));
        let number = |name: &str| -> u64 {
            let found = lines.iter().find_map(|line| {
                let (_, rest) = line.split_once(name)?;
                rest.split_ascii_whitespace().next()?.parse().ok()
            });
            found.unwrap_or_else(|| panic!("no {name} in {lines:#?}"))
        };
        PortStats {
            rx_packets: number("RX-packets:"),
            rx_bytes: number("RX-bytes:"),
            rx_errors: number("RX-errors:"),
            tx_packets: number("TX-packets:"),
            tx_bytes: number("TX-bytes:"),
        }
    }

    /// SIGKILL.
    pub fn kill9(mut self) {
        self.process.kill9();
    }

    /// Has it end by itself, as when a person tells it to.
    ///
    /// # Panics
    /// If it does not.
    pub fn quit(mut self) -> ExitStatus {
        writeln!(self.input, "quit").expect("testpmd reads");
        self.process.wait(Duration::from_secs(10))
    }
}

/// Sends on whole lines, and prompts, which have no end of line.
fn read(mut from: impl BufRead, to: &mpsc::Sender<String>) {
    let mut partial = String::new();
    loop {
        let taken = match from.fill_buf() {
            Ok([]) | Err(_) => return,
            Ok(bytes) => {
                partial.push_str(&String::from_utf8_lossy(bytes));
                bytes.len()
            }
        };
        from.consume(taken);
        loop {
            let (said, rest) = match (partial.strip_prefix(PROMPT), partial.split_once('\n')) {
                (Some(rest), _) => (PROMPT.to_owned(), rest.to_owned()),
                (None, Some((line, rest))) => (line.trim_end().to_owned(), rest.to_owned()),
                (None, None) => break,
            };
            partial = rest;
            if to.send(said).is_err() {
                return;
            }
        }
    }
}
