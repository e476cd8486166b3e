//! Nothing outlives a test, also one that is killed.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use e2e::host::Host;
use e2e::qemu::Qemu;
use e2e::{SOON, enter_new_network_namespace, temp_dir, wait_until};

/// Not a test: what the test below kills.
#[test]
#[ignore = "never ends; run by the test below"]
fn a_test_that_hangs() {
    enter_new_network_namespace();
    let host = Host::start();
    host.create("vm", "job=idle", &[]);
    let dir = temp_dir();
    // The word is nothing to the guest: it marks the process.
    let qemu = Qemu::boot(dir.path(), &format!("mark={} job=idle", dir.path().display()), &[]);
    qemu.reports.wait("boot", SOON);
    println!("\ndirectories {} {}", host.dir().display(), dir.path().display());
    std::thread::park();
}

/// Processes whose command line names one of `dirs`.
fn processes(dirs: &[String]) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
    let commands = entries.filter_map(|e| std::fs::read(e.path().join("cmdline")).ok());
    let commands = commands.map(|c| String::from_utf8_lossy(&c).replace('\0', " "));
    commands.filter(|c| dirs.iter().any(|d| c.contains(d.as_str()))).collect()
}

#[test]
fn a_killed_test_leaves_no_process() {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.args(["a_test_that_hangs", "--exact", "--ignored", "--nocapture"]);
    // As nextest ends a test that takes too long: with its process group.
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut test = command.spawn().expect("spawn");
    let mut lines = BufReader::new(test.stdout.take().expect("stdout")).lines();
    let line = lines.find_map(|l| l.expect("line").strip_prefix("directories ").map(str::to_owned));
    let dirs: Vec<_> = line.expect("directories").split(' ').map(str::to_owned).collect();
    let programs =
        ["qemu-system", "offload-blk", "offload-net", "outboard-mgmt", "outboard-hypervisor", "guardian"];
    let running = processes(&dirs);
    for program in programs {
        assert!(running.iter().any(|c| c.contains(program)), "no {program} in {running:#?}");
    }
    let group = nix::unistd::Pid::from_raw(test.id().cast_signed());
    nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL).expect("kill");
    test.wait().expect("wait");
    wait_until("all processes to be gone", SOON, || processes(&dirs).is_empty());
    for dir in dirs {
        std::fs::remove_dir_all(dir).expect("remove what the killed test could not");
    }
}
