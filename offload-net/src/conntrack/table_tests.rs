//! The table against a map.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::conntrack::slots::tests::OWNER;

const EPOCH: u64 = 1;

fn key(n: u16) -> Key {
    Key { v6: false, protocol: 17, local: 1, peer: 2, local_port: n, peer_port: 53 }
}

fn table(count: usize) -> Table {
    let (table, damaged) = Table::new(Slots::in_memory(count).unwrap(), 0);
    assert!(!damaged);
    table
}

#[test]
fn what_is_over_makes_room() {
    let mut t = table(16);
    for n in 0..16 {
        let state = if n % 2 == 0 { State::Udp } else { State::Established };
        t.insert(&key(n), Direction::Out, state, EPOCH, u64::from(n)).unwrap();
    }
    assert_eq!(t.insert(&key(99), Direction::Out, State::Udp, EPOCH, 100), Err(Full));
    // The oldest is over; not one millisecond sooner.
    assert_eq!(t.insert(&key(99), Direction::Out, State::Udp, EPOCH, 29_999), Err(Full));
    assert_eq!(t.insert(&key(99), Direction::In, State::Udp, EPOCH, 30_000), Ok(()));
    assert_eq!(t.find(&key(0), 30_000), None);
    assert_eq!(t.find(&key(99), 30_000).unwrap().origin, Direction::In);
    assert_eq!(t.len(), 16);
}

#[test]
fn a_revoked_connection_keeps_its_room_for_a_minute() {
    let mut t = table(16);
    t.insert(&key(1), Direction::Out, State::Established, EPOCH, 0).unwrap();
    let slot = t.find(&key(1), 0).unwrap().slot;
    t.revoke(slot, 10);
    t.revoke(slot, 50_000);
    assert_eq!(t.find(&key(1), 60_009).map(|f| f.state), Some(State::Established));
    assert_eq!(t.find(&key(1), 60_010), None);
    t.insert(&key(1), Direction::Out, State::Established, EPOCH, 70_000).unwrap();
    let slot = t.find(&key(1), 70_000).unwrap().slot;
    t.revoke(slot, 70_000);
    t.touch(slot, State::Established, 70_001);
    assert!(t.find(&key(1), 1_000_000).is_some());
}

#[test]
fn nonsense_in_the_slots_is_thrown_away() {
    let kept = |n| Kept { key: key(n), origin: Direction::Out, state: State::Udp, expires: 30_000 };
    let with = |f: &dyn Fn(&Slots)| {
        let slots = Slots::in_memory(16).unwrap();
        slots.put(7, &kept(1));
        f(&slots);
        let (mut t, damaged) = Table::new(slots, 0);
        // It works in any case.
        for n in 100..115 {
            t.insert(&key(n), Direction::Out, State::Udp, EPOCH, 0).unwrap();
        }
        (t.find(&key(1), 0).is_some(), damaged)
    };
    assert_eq!(with(&|_| {}), (true, false));
    // Twice the same; one that lives too long.
    assert_eq!(with(&|s| s.put(8, &kept(1))), (false, true));
    assert_eq!(with(&|s| s.put(8, &Kept { expires: 32_000, ..kept(2) })), (false, true));
}

#[derive(Debug, Clone)]
enum Step {
    Insert(u16, usize),
    Find(u16),
    Touch(u16, usize),
    Revoke(u16),
    Remove(u16),
    Wait(u64),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let n = 0..40_u16;
    let state = 0..STATES.len();
    let step = prop_oneof![
        4 => (n.clone(), state.clone()).prop_map(|(n, s)| Step::Insert(n, s)),
        2 => n.clone().prop_map(Step::Find),
        2 => (n.clone(), state).prop_map(|(n, s)| Step::Touch(n, s)),
        1 => n.clone().prop_map(Step::Revoke),
        1 => n.prop_map(Step::Remove),
        2 => (0..40_000_u64).prop_map(Step::Wait),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..300)
}

proptest! {
    /// The table is a map with a bound, whose entries go in time, whatever happens and however often it is opened.
    #[test]
    fn it_is_a_bounded_map(steps in steps()) {
        const ROOM: usize = 16;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let open = |now| {
            let (slots, damaged) = Slots::in_file(&path, ROOM, &OWNER).unwrap();
            assert!(!damaged);
            let (table, damaged) = Table::new(slots, now);
            assert!(!damaged);
            table
        };
        let mut now = 1;
        let mut t = open(now);
        // Until when it is there at least, and when it is gone at the latest.
        let mut model: HashMap<u16, (State, u64, u64)> = HashMap::new();
        for step in steps {
            model.retain(|_, (_, _, most)| *most > now);
            match step {
                Step::Insert(n, s) => {
                    if t.find(&key(n), now).is_none() {
                        model.remove(&n);
                        let state = STATES[s];
                        match t.insert(&key(n), Direction::Out, state, EPOCH, now) {
                            Ok(()) => {
                                let until = now + state.timeout_ms();
                                model.insert(n, (state, until, until));
                            }
                            Err(Full) => prop_assert!(model.len() >= ROOM),
                        }
                    }
                }
                Step::Find(n) => match (t.find(&key(n), now), model.get(&n)) {
                    (Some(f), Some((state, _, _))) => prop_assert_eq!(f.state, *state),
                    (Some(_), None) => prop_assert!(false, "it should be gone"),
                    (None, Some((_, least, _))) => prop_assert!(*least <= now),
                    (None, None) => {}
                },
                Step::Touch(n, s) => {
                    if let Some(f) = t.find(&key(n), now) {
                        t.touch(f.slot, STATES[s], now);
                        let until = now + STATES[s].timeout_ms();
                        model.insert(n, (STATES[s], until - GRAIN_MS, until + GRAIN_MS));
                    }
                }
                Step::Revoke(n) => {
                    if let Some(f) = t.find(&key(n), now) {
                        t.revoke(f.slot, now);
                        // It may go sooner.
                        model.get_mut(&n).unwrap().1 = now;
                    }
                }
                Step::Remove(n) => {
                    if let Some(f) = t.find(&key(n), now) {
                        t.remove(f.slot);
                        model.remove(&n);
                    }
                }
                Step::Wait(ms) => now += ms,
                Step::Restart => t = open(now),
            }
            prop_assert!(t.len() <= ROOM);
            // Every queue is in the order in which its connections are forgotten, and all are in one.
            let mut queued = 0;
            for q in t.queues {
                let (mut i, mut last) = (q.first, 0);
                while i != NONE {
                    let (_, expires) = t.slots.status(i as usize).unwrap();
                    prop_assert!(expires >= last);
                    (last, i, queued) = (expires, t.links[i as usize].next, queued + 1);
                }
            }
            prop_assert_eq!(queued, t.len());
        }
    }
}
