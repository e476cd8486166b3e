//! A hostile guest: any access to any register of a slot, whatever the link does. Nothing panics, nothing waits for the device, and
//! the device hears only of rings that lie in RAM.

use std::time::{Duration, Instant};

use hypervisor::slot::LinkState;
use proptest::prelude::*;

use crate::device::{Device, Script, request};
use crate::driver::{Driver, Machine, VERSION_1, config, until};

#[derive(Debug, Clone)]
enum Step {
    /// Configuration space or BAR, offset, length, value if it is a write.
    Access(bool, u64, usize, Option<u64>),
    /// A whole, proper set-up with the first ring's descriptors at this address.
    Start(u64),
    Disconnect,
    SlotReset,
}

fn step() -> impl Strategy<Value = Step> {
    let offset = prop_oneof![
        8 => 0..0x40u64,
        2 => 0x10..0x18u64,
        2 => prop_oneof![Just(0x400u64), 0x800..0x900u64],
        2 => 0x1000..0x1040u64,
        1 => 0x3000..0x3010u64,
        2 => 0x4000..0x8000u64,
    ];
    let value = prop_oneof![0..32u64, any::<u64>(), Just(u64::MAX), (0..0x100u64).prop_map(|v| v << 12)];
    prop_oneof![
        40 => (any::<bool>(), offset, 1..=8usize, proptest::option::of(value))
            .prop_map(|(config, offset, length, value)| Step::Access(config, offset, length, value)),
        2 => (0..0x200u64).prop_map(|page| Step::Start(page * 0x1_0000)),
        1 => Just(Step::Disconnect),
        1 => Just(Step::SlotReset),
    ]
}

fn check(steps: Vec<Step>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.sock");
    let device = Device::start(&path, Script::default());
    let machine = Machine::new(&config(&path));
    machine.decode(true);
    for step in steps {
        let start = Instant::now();
        match step {
            Step::Access(true, offset, length, Some(value)) => {
                machine.config_write(offset, &value.to_le_bytes()[..length]);
            }
            Step::Access(true, offset, ..) => {
                machine.config_read(offset);
            }
            Step::Access(false, offset, length, Some(value)) => {
                machine.write_anywhere(offset, &value.to_le_bytes()[..length]);
            }
            Step::Access(false, offset, length, None) => machine.read_anywhere(offset, length),
            Step::Start(descriptors) => {
                let _ = machine.slot.reset();
                let mut driver = Driver::new(&machine);
                driver.set_up(VERSION_1, 0);
                driver.set_queue(0, descriptors, 0x2000, 0x3000, 0);
                driver.driver_ok();
                continue;
            }
            Step::Disconnect => device.disconnect(),
            Step::SlotReset => {
                let _ = machine.slot.reset();
                machine.decode(true);
                continue;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(2));
    }
    for payload in device.seen(request::SET_VRING_ADDR) {
        let address = |at: usize| u64::from_ne_bytes(payload[at..at + 8].try_into().unwrap()) - (1 << 44);
        assert!([8, 16, 24].into_iter().all(|at| address(at) < 16 << 20));
    }
    // After all that, the slot can be reset and used.
    let _ = machine.slot.reset();
    let mut driver = Driver::start(&machine, VERSION_1, 1);
    driver.submit(0, 1, &[(driver.buffers(0), 16, false)]);
    driver.notify(0);
    assert_eq!(driver.wait(0, 1), [1]);
    until("link", || machine.slot.info().link() == LinkState::Active);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_accesses_does_harm(steps in proptest::collection::vec(step(), 1..150)) {
        check(steps);
    }
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.sock");
    let _device = Device::start(&path, Script::default());
    let machine = Machine::new(&config(&path));
    let window = machine.capability(5).unwrap();
    let set = |offset: u32, length: u32| {
        machine.config_write(window + 8, &offset.to_le_bytes());
        machine.config_write(window + 12, &length.to_le_bytes());
    };
    // Number of queues, 16 bits at offset 0x12 of the common configuration; memory decoding is off.
    set(0x12, 2);
    assert_eq!(machine.config_read(window + 16) & 0xffff, 2);
    set(0x14, 1);
    machine.config_write(window + 16, &[3]);
    assert_eq!(machine.config_read(window + 16) & 0xff, 3);
    // Device configuration.
    set(0x804, 4);
    assert_eq!(machine.config_read(window + 16), 0x0706_0504);
    // Nonsense is nobody's.
    for (offset, length) in [(0x12, 3), (0x13, 2), (0xffff_fffc, 4), (0x8000, 1)] {
        set(offset, length);
        assert_eq!(machine.config_read(window + 16), u32::MAX);
    }
    machine.config_write(window + 4, &[1]);
    set(0x12, 2);
    assert_eq!(machine.config_read(window + 16), u32::MAX);
}
