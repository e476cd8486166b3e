//! `net-echo`, `net-send`, `net-recv`, `net-pingpong`.

use super::station::{Counters, Datagram, Outbox, State, Talk, station};
use crate::stage::{Context, Job};
use crate::time::Clock;
use alloc::boxed::Box;
use alloc::string::String;
use guest::args;
use guest::frame::{Protocol, UDP_OVERHEAD};
use guest::histogram::Histogram;
use guest::json::Object;
use guest::payload::{HEADER, Header, Kind};
use guest::span::Span;

/// Frames sent in one turn, so that receiving gets its turn as well.
const BURST: usize = 64;

struct Echo {
    count: u64,
    ticks: u64,
    start: u64,
}

/// Builds `net-echo`.
pub(crate) fn echo<'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
    net: &args::Net,
    args: &args::Echo,
) -> Result<Box<dyn Job + 'c>, String> {
    let talk = Echo { count: args.count, ticks: context.clock.ticks(args.micros), start: 0 };
    station(context, number, wanted, net, UDP_OVERHEAD + 1472, talk)
}

impl Talk for Echo {
    fn begin(&mut self, now: u64) {
        self.start = now;
    }

    fn receive(
        &mut self,
        now: u64,
        datagram: &Datagram<'_>,
        counters: &mut Counters,
        out: &mut Outbox<'_, '_>,
    ) -> bool {
        if datagram.protocol != Protocol::Udp {
            return false;
        }
        counters.received(now, datagram.payload.len());
        let back = datagram.flow.reversed(datagram.flow.target_mac);
        let payload = datagram.payload;
        if out.send(&back, false, Protocol::Udp, payload.len(), |room| room.copy_from_slice(payload)) {
            counters.tx += 1;
            counters.tx_bytes += payload.len() as u64;
            counters.span.count(now, payload.len());
        }
        true
    }

    fn transmit(&mut self, _now: u64, _counters: &mut Counters, _out: &mut Outbox<'_, '_>) -> bool {
        false
    }

    fn state(&mut self, now: u64, counters: &Counters) -> State {
        let answered = counters.tx + counters.pings();
        let over =
            (self.count > 0 && answered >= self.count) || (self.ticks > 0 && now - self.start >= self.ticks);
        if over { State::Over } else { State::Running }
    }

    fn progress(&self, _counters: &Counters) -> Option<u64> {
        None
    }

    fn patience(&self, now: u64, _counters: &Counters, clock: &Clock) -> Option<u64> {
        let left = self.ticks.saturating_sub(now.saturating_sub(self.start));
        (self.ticks > 0).then(|| clock.micros(left) + 1)
    }

    fn report(&mut self, event: Object, counters: &Counters, _clock: &Clock) -> (Object, bool) {
        (event, self.count == 0 || counters.tx + counters.pings() >= self.count)
    }
}

struct Send {
    count: u64,
    sent: u64,
    /// With TCP: connections that have been opened, one for each flow.
    opened: usize,
    /// When they are opened once more: a receiver that was not there yet has not seen it, nor has what tracks its connections.
    again: u64,
    /// Ticks from one time to the next; 0: without connections.
    reopening: u64,
    size: usize,
    seed: u64,
    protocol: Protocol,
    /// Ticks between frames; 0: none.
    interval: u64,
    /// Of the measurement; 0: any.
    ticks: u64,
}

/// Builds `net-send`.
pub(crate) fn send<'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
    net: &args::Net,
    args: &args::Send,
) -> Result<Box<dyn Job + 'c>, String> {
    let size = usize::from(net.size.unwrap_or(1024));
    let talk = Send {
        count: args.count,
        sent: 0,
        opened: usize::MAX,
        again: 0,
        reopening: if args.protocol == Protocol::Tcp { context.clock.ticks(10_000) } else { 0 },
        size,
        seed: net.seed,
        protocol: args.protocol,
        interval: (context.clock.khz() * 1000).checked_div(args.rate).unwrap_or(0),
        ticks: context.clock.ticks(args.micros),
    };
    station(context, number, wanted, net, args.protocol.overhead() + size, talk)
}

impl Send {
    fn over(&self, now: u64, span: &Span) -> bool {
        span.ops() >= self.count || span.expired(now, self.ticks)
    }
}

impl Talk for Send {
    fn receive(
        &mut self,
        _now: u64,
        _datagram: &Datagram<'_>,
        _counters: &mut Counters,
        _out: &mut Outbox<'_, '_>,
    ) -> bool {
        false
    }

    fn transmit(&mut self, now: u64, counters: &mut Counters, out: &mut Outbox<'_, '_>) -> bool {
        let Some(flow) = out.peer() else { return false };
        if self.reopening > 0 && now >= self.again {
            self.opened = 0;
            self.again = now + self.reopening;
        }
        while self.opened < out.flows() {
            if !out.send(&flow, true, Protocol::TcpSyn, 0, |_| ()) {
                return false;
            }
            self.opened += 1;
        }
        // The time counts from the first frame, not from the search for the peer.
        let allowed = counters.span.start(now).checked_div(self.interval).map_or(u64::MAX, |due| due + 1);
        let mut any = false;
        for _ in 0..BURST {
            if self.sent >= allowed || self.over(now, &counters.span) {
                break;
            }
            let header = Header { kind: Kind::Data, finished: false, sequence: self.sent, acknowledged: 0 };
            let seed = self.seed;
            if !out.send(&flow, true, self.protocol, self.size, |room| header.write(seed, room)) {
                break;
            }
            any = true;
            self.sent += 1;
            counters.tx += 1;
            counters.tx_bytes += self.size as u64;
            counters.span.count(now, self.size);
        }
        any
    }

    fn state(&mut self, now: u64, counters: &Counters) -> State {
        if self.over(now, &counters.span) { State::Over } else { State::Running }
    }

    fn progress(&self, _counters: &Counters) -> Option<u64> {
        Some(self.sent)
    }

    fn patience(&self, _now: u64, _counters: &Counters, clock: &Clock) -> Option<u64> {
        Some(if self.interval > 0 { clock.micros(self.interval).clamp(100, 100_000) } else { 20_000 })
    }

    fn report(&mut self, event: Object, counters: &Counters, _clock: &Clock) -> (Object, bool) {
        (event, counters.span.ops() >= self.count || self.ticks > 0)
    }
}

struct Receive {
    count: u64,
    min: u64,
    port: u16,
    seed: u64,
    ticks: u64,
    timeout: u64,
    start: u64,
    /// Next sequence number if nothing is lost.
    expected: u64,
}

/// Builds `net-recv`.
pub(crate) fn receive<'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
    net: &args::Net,
    args: &args::Receive,
) -> Result<Box<dyn Job + 'c>, String> {
    let talk = Receive {
        count: args.count,
        min: args.min,
        port: net.port,
        seed: net.seed,
        ticks: context.clock.ticks(args.micros),
        timeout: context.clock.ticks(wanted.timeout_us),
        start: 0,
        expected: 0,
    };
    station(context, number, wanted, net, UDP_OVERHEAD + 1472, talk)
}

impl Talk for Receive {
    fn begin(&mut self, now: u64) {
        self.start = now;
    }

    fn receive(
        &mut self,
        now: u64,
        datagram: &Datagram<'_>,
        counters: &mut Counters,
        _out: &mut Outbox<'_, '_>,
    ) -> bool {
        let header = Header::parse(datagram.payload).filter(|header| header.kind == Kind::Data);
        let Some(header) = header.filter(|_| datagram.flow.target_port == self.port) else { return false };
        if !header.intact(self.seed, datagram.payload) {
            counters.corrupt += 1;
            return true;
        }
        counters.received(now, datagram.payload.len());
        counters.span.count(now, datagram.payload.len());
        if header.sequence >= self.expected {
            counters.lost += header.sequence - self.expected;
            self.expected = header.sequence + 1;
        } else {
            // Late: it was counted as lost before. (A frame that comes twice looks the same from here.)
            counters.reordered += 1;
            counters.lost = counters.lost.saturating_sub(1);
        }
        true
    }

    fn transmit(&mut self, _now: u64, _counters: &mut Counters, _out: &mut Outbox<'_, '_>) -> bool {
        false
    }

    fn state(&mut self, now: u64, counters: &Counters) -> State {
        let since = counters.last().unwrap_or(self.start);
        let over = counters.span.ops() + counters.corrupt >= self.count
            || counters.span.expired(now, self.ticks)
            || now.saturating_sub(since) >= self.timeout;
        if over { State::Over } else { State::Running }
    }

    fn progress(&self, _counters: &Counters) -> Option<u64> {
        None
    }

    fn patience(&self, now: u64, counters: &Counters, clock: &Clock) -> Option<u64> {
        let silence = now.saturating_sub(counters.last().unwrap_or(self.start));
        let timeout = self.timeout.saturating_sub(silence);
        let left = counters.span.left(now, self.ticks).unwrap_or(timeout).min(timeout);
        Some(clock.micros(left) + 1)
    }

    fn report(&mut self, event: Object, counters: &Counters, _clock: &Clock) -> (Object, bool) {
        (event, counters.span.ops() >= self.min && counters.corrupt == 0)
    }
}

struct PingPong {
    count: u64,
    size: usize,
    seed: u64,
    ticks: u64,
    retry: u64,
    retry_us: u64,
    /// Number of the request that waits for its answer, and when it was sent.
    waiting: Option<(u64, u64)>,
    next: u64,
    again: bool,
    times: Histogram,
    distribution: bool,
    lost: u64,
}

/// Builds `net-pingpong`.
pub(crate) fn ping_pong<'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
    net: &args::Net,
    args: &args::PingPong,
) -> Result<Box<dyn Job + 'c>, String> {
    let size = usize::from(net.size.unwrap_or(64)).max(HEADER);
    let talk = PingPong {
        count: args.count,
        size,
        seed: net.seed,
        ticks: context.clock.ticks(args.micros),
        retry: context.clock.ticks(args.retry_us),
        retry_us: args.retry_us,
        waiting: None,
        next: 0,
        again: false,
        times: Histogram::default(),
        distribution: args.distribution,
        lost: 0,
    };
    station(context, number, wanted, net, UDP_OVERHEAD + size, talk)
}

impl PingPong {
    fn over(&self, now: u64, span: &Span) -> bool {
        span.ops() >= self.count || span.expired(now, self.ticks)
    }
}

impl Talk for PingPong {
    fn receive(
        &mut self,
        now: u64,
        datagram: &Datagram<'_>,
        counters: &mut Counters,
        _out: &mut Outbox<'_, '_>,
    ) -> bool {
        let Some(header) = Header::parse(datagram.payload) else { return false };
        if !header.intact(self.seed, datagram.payload) {
            counters.corrupt += 1;
            return true;
        }
        match self.waiting {
            Some((sequence, sent)) if sequence == header.sequence => {
                self.waiting = None;
                self.next += 1;
                counters.received(now, datagram.payload.len());
                if counters.span.count(now, datagram.payload.len()) {
                    self.times.record(now.saturating_sub(sent));
                }
            }
            // The answer to a request that was sent again.
            _ => counters.duplicate += 1,
        }
        true
    }

    fn transmit(&mut self, now: u64, counters: &mut Counters, out: &mut Outbox<'_, '_>) -> bool {
        let Some(flow) = out.peer() else { return false };
        counters.span.start(now);
        if let Some((_, sent)) = self.waiting {
            if now.saturating_sub(sent) < self.retry {
                return false;
            }
            self.again = true;
            self.lost += 1;
            counters.lost += 1;
        } else if self.over(now, &counters.span) {
            return false;
        }
        let (sequence, seed) = (self.next, self.seed);
        let header = Header { kind: Kind::Data, finished: false, sequence, acknowledged: 0 };
        let now = crate::time::now();
        if !out.send(&flow, false, Protocol::Udp, self.size, |room| header.write(seed, room)) {
            return false;
        }
        self.waiting = Some((sequence, now));
        counters.tx += 1;
        counters.tx_bytes += self.size as u64;
        counters.retransmits += u64::from(core::mem::take(&mut self.again));
        true
    }

    fn state(&mut self, now: u64, counters: &Counters) -> State {
        if self.over(now, &counters.span) { State::Over } else { State::Running }
    }

    fn progress(&self, _counters: &Counters) -> Option<u64> {
        Some(self.next)
    }

    fn patience(&self, _now: u64, _counters: &Counters, _clock: &Clock) -> Option<u64> {
        Some(self.retry_us.clamp(100, 100_000))
    }

    fn report(&mut self, event: Object, counters: &Counters, clock: &Clock) -> (Object, bool) {
        let event =
            clock.report(event, &self.times, self.distribution).number("round_trips", self.times.count());
        (
            event,
            counters.corrupt == 0
                && (counters.span.ops() >= self.count || (self.ticks > 0 && counters.span.ops() > 0)),
        )
    }
}
