use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use super::*;

/// A runner whose "hypervisor" is a shell script.
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
    let runner = runner(dir.path(), "exec sleep 1000");
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
    let first = runner(dir.path(), "exec sleep 1000");
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
