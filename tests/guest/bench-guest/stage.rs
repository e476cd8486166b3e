//! Runs the jobs of a stage side by side: each is polled in turn; when none has anything to do and all of them can be
//! woken by interrupts, the CPU sleeps.

use crate::time::{self, Clock};
use crate::virtio::Found;
use crate::{apic, blk, compute, gate, memory, misc, net, serial};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use guest::args::{Job as Spec, Kind};
use guest::json::Object;

/// What a call of [`Job::poll`] did.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Something: call again soon.
    Busy,
    /// Nothing: there was nothing to do.
    Idle,
    /// The same, but the CPU must not sleep: the job watches the clock, or has work that others may interrupt at any time.
    Awake,
    /// The job is over.
    Done,
}

/// A job in its I/O phase. Nothing here may print or touch a device register other than doorbells, unless that is what the job
/// is for.
pub(crate) trait Job {
    /// The I/O phase begins.
    fn begin(&mut self, now: u64);

    /// Does what there is to do and returns; never waits.
    fn poll(&mut self, now: u64) -> Progress;

    /// Asks the devices for interrupts. False if the job cannot be woken (it polls) or there is work already.
    fn arm(&mut self) -> bool {
        false
    }

    /// Takes that back.
    fn disarm(&mut self) {}

    /// How long the CPU may sleep before the job wants to look at the clock, in microseconds; `None`: for ever.
    fn patience(&self, _now: u64) -> Option<u64> {
        Some(100_000)
    }

    /// Whether the job ends when all others of its stage have.
    fn background(&self) -> bool {
        false
    }

    /// The result, and whether it is a good one. Devices may be touched again.
    fn finish(&mut self, now: u64, event: Object) -> (Object, bool);
}

/// What the jobs share.
pub(crate) struct Context<'a> {
    pub(crate) clock: Clock,
    pub(crate) devices: &'a [Found],
    /// The ACPI root pointer.
    pub(crate) rsdp: u64,
}

/// Runs one stage; whether all its jobs went well.
pub(crate) fn run(context: &Context<'_>, number: u64, specs: &[Spec<'_>]) -> bool {
    let ok = run_jobs(context, number, specs);
    // The jobs and their devices are gone.
    memory::release_dma();
    apic::release_vectors();
    ok
}

fn run_jobs(context: &Context<'_>, number: u64, specs: &[Spec<'_>]) -> bool {
    let mut jobs = Vec::new();
    let alone = specs.iter().all(|spec| matches!(spec.kind, Kind::Compute(_)));
    for spec in specs {
        match build(context, spec, alone) {
            Ok(job) => jobs.push(Running { spec, job, ended: None }),
            Err(what) => {
                serial::print(Object::event("error").number("job", spec.number).text("what", what));
                return false;
            }
        }
    }
    if specs.iter().any(|spec| spec.wait_serial) {
        serial::print(Object::event("waiting").number("stage", number));
        while serial::read().is_none() {
            context.clock.delay(200);
        }
    }
    serial::print(Object::event("io_begin").number("stage", number).number("tsc", time::now()));
    let start = time::now();
    poll_all(&context.clock, &mut jobs, start);
    let end = time::now();
    apic::stop_timer();
    let us = context.clock.micros(end - start);
    serial::print(Object::event("io_end").number("stage", number).number("tsc", end).number("us", us));
    let mut all_ok = true;
    for Running { spec, mut job, ended } in jobs {
        let ended = ended.unwrap_or(end);
        let event = Object::event("result")
            .number("job", spec.number)
            .text("kind", spec.name)
            .text("name", spec.label.unwrap_or_default())
            .number("us", context.clock.micros(ended - start));
        let (event, ok) = job.finish(ended, event);
        serial::print(event.flag("ok", ok));
        all_ok &= ok;
    }
    all_ok
}

struct Running<'s, 'c> {
    spec: &'s Spec<'s>,
    job: Box<dyn Job + 'c>,
    ended: Option<u64>,
}

fn poll_all(clock: &Clock, jobs: &mut [Running<'_, '_>], start: u64) {
    for running in jobs.iter_mut() {
        running.job.begin(start);
    }
    // When the timer will fire, if it is set.
    let mut alarm: Option<u64> = None;
    let in_front = |running: &Running<'_, '_>| !running.job.background();
    let company = jobs.iter().any(in_front);
    // Interrupts are on though the CPU does not sleep.
    let mut armed = false;
    loop {
        let seen = gate::interrupts();
        let now = time::now();
        let (mut busy, mut awake, mut running_jobs) = (false, false, false);
        for (index, running) in jobs.iter_mut().enumerate().filter(|(_, running)| running.ended.is_none()) {
            // Jobs before this one may have taken their time.
            let now = if index == 0 { now } else { time::now() };
            match running.job.poll(now) {
                Progress::Done => running.ended = Some(time::now()),
                Progress::Busy => (busy, running_jobs) = (true, true),
                Progress::Awake => (awake, running_jobs) = (true, true),
                Progress::Idle => running_jobs = true,
            }
        }
        // Who works in the background ends with the last of the others: the stage's end is theirs.
        if !running_jobs || company && jobs.iter().filter(|job| in_front(job)).all(|job| job.ended.is_some())
        {
            return;
        }
        if busy {
            if core::mem::take(&mut armed) {
                jobs.iter_mut().for_each(|running| running.job.disarm());
            }
            continue;
        }
        if awake {
            // Who waits for interrupts gets them, though it is polled as well: they are part of what is measured. One that
            // was asked for stands until there was something to do.
            if !core::mem::replace(&mut armed, true) {
                for running in jobs.iter_mut().filter(|running| running.ended.is_none()) {
                    running.job.arm();
                }
            }
            continue;
        }
        armed = false;
        let mut sleepers = jobs.iter_mut().filter(|running| running.ended.is_none());
        if sleepers.all(|running| running.job.arm()) {
            let waiting = jobs.iter().filter(|running| running.ended.is_none());
            let patience = waiting.filter_map(|running| running.job.patience(now)).min();
            // Now, or while there was work.
            if apic::timer_fired() {
                alarm = None;
            }
            let due = patience.map(|micros| now.saturating_add(clock.ticks(micros.max(50))));
            // Not set anew for a later time: each setting costs an exit to the kernel.
            if let Some(due) = due.filter(|due| alarm.is_none_or(|alarm| *due < alarm)) {
                apic::timer(clock.micros(due - now));
                alarm = Some(due);
            }
            gate::sleep(seen);
        }
        for running in jobs.iter_mut().filter(|running| running.ended.is_none()) {
            running.job.disarm();
        }
    }
}

fn build<'c>(context: &'c Context<'_>, spec: &Spec<'_>, alone: bool) -> Result<Box<dyn Job + 'c>, String> {
    Ok(match &spec.kind {
        Kind::BlkVerify(device, args) => blk::verify(context, spec.number, device, args)?,
        Kind::BlkBench(device, args) => blk::bench(context, spec.number, device, args)?,
        Kind::BlkFirst(device) => blk::first(context, spec.number, device)?,
        Kind::BlkMalformed(device, args) => blk::malformed(context, spec.number, device, args)?,
        Kind::BlkWatch(device, args) => blk::watch(context, spec.number, device, args)?,
        Kind::NetEcho(device, net, args) => net::echo(context, spec.number, device, net, args)?,
        Kind::NetSend(device, net, args) => net::send(context, spec.number, device, net, args)?,
        Kind::NetReceive(device, net, args) => net::receive(context, spec.number, device, net, args)?,
        Kind::NetExchange(device, net, args) => net::exchange(context, spec.number, device, net, args)?,
        Kind::NetRaw(device, net) => net::raw(context, spec.number, device, net)?,
        Kind::NetPingPong(device, net, args) => net::ping_pong(context, spec.number, device, net, args)?,
        Kind::Idle(micros) => misc::idle(context, *micros)?,
        // Alone it would never end.
        Kind::Compute(micros) => {
            compute::compute(context, micros.unwrap_or(if alone { 1_000_000 } else { u64::MAX }))
        }
        Kind::Spin(micros) => misc::spin(context, *micros),
        Kind::SerialEcho => Box::new(misc::SerialEcho::default()),
        Kind::Panic => Box::new(misc::Panic),
        Kind::Fault => Box::new(misc::Fault),
        Kind::End(how) => Box::new(misc::End { clock: context.clock, rsdp: context.rsdp, how: *how }),
    })
}
