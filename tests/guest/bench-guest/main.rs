//! The bench guest: see `README.md` of its package for what it does, `boot.s` for how it starts.

#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod apic;
mod blk;
mod compute;
mod gate;
mod memory;
mod misc;
mod net;
mod pci;
mod port;
mod runtime;
mod serial;
mod stage;
mod time;
mod virtio;

use guest::args::{End, Kind, Plan};
use guest::json::Object;
use stage::Context;
use time::Clock;

/// Called by boot.s at CPL 3, with the address of the PVH start info.
#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u32) -> ! {
    let boot = match memory::init(start_info) {
        Ok(boot) => boot,
        // There is no heap to build an event in.
        Err(what) => {
            for part in ["{\"event\":\"error\",\"what\":\"", what, "\"}\n{\"event\":\"done\",\"ok\":false}\n"]
            {
                serial::write(part.as_bytes());
            }
            gate::halt();
        }
    };
    let (clock, ok, end) = run(&boot);
    serial::print(Object::event("done").flag("ok", ok));
    if end != End::Halt {
        misc::end(&clock, boot.rsdp, end);
        serial::print(Object::event("error").text("what", "end= had no effect: the VM still runs"));
    }
    gate::halt();
}

fn run(boot: &memory::Boot) -> (Clock, bool, End) {
    let parsed = Plan::parse(boot.cmdline);
    let (clock, source) = Clock::find(parsed.as_ref().ok().and_then(|plan| plan.tsc_khz));
    let event = Object::event("boot")
        .number("tsc_khz", clock.khz())
        .text("tsc_source", source)
        .number("mem", boot.usable)
        .text("cmdline", boot.cmdline);
    let plan = match parsed {
        Ok(plan) => plan,
        Err(error) => {
            serial::print(event);
            serial::print(Object::event("error").text("what", alloc::format!("command line: {error}")));
            return (clock, false, guest::args::end_of(boot.cmdline));
        }
    };
    serial::print(event.text("ignored", plan.ignored.join(" ")));
    let needs_devices = |kind: &Kind<'_>| {
        !matches!(
            kind,
            Kind::Idle(_)
                | Kind::Spin(_)
                | Kind::Compute(_)
                | Kind::SerialEcho
                | Kind::Panic
                | Kind::Fault
                | Kind::End(_)
        )
    };
    let devices = if plan.stages.iter().flatten().any(|job| needs_devices(&job.kind)) {
        virtio::find(&plan, boot.rsdp)
    } else {
        Ok(alloc::vec::Vec::new())
    };
    let devices = match devices {
        Ok(devices) => devices,
        Err(what) => {
            serial::print(Object::event("error").text("what", what));
            return (clock, false, plan.end);
        }
    };
    let context = Context { clock, devices: &devices, rsdp: boot.rsdp };
    let mut ok = true;
    for (number, stage) in (1..).zip(&plan.stages) {
        ok &= stage::run(&context, number, stage);
    }
    (clock, ok, plan.end)
}
