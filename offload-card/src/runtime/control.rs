//! The gRPC service `Card`.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use proto::error::Error;
use proto::v1::{
    CardInfo, CardStats, CreateDeviceRequest, DeleteDeviceRequest, DeleteDeviceResponse, Device, ErrorReason,
    GetCardStatsRequest, IdentifyRequest, ListDevicesRequest, ListDevicesResponse, SetLimitsRequest,
    card_server,
};
use tonic::{Code, Request, Response, Status};

use super::registry::Registry;
use crate::factory::DeviceFactory;

pub(super) struct ControlService<F> {
    kind: &'static str,
    version: &'static str,
    started_us: i64,
    registry: Arc<Registry<F>>,
}

impl<F: DeviceFactory> ControlService<F> {
    pub(super) fn new(kind: &'static str, version: &'static str, registry: Arc<Registry<F>>) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { kind, version, started_us: i64::try_from(since.as_micros()).unwrap_or(i64::MAX), registry }
    }

    /// Runs what may block away from the service's own thread.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Registry<F>) -> Result<T, Error> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let registry = self.registry.clone();
        match tokio::task::spawn_blocking(move || work(&registry)).await {
            Ok(result) => Ok(Response::new(result?)),
            Err(e) => {
                Err(Error::new(Code::Internal, ErrorReason::Internal, format!("the call ended: {e}")).into())
            }
        }
    }
}

#[tonic::async_trait]
impl<F: DeviceFactory> card_server::Card for ControlService<F> {
    async fn identify(&self, _: Request<IdentifyRequest>) -> Result<Response<CardInfo>, Status> {
        Ok(Response::new(CardInfo {
            kind: self.kind.into(),
            version: self.version.into(),
            pid: std::process::id(),
            started_us: self.started_us,
            devices: u32::try_from(self.registry.len()).unwrap_or(u32::MAX),
        }))
    }

    async fn create_device(&self, request: Request<CreateDeviceRequest>) -> Result<Response<Device>, Status> {
        let CreateDeviceRequest { spec, validate_only } = request.into_inner();
        let spec =
            spec.ok_or_else(|| Error::invalid_field("spec", "the request has no device specification"))?;
        self.blocking(move |r| if validate_only { r.validate(&spec) } else { r.create(&spec) }).await
    }

    async fn set_limits(&self, request: Request<SetLimitsRequest>) -> Result<Response<Device>, Status> {
        let SetLimitsRequest { id, limits, net_limits } = request.into_inner();
        self.blocking(move |r| r.set_limits(&id, limits, net_limits)).await
    }

    async fn delete_device(
        &self,
        request: Request<DeleteDeviceRequest>,
    ) -> Result<Response<DeleteDeviceResponse>, Status> {
        let id = request.into_inner().id;
        self.blocking(move |r| r.delete(&id).map(|()| DeleteDeviceResponse {})).await
    }

    async fn list_devices(
        &self,
        _: Request<ListDevicesRequest>,
    ) -> Result<Response<ListDevicesResponse>, Status> {
        Ok(Response::new(ListDevicesResponse { devices: self.registry.list() }))
    }

    async fn get_stats(&self, request: Request<GetCardStatsRequest>) -> Result<Response<CardStats>, Status> {
        Ok(Response::new(CardStats { devices: self.registry.stats(&request.into_inner().device_id)? }))
    }
}
