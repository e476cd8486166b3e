//! qcow2 disks against `qemu-img`, which makes the images and judges them afterwards.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{
    Card, DRIVER, Guest, OK, PATIENCE, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, pattern, spec,
};
use offload_blk::{BlockDevice, DiskConfig, IoEngine, Store, Threads};
use offload_card::Device;
use offload_card::poll::{PollMode, PollPolicy};
use offload_card::testing::{Buffer, Front};
use proto::v1::{BlockDeviceSpec, ErrorReason, ImageFormat};

const FEATURES: u64 = DRIVER | 1 << 13 | 1 << 14;
const MIB: usize = 1 << 20;

fn qemu_img(arguments: &[&str]) -> String {
    let ran = Command::new("qemu-img").args(arguments).output().expect("qemu-img is installed");
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "qemu-img {arguments:?}: {said}");
    said
}

/// An image of `size` MiB, on `base` if there is one.
fn create(path: &Path, size: usize, options: &str, base: Option<(&Path, &str)>) -> String {
    let (path, size) = (path.to_str().unwrap().to_owned(), format!("{size}M"));
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if let Some((base, format)) = base {
        arguments.extend(["-b", base.to_str().unwrap(), "-F", format]);
    }
    arguments.extend([path.as_str(), &size]);
    qemu_img(&arguments);
    path
}

/// Checks an image that a killed process had open: the kernel lets go of it in its own time.
fn check_when_free(image: &str) {
    let since = Instant::now();
    loop {
        let ran = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2", image]).output().unwrap();
        let said = String::from_utf8_lossy(&ran.stderr);
        if ran.status.success() {
            return;
        }
        assert!(said.contains("Failed to lock") && since.elapsed() < PATIENCE, "{said}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn content(image: &str, dir: &Path) -> Vec<u8> {
    let raw = dir.join("content.raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", image, raw.to_str().unwrap()]);
    fs::read(raw).unwrap()
}

fn disk(store: Store, engine: IoEngine, queues: u16) -> BlockDevice {
    BlockDevice::new(DiskConfig {
        name: "disk".into(),
        store,
        queues,
        queue_size: 64,
        serial: String::new(),
        engine,
        register: Default::default(),
        map_limit: Arc::default(),
        poll: PollPolicy { mode: PollMode::Adaptive, ..Default::default() },
        host: Arc::new(Threads::default()),
        storage: Arc::default(),
        mode_file: None,
    })
    .unwrap()
}

fn start(disk: &BlockDevice, guest: &mut Guest) {
    for (index, queue) in (0..).zip(&mut guest.queues) {
        queue.index = index;
        disk.start_queue(queue.ring(None).unwrap().0).unwrap();
    }
}

fn stop(disk: BlockDevice, queues: u16) {
    for queue in 0..queues {
        disk.stop_queue(queue, Instant::now() + PATIENCE).unwrap().expect("it was started");
    }
    disk.close();
    drop(disk);
}

/// Begins a DISCARD or WRITE_ZEROES of one range.
fn begin_erase(guest: &mut Guest, queue: usize, slot: u64, kind: u32, sector: u64, sectors: u32, unmap: u32) {
    let (header, status, data) = guest.write_header(slot, kind, 0);
    guest.set_data(slot, &[&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &unmap.to_le_bytes()].concat());
    let queue = &mut guest.queues[queue];
    queue
        .add(&[Buffer::readable(header, 16), Buffer::readable(data, 16), Buffer::writable(status, 1)])
        .expect("room");
    queue.kick();
}

fn erase(guest: &mut Guest, kind: u32, sector: u64, sectors: u32, unmap: u32) -> u8 {
    begin_erase(guest, 0, 0, kind, sector, sectors, unmap);
    guest.queues[0].wait_used(PATIENCE).expect("an answer");
    guest.status(0)
}

/// xorshift, so that a failure comes again.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Any mixture of requests on both queues, 16 at a time, on parts of the disk of their own: what is read is what was
/// written, and `qemu-img` finds the same and nothing to complain about.
fn mixture(
    name: &str,
    engine: IoEngine,
    direct: bool,
    through: bool,
    make: impl Fn(&Path) -> (String, Vec<u8>),
) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, mut truth) = make(dir.path());
    let disk = disk(Store::qcow2(&image, false, direct).unwrap(), engine, 2);
    if through {
        disk.write_config(32, &[0]).unwrap();
    }
    let mut guest = Guest::new(2, 64, FEATURES);
    start(&disk, &mut guest);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    // Slots have parts of 1 MiB each, which begin in the middle of a cluster, so that clusters are shared.
    let part = |slot: u64| slot * 2048 + 37;
    for round in 1..60u64 {
        let mut expected = Vec::new();
        for slot in 0..16u64 {
            let queue = (slot % 2) as usize;
            let most = if random.below(4) == 0 { 500 } else { 20 };
            let sectors = 1 + random.below(most);
            let sector = part(slot) + random.below(2048 - sectors);
            let (at, length) = (sector as usize * 512, sectors as usize * 512);
            match random.below(10) {
                0..4 => {
                    let data = pattern(sector, round, length);
                    guest.set_data(slot, &data);
                    truth[at..at + length].copy_from_slice(&data);
                    guest.begin(queue, slot, T_OUT, sector, length as u32);
                }
                4..8 => {
                    guest.begin(queue, slot, T_IN, sector, length as u32);
                    expected.push((slot, truth[at..at + length].to_vec(), sector));
                }
                8 => {
                    truth[at..at + length].fill(0);
                    let unmap = random.below(2) as u32;
                    begin_erase(&mut guest, queue, slot, T_WRITE_ZEROES, sector, sectors as u32, unmap);
                }
                _ => {
                    guest.begin(queue, slot, T_FLUSH, 0, 0);
                }
            }
        }
        for i in 0..16 {
            guest.queues[i % 2].wait_used(PATIENCE).expect("an answer");
        }
        for slot in 0..16 {
            assert_eq!(guest.status(slot), OK, "{name}: round {round}, slot {slot}");
        }
        for (slot, data, sector) in expected {
            assert!(guest.data(slot, data.len()) == data, "{name}: round {round}, sector {sector}");
        }
    }
    stop(disk, 2);
    assert!(content(&image, dir.path()) == truth, "{name}: qemu-img finds something else");
    qemu_img(&["check", "-q", "-f", "qcow2", &image]);
}

/// 17 MiB without a backing file.
fn plain(dir: &Path) -> (String, Vec<u8>) {
    (create(&dir.join("disk.qcow2"), 17, "cluster_size=64k", None), vec![0; 17 * MIB])
}

/// On a raw file that is shorter, named relative to the image.
fn on_raw(dir: &Path) -> (String, Vec<u8>) {
    let base = pattern(0, 99, 9 * MIB);
    fs::write(dir.join("base.raw"), &base).unwrap();
    let image = create(&dir.join("disk.qcow2"), 17, "cluster_size=4k", Some((Path::new("base.raw"), "raw")));
    let mut truth = base;
    truth.resize(17 * MIB, 0);
    (image, truth)
}

/// On a compressed image, which is on a third; with narrow reference counts.
fn on_compressed(dir: &Path) -> (String, Vec<u8>) {
    let data = pattern(0, 98, 17 * MIB);
    fs::write(dir.join("x.raw"), &data).unwrap();
    let (raw, base) = (dir.join("x.raw"), dir.join("base.qcow2"));
    let names = [raw.to_str().unwrap(), base.to_str().unwrap()];
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", names[0], names[1]]);
    let middle = dir.join("middle.qcow2");
    create(&middle, 17, "compat=1.1", Some((&base, "qcow2")));
    (create(&dir.join("disk.qcow2"), 17, "refcount_bits=1", Some((&middle, "qcow2"))), data)
}

/// Compressed itself, and of the old version.
fn old_and_compressed(dir: &Path) -> (String, Vec<u8>) {
    let data = pattern(0, 97, 17 * MIB);
    fs::write(dir.join("x.raw"), &data).unwrap();
    let (raw, image) = (dir.join("x.raw"), dir.join("disk.qcow2"));
    let names = [raw.to_str().unwrap(), image.to_str().unwrap()];
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compat=0.10", names[0], names[1]]);
    (names[1].to_owned(), data)
}

/// With a snapshot inside, whose clusters must not change.
fn with_snapshot(dir: &Path) -> (String, Vec<u8>) {
    let data = pattern(0, 96, 17 * MIB);
    fs::write(dir.join("x.raw"), &data).unwrap();
    let (raw, image) = (dir.join("x.raw"), dir.join("disk.qcow2"));
    let names = [raw.to_str().unwrap(), image.to_str().unwrap()];
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", names[0], names[1]]);
    qemu_img(&["snapshot", "-c", "before", names[1]]);
    (names[1].to_owned(), data)
}

#[test]
fn any_mixture_of_requests_on_a_plain_image() {
    mixture("io_uring", IoEngine::IoUring, false, false, plain);
    mixture("system calls", IoEngine::Sync, false, false, plain);
    mixture("direct", IoEngine::Auto, true, false, plain);
    mixture("write-through", IoEngine::Auto, false, true, plain);
}

#[test]
fn any_mixture_of_requests_on_a_backing_file() {
    mixture("io_uring on raw", IoEngine::Auto, false, false, on_raw);
    mixture("direct on raw", IoEngine::Auto, true, false, on_raw);
    mixture("system calls on raw", IoEngine::Sync, false, true, on_raw);
    mixture("on compressed", IoEngine::Auto, false, false, on_compressed);
}

#[test]
fn any_mixture_of_requests_on_what_other_tools_made() {
    mixture("old and compressed", IoEngine::Auto, false, false, old_and_compressed);
    mixture("snapshot", IoEngine::Auto, false, false, with_snapshot);
}

/// Space is given back in the file, and a cluster of the backing file does not come to light again.
#[test]
fn what_is_discarded_is_given_back() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, truth) = on_raw(dir.path());
    let disk = disk(Store::qcow2(&image, false, false).unwrap(), IoEngine::Auto, 1);
    assert_eq!(disk.identity().features >> 13 & 3, 3);
    let mut guest = Guest::new(1, 64, FEATURES);
    start(&disk, &mut guest);
    let blocks = || fs::metadata(&image).unwrap().blocks();
    for i in 0..32 {
        guest.set_data(0, &pattern(i * 512, 1, 256 << 10));
        assert_eq!(guest.run(0, T_OUT, i * 512, 256 << 10), OK);
    }
    assert_eq!(guest.run(0, T_FLUSH, 0, 0), OK);
    let full = blocks();
    assert!(full >= 16384);
    assert_eq!(erase(&mut guest, T_DISCARD, 0, 8192, 0), OK);
    assert!(full - blocks() >= 8100, "{full} {}", blocks());
    assert_eq!(erase(&mut guest, T_WRITE_ZEROES, 16384, 2048, 1), OK);
    let before = blocks();
    guest.set_data(0, &[1; 4096]);
    for sector in [0, 8184, 16384, 18424] {
        assert_eq!(guest.run(0, T_IN, sector, 4096), OK);
        assert!(guest.data(0, 4096) == [0; 4096], "sector {sector}");
    }
    for sector in [8192, 18432] {
        assert_eq!(guest.run(0, T_IN, sector, 4096), OK);
        let old = if sector == 8192 { pattern(8192, 1, 4096) } else { truth[18432 * 512..][..4096].to_vec() };
        assert!(guest.data(0, 4096) == old, "sector {sector}");
    }
    assert_eq!(blocks(), before);
    stop(disk, 1);
    qemu_img(&["check", "-q", "-f", "qcow2", &image]);
}

#[test]
fn a_killed_card_loses_nothing_of_a_qcow2_disk() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (path, mut truth) = on_raw(dir.path());
    let mut card = Card::start(dir.path(), &[]);
    let format = ImageFormat::Qcow2.into();
    let block = BlockDeviceSpec { path: path.clone(), format, ..Default::default() };
    let device = card.create(&spec("d", block)).unwrap();
    let info = card.inspect(&path).unwrap();
    assert_eq!((info.format.as_str(), info.size_bytes), ("qcow2", 17 << 20));
    assert_eq!(info.backing_file, "base.raw");
    for round in 0..5u64 {
        let mut front = Front::connect_within(Path::new(&device.socket_path), PATIENCE);
        let mut guest = Guest::new(1, 64, FEATURES);
        guest.connect(&mut front);
        for i in 0..20 {
            let sector = (round * 7 + i * 61) % 500 * 64 + 3;
            let data = pattern(sector, round + 1, 20 << 9);
            guest.set_data(0, &data);
            assert_eq!(guest.run(0, T_OUT, sector, 20 << 9), OK);
            truth[sector as usize * 512..][..20 << 9].copy_from_slice(&data);
        }
        // Answered, and not flushed.
        card.kill();
        check_when_free(&path);
        card.restart();
    }
    card.delete("d").unwrap();
    assert!(content(&path, dir.path()) == truth);
}

#[test]
fn a_qcow2_disk_grows() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // The backing file is longer than the image: what is behind its end must not come to light.
    fs::write(dir.path().join("base.raw"), pattern(0, 5, 9 * MIB)).unwrap();
    let path =
        create(&dir.path().join("d.qcow2"), 3, "cluster_size=64k", Some((Path::new("base.raw"), "raw")));
    let disk = disk(Store::qcow2(&path, false, false).unwrap(), IoEngine::Auto, 1);
    let mut guest = Guest::new(1, 64, FEATURES);
    start(&disk, &mut guest);
    assert_eq!(guest.run(0, T_IN, 3 * 2048, 4096), 1);
    for bad in [2 << 20, (4 << 20) + 1, 1 << 60] {
        assert_eq!(disk.resize(bad).unwrap_err().reason(), ErrorReason::InvalidField);
    }
    assert!(disk.resize(2 << 30).unwrap() && !disk.resize(2 << 30).unwrap());
    let mut capacity = [0; 8];
    disk.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 4 << 20);
    guest.set_data(0, &[1; 4096]);
    assert_eq!(guest.run(0, T_IN, 3 * 2048, 4096), OK);
    assert!(guest.data(0, 4096) == [0; 4096]);
    guest.set_data(0, &pattern(9, 9, 4096));
    assert_eq!(guest.run(0, T_OUT, (4 << 20) - 8, 4096), OK);
    stop(disk, 1);
    assert!(qemu_img(&["info", &path]).contains("(2147483648 bytes)"));
    qemu_img(&["check", "-q", "-f", "qcow2", &path]);
    let again = Store::qcow2(&path, true, false).unwrap();
    assert_eq!(again.geometry().size_bytes, 2 << 30);
}

#[test]
fn chains_are_locked_bounded_and_said_what_is_wrong_with() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let at = |name: &str| dir.path().join(name);
    let open = |path: &str| Store::qcow2(path, false, false);
    let (path, _) = on_raw(dir.path());
    let base = at("base.raw");
    let base = base.to_str().unwrap();
    let opened = open(&path).unwrap();
    let refused = open(&path).unwrap_err();
    assert_eq!(refused.reason(), ErrorReason::DiskInUse);
    // Another may stand on the same base, but nobody may write to it.
    let other = create(&at("other.qcow2"), 17, "compat=1.1", Some((&at("base.raw"), "raw")));
    drop(open(&other).unwrap());
    assert_eq!(offload_blk::Image::open(base, false, false).unwrap_err().reason(), ErrorReason::DiskInUse);
    drop(opened);
    let writer = offload_blk::Image::open(base, false, false).unwrap();
    let refused = open(&path).unwrap_err();
    assert_eq!(refused.reason(), ErrorReason::DiskInUse);
    assert!(refused.message().contains("base.raw") && refused.message().contains("disk.qcow2"), "{refused}");
    drop(writer);

    let says = |path: &str, reason: ErrorReason, what: &str| {
        let e = open(path).unwrap_err();
        assert_eq!(e.reason(), reason, "{e}");
        assert!(e.message().contains(what), "{e}");
        assert!(e.fact("remedy").is_some(), "{e}");
    };
    // A raw image is not taken for another, nor is another served as one that does not say which format it has.
    says(base, ErrorReason::DiskInvalid, "does not begin like one");
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "vmdk", "-b", "base.raw", &path]);
    says(&path, ErrorReason::DiskInvalid, "\"vmdk\"");
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "gone.raw", &path]);
    says(&path, ErrorReason::DiskNotFound, "gone.raw");
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "nbd://x/y", &path]);
    says(&path, ErrorReason::Unsupported, "nbd://");
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &path, &path]);
    says(&path, ErrorReason::DiskInUse, "disk.qcow2");
    // A ring of others, which nobody writes to.
    let (a, b) = (at("a.qcow2"), at("b.qcow2"));
    let (a, b) = (create(&a, 1, "compat=1.1", None), create(&b, 1, "compat=1.1", None));
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &b, &a]);
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &a, &b]);
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &a, &path]);
    says(&path, ErrorReason::DiskInvalid, "chain of more than");
}

/// Whether a disk could be made is found out without writing: not even the marks that a writer has to take away.
#[test]
fn checking_a_disk_leaves_its_image_as_it_is() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (path, _) = plain(dir.path());
    // An autoclear feature: there are bitmaps, and they are right.
    let file = File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], 95).unwrap();
    let before = fs::read(&path).unwrap();
    let card = Card::start(dir.path(), &[]);
    let format = ImageFormat::Qcow2.into();
    let disk = spec("d", BlockDeviceSpec { path: path.clone(), format, ..Default::default() });
    card.create_or_check(&disk, true).unwrap();
    assert!(fs::read(&path).unwrap() == before);
    card.create(&disk).unwrap();
    assert_eq!(fs::read(&path).unwrap()[95], 0);
}

/// Not by a rule for images, but by the format given: what a guest writes changes nothing.
#[test]
fn a_raw_image_that_looks_like_qcow2_stays_raw() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (path, _) = plain(dir.path());
    let size = fs::metadata(&path).unwrap().len().next_multiple_of(512);
    File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
    let card = Card::start(dir.path(), &[]);
    let block = BlockDeviceSpec { path: path.clone(), ..Default::default() };
    let device = card.create(&spec("d", block)).unwrap();
    let mut front = Front::connect_within(Path::new(&device.socket_path), PATIENCE);
    assert_eq!(front.config(0, 8), (size / 512).to_le_bytes());
    let bad = BlockDeviceSpec { path, format: 9, ..Default::default() };
    assert_eq!(card.create(&spec("e", bad)).unwrap_err().reason(), ErrorReason::InvalidField);
}
