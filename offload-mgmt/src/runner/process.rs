//! Hypervisors as children of the controller, each in a session of its own: for hosts without systemd, and for tests.
//!
//! `DIR/ID/` holds `control.sock`, `hypervisor.log` and `pid`. The pid file names the process by its id and start time,
//! so that a later controller never takes another process for it. A hypervisor that ends in order removes its socket; that
//! is how a controller that was not there knows, as a process's status is told to its parent only.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use proto::error::{Error, ErrorReason};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tonic::Code;

use super::{Exit, Liveness, Runner};
use crate::controller::host::host_error;
use crate::controller::rpc::listener_pid;

/// How long a killed process may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// How much of a log's end is read for a process's last words, in bytes.
const TAIL: u64 = 2048;

/// The runner.
#[derive(Debug)]
pub struct ProcessRunner {
    hypervisor: PathBuf,
    dir: PathBuf,
    // Processes this controller started, with their exit status once they have ended.
    children: Mutex<HashMap<String, watch::Receiver<Option<ExitStatus>>>>,
}

impl ProcessRunner {
    /// Runs `hypervisor`; keeps each VM's files in a directory of its own under `dir`.
    pub fn new(hypervisor: &Path, dir: &Path) -> Self {
        Self { hypervisor: hypervisor.to_owned(), dir: dir.to_owned(), children: Mutex::default() }
    }

    fn file(&self, vm: &str, name: &str) -> PathBuf {
        self.dir.join(vm).join(name)
    }

    fn child(&self, vm: &str) -> Option<watch::Receiver<Option<ExitStatus>>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner).get(vm).cloned()
    }

    /// The VM's process, held so that its id cannot come to mean another one; `None` if it is gone.
    ///
    /// # Errors
    /// There is one and it is not known which.
    async fn process(&self, vm: &str) -> io::Result<Option<OwnedFd>> {
        let noted = fs::read_to_string(self.file(vm, "pid")).ok().and_then(|text| {
            let (pid, start_time) = text.trim().split_once(' ')?;
            let pid = pid.parse().ok().filter(|p: &i32| *p > 0)?;
            Some((pid, start_time.to_owned()))
        });
        let (pid, start_time) = match noted {
            Some((pid, start_time)) => (pid, Some(start_time)),
            None => {
                // The controller that started it died before it could write the file; who listens on its socket is it.
                let socket = self.control_socket(vm);
                let listener = tokio::task::spawn_blocking(move || listener_pid(&socket)).await;
                match listener.map_err(io::Error::other)?? {
                    Some(pid) => (pid, None),
                    None => return Ok(None),
                }
            }
        };
        let process = Pid::from_raw(pid).and_then(|p| pidfd_open(p, PidfdFlags::empty()).ok());
        let same = start_time.is_none() || start_time == start_time_of(pid);
        Ok(process.filter(|_| same))
    }

    /// Whether a process that is gone ended in order, as far as can be seen afterwards.
    fn ended_in_order(&self, vm: &str, last_words: &str) -> bool {
        let socket_gone = matches!(self.control_socket(vm).try_exists(), Ok(false));
        // A failure is logged.
        self.dir.join(vm).is_dir() && socket_gone && last_words.is_empty()
    }

    async fn spawn(&self, vm: &str) -> io::Result<()> {
        let dir = self.dir.join(vm);
        // Only the controller's user and group may reach a VM's socket.
        fs::DirBuilder::new().recursive(true).mode(0o750).create(&dir)?;
        let socket = self.control_socket(vm);
        if let Err(e) = fs::remove_file(&socket)
            && e.kind() != io::ErrorKind::NotFound
        {
            return Err(e);
        }
        let log = File::create(self.file(vm, "hypervisor.log"))?;
        let mut command = Command::new(&self.hypervisor);
        command
            .arg("--control")
            .arg(&socket)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(false);
        // They are this process's own conversation with systemd.
        for name in ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC"] {
            command.env_remove(name);
        }
        new_session(&mut command);
        let mut child = command.spawn()?;
        if let Err(e) = self.write_pid(vm, &child) {
            // Nobody would find it again. A zombie, should the kill fail, is reaped by the runtime.
            child.kill().await?;
            return Err(e);
        }
        let (ended, status) = watch::channel(None);
        self.children.lock().unwrap_or_else(PoisonError::into_inner).insert(vm.to_owned(), status);
        tokio::spawn(async move {
            if let Ok(status) = child.wait().await {
                ended.send_replace(Some(status));
            }
        });
        Ok(())
    }

    /// Writes which process it is: all of the file or none.
    fn write_pid(&self, vm: &str, child: &Child) -> io::Result<()> {
        let pid = child.id().and_then(|p| i32::try_from(p).ok());
        let known = pid.and_then(|p| Some((p, start_time_of(p)?)));
        let (pid, start_time) =
            known.ok_or_else(|| io::Error::other("/proc does not tell its start time"))?;
        let new = self.file(vm, "pid.new");
        fs::write(&new, format!("{pid} {start_time}\n"))?;
        fs::rename(&new, self.file(vm, "pid"))
    }

    fn last_words(&self, vm: &str) -> String {
        let read = || -> io::Result<String> {
            let mut file = File::open(self.file(vm, "hypervisor.log"))?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
            let mut bytes = Vec::new();
            file.take(TAIL).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = read().unwrap_or_default();
        text.lines().rev().map(str::trim).find(|l| !l.is_empty()).unwrap_or_default().to_owned()
    }
}

#[tonic::async_trait]
impl Runner for ProcessRunner {
    fn control_socket(&self, vm: &str) -> PathBuf {
        self.file(vm, "control.sock")
    }

    fn log_hint(&self, vm: &str) -> String {
        format!("see {}", self.file(vm, "hypervisor.log").display())
    }

    async fn start(&self, vm: &str) -> Result<(), Error> {
        self.spawn(vm).await.map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::new(
                Code::FailedPrecondition,
                ErrorReason::Host,
                format!("the hypervisor {} cannot be started: {e}", self.hypervisor.display()),
            )
            .resource(self.hypervisor.display().to_string())
            .remedy("start outboard-mgmt with --hypervisor PATH"),
            _ => host_error(&format!("starting {}", self.hypervisor.display()), &e),
        })
    }

    async fn liveness(&self, vm: &str) -> Liveness {
        if let Some(child) = self.child(vm) {
            let status = *child.borrow();
            return match status {
                None => Liveness::Alive,
                Some(status) => Liveness::Ended(Exit {
                    clean: status.success(),
                    how: describe(status),
                    last_words: self.last_words(vm),
                }),
            };
        }
        match self.process(vm).await {
            // Of one that cannot be told it is only known that it is there.
            Ok(Some(_)) | Err(_) => Liveness::Alive,
            Ok(None) => {
                let last_words = self.last_words(vm);
                let clean = self.ended_in_order(vm, &last_words);
                Liveness::Ended(Exit { clean, how: String::new(), last_words })
            }
        }
    }

    async fn stop(&self, vm: &str, grace: Duration) -> Result<(), Error> {
        let process = self.process(vm).await.map_err(|e| {
            let socket = self.control_socket(vm).display().to_string();
            Error::new(
                Code::Internal,
                ErrorReason::HypervisorUnreachable,
                format!("it is not known which process is VM {vm}'s, that listens on {socket}: {e}"),
            )
            .resource(vm)
            .remedy(format!("find it with: ss -xlp src {socket}; end it and try again"))
        })?;
        if let Some(process) = process {
            let process = Arc::new(process);
            if !gone_within(&process, grace).await {
                // It may end by itself just now, which is as good.
                let _ = pidfd_send_signal(&*process, Signal::KILL);
                if !gone_within(&process, KILL_DEADLINE).await {
                    return Err(Error::new(
                        Code::Internal,
                        ErrorReason::HypervisorUnreachable,
                        format!("the hypervisor process of VM {vm} does not end although it was killed"),
                    )
                    .resource(vm)
                    .remedy("look at the kernel's log; the process waits in the kernel"));
                }
            }
        }
        if let Some(mut child) = self.child(vm) {
            // Reaped, so that no zombie is left when this returns.
            let _ = tokio::time::timeout(KILL_DEADLINE, child.wait_for(Option::is_some)).await;
        }
        for name in ["control.sock", "pid"] {
            let _ = fs::remove_file(self.file(vm, name));
        }
        Ok(())
    }

    async fn clean(&self, vm: &str) {
        self.children.lock().unwrap_or_else(PoisonError::into_inner).remove(vm);
        match fs::remove_dir_all(self.dir.join(vm)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(vm, "{} not removed: {e}", self.dir.join(vm).display());
            }
            _ => {}
        }
    }
}

/// Waits for a process to end, whoever's child it is: a pidfd becomes readable then (pidfd_open(2)).
async fn gone_within(process: &Arc<OwnedFd>, time: Duration) -> bool {
    let process = Arc::clone(process);
    let wait = move || -> io::Result<bool> {
        let deadline = Instant::now() + time;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut fds = [PollFd::new(&*process, PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Err(rustix::io::Errno::INTR) => {}
                ready => return Ok(ready? > 0),
            }
        }
    };
    matches!(tokio::task::spawn_blocking(wait).await, Ok(Ok(true)))
}

/// Has the child leave the controller's session and process group, so that no signal meant for the controller's
/// terminal or group reaches it.
#[expect(unsafe_code, reason = "pre_exec has no safe form; Command::setsid is not stable")]
fn new_session(command: &mut Command) {
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe functions may be called (POSIX
    // "fork", signal-safety(7)): setsid(2) is one, and turning its errno into io::Error allocates nothing.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(io::Error::from));
    }
}

/// When a process started, in clock ticks since boot: field 22 of proc(5) `/proc/PID/stat`.
fn start_time_of(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in parentheses, may contain anything.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19).map(str::to_owned)
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

#[cfg(test)]
#[path = "process_tests.rs"]
mod tests;
