//! A VMM process with a bench guest in it, and one measurement of a system that consists of such.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use e2e::guest::{Report, Reports};
use nix::sched::sched_setaffinity;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::probe::cpu_set;

/// How long a guest may take for anything but its work.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long before it is looked whether the guest has reported an error.
const GLANCE: Duration = Duration::from_millis(500);

/// A running VMM. Dropping it kills it.
pub(crate) struct Guest {
    child: Child,
    input: ChildStdin,
    reports: Reports,
    log: PathBuf,
    name: String,
    started: Instant,
    first_byte: Arc<OnceLock<Instant>>,
}

impl Guest {
    /// Starts a VMM whose guest's serial port is its standard input and output, on `cpu` if one is given.
    pub(crate) fn start(
        mut command: Command,
        dir: &Path,
        name: &str,
        cpu: Option<usize>,
    ) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let stderr = std::fs::File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
        tie(&mut command, cpu);
        let program = command.get_program().to_string_lossy().into_owned();
        let started = Instant::now();
        let mut child = command.spawn().with_context(|| format!("starting {program}"))?;
        let input = child.stdin.take().context("no standard input")?;
        let mut output = child.stdout.take().context("no standard output")?;
        let (reports, first_byte) = (Reports::default(), Arc::new(OnceLock::new()));
        let (feed, first) = (reports.clone(), Arc::clone(&first_byte));
        std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(n @ 1..) = output.read(&mut buffer) {
                first.get_or_init(Instant::now);
                feed.feed(&buffer[..n]);
            }
            feed.close();
        });
        Ok(Self { child, input, reports, log, name: name.to_owned(), started, first_byte })
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a report of the guest; not for its whole patience if the guest has said that something is wrong.
    pub(crate) fn wait(&self, event: &str, limit: Duration) -> anyhow::Result<Report> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.reports.try_wait_nth(event, 1, left.min(GLANCE)) {
                Ok(report) => return Ok(report),
                Err(said) if left <= GLANCE || !self.reports.all("error").is_empty() => {
                    let stderr = std::fs::read_to_string(&self.log).unwrap_or_default();
                    let vmm = if stderr.is_empty() { "" } else { "\nits VMM said: " };
                    bail!("guest {}: {said}{vmm}{}", self.name, stderr.trim());
                }
                Err(_) => {}
            }
        }
    }

    /// Waits until the guest has set up its devices, and stops it there.
    pub(crate) fn wait_ready(&self) -> anyhow::Result<()> {
        self.wait("waiting", PATIENCE).map(drop)
    }

    /// Tells a waiting guest to begin.
    pub(crate) fn go(&mut self) -> anyhow::Result<()> {
        self.input.write_all(b"\n").and_then(|()| self.input.flush()).context("talking to the guest")
    }

    /// Stops the process where it is, or lets it go on.
    pub(crate) fn freeze(&self, frozen: bool) -> anyhow::Result<()> {
        let signal = if frozen { Signal::SIGSTOP } else { Signal::SIGCONT };
        kill(Pid::from_raw(self.pid().cast_signed()), signal).context("signalling a VMM")
    }

    /// The result of the first job, when it has come; an error if the job was not ok.
    pub(crate) fn result(&self, limit: Duration) -> anyhow::Result<Report> {
        self.wait("done", limit)?;
        let results = self.reports.all("result");
        let Some(bad) = results.iter().find(|r| r["ok"] != true) else {
            return results.into_iter().next().context("the guest reported no result");
        };
        bail!("guest {}: its job failed: {bad}", self.name)
    }

    /// All results, in the order of the jobs.
    pub(crate) fn results(&self) -> Vec<Report> {
        self.reports.all("result")
    }

    /// From the start of the process to the first byte on the serial port.
    pub(crate) fn first_line(&self) -> Option<Duration> {
        self.first_byte.get().map(|at| at.duration_since(self.started))
    }

    /// Time since the start of the process.
    pub(crate) fn age(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes a command's process die with this one, and begin on `cpu`.
pub(crate) fn tie(command: &mut Command, cpu: Option<usize>) {
    let set = cpu_set(cpu);
    // SAFETY: both are system calls that use no memory but what was copied into the closure.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            sched_setaffinity(Pid::from_raw(0), &set)?;
            Ok(())
        });
    }
}
