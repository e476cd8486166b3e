//! The gRPC service `NetworkCard`.

use proto::error::Error;
use proto::v1::network_card_server::NetworkCard;
use proto::v1::{
    CreateNetworkRequest, DeleteNetworkRequest, DeleteNetworkResponse, ListNetworksRequest,
    ListNetworksResponse, Network, NetworkSpec,
};
use tonic::{Request, Response, Status};

use crate::registry::Networks;

#[tonic::async_trait]
impl NetworkCard for Networks {
    async fn create_network(
        &self,
        request: Request<CreateNetworkRequest>,
    ) -> Result<Response<Network>, Status> {
        let request = request.into_inner();
        let spec =
            request.spec.ok_or_else(|| Error::invalid_field("spec", "the request has no network in it"))?;
        let devices = self.create(&spec, request.validate_only)?;
        Ok(Response::new(answer(spec, devices)))
    }

    async fn delete_network(
        &self,
        request: Request<DeleteNetworkRequest>,
    ) -> Result<Response<DeleteNetworkResponse>, Status> {
        self.delete(&request.into_inner().id)?;
        Ok(Response::new(DeleteNetworkResponse {}))
    }

    async fn list_networks(
        &self,
        _request: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        let networks = self.list().into_iter().map(|(spec, devices)| answer(spec, devices)).collect();
        Ok(Response::new(ListNetworksResponse { networks }))
    }
}

fn answer(spec: NetworkSpec, devices: Vec<String>) -> Network {
    Network { spec: Some(spec), devices }
}
