//! A card that keeps its devices in memory and fails on demand.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::error::{Error, ErrorReason};
use proto::v1::card_server::{Card, CardServer};
use proto::v1::network_card_server::{NetworkCard, NetworkCardServer};
use proto::v1::{
    CapturePart, CaptureRequest, CardInfo, CardStats, CreateDeviceRequest, CreateNetworkRequest,
    DeleteDeviceRequest, DeleteDeviceResponse, DeleteNetworkRequest, DeleteNetworkResponse, Device,
    DeviceSpec, DeviceStats, GetCardStatsRequest, IdentifyRequest, ListDevicesRequest, ListDevicesResponse,
    ListNetworksRequest, ListNetworksResponse, Network, NetworkSpec, SetLimitsRequest, device_spec::Kind,
};
use proto::v1::{
    DeleteSecurityGroupRequest, DeleteSecurityGroupResponse, ListSecurityGroupsRequest,
    ListSecurityGroupsResponse, SecurityGroupSpec, SetSecurityGroupsRequest, SetSecurityGroupsResponse,
    security_group_rule::Peer,
};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};

#[derive(Default)]
pub(crate) struct State {
    pub devices: BTreeMap<String, DeviceSpec>,
    pub networks: BTreeMap<String, NetworkSpec>,
    pub groups: BTreeMap<String, SecurityGroupSpec>,
    /// CreateDevice fails for devices whose id ends so.
    pub refuse: BTreeSet<String>,
    /// So does validation.
    pub refuse_validation: BTreeSet<String>,
    /// Every call takes so long.
    pub delay: Duration,
    /// Devices made, in order, also those there already.
    pub made: Vec<String>,
    /// Calls that want to make or delete something wait, before anything is done, while this is true.
    pub hold: Option<watch::Receiver<bool>>,
    /// How many such calls have come.
    pub changes: u32,
}

#[derive(Clone)]
struct Service {
    kind: &'static str,
    state: Arc<Mutex<State>>,
}

pub(crate) struct FakeCard {
    dir: PathBuf,
    service: Service,
    // Its own, so that it can end as a process does: with every connection.
    runtime: Option<Runtime>,
}

impl FakeCard {
    pub(crate) fn start(kind: &'static str, dir: &Path) -> Self {
        std::fs::create_dir_all(dir).expect("directory");
        let mut card =
            Self { dir: dir.to_owned(), service: Service { kind, state: Arc::default() }, runtime: None };
        card.restart();
        card
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    pub(crate) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.service.state.lock().expect("state")
    }

    pub(crate) fn devices(&self) -> Vec<String> {
        self.state().devices.keys().cloned().collect()
    }

    /// Nobody listens any more, and every connection breaks.
    pub(crate) async fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            super::end(runtime).await;
        }
        let _ = std::fs::remove_file(self.socket());
    }

    pub(crate) fn restart(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("runtime");
        let entered = runtime.enter();
        let listener = UnixListener::bind(self.socket()).expect("listen");
        let service = self.service.clone();
        runtime.spawn(async move {
            Server::builder()
                .add_service(CardServer::new(service.clone()))
                .add_service(NetworkCardServer::new(service))
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
                .expect("serve");
        });
        drop(entered);
        self.runtime = Some(runtime);
    }
}

impl Drop for FakeCard {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Service {
    async fn delay(&self) {
        let delay = self.state.lock().expect("state").delay;
        tokio::time::sleep(delay).await;
    }

    /// As [`Service::delay`], for calls that change something.
    async fn before_change(&self) {
        self.delay().await;
        let hold = {
            let mut state = self.state.lock().expect("state");
            state.changes += 1;
            state.hold.clone()
        };
        if let Some(mut hold) = hold {
            hold.wait_for(|h| !h).await.expect("the test to let it go");
        }
    }

    fn device(spec: &DeviceSpec) -> Device {
        let (virtio_device_id, queues, config_size) = match &spec.kind {
            // With several pairs there is a control queue.
            Some(Kind::Net(net)) => (1, net.queue_pairs * 2 + u32::from(net.queue_pairs > 1), 12),
            Some(Kind::Block(block)) => (2, block.queues, 60),
            None => (0, 0, 0),
        };
        Device {
            socket_path: format!("/devices/{}.sock", spec.id),
            spec: Some(spec.clone()),
            virtio_device_id,
            queues,
            queue_size: 256,
            config_size,
            ..Device::default()
        }
    }
}

fn refused(what: &str) -> Status {
    Error::new(Code::InvalidArgument, ErrorReason::DiskInvalid, format!("{what} was refused"))
        .remedy("ask the test")
        .into()
}

fn no_group(id: &str) -> Status {
    let e = Error::new(Code::NotFound, ErrorReason::SecurityGroupNotFound, format!("no group {id} here"));
    e.remedy("ask the test").into()
}

#[tonic::async_trait]
impl Card for Service {
    async fn identify(&self, _: Request<IdentifyRequest>) -> Result<Response<CardInfo>, Status> {
        self.delay().await;
        Ok(Response::new(CardInfo { kind: self.kind.into(), version: "1".into(), ..CardInfo::default() }))
    }

    async fn create_device(&self, request: Request<CreateDeviceRequest>) -> Result<Response<Device>, Status> {
        let request = request.into_inner();
        if request.validate_only {
            self.delay().await;
        } else {
            self.before_change().await;
        }
        let spec = request.spec.expect("spec");
        let mut state = self.state.lock().expect("state");
        if let Some(Kind::Net(net)) = &spec.kind
            && !state.networks.contains_key(&net.network)
        {
            let e = Error::new(Code::NotFound, ErrorReason::NetworkNotFound, "no such network here");
            return Err(e.into());
        }
        if let Some(Kind::Net(net)) = &spec.kind
            && let Some(group) = net.security_groups.iter().find(|g| !state.groups.contains_key(*g))
        {
            return Err(no_group(group));
        }
        let hit = |set: &BTreeSet<String>| set.iter().any(|end| spec.id.ends_with(end));
        if hit(&state.refuse_validation) || (!request.validate_only && hit(&state.refuse)) {
            return Err(refused(&spec.id));
        }
        if let Some(there) = state.devices.get(&spec.id)
            && there.kind != spec.kind
        {
            let e = Error::new(Code::AlreadyExists, ErrorReason::DeviceExists, "another one is there");
            return Err(e.into());
        }
        let device = Self::device(&spec);
        if !request.validate_only {
            state.made.push(spec.id.clone());
            state.devices.insert(spec.id.clone(), spec);
        }
        Ok(Response::new(device))
    }

    async fn set_limits(&self, request: Request<SetLimitsRequest>) -> Result<Response<Device>, Status> {
        self.before_change().await;
        let SetLimitsRequest { id, limits, net_limits } = request.into_inner();
        let mut state = self.state.lock().expect("state");
        let Some(spec) = state.devices.get_mut(&id) else {
            return Err(Error::new(Code::NotFound, ErrorReason::DeviceNotFound, "no such device").into());
        };
        (spec.limits, spec.net_limits) = (limits, net_limits);
        Ok(Response::new(Device { spec: Some(spec.clone()), ..Device::default() }))
    }

    async fn delete_device(
        &self,
        request: Request<DeleteDeviceRequest>,
    ) -> Result<Response<DeleteDeviceResponse>, Status> {
        self.before_change().await;
        let removed = self.state.lock().expect("state").devices.remove(&request.into_inner().id);
        match removed {
            Some(_) => Ok(Response::new(DeleteDeviceResponse {})),
            None => Err(Error::new(Code::NotFound, ErrorReason::DeviceNotFound, "no such device").into()),
        }
    }

    async fn list_devices(
        &self,
        _: Request<ListDevicesRequest>,
    ) -> Result<Response<ListDevicesResponse>, Status> {
        let state = self.state.lock().expect("state");
        Ok(Response::new(ListDevicesResponse { devices: state.devices.values().map(Self::device).collect() }))
    }

    async fn get_stats(&self, request: Request<GetCardStatsRequest>) -> Result<Response<CardStats>, Status> {
        self.delay().await;
        let id = request.into_inner().device_id;
        Ok(Response::new(CardStats {
            devices: vec![DeviceStats { id, connections: 7, ..DeviceStats::default() }],
        }))
    }
}

#[tonic::async_trait]
impl NetworkCard for Service {
    async fn create_network(
        &self,
        request: Request<CreateNetworkRequest>,
    ) -> Result<Response<Network>, Status> {
        let request = request.into_inner();
        if request.validate_only {
            self.delay().await;
        } else {
            self.before_change().await;
        }
        let spec = request.spec.expect("spec");
        let mut state = self.state.lock().expect("state");
        let set = if request.validate_only { &state.refuse_validation } else { &state.refuse };
        if set.contains(&spec.id) {
            return Err(refused(&spec.id));
        }
        if !request.validate_only {
            state.networks.insert(spec.id.clone(), spec.clone());
        }
        Ok(Response::new(Network { spec: Some(spec), devices: Vec::new() }))
    }

    async fn delete_network(
        &self,
        request: Request<DeleteNetworkRequest>,
    ) -> Result<Response<DeleteNetworkResponse>, Status> {
        self.delay().await;
        self.state.lock().expect("state").networks.remove(&request.into_inner().id);
        Ok(Response::new(DeleteNetworkResponse {}))
    }

    async fn list_networks(
        &self,
        _: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        Ok(Response::new(ListNetworksResponse::default()))
    }

    async fn set_security_groups(
        &self,
        request: Request<SetSecurityGroupsRequest>,
    ) -> Result<Response<SetSecurityGroupsResponse>, Status> {
        let request = request.into_inner();
        if request.validate_only {
            self.delay().await;
        } else {
            self.before_change().await;
        }
        let mut state = self.state.lock().expect("state");
        let set = if request.validate_only { &state.refuse_validation } else { &state.refuse };
        if let Some(refuse) = request.groups.iter().find(|g| set.contains(&g.id)) {
            return Err(refused(&refuse.id));
        }
        for peer in request.groups.iter().flat_map(|g| &g.rules).filter_map(|r| r.peer.as_ref()) {
            if let Peer::Group(id) = peer
                && !state.groups.contains_key(id)
                && !request.groups.iter().any(|g| g.id == *id)
            {
                return Err(no_group(id));
            }
        }
        if !request.validate_only {
            state.groups.extend(request.groups.into_iter().map(|g| (g.id.clone(), g)));
        }
        Ok(Response::new(SetSecurityGroupsResponse {}))
    }

    async fn delete_security_group(
        &self,
        request: Request<DeleteSecurityGroupRequest>,
    ) -> Result<Response<DeleteSecurityGroupResponse>, Status> {
        self.before_change().await;
        let id = request.into_inner().id;
        match self.state.lock().expect("state").groups.remove(&id) {
            Some(_) => Ok(Response::new(DeleteSecurityGroupResponse {})),
            None => Err(no_group(&id)),
        }
    }

    async fn list_security_groups(
        &self,
        _: Request<ListSecurityGroupsRequest>,
    ) -> Result<Response<ListSecurityGroupsResponse>, Status> {
        Ok(Response::new(ListSecurityGroupsResponse::default()))
    }

    type CaptureStream = ReceiverStream<Result<CapturePart, Status>>;

    /// Three parts that say what was asked for, and the end.
    async fn capture(
        &self,
        request: Request<CaptureRequest>,
    ) -> Result<Response<Self::CaptureStream>, Status> {
        let CaptureRequest { device_id, snap_bytes, frames } = request.into_inner();
        if !self.state.lock().expect("state").devices.contains_key(&device_id) {
            return Err(Error::new(Code::NotFound, ErrorReason::DeviceNotFound, "no such device").into());
        }
        let (sender, receiver) = tokio::sync::mpsc::channel(3);
        for i in 1..=3 {
            let pcapng = format!("{i} {device_id} {snap_bytes} {frames};").into_bytes();
            let _ = sender.try_send(Ok(CapturePart { pcapng, frames: i, lost: 0 }));
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
