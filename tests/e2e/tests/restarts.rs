//! Invariant 3: the storage card goes and comes back, again and again, at instants that have nothing to do with the I/O;
//! the guest's job completes and verifies. How long the guest waited each time is printed.
//!
//! A few times each in a normal run. More, of optimised binaries, e.g. a thousand:
//!
//! ```text
//! cargo build --release --workspace
//! OUTBOARD_RESTARTS=1000 OUTBOARD_BIN_DIR=target/release \
//!     cargo test -p e2e --test restarts -- --nocapture --test-threads 1 kill9_of_the_card_under_a_polling_guest
//! ```

use std::path::Path;
use std::time::{Duration, Instant};

use e2e::card::Card;
use e2e::guest::Reports;
use e2e::pauses::{Pauses, wanted};
use e2e::qemu::Qemu;
use e2e::vm::{Vm, config, slot};
use e2e::{SOON, image, temp_dir, wait_until};
use proto::v1::Device;

/// What the guest does. Only the random reads and writes take a time; what it does before and after, it does with restarts,
/// too.
const JOB: &str = "job=blk-verify bytes=32M queues=2 qd=32 verify=mixed gaps=0.001 timeout=60";

#[derive(Clone, Copy, PartialEq)]
enum How {
    /// SIGKILL at any instant, also while the card starts.
    Kill,
    /// SIGTERM, as `systemctl restart` does it.
    Planned,
}

enum Front {
    Ours(Box<Vm>),
    Qemu(Qemu),
}

impl Front {
    fn reports(&self) -> &Reports {
        match self {
            Self::Ours(vm) => &vm.reports,
            Self::Qemu(qemu) => &qemu.reports,
        }
    }
}

/// Numbers without a pattern, the same ones every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

fn survives(how: How, what: &str, wanted: usize, boot: impl Fn(&Path, &Device, &str) -> Front) {
    survives_under(how, what, wanted, Duration::ZERO, |dir| Card::start("offload-blk", dir), boot);
}

/// The same with a card of another kind, which has `rest` between a restart and the next.
fn survives_under(
    how: How,
    what: &str,
    wanted: usize,
    rest: Duration,
    start: impl Fn(&Path) -> Card,
    boot: impl Fn(&Path, &Device, &str) -> Front,
) {
    let (mut random, mut pauses) = (Random(0x9e37_79b9), Pauses::default());
    // Then the data is read back, and another guest boots.
    let round = Duration::from_secs((wanted as u64 / 4).clamp(5, 20));
    let job = format!("{JOB} secs={}", round.as_secs());
    while pauses.restarts < wanted {
        let dir = temp_dir();
        let mut card = start(dir.path());
        let device = card.block("disk0", &image(dir.path(), "disk.img", 32 << 20), 2);
        let mut front = boot(dir.path(), &device, &job);
        front.reports().wait("io_begin", SOON);
        let begin = Instant::now();
        let ended = |front: &Front| !front.reports().all("io_end").is_empty();
        let mut instants = Vec::new();
        while pauses.restarts + instants.len() < wanted && begin.elapsed() < round {
            if how == How::Planned || random.below(2) == 0 {
                wait_until("requests after the start", SOON, || {
                    card.try_requests("disk0").is_some_and(|n| n > 200) || ended(&front)
                });
            }
            std::thread::sleep(rest + Duration::from_micros(random.below(40_000)));
            if ended(&front) {
                break;
            }
            instants.push(begin.elapsed());
            match how {
                How::Kill => card.kill9(),
                How::Planned => card.stop(),
            }
            card.start_again();
        }
        let results = front.reports().finish(Duration::from_secs(180));
        let result = &results[0];
        assert_eq!((&result["errors"], &result["mismatches"]), (&0.into(), &0.into()), "{result}");
        assert_eq!(result["needs_reset"], false, "{result}");
        assert!(!instants.is_empty(), "no restart met the guest at work");
        if let Front::Ours(vm) = &mut front {
            // A kill may come before the link is there again, and the last one when the guest is done.
            assert!(vm.info().slots[0].reconnects > 0);
        }
        pauses.add(&instants, result);
    }
    assert!(!pauses.alone.is_empty(), "no pause was seen");
    pauses.print(&format!("{what}, no error, no mismatch"));
}

fn ours(dir: &Path, device: &Device, job: &str) -> Front {
    Front::Ours(Box::new(Vm::boot(dir, config("vm", job, vec![slot("disk0", device)]))))
}

fn ours_with_interrupts(dir: &Path, device: &Device, job: &str) -> Front {
    ours(dir, device, &format!("{job} mode=irq"))
}

fn qemu(dir: &Path, device: &Device, job: &str) -> Front {
    Front::Qemu(Qemu::boot(dir, &format!("end=triple {job}"), &[device]))
}

#[test]
fn kill9_of_the_card_under_a_polling_guest_loses_nothing() {
    survives(How::Kill, "kills under a polling guest", wanted(20), ours);
}

#[test]
fn kill9_of_the_card_under_an_interrupt_driven_guest_loses_nothing() {
    survives(How::Kill, "kills under an interrupt-driven guest", wanted(10), ours_with_interrupts);
}

#[test]
fn kill9_of_the_card_under_qemu_loses_nothing() {
    survives(How::Kill, "kills under QEMU", wanted(4), qemu);
}

#[test]
fn a_planned_restart_of_the_card_loses_nothing() {
    survives(How::Planned, "planned restarts", wanted(20), ours);
}

/// A connection of this age is one that worked: the link connects again at once.
const WORKED: Duration = Duration::from_millis(100);

/// As under systemd: the device's socket listens all the while.
#[test]
fn a_planned_restart_of_a_card_whose_sockets_are_kept_loses_nothing() {
    let start = |dir: &Path| Card::start_managed("offload-blk", dir);
    survives_under(How::Planned, "planned restarts with sockets kept", wanted(20), WORKED, start, ours);
}

#[test]
fn kill9_of_a_card_whose_sockets_are_kept_loses_nothing() {
    let start = |dir: &Path| Card::start_managed("offload-blk", dir);
    survives_under(How::Kill, "kills with sockets kept", wanted(10), WORKED, start, ours);
}

#[test]
fn a_devices_socket_is_kept_for_as_long_as_the_device() {
    let dir = temp_dir();
    let mut card = Card::start_managed("offload-blk", dir.path());
    let device = card.block("disk0", &image(dir.path(), "disk.img", 32 << 20), 1);
    card.block("disk1", &image(dir.path(), "disk1.img", 32 << 20), 1);
    assert_eq!(card.kept(), ["device.disk0", "device.disk1"]);
    card.stop();
    let waiting =
        std::os::unix::net::UnixStream::connect(&device.socket_path).expect("a socket that listens");
    // A record that goes while the card is away.
    std::fs::remove_file(dir.path().join("offload-blk/devices/disk1.pb")).expect("remove a record");
    card.restart();
    assert_eq!(card.kept(), ["device.disk0"]);
    // It is served, and was before anybody else could come.
    let mut vm = Vm::start(dir.path(), "vm");
    let in_use = vm.configure(config("vm", JOB, vec![slot("disk0", &device)])).unwrap_err();
    assert!(in_use.message().contains("closed the connection"), "{in_use}");
    drop(waiting);
    drop(vm);
    card.delete("disk0").expect("delete");
    assert!(card.kept().is_empty());
    assert!(!Path::new(&device.socket_path).exists());
}

#[test]
fn a_planned_restart_of_the_card_under_qemu_loses_nothing() {
    survives(How::Planned, "planned restarts under QEMU", wanted(4), qemu);
}
