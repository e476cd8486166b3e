//! systemd-udevd, where there is one.
//!
//! It looks at every new interface, a moment after it was made, and gives one whose MAC address is the kernel's random choice
//! another (`MACAddressPolicy=persistent` in its default policy). It may have seen the random one and set its own after we
//! have set ours, so it is waited for first.

use std::path::Path;
use std::time::{Duration, Instant};

/// It is there.
const CONTROL: &str = "/run/udev/control";
/// How long a busy one is waited for. One that does not see our interface, because we are in another network namespace, costs
/// this much.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

/// Waits until udev, if it runs, has done what it does to the new interface of this index. False if it has not in time.
pub(super) fn settle(index: u32) -> bool {
    settle_in(Path::new(CONTROL), &Path::new("/run/udev/data").join(format!("n{index}")), PATIENCE)
}

/// `done` is what udev writes when it is done with an interface.
fn settle_in(control: &Path, done: &Path, patience: Duration) -> bool {
    let begin = Instant::now();
    while control.exists() && !done.exists() {
        if begin.elapsed() >= patience {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
    true
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn udev_is_waited_for_where_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let (control, done) = (dir.path().join("control"), dir.path().join("n7"));
        assert!(settle_in(&control, &done, Duration::MAX));
        File::create(&control).unwrap();
        assert!(!settle_in(&control, &done, Duration::from_millis(20)));
        std::thread::scope(|s| {
            let waiter = s.spawn(|| settle_in(&control, &done, Duration::MAX));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiter.is_finished());
            File::create(&done).unwrap();
            assert!(waiter.join().unwrap());
        });
    }
}
