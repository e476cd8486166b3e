//! What a slot asks of its device, in the order in which it must be asked.

mod handshake;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::connection::{Cancel, Connection, raw};
use super::message::{Payload, Request, protocol, u32_at, u64_at};
use super::{F_PROTOCOL_FEATURES, LinkError};
use crate::memory::{GuestRam, RamRegion};

pub(in crate::slot) use handshake::Offer;

/// Ring addresses are given to devices in an address space of ours ("user addresses"), which the specification lets us choose:
/// guest-physical addresses behind this constant. So no device learns where this process has its memory, and no address is 0,
/// which some devices take for "none".
const USER_BASE: u64 = 1 << 44;

/// How long a device may take.
#[derive(Debug, Clone, Copy)]
pub(in crate::slot) struct Patience {
    /// For a whole handshake.
    pub(in crate::slot) handshake: Duration,
    /// For one request.
    pub(in crate::slot) request: Duration,
    /// For starting all rings.
    pub(in crate::slot) start: Duration,
    /// For stopping all rings: what is in flight has to be finished. Our cards take 10 s for that before they give up.
    pub(in crate::slot) stop: Duration,
    /// For stopping all rings when the whole machine is reset, which then goes on with memory that the device has not got.
    pub(in crate::slot) machine_reset: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(2),
            request: Duration::from_secs(2),
            start: Duration::from_secs(5),
            stop: Duration::from_secs(12),
            machine_reset: Duration::from_secs(5),
        }
    }
}

/// Shared memory in which a device notes what is in flight. Its content is the device's business; we keep it and give it to the
/// device's next incarnation.
#[derive(Debug)]
pub(in crate::slot) struct Inflight {
    file: File,
    size: u64,
    offset: u64,
    queues: u16,
    queue_size: u16,
}

/// Requests under way at a time: sockets hold so many messages, and as many acknowledgements, while nobody reads.
const MAX_UNACKNOWLEDGED: usize = 32;

/// A ring to be started. Addresses are guest-physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::slot) struct RingSetup {
    /// Number of the queue.
    pub(in crate::slot) index: u16,
    /// Number of descriptors.
    pub(in crate::slot) size: u16,
    /// Descriptor table.
    pub(in crate::slot) descriptors: u64,
    /// Available ring ("driver area").
    pub(in crate::slot) available: u64,
    /// Used ring ("device area").
    pub(in crate::slot) used: u64,
}

/// A connection after its handshake.
#[derive(Debug)]
pub(in crate::slot) struct Frontend {
    connection: Connection,
    patience: Patience,
    protocol: u64,
    has_protocol_features: bool,
    // How many memory regions the device takes one by one.
    memory_slots: u64,
    // What the device was given.
    memory: Option<Arc<GuestRam>>,
    // End of what consists of several requests.
    limit: Option<Instant>,
    // Sent, and not acknowledged yet, in order.
    unacknowledged: Vec<Request>,
}

impl Frontend {
    /// Connects. The handshake is still to be made.
    pub(in crate::slot) fn dial(path: &Path, patience: Patience, cancel: Cancel) -> Result<Self, LinkError> {
        Ok(Self {
            connection: Connection::dial(path, cancel)?,
            patience,
            protocol: 0,
            has_protocol_features: false,
            memory_slots: 0,
            memory: None,
            limit: None,
            unacknowledged: Vec::new(),
        })
    }

    /// All that is asked from now on has to be done in `time`; `None`: each request has a time of its own.
    pub(in crate::slot) fn limit(&mut self, time: Option<Duration>) {
        self.limit = time.map(|t| Instant::now() + t);
    }

    fn has(&self, feature: u64) -> bool {
        self.protocol & feature != 0
    }

    /// Whether the device can keep what is in flight in shared memory.
    pub(in crate::slot) fn has_inflight(&self) -> bool {
        self.has(protocol::INFLIGHT_SHMFD)
    }

    /// Whether the device has a configuration space that can be written.
    pub(in crate::slot) fn has_config(&self) -> bool {
        self.has(protocol::CONFIG)
    }

    /// The socket, which has something to read only when the device has closed it (or breaks the protocol).
    pub(in crate::slot) fn main(&self) -> &UnixStream {
        self.connection.main()
    }

    /// The device's own channel.
    pub(in crate::slot) fn backend(&self) -> Option<&UnixStream> {
        self.connection.backend()
    }

    /// Takes what the device says on its own channel.
    pub(in crate::slot) fn serve_backend(&mut self) -> Result<(), LinkError> {
        self.connection.serve_backend()
    }

    /// Takes all that the device has said on its own channel.
    pub(in crate::slot) fn drain_backend(&mut self) -> Result<(), LinkError> {
        self.connection.drain_backend()
    }

    /// Whether the device has told that its configuration changed, and nobody has taken that yet.
    pub(in crate::slot) fn config_changed(&self) -> bool {
        self.connection.config_changed()
    }

    /// Whether the device has told that its configuration changed since this was last asked.
    pub(in crate::slot) fn take_config_changed(&mut self) -> bool {
        self.connection.take_config_changed()
    }

    /// Reads the first `size` bytes of the configuration space.
    pub(in crate::slot) fn get_config(&mut self, size: usize) -> Result<Vec<u8>, LinkError> {
        self.read_config(size, self.deadline())
    }

    /// Writes `data` to the configuration space at `offset`. The device may refuse.
    pub(in crate::slot) fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), LinkError> {
        let payload = Payload::default().u32(offset).u32(length(data.len())?).u32(0).bytes(data);
        self.set(Request::SetConfig, payload.as_slice(), &[], self.deadline())
    }

    /// Tells the features that the guest's driver accepted.
    pub(in crate::slot) fn set_features(&mut self, features: u64) -> Result<(), LinkError> {
        let own = if self.has_protocol_features { F_PROTOCOL_FEATURES } else { 0 };
        let payload = Payload::default().u64(features | own);
        self.post(Request::SetFeatures, payload.as_slice(), &[], self.deadline())
    }

    /// No reset is waiting any more.
    pub(in crate::slot) fn forget_cut(&mut self) {
        self.connection.forget_cut();
    }

    /// Whether the device was given other memory than this. There is no way to take all of it back but to end the connection.
    pub(in crate::slot) fn has_other_memory(&self, ram: &Arc<GuestRam>) -> bool {
        self.memory.as_ref().is_some_and(|m| !Arc::ptr_eq(m, ram))
    }

    /// Lets the device map guest memory, once in the life of the connection.
    pub(in crate::slot) fn set_memory(&mut self, ram: &Arc<GuestRam>) -> Result<(), LinkError> {
        if self.memory.is_some() {
            return Ok(());
        }
        let deadline = self.deadline();
        let region =
            |p: Payload, r: &RamRegion| p.u64(r.gpa).u64(r.size).u64(USER_BASE + r.gpa).u64(r.memfd_offset);
        // None without CONFIGURE_MEM_SLOTS.
        let one_by_one = self.memory_slots >= ram.regions().len() as u64;
        if one_by_one {
            for r in ram.regions() {
                let payload = region(Payload::default().u64(0), r);
                self.post(Request::AddMemReg, payload.as_slice(), &[raw(&**ram.memfd())], deadline)?;
            }
        } else {
            let header = Payload::default().u32(length(ram.regions().len())?).u32(0);
            let payload = ram.regions().iter().fold(header, region);
            let fds = vec![raw(&**ram.memfd()); ram.regions().len()];
            self.post(Request::SetMemTable, payload.as_slice(), &fds, deadline)?;
        }
        self.memory = Some(Arc::clone(ram));
        Ok(())
    }

    /// Asks the device for memory in which to note what is in flight in `queues` queues of at most `queue_size` descriptors;
    /// `None` if it has none to give.
    pub(in crate::slot) fn get_inflight(
        &mut self,
        queues: u16,
        queue_size: u16,
    ) -> Result<Option<Inflight>, LinkError> {
        const REQUEST: Request = Request::GetInflightFd;
        let deadline = self.deadline();
        let payload = inflight_payload(0, 0, queues, queue_size);
        self.settle(deadline)?;
        self.connection.send(REQUEST, payload.as_slice(), &[], false, deadline)?;
        let (reply, file) = self.connection.receive(REQUEST, deadline)?;
        // 20 bytes of fields; most implementations send their C structure, which is padded to 24.
        let (Some(size), Some(offset), 20..=24) = (u64_at(&reply, 0), u64_at(&reply, 8), reply.len()) else {
            return Err(wrong_length(REQUEST, reply.len()));
        };
        let Some(file) = file.filter(|_| size > 0) else { return Ok(None) };
        Ok(Some(Inflight { file, size, offset, queues, queue_size }))
    }

    /// Gives the device the memory in which it, or its predecessor, noted what is in flight.
    pub(in crate::slot) fn set_inflight(&mut self, area: &Inflight) -> Result<(), LinkError> {
        let payload = inflight_payload(area.size, area.offset, area.queues, area.queue_size);
        self.post(Request::SetInflightFd, payload.as_slice(), &[raw(&area.file)], self.deadline())
    }

    /// Starts a ring at index `base` of its available ring.
    pub(in crate::slot) fn start_ring(
        &mut self,
        ring: &RingSetup,
        base: u16,
        kick: &EventFd,
        call: &EventFd,
        error: &EventFd,
    ) -> Result<(), LinkError> {
        let deadline = self.deadline();
        let index = u32::from(ring.index);
        let state = |value: u16| Payload::default().u32(index).u32(u32::from(value));
        self.post(Request::SetVringNum, state(ring.size).as_slice(), &[], deadline)?;
        let addresses = Payload::default()
            .u32(index)
            .u32(0)
            .u64(USER_BASE + ring.descriptors)
            .u64(USER_BASE + ring.used)
            .u64(USER_BASE + ring.available)
            .u64(0);
        self.post(Request::SetVringAddr, addresses.as_slice(), &[], deadline)?;
        self.post(Request::SetVringBase, state(base).as_slice(), &[], deadline)?;
        let number = Payload::default().u64(u64::from(ring.index));
        self.post(Request::SetVringErr, number.as_slice(), &[raw(error)], deadline)?;
        self.post(Request::SetVringCall, number.as_slice(), &[raw(call)], deadline)?;
        // The kick starts the ring, so it comes when everything else is known.
        self.post(Request::SetVringKick, number.as_slice(), &[raw(kick)], deadline)?;
        if self.has_protocol_features {
            self.post(Request::SetVringEnable, state(1).as_slice(), &[], deadline)?;
        }
        Ok(())
    }

    /// Stops rings; what is in flight is finished when this returns. Returns the index in the available ring at which each
    /// would go on.
    pub(in crate::slot) fn stop_rings(&mut self, indices: &[u16]) -> Result<Vec<u16>, LinkError> {
        const REQUEST: Request = Request::GetVringBase;
        let deadline = Instant::now() + self.patience.stop;
        self.settle(deadline)?;
        indices
            .iter()
            .map(|&index| {
                let payload = Payload::default().u32(u32::from(index)).u32(0);
                self.connection.send(REQUEST, payload.as_slice(), &[], false, deadline)?;
                let (reply, _) = self.connection.receive(REQUEST, deadline)?;
                match (u32_at(&reply, 0), u32_at(&reply, 4), reply.len()) {
                    (Some(i), Some(base), 8) if i == u32::from(index) => Ok(base as u16),
                    _ => Err(wrong_length(REQUEST, reply.len())),
                }
            })
            .collect()
    }

    /// Puts the device back into its initial state, if it knows how to. Its rings are stopped.
    pub(in crate::slot) fn reset_device(&mut self) -> Result<(), LinkError> {
        if !self.has(protocol::RESET_DEVICE) {
            return Ok(());
        }
        self.set(Request::ResetDevice, &[], &[], self.deadline())
    }

    /// Makes sure that everything before has been done.
    pub(in crate::slot) fn synchronize(&mut self) -> Result<(), LinkError> {
        self.settle(self.deadline())?;
        if !self.has(protocol::REPLY_ACK) {
            self.get_u64(Request::GetFeatures, self.deadline())?;
        }
        Ok(())
    }

    fn deadline(&self) -> Instant {
        let deadline = Instant::now() + self.patience.request;
        self.limit.map_or(deadline, |limit| deadline.min(limit))
    }

    fn read_config(&mut self, size: usize, deadline: Instant) -> Result<Vec<u8>, LinkError> {
        self.settle(deadline)?;
        self.ask_config(size, deadline)?;
        self.hear_config(size, deadline)
    }

    fn ask_config(&mut self, size: usize, deadline: Instant) -> Result<(), LinkError> {
        let payload = Payload::default().u32(0).u32(length(size)?).u32(0).bytes(&vec![0; size]);
        self.connection.send(Request::GetConfig, payload.as_slice(), &[], false, deadline)
    }

    fn hear_config(&mut self, size: usize, deadline: Instant) -> Result<Vec<u8>, LinkError> {
        const REQUEST: Request = Request::GetConfig;
        const HEADER: usize = 12;
        let (mut reply, _) = self.connection.receive(REQUEST, deadline)?;
        // An error is answered by an empty payload, with or without its header.
        if reply.is_empty() || reply.len() == HEADER {
            return Err(LinkError::Refused(REQUEST.as_str()));
        }
        if reply.len() != HEADER + size || u32_at(&reply, 4) != Some(length(size)?) {
            return Err(wrong_length(REQUEST, reply.len()));
        }
        Ok(reply.split_off(HEADER))
    }

    fn get_u64(&mut self, request: Request, deadline: Instant) -> Result<u64, LinkError> {
        self.settle(deadline)?;
        self.connection.send(request, &[], &[], false, deadline)?;
        self.hear_u64(request, deadline)
    }

    fn hear_u64(&mut self, request: Request, deadline: Instant) -> Result<u64, LinkError> {
        let (reply, _) = self.connection.receive(request, deadline)?;
        match (u64_at(&reply, 0), reply.len()) {
            (Some(value), 8) => Ok(value),
            _ => Err(wrong_length(request, reply.len())),
        }
    }

    fn hear_acknowledgement(&mut self, request: Request, deadline: Instant) -> Result<(), LinkError> {
        match self.hear_u64(request, deadline)? {
            0 => Ok(()),
            _ => Err(LinkError::Refused(request.as_str())),
        }
    }

    /// A request without an answer of its own; waits for its acknowledgement where there is one.
    fn set(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[i32],
        deadline: Instant,
    ) -> Result<(), LinkError> {
        self.post(request, payload, fds, deadline)?;
        self.settle(deadline)
    }

    /// As `set`, but the acknowledgement is waited for later, together with others: a guest waits while rings are started,
    /// and on a busy host each wait may cost it a time slice.
    fn post(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[i32],
        deadline: Instant,
    ) -> Result<(), LinkError> {
        if self.unacknowledged.len() == MAX_UNACKNOWLEDGED {
            self.settle(deadline)?;
        }
        let acknowledge = self.has(protocol::REPLY_ACK);
        self.connection.send(request, payload, fds, acknowledge, deadline)?;
        if acknowledge {
            self.unacknowledged.push(request);
        }
        Ok(())
    }

    /// Takes the acknowledgements that are due.
    fn settle(&mut self, deadline: Instant) -> Result<(), LinkError> {
        for request in std::mem::take(&mut self.unacknowledged) {
            self.hear_acknowledgement(request, deadline)?;
        }
        Ok(())
    }
}

fn inflight_payload(size: u64, offset: u64, queues: u16, queue_size: u16) -> Payload {
    Payload::default().u64(size).u64(offset).u16(queues).u16(queue_size).u32(0)
}

fn wrong_length(request: Request, length: usize) -> LinkError {
    LinkError::Violation(request.as_str(), format!("an answer of {length} bytes with the wrong content"))
}

fn length(bytes: usize) -> io::Result<u32> {
    u32::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}
