//! The gRPC service `NetworkCard`.

use proto::error::{Error, ErrorReason};
use proto::v1::network_card_server::NetworkCard;
use proto::v1::{
    CreateNetworkRequest, DeleteNetworkRequest, DeleteNetworkResponse, DeleteSecurityGroupRequest,
    DeleteSecurityGroupResponse, ListNetworksRequest, ListNetworksResponse, ListSecurityGroupsRequest,
    ListSecurityGroupsResponse, Network, NetworkSpec, SecurityGroup, SetSecurityGroupsRequest,
    SetSecurityGroupsResponse,
};
use tonic::{Code, Request, Response, Status};

use crate::registry::Networks;

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
}

fn answer(spec: NetworkSpec, devices: Vec<String>) -> Network {
    Network { spec: Some(spec), devices }
}
