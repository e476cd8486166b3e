//! What a service manager does with the process: it passes the control socket and waits for readiness.

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use proto::v1::GetInfoRequest;

use crate::vm::{Process, SOON, binary, connect};

/// The first descriptor that a service manager passes.
const LISTEN_FDS_START: i32 = 3;

#[tokio::test]
async fn a_passed_socket_is_served_and_readiness_and_end_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, notify) = (directory.path().join("control.sock"), directory.path().join("notify.sock"));
    let listener = UnixListener::bind(&socket).unwrap();
    let notifications = UnixDatagram::bind(&notify).unwrap();
    notifications.set_read_timeout(Some(SOON)).unwrap();
    let passed = listener.as_raw_fd();

    // Only the shell knows the process id that LISTEN_PID must have.
    let mut command = Command::new("sh");
    command
        .args(["-c", "LISTEN_PID=$$ exec \"$0\""])
        .arg(binary().get_program())
        .env("LISTEN_FDS", "1")
        .env("NOTIFY_SOCKET", &notify)
        .stdin(Stdio::null());
    // SAFETY: dup2 and fcntl are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            // dup2 onto itself would leave it to be closed on exec.
            if libc::dup2(passed, LISTEN_FDS_START) < 0 || libc::fcntl(LISTEN_FDS_START, libc::F_SETFD, 0) < 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut process = Process(command.spawn().unwrap());
    drop(listener);

    let mut buffer = [0; 64];
    let length = notifications.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"READY=1\n");
    let mut client = connect(&socket).await;
    assert_eq!(client.get_info(GetInfoRequest {}).await.unwrap().into_inner().pid, process.0.id());
    process.signal(libc::SIGTERM);
    let length = notifications.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"STOPPING=1\n");
    assert_eq!(process.end().code(), Some(0));
    // It is the service manager's.
    assert!(socket.exists());
}

#[test]
fn what_is_no_listening_socket_is_refused() {
    let mut command = Command::new("sh");
    command
        .args(["-c", "LISTEN_PID=$$ exec \"$0\" 3</dev/null"])
        .arg(binary().get_program())
        .env("LISTEN_FDS", "1")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("no listening Unix socket"), "{message}");
}
