//! The API's socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::Group;
use proto::socket;
use proto::v1::controller_server::ControllerServer;
use tokio::net::{UnixListener, UnixStream as TokioUnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;

use super::Controller;

/// People in this group may use the API.
const GROUP: &str = "outboard";
/// Pause after a connection that could not be taken: it is still there, and without a file descriptor for it the next
/// attempt fails like the last.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// For how long the same trouble is not said again, though a connection may end meanwhile, so that one more can be taken.
const TOLD_AGAIN: Duration = Duration::from_secs(60);
/// How long calls that are being answered may take when the controller ends.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// Why the API is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another process listens there.
    #[error("another controller serves {}; stop it, or give this one another --api-socket", .0.display())]
    InUse(PathBuf),
    /// The socket cannot be made.
    #[error("the API socket {} cannot be made; check its directory, or give another --api-socket", .0.display())]
    Socket(PathBuf, #[source] io::Error),
    /// Serving failed.
    #[error("the API server failed; start outboard-mgmt again")]
    Server(#[source] tonic::transport::Error),
}

/// A socket on which the API will be served.
#[derive(Debug)]
pub struct Api {
    listener: UnixListener,
    path: PathBuf,
}

impl Api {
    /// Listens on `path` (mode 0660; group `outboard` if there is one), replacing a socket that nobody listens on.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        let failed = |e| ServeError::Socket(path.to_owned(), e);
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        let listener = socket::listen(path, |new| give_to_group(new, path)).map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => ServeError::InUse(path.to_owned()),
            _ => failed(e),
        })?;
        let listener = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
        let listener = listener.map_err(failed)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Answers until `stop` is done; then streams end, calls are finished, and the socket is removed. VMs run on.
    ///
    /// # Errors
    /// [`ServeError::Server`].
    pub async fn serve(
        self,
        controller: Controller,
        stop: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        let (draining, drain) = tokio::sync::oneshot::channel();
        let stopped = {
            let controller = controller.clone();
            async move {
                stop.await;
                controller.close();
                // Nobody waits only if serving has failed already.
                let _ = draining.send(());
            }
        };
        let serving = Server::builder()
            .add_service(ControllerServer::new(controller))
            .serve_with_incoming_shutdown(incoming(self.listener), stopped);
        let too_long = async {
            if drain.await.is_ok() {
                tokio::time::sleep(DRAIN_DEADLINE).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        let result = tokio::select! {
            result = serving => result.map_err(ServeError::Server),
            () = too_long => {
                tracing::warn!("some calls are not finished");
                Ok(())
            }
        };
        // The next controller may have made its own by now, but not while the database is open here.
        let _ = std::fs::remove_file(&self.path);
        result
    }
}

/// Connections, as they come; the server would try again at once after an error.
fn incoming(listener: UnixListener) -> impl Stream<Item = io::Result<TokioUnixStream>> {
    let mut told: Option<Instant> = None;
    let taken = UnixListenerStream::new(listener).then(move |connection| {
        if let Err(e) = &connection
            && told.is_none_or(|told| told.elapsed() >= TOLD_AGAIN)
        {
            tracing::error!("connections cannot be taken, trying on: {e}; see LimitNOFILE= of the service");
            told = Some(Instant::now());
        }
        async move {
            if connection.is_err() {
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            connection
        }
    });
    taken.filter(Result::is_ok)
}

/// Gives `socket`, which will be called `path`, to the people who may use the API. Who may not do that serves its own user.
fn give_to_group(socket: &Path, path: &Path) {
    if let Ok(Some(group)) = Group::from_name(GROUP)
        && let Err(e) = std::os::unix::fs::chown(socket, None, Some(group.gid.as_raw()))
    {
        tracing::warn!("{} is not given to group {GROUP}: {e}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_there_already_is_named_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/with/its/directory/api.sock");
        let _api = Api::bind(&path).unwrap();
        assert!(matches!(Api::bind(&path), Err(ServeError::InUse(_))));

        let file = dir.path().join("notes");
        std::fs::write(&file, "kept").unwrap();
        assert!(matches!(Api::bind(&file), Err(ServeError::Socket(..))));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
    }
}
