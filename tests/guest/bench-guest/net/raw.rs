//! `net-raw`: a network device by hand. What is typed is sent, what arrives is printed, and nothing is answered.

use super::port::Port;
use crate::serial;
use crate::stage::{Context, Job, Progress};
use alloc::boxed::Box;
use alloc::string::String;
use guest::args;
use guest::hex::{Hex, Line, Lines, MAX_FRAME};
use guest::json::Object;

/// How often the serial port, which has no interrupt here, is looked at by a CPU that sleeps, in microseconds.
const LOOK_US: u64 = 2_000;

struct Raw<'a> {
    port: Port<'a>,
    number: u32,
    interrupts: bool,
    lines: Lines,
    over: bool,
    tx: u64,
    rx: u64,
    wrong: u64,
}

/// Builds the job.
pub(crate) fn raw<'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
    net: &args::Net,
) -> Result<Box<dyn Job + 'c>, String> {
    let port = Port::open(context, number, wanted, net, MAX_FRAME)?;
    let (interrupts, lines) = (wanted.interrupts, Lines::default());
    Ok(Box::new(Raw { port, number, interrupts, lines, over: false, tx: 0, rx: 0, wrong: 0 }))
}

impl Raw<'_> {
    fn event(&self, name: &str) -> Object {
        Object::event(name).number("job", self.number)
    }

    /// Prints what has arrived; whether there was anything.
    fn receive(&mut self) -> bool {
        let (before, number) = (self.rx, self.number);
        for receiver in &mut self.port.receivers {
            while let Some(frame) = receiver.next() {
                self.rx += 1;
                let event = Object::event("frame").number("job", number);
                serial::print(event.text("hex", Hex(frame.bytes)));
            }
            receiver.refill();
        }
        self.rx != before
    }

    /// The next line that has been typed.
    fn line(&mut self) -> Option<Line> {
        loop {
            if let Some(line) = self.lines.push(serial::read()?) {
                return Some(line);
            }
        }
    }

    /// Sends what has been typed; whether there was anything.
    fn send(&mut self) -> bool {
        // One after the other: each is told of when it has gone, and the next waits where it was typed.
        let transmitter = &mut self.port.transmitters[0];
        if transmitter.reclaim() > 0 {
            self.tx += 1;
            serial::print(self.event("sent").number("tx", self.tx));
        } else if transmitter.in_flight() > 0 {
            return false;
        }
        let Some(line) = self.line() else { return false };
        let transmitter = &mut self.port.transmitters[0];
        match line {
            Line::Empty => self.over = true,
            Line::Frame(bytes) if let Some(room) = transmitter.frame(bytes.len()) => {
                room.copy_from_slice(&bytes);
                transmitter.send(bytes.len(), None);
                transmitter.kick();
            }
            Line::Frame(_) | Line::Wrong => self.wrong += 1,
        }
        true
    }
}

impl Job for Raw<'_> {
    fn begin(&mut self, _now: u64) {
        self.port.begin();
    }

    fn poll(&mut self, _now: u64) -> Progress {
        if self.interrupts {
            self.port.acknowledge();
        }
        let received = self.receive();
        let sent = self.send();
        match (self.over, received || sent) {
            (true, _) => Progress::Done,
            (false, true) => Progress::Busy,
            (false, false) => Progress::Idle,
        }
    }

    fn arm(&mut self) -> bool {
        self.port.arm(true)
    }

    fn disarm(&mut self) {
        self.port.disarm();
    }

    fn patience(&self, _now: u64) -> Option<u64> {
        Some(LOOK_US)
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        let (health, bogus) = (self.port.health(), self.port.bogus());
        let event = event
            .number("tx", self.tx)
            .number("rx", self.rx)
            .number("wrong", self.wrong)
            .number("bogus", bogus)
            .flag("needs_reset", health.needs_reset);
        (event, self.wrong == 0 && bogus == 0 && !health.needs_reset)
    }
}
