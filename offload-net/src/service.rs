//! The gRPC service `NetworkCard`.

use proto::error::{Error, ErrorReason};
use proto::v1::network_card_server::NetworkCard;
use proto::v1::{
    CreateNetworkRequest, DeleteNetworkRequest, DeleteNetworkResponse, ListNetworksRequest,
    ListNetworksResponse, Network, NetworkSpec,
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
}

fn answer(spec: NetworkSpec, devices: Vec<String>) -> Network {
    Network { spec: Some(spec), devices }
}
