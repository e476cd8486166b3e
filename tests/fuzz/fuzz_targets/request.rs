//! Well-formed rings with requests of any content, to a small disk, against a model of it.
//!
//! A request that says what it wants rightly is done, whatever pieces it is in; what is read is what was written; the rest
//! changes nothing.
#![no_main]

use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use fuzz::PATIENCE;
use fuzz::disk::{self, Disk};
use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;
use offload_blk::IoEngine;
use offload_card::Device;
use offload_card::ring::FEATURES;
use offload_card::testing::{Buffer, DriverQueue, TestGuest};
use vm_memory::{Bytes, GuestAddress};

const SECTOR: usize = 512;
const SECTORS: usize = 64;
const RING_SIZE: u16 = 64;
const MAX_REQUESTS: usize = 24;
const HEADER: u64 = 0x2_0000;
const DATA: u64 = 0x3_0000;
const TABLE: u64 = 0x1_f000;
const MEMORY: u64 = 0x10_0000;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Cuts `length` bytes at `at` into pieces.
fn pieces(input: &mut Input<'_>, at: u64, length: u32, writable: bool, to: &mut Vec<Buffer>) {
    let mut done = 0;
    while done < length && to.len() < 12 {
        let left = length - done;
        let n = if input.rarely(2) { left } else { 1 + u32::from(input.u16()) % left };
        to.push(Buffer { address: at + u64::from(done), length: n, writable });
        done += n;
    }
    if done < length {
        to.push(Buffer { address: at + u64::from(done), length: length - done, writable });
    }
}

fuzz_target!(|data: &[u8]| {
    static DISKS: OnceLock<[Disk; 2]> = OnceLock::new();
    static GUEST: OnceLock<TestGuest> = OnceLock::new();
    let disks = DISKS.get_or_init(|| {
        let size = (SECTORS * SECTOR) as u64;
        [disk::image(size, IoEngine::Sync, true), disk::image(size, IoEngine::IoUring, false)]
    });
    let guest = GUEST.get_or_init(|| TestGuest::new(MEMORY));
    let mut input = Input::new(data);
    let disk = &disks[usize::from(input.u8()) % disks.len()];
    let file = disk.file.as_ref().expect("an image");
    // `None`: what is there is open.
    let mut model: Vec<Option<u8>> = (0..SECTORS * SECTOR).map(|i| Some((i * 7 / 5) as u8)).collect();
    let content: Vec<u8> = model.iter().flatten().copied().collect();
    file.write_all_at(&content, 0).expect("image");

    guest.memory.write_slice(&[0; 0x1_0000], GuestAddress(0)).expect("memory");
    let mut driver = DriverQueue::new(guest, 0, RING_SIZE, FEATURES | 1 << 9 | 1 << 13 | 1 << 14);
    let (ring, shared) = driver.ring(None).expect("ring");
    disk.device.start_queue(ring).expect("the queue starts");
    for _ in 0..MAX_REQUESTS {
        if input.is_empty() {
            break;
        }
        let kind = if input.rarely(16) {
            input.u32()
        } else {
            input.one_of(&[IN, IN, OUT, OUT, OUT, FLUSH, 8, DISCARD, WRITE_ZEROES])
        };
        let sector = if input.rarely(16) { input.u64() } else { u64::from(input.u8()) % 72 };
        let odd = input.rarely(8);
        let mut length = u32::from(input.u8() % 12) * SECTOR as u32;
        if odd {
            length += u32::from(input.u16()) % 700;
        }
        let mut bytes: Vec<u8> = [kind.to_le_bytes(), [0; 4]].concat();
        bytes.extend(sector.to_le_bytes());
        guest.memory.write_slice(&bytes, GuestAddress(HEADER)).expect("memory");
        let pattern: Vec<u8> = (0..length).map(|i| (i as u8).wrapping_mul(3) ^ input_seed(sector)).collect();
        let erases = matches!(kind, DISCARD | WRITE_ZEROES);
        // An erasing request has a range of its own in its data.
        let (first, count) = (u64::from(input.u8()) % 72, u32::from(input.u8()) % 12);
        let data_bytes = if erases {
            let mut range = first.to_le_bytes().to_vec();
            range.extend(count.to_le_bytes());
            range.extend(u32::from(input.u8() % 2).to_le_bytes());
            if odd {
                range.truncate(length as usize % 17);
            }
            range
        } else {
            pattern
        };
        guest.memory.write_slice(&data_bytes, GuestAddress(DATA)).expect("memory");
        let device_reads = kind != IN && kind != 8;
        let data_length = data_bytes.len() as u32;

        let mut buffers = Vec::new();
        if input.rarely(3) && device_reads {
            // The header in pieces, and the data behind it.
            pieces(&mut input, HEADER, 16, false, &mut buffers);
        } else {
            buffers.push(Buffer::readable(HEADER, 16));
        }
        if data_length > 0 {
            pieces(&mut input, DATA, data_length, !device_reads, &mut buffers);
        }
        let status = HEADER + 0x100;
        guest.memory.write_obj(0xffu8, GuestAddress(status)).expect("memory");
        buffers.push(Buffer::writable(status, 1));
        let head = if input.rarely(2) { driver.add_indirect(TABLE, &buffers) } else { driver.add(&buffers) };
        let head = head.expect("room in the ring");
        driver.kick();
        disk.notify();
        let used = wait(&mut driver).expect("an answer");
        assert_eq!(used.0, head);
        let status: u8 = guest.memory.read_obj(GuestAddress(status)).expect("memory");
        assert!(status <= 2, "status {status}");

        let range = |sector: u64, length: u64| {
            let from = usize::try_from(sector).ok()?.checked_mul(SECTOR)?;
            let to = from.checked_add(usize::try_from(length).ok()?)?;
            (to <= SECTORS * SECTOR && length % SECTOR as u64 == 0).then_some(from..to)
        };
        match (kind, range(sector, data_length.into())) {
            (IN, Some(range)) => {
                assert_eq!((status, used.1), (0, data_length + 1));
                let mut read = vec![0; data_length as usize];
                guest.memory.read_slice(&mut read, GuestAddress(DATA)).expect("memory");
                assert!(model[range].iter().zip(&read).all(|(m, r)| m.is_none_or(|m| m == *r)));
            }
            (OUT, Some(range)) => {
                assert_eq!((status, used.1), (0, 1));
                model[range].iter_mut().zip(&data_bytes).for_each(|(m, w)| *m = Some(*w));
            }
            (FLUSH, _) => assert_eq!(status, 0),
            (IN | OUT, None) => assert_ne!(status, 0),
            (DISCARD | WRITE_ZEROES, _) if status == 0 => {
                if data_bytes.len() == 16 {
                    let range = range(first, u64::from(count) * SECTOR as u64).expect("inside the disk");
                    let now = if kind == WRITE_ZEROES { Some(0) } else { None };
                    model[range].fill(now);
                }
            }
            _ => {}
        }
    }
    disk.stop();
    assert_eq!(shared.broken(), None);
    let mut now = vec![0; SECTORS * SECTOR];
    file.read_exact_at(&mut now, 0).expect("image");
    assert!(
        model.iter().zip(&now).all(|(m, n)| m.is_none_or(|m| m == *n)),
        "the image is not what the model is"
    );
});

fn input_seed(sector: u64) -> u8 {
    (sector as u8).wrapping_mul(31)
}

/// Looks without sleeping at first: most answers are there at once.
fn wait(driver: &mut DriverQueue) -> Option<(u16, u32)> {
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        if let Some(used) = driver.take_used() {
            return Some(used);
        }
        if since.elapsed() > Duration::from_millis(1) {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    None
}
