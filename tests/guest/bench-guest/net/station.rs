//! A host on the network: answers ARP and pings, finds its peer, and hands datagrams to a [`Talk`].

use super::port::Port;
use crate::stage::{Context, Job, Progress};
use crate::time::{self, Clock};
use crate::virtio::Signals;
use alloc::boxed::Box;
use alloc::string::String;
use guest::args;
use guest::frame::{self, ARP_LEN, Flow, Ipv4, Mac, Protocol, Received};
use guest::gaps::Gaps;
use guest::json::Object;
use guest::span::Span;

/// The peer is asked for this often, in microseconds.
const ASK_US: u64 = 50_000;

/// What all network jobs count.
#[derive(Default)]
pub(super) struct Counters {
    /// What the job is measured by: frames, round trips.
    pub(super) span: Span,
    pub(super) tx: u64,
    pub(super) rx: u64,
    pub(super) tx_bytes: u64,
    pub(super) rx_bytes: u64,
    pub(super) corrupt: u64,
    pub(super) lost: u64,
    pub(super) reordered: u64,
    pub(super) duplicate: u64,
    pub(super) retransmits: u64,
    bad_checksum: u64,
    other: u64,
    arp: u64,
    icmp: u64,
    last: Option<u64>,
    gaps: Gaps,
}

impl Counters {
    fn new(warmup: u64, gaps: Gaps) -> Self {
        Self { span: Span::new(warmup), gaps, ..Self::default() }
    }

    /// Counts a received frame of the job.
    pub(super) fn received(&mut self, now: u64, bytes: usize) {
        self.rx += 1;
        self.rx_bytes += bytes as u64;
        if let Some(last) = self.last.replace(now) {
            self.gaps.add(now, now.saturating_sub(last));
        }
    }

    /// Pings answered.
    pub(super) fn pings(&self) -> u64 {
        self.icmp
    }

    /// When the last frame of the job came.
    pub(super) fn last(&self) -> Option<u64> {
        self.last
    }
}

/// Where a talk is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Running,
    Over,
}

/// A datagram for the job.
pub(super) struct Datagram<'a> {
    pub(super) flow: Flow,
    pub(super) protocol: Protocol,
    pub(super) payload: &'a [u8],
}

/// Sends for a job.
pub(super) struct Outbox<'p, 'a> {
    port: &'p mut Port<'a>,
    flows: usize,
    next: usize,
    peer: Option<Flow>,
    full: bool,
}

impl Outbox<'_, '_> {
    /// Sends a datagram with a payload that `fill` writes; false if there is no room now. Flows take turns, and have their pairs,
    /// as nothing keeps the order between pairs; `apart`: each has a source port of its own.
    pub(super) fn send(
        &mut self,
        flow: &Flow,
        apart: bool,
        protocol: Protocol,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> bool {
        let count = self.port.transmitters.len();
        let flows = self.flows();
        for turn in 0..count {
            let at = (self.next + turn) % flows;
            let transmitter = &mut self.port.transmitters[at % count];
            let partial = transmitter.partial_checksums();
            let flow = Flow {
                source_port: flow.source_port.wrapping_add(if apart { at as u16 } else { 0 }),
                ..*flow
            };
            if let Some(frame) = transmitter.frame(protocol.overhead() + len) {
                fill(&mut frame[protocol.overhead()..]);
                let total = frame::datagram(frame, &flow, protocol, len, partial);
                transmitter.send(total, partial.then_some(protocol));
                self.next = at + 1;
                return true;
            }
        }
        self.full = true;
        false
    }

    /// Flows that take turns.
    pub(super) fn flows(&self) -> usize {
        self.flows.max(self.port.transmitters.len())
    }

    /// The way to the peer, once it is known.
    pub(super) fn peer(&self) -> Option<Flow> {
        self.peer
    }
}

/// What a job does with the network.
pub(super) trait Talk {
    /// The I/O phase begins.
    fn begin(&mut self, _now: u64) {}

    /// Takes a datagram that was addressed to us; whether it was one of the job's.
    fn receive(
        &mut self,
        now: u64,
        datagram: &Datagram<'_>,
        counters: &mut Counters,
        out: &mut Outbox<'_, '_>,
    ) -> bool;

    /// Sends what is to be sent; whether it did.
    fn transmit(&mut self, now: u64, counters: &mut Counters, out: &mut Outbox<'_, '_>) -> bool;

    /// Whether the job is over.
    fn state(&mut self, now: u64, counters: &Counters) -> State;

    /// A number that changes when the job gets on; if it does not for `timeout=`, the job has failed. `None`: it may take for
    /// ever.
    fn progress(&self, counters: &Counters) -> Option<u64>;

    /// How long the job can do without the clock, in microseconds; `None`: for ever.
    fn patience(&self, _now: u64, _counters: &Counters, _clock: &Clock) -> Option<u64> {
        Some(100_000)
    }

    /// Adds to the result; whether it is good.
    fn report(&mut self, event: Object, counters: &Counters, clock: &Clock) -> (Object, bool);
}

/// A network job.
pub(super) struct Station<'a, T> {
    port: Port<'a>,
    talk: T,
    clock: Clock,
    interrupts: bool,
    ip: Ipv4,
    port_number: u16,
    peer: Option<Ipv4>,
    peer_mac: Option<Mac>,
    asked: Option<u64>,
    counters: Counters,
    progress: Option<u64>,
    begun: u64,
    moved: u64,
    timeout: u64,
    timed_out: bool,
    full: bool,
    flows: usize,
    next: usize,
}

/// Builds a network job. `frame`: the longest frame it sends.
pub(super) fn station<'c, T: Talk + 'c>(
    context: &'c Context<'_>,
    number: u32,
    wanted: &args::Device<'_>,
    net: &args::Net,
    frame: usize,
    talk: T,
) -> Result<Box<dyn Job + 'c>, String> {
    let port = Port::open(context, number, wanted, net, frame)?;
    Ok(Box::new(Station {
        port,
        talk,
        clock: context.clock,
        interrupts: wanted.interrupts,
        ip: net.ip,
        port_number: net.port,
        peer: net.peer,
        peer_mac: net.peer_mac,
        asked: None,
        counters: Counters::new(
            context.clock.ticks(net.warmup_us),
            Gaps::new(net.gaps_us.map(|us| context.clock.ticks(us))),
        ),
        progress: None,
        begun: 0,
        moved: 0,
        timeout: context.clock.ticks(wanted.timeout_us),
        timed_out: false,
        full: false,
        flows: net.flows as usize,
        next: 0,
    }))
}

impl<T: Talk> Station<'_, T> {
    fn peer_flow(&self) -> Option<Flow> {
        Some(Flow {
            source_mac: self.port.mac,
            target_mac: self.peer_mac?,
            source: self.ip,
            target: self.peer?,
            source_port: self.port_number,
            target_port: self.port_number,
        })
    }

    /// Takes in everything that has arrived; whether there was anything.
    fn receive(&mut self, now: u64) -> bool {
        let mut happened = false;
        for index in 0..self.port.receivers.len() {
            // The receiver is lent out so that answers can be sent while its frame is looked at.
            let mut receiver = self.port.receivers.swap_remove(index);
            while let Some(frame) = receiver.next() {
                happened = true;
                self.frame(now, frame.bytes, frame.trusted);
            }
            if happened {
                receiver.refill();
            }
            self.port.receivers.push(receiver);
            let last = self.port.receivers.len() - 1;
            self.port.receivers.swap(index, last);
        }
        happened
    }

    fn frame(&mut self, now: u64, bytes: &mut [u8], trusted: bool) {
        let mine = bytes.get(0..6).is_some_and(|to| to == self.port.mac.0 || to == Mac::BROADCAST.0);
        match frame::parse(bytes, trusted) {
            _ if !mine => self.counters.other += 1,
            Received::ArpRequest { mac, ip, target } => {
                self.learn(mac, ip);
                if target == self.ip {
                    self.counters.arp += 1;
                    self.arp(ip, Some(mac));
                }
            }
            Received::ArpReply { mac, ip } => self.learn(mac, ip),
            Received::Ping { target } if target == self.ip => {
                self.counters.icmp += 1;
                let mac = self.port.mac;
                let transmitter = &mut self.port.transmitters[0];
                if let Some(out) = transmitter.frame(bytes.len()) {
                    out.copy_from_slice(bytes);
                    frame::answer_ping(out, mac);
                    transmitter.send(bytes.len(), None);
                }
            }
            Received::Datagram { checksum_ok: false, .. } => self.counters.bad_checksum += 1,
            Received::Datagram { flow, protocol, payload, .. } if flow.target == self.ip => {
                let peer = self.peer_flow();
                let mut out =
                    Outbox { port: &mut self.port, flows: self.flows, next: self.next, peer, full: false };
                let datagram = Datagram { flow, protocol, payload };
                if !self.talk.receive(now, &datagram, &mut self.counters, &mut out) {
                    self.counters.other += 1;
                }
                self.next = out.next;
            }
            Received::Ping { .. } | Received::Datagram { .. } | Received::Other => self.counters.other += 1,
        }
    }

    fn learn(&mut self, mac: Mac, ip: Ipv4) {
        if self.peer == Some(ip) {
            self.peer_mac = Some(mac);
        }
    }

    fn arp(&mut self, target: Ipv4, to: Option<Mac>) {
        let (mac, ip) = (self.port.mac, self.ip);
        let transmitter = &mut self.port.transmitters[0];
        if let Some(out) = transmitter.frame(ARP_LEN) {
            let len = frame::arp(out, mac, ip, target, to);
            transmitter.send(len, None);
        }
    }

    fn ask(&mut self, now: u64) {
        let due = self.asked.is_none_or(|asked| now.saturating_sub(asked) > self.clock.ticks(ASK_US));
        if let (Some(peer), None, true) = (self.peer, self.peer_mac, due) {
            self.asked = Some(now);
            self.arp(peer, None);
        }
    }
}

impl<T: Talk> Job for Station<'_, T> {
    fn begin(&mut self, now: u64) {
        (self.begun, self.moved) = (now, now);
        self.port.begin();
        self.talk.begin(now);
    }

    fn poll(&mut self, now: u64) -> Progress {
        if self.interrupts {
            self.port.acknowledge();
        }
        let reclaimed: usize = self.port.transmitters.iter_mut().map(super::port::Transmitter::reclaim).sum();
        let received = self.receive(now);
        if self.counters.span.warm(now) {
            self.counters.gaps.clear();
            self.port.measure();
        }
        self.ask(now);
        let peer = self.peer_flow();
        let mut out = Outbox { port: &mut self.port, flows: self.flows, next: self.next, peer, full: false };
        let sent = self.talk.transmit(now, &mut self.counters, &mut out);
        (self.full, self.next) = (out.full, out.next);
        for transmitter in &mut self.port.transmitters {
            transmitter.kick();
        }
        let in_flight: usize = self.port.transmitters.iter().map(super::port::Transmitter::in_flight).sum();
        // Not any traffic: questions for a peer that is not there go out for ever.
        let progress = self.talk.progress(&self.counters);
        if progress.is_none() || progress != self.progress {
            (self.progress, self.moved) = (progress, now);
        }
        let silent = now.saturating_sub(self.moved) > self.timeout;
        match self.talk.state(now, &self.counters) {
            // What was sent last must be on its way before the device is reset.
            State::Over if in_flight == 0 => return Progress::Done,
            State::Over if silent => {
                self.timed_out = true;
                return Progress::Done;
            }
            State::Running if silent => {
                self.timed_out = true;
                return Progress::Done;
            }
            State::Over | State::Running => {}
        }
        if received || sent || reclaimed > 0 { Progress::Busy } else { Progress::Idle }
    }

    fn arm(&mut self) -> bool {
        let waits_for_room = self.full || self.talk_is_over();
        self.port.arm(waits_for_room)
    }

    fn disarm(&mut self) {
        self.port.disarm();
    }

    fn patience(&self, now: u64) -> Option<u64> {
        let asking = (self.peer.is_some() && self.peer_mac.is_none()).then_some(ASK_US);
        let talking = self.talk.patience(now, &self.counters, &self.clock);
        asking.into_iter().chain(talking).min()
    }

    fn finish(&mut self, _now: u64, event: Object) -> (Object, bool) {
        let health = self.port.health();
        let (total, measured) = (self.port.signals(), self.port.measured());
        let bogus = self.port.bogus();
        let c = &self.counters;
        let micros = self.clock.micros(c.span.ticks());
        let event = event
            .number("ops", c.span.ops())
            .number("bytes", c.span.bytes())
            .number("measured_us", micros)
            .number("pps", c.span.ops() * 1_000_000 / micros.max(1))
            .number("tx", c.tx)
            .number("rx", c.rx)
            .number("tx_bytes", c.tx_bytes)
            .number("rx_bytes", c.rx_bytes)
            .number("corrupt", c.corrupt)
            .number("lost", c.lost)
            .number("reordered", c.reordered)
            .number("duplicate", c.duplicate)
            .number("bad_csum", c.bad_checksum)
            .number("other", c.other)
            .number("arp", c.arp)
            .number("icmp", c.icmp)
            .number("retransmits", c.retransmits)
            .number("max_gap_us", self.clock.micros(c.gaps.longest()))
            .number("total_ops", c.span.total())
            .number("config_irqs", health.config_interrupts)
            .number("bogus", bogus)
            .flag("needs_reset", health.needs_reset)
            .flag("timed_out", self.timed_out);
        let event = Signals::report(event, measured, total, &self.clock);
        let event = match self.peer_mac {
            Some(mac) => event.text("peer_mac", mac),
            None => event,
        };
        let event = match c.gaps.kept() {
            Some(gaps) => {
                let since = |at: u64| self.clock.micros(at.saturating_sub(self.begun));
                event.pairs("gaps", gaps.iter().map(|&(end, gap)| (since(end), self.clock.micros(gap))))
            }
            None => event,
        };
        let (event, good) = self.talk.report(event, c, &self.clock);
        (event, good && !self.timed_out && !health.needs_reset && bogus == 0 && c.bad_checksum == 0)
    }
}

impl<T: Talk> Station<'_, T> {
    fn talk_is_over(&mut self) -> bool {
        self.talk.state(time::now(), &self.counters) == State::Over
    }
}
