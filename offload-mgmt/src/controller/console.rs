//! The console: bytes passed between a client and the VM's hypervisor, over a connection of its own so that a client
//! that does not read holds up nothing but itself.

use std::time::Duration;

use proto::error::Error;
use proto::v1::hypervisor_client::HypervisorClient;
use proto::v1::{ConsoleInput, ConsoleOutput};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Controller, ending, rpc};

/// How long a client may take to have room for the reason why its console ends.
const LAST_WORD: Duration = Duration::from_secs(1);

impl Controller {
    /// Connects a client's stream with a VM's console. The output ends when the VM does, and with an error
    /// when the controller does.
    ///
    /// # Errors
    /// VM_NOT_FOUND, WRONG_STATE if it does not run, HYPERVISOR_UNREACHABLE.
    pub(super) async fn open_console(
        &self,
        mut input: Streaming<ConsoleInput>,
    ) -> Result<ReceiverStream<Result<ConsoleOutput, Status>>, Status> {
        let first = input.message().await?.ok_or_else(|| {
            Error::invalid_field("vm", "the console's first message is missing").remedy("name the VM in it")
        })?;
        let vm = self.ctx.registry.find(&first.vm)?;
        // Says precisely why there is none.
        vm.hypervisor()?;
        let unreachable = |why: &str| super::vm::unreachable_hypervisor(&vm.spec.name, why);
        let socket = self.ctx.runner.control_socket(&vm.id);
        let channel = rpc::dial(&socket).await.map_err(|e| unreachable(&e.to_string()))?;

        let (to_guest, guest_input) = mpsc::channel(16);
        // There is room: the channel is new.
        let _ = to_guest.try_send(first);
        let mut client = HypervisorClient::new(channel);
        let opened =
            rpc::call(self.ctx.deadlines.hypervisor, client.console(ReceiverStream::new(guest_input))).await;
        let mut output = opened.map_err(|f| f.or_else(unreachable))?;
        tokio::spawn(async move {
            // The end of the client's input is not the end of its interest in the output.
            while let Ok(Some(message)) = input.message().await {
                if to_guest.send(message).await.is_err() {
                    break;
                }
            }
        });

        let (to_client, client_output) = mpsc::channel(16);
        let mut closing = self.closing.subscribe();
        tokio::spawn(async move {
            let pass_on = async {
                // A broken stream is a VM that has ended, as far as its console goes.
                while let Ok(Some(message)) = output.message().await {
                    if to_client.send(Ok(message)).await.is_err() {
                        break;
                    }
                }
            };
            tokio::select! {
                () = pass_on => {}
                () = to_client.closed() => {}
                () = async { drop(closing.wait_for(|c| *c).await) } => {
                    // A client that does not read learns it from the connection's end.
                    let _ = to_client.send_timeout(Err(ending().into()), LAST_WORD).await;
                }
            }
        });
        Ok(ReceiverStream::new(client_output))
    }
}
