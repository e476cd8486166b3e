//! Devices that die, hang, change and lie; the guest's driver must see a pause at worst.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::memory::GuestRam;
use hypervisor::slot::{LinkState, Slot};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use crate::device::{
    BACKEND_REQ, CONFIG, Device, Fault, INFLIGHT, MEM_SLOTS, MQ, REPLY_ACK, RESET, Script, request,
};
use crate::driver::{Driver, Events, Machine, VERSION_1, config, until};

struct Setup {
    dir: TempDir,
    device: Option<Device>,
}

impl Setup {
    fn new(script: Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let device = Some(Device::start(&dir.path().join("s.sock"), script));
        Self { dir, device }
    }

    fn device(&self) -> &Device {
        self.device.as_ref().unwrap()
    }

    fn machine(&self) -> Machine {
        Machine::new(&config(&self.dir.path().join("s.sock")))
    }

    fn kill(&mut self) {
        self.device = None;
    }

    fn restart(&mut self, script: Script) {
        self.device = Some(Device::start(&self.dir.path().join("s.sock"), script));
    }
}

fn link(machine: &Machine) -> LinkState {
    machine.slot.info().link()
}

/// Protocol features of devices that there are: everything, and hardly anything.
const REPERTOIRES: [u64; 4] = [
    MQ | REPLY_ACK | BACKEND_REQ | CONFIG | INFLIGHT | RESET | MEM_SLOTS,
    MQ | CONFIG,
    MQ | INFLIGHT,
    MQ | REPLY_ACK,
];

#[test]
fn requests_are_served_whatever_the_protocol_features() {
    for protocol in REPERTOIRES {
        let setup = Setup::new(Script { protocol, ..Default::default() });
        let machine = setup.machine();
        let mut driver = Driver::start(&machine, VERSION_1, 2);
        for queue in 0..2 {
            for head in 0..10 {
                driver.submit(queue, head, &[(driver.buffers(queue), 16, false)]);
            }
            driver.notify(queue);
            assert_eq!(driver.wait(queue, 10).len(), 10);
        }
        driver.reset();
        assert_eq!(setup.device().seen(request::GET_VRING_BASE).len(), 2);
        let mut driver = Driver::start(&machine, VERSION_1, 1);
        driver.submit(0, 3, &[(driver.buffers(0), 16, false)]);
        driver.notify(0);
        assert_eq!(driver.wait(0, 1), [3]);
        assert_eq!(machine.slot.info().reconnects, 0, "{:?}", machine.slot.info());
    }
}

#[test]
fn memory_above_the_hole_is_shared_too() {
    for protocol in [MQ | REPLY_ACK | MEM_SLOTS, MQ | REPLY_ACK] {
        let setup = Setup::new(Script { protocol, ..Default::default() });
        let machine = Machine::with_ram(&config(&setup.dir.path().join("s.sock")), 4 << 30);
        let mut driver = Driver::new(&machine);
        for base in [4 << 30, 0x10_0000, (5 << 30) - (2 << 20)] {
            driver.base = base;
            driver.set_up(VERSION_1, 2);
            driver.driver_ok();
            driver.submit(1, 4, &[(driver.buffers(1), 16, false)]);
            driver.notify(1);
            assert_eq!(driver.wait(1, 1), [4]);
            driver.reset();
        }
        assert_eq!(machine.slot.info().reconnects, 0);
    }
}

#[test]
fn what_is_in_flight_survives_the_device() {
    let mut setup = Setup::new(Script::default());
    let machine = setup.machine();
    let mut driver = Driver::start(&machine, VERSION_1, 2);
    for round in 0..5u16 {
        // Some are done, some are taken but not done, some come while nobody is there.
        driver.submit(0, 0, &[(driver.buffers(0), 16, false)]);
        driver.notify(0);
        assert_eq!(driver.wait(0, 1), [0]);
        setup.device().script().hold = true;
        for head in 1..4 {
            driver.submit(0, head, &[(driver.buffers(0), 16, false)]);
        }
        driver.notify(0);
        std::thread::sleep(Duration::from_millis(20));
        setup.kill();
        until("loss", || link(&machine) == LinkState::Lost);
        for head in 4..6 {
            driver.submit(0, head, &[(driver.buffers(0), 16, false)]);
        }
        driver.notify(0);
        assert!(driver.completed(0).is_empty());
        setup.restart(Script::default());
        let mut heads = driver.wait(0, 5);
        heads.sort_unstable();
        assert_eq!(heads, [1, 2, 3, 4, 5], "round {round}");
        // The second device got the first one's memory, and the used index as base: 6 requests a round are done.
        until("all rings", || link(&machine) == LinkState::Active);
        assert!(setup.device().seen(request::GET_INFLIGHT_FD).is_empty());
        let bases: Vec<_> = setup.device().seen(request::SET_VRING_BASE).iter().map(|p| p[4]).collect();
        assert_eq!(bases, [(round * 6 + 1) as u8, 0]);
    }
    assert_eq!(machine.slot.info().reconnects, 5);
}

#[test]
fn a_device_that_forgets_nothing_in_order_goes_on_without_shared_memory() {
    let script = Script { protocol: MQ | REPLY_ACK, ..Default::default() };
    let mut setup = Setup::new(script.clone());
    let machine = setup.machine();
    let mut driver = Driver::start(&machine, VERSION_1, 1);
    setup.device().script().hold = true;
    driver.submit(0, 7, &[(driver.buffers(0), 16, false)]);
    driver.notify(0);
    std::thread::sleep(Duration::from_millis(20));
    setup.kill();
    setup.restart(script);
    assert_eq!(driver.wait(0, 1), [7]);
}

#[test]
fn many_connections_later_it_still_works() {
    let setup = Setup::new(Script::default());
    let machine = setup.machine();
    let mut driver = Driver::start(&machine, VERSION_1, 1);
    for round in 0..50u16 {
        setup.device().disconnect();
        driver.submit(0, round % 60, &[(driver.buffers(0), 16, false)]);
        driver.notify(0);
        assert_eq!(driver.wait(0, 1), [round % 60]);
    }
}

#[test]
fn a_device_that_is_back_is_asked_everything_at_once() {
    let mut setup = Setup::new(Script::default());
    let machine = setup.machine();
    let mut driver = Driver::start(&machine, VERSION_1, 2);
    setup.kill();
    // It says nothing before it has heard the last question.
    setup.restart(Script { mute_until: Some(request::GET_MAX_MEM_SLOTS), ..Default::default() });
    driver.submit(1, 1, &[(driver.buffers(1), 16, false)]);
    driver.notify(1);
    assert_eq!(driver.wait(1, 1), [1]);
    until("the link to be whole", || machine.slot.info().reconnects == 1);
    assert_eq!(setup.device().seen(request::GET_FEATURES).len(), 1);
}

#[test]
fn a_device_may_come_back_with_another_protocol() {
    let all: Vec<_> = REPERTOIRES.into_iter().chain(REPERTOIRES).collect();
    let mut setup = Setup::new(Script { protocol: all[0], ..Default::default() });
    let machine = setup.machine();
    let mut driver = Driver::start(&machine, VERSION_1, 1);
    for (round, protocol) in (0..).zip(all) {
        setup.kill();
        until("loss", || link(&machine) == LinkState::Lost);
        setup.restart(Script { protocol, ..Default::default() });
        driver.submit(0, round, &[(driver.buffers(0), 16, false)]);
        driver.notify(0);
        assert_eq!(driver.wait(0, 1), [round]);
        until("the link to be whole", || machine.slot.info().reconnects == u64::from(round) + 1);
        // What it did not offer is not used on the connection that stays.
        let last = setup.device().seen(request::SET_PROTOCOL_FEATURES).pop().unwrap();
        assert_eq!(last, protocol.to_ne_bytes());
    }
}

#[test]
fn a_device_with_fewer_features_is_refused_until_it_has_them() {
    let mut setup = Setup::new(Script { features: VERSION_1 | 0b11, ..Default::default() });
    let machine = setup.machine();
    let mut driver = Driver::start(&machine, VERSION_1 | 0b10, 1);
    setup.kill();
    setup.restart(Script { features: VERSION_1 | 0b01, ..Default::default() });
    until("refusal", || machine.slot.info().last_error.contains("without features 0x2"));
    until("an event", || machine.events.has("LOST the device came back without features 0x2"));
    until("the pause", || link(&machine) == LinkState::Lost);
    setup.device().script().features = VERSION_1 | 0b10;
    driver.submit(0, 1, &[(driver.buffers(0), 16, false)]);
    driver.notify(0);
    assert_eq!(driver.wait(0, 1), [1]);
}

#[test]
fn a_device_with_fewer_queues_is_refused() {
    let mut setup = Setup::new(Script { queues: 4, ..Default::default() });
    let machine = setup.machine();
    let driver = Driver::start(&machine, VERSION_1, 1);
    assert_eq!(driver.num_queues(), 4);
    setup.kill();
    setup.restart(Script { queues: 2, ..Default::default() });
    until("refusal", || machine.slot.info().last_error.contains("2 queues instead of 4"));
}

#[test]
fn a_reset_is_done_at_once_while_the_link_is_lost() {
    let mut setup = Setup::new(Script::default());
    let machine = setup.machine();
    let driver = Driver::start(&machine, VERSION_1, 2);
    setup.kill();
    until("loss", || link(&machine) == LinkState::Lost);
    let start = Instant::now();
    driver.reset();
    let _ = machine.slot.reset();
    assert!(start.elapsed() < Duration::from_secs(1));
    // A driver that starts meanwhile is served when the device is back.
    let mut driver = Driver::start(&machine, VERSION_1, 2);
    driver.submit(1, 9, &[(driver.buffers(1), 16, false)]);
    driver.notify(1);
    setup.restart(Script::default());
    assert_eq!(driver.wait(1, 1), [9]);
    assert_eq!(setup.device().seen(request::SET_VRING_BASE)[1], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_reset_ends_although_the_device_hangs() {
    let setup = Setup::new(Script::default());
    let machine = setup.machine();
    let driver = Driver::start(&machine, VERSION_1, 2);
    until("rings", || setup.device().seen(request::SET_VRING_ENABLE).len() == 2);
    setup.device().script().fault = Some((request::GET_VRING_BASE, Fault::Hang));
    driver.set_status(0);
    assert_ne!(driver.status(), 0, "the rings are not stopped yet");
    // Registers answer at once meanwhile.
    let start = Instant::now();
    assert_eq!(driver.num_queues(), 2);
    driver.set_up_is_ignored();
    assert!(start.elapsed() < Duration::from_secs(2));
    until("reset", || driver.status() == 0);
    assert!(start.elapsed() > Duration::from_secs(10), "our cards take 10 s before they give up");
    assert!(start.elapsed() < Duration::from_secs(15));
    assert!(machine.slot.info().last_error.contains("GET_VRING_BASE in time"));
    setup.device().script().fault = None;
    let mut driver = Driver::start(&machine, VERSION_1, 2);
    driver.submit(0, 2, &[(driver.buffers(0), 16, false)]);
    driver.notify(0);
    assert_eq!(driver.wait(0, 1), [2]);
}

#[test]
fn a_reset_does_not_wait_for_rings_that_are_being_started() {
    for at in [request::SET_VRING_NUM, request::ADD_MEM_REG, request::SET_FEATURES] {
        let setup = Setup::new(Script::default());
        let machine = setup.machine();
        setup.device().script().fault = Some((at, Fault::Hang));
        let driver = Driver::start(&machine, VERSION_1, 1);
        until("the hang", || !setup.device().seen(at).is_empty());
        let start = Instant::now();
        driver.reset();
        assert!(start.elapsed() < Duration::from_secs(1), "{at}: {:?}", start.elapsed());
        assert!(machine.slot.info().last_error.contains("reset"), "{}", machine.slot.info().last_error);
        setup.device().script().fault = None;
        let mut driver = Driver::start(&machine, VERSION_1, 1);
        driver.submit(0, 2, &[(driver.buffers(0), 16, false)]);
        driver.notify(0);
        assert_eq!(driver.wait(0, 1), [2]);
    }
}

#[test]
fn memory_that_a_dropped_device_may_still_use_is_not_used_again() {
    let mut setup = Setup::new(Script::default());
    let mut machine = setup.machine();
    let rings = |device: &Device, count| {
        until("rings", || device.seen(request::SET_VRING_ENABLE).len() == count);
    };
    let driver = Driver::start(&machine, VERSION_1, 2);
    rings(setup.device(), 2);
    driver.reset();
    assert!(machine.slot.reset(), "the device has stopped");
    // It does not stop, and loses its connection for it.
    let _driver = Driver::start(&machine, VERSION_1, 2);
    rings(setup.device(), 4);
    setup.device().script().fault = Some((request::GET_VRING_BASE, Fault::Hang));
    let start = Instant::now();
    assert!(!machine.slot.reset());
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    setup.device().script().fault = None;
    let old = Arc::clone(&machine.ram);
    machine.replace_memory();
    let mut driver = Driver::start(&machine, VERSION_1, 2);
    driver.submit(0, 2, &[(driver.buffers(0), 16, false)]);
    driver.notify(0);
    assert_eq!(driver.wait(0, 1), [2]);
    let used = GuestAddress(driver.memory(0) + 0x2002);
    assert_eq!(old.memory().read_obj::<u16>(used).unwrap(), 0, "the device works on the old memory");
    assert_eq!(setup.device().seen(request::ADD_MEM_REG).len(), 2);
    // A connection that works but knows the old memory is made anew, and what was lost while rings ran counts until then.
    setup.kill();
    until("loss", || link(&machine) == LinkState::Lost);
    setup.restart(Script::default());
    rings(setup.device(), 2);
    assert!(!machine.slot.reset());
    let connections = machine.slot.info().reconnects;
    machine.replace_memory();
    until("a new connection", || machine.slot.info().reconnects > connections);
    assert!(machine.slot.reset());
}

#[test]
fn a_reset_of_the_driver_resets_the_device() {
    let setup = Setup::new(Script { writable: 8..9, ..Default::default() });
    let machine = setup.machine();
    let driver = Driver::start(&machine, VERSION_1, 1);
    driver.write_device_config(8, &[1]);
    until("write", || setup.device().script().config[8] == 1);
    driver.reset();
    assert_eq!(setup.device().seen(request::RESET_DEVICE).len(), 1);
    assert_eq!(driver.device_config::<1>(8), [8]);
    assert_eq!(driver.isr(), 0);
    // Before the driver is ready too.
    driver.set_status(1 | 2);
    driver.write_device_config(8, &[1]);
    until("write", || setup.device().script().config[8] == 1);
    driver.reset();
    assert_eq!(driver.device_config::<1>(8), [8]);
    assert_eq!(machine.slot.info().reconnects, 0);
    // A device that will not is not asked twice, and has stopped at least.
    setup.device().script().fault = Some((request::RESET_DEVICE, Fault::Refuse));
    let driver = Driver::start(&machine, VERSION_1, 1);
    driver.reset();
    assert_eq!(machine.slot.info().reconnects, 0);
}

#[test]
fn what_the_driver_wrote_to_the_configuration_survives_the_device() {
    let script = || Script { writable: 8..9, ..Default::default() };
    let mut setup = Setup::new(script());
    let machine = setup.machine();
    let driver = Driver::start(&machine, VERSION_1, 1);
    driver.write_device_config(8, &[1]);
    until("write", || setup.device().script().config[8] == 1);
    let generation = driver.generation();
    for round in 1..3 {
        setup.kill();
        until("loss", || link(&machine) == LinkState::Lost);
        setup.restart(script());
        until("connection", || machine.slot.info().reconnects == round);
        assert_eq!(setup.device().script().config[8], 1);
        assert_eq!(driver.device_config::<1>(8), [1]);
        // The driver sees no change, not even for a moment.
        assert_eq!((driver.generation(), driver.isr() & 2), (generation, 0));
        let order = setup.device().order();
        let position = |request| order.iter().position(|&r| r == request).unwrap();
        assert!(position(request::SET_CONFIG) < position(request::SET_VRING_KICK), "{order:?}");
    }
    // One that died before it answered.
    setup.device().script().fault = Some((request::SET_CONFIG, Fault::Close));
    driver.write_device_config(8, &[2]);
    until("loss", || setup.device().seen(request::SET_CONFIG).len() > 1);
    setup.device().script().fault = None;
    until("write", || setup.device().script().config[8] == 2);
}

#[test]
fn a_flood_of_configuration_changes_is_gathered() {
    let setup = Setup::new(Script::default());
    let machine = setup.machine();
    let driver = Driver::start(&machine, VERSION_1, 1);
    until("rings", || setup.device().seen(request::SET_VRING_ENABLE).len() == 1);
    let (before, start) = (setup.device().seen(request::GET_CONFIG).len(), Instant::now());
    for i in 0..200u8 {
        setup.device().script().config[0] = i;
        setup.device().say(&[2, 1, 0]);
    }
    until("the last", || driver.device_config::<1>(0) == [199]);
    let reads = setup.device().seen(request::GET_CONFIG).len() - before;
    let most = start.elapsed().as_millis() / 50 + 2;
    assert!(reads as u128 <= most, "{reads} reads in {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[test]
fn an_attempt_to_connect_shows_in_the_state_but_not_in_events() {
    let setup = Setup::new(Script::default());
    let machine = setup.machine();
    setup.device().script().fault = Some((request::GET_CONFIG, Fault::Hang));
    setup.device().disconnect();
    until("an attempt", || link(&machine) == LinkState::Negotiating);
    setup.device().script().fault = None;
    until("connection", || link(&machine) == LinkState::Active);
    assert!(!machine.events.has("NEGOTIATING"));
}

#[test]
fn a_shutdown_never_waits_for_the_device() {
    for at in [request::GET_FEATURES, request::GET_CONFIG, request::SET_VRING_NUM, request::GET_VRING_BASE] {
        let setup = Setup::new(Script::default());
        let machine = setup.machine();
        let driver = Driver::new(&machine);
        setup.device().script().fault = Some((at, Fault::Hang));
        if matches!(at, request::GET_FEATURES | request::GET_CONFIG) {
            setup.device().disconnect();
        } else {
            let mut driver = Driver::new(&machine);
            driver.set_up(VERSION_1, 1);
            driver.driver_ok();
        }
        if at == request::GET_VRING_BASE {
            until("rings", || setup.device().seen(request::SET_VRING_ENABLE).len() == 1);
            driver.set_status(0);
        }
        until("the hang", || !setup.device().seen(at).is_empty());
        let start = Instant::now();
        machine.slot.shutdown();
        assert!(start.elapsed() < Duration::from_secs(2), "{at}: {:?}", start.elapsed());
        assert_eq!(link(&machine), LinkState::Removed);
        // Registers answer, and resets are done.
        driver.reset();
        let _ = machine.slot.reset();
        machine.slot.shutdown();
    }
}

#[test]
fn a_shutdown_works_while_lost() {
    let mut setup = Setup::new(Script::default());
    let machine = setup.machine();
    setup.kill();
    until("loss", || link(&machine) == LinkState::Lost);
    machine.slot.shutdown();
    assert_eq!(link(&machine), LinkState::Removed);
}

#[test]
fn configuration_changes_reach_the_driver_and_writes_reach_the_device() {
    let setup = Setup::new(Script { writable: 8..9, ..Default::default() });
    let machine = setup.machine();
    let driver = Driver::start(&machine, VERSION_1, 1);
    assert_eq!(driver.device_config::<4>(4), [4, 5, 6, 7]);
    let before = driver.generation();
    let mut new: Vec<u8> = (0..60).collect();
    new[4] = 0xaa;
    setup.device().change_config(new);
    until("change", || driver.device_config::<1>(4) == [0xaa]);
    assert_eq!(driver.generation(), before.wrapping_add(1));
    assert_eq!(driver.isr() & 2, 2);
    assert_eq!(driver.isr(), 0);
    assert!(machine.events.has("s0 config"));
    // A writable byte stays, another one is taken back by what the device says.
    driver.write_device_config(8, &[1]);
    assert_eq!(driver.device_config::<1>(8), [1]);
    until("write", || setup.device().script().config[8] == 1);
    driver.write_device_config(9, &[77]);
    until("take back", || driver.device_config::<1>(9) == [9]);
    assert_eq!(driver.device_config::<1>(8), [1]);
    assert_eq!(setup.device().seen(request::SET_CONFIG).len(), 2);
    // Beyond its end there is nothing.
    assert_eq!(driver.device_config::<4>(58), [58, 59, 0, 0]);
    driver.write_device_config(59, &[1, 1]);
    assert_eq!(driver.device_config::<1>(59), [59]);
}

#[test]
fn a_change_while_the_link_was_lost_reaches_the_driver() {
    let mut setup = Setup::new(Script::default());
    let machine = setup.machine();
    let driver = Driver::start(&machine, VERSION_1, 1);
    setup.kill();
    setup.restart(Script { config: vec![9; 60], ..Default::default() });
    until("change", || driver.device_config::<2>(0) == [9, 9]);
    assert_eq!(driver.isr() & 2, 2);
}

#[test]
fn a_flood_of_configuration_writes_is_bounded_while_nobody_takes_them() {
    let mut setup = Setup::new(Script { writable: 0..60, ..Default::default() });
    let machine = setup.machine();
    let driver = Driver::start(&machine, VERSION_1, 1);
    setup.kill();
    until("loss", || link(&machine) == LinkState::Lost);
    for i in 0..10_000u32 {
        driver.write_device_config(0, &i.to_le_bytes());
    }
    setup.restart(Script { writable: 0..60, ..Default::default() });
    until("link", || link(&machine) == LinkState::Active);
    assert!(setup.device().seen(request::SET_CONFIG).len() <= 64);
}

#[test]
fn a_broken_ring_needs_a_reset() {
    let setup = Setup::new(Script::default());
    let machine = setup.machine();
    let driver = Driver::start(&machine, VERSION_1, 1);
    until("rings", || setup.device().seen(request::SET_VRING_ENABLE).len() == 1);
    setup.device().report_broken_ring();
    until("NEEDS_RESET", || driver.status() & 64 != 0);
    assert_eq!(driver.isr() & 2, 2);
    driver.reset();
    let mut driver = Driver::start(&machine, VERSION_1, 1);
    driver.submit(0, 0, &[(driver.buffers(0), 16, false)]);
    driver.notify(0);
    assert_eq!(driver.wait(0, 1), [0]);
}

#[test]
fn rings_outside_of_ram_need_a_reset_and_never_reach_the_device() {
    let setup = Setup::new(Script::default());
    let machine = setup.machine();
    for (descriptors, available, used) in [
        (16 << 20, 0x1000, 0x2000),
        (0x1000, u64::MAX - 1, 0x2000),
        (0x1000, 0x2000, (16 << 20) - 8),
        (0x1001, 0x2000, 0x3000),
    ] {
        let mut driver = Driver::new(&machine);
        driver.set_up(VERSION_1, 0);
        driver.set_queue(0, descriptors, available, used, 0);
        driver.driver_ok();
        assert_eq!(driver.status(), 1 | 2 | 4 | 8 | 64);
        assert_eq!(driver.isr() & 2, 2);
        driver.reset();
    }
    assert!(setup.device().seen(request::SET_VRING_NUM).is_empty());
}

#[test]
fn nonsense_from_the_device_costs_it_its_connection_only() {
    let reply = |request: u32, payload: &[u8]| {
        let words = [request, 5, payload.len() as u32];
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.extend_from_slice(payload);
        bytes
    };
    let huge: Vec<u8> = [request::SET_FEATURES, 5, u32::MAX].iter().flat_map(|w| w.to_ne_bytes()).collect();
    let faults = [
        (request::SET_FEATURES, Fault::Say(huge)),
        (request::SET_FEATURES, Fault::Say(vec![0; 64])),
        (request::SET_FEATURES, Fault::Say(reply(request::GET_FEATURES, &[0; 8]))),
        (request::SET_FEATURES, Fault::Say(reply(request::SET_FEATURES, &[0; 7]))),
        (request::SET_FEATURES, Fault::Refuse),
        (request::ADD_MEM_REG, Fault::Refuse),
        (request::GET_INFLIGHT_FD, Fault::Say(reply(request::GET_INFLIGHT_FD, &[0; 4096]))),
        (request::SET_VRING_KICK, Fault::Close),
    ];
    let setup = Setup::new(Script::default());
    let machine = setup.machine();
    for (i, fault) in faults.into_iter().enumerate() {
        // A fresh connection, which has not been told of memory yet.
        let fresh = machine.slot.info().reconnects + 1;
        setup.device().disconnect();
        until("fresh connection", || machine.slot.info().reconnects == fresh);
        setup.device().script().fault = Some(fault.clone());
        let mut driver = Driver::start(&machine, VERSION_1, 1);
        driver.submit(0, 5, &[(driver.buffers(0), 16, false)]);
        driver.notify(0);
        until("loss", || link(&machine) == LinkState::Lost);
        setup.device().script().fault = None;
        assert_eq!(driver.wait(0, 1), [5], "fault {i} {fault:?}");
        until("connection", || machine.slot.info().reconnects == fresh + 1);
        driver.reset();
    }
    // In the handshake.
    for request in [request::GET_FEATURES, request::GET_PROTOCOL_FEATURES, request::GET_MAX_MEM_SLOTS] {
        let count = machine.slot.info().reconnects;
        setup.device().script().fault = Some((request, Fault::Say(reply(request, &[]))));
        setup.device().disconnect();
        until("loss", || machine.slot.info().last_error.contains("an answer of 0 bytes"));
        setup.device().script().fault = None;
        until("connection", || machine.slot.info().reconnects == count + 1);
        setup.device().disconnect();
        until("a new reason", || machine.slot.info().reconnects == count + 2);
    }
    let driver = Driver::start(&machine, VERSION_1, 1);
    let count = machine.slot.info().reconnects;
    setup.device().babble();
    until("connection", || machine.slot.info().reconnects == count + 1);
    assert!(machine.slot.info().last_error.contains("broke the vhost-user protocol"));
    setup.device().say(&[2, 1, 5000]);
    until("connection", || machine.slot.info().reconnects == count + 2);
    assert!(machine.slot.info().last_error.contains("its own channel"));
    // What belongs to features that were not offered is refused, and nothing else happens.
    setup.device().say(&[3, 1, 0]);
    drop(driver);
}

#[test]
fn a_device_that_cannot_be_used_is_named_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.sock");
    let connect = |change: &dyn Fn(&mut proto::v1::SlotConfig)| {
        let mut config = config(&path);
        change(&mut config);
        let ram = Arc::new(GuestRam::new(2 << 20).unwrap());
        Slot::connect(&config, ram, Arc::new(Events::default())).map(|_| ()).unwrap_err()
    };
    let start = Instant::now();
    let nobody = connect(&|_| ());
    assert!(nobody.message().contains("s.sock: cannot connect: No such file"), "{nobody}");
    assert_eq!(nobody.reason(), proto::error::ErrorReason::DeviceUnreachable);
    assert!(start.elapsed() < Duration::from_secs(3));
    for (script, text) in [
        (Script { features: 1, ..Default::default() }, "without VIRTIO_F_VERSION_1"),
        (
            Script { fault: Some((request::GET_FEATURES, Fault::Hang)), ..Default::default() },
            "GET_FEATURES in time",
        ),
        (
            Script { fault: Some((request::GET_FEATURES, Fault::Say(vec![1; 99]))), ..Default::default() },
            "broke the",
        ),
        (Script { protocol: 0, ..Default::default() }, "how many queues"),
        // As our cards do when a device is in use.
        (
            Script { fault: Some((request::GET_FEATURES, Fault::Close)), ..Default::default() },
            "is it plugged into another VM?",
        ),
    ] {
        let _device = Device::start(&path, script);
        let error = connect(&|_| ());
        assert!(error.to_string().contains(text), "{error}");
    }
    assert!(connect(&|c| c.queue_size = 100).to_string().contains("power of two"));
    // A device with two queues, or two pairs of queues.
    let _device = Device::start(&path, Script::default());
    let error = connect(&|c| c.queues = 5);
    assert_eq!(error.reason(), proto::error::ErrorReason::InvalidField);
    assert!(error.to_string().contains("5 queues are wanted, but the device has 2"), "{error}");
    let mut pairs = config(&path);
    pairs.queues = 4;
    assert_eq!(Driver::new(&Machine::new(&pairs)).num_queues(), 4);
}

#[test]
fn a_device_without_configuration_shows_the_configured_one() {
    let setup = Setup::new(Script { protocol: 0, ..Default::default() });
    let mut config = config(&setup.dir.path().join("s.sock"));
    config.queues = 2;
    config.static_config = vec![0x52, 0x54];
    config.config_size = 12;
    let machine = Machine::new(&config);
    let mut driver = Driver::start(&machine, VERSION_1, 2);
    assert_eq!(driver.device_config::<4>(0), [0x52, 0x54, 0, 0]);
    driver.submit(1, 0, &[(driver.buffers(1), 16, false)]);
    driver.notify(1);
    assert_eq!(driver.wait(1, 1), [0]);
}

#[test]
fn a_masked_feature_is_not_offered() {
    let setup = Setup::new(Script {
        features: VERSION_1 | 0b111 | 1 << 26 | 1 << 33 | 1 << 34,
        ..Default::default()
    });
    let mut config = config(&setup.dir.path().join("s.sock"));
    config.masked_features = 0b010;
    let machine = Machine::new(&config);
    assert_eq!(Driver::new(&machine).features(), VERSION_1 | 0b101);
}

#[test]
fn scrubbed_memory_is_what_the_device_sees_after_a_reset() {
    let setup = Setup::new(Script::default());
    let machine = setup.machine();
    let _driver = Driver::start(&machine, VERSION_1, 2);
    let _ = machine.slot.reset();
    machine.ram.scrub().unwrap();
    assert_eq!(machine.ram.memory().read_obj::<u64>(GuestAddress(0x10_1000)).unwrap(), 0);
    let mut driver = Driver::start(&machine, VERSION_1, 2);
    driver.submit(0, 1, &[(driver.buffers(0), 16, false)]);
    driver.notify(0);
    assert_eq!(driver.wait(0, 1), [1]);
    // The link kept its memory table.
    assert_eq!(setup.device().seen(request::ADD_MEM_REG).len(), 1);
}
