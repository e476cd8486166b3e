//! What end-to-end tests and measurements share: starting the real binaries, talking to them over gRPC, reading the bench
//! guest's reports, and taking everything away afterwards.
//!
//! Failures panic: this crate is for tests. Everything started is ended by its own pid when its guard is dropped.

pub mod card;
pub mod frames;
pub mod guest;
pub mod host;
pub mod manager;
pub mod pauses;
pub mod process;
pub mod qemu;
pub mod station;
pub mod testpmd;
pub mod vm;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long anything that should happen at once may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

/// One of our binaries, built beside the running program (or in `$OUTBOARD_BIN_DIR`).
pub fn binary(name: &str) -> PathBuf {
    let dir = std::env::var_os("OUTBOARD_BIN_DIR").map_or_else(
        || {
            let exe = std::env::current_exe().expect("own path");
            let dir = exe.parent().expect("own directory");
            if dir.ends_with("deps") {
                dir.parent().expect("profile directory").to_owned()
            } else {
                dir.to_owned()
            }
        },
        PathBuf::from,
    );
    let path = dir.join(name);
    assert!(path.exists(), "{} is not built: run `cargo build --workspace`", path.display());
    path
}

/// A runtime for gRPC clients; streams are read on its own thread.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("tokio runtime")
}

/// A directory of one's own, short enough for socket paths, removed when dropped.
pub fn temp_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("ob-").tempdir_in("/tmp").expect("temporary directory")
}

/// A sparse raw image of `size` bytes.
pub fn image(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path).and_then(|f| f.set_len(size)).expect("disk image");
    path
}

/// Overwrites `data` at `offset` of a file.
pub fn patch(path: &Path, offset: u64, data: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).open(path).expect("open file");
    file.write_all_at(data, offset).expect("write file");
}

/// Waits until `done` holds, looking every 5 ms.
///
/// # Panics
/// After `limit`, naming `what`.
pub fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + limit;
    while !done() {
        assert!(std::time::Instant::now() < end, "waited {limit:?} in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Puts the calling thread, and what it starts from now on, into a new network namespace, so that a test's TAPs and
/// addresses are nobody else's and go away with it.
pub fn enter_new_network_namespace() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
        .expect("unshare(CLONE_NEWNET): tests run as root");
    let up = std::process::Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .expect("run ip (iproute2)");
    assert!(up.success(), "ip link set lo up: {up}");
}
