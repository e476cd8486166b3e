//! The API's socket.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Group;
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
        if UnixStream::connect(path).is_ok() {
            return Err(ServeError::InUse(path.to_owned()));
        }
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        // Until its mode is set, the umask lets nobody else connect.
        let listener = UnixListener::bind(path).map_err(failed)?;
        if let Ok(Some(group)) = Group::from_name(GROUP)
            && let Err(e) = std::os::unix::fs::chown(path, None, Some(group.gid.as_raw()))
        {
            tracing::warn!("{} is not given to group {GROUP}: {e}", path.display());
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(failed)?;
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
    let mut told = false;
    let taken = UnixListenerStream::new(listener).then(move |connection| {
        let failed = connection.as_ref().err().map(ToString::to_string);
        let tell = failed.filter(|_| !told);
        told = connection.is_err();
        async move {
            if let Some(e) = tell {
                tracing::error!(
                    "connections cannot be taken, trying on: {e}; see LimitNOFILE= of the service"
                );
            }
            if connection.is_err() {
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            connection
        }
    });
    taken.filter(Result::is_ok)
}
