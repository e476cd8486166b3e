//! The gRPC service `NetworkCard`.

use std::pin::Pin;
use std::task::{Context, Poll};

use proto::error::{Error, ErrorReason};
use proto::v1::network_card_server::NetworkCard;
use proto::v1::{
    CapturePart, CaptureRequest, CreateNetworkRequest, DeleteNetworkRequest, DeleteNetworkResponse,
    DeleteSecurityGroupRequest, DeleteSecurityGroupResponse, ListNetworksRequest, ListNetworksResponse,
    ListSecurityGroupsRequest, ListSecurityGroupsResponse, Network, NetworkSpec, SecurityGroup,
    SetSecurityGroupsRequest, SetSecurityGroupsResponse,
};
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status};

use crate::capture::{Source, Wanted};
use crate::registry::Networks;

/// A capture on its way to its reader.
#[derive(Debug)]
pub struct Captured(Source);

impl Stream for Captured {
    type Item = Result<CapturePart, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll(context).map(|part| part.map(Ok))
    }
}

impl Networks {
    /// Runs what waits for the kernel or a network's thread away from the service's own thread, which all calls share.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let networks = self.clone();
        tokio::task::spawn_blocking(move || work(&networks)).await.unwrap_or_else(|e| {
            Err(Error::new(Code::Internal, ErrorReason::Internal, format!("the call ended: {e}")))
        })
    }
}

#[tonic::async_trait]
impl NetworkCard for Networks {
    async fn create_network(
        &self,
        request: Request<CreateNetworkRequest>,
    ) -> Result<Response<Network>, Status> {
        let request = request.into_inner();
        let spec =
            request.spec.ok_or_else(|| Error::invalid_field("spec", "the request has no network in it"))?;
        let devices = {
            let spec = spec.clone();
            self.blocking(move |networks| networks.create(&spec, request.validate_only)).await?
        };
        Ok(Response::new(answer(spec, devices)))
    }

    async fn delete_network(
        &self,
        request: Request<DeleteNetworkRequest>,
    ) -> Result<Response<DeleteNetworkResponse>, Status> {
        let id = request.into_inner().id;
        self.blocking(move |networks| networks.delete(&id)).await?;
        Ok(Response::new(DeleteNetworkResponse {}))
    }

    async fn list_networks(
        &self,
        _request: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        let networks = self.blocking(|networks| Ok(networks.list())).await?;
        let networks = networks.into_iter().map(|(spec, devices)| answer(spec, devices)).collect();
        Ok(Response::new(ListNetworksResponse { networks }))
    }

    async fn set_security_groups(
        &self,
        request: Request<SetSecurityGroupsRequest>,
    ) -> Result<Response<SetSecurityGroupsResponse>, Status> {
        let SetSecurityGroupsRequest { groups, validate_only } = request.into_inner();
        self.blocking(move |networks| networks.set_security_groups(&groups, validate_only)).await?;
        Ok(Response::new(SetSecurityGroupsResponse {}))
    }

    async fn delete_security_group(
        &self,
        request: Request<DeleteSecurityGroupRequest>,
    ) -> Result<Response<DeleteSecurityGroupResponse>, Status> {
        let id = request.into_inner().id;
        self.blocking(move |networks| networks.delete_security_group(&id)).await?;
        Ok(Response::new(DeleteSecurityGroupResponse {}))
    }

    async fn list_security_groups(
        &self,
        _request: Request<ListSecurityGroupsRequest>,
    ) -> Result<Response<ListSecurityGroupsResponse>, Status> {
        let groups = self.blocking(|networks| Ok(networks.list_security_groups())).await?;
        let groups =
            groups.into_iter().map(|(spec, devices)| SecurityGroup { spec: Some(spec), devices }).collect();
        Ok(Response::new(ListSecurityGroupsResponse { groups }))
    }

    type CaptureStream = Captured;

    async fn capture(&self, request: Request<CaptureRequest>) -> Result<Response<Captured>, Status> {
        let CaptureRequest { device_id, snap_bytes, frames } = request.into_inner();
        let wanted = Wanted { snap_bytes, frames };
        let source = self.blocking(move |networks| networks.capture(&device_id, wanted)).await?;
        Ok(Response::new(Captured(source)))
    }
}

fn answer(spec: NetworkSpec, devices: Vec<String>) -> Network {
    Network { spec: Some(spec), devices }
}
