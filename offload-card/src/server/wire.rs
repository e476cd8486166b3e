//! One vhost-user connection: messages as they come.
//!
//! Crate `vhost` decodes and answers messages. What it would end the connection for though the protocol does not ask
//! for that, and what it keeps to itself, is taken out of the stream before: see [`Connection::serve_one`].

use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::socket::{MsgFlags, recv};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tracing::warn;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{BackendReqHandler, Error, VhostUserBackendReqHandlerMut};

use super::handler::Handler;
use crate::limit::LogLimit;

const HEADER_BYTES: usize = 12;
/// Longest payload we read and throw away.
const MAX_PAYLOAD_BYTES: u32 = 4096;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Requests that crate `vhost` decodes for us, by number: features, owner, memory, vrings, protocol features, queues,
/// configuration, inflight, reset, memory slots.
const DECODED: [u32; 23] =
    [1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 24, 25, 31, 32, 34, 36, 37, 38];
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
/// Requests that we do not serve and whose sender does not wait for an answer, unless it asks for one: dirty log fd,
/// RARP, MTU, IOTLB, endianness, GPU socket, in-band kick, status.
const IGNORED: [u32; 8] = [7, 19, 20, 22, 23, 33, 35, 39];

/// Why a connection ends: `None` if the peer closed it.
pub(super) type End = Option<Error>;

struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

impl Header {
    fn parse(bytes: [u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { request: word(0), flags: word(4), size: word(8) }
    }

    fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&self.request.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.size.to_ne_bytes());
        bytes
    }
}

/// A message without payload, as bytes.
pub(super) fn message(request: u32) -> [u8; HEADER_BYTES] {
    Header { request, flags: VERSION, size: 0 }.bytes()
}

/// A front-end's connection.
pub(super) struct Connection {
    stream: UnixStream,
    decoder: BackendReqHandler<Mutex<Handler>>,
    handler: Arc<Mutex<Handler>>,
    log: Arc<LogLimit>,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Connection {
    pub(super) fn new(stream: UnixStream, handler: Handler, log: Arc<LogLimit>) -> io::Result<Self> {
        let handler = Arc::new(Mutex::new(handler));
        let decoder = BackendReqHandler::from_stream(stream.try_clone()?, handler.clone());
        Ok(Self { stream, decoder, handler, log })
    }

    /// The state behind the messages. Only the device's thread takes it, so it never waits.
    pub(super) fn handler(&self) -> MutexGuard<'_, Handler> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Receives one message, acts and answers. A request that fails is reported to a front-end that asked to be told
    /// (REPLY_ACK), and to the log; the connection ends only when the two sides cannot understand each other any more,
    /// or when the front-end waits for an answer that there is none for.
    pub(super) fn serve_one(&mut self) -> Result<(), End> {
        let mut bytes = [0; HEADER_BYTES];
        let peeked = recv(self.stream.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK)
            .map_err(|e| Some(broken(e.into())))?;
        if peeked == 0 {
            return Err(None);
        }
        let header = Header::parse(bytes);
        // A header in pieces is put together by the decoder.
        let ours =
            peeked == HEADER_BYTES && header.flags & VERSION_MASK == VERSION && header.flags & REPLY == 0;
        if ours && header.request == SET_BACKEND_REQ_FD {
            return self.set_backend_channel(&header);
        }
        if ours && header.request == SET_VRING_ENABLE {
            return self.set_vring_enable(&header);
        }
        if ours && !DECODED.contains(&header.request) {
            return self.refuse(&header);
        }
        match self.decoder.handle_request() {
            Ok(()) => Ok(()),
            Err(Error::Disconnected) => Err(None),
            Err(Error::ReqHandlerError(e)) if !answers(header.request) => {
                self.log.say(|left_out| warn!("request {} failed: {e}{left_out}", header.request));
                Ok(())
            }
            Err(e) => Err(Some(e)),
        }
    }

    /// SET_BACKEND_REQ_FD: crate `vhost` would wrap the channel in a type that cannot send CONFIG_CHANGE.
    fn set_backend_channel(&mut self, header: &Header) -> Result<(), End> {
        let (read, mut fds) = receive_with_fds(&self.stream, &mut [0; HEADER_BYTES])
            .map_err(|e| Some(broken(io::Error::from(e))))?;
        if read != HEADER_BYTES {
            return Err(Some(Error::PartialMessage));
        }
        self.skip_payload(header)?;
        let set = match (fds.pop(), fds.len()) {
            (Some(fd), 0) => self.handler().set_backend_channel(fd),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not one file descriptor came with it")),
        };
        if let Err(e) = &set {
            self.log.say(|left_out| warn!("the back-end channel cannot be used: {e}{left_out}"));
        }
        self.acknowledge(header, set.is_ok())
    }

    /// SET_VRING_ENABLE: crate `vhost` would end the connection of a front-end that sends it before SET_FEATURES, as QEMU
    /// does for network devices.
    fn set_vring_enable(&mut self, header: &Header) -> Result<(), End> {
        let mut bytes = [0; HEADER_BYTES];
        // File descriptors that came with it are closed by the kernel.
        self.stream.read_exact(&mut bytes).map_err(|e| Some(broken(e)))?;
        let mut payload = [[0; 4]; 2];
        if header.size as usize != payload.as_flattened().len() {
            return Err(Some(Error::InvalidMessage));
        }
        self.stream.read_exact(payload.as_flattened_mut()).map_err(|e| Some(broken(e)))?;
        let [index, enable] = payload.map(u32::from_ne_bytes);
        let set = match enable {
            0 | 1 => self.handler().set_vring_enable(index, enable == 1),
            _ => Err(Error::InvalidParam),
        };
        match set {
            // Nobody must believe that the queue has stopped.
            Err(e @ Error::BackendInternalError) => return Err(Some(e)),
            Err(ref e) => {
                self.log.say(|left_out| warn!("request {} failed: {e}{left_out}", header.request));
            }
            Ok(()) => {}
        }
        self.acknowledge(header, set.is_ok())
    }

    /// A request that we do not know or did not offer.
    fn refuse(&mut self, header: &Header) -> Result<(), End> {
        let mut bytes = [0; HEADER_BYTES];
        // File descriptors that came with it are closed by the kernel.
        self.stream.read_exact(&mut bytes).map_err(|e| Some(broken(e)))?;
        self.skip_payload(header)?;
        self.log.say(|left_out| warn!("request {} is not supported{left_out}", header.request));
        let may_ask = header.flags & NEED_REPLY != 0 && self.reply_ack();
        if !may_ask && !IGNORED.contains(&header.request) {
            return Err(Some(Error::InvalidOperation(
                "the front-end waits for an answer that there is none for",
            )));
        }
        self.acknowledge(header, false)
    }

    fn skip_payload(&mut self, header: &Header) -> Result<(), End> {
        if header.size > MAX_PAYLOAD_BYTES {
            return Err(Some(Error::OversizedMsg));
        }
        let mut payload = vec![0; header.size as usize];
        self.stream.read_exact(&mut payload).map_err(|e| Some(broken(e)))
    }

    fn reply_ack(&self) -> bool {
        self.handler().protocol_features().contains(VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn acknowledge(&mut self, header: &Header, ok: bool) -> Result<(), End> {
        if header.flags & NEED_REPLY == 0 || !self.reply_ack() {
            return Ok(());
        }
        let reply = Header { request: header.request, flags: VERSION | REPLY, size: 8 };
        let mut bytes = reply.bytes().to_vec();
        bytes.extend(u64::from(!ok).to_ne_bytes());
        self.stream.write_all(&bytes).map_err(|e| Some(broken(e)))
    }
}

/// Receives up to `bytes.len()` bytes and the file descriptors that came with them; the kernel closes those for which
/// there is no room. (`recv_with_fd` of crate `vmm-sys-util` loses the second of two: whoever sends them again and again
/// would use up our table.)
fn receive_with_fds(stream: &UnixStream, bytes: &mut [u8]) -> rustix::io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(bytes)];
    let received = rustix::net::recvmsg(stream, parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            fds.extend(files);
        }
    }
    Ok((received.bytes, fds))
}

/// The sender of this request waits for an answer in any case, and a failed one has none.
fn answers(request: u32) -> bool {
    // GET_VRING_BASE, GET_INFLIGHT_FD.
    matches!(request, 11 | 31)
}

fn broken(e: io::Error) -> Error {
    Error::SocketBroken(e)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use super::*;

    #[test]
    fn file_descriptors_too_many_are_closed() {
        for count in [0, 1, 2, 3, 32] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (mut reader, writer) = io::pipe().unwrap();
            let writer = OwnedFd::from(writer);
            theirs.send_with_fds(&[&[1u8, 2, 3][..]], &vec![writer.as_raw_fd(); count]).unwrap();
            drop(writer);
            let (read, fds) = receive_with_fds(&ours, &mut [0; HEADER_BYTES]).unwrap();
            assert_eq!((read, fds.is_empty(), fds.len() > count), (3, count == 0, false));
            drop(fds);
            // Nobody can write any more: else this waits for ever.
            assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        }
    }
}
