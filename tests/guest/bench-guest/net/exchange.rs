//! `net-exchange`: numbered frames both ways, every one of them delivered.

use super::station::{Counters, Datagram, Outbox, State, Talk, station};
use crate::stage::{Context, Job};
use crate::time::Clock;
use alloc::boxed::Box;
use alloc::string::String;
use guest::args;
use guest::exchange::{Exchange, Settings};
use guest::frame::{Protocol, UDP_OVERHEAD};
use guest::json::Object;
use guest::payload::{HEADER, Header, Kind};

/// Silence after which frames are sent again, in microseconds.
const RESEND_US: u64 = 20_000;
/// How long a side that is done waits for the other to say so, in microseconds.
const LINGER_US: u64 = 1_000_000;

struct Talker {
    settings: Settings,
    exchange: Exchange,
    port: u16,
    size: usize,
    seed: u64,
    /// A frame that found no buffer.
    unsent: Option<Header>,
}

/// Builds `net-exchange`.
pub(crate) fn exchange<'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
    net: &args::Net,
    args: &args::Window,
) -> Result<Box<dyn Job + 'c>, String> {
    let settings = Settings {
        count: args.count,
        window: args.frames,
        resend: context.clock.ticks(RESEND_US),
        linger: context.clock.ticks(LINGER_US),
    };
    let size = usize::from(net.size.unwrap_or(1024));
    let talk = Talker {
        settings,
        exchange: Exchange::new(settings, 0),
        port: net.port,
        size,
        seed: net.seed,
        unsent: None,
    };
    station(context, number, wanted, net, UDP_OVERHEAD + size, talk)
}

impl Talk for Talker {
    fn begin(&mut self, now: u64) {
        self.exchange = Exchange::new(self.settings, now);
    }

    fn receive(
        &mut self,
        now: u64,
        datagram: &Datagram<'_>,
        counters: &mut Counters,
        _out: &mut Outbox<'_, '_>,
    ) -> bool {
        let header = Header::parse(datagram.payload).filter(|_| datagram.flow.target_port == self.port);
        let Some(header) = header else { return false };
        if !header.intact(self.seed, datagram.payload) {
            counters.corrupt += 1;
        } else if self.exchange.receive(now, &header) {
            counters.received(now, datagram.payload.len());
            counters.span.count(now, datagram.payload.len());
        }
        true
    }

    fn transmit(&mut self, now: u64, counters: &mut Counters, out: &mut Outbox<'_, '_>) -> bool {
        let Some(flow) = out.peer() else { return false };
        let mut any = false;
        while let Some(header) = self.unsent.take().or_else(|| self.exchange.poll(now)) {
            let (seed, data) = (self.seed, header.kind == Kind::Data);
            let len = if data { self.size } else { HEADER };
            if !out.send(&flow, true, Protocol::Udp, len, |room| header.write(seed, room)) {
                self.unsent = Some(header);
                break;
            }
            any = true;
            if data {
                counters.tx += 1;
                counters.tx_bytes += len as u64;
            }
        }
        counters.retransmits = self.exchange.retransmits();
        counters.duplicate = self.exchange.duplicates();
        counters.reordered = self.exchange.reordered();
        any
    }

    fn state(&mut self, now: u64, _counters: &Counters) -> State {
        if self.exchange.finished(now) { State::Over } else { State::Running }
    }

    fn progress(&self, _counters: &Counters) -> Option<u64> {
        Some(self.exchange.progress())
    }

    fn patience(&self, _now: u64, _counters: &Counters, _clock: &Clock) -> Option<u64> {
        Some(RESEND_US / 2)
    }

    fn report(&mut self, event: Object, counters: &Counters, _clock: &Clock) -> (Object, bool) {
        (event, self.exchange.complete() && counters.corrupt == 0)
    }
}
