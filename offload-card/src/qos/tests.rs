use proptest::prelude::*;
use proto::limits::{MAX_RATE, MIN_BYTES_RATE};

use super::*;

const SECOND: u64 = 1_000_000_000;

fn limits(operations: (u64, u64), bytes: (u64, u64)) -> Limits {
    Limits::new(Some(&DeviceLimits {
        operations_per_second: operations.0,
        operations_burst: operations.1,
        bytes_per_second: bytes.0,
        bytes_burst: bytes.1,
    }))
    .unwrap()
}

fn throttle(operations: (u64, u64), bytes: (u64, u64), now: u64) -> Throttle {
    Throttle::new(limits(operations, bytes), None, now).unwrap()
}

/// Does requests of `bytes`, each `late` nanoseconds after it may go, from `now` until `end`. How many, and when the next
/// one may.
fn run(throttle: &Throttle, bytes: u64, late: u64, mut now: u64, end: u64) -> u64 {
    let mut count = 0;
    loop {
        let ready = throttle.ready();
        if ready > now {
            now = ready + late;
        }
        if now >= end {
            return count;
        }
        throttle.take(bytes, now);
        count += 1;
    }
}

#[test]
fn a_second_has_what_it_may_to_the_percent() {
    for rate in [100, 999, 10_000, 333_333, 3_000_000] {
        let t = throttle((rate, 0), (0, 0), SECOND);
        // The first has the burst on top, a hundredth.
        let first = run(&t, 4096, 0, SECOND, 2 * SECOND);
        assert!((rate..=rate + rate / 100 + 1).contains(&first), "{rate}: {first}");
        for second in 2..5 {
            let count = run(&t, 4096, 0, second * SECOND, (second + 1) * SECOND);
            assert!(count.abs_diff(rate) <= 1 + rate / 5000, "{rate}: {count}");
        }
    }
}

#[test]
fn bytes_are_exact_whatever_the_request() {
    let rate = 100_000_000;
    for bytes in [512, 4096, 65_536, 1 << 20] {
        let t = throttle((0, 0), (rate, 0), SECOND);
        run(&t, bytes, 0, SECOND, 2 * SECOND);
        let moved = bytes * run(&t, bytes, 0, 2 * SECOND, 12 * SECOND);
        assert!(moved.abs_diff(10 * rate) <= bytes + rate / 1000, "{bytes}: {moved}");
    }
}

#[test]
fn of_two_limits_the_tighter_counts() {
    let t = throttle((1000, 1), (4_096_000 / 2, 1), SECOND);
    let count = run(&t, 4096, 0, SECOND, 11 * SECOND);
    assert!(count.abs_diff(5000) <= 2, "{count}");
    let count = run(&t, 512, 0, 20 * SECOND, 30 * SECOND);
    assert!(count.abs_diff(10_000) <= 2, "{count}");
}

#[test]
fn a_burst_is_what_it_says_and_comes_back_with_time() {
    let t = throttle((100, 250), (0, 0), SECOND);
    assert_eq!(run(&t, 0, 0, SECOND, SECOND + 1), 250);
    assert_eq!(t.ready(), SECOND + SECOND / 100);
    // Half a second later half a second's worth is there; for ever later no more than the burst.
    assert_eq!(run(&t, 0, 0, SECOND + SECOND / 2, SECOND + SECOND / 2 + 1), 50);
    assert_eq!(run(&t, 0, 0, 1000 * SECOND, 1000 * SECOND + 1), 250);
}

#[test]
fn a_request_larger_than_the_burst_passes_and_is_paid_for() {
    let t = throttle((0, 0), (1 << 20, 4096), SECOND);
    assert!(t.ready() <= SECOND);
    t.take(10 << 20, SECOND);
    // 10 MiB less the burst, at 1 MiB per second; and a byte, with which the next may go.
    let due = SECOND + (SECOND * 10 - SECOND / 256) + SECOND / (1 << 20);
    assert!(t.ready().abs_diff(due) <= 2, "{} {due}", t.ready());
}

#[test]
fn threads_that_are_late_lose_nothing() {
    let t = throttle((10_000, 0), (0, 0), SECOND);
    run(&t, 0, 0, SECOND, 2 * SECOND);
    // 200 µs late each time, two periods: the tokens that have come meanwhile are still there.
    let count = run(&t, 0, SECOND / 5000, 2 * SECOND, 12 * SECOND);
    assert!(count.abs_diff(100_000) <= 10, "{count}");
}

#[test]
fn what_was_used_or_owed_is_carried_over() {
    // Owed: 9 MiB at 1 MiB/s are 9 s, at 100 MiB/s 90 ms.
    let old = throttle((0, 0), (1 << 20, 1 << 20), SECOND);
    old.take(10 << 20, SECOND);
    let new = Throttle::new(limits((0, 0), (100 << 20, 1 << 20)), Some(&old), SECOND).unwrap();
    assert!(new.ready().abs_diff(SECOND + 90_000_000) < 1000, "{}", new.ready());
    // Used: an empty bucket is not filled by another limit, and a full one not beyond the new burst.
    let old = throttle((1000, 10), (0, 0), SECOND);
    run(&old, 0, 0, SECOND, SECOND + 1);
    let new = Throttle::new(limits((10, 10), (0, 0)), Some(&old), SECOND).unwrap();
    assert_eq!(run(&new, 0, 0, SECOND, SECOND + 1), 0);
    let old = throttle((1000, 10), (0, 0), SECOND);
    let new = Throttle::new(limits((1000, 4), (0, 0)), Some(&old), SECOND).unwrap();
    assert_eq!(run(&new, 0, 0, SECOND, SECOND + 1), 4);
}

#[test]
fn queues_notice_new_limits_and_the_same_ones_are_none() {
    let limiter = Arc::new(Limiter::default());
    let mut tap = limiter.tap();
    assert!(tap.throttle().is_none());
    assert!(!limiter.set(Limits::default()));
    assert!(limiter.set(limits((5, 0), (0, 0))));
    assert_eq!(tap.throttle().unwrap().limits(), limits((5, 1), (0, 0)));
    assert!(!limiter.set(limits((5, 0), (0, 0))));
    assert!(limiter.set(Limits::default()));
    assert!(tap.throttle().is_none());
}

proptest! {
    /// Several queues, each of which looks first and takes then, at random times: never more than the rate, the burst
    /// and one request of each queue; and whoever takes what there is as it comes gets the rate.
    #[test]
    fn no_interleaving_does_more_than_it_may(
        rate in 4096u64..1 << 36,
        burst in 1u64..1 << 30,
        start in 0u64..1 << 58,
        requests in proptest::collection::vec((0u64..1 << 22, 0usize..4, 0u64..10_000_000), 1..200),
    ) {
        let burst = burst.min(rate * 1000);
        let t = throttle((0, 0), (rate, burst), start);
        let mut now = start;
        let (mut moved, mut largest) = (0u128, [0u64; 4]);
        let mut allowed = [None; 4];
        for (bytes, queue, pause) in requests {
            now += pause;
            // What this queue was allowed a while ago it does now, and then it looks again.
            if let Some(bytes) = allowed[queue].take() {
                t.take(bytes, now);
                moved += u128::from(bytes);
                largest[queue] = largest[queue].max(bytes);
            }
            if t.ready() <= now {
                allowed[queue] = Some(bytes);
            }
            let most = u128::from(rate) * u128::from(now - start) / u128::from(SECOND)
                + u128::from(burst)
                + largest.iter().map(|b| u128::from(*b)).sum::<u128>();
            prop_assert!(moved <= most + 1, "{} of {}", moved, most);
        }
    }

    /// Nothing overflows, and time that can be waited for comes.
    #[test]
    fn extremes_are_survived(
        operations in 1u64..=MAX_RATE,
        bytes in MIN_BYTES_RATE..=MAX_RATE,
        now in 0u64..1 << 58,
        sizes in proptest::collection::vec(0u64..=u64::from(u32::MAX), 1..64),
    ) {
        let burst = |rate: u64| rate * MAX_BURST_SECONDS;
        let t = throttle((operations, burst(operations)), (bytes, burst(bytes)), now);
        for size in sizes {
            t.take(size, now);
        }
        let years = |t: &Throttle| t.ready().saturating_sub(now) / SECOND / 86_400 / 365;
        prop_assert!(years(&t) < 10, "{} years", years(&t));
        let next = Throttle::new(limits((1, 0), (MIN_BYTES_RATE, 0)), Some(&t), now).unwrap();
        prop_assert!(years(&next) < 10, "{} years", years(&next));
    }
}

#[test]
fn packets_count_as_many_and_what_is_short_is_said() {
    let limits = NetLimits::new(Some(&v1::NetLimits {
        packets_per_second_out: 1000,
        packets_burst_out: 100,
        bits_per_second_out: 1_000_000,
        bits_burst_out: 1_000_000,
        ..Default::default()
    }))
    .unwrap();
    assert!(limits.incoming.is_none() && !limits.is_none());
    let t = Throttle::new(limits.outgoing, None, SECOND).unwrap();
    assert_eq!(t.short(SECOND), None);
    t.take_many(150, 500_000, SECOND);
    // 50 packets owed, and one to come.
    assert_eq!(t.short(SECOND), Some(Short { of: Kind::Operations, until: SECOND + 51_000_000 }));
    t.take_many(1, 1_500_000, SECOND);
    assert!(
        matches!(t.short(SECOND), Some(Short { of: Kind::Bytes, until }) if until.abs_diff(2 * SECOND) < 2000)
    );
    // While the smaller of the bursts comes, less what the next takes.
    assert_eq!(t.slack(), 99_000_000);
    assert_eq!(t.short(3 * SECOND), None);
}

/// Frames of different sizes as fast as they may: to a percent of a second's worth.
#[test]
fn bits_of_frames_are_exact_to_the_percent() {
    for (rate, frame) in
        [(100_000_000, 1514), (1_000_000_000, 1514), (10_000_000_000, 65_226), (1_000_000, 60)]
    {
        let limits =
            NetLimits::new(Some(&v1::NetLimits { bits_per_second_in: rate, ..Default::default() })).unwrap();
        let t = Throttle::new(limits.incoming, None, SECOND).unwrap();
        let (mut now, mut bits) = (SECOND, 0);
        while now < 2 * SECOND {
            match t.short(now) {
                Some(short) => now = short.until,
                None => {
                    t.take_many(1, frame * 8, now);
                    bits += frame * 8;
                }
            }
        }
        assert!((rate..=rate + rate / 100 + frame * 8).contains(&bits), "{rate} {frame}: {bits}");
    }
}
