//! Calls to other processes: every one has a deadline, and a peer that failed is told from a peer that said no.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket as stream_socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use proto::error::Error;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// Longest wait for a Unix socket's listener to have room in its backlog.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// How a call failed.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    /// The peer answered with an error.
    Refused(Error),
    /// No answer: the socket is not there, refuses or closed the connection, or the deadline passed. One clause.
    NoAnswer(String),
}

impl Failure {
    /// The error for a caller: the peer's own, or what `unreachable` makes of the reason there is none.
    pub(crate) fn or_else(self, unreachable: impl FnOnce(&str) -> Error) -> Error {
        match self {
            Self::Refused(e) => e,
            Self::NoAnswer(why) => unreachable(&why),
        }
    }
}

/// Opens a connection to a control socket. The channel is this one connection: when it breaks, calls fail rather than
/// reach whatever process listens there later.
///
/// # Errors
/// What `connect(2)` says; [`io::ErrorKind::TimedOut`] when the listener does not take the connection in time.
pub(crate) async fn dial(socket: &Path) -> io::Result<Channel> {
    let stream = tokio::time::timeout(CONNECT_DEADLINE, UnixStream::connect(socket))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it does not take connections"))??;
    channel(stream).await
}

async fn channel(stream: UnixStream) -> io::Result<Channel> {
    let once = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
    let connector = tower::service_fn(move |_| {
        let stream = once.lock().ok().and_then(|mut s| s.take());
        async move { stream.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the connection is gone")) }
    });
    // The authority is never resolved; HTTP/2 wants one.
    Endpoint::from_static("http://outboard").connect_with_connector(connector).await.map_err(io::Error::other)
}

/// Runs one call with its deadline.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn call<T>(
    deadline: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(deadline, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(failure(status)),
        Err(_) => Err(too_late(deadline)),
    }
}

/// The deadline has passed.
pub(crate) fn too_late(deadline: Duration) -> Failure {
    Failure::NoAnswer(format!("no answer within {}", seconds(deadline)))
}

/// A status made by our own transport has a source; one that came over the wire cannot.
pub(crate) fn failure(status: Status) -> Failure {
    match std::error::Error::source(&status) {
        Some(source) => Failure::NoAnswer(root(source).to_string()),
        None => Failure::Refused(Error::from(status)),
    }
}

fn root<'a>(mut e: &'a (dyn std::error::Error + 'static)) -> &'a (dyn std::error::Error + 'static) {
    while let Some(source) = e.source() {
        e = source;
    }
    e
}

/// Nobody listens, as opposed to somebody who does not answer.
pub(crate) fn nobody_listens(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// The process that listens on a Unix socket, from the kernel's record of it; `None` if nobody does. Blocks, for up to
/// [`CONNECT_DEADLINE`] where the listener's backlog is full.
///
/// # Errors
/// Somebody listens and does not take the connection in time, or the host refuses.
pub(crate) fn listener_pid(socket: &Path) -> io::Result<Option<i32>> {
    let stream = stream_socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // It bounds connect(2) too (socket(7), SO_SNDTIMEO).
    let deadline = TimeVal::milliseconds(CONNECT_DEADLINE.as_millis().try_into().unwrap_or(i64::MAX));
    setsockopt(&stream, sockopt::SendTimeout, &deadline)?;
    match connect(stream.as_raw_fd(), &UnixAddr::new(socket)?).map_err(io::Error::from) {
        Ok(()) => {}
        Err(e) if nobody_listens(&e) => return Ok(None),
        Err(e) => return Err(e),
    }
    let pid = getsockopt(&stream, sockopt::PeerCredentials)?.pid();
    Ok((pid > 0).then_some(pid))
}

fn seconds(d: Duration) -> String {
    if d < Duration::from_secs(1) { format!("{} ms", d.as_millis()) } else { format!("{} s", d.as_secs()) }
}
