//! Captures: passed from a network card to a client, over a connection of its own so that a client that does not read
//! holds up nothing but its capture.

use proto::error::{Error, ErrorReason};
use proto::v1::network_card_client::NetworkCardClient;
use proto::v1::{CaptureNicRequest, CapturePart, CaptureRequest};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::cards::device_id;
use super::vm::Vm;
use super::{Controller, ending, rpc};

impl Controller {
    /// Begins to capture what goes through one of a VM's network interfaces. The stream ends when the capture does, and
    /// with an error when the card or the controller does.
    ///
    /// # Errors
    /// VM_NOT_FOUND, DEVICE_NOT_FOUND, WRONG_STATE if it does not run, CARD_UNREACHABLE, or why the card does not do it.
    pub(super) async fn open_capture(
        &self,
        request: CaptureNicRequest,
    ) -> Result<ReceiverStream<Result<CapturePart, Status>>, Error> {
        let vm = self.ctx.registry.find(&request.vm)?;
        let nic = nic_of(&vm, &request.nic)?;
        // Its devices are there while it runs.
        vm.hypervisor()?;
        let device_id = device_id(&vm.id, nic);
        let placed = self.ctx.cards.devices_of(&vm.id, &vm.spec)?.into_iter().find(|p| p.slot == nic);
        let Some(placed) = placed else { return Err(ending()) };
        let card = placed.card;
        let channel =
            rpc::dial(card.socket()).await.map_err(|e| card.error(rpc::Failure::NoAnswer(e.to_string())))?;
        let mut client = NetworkCardClient::new(channel);
        let request = CaptureRequest { device_id, snap_bytes: request.snap_bytes, frames: request.frames };
        let opened = rpc::call(self.ctx.deadlines.card, client.capture(request)).await;
        let mut parts = opened.map_err(|f| card.error(f))?;

        let (to_client, client_parts) = mpsc::channel(4);
        let mut closing = self.closing.subscribe();
        tokio::spawn(async move {
            let pass_on = async {
                loop {
                    let part = match parts.message().await {
                        Ok(Some(part)) => Ok(part),
                        Ok(None) => break,
                        Err(status) => Err(card.error(rpc::failure(status)).into()),
                    };
                    let over = part.is_err();
                    if to_client.send(part).await.is_err() || over {
                        break;
                    }
                }
            };
            tokio::select! {
                () = pass_on => {}
                // What the card still has for it goes with the connection.
                () = to_client.closed() => {}
                () = async { drop(closing.wait_for(|c| *c).await) } => {
                    // A client that does not read learns it from the connection's end.
                    let _ = to_client.try_send(Err(ending().into()));
                }
            }
        });
        Ok(ReceiverStream::new(client_parts))
    }
}

/// The interface of this id; of none: the only one.
fn nic_of<'a>(vm: &'a Vm, nic: &str) -> Result<&'a str, Error> {
    let ids = || vm.spec.nics.iter().map(|n| n.id.as_str());
    if let Some(found) = ids().find(|id| *id == nic) {
        return Ok(found);
    }
    let name = &vm.spec.name;
    let message = match (nic, ids().count()) {
        (_, 0) => format!("VM {name} has no network interface"),
        ("", 1) => return ids().next().ok_or_else(ending),
        ("", n) => format!("VM {name} has {n} network interfaces"),
        _ => format!("VM {name} has no network interface {nic:?}"),
    };
    Err(Error::new(Code::NotFound, ErrorReason::DeviceNotFound, message)
        .resource(name)
        .remedy(format!("name one of: {}", ids().collect::<Vec<_>>().join(", "))))
}
