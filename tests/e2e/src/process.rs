//! A child process that does not outlive its guard.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running child with its output in a log file. Dropping it kills the child, and shows the log if the test is failing.
pub struct Process {
    child: Child,
    log: PathBuf,
    name: String,
}

impl Process {
    /// Starts `command` with stdout and stderr appended to `log`.
    pub fn spawn(command: &mut Command, log: &Path) -> Self {
        let out = File::options().create(true).append(true).open(log).expect("log file");
        command.stdin(Stdio::null()).stdout(out);
        Self::start(command, log)
    }

    /// The same with its stdout in a pipe, to be read by the caller.
    pub fn spawn_piped(command: &mut Command, log: &Path) -> (Self, ChildStdout) {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = Self::start(command, log);
        let stdout = process.child.stdout.take().expect("stdout");
        (process, stdout)
    }

    /// The same with its stdin in a pipe, too.
    pub fn spawn_talking(command: &mut Command, log: &Path) -> (Self, ChildStdin, ChildStdout) {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Self::start(command, log);
        let stdin = process.child.stdin.take().expect("stdin");
        let stdout = process.child.stdout.take().expect("stdout");
        (process, stdin, stdout)
    }

    fn start(command: &mut Command, log: &Path) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let err = File::options().create(true).append(true).open(log).expect("log file");
        command.stderr(err);
        // SAFETY: prctl is async-signal-safe, and takes no memory of ours.
        unsafe {
            // Nothing may be left behind by a test that was killed itself.
            command.pre_exec(|| nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from))
        };
        let child = command.spawn().unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        Self { child, log: log.to_owned(), name }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).expect("signal a child");
    }

    /// SIGKILL, and waits for the end.
    pub fn kill9(&mut self) {
        self.child.kill().expect("kill a child");
        self.child.wait().expect("wait for a child");
    }

    /// The exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait for a child")
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// If it has not ended within `limit`.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < end, "{} still runs after {limit:?}", self.name);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What it has printed.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(40).collect();
            eprintln!("--- {} ({})", self.name, self.log.display());
            tail.iter().rev().for_each(|line| eprintln!("    {line}"));
        }
    }
}
