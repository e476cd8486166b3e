//! Where a driver says its rings are, checked; and the one thing in them that we read.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::common::Queue;
use super::vhost_user::RingSetup;
use crate::memory::GuestRam;

/// Lengths in bytes of the three parts of a split ring, and their alignments (VirtIO 1.3 section 2.7).
const DESCRIPTOR: u64 = 16;
const AVAILABLE_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;
/// Flags and index before the entries, and the event index behind them.
const AVAILABLE_REST: u64 = 6;
const USED_REST: u64 = 6;
/// Offset of the index in the used ring.
const USED_INDEX: u64 = 2;

/// The ring that a driver has set up for queue `index`; `None` if a part of it is not in RAM, or not aligned.
pub(super) fn check(index: u16, queue: &Queue, ram: &GuestRam) -> Option<RingSetup> {
    let size = u64::from(queue.size);
    let inside = |start: u64, length: u64, alignment: u64| {
        start.is_multiple_of(alignment)
            && ram.regions().iter().any(|r| {
                let offset = start.checked_sub(r.gpa);
                offset.and_then(|o| o.checked_add(length)).is_some_and(|end| end <= r.size)
            })
    };
    let valid = queue.size.is_power_of_two()
        && inside(queue.descriptors, size * DESCRIPTOR, 16)
        && inside(queue.available, size * AVAILABLE_ENTRY + AVAILABLE_REST, 2)
        && inside(queue.used, size * USED_ENTRY + USED_REST, 4);
    valid.then_some(RingSetup {
        index,
        size: queue.size,
        descriptors: queue.descriptors,
        available: queue.available,
        used: queue.used,
    })
}

/// How many requests the device has finished, modulo 2^16: the index of the used ring. The guest can write it too, which can hurt
/// only the guest: a device must bear any index.
pub(super) fn used_index(ring: &RingSetup, ram: &GuestRam) -> u16 {
    let address = GuestAddress(ring.used + USED_INDEX);
    ram.memory().load::<u16>(address, Ordering::Acquire).map_or(0, u16::from_le)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slot::common::NO_VECTOR;

    fn queue(size: u16, descriptors: u64, available: u64, used: u64) -> Queue {
        Queue { size, vector: NO_VECTOR, enabled: true, descriptors, available, used }
    }

    #[test]
    fn rings_lie_in_ram_and_are_aligned() {
        const END: u64 = 16 << 20;
        let ram = GuestRam::new(END).unwrap();
        let ok = |q: Queue| check(0, &q, &ram).is_some();
        assert!(ok(queue(256, 0x1000, 0x2000, 0x3000)));
        assert!(ok(queue(256, END - 4096, 0x2000, 0x3000)));
        assert!(!ok(queue(256, END - 4080, 0x2000, 0x3000)));
        assert!(!ok(queue(256, 0x1008, 0x2000, 0x3000)));
        assert!(!ok(queue(256, 0x1000, 0x2001, 0x3000)));
        assert!(!ok(queue(256, 0x1000, 0x2000, 0x3002)));
        assert!(ok(queue(256, 0x1000, END - 518, 0x3000)));
        assert!(!ok(queue(256, 0x1000, END - 516, 0x3000)));
        assert!(!ok(queue(256, 0x1000, 0x2000, END)));
        assert!(!ok(queue(256, u64::MAX - 15, 0x2000, 0x3000)));
        assert!(!ok(queue(256, 0xffff_f000, 0x2000, 0x3000)));
    }

    #[test]
    fn the_used_index_is_read() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let ring = check(0, &queue(8, 0x1000, 0x2000, 0x3000), &ram).unwrap();
        assert_eq!(used_index(&ring, &ram), 0);
        ram.memory().write_obj(0xfffe_u16.to_le(), GuestAddress(0x3002)).unwrap();
        assert_eq!(used_index(&ring, &ram), 0xfffe);
    }

    proptest::proptest! {
        #[test]
        fn a_ring_that_passes_is_in_ram(
            order in 0..16u32, d in proptest::num::u64::ANY, a in proptest::num::u64::ANY, u in 0..(20u64 << 20)
        ) {
            let ram = GuestRam::new(16 << 20).unwrap();
            if let Some(ring) = check(1, &queue(1 << order, d % (17 << 20), a % (17 << 20), u), &ram) {
                assert!(ring.used + u64::from(ring.size) * 8 + 6 <= 16 << 20);
                assert!(ring.descriptors + u64::from(ring.size) * 16 <= 16 << 20);
                used_index(&ring, &ram);
            }
        }
    }
}
