//! Old and new versions of the storage card take over from each other: what one has recorded, the other serves.

use std::path::Path;
use std::time::Duration;

use e2e::card::Card;
use e2e::vm::{Vm, config, slot};
use e2e::{SOON, image, temp_dir, wait_until};
use proto::v1::{BlockDeviceSpec, Device};

const JOB: &str = "job=blk-verify bytes=16M queues=2 qd=32 verify=mixed timeout=60";

/// A field with bytes in it, as protobuf writes it.
fn field(number: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for mut value in [number << 3 | 2, content.len() as u32] {
        while value >= 0x80 {
            bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        bytes.push(value as u8);
    }
    [bytes, content.to_vec()].concat()
}

/// The record of disk "disk0" with two queues on `path`, as the first version of the card wrote it: byte by byte, so that nobody
/// changes it by changing the schema. `unknown` is added in the record, the device's specification and the disk's.
fn record(version: u8, path: &Path, unknown: &[u8]) -> Vec<u8> {
    let path = path.to_str().expect("path").as_bytes();
    let block = [&field(1, path)[..], &[0x18, 2], unknown].concat();
    let spec = [&field(1, b"disk0")[..], &field(2, &block), unknown].concat();
    [&[0x08, version], &field(2, &spec)[..], unknown].concat()
}

/// Fields of a version to come: number 1000 is 7, and 1001 a text.
const UNKNOWN: &[u8] = b"\xc0\x3e\x07\xca\x3e\x03new";

fn serves(dir: &Path, name: &str, device: &Device) {
    let vm = Vm::boot(dir, config(name, JOB, vec![slot("disk0", device)]));
    let results = vm.reports.finish(Duration::from_secs(120));
    assert_eq!((&results[0]["errors"], &results[0]["mismatches"]), (&0.into(), &0.into()), "{results:#?}");
}

#[test]
fn what_one_version_of_the_card_has_recorded_another_serves() {
    let dir = temp_dir();
    let disk = image(dir.path(), "disk.img", 32 << 20);
    let mut card = Card::start("offload-blk", dir.path());
    let device = card.block("disk0", &disk, 2);
    let path = dir.path().join("offload-blk/devices/disk0.pb");
    // Of what the first version knew, today's writes nothing else: it is understood there.
    assert_eq!(std::fs::read(&path).expect("record"), record(1, &disk, &[]));
    // And what a newer one wrote that need not be understood is overlooked, at every place.
    card.stop();
    std::fs::write(&path, record(1, &disk, UNKNOWN)).expect("write the record");
    card.restart();
    assert_eq!(card.requests("disk0"), 0);
    serves(dir.path(), "vm", &device);
    // As long as nothing of the device is changed, its record stays what the newer version wrote, which finds it again.
    card.stop();
    assert_eq!(std::fs::read(&path).expect("record"), record(1, &disk, UNKNOWN));
}

#[test]
fn a_record_that_must_be_understood_is_left_alone() {
    let dir = temp_dir();
    let disk = image(dir.path(), "disk.img", 32 << 20);
    let mut card = Card::start("offload-blk", dir.path());
    let spec = |path: &Path| BlockDeviceSpec {
        path: path.to_str().expect("path").to_owned(),
        queues: 2,
        ..Default::default()
    };
    let device = card.create_block("disk0", spec(&disk)).expect("create");
    let path = dir.path().join("offload-blk/devices/disk0.pb");
    card.stop();
    std::fs::write(&path, record(2, &disk, UNKNOWN)).expect("write the record");
    card.restart();
    assert_eq!(card.try_requests("disk0"), None);
    assert!(card.process().log().contains("upgrade the card"), "{}", card.process().log());
    assert_eq!(std::fs::read(&path).expect("record"), record(2, &disk, UNKNOWN));
    // The version that wrote it is back.
    card.stop();
    std::fs::write(&path, record(1, &disk, UNKNOWN)).expect("write the record");
    card.restart();
    wait_until("the disk", SOON, || card.try_requests("disk0") == Some(0));
    serves(dir.path(), "vm", &device);
}
