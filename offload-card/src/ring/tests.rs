mod inflight;

use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{Buffer, DriverQueue, TestGuest};

const SIZE: u16 = 8;
const RING: u64 = 0;
const DATA: u64 = 0x10_0000;
const MEMORY: u64 = 4 << 20;
const PLAIN: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC;
const EVENT_IDX: u64 = PLAIN | 1 << VIRTIO_RING_F_EVENT_IDX;

fn guest() -> TestGuest {
    TestGuest::new(MEMORY)
}

fn one(i: u64) -> [Buffer; 2] {
    [Buffer::readable(DATA + 0x1000 * i, 16), Buffer::writable(DATA + 0x1000 * i + 0x100, 32)]
}

fn pop(ring: &mut Ring) -> Option<Chain> {
    let mut chain = Chain::new();
    ring.pop(&mut chain).unwrap().then_some(chain)
}

/// Heads of all chains that are there.
fn pop_all(ring: &mut Ring) -> Vec<u16> {
    std::iter::from_fn(|| pop(ring).map(|chain| chain.head())).collect()
}

#[test]
fn chains_go_round_and_round() {
    let guest = guest();
    for features in [PLAIN, EVENT_IDX] {
        let mut driver = DriverQueue::new(&guest, RING, SIZE, features);
        guest.memory.write_obj(0u64, GuestAddress(driver.addresses.used)).unwrap();
        guest.memory.write_obj(0u64, GuestAddress(driver.addresses.avail)).unwrap();
        let (mut ring, shared) = driver.ring(None).unwrap();
        // Often enough that indices wrap.
        for i in 0..70_000u32 {
            guest.memory.write_obj(i, GuestAddress(DATA)).unwrap();
            let head = driver.add(&one(0)).unwrap();
            let chain = pop(&mut ring).unwrap();
            assert_eq!((chain.head(), chain.readable_len(), chain.writable_len()), (head, 16, 32));
            let mut read = [0; 4];
            assert_eq!(chain.read_at(0, &mut read), 4);
            assert_eq!(u32::from_le_bytes(read), i);
            assert_eq!(chain.write_at(28, &[1, 2, 3, 4, 5]), 4);
            ring.push(head, 32);
            assert_eq!(driver.take_used(), None);
            ring.publish();
            assert_eq!(driver.take_used(), Some((head, 32)));
        }
        assert!(pop(&mut ring).is_none());
        assert_eq!(shared.counters.requests.get(), 70_000);
        assert_eq!(shared.counters.in_flight.get(), 0);
        assert_eq!(ring.stop(), RingState { next_avail: 70_000u32 as u16 });
    }
}

#[test]
fn answers_come_in_any_order() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let area = InflightArea::create(1, SIZE).unwrap().0;
    let (mut ring, _) = driver.ring(area.queue(0, SIZE)).unwrap();
    let heads: Vec<_> = (0..4).map(|i| driver.add(&one(i)).unwrap()).collect();
    let popped = pop_all(&mut ring);
    assert_eq!(popped, heads);
    assert_eq!(ring.in_flight(), 4);
    for &head in heads.iter().rev() {
        ring.push(head, 1);
    }
    ring.publish();
    let used: Vec<_> = std::iter::from_fn(|| driver.take_used().map(|(h, _)| h)).collect();
    assert_eq!(used, heads.into_iter().rev().collect::<Vec<_>>());
}

#[test]
fn without_an_area_answers_are_shown_in_the_order_of_the_requests() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let (mut ring, shared) = driver.ring(None).unwrap();
    // Often enough that positions wrap.
    for round in 0..20 {
        let heads: Vec<_> = (0..4).map(|i| driver.add(&one(i)).unwrap()).collect();
        while pop(&mut ring).is_some() {}
        for (i, &head) in heads.iter().enumerate().skip(1).rev() {
            ring.push(head, i as u32);
            ring.publish();
            assert_eq!((driver.take_used(), ring.in_flight()), (None, 4), "round {round}");
        }
        // What is held is still in flight, for the driver too.
        assert_eq!(shared.counters.in_flight.get(), 4);
        ring.push(heads[0], 0);
        ring.publish();
        let used: Vec<_> = std::iter::from_fn(|| driver.take_used()).collect();
        assert_eq!(used, heads.iter().copied().zip(0..).collect::<Vec<_>>());
        assert_eq!(ring.in_flight(), 0);
    }
    // One that is held and one that is not, at the end.
    let heads: Vec<_> = (0..3).map(|i| driver.add(&one(i)).unwrap()).collect();
    while pop(&mut ring).is_some() {}
    ring.push(heads[2], 0);
    ring.push(heads[0], 0);
    assert_eq!(ring.stop(), RingState { next_avail: 83 });
    assert_eq!(driver.used_idx(), 81);
}

#[test]
fn chains_longer_than_the_engine_takes_break_the_ring() {
    for indirect in [false, true] {
        let guest = guest();
        let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
        let (mut ring, _) = driver.ring(None).unwrap();
        ring.limit_chains(3);
        // Descriptors of no bytes count, too.
        let mut add = |n: u64| {
            let buffers: Vec<_> = (0..n).map(|i| Buffer::readable(DATA + i, 0)).collect();
            let table = DATA + 0x1_0000 * n;
            if indirect { driver.add_indirect(table, &buffers) } else { driver.add(&buffers) }.unwrap()
        };
        let head = add(3);
        let chain = pop(&mut ring).unwrap();
        assert_eq!((chain.head(), chain.descriptors(), chain.readable().len()), (head, 3, 0));
        let head = add(4);
        assert_eq!(ring.pop(&mut Chain::new()), Err(RingError::Loop { head }));
    }
}

#[test]
fn one_interrupt_per_batch_and_only_if_wanted() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let (mut ring, _) = driver.ring(None).unwrap();
    let batch = |ring: &mut Ring, driver: &mut DriverQueue| {
        for i in 0..4 {
            driver.add(&one(i)).unwrap();
        }
        while let Some(chain) = pop(ring) {
            ring.push(chain.head(), 0);
        }
        ring.publish();
        while driver.take_used().is_some() {}
        driver.call.take()
    };
    // The start is announced.
    assert_eq!(driver.call.take(), 1);
    driver.set_used_event(0);
    assert_eq!(batch(&mut ring, &mut driver), 1);
    // The event is behind: no interrupt.
    assert_eq!(batch(&mut ring, &mut driver), 0);
    driver.set_used_event(10);
    assert_eq!(batch(&mut ring, &mut driver), 1);
    driver.set_used_event(20);
    assert_eq!(batch(&mut ring, &mut driver), 0);
}

#[test]
fn kicks_are_asked_for_and_none_is_missed() {
    let guest = guest();
    for features in [PLAIN, EVENT_IDX] {
        let mut driver = DriverQueue::new(&guest, RING, SIZE, features);
        guest.memory.write_obj(0u64, GuestAddress(driver.addresses.used)).unwrap();
        guest.memory.write_obj(0u64, GuestAddress(driver.addresses.avail)).unwrap();
        let (mut ring, _) = driver.ring(None).unwrap();
        assert!(!ring.enable_kicks());
        driver.add(&one(0)).unwrap();
        assert!(driver.kick_wanted());
        // Asking again now finds it.
        assert!(ring.enable_kicks());
        ring.disable_kicks();
        let chain = pop(&mut ring).unwrap();
        driver.add(&one(1)).unwrap();
        assert!(!driver.kick_wanted());
        assert!(ring.enable_kicks());
        ring.push(chain.head(), 0);
        assert!(pop(&mut ring).is_some());
        assert!(!ring.enable_kicks());
        // Something else has woken the thread, and it looks again.
        ring.disable_kicks();
        driver.add(&one(2)).unwrap();
        assert!(!driver.kick_wanted());
        assert!(ring.enable_kicks());
    }
}

#[test]
fn unpopped_chains_come_again_in_order() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let (mut ring, shared) = driver.ring(None).unwrap();
    let heads: Vec<_> = (0..4).map(|i| driver.add(&one(i)).unwrap()).collect();
    assert_eq!(ring.available(), Ok(4));
    let first: Vec<_> = (0..3).map(|_| pop(&mut ring).unwrap().head()).collect();
    ring.unpop(&[first[2], first[1]]);
    assert_eq!((ring.in_flight(), ring.available()), (1, Ok(3)));
    let again = pop_all(&mut ring);
    assert_eq!(again, heads[1..]);
    assert_eq!(shared.counters.requests.get(), 4);
}

#[test]
fn indirect_chains() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let (mut ring, _) = driver.ring(None).unwrap();
    let mut buffers: Vec<_> = (0..20).map(|i| Buffer::readable(DATA + i * 64, 10)).collect();
    buffers.push(Buffer::writable(DATA + 0x8000, 7));
    // A table need not be aligned.
    let head = driver.add_indirect(DATA + 0x1_0001, &buffers).unwrap();
    let chain = pop(&mut ring).unwrap();
    assert_eq!((chain.head(), chain.readable().len(), chain.readable_len()), (head, 20, 200));
    assert_eq!((chain.writable().len(), chain.writable_len()), (1, 7));
}

#[test]
fn copies_between_chains_split_anywhere() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, 64, EVENT_IDX);
    let (mut ring, _) = driver.ring(None).unwrap();
    let data: Vec<u8> = (0..100).collect();
    guest.memory.write_slice(&data, GuestAddress(DATA)).unwrap();
    let reads = [(0, 3), (3, 40), (43, 1), (44, 56)];
    driver.add(&reads.map(|(at, length)| Buffer::readable(DATA + at, length))).unwrap();
    let writes = [(0, 10), (10, 1), (11, 60), (71, 29)];
    driver.add(&writes.map(|(at, length)| Buffer::writable(DATA + 0x1000 + at, length))).unwrap();
    let (from, to) = (pop(&mut ring).unwrap(), pop(&mut ring).unwrap());
    for (source, target, length) in
        [(0, 0, 100), (3, 0, 97), (0, 5, 95), (44, 10, 20), (99, 99, 1), (50, 2, 0)]
    {
        guest.memory.write_slice(&[0xee; 100], GuestAddress(DATA + 0x1000)).unwrap();
        assert_eq!(from.copy_to(source, &to, target, length), length);
        let mut got = [0; 100];
        guest.memory.read_slice(&mut got, GuestAddress(DATA + 0x1000)).unwrap();
        let mut want = [0xee; 100];
        want[target..target + length].copy_from_slice(&data[source..source + length]);
        assert_eq!(got, want);
    }
    assert_eq!(from.copy_to(90, &to, 0, 1000), 10);
    assert_eq!(from.copy_to(0, &to, 95, 1000), 5);
    assert_eq!(from.copy_to(100, &to, 0, 1), 0);
}

/// A chain with one fault, and what it must be called.
fn broken_by(make: impl FnOnce(&mut DriverQueue), features: u64) -> RingError {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, features);
    let (mut ring, shared) = driver.ring(None).unwrap();
    make(&mut driver);
    let mut chain = Chain::new();
    let error = ring.pop(&mut chain).unwrap_err();
    assert_eq!(ring.pop(&mut chain), Ok(false));
    assert!(ring.is_broken() && !ring.enable_kicks());
    assert_eq!(driver.error.take(), 1);
    assert!(shared.broken().unwrap().contains(&error.to_string()));
    error
}

#[test]
fn malformed_chains_break_the_ring() {
    let table = RING;
    let next = VRING_DESC_F_NEXT;
    let indirect = VRING_DESC_F_INDIRECT;
    let with = |f: fn(&mut DriverQueue)| broken_by(f, EVENT_IDX);
    assert!(matches!(with(|d| d.offer(SIZE)), RingError::Index { .. }));
    assert!(matches!(with(|d| d.set_avail_idx(SIZE + 1)), RingError::AvailIndex { count: 9, .. }));
    assert!(matches!(with(|d| d.set_avail_idx(0xffff)), RingError::AvailIndex { .. }));
    assert!(matches!(
        with(|d| {
            d.set_descriptor(RING, 0, MEMORY - 8, 16, 0, 0);
            d.offer(0);
        }),
        RingError::Buffer { .. }
    ));
    assert!(matches!(
        with(|d| {
            d.set_descriptor(RING, 0, u64::MAX - 2, 16, 0, 0);
            d.offer(0);
        }),
        RingError::Buffer { .. }
    ));
    let looped = broken_by(
        |d| {
            d.set_descriptor(table, 0, DATA, 1, next, 1);
            d.set_descriptor(table, 1, DATA, 1, next, 0);
            d.offer(0);
        },
        EVENT_IDX,
    );
    assert!(matches!(looped, RingError::Loop { head: 0 }));
    let outside = broken_by(
        |d| {
            d.set_descriptor(table, 0, DATA, 1, next, 200);
            d.offer(0);
        },
        EVENT_IDX,
    );
    assert!(matches!(outside, RingError::Index { index: 200, .. }));
    let order = broken_by(
        |d| {
            d.add(&[Buffer::writable(DATA, 1), Buffer::readable(DATA, 1)]).unwrap();
        },
        EVENT_IDX,
    );
    assert!(matches!(order, RingError::Order { .. }));
    for (address, length, flags) in [
        (DATA, 8, 0),
        (DATA, 0, 0),
        (MEMORY - 8, 16, 0),
        (u64::MAX, 16, 0),
        (DATA, 16, next),
        (DATA, 1 << 31, 0),
    ] {
        let error = broken_by(
            |d| {
                // Nested: the table's first descriptor is itself one.
                d.set_descriptor(DATA, 0, DATA, 16, indirect, 0);
                d.set_descriptor(table, 0, address, length, indirect | flags, 1);
                d.offer(0);
            },
            EVENT_IDX,
        );
        assert!(matches!(error, RingError::Indirect { .. }), "{error}");
    }
    let not_negotiated = broken_by(
        |d| {
            d.add_indirect(DATA, &[Buffer::readable(DATA + 64, 1)]).unwrap();
        },
        1 << VIRTIO_F_VERSION_1,
    );
    assert!(matches!(not_negotiated, RingError::Indirect { .. }));
    let twice = broken_by_second(DriverQueue::offer);
    assert!(matches!(twice, RingError::InFlight { .. }));
}

fn broken_by_second(make: impl FnOnce(&mut DriverQueue, u16)) -> RingError {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let (mut ring, _) = driver.ring(None).unwrap();
    let head = driver.add(&one(0)).unwrap();
    pop(&mut ring).unwrap();
    make(&mut driver, head);
    let error = ring.pop(&mut Chain::new()).unwrap_err();
    // What is in flight can still be answered.
    ring.push(head, 3);
    ring.publish();
    assert_eq!(driver.take_used(), Some((head, 3)));
    error
}

#[test]
fn rings_must_be_in_memory_and_aligned() {
    let guest = guest();
    let start = |base: u64, size: u16| {
        let driver = DriverQueue::new(&guest, base, SIZE, EVENT_IDX);
        let shared = Arc::new(QueueShared::default());
        Ring::new(RingConfig {
            index: 0,
            size,
            features: EVENT_IDX,
            addresses: driver.addresses,
            base: 0,
            kick: Event::new().unwrap(),
            memory: guest.table(),
            shared,
            inflight: None,
        })
        .map(drop)
    };
    assert_eq!(start(0, 8), Ok(()));
    assert!(matches!(start(8, 8), Err(RingError::Address { .. })));
    assert!(matches!(start(MEMORY - 0x8000, 8), Err(RingError::Address { what: "available ring", .. })));
    assert!(matches!(start(MEMORY, 8), Err(RingError::Address { .. })));
    assert!(matches!(start(u64::MAX - 0xffff, 8), Err(RingError::Address { .. })));
    for size in [0, 3, 7, 0x8001] {
        assert_eq!(start(0, size), Err(RingError::Size { size }));
    }
}

#[test]
fn a_chain_keeps_its_memory_and_the_ring_moves_on() {
    use crate::memory::Region;
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let table = MemoryTable::new();
    let file = || guest.file().try_clone().unwrap();
    table.add(Region::map(0, 0x10_0000, 0, file(), 0).unwrap()).unwrap();
    table.add(Region::map(DATA, 0x1000, DATA, file(), DATA).unwrap()).unwrap();
    let mut ring = Ring::new(RingConfig {
        index: 0,
        size: SIZE,
        features: EVENT_IDX,
        addresses: driver.addresses,
        base: 0,
        kick: Event::new().unwrap(),
        memory: table.clone(),
        shared: Arc::default(),
        inflight: None,
    })
    .unwrap();
    let head = driver.add(&one(0)).unwrap();
    let chain = pop(&mut ring).unwrap();
    table.remove(DATA, 0x1000, DATA).unwrap();
    assert_eq!(chain.write_at(0, b"late"), 4);
    ring.push(head, 4);
    ring.publish();
    assert_eq!(driver.take_used(), Some((head, 4)));
    // The ring moves on without a chain; what nobody needs any more is unmapped.
    let inode = format!(" {} ", std::os::unix::fs::MetadataExt::ino(&guest.file().metadata().unwrap()));
    let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().matches(&inode).count();
    let before = mapped();
    assert!(ring.memory_changed() && !ring.memory_changed() && !ring.is_current(&chain));
    assert_eq!(mapped(), before);
    let mut chain = chain;
    chain.clear();
    assert!(mapped() < before && ring.is_current(&chain));
    // What is added is found, what was removed is not.
    table.add(Region::map(DATA + 0x1000, 0x1000, 0, file(), DATA + 0x1000).unwrap()).unwrap();
    driver.add(&one(1)).unwrap();
    assert!(pop(&mut ring).is_some());
    driver.add(&one(0)).unwrap();
    assert!(matches!(ring.pop(&mut Chain::new()), Err(RingError::Buffer { .. })));
}

#[test]
fn a_buffer_may_span_regions() {
    use crate::memory::Region;
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let table = MemoryTable::new();
    let file = || guest.file().try_clone().unwrap();
    // Neighbours for the guest, apart in the file.
    table.add(Region::map(0, 0x10_0000, 0, file(), 0).unwrap()).unwrap();
    table.add(Region::map(DATA, 0x1000, 0, file(), DATA + 0x2000).unwrap()).unwrap();
    table.add(Region::map(DATA + 0x1000, 0x1000, 0, file(), DATA).unwrap()).unwrap();
    let mut ring = Ring::new(RingConfig {
        index: 0,
        size: SIZE,
        features: EVENT_IDX,
        addresses: driver.addresses,
        base: 0,
        kick: Event::new().unwrap(),
        memory: table,
        shared: Arc::default(),
        inflight: None,
    })
    .unwrap();
    driver.add(&[Buffer::writable(DATA + 0xffe, 4)]).unwrap();
    let chain = pop(&mut ring).unwrap();
    assert_eq!((chain.writable().len(), chain.writable_len()), (2, 4));
    assert_eq!(chain.write_at(0, b"abcd"), 4);
    let read = |at| guest.memory.read_obj::<[u8; 2]>(GuestAddress(at)).unwrap();
    assert_eq!((&read(DATA + 0x2ffe), &read(DATA)), (b"ab", b"cd"));
}

proptest! {
    /// Whatever the guest writes, popping ends, stays in memory and returns each chain once.
    #[test]
    fn any_ring_contents_are_survived(
        noise in prop::collection::vec(any::<u8>(), 16 * SIZE as usize),
        short in prop::collection::vec((0u64..0x20_0000, 0u32..0x4000, 0u32..8, 0u16..SIZE + 2), SIZE as usize),
        avail in prop::collection::vec(0u16..SIZE + 1, SIZE as usize),
        count in 0u16..SIZE + 2,
        pick in any::<bool>(),
        ahead in any::<bool>(),
    ) {
        let guest = guest();
        let driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
        if pick {
            guest.memory.write_slice(&noise, GuestAddress(RING)).unwrap();
        } else {
            for (i, (address, length, flags, next)) in (0..).zip(short) {
                driver.set_descriptor(RING, i, address, length, flags, next);
                driver.set_descriptor(DATA, i, address, length, flags & !VRING_DESC_F_INDIRECT, next);
            }
        }
        for (i, head) in (0..).zip(avail) {
            guest.memory.write_obj(head, GuestAddress(driver.addresses.avail + 4 + 2 * i)).unwrap();
        }
        driver.set_avail_idx(count);
        let (mut ring, shared) = driver.ring(None).unwrap();
        if ahead {
            ring.look_ahead();
        }
        let mut chain = Chain::new();
        let mut heads = std::collections::HashSet::new();
        loop {
            match ring.pop(&mut chain) {
                Ok(true) => {
                    prop_assert!(heads.insert(chain.head()));
                    let mut scratch = [0; 64];
                    chain.read_at(0, &mut scratch);
                    let sum: usize = chain.readable().iter().map(Segment::len).sum();
                    prop_assert_eq!(sum, chain.readable_len() as usize);
                }
                Ok(false) => break,
                Err(_) => prop_assert!(shared.broken().is_some()),
            }
        }
        for head in heads {
            ring.push(head, 0);
        }
        ring.publish();
        prop_assert_eq!(ring.in_flight(), 0);
    }
}

#[test]
fn a_chain_in_too_many_pieces_breaks_the_ring() {
    use crate::memory::Region;
    let guest = guest();
    let table = MemoryTable::new();
    let file = || guest.file().try_clone().unwrap();
    table.add(Region::map(0, DATA, 0, file(), 0).unwrap()).unwrap();
    for page in 0..200 {
        let at = DATA + page * 0x1000;
        table.add(Region::map(at, 0x1000, at, file(), at).unwrap()).unwrap();
    }
    let pieces = |count: u32| {
        let mut driver = DriverQueue::new(&guest, 0, 16, FEATURES);
        let config = RingConfig {
            index: 0,
            size: 16,
            features: FEATURES,
            addresses: driver.addresses,
            base: 0,
            kick: Event::new().unwrap(),
            memory: table.clone(),
            shared: Arc::default(),
            inflight: None,
        };
        driver.add(&[Buffer::readable(DATA, count * 0x1000)]).unwrap();
        let mut chain = Chain::new();
        Ring::new(config).unwrap().pop(&mut chain).map(|_| chain.readable().len())
    };
    assert_eq!(pieces(65), Ok(65));
    assert_eq!(pieces(66), Err(RingError::Pieces { head: 0 }));
}

#[test]
fn descriptor_flags_are_the_specifications() {
    assert_eq!((VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT), (1, 2, 4));
}
