//! A qcow2 file that somebody has damaged on purpose: it is refused, or served as a disk to a guest that uses it.
//!
//! Whatever its tables say, requests are answered, and it costs neither memory nor time without bounds.
#![no_main]

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use fuzz::PATIENCE;
use fuzz::input::Input;
use fuzz::memfd::{memfd, path};
use libfuzzer_sys::fuzz_target;
use offload_blk::{BlockDevice, DiskConfig, Inline, IoEngine, Register, Store};
use offload_card::Device;
use offload_card::poll::{PollMode, PollPolicy};
use offload_card::ring::FEATURES;
use offload_card::testing::{Buffer, DriverQueue, TestGuest};
use vm_memory::{Bytes, GuestAddress};

const CLUSTER: usize = 4096;
const CLUSTERS: usize = 16;
const MAX_PATCHES: u8 = 12;
const MAX_REQUESTS: usize = 24;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

const HEADER: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STATUS: u64 = 0x1_1000;

/// 4 MiB in clusters of 4 KiB: header, refcount table, refcount block, level 1, level 2, data. Some clusters of the disk are data,
/// one is zeros, one is compressed (badly), and most are nowhere.
fn sound() -> Vec<u8> {
    let mut image = vec![0; CLUSTERS * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &12u32.to_be_bytes());
    put(24, &(4u64 << 20).to_be_bytes());
    put(36, &2u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    (0..9).for_each(|i| put(2 * CLUSTER + 2 * i, &1u16.to_be_bytes()));
    put(3 * CLUSTER, &(COPIED | 4 * CLUSTER as u64).to_be_bytes());
    let entries =
        [COPIED | 5 * CLUSTER as u64, COPIED | 6 * CLUSTER as u64, 1, COMPRESSED | 7 * CLUSTER as u64];
    (0..).zip(entries).for_each(|(i, entry)| put(4 * CLUSTER + 8 * i, &entry.to_be_bytes()));
    put(5 * CLUSTER, &[0x5a; 4 * CLUSTER]);
    image
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let choices = input.u8();
    let mut image = sound();
    for _ in 0..input.u8() % MAX_PATCHES {
        let cluster = usize::from(input.u8()) % 9;
        // Tables are interesting at their beginnings.
        let at =
            if input.rarely(4) { usize::from(input.u16()) % CLUSTER } else { usize::from(input.u8() % 128) };
        let length = 1 + usize::from(input.u8() % 8);
        let bytes = input.bytes(length);
        let at = cluster * CLUSTER + at;
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    if choices & 1 != 0 {
        image.truncate(usize::from(input.u16()).min(image.len()));
    }
    let file = memfd(image.len() as u64, false);
    file.write_all_at(&image, 0).expect("memfd");
    let Ok(store) = Store::qcow2(&path(&file), choices & 2 != 0, false) else { return };
    let inline = Arc::new(Inline::new(1));
    let config = DiskConfig {
        name: "fuzz".into(),
        store,
        queues: 1,
        queue_size: 64,
        serial: String::new(),
        engine: IoEngine::Sync,
        register: Register::AtOnce,
        map_limit: Default::default(),
        poll: PollPolicy { mode: PollMode::Never, ..Default::default() },
        host: inline.clone(),
        storage: Arc::default(),
        mode_file: None,
    };
    let device = BlockDevice::new(config).expect("device");
    if choices & 4 != 0 {
        device.write_config(32, &[0]).expect("write-through");
    }
    let guest = TestGuest::new(1 << 20);
    let mut driver = DriverQueue::new(&guest, 0, 16, FEATURES | 1 << 9 | 3 << 13);
    device.start_queue(driver.ring(None).expect("ring").0).expect("the queue starts");
    for _ in 0..MAX_REQUESTS {
        if input.is_empty() {
            break;
        }
        let kind = input.one_of(&[0u32, 0, 1, 1, 4, 11, 13, 99]);
        // Mostly where something is.
        let sector = u64::from(if input.rarely(4) { input.u16() % 8192 } else { input.u16() % 48 });
        let sectors = u32::from(1 + input.u8() % 32);
        if kind == 99 {
            let _ = device.resize(u64::from(input.u16()) << 12);
            continue;
        }
        let write = |bytes: &[u8], at| guest.memory.write_slice(bytes, GuestAddress(at)).expect("memory");
        write(&[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat(), HEADER);
        write(&[0xff], STATUS);
        let mut buffers = vec![Buffer::readable(HEADER, 16)];
        match kind {
            0 | 1 => buffers.push(Buffer { address: DATA, length: sectors * 512, writable: kind == 0 }),
            11 | 13 => {
                let unmap = u32::from(kind == 13 && choices & 8 != 0);
                write(
                    &[&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &unmap.to_le_bytes()].concat(),
                    DATA,
                );
                buffers.push(Buffer::readable(DATA, 16));
            }
            _ => {}
        }
        buffers.push(Buffer::writable(STATUS, 1));
        driver.add(&buffers).expect("room");
        inline.notify(0);
        assert!(driver.take_used().is_some(), "a request is answered");
    }
    device.begin_stop(0);
    assert!(device.stop_queue(0, Instant::now() + PATIENCE).expect("the queue stops").is_some());
    device.close();
});
