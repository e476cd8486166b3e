//! A connection: whole messages with deadlines, over a socket whose other end may do anything.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::LinkError;
use super::message::{BACKEND_CONFIG_CHANGE, HEADER_SIZE, Header, MAX_PAYLOAD, Request};
use crate::slot::sys::{self, Wait};

/// How long a device may take for the rest of a message of its own once it has begun, and for taking our answer.
const BACKEND_MESSAGE: Duration = Duration::from_millis(500);

/// How long a device may still take for what it is doing once a reset does not wait for that: far longer than one takes that works.
const CUT: Duration = Duration::from_millis(500);

/// What ends every wait for a device.
#[derive(Debug, Clone)]
pub(in crate::slot) struct Cancel {
    /// Signalled for good: the slot is shut down.
    pub(in crate::slot) stop: Arc<EventFd>,
    /// Signalled while a reset does not wait for the device, which gets [`CUT`] from then on.
    pub(in crate::slot) cut: Arc<EventFd>,
}

/// The socket to a device, and the one by which the device tells things by itself.
#[derive(Debug)]
pub(super) struct Connection {
    main: UnixStream,
    backend: Option<UnixStream>,
    cancel: Cancel,
    // When a reset cuts the connection, if it will.
    cut_at: Option<Instant>,
    config_changed: bool,
}

impl Connection {
    /// Connects to `path`. Every wait ends with [`LinkError::Cancelled`] or [`LinkError::CutByReset`] once `cancel` is signalled.
    pub(super) fn dial(path: &Path, cancel: Cancel) -> Result<Self, LinkError> {
        let main = sys::connect(path).map_err(LinkError::Unreachable)?;
        Ok(Self { main, backend: None, cancel, cut_at: None, config_changed: false })
    }

    /// Makes the device's own channel and returns the end that the device has to be given.
    pub(super) fn open_backend_channel(&mut self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.backend = Some(ours);
        Ok(theirs)
    }

    /// Gives the device's own channel up, if the device did not take it.
    pub(super) fn close_backend_channel(&mut self) {
        self.backend = None;
    }

    /// The socket, for waiting until the device closes it.
    pub(super) fn main(&self) -> &UnixStream {
        &self.main
    }

    /// The device's own channel, for waiting until the device says something.
    pub(super) fn backend(&self) -> Option<&UnixStream> {
        self.backend.as_ref()
    }

    /// Whether the device has told that its configuration changed, and nobody has taken that yet.
    pub(super) fn config_changed(&self) -> bool {
        self.config_changed
    }

    /// Whether the device has told that its configuration changed since this was last asked.
    pub(super) fn take_config_changed(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    /// No reset is waiting any more.
    pub(super) fn forget_cut(&mut self) {
        self.cut_at = None;
    }

    /// Sends a request. File descriptors go along with its first byte.
    pub(super) fn send(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[RawFd],
        acknowledge: bool,
        deadline: Instant,
    ) -> Result<(), LinkError> {
        let size = u32::try_from(payload.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let header = Header::request(request, size, acknowledge).to_bytes();
        let mut message = Vec::with_capacity(header.len() + payload.len());
        message.extend_from_slice(&header);
        message.extend_from_slice(payload);
        let mut sent = 0;
        while sent < message.len() {
            let fds = if sent == 0 { fds } else { &[] };
            match self.main.send_with_fds(&[&message[sent..]], fds).map_err(io::Error::from) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(request, deadline, true)?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Takes the answer to `request`: its payload, and a file descriptor if one came along.
    pub(super) fn receive(
        &mut self,
        request: Request,
        deadline: Instant,
    ) -> Result<(Vec<u8>, Option<File>), LinkError> {
        let violation = |what: String| LinkError::Violation(request.as_str(), what);
        let mut bytes = [0; HEADER_SIZE];
        let mut files = Vec::new();
        self.fill(request, &mut bytes, &mut files, deadline)?;
        let header = Header::from_bytes(bytes);
        if !header.is_reply() || header.request != request as u32 {
            return Err(violation(format!("unexpected message {} of {} bytes", header.request, header.size)));
        }
        let mut payload = vec![0; header.size as usize];
        self.fill(request, &mut payload, &mut files, deadline)?;
        if files.len() > 1 {
            return Err(violation(format!("{} file descriptors", files.len())));
        }
        Ok((payload, files.pop()))
    }

    fn fill(
        &mut self,
        request: Request,
        buffer: &mut [u8],
        files: &mut Vec<File>,
        deadline: Instant,
    ) -> Result<(), LinkError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match sys::receive(&self.main, &mut buffer[filled..]) {
                Ok((0, _)) => return Err(LinkError::Closed),
                Ok((n, more)) => {
                    filled += n;
                    files.extend(more);
                    if files.len() > 1 {
                        return Err(LinkError::Violation(
                            request.as_str(),
                            "too many file descriptors".into(),
                        ));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(request, deadline, false)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Waits until the socket can be used. What the device tells by itself meanwhile is taken and answered: a device may wait
    /// for that before it answers us.
    fn wait(&mut self, request: Request, deadline: Instant, write: bool) -> Result<(), LinkError> {
        loop {
            let now = Instant::now();
            if self.cut_at.is_some_and(|at| at <= now) {
                return Err(LinkError::CutByReset);
            }
            if deadline <= now {
                return Err(LinkError::TimedOut(request.as_str()));
            }
            let left = self.cut_at.map_or(deadline, |at| at.min(deadline)) - now;
            let main = if write { Wait::writable(&self.main) } else { Wait::readable(&self.main) };
            let stop = Wait::event(&self.cancel.stop);
            let cut = if self.cut_at.is_none() { Wait::event(&self.cancel.cut) } else { Wait::nothing() };
            let [ready, stopped, cut, told] =
                sys::poll([main, stop, cut, Wait::optional(self.backend.as_ref())], Some(left))?;
            if stopped {
                return Err(LinkError::Cancelled);
            }
            if cut {
                self.cut_at = Some(Instant::now() + CUT);
            }
            if told {
                self.serve_backend()?;
            }
            if ready {
                return Ok(());
            }
        }
    }

    /// Takes the messages that the device has sent by itself; not all, if it goes on and on.
    pub(super) fn drain_backend(&mut self) -> Result<(), LinkError> {
        const ENOUGH: usize = 1024;
        for _ in 0..ENOUGH {
            let Some(backend) = &self.backend else { return Ok(()) };
            let [told] = sys::poll([Wait::readable(backend)], Some(Duration::ZERO))?;
            if !told {
                return Ok(());
            }
            self.serve_backend()?;
        }
        Ok(())
    }

    /// Takes one message that the device sends by itself. A device that closes its channel just has none any more.
    pub(super) fn serve_backend(&mut self) -> Result<(), LinkError> {
        const CHANNEL: &str = "its own channel";
        let Some(backend) = self.backend.take() else { return Ok(()) };
        let deadline = Instant::now() + BACKEND_MESSAGE;
        let mut bytes = [0; HEADER_SIZE];
        if !self.fill_backend(&backend, &mut bytes, deadline)? {
            return Ok(());
        }
        let header = Header::from_bytes(bytes);
        if !header.is_valid() || header.is_reply() {
            return Err(LinkError::Violation(CHANNEL, format!("message {}", header.request)));
        }
        let mut payload = [0; MAX_PAYLOAD];
        if !self.fill_backend(&backend, &mut payload[..header.size as usize], deadline)? {
            return Err(LinkError::Violation(CHANNEL, "half a message".into()));
        }
        let known = header.request == BACKEND_CONFIG_CHANGE;
        self.config_changed |= known;
        if header.wants_reply() {
            // Nobody else writes here and the device waits for exactly this, so a full socket is the device's doing.
            let mut reply = Header::reply(header.request, 8).to_bytes().to_vec();
            reply.extend_from_slice(&u64::from(!known).to_ne_bytes());
            match backend.send_with_fds(&[&reply[..]], &[]) {
                Ok(n) if n == reply.len() => {}
                _ => return Err(LinkError::Violation(CHANNEL, "it does not read its answers".into())),
            }
        }
        self.backend = Some(backend);
        Ok(())
    }

    /// Fills `buffer` from the device's own channel; `false` if the channel was closed before its first byte. File descriptors
    /// that come along are closed.
    fn fill_backend(
        &self,
        backend: &UnixStream,
        buffer: &mut [u8],
        deadline: Instant,
    ) -> Result<bool, LinkError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match sys::receive(backend, &mut buffer[filled..]) {
                Ok((0, _)) if filled == 0 => return Ok(false),
                Ok((0, _)) => return Err(LinkError::Closed),
                Ok((n, _files)) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(LinkError::TimedOut("to finish its own message"));
                    }
                    let stop = Wait::event(&self.cancel.stop);
                    let [_, stopped] = sys::poll([Wait::readable(backend), stop], Some(left))?;
                    if stopped {
                        return Err(LinkError::Cancelled);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }
}

/// The number of a file descriptor to send along.
pub(super) fn raw(fd: &impl AsRawFd) -> RawFd {
    fd.as_raw_fd()
}
