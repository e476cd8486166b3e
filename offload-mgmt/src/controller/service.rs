//! The API `outboard.v1.Controller`: takes requests apart, answers with messages. What changes something runs in a task
//! of its own, so that a client that goes away in the middle leaves nothing half done.

use std::sync::Arc;
use std::time::Duration;

use proto::error::Error;
use proto::v1::controller_server::Controller as Api;
use proto::v1::hypervisor_client::HypervisorClient;
use proto::v1::{
    CaptureNicRequest, CapturePart, CardStatus, ChangeSecurityGroupRequest, ConsoleInput, ConsoleOutput,
    CreateNetworkRequest, CreateSecurityGroupRequest, CreateVmRequest, DeleteNetworkRequest,
    DeleteNetworkResponse, DeleteSecurityGroupRequest, DeleteSecurityGroupResponse, DeleteVmRequest,
    DeleteVmResponse, Event, GetInfoRequest, GetStatsRequest, GetVmRequest, ListCardsRequest,
    ListCardsResponse, ListNetworksRequest, ListNetworksResponse, ListSecurityGroupsRequest,
    ListSecurityGroupsResponse, ListVmsRequest, ListVmsResponse, Network, RebootVmRequest, ResizeDiskRequest,
    ResizeDiskResponse, SecurityGroup, SetDiskLimitsRequest, SetNicLimitsRequest, SlotInfo, StartVmRequest,
    StopVmRequest, Vm as VmMessage, VmStats, WatchEventsRequest,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::vm::{Vm, unreachable_hypervisor};
use super::{Controller, ending, rpc};

/// Longest wait for what a running VM's hypervisor adds to GetVm.
const INFO_DEADLINE: Duration = Duration::from_secs(1);
/// Longest wait for a card in a list of cards.
const IDENTIFY_DEADLINE: Duration = Duration::from_secs(2);
/// How long a guest has for a graceful stop, unless said otherwise.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

impl Controller {
    fn find(&self, vm: &str) -> Result<Arc<Vm>, Error> {
        self.ctx.registry.find(vm)
    }

    async fn slots(&self, vm: &Vm) -> Vec<SlotInfo> {
        let Ok(channel) = vm.hypervisor() else { return Vec::new() };
        let mut client = HypervisorClient::new(channel);
        let info = rpc::call(INFO_DEADLINE, client.get_info(GetInfoRequest {})).await;
        info.map(|i| i.slots).unwrap_or_default()
    }

    async fn shown(&self, vm: &Vm) -> VmMessage {
        let slots = self.slots(vm).await;
        vm.message(slots)
    }

    async fn resize_disk(&self, request: ResizeDiskRequest) -> Result<ResizeDiskResponse, Error> {
        let vm = self.find(&request.vm)?;
        let name = &vm.spec.name;
        if !vm.spec.disks.iter().any(|d| d.id == request.disk) {
            let known = vm.spec.disks.iter().map(|d| d.id.as_str()).collect::<Vec<_>>().join(", ");
            let message = format!("VM {name} has no disk {:?}", request.disk);
            return Err(Error::invalid_field("disk", message)
                .resource(&request.disk)
                .remedy(format!("it has: {known}")));
        }
        // Its devices are there while it runs.
        vm.hypervisor()?;
        let placed = self.ctx.cards.devices_of(&vm.id, &vm.spec)?;
        let Some(placed) = placed.iter().find(|p| p.slot == request.disk) else { return Err(ending()) };
        let size_bytes = placed.card.resize_device(&placed.spec.id, request.size_bytes).await?;
        Ok(ResizeDiskResponse { size_bytes })
    }

    async fn stats(&self, vm: &Vm) -> Result<VmStats, Error> {
        let mut client = HypervisorClient::new(vm.hypervisor()?);
        let asked = rpc::call(self.ctx.deadlines.hypervisor, client.get_stats(GetStatsRequest {})).await;
        let hypervisor = asked.map_err(|f| f.or_else(|why| unreachable_hypervisor(&vm.spec.name, why)))?;
        let mut devices = Vec::new();
        for placed in self.ctx.cards.devices_of(&vm.id, &vm.spec)? {
            // A card that does not answer takes its devices out of the answer, not the others.
            match placed.card.device_stats(&placed.spec.id).await {
                Ok(Some(mut stats)) => {
                    stats.id = placed.slot;
                    devices.push(stats);
                }
                Ok(None) => {}
                Err(e) => tracing::warn!(vm = vm.id, device = placed.slot, "no counters: {e}"),
            }
        }
        Ok(VmStats { hypervisor: Some(hypervisor), devices })
    }
}

/// Runs to its end even if the client does not wait for it.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<Response<T>, Status> {
    match tokio::spawn(work).await {
        Ok(result) => result.map(Response::new).map_err(Status::from),
        // Only when the process is about to end.
        Err(_) => Err(ending().into()),
    }
}

#[tonic::async_trait]
impl Api for Controller {
    async fn create_vm(&self, request: Request<CreateVmRequest>) -> Result<Response<VmMessage>, Status> {
        let this = self.clone();
        detached(async move {
            let vm = Self::create_vm(&this, request.into_inner()).await?;
            Ok(this.shown(&vm).await)
        })
        .await
    }

    async fn get_vm(&self, request: Request<GetVmRequest>) -> Result<Response<VmMessage>, Status> {
        let vm = self.find(&request.into_inner().vm)?;
        Ok(Response::new(self.shown(&vm).await))
    }

    async fn list_vms(&self, _: Request<ListVmsRequest>) -> Result<Response<ListVmsResponse>, Status> {
        let mut vms: Vec<VmMessage> =
            self.ctx.registry.vms().iter().map(|vm| vm.message(Vec::new())).collect();
        // Of all VMs together it can be more than a message holds.
        for metadata in vms.iter_mut().filter_map(|vm| vm.spec.as_mut()?.metadata.as_mut()) {
            metadata.user_data.clear();
        }
        Ok(Response::new(ListVmsResponse { vms }))
    }

    async fn start_vm(&self, request: Request<StartVmRequest>) -> Result<Response<VmMessage>, Status> {
        let (this, vm) = (self.clone(), self.find(&request.into_inner().vm)?);
        detached(async move {
            vm.start().await?;
            Ok(this.shown(&vm).await)
        })
        .await
    }

    async fn stop_vm(&self, request: Request<StopVmRequest>) -> Result<Response<VmMessage>, Status> {
        let request = request.into_inner();
        let vm = self.find(&request.vm)?;
        let timeout = match request.timeout_ms {
            0 => STOP_TIMEOUT,
            // A day is for ever here, and keeps sums of times in range.
            ms => Duration::from_millis(ms).min(Duration::from_secs(86_400)),
        };
        detached(async move {
            vm.stop(request.graceful, timeout).await?;
            Ok(vm.message(Vec::new()))
        })
        .await
    }

    async fn reboot_vm(&self, request: Request<RebootVmRequest>) -> Result<Response<VmMessage>, Status> {
        let (this, vm) = (self.clone(), self.find(&request.into_inner().vm)?);
        detached(async move {
            vm.reboot().await?;
            Ok(this.shown(&vm).await)
        })
        .await
    }

    async fn set_disk_limits(
        &self,
        request: Request<SetDiskLimitsRequest>,
    ) -> Result<Response<VmMessage>, Status> {
        let SetDiskLimitsRequest { vm, disk, limits } = request.into_inner();
        let (this, vm) = (self.clone(), self.find(&vm)?);
        detached(async move {
            vm.set_disk_limits(&disk, limits.filter(|l| !l.is_none())).await?;
            Ok(this.shown(&vm).await)
        })
        .await
    }

    async fn set_nic_limits(
        &self,
        request: Request<SetNicLimitsRequest>,
    ) -> Result<Response<VmMessage>, Status> {
        let SetNicLimitsRequest { vm, nic, limits } = request.into_inner();
        let (this, vm) = (self.clone(), self.find(&vm)?);
        detached(async move {
            vm.set_nic_limits(&nic, limits.filter(|l| !l.is_none())).await?;
            Ok(this.shown(&vm).await)
        })
        .await
    }

    async fn delete_vm(
        &self,
        request: Request<DeleteVmRequest>,
    ) -> Result<Response<DeleteVmResponse>, Status> {
        let request = request.into_inner();
        let vm = self.find(&request.vm)?;
        detached(async move {
            vm.delete(request.force).await?;
            Ok(DeleteVmResponse {})
        })
        .await
    }

    type WatchEventsStream = ReceiverStream<Result<Event, Status>>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let vm = request.into_inner().vm;
        let id = if vm.is_empty() { None } else { Some(self.find(&vm)?.id.clone()) };
        Ok(Response::new(ReceiverStream::new(self.ctx.events.watch(id))))
    }

    type CaptureNicStream = ReceiverStream<Result<CapturePart, Status>>;

    async fn capture_nic(
        &self,
        request: Request<CaptureNicRequest>,
    ) -> Result<Response<Self::CaptureNicStream>, Status> {
        Ok(Response::new(self.open_capture(request.into_inner()).await?))
    }

    type ConsoleStream = ReceiverStream<Result<ConsoleOutput, Status>>;

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        self.open_console(request.into_inner()).await.map(Response::new)
    }

    async fn create_network(
        &self,
        request: Request<CreateNetworkRequest>,
    ) -> Result<Response<Network>, Status> {
        let this = self.clone();
        detached(async move { Self::create_network(&this, request.into_inner()).await }).await
    }

    async fn delete_network(
        &self,
        request: Request<DeleteNetworkRequest>,
    ) -> Result<Response<DeleteNetworkResponse>, Status> {
        let this = self.clone();
        detached(async move {
            Self::delete_network(&this, &request.into_inner().id).await?;
            Ok(DeleteNetworkResponse {})
        })
        .await
    }

    async fn list_networks(
        &self,
        _: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        Ok(Response::new(ListNetworksResponse { networks: Self::list_networks(self) }))
    }

    async fn create_security_group(
        &self,
        request: Request<CreateSecurityGroupRequest>,
    ) -> Result<Response<SecurityGroup>, Status> {
        let this = self.clone();
        detached(async move { Self::create_security_group(&this, request.into_inner()).await }).await
    }

    async fn change_security_group(
        &self,
        request: Request<ChangeSecurityGroupRequest>,
    ) -> Result<Response<SecurityGroup>, Status> {
        let this = self.clone();
        detached(async move { Self::change_security_group(&this, request.into_inner()).await }).await
    }

    async fn delete_security_group(
        &self,
        request: Request<DeleteSecurityGroupRequest>,
    ) -> Result<Response<DeleteSecurityGroupResponse>, Status> {
        let this = self.clone();
        detached(async move {
            Self::delete_security_group(&this, &request.into_inner().id).await?;
            Ok(DeleteSecurityGroupResponse {})
        })
        .await
    }

    async fn list_security_groups(
        &self,
        _: Request<ListSecurityGroupsRequest>,
    ) -> Result<Response<ListSecurityGroupsResponse>, Status> {
        Ok(Response::new(ListSecurityGroupsResponse { groups: Self::list_security_groups(self) }))
    }

    async fn resize_disk(
        &self,
        request: Request<ResizeDiskRequest>,
    ) -> Result<Response<ResizeDiskResponse>, Status> {
        let this = self.clone();
        detached(async move { Self::resize_disk(&this, request.into_inner()).await }).await
    }

    async fn get_vm_stats(&self, request: Request<GetVmRequest>) -> Result<Response<VmStats>, Status> {
        let vm = self.find(&request.into_inner().vm)?;
        Ok(Response::new(self.stats(&vm).await?))
    }

    async fn list_cards(&self, _: Request<ListCardsRequest>) -> Result<Response<ListCardsResponse>, Status> {
        let asked: Vec<_> = self
            .ctx
            .cards
            .iter()
            .map(|card| {
                let card = Arc::clone(card);
                tokio::spawn(async move {
                    let answer = tokio::time::timeout(IDENTIFY_DEADLINE, card.identify()).await;
                    let (info, error) = match answer {
                        Ok(Ok(info)) => (Some(info), String::new()),
                        Ok(Err(e)) => (None, e.message().to_owned()),
                        Err(_) => (None, format!("no answer within {} s", IDENTIFY_DEADLINE.as_secs())),
                    };
                    CardStatus {
                        name: card.name().to_owned(),
                        control_socket: card.socket().display().to_string(),
                        info,
                        error,
                    }
                })
            })
            .collect();
        let mut cards = Vec::with_capacity(asked.len());
        for status in asked {
            cards.extend(status.await);
        }
        Ok(Response::new(ListCardsResponse { cards }))
    }
}
