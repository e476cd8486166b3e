//! The methods of `outboard.v1.Hypervisor`.

use std::pin::Pin;
use std::sync::Arc;

use proto::error::{Error, ErrorReason};
use proto::v1::hypervisor_server::Hypervisor;
use proto::v1::{
    BootRequest, BootResponse, ConfigureRequest, ConfigureResponse, ConsoleInput, ConsoleOutput,
    EventsRequest, GetInfoRequest, GetStatsRequest, HypervisorEvent, HypervisorInfo, HypervisorStats,
    PauseRequest, PauseResponse, ResetRequest, ResetResponse, ResumeRequest, ResumeResponse, ShutdownMode,
    ShutdownRequest, ShutdownResponse,
};
use tokio::sync::oneshot;
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status as RpcStatus, Streaming};

use super::streams;
use crate::machine::{Call, MachineHandle, Reply, Status};

/// See the module.
pub(super) struct Service {
    machine: MachineHandle,
    status: Arc<Status>,
}

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, RpcStatus>> + Send>>;

impl Service {
    pub(super) fn new(machine: MachineHandle, status: Arc<Status>) -> Self {
        Self { machine, status }
    }

    /// Asks the machine and waits for its answer.
    async fn ask<T: Send + 'static>(&self, call: impl FnOnce(Reply<T>) -> Call) -> Result<T, RpcStatus> {
        let (sender, answer) = oneshot::channel();
        self.machine.call(call(Box::new(move |result| {
            // A caller that has gone does not need it.
            let _ = sender.send(result);
        })));
        match answer.await {
            Ok(result) => result.map_err(RpcStatus::from),
            Err(_) => Err(Error::new(Code::FailedPrecondition, ErrorReason::WrongState, "the VM has ended")
                .remedy("start it anew")
                .into()),
        }
    }
}

#[tonic::async_trait]
impl Hypervisor for Service {
    type ConsoleStream = ResponseStream<ConsoleOutput>;
    type EventsStream = ResponseStream<HypervisorEvent>;

    async fn configure(
        &self,
        request: Request<ConfigureRequest>,
    ) -> Result<Response<ConfigureResponse>, RpcStatus> {
        let config = request.into_inner().config.ok_or_else(|| {
            Error::invalid_field("config", "the configuration is missing").remedy("give config")
        })?;
        let info = self.ask(|reply| Call::Configure(Box::new(config), reply)).await?;
        Ok(Response::new(ConfigureResponse { info: Some(info) }))
    }

    async fn boot(&self, _: Request<BootRequest>) -> Result<Response<BootResponse>, RpcStatus> {
        self.ask(Call::Boot).await?;
        Ok(Response::new(BootResponse {}))
    }

    async fn pause(&self, _: Request<PauseRequest>) -> Result<Response<PauseResponse>, RpcStatus> {
        self.ask(Call::Pause).await?;
        Ok(Response::new(PauseResponse {}))
    }

    async fn resume(&self, _: Request<ResumeRequest>) -> Result<Response<ResumeResponse>, RpcStatus> {
        self.ask(Call::Resume).await?;
        Ok(Response::new(ResumeResponse {}))
    }

    async fn reset(&self, _: Request<ResetRequest>) -> Result<Response<ResetResponse>, RpcStatus> {
        self.ask(Call::Reset).await?;
        Ok(Response::new(ResetResponse {}))
    }

    async fn shutdown(
        &self,
        request: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, RpcStatus> {
        let mode = request.into_inner().mode;
        let mode = ShutdownMode::try_from(mode).unwrap_or(ShutdownMode::Unspecified);
        self.ask(|reply| Call::Shutdown(mode, reply)).await?;
        Ok(Response::new(ShutdownResponse {}))
    }

    async fn get_info(&self, _: Request<GetInfoRequest>) -> Result<Response<HypervisorInfo>, RpcStatus> {
        Ok(Response::new(self.status.info()))
    }

    async fn get_stats(&self, _: Request<GetStatsRequest>) -> Result<Response<HypervisorStats>, RpcStatus> {
        Ok(Response::new(self.status.stats()))
    }

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, RpcStatus> {
        let output = streams::console(Arc::clone(self.status.console()), request.into_inner()).await?;
        Ok(Response::new(Box::pin(output)))
    }

    async fn events(&self, _: Request<EventsRequest>) -> Result<Response<Self::EventsStream>, RpcStatus> {
        Ok(Response::new(Box::pin(streams::events(self.status.subscribe()))))
    }
}
