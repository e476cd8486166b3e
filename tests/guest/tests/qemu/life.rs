//! How guests end, and what they say when they fail.

use crate::vm::{Vm, accels, field, one};

#[test]
fn every_way_to_end_ends() {
    for (accel, _dir) in accels() {
        for end in ["poweroff", "reset", "i8042", "triple", "port:0x604:w:0x2000"] {
            let args = ["-M", "q35"].map(str::to_owned);
            let events = Vm::start(accel, &args, &format!("end={end} job=idle secs=0.05")).run();
            assert_eq!(one(&events, "done")["ok"], true, "{end}");
            assert!(!events.iter().any(|event| event["event"] == "error"), "{end}: {events:?}");
        }
    }
}

/// All other tests boot by a smaller one, where it is installed.
#[test]
fn the_usual_firmware_boots_it_too() {
    for (accel, _dir) in accels().into_iter().take(1) {
        let args = ["-M", "q35", "-bios", "bios-256k.bin"].map(str::to_owned);
        let events = Vm::start(accel, &args, "end=poweroff job=idle secs=0.05").run();
        assert_eq!(one(&events, "done")["ok"], true);
    }
}

#[test]
fn failures_of_the_guest_are_reported() {
    for (accel, _dir) in accels() {
        let args = ["-M", "q35"].map(str::to_owned);
        let last = |job: &str, event: &str| {
            let mut vm = Vm::start(accel, &args, job);
            let events = vm.until(event);
            events.last().expect("an event").clone()
        };
        let fault = last("job=fault", "exception");
        assert_eq!((field(&fault, "vector"), &fault["cr2"]), (14, &"0x700000000000".into()), "{fault}");
        assert_eq!(last("job=panic", "panic")["message"], "asked to");
        let error = last("job=blk-verify bytes=64X", "error");
        assert!(error["what"].as_str().is_some_and(|what| what.contains("bytes=64X")), "{error}");
        let error = last("job=blk-verify", "error");
        assert!(
            error["what"].as_str().is_some_and(|what| what.contains("there are 0 blk devices")),
            "{error}"
        );
    }
}
