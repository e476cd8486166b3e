use super::*;

fn area() -> InflightArea {
    InflightArea::create(1, SIZE).unwrap().0
}

/// The same ring, as a new process finds it.
fn restart(driver: &DriverQueue, area: &InflightArea) -> Ring {
    driver.ring(area.queue(0, SIZE)).unwrap().0
}

#[test]
fn what_was_in_flight_comes_again_in_order_before_anything_new() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let area = area();
    let mut ring = restart(&driver, &area);
    let heads: Vec<_> = (0..4).map(|i| driver.add(&one(i % 2)[..1]).unwrap()).collect();
    for _ in 0..3 {
        pop(&mut ring).unwrap();
    }
    ring.push(heads[1], 0);
    ring.publish();
    // Killed: nothing of `ring` is given back.
    std::mem::forget(ring);
    let mut ring = restart(&driver, &area);
    assert_eq!((ring.in_flight(), ring.recovered()), (2, 2));
    let again = pop_all(&mut ring);
    assert_eq!(again, [heads[0], heads[2], heads[3]]);
    for head in again {
        ring.push(head, 0);
    }
    ring.publish();
    assert_eq!(ring.stop(), RingState { next_avail: 4 });
    let ring = restart(&driver, &area);
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn a_batch_that_was_pushed_and_not_published_comes_again() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let area = area();
    let mut ring = restart(&driver, &area);
    let heads: Vec<_> = (0..3).map(|i| driver.add(&one(i)).unwrap()).collect();
    while pop(&mut ring).is_some() {}
    ring.push(heads[2], 0);
    ring.push(heads[0], 0);
    std::mem::forget(ring);
    let mut ring = restart(&driver, &area);
    let again = pop_all(&mut ring);
    assert_eq!(again, heads);
}

#[test]
fn a_batch_that_was_published_and_not_cleared_does_not_come_again() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let area = area();
    let mut ring = restart(&driver, &area);
    let heads: Vec<_> = (0..4).map(|i| driver.add(&one(i % 2)[..1]).unwrap()).collect();
    while pop(&mut ring).is_some() {}
    for head in [heads[3], heads[1]] {
        ring.push(head, 0);
    }
    // Killed between the used index and the record.
    ring.layout.set_used_idx(2);
    std::mem::forget(ring);
    let mut ring = restart(&driver, &area);
    let again = pop_all(&mut ring);
    assert_eq!(again, [heads[0], heads[2]]);
}

#[test]
fn recovered_chains_can_be_put_back() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let area = area();
    let mut ring = restart(&driver, &area);
    let heads: Vec<_> = (0..3).map(|i| driver.add(&one(i)).unwrap()).collect();
    pop(&mut ring).unwrap();
    pop(&mut ring).unwrap();
    std::mem::forget(ring);
    let mut ring = restart(&driver, &area);
    let first = pop_all(&mut ring);
    assert_eq!(first, heads);
    ring.unpop(&[heads[2], heads[1]]);
    assert_eq!(ring.recovered(), 1);
    let again = pop_all(&mut ring);
    assert_eq!(again, heads[1..]);
}

#[test]
fn without_an_area_the_ring_goes_back_to_the_used_index() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let (mut ring, _) = driver.ring(None).unwrap();
    let heads: Vec<_> = (0..3).map(|i| driver.add(&one(i)).unwrap()).collect();
    while pop(&mut ring).is_some() {}
    ring.push(heads[0], 0);
    ring.publish();
    std::mem::forget(ring);
    let (mut ring, _) = driver.ring(None).unwrap();
    let again = pop_all(&mut ring);
    assert_eq!(again, heads[1..]);
    // One that cannot be right: three available, seven used.
    driver.set_avail_idx(3);
    guest.memory.write_obj(7u16, GuestAddress(driver.addresses.used + 2)).unwrap();
    assert_eq!(driver.ring(None).unwrap().0.next_avail, 0);
}

#[test]
fn without_an_area_what_was_answered_out_of_order_is_not_lost() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let (mut ring, _) = driver.ring(None).unwrap();
    let heads: Vec<_> = (0..2).map(|i| driver.add(&one(i)).unwrap()).collect();
    while pop(&mut ring).is_some() {}
    ring.push(heads[1], 0);
    ring.publish();
    std::mem::forget(ring);
    let (mut ring, _) = driver.ring(None).unwrap();
    let again = pop_all(&mut ring);
    let used: Vec<_> = std::iter::from_fn(|| driver.take_used().map(|(h, _)| h)).collect();
    assert_eq!((again, used), (heads, vec![]));
}

#[test]
fn a_record_that_cannot_be_is_refused() {
    let guest = guest();
    let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
    let area = area();
    let mut ring = restart(&driver, &area);
    driver.add(&one(0)).unwrap();
    pop(&mut ring).unwrap();
    std::mem::forget(ring);
    // The driver has set the ring up anew, and the front-end kept the old record.
    driver.set_avail_idx(0);
    assert_eq!(driver.ring(area.queue(0, SIZE)).unwrap_err(), RingError::Inflight { count: 1 });
}

#[test]
fn areas_are_checked() {
    let (area, file) = InflightArea::create(4, 128).unwrap();
    assert!(area.queue(4, 128).is_none() && area.queue(0, 256).is_none());
    let map = |offset, size, queues, queue_size| {
        InflightArea::map(file.try_clone().unwrap(), offset, size, queues, queue_size).is_ok()
    };
    assert!(map(0, area.size(), 4, 128));
    assert!(!map(0, area.size() - 1, 4, 128));
    assert!(!map(4096, area.size(), 4, 128));
    assert!(!map(u64::MAX, area.size(), 4, 128));
    assert!(!map(0, area.size(), 5, 128));
    assert!(!map(0, area.size(), 0, 0));
    assert!(file.set_len(0).is_err());
}

proptest! {
    /// Killed after any step of any history, nothing is lost, nothing is done that was answered.
    #[test]
    fn exact_after_a_crash_anywhere(steps in prop::collection::vec(0u8..5, 1..80), recorded: bool) {
        let guest = guest();
        let mut driver = DriverQueue::new(&guest, RING, SIZE, EVENT_IDX);
        let area = area();
        let restart = |driver: &DriverQueue| {
            driver.ring(if recorded { area.queue(0, SIZE) } else { None }).unwrap().0
        };
        let mut ring = restart(&driver);
        let (mut open, mut taken) = (Vec::new(), Vec::new());
        for step in steps {
            match step {
                0 => open.extend(driver.add(&one(0))),
                1 => taken.extend(pop(&mut ring).map(|c| c.head())),
                2 if !taken.is_empty() => {
                    let head = taken.remove(taken.len() / 2);
                    ring.push(head, 0);
                }
                3 => ring.publish(),
                _ => {
                    std::mem::forget(ring);
                    ring = restart(&driver);
                    taken.clear();
                }
            }
            while let Some((head, _)) = driver.take_used() {
                open.retain(|h| *h != head);
            }
            let held = usize::from(ring.in_flight()) - taken.len() - ring.recovered();
            prop_assert!(held == 0 || !recorded);
        }
        ring.publish();
        taken.extend(pop_all(&mut ring));
        for head in taken {
            ring.push(head, 0);
        }
        ring.publish();
        while let Some((head, _)) = driver.take_used() {
            prop_assert!(open.contains(&head));
            open.retain(|h| *h != head);
        }
        prop_assert!(open.is_empty());
    }
}
