use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use super::*;

/// A runner whose "hypervisor" is a shell script. One that a failing test leaves behind must end by itself.
fn runner(dir: &Path, script: &str) -> ProcessRunner {
    let path = dir.join("hypervisor");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
    ProcessRunner::new(&path, &dir.join("vms"))
}

async fn ended(runner: &ProcessRunner, vm: &str) -> Exit {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match runner.liveness(vm).await {
            Liveness::Ended(exit) => return exit,
            Liveness::Alive => assert!(Instant::now() < deadline, "still alive"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn how_a_process_ended_is_told_with_its_last_words() {
    let dir = tempfile::tempdir().expect("directory");
    let runner = runner(dir.path(), "echo first; echo the last words >&2; exit 7");
    runner.start("a").await.expect("start");
    let exit = ended(&runner, "a").await;
    assert_eq!(
        exit,
        Exit { clean: false, how: "exited with status 7".into(), last_words: "the last words".into() }
    );
    runner.stop("a", Duration::ZERO).await.expect("stop");
    runner.clean("a").await;
    assert!(!dir.path().join("vms/a").exists());
}

#[tokio::test]
async fn a_process_runs_in_its_own_session_and_is_ended() {
    let dir = tempfile::tempdir().expect("directory");
    let runner = runner(dir.path(), "exec sleep 30");
    runner.start("a").await.expect("start");
    assert_eq!(runner.liveness("a").await, Liveness::Alive);
    let pid: i32 = fs::read_to_string(dir.path().join("vms/a/pid"))
        .expect("pid file")
        .split(' ')
        .next()
        .and_then(|p| p.parse().ok())
        .expect("pid");
    let session = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid))).expect("session");
    assert_eq!(session.as_raw(), pid);
    runner.stop("a", Duration::ZERO).await.expect("stop");
    assert_eq!(ended(&runner, "a").await.how, "was ended by signal 9");
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "no zombie");
}

#[tokio::test]
async fn a_later_controller_finds_the_process_and_no_other() {
    let dir = tempfile::tempdir().expect("directory");
    let first = runner(dir.path(), "exec sleep 30");
    first.start("a").await.expect("start");
    let second = ProcessRunner::new(Path::new("/nonexistent"), &dir.path().join("vms"));
    assert_eq!(second.liveness("a").await, Liveness::Alive);

    // Another process with the same id, but which started at another time.
    let pid_file = dir.path().join("vms/a/pid");
    let text = fs::read_to_string(&pid_file).expect("pid file");
    let (pid, _) = text.split_once(' ').expect("two fields");
    fs::write(&pid_file, format!("{pid} 1\n")).expect("write");
    assert!(matches!(second.liveness("a").await, Liveness::Ended(_)));

    fs::write(&pid_file, &text).expect("write");
    second.stop("a", Duration::ZERO).await.expect("stop");
    assert_eq!(ended(&first, "a").await.how, "was ended by signal 9");
    assert!(!pid_file.exists());
}

/// A runner of an earlier controller that is gone without having waited for its child, and a later one.
async fn started_earlier(dir: &Path, script: &str) -> ProcessRunner {
    let first = runner(dir, script);
    first.start("a").await.expect("start");
    ProcessRunner::new(&dir.join("hypervisor"), &dir.join("vms"))
}

#[tokio::test]
async fn how_a_process_of_an_earlier_controller_ended_is_told_by_its_socket() {
    let ends: [(&str, bool, &str); 4] = [
        // As a hypervisor does whose guest powers off; `$2` is the socket.
        ("touch $2; rm $2; exit 0", true, ""),
        ("touch $2; rm $2; echo 'KVM said no' >&2; exit 1", false, "KVM said no"),
        // Killed: the socket stays.
        ("touch $2; kill -9 $$", false, ""),
        ("touch $2; echo panicked; kill -6 $$", false, "panicked"),
    ];
    for (script, clean, last_words) in ends {
        let dir = tempfile::tempdir().expect("directory");
        let later = started_earlier(dir.path(), script).await;
        let exit = ended(&later, "a").await;
        assert_eq!((exit.clean, exit.last_words.as_str()), (clean, last_words), "{script}");
    }
    // Of what was never there nothing is known.
    let dir = tempfile::tempdir().expect("directory");
    assert!(!ended(&runner(dir.path(), ""), "never").await.clean);
}

/// Python's, as nothing else that is on every machine listens on a Unix socket.
const LISTENS: &str = r#"exec python3 -c 'import socket, sys, time
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(8); time.sleep(30)' $2"#;

async fn listening(runner: &ProcessRunner) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::os::unix::net::UnixStream::connect(runner.control_socket("a")).is_err() {
        assert!(Instant::now() < deadline, "nobody listens");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn without_a_good_pid_file_the_listener_is_the_process() {
    let dir = tempfile::tempdir().expect("directory");
    for pid_file in ["", "garbage", "12x 7\n", "-1 7\n"] {
        let first = runner(dir.path(), LISTENS);
        first.start("a").await.expect("start");
        let later = ProcessRunner::new(Path::new("/nonexistent"), &dir.path().join("vms"));
        listening(&later).await;
        fs::write(dir.path().join("vms/a/pid"), pid_file).expect("write");
        assert_eq!(later.liveness("a").await, Liveness::Alive, "{pid_file:?}");
        later.stop("a", Duration::ZERO).await.expect("stop");
        assert_eq!(ended(&first, "a").await.how, "was ended by signal 9", "{pid_file:?}");
    }
}

#[tokio::test]
async fn a_process_that_cannot_be_told_is_not_taken_for_gone() {
    let dir = tempfile::tempdir().expect("directory");
    let first = runner(dir.path(), LISTENS);
    first.start("a").await.expect("start");
    listening(&first).await;
    let pid_file = dir.path().join("vms/a/pid");
    let noted = fs::read(&pid_file).expect("pid file");
    fs::write(&pid_file, "").expect("write");
    // Nobody takes connections from its backlog, which fills up.
    let mut backlog = Vec::new();
    let full = loop {
        let (dialled, socket) =
            (tokio::net::UnixStream::connect(first.control_socket("a")).await, backlog.len());
        match dialled {
            Ok(stream) => backlog.push(stream),
            Err(_) => break socket,
        }
        assert!(socket < 100, "no end to the backlog");
    };
    assert!(full > 0);
    let later = ProcessRunner::new(Path::new("/nonexistent"), &dir.path().join("vms"));
    assert_eq!(later.liveness("a").await, Liveness::Alive);
    let e = later.stop("a", Duration::ZERO).await.expect_err("which one?");
    assert!(e.message().contains("control.sock") && e.fact("remedy").is_some(), "{e}");
    fs::write(&pid_file, noted).expect("write");
    later.stop("a", Duration::ZERO).await.expect("stop");
    assert_eq!(ended(&first, "a").await.how, "was ended by signal 9");
}

#[tokio::test]
async fn a_process_whose_pid_cannot_be_written_does_not_stay() {
    let dir = tempfile::tempdir().expect("directory");
    let started = dir.path().join("started");
    let runner = runner(dir.path(), &format!("echo $$ > {}; exec sleep 30", started.display()));
    // A directory cannot be replaced by a file.
    fs::create_dir_all(dir.path().join("vms/a/pid/x")).expect("directory");
    runner.start("a").await.expect_err("cannot be written");
    // It may not even have come to write this.
    if let Ok(pid) = fs::read_to_string(&started) {
        assert!(!Path::new(&format!("/proc/{}", pid.trim())).exists(), "it runs on");
    }
    let left = std::process::Command::new("pgrep").args(["-f", started.to_str().expect("path")]).output();
    assert!(left.expect("pgrep").stdout.is_empty());
    assert!(runner.child("a").is_none());
}

#[tokio::test]
async fn no_process_is_gone_already() {
    let dir = tempfile::tempdir().expect("directory");
    let runner = runner(dir.path(), "exit 0");
    runner.stop("never", Duration::from_secs(60)).await.expect("stop");
    runner.clean("never").await;
}

#[tokio::test]
async fn a_missing_hypervisor_is_named() {
    let dir = tempfile::tempdir().expect("directory");
    let runner = ProcessRunner::new(Path::new("/no/such/hypervisor"), dir.path());
    let e = runner.start("a").await.expect_err("cannot start");
    assert!(e.message().contains("/no/such/hypervisor") && e.fact("remedy").is_some(), "{e}");
}
