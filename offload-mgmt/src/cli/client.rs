//! Talking to the controller.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use proto::error::ErrorReason;
use proto::v1::controller_client::ControllerClient;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::failure::Failure;
use crate::controller::rpc;

/// What the controller answers from memory, and anything with a deadline of its own that is shorter.
pub(crate) const QUICK: Duration = Duration::from_secs(20);
/// What involves starting a VM.
pub(crate) const SLOW: Duration = Duration::from_secs(180);
/// After this long a person wants to see that something is being done.
const PATIENCE: Duration = Duration::from_secs(1);

/// A connection to the controller.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    socket: PathBuf,
    channel: Channel,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// [`Failure::Unreachable`].
    pub(crate) async fn connect(socket: &Path) -> Result<Self, Failure> {
        let dialled = with_progress("Connecting to the controller", rpc::dial(socket)).await;
        let channel = dialled.map_err(|e| Failure::connecting(socket, &e))?;
        Ok(Self { socket: socket.to_owned(), channel })
    }

    /// The generated client.
    pub(crate) fn api(&self) -> ControllerClient<Channel> {
        // A list of thousands of VMs is an honest answer.
        ControllerClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// One call, with its deadline; `doing` is shown, on a terminal, when it takes long.
    ///
    /// # Errors
    /// What the controller says, or [`Failure::Unreachable`].
    pub(crate) async fn wait<T>(
        &self,
        doing: &str,
        deadline: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        with_progress(doing, rpc::call(deadline, call)).await.map_err(|f| self.failure(f))
    }

    /// A failed stream or call.
    pub(crate) fn failure(&self, failure: rpc::Failure) -> Failure {
        match failure {
            // The controller itself, not a card or hypervisor of which it says so.
            rpc::Failure::Refused(e)
                if e.code() == Code::Unavailable && e.reason() == ErrorReason::Internal =>
            {
                Failure::Unreachable(
                    e.message().to_owned(),
                    e.fact("remedy").unwrap_or("see: systemctl status outboard-mgmt").to_owned(),
                )
            }
            rpc::Failure::Refused(e) => Failure::Refused(e),
            rpc::Failure::NoAnswer(why) => Failure::broken(&self.socket, &why),
        }
    }
}

/// Shows a spinner on standard error while something takes longer than a second, if that is a terminal.
pub(crate) async fn with_progress<T>(doing: &str, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    if !std::io::stderr().is_terminal() {
        return work.await;
    }
    tokio::select! {
        done = &mut work => return done,
        () = tokio::time::sleep(PATIENCE) => {}
    }
    let spinner = ProgressBar::new_spinner().with_message(doing.to_owned()).with_elapsed(PATIENCE);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(Duration::from_millis(100));
    let done = work.await;
    spinner.finish_and_clear();
    done
}
