//! The TCP connections of one device's guest to the service: smoltcp's sockets on packets in memory.
//!
//! A device without connections has no sockets and no buffers; with the first packet it gets a listening socket, with each
//! connection another, up to [`CONNECTIONS_MAX`]. What is not done after [`PATIENCE`] is given up, and an engine that
//! nobody has used for that long goes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1::Metadata;
use smoltcp::iface::{Config, Interface as Stack, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time;
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::http::{self, REQUEST_MAX};
use super::token::Tokens;
use super::tree::View;
use super::wire::{Frames, Wire};
use super::{ADDRESS_V4, ADDRESS_V6};
use crate::drops::DropReason;
use crate::subnet::{Interface, Subnet};

/// Most connections of one device at a time. Clients open one after the other.
const CONNECTIONS_MAX: usize = 8;
/// How long a request may take, from its first to its last byte, and a client without one may stay.
const PATIENCE: Duration = Duration::from_secs(10);
const RECEIVE_BUFFER: usize = REQUEST_MAX;
const SEND_BUFFER: usize = 4096;
const PORT: u16 = 80;
/// smoltcp's own timers are looked at no more often than so.
const TICK: Duration = Duration::from_millis(1);
/// Packets per second, unless another number is given; EC2 has the same.
const PACKETS_PER_SECOND: u32 = 1024;
/// Largest packet that goes out, whatever the network carries: what every link carries.
const MTU_MAX: usize = 1500;

/// What the service has of one device.
#[derive(Debug)]
pub struct Endpoint {
    interface: Interface,
    metadata: Arc<Metadata>,
    tokens: Tokens,
    allowance: Allowance,
    /// When the last packet came.
    last: Instant,
    engine: Option<Box<Engine>>,
}

/// Packets taken in one second.
#[derive(Debug)]
struct Allowance {
    since: Instant,
    packets: u32,
}

impl Endpoint {
    /// Of a device whose guest has asked nothing yet.
    pub fn new(interface: Interface, metadata: Arc<Metadata>, now: Instant) -> Self {
        let allowance = Allowance { since: now, packets: 0 };
        Self { interface, metadata, tokens: Tokens::default(), allowance, last: now, engine: None }
    }

    /// Takes a packet of the guest's.
    ///
    /// # Errors
    /// There were too many in this second, or the host has no random numbers.
    pub fn receive(&mut self, subnet: &Subnet, packet: &[u8], now: Instant) -> Result<(), DropReason> {
        if now.saturating_duration_since(self.allowance.since) >= Duration::from_secs(1) {
            self.allowance = Allowance { since: now, packets: 0 };
        }
        let most = match self.metadata.packets_per_second {
            0 => PACKETS_PER_SECOND,
            given => given,
        };
        if self.allowance.packets >= most {
            return Err(DropReason::LinkLocalAllowance);
        }
        self.allowance.packets += 1;
        self.last = now;
        if self.engine.is_none() {
            let engine = Engine::new(&self.interface, subnet, now).ok_or(DropReason::NoDestination)?;
            self.engine = Some(Box::new(engine));
        }
        self.turn(subnet, Some(packet), now);
        Ok(())
    }

    /// When it is to be tended.
    pub fn due(&self) -> Instant {
        match &self.engine {
            Some(engine) => engine.due().unwrap_or(self.last + PATIENCE),
            None => self.tokens.last().unwrap_or(self.last + PATIENCE),
        }
    }

    /// Does what is due; false: there is nothing left that would have to be remembered.
    pub fn tend(&mut self, subnet: &Subnet, now: Instant) -> bool {
        self.turn(subnet, None, now);
        let quiet = now.saturating_duration_since(self.last) >= PATIENCE;
        if quiet && self.engine.as_ref().is_some_and(|e| e.connections.is_empty() && e.frames.is_empty()) {
            self.engine = None;
        }
        self.tokens.expire(now);
        // Within a second of the last packet there is the allowance, too.
        self.engine.is_some() || self.tokens.last().is_some() || !quiet
    }

    /// What is to be sent to the guest.
    pub fn frames(&mut self) -> Option<&mut Frames> {
        self.engine.as_mut().map(|e| &mut e.frames).filter(|f| !f.is_empty())
    }

    fn turn(&mut self, subnet: &Subnet, packet: Option<&[u8]>, now: Instant) {
        let Some(engine) = &mut self.engine else { return };
        let view = View { metadata: &self.metadata, interface: &self.interface, subnet };
        engine.turn(&view, &mut self.tokens, packet, now);
    }
}

/// A device's connections.
struct Engine {
    stack: Stack,
    sockets: SocketSet<'static>,
    /// The socket to which the next connection comes; `None`: there are [`CONNECTIONS_MAX`].
    listening: Option<SocketHandle>,
    connections: Vec<Connection>,
    frames: Frames,
    mtu: usize,
    /// smoltcp's clock begins here.
    epoch: Instant,
    /// When smoltcp's timers are due.
    timer: Option<Instant>,
    /// Where bodies of answers are made.
    body: Vec<u8>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("connections", &self.connections).finish_non_exhaustive()
    }
}

impl Engine {
    /// `None`: the host has no random numbers.
    fn new(interface: &Interface, subnet: &Subnet, now: Instant) -> Option<Self> {
        let mtu = MTU_MAX.min(subnet.mtu.into());
        let mut frames = Frames::new(subnet.gateway_mac, interface.mac);
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).ok()?;
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_ne_bytes(seed);
        let mut wire = Wire { packet: None, frames: &mut frames, mtu };
        let mut stack = Stack::new(config, &mut wire, time::Instant::ZERO);
        stack.update_ip_addrs(|addresses| {
            // There is room for two.
            let _ = addresses.push(IpCidr::new(ADDRESS_V4.into(), 32));
            let _ = addresses.push(IpCidr::new(ADDRESS_V6.into(), 128));
        });
        Some(Self {
            stack,
            sockets: SocketSet::new(Vec::new()),
            listening: None,
            connections: Vec::new(),
            frames,
            mtu,
            epoch: now,
            timer: None,
            body: Vec::new(),
        })
    }

    /// When something is to be done; `None`: nobody is connected.
    fn due(&self) -> Option<Instant> {
        let first = self.connections.iter().map(|c| c.until).min()?;
        Some(self.timer.map_or(first, |timer| timer.min(first)))
    }

    /// Takes a packet, if there is one, does what can be done, and looks when there will be more to do.
    fn turn(&mut self, view: &View<'_>, tokens: &mut Tokens, mut packet: Option<&[u8]>, now: Instant) {
        let elapsed = now.saturating_duration_since(self.epoch).as_micros();
        let clock = time::Instant::from_micros(i64::try_from(elapsed).unwrap_or(i64::MAX));
        self.listen();
        loop {
            let mut wire = Wire { packet: packet.take(), frames: &mut self.frames, mtu: self.mtu };
            self.stack.poll(clock, &mut wire, &mut self.sockets);
            self.accept(now);
            let mut moved = false;
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut::<Socket<'_>>(connection.socket);
                moved |= connection.serve(socket, view, tokens, &mut self.body, now);
            }
            if !moved {
                break;
            }
        }
        self.connections.retain(|c| {
            // Who waits for stray packets (TIME-WAIT) waits in vain: there is no network in between.
            let over =
                matches!(self.sockets.get::<Socket<'_>>(c.socket).state(), State::Closed | State::TimeWait);
            if over {
                self.sockets.remove(c.socket);
            }
            !over
        });
        self.listen();
        let timer = self.stack.poll_at(clock, &self.sockets);
        self.timer = timer.map(|at| {
            let at = u64::try_from(at.total_micros()).unwrap_or(0);
            (self.epoch + Duration::from_micros(at)).max(now + TICK)
        });
    }

    /// Waits for another connection, if there may be one.
    fn listen(&mut self) {
        if self.listening.is_some() || self.connections.len() >= CONNECTIONS_MAX {
            return;
        }
        let buffer = |bytes: usize| SocketBuffer::new(vec![0; bytes]);
        let mut socket = Socket::new(buffer(RECEIVE_BUFFER), buffer(SEND_BUFFER));
        // An answer is written as a whole: nothing more is to be waited for, neither to send nor to acknowledge.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        // It fails for port 0, and for a socket in use.
        if socket.listen(PORT).is_ok() {
            self.listening = Some(self.sockets.add(socket));
        }
    }

    /// Takes the connection that has come.
    fn accept(&mut self, now: Instant) {
        let arrived = |socket: &SocketHandle| !self.sockets.get::<Socket<'_>>(*socket).is_listening();
        if let Some(socket) = self.listening.take_if(|s| arrived(s)) {
            self.connections.push(Connection::new(socket, now));
        }
    }
}

/// One connection.
#[derive(Debug)]
struct Connection {
    socket: SocketHandle,
    /// What has come of a request.
    request: Vec<u8>,
    /// An answer.
    response: Vec<u8>,
    /// How much of it smoltcp has.
    sent: usize,
    /// There will be no further request.
    ending: bool,
    /// It is given up then.
    until: Instant,
}

impl Connection {
    fn new(socket: SocketHandle, now: Instant) -> Self {
        let until = now + PATIENCE;
        Self { socket, request: Vec::new(), response: Vec::new(), sent: 0, ending: false, until }
    }

    /// Takes and answers requests, as far as there are any and there is room for answers; whether anything has changed for
    /// the socket.
    fn serve(
        &mut self,
        socket: &mut Socket<'_>,
        view: &View<'_>,
        tokens: &mut Tokens,
        body: &mut Vec<u8>,
        now: Instant,
    ) -> bool {
        if !socket.is_open() {
            return false;
        }
        if now >= self.until {
            return self.give_up(socket, now);
        }
        let mut moved = false;
        loop {
            moved |= self.send(socket, now);
            if self.ending || !self.response.is_empty() {
                return moved;
            }
            moved |= self.fill(socket);
            match http::parse(&self.request) {
                Ok(None) => {
                    // The guest will say no more, or it has more than was read, which then is too long or no request.
                    if socket.state() == State::CloseWait && !socket.can_recv() {
                        self.end(socket);
                        return true;
                    }
                    return moved;
                }
                Ok(Some(request)) => {
                    let length = request.length;
                    self.ending = !http::respond(&request, view, tokens, now, body, &mut self.response);
                    // As many as were read.
                    self.request.drain(..length.min(self.request.len()));
                }
                Err(status) => {
                    http::refuse(status, &mut self.response);
                    self.ending = true;
                }
            }
            self.until = now + PATIENCE;
        }
    }

    /// Reads what there is and has room.
    fn fill(&mut self, socket: &mut Socket<'_>) -> bool {
        let before = self.request.len();
        // The buffer is a ring: what has come may be in two pieces.
        while socket.can_recv() && self.request.len() < REQUEST_MAX {
            let room = REQUEST_MAX - self.request.len();
            let read = socket.recv(|bytes| {
                let n = bytes.len().min(room);
                self.request.extend(bytes.iter().take(n));
                (n, n)
            });
            if read.is_err() {
                break;
            }
        }
        self.request.len() > before
    }

    /// Sends as much of the answer as there is room for.
    fn send(&mut self, socket: &mut Socket<'_>, now: Instant) -> bool {
        let Some(rest @ [_, ..]) = self.response.get(self.sent..) else { return false };
        let Ok(n) = socket.send_slice(rest) else {
            // The guest is gone, or has never been there.
            socket.abort();
            return true;
        };
        if n == 0 {
            return false;
        }
        self.sent += n;
        self.until = now + PATIENCE;
        if self.sent == self.response.len() {
            (self.sent, self.response) = (0, Vec::new());
            if self.ending {
                self.end(socket);
            }
        }
        true
    }

    fn end(&mut self, socket: &mut Socket<'_>) {
        self.ending = true;
        socket.close();
    }

    /// A client that has only stayed is told to go, and has time for that; others are not waited for.
    fn give_up(&mut self, socket: &mut Socket<'_>, now: Instant) -> bool {
        if socket.state() == State::Established
            && self.request.is_empty()
            && self.response.is_empty()
            && !self.ending
        {
            self.end(socket);
        } else {
            socket.abort();
        }
        self.until = now + PATIENCE;
        true
    }
}

#[cfg(test)]
#[path = "endpoint_tests.rs"]
mod tests;
