//! A card process under test.

use std::path::{Path, PathBuf};
use std::process::Command;

use proto::v1::card_client::CardClient;
use proto::v1::network_card_client::NetworkCardClient;
use proto::v1::storage_card_client::StorageCardClient;
use proto::v1::{
    BlockDeviceSpec, CreateDeviceRequest, CreateNetworkRequest, DeleteDeviceRequest, DeleteNetworkRequest,
    Device, DeviceLimits, DeviceSpec, DeviceStats, GetCardStatsRequest, IdentifyRequest, ListDevicesRequest,
    NetDeviceSpec, NetDrops, NetworkSpec, QueueStats, ResizeDeviceRequest, SecurityGroupSpec,
    SetLimitsRequest, SetSecurityGroupsRequest, device_spec,
};
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::manager::Manager;
use crate::process::Process;
use crate::{SOON, binary, wait_until};

/// A channel to a Unix socket; dials when first used, and again whenever it has broken.
pub fn channel(runtime: &Runtime, socket: &Path) -> Channel {
    let _guard = runtime.enter();
    let uri = format!("unix:{}", socket.display());
    Endpoint::from_shared(uri).expect("socket uri").timeout(SOON).connect_lazy()
}

/// A card process: may be killed and started again in the same runtime directory.
pub struct Card {
    runtime: Runtime,
    program: &'static str,
    dir: PathBuf,
    arguments: Vec<String>,
    manager: Option<Manager>,
    process: Process,
    channel: Channel,
}

impl Card {
    /// Starts `offload-blk` or `offload-net` with its control socket and runtime directory below `dir`.
    pub fn start(program: &'static str, dir: &Path) -> Self {
        Self::start_with(program, &dir.join(program), &[])
    }

    /// The same with further arguments, and everything in `dir`.
    pub fn start_with(program: &'static str, dir: &Path, arguments: &[&str]) -> Self {
        Self::start_under(None, program, dir, arguments)
    }

    /// The same under a service manager that keeps its sockets.
    pub fn start_managed(program: &'static str, dir: &Path) -> Self {
        Self::start_under(Some(Manager::new(dir)), program, &dir.join(program), &[])
    }

    fn start_under(
        mut manager: Option<Manager>,
        program: &'static str,
        dir: &Path,
        arguments: &[&str],
    ) -> Self {
        let runtime = crate::runtime();
        std::fs::create_dir_all(dir).expect("runtime directory");
        let arguments: Vec<_> = arguments.iter().map(|&a| a.to_owned()).collect();
        let process = Self::spawn(manager.as_mut(), program, dir, &arguments);
        let channel = channel(&runtime, &dir.join("control.sock"));
        let card = Self { runtime, program, dir: dir.to_owned(), arguments, manager, process, channel };
        card.wait_ready();
        card
    }

    fn spawn(manager: Option<&mut Manager>, program: &str, dir: &Path, arguments: &[String]) -> Process {
        let mut command = Command::new(binary(program));
        command.arg("--control").arg(dir.join("control.sock")).arg("--runtime-dir").arg(dir);
        command.args(arguments);
        if let Some(manager) = manager {
            command = manager.child(&command);
        }
        Process::spawn(&mut command, &dir.join("log"))
    }

    fn wait_ready(&self) {
        wait_until("the card to answer", SOON, || {
            self.runtime.block_on(CardClient::new(self.channel.clone()).identify(IdentifyRequest {})).is_ok()
        });
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// SIGKILL; it stays dead until [`Card::restart`].
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// SIGTERM, and waits for the orderly end.
    pub fn stop(&mut self) {
        self.process.signal(nix::sys::signal::Signal::SIGTERM);
        let status = self.process.wait(SOON);
        assert!(status.success(), "{} ended with {status}", self.program);
    }

    /// Starts it again where it was; returns when it answers.
    pub fn restart(&mut self) {
        self.start_again();
        self.wait_ready();
    }

    /// Starts it again where it was, and does not wait for it.
    pub fn start_again(&mut self) {
        self.process = Self::spawn(self.manager.as_mut(), self.program, &self.dir, &self.arguments);
    }

    /// What its service manager keeps for it.
    pub fn kept(&mut self) -> Vec<String> {
        self.manager.as_mut().map(Manager::names).unwrap_or_default()
    }

    fn create(&self, spec: DeviceSpec) -> Result<Device, Status> {
        let request = CreateDeviceRequest { spec: Some(spec), validate_only: false };
        let answer = self.runtime.block_on(CardClient::new(self.channel.clone()).create_device(request));
        answer.map(tonic::Response::into_inner)
    }

    /// Makes a virtio-blk device.
    pub fn create_block(&self, id: &str, spec: BlockDeviceSpec) -> Result<Device, Status> {
        self.create(DeviceSpec {
            id: id.to_owned(),
            kind: Some(device_spec::Kind::Block(spec)),
            limits: None,
            net_limits: None,
        })
    }

    /// A virtio-blk device on `image`.
    pub fn block(&self, id: &str, image: &Path, queues: u32) -> Device {
        let path = image.to_str().expect("path").to_owned();
        self.create_block(id, BlockDeviceSpec { path, queues, ..Default::default() })
            .expect("create block device")
    }

    /// Makes a disk longer, or with 0 as long as its image has become; its size then.
    pub fn resize(&self, id: &str, size_bytes: u64) -> Result<u64, Status> {
        let request = ResizeDeviceRequest { id: id.to_owned(), size_bytes };
        let resized =
            self.runtime.block_on(StorageCardClient::new(self.channel.clone()).resize_device(request));
        resized.map(|r| r.into_inner().size_bytes)
    }

    /// Makes a network, with a TAP that has `address` on the host's side if both are given.
    pub fn network(&self, id: &str, tap: &str, address: &str) {
        self.try_network(id, tap, address).expect("create network");
    }

    /// The same without a panic.
    pub fn try_network(&self, id: &str, tap: &str, address: &str) -> Result<(), Status> {
        let spec = NetworkSpec {
            id: id.to_owned(),
            tap: tap.to_owned(),
            host_addresses: if address.is_empty() { vec![] } else { vec![address.to_owned()] },
            ..Default::default()
        };
        self.create_network(spec)
    }

    /// Makes a network of any kind.
    pub fn create_network(&self, spec: NetworkSpec) -> Result<(), Status> {
        let request = CreateNetworkRequest { spec: Some(spec), ..Default::default() };
        self.runtime.block_on(NetworkCardClient::new(self.channel.clone()).create_network(request)).map(drop)
    }

    /// Removes a network without devices, and its TAP.
    pub fn delete_network(&self, id: &str) -> Result<(), Status> {
        let request = DeleteNetworkRequest { id: id.to_owned() };
        self.runtime.block_on(NetworkCardClient::new(self.channel.clone()).delete_network(request)).map(drop)
    }

    /// A virtio-net device in `network`; the last byte of its MAC is `n`.
    pub fn nic(&self, id: &str, network: &str, n: u8) -> Device {
        self.try_nic(id, network, n).expect("create network device")
    }

    /// The same without a panic.
    pub fn try_nic(&self, id: &str, network: &str, n: u8) -> Result<Device, Status> {
        let spec = NetDeviceSpec { network: network.to_owned(), mac: mac(n).to_vec(), ..Default::default() };
        self.create_nic(id, spec)
    }

    /// The same with so many queue pairs.
    pub fn nic_with_pairs(&self, id: &str, network: &str, n: u8, queue_pairs: u32) -> Device {
        let (network, mac) = (network.to_owned(), mac(n).to_vec());
        let spec = NetDeviceSpec { network, mac, queue_pairs, ..Default::default() };
        self.create_nic(id, spec).expect("create network device")
    }

    /// Bytes that each receive queue of a network device has been given, by pair.
    pub fn received_by_pair(&self, device: &str) -> Vec<u64> {
        let queues = self.queue_stats(device);
        queues.chunks_exact(2).map(|pair| pair[0].bytes_in).collect()
    }

    /// The same in a network with a prefix, with this address in it.
    pub fn nic_with_address(&self, id: &str, network: &str, n: u8, address: &str) -> Device {
        let (network, mac) = (network.to_owned(), mac(n).to_vec());
        let spec = NetDeviceSpec { network, mac, addresses: vec![address.to_owned()], ..Default::default() };
        self.create_nic(id, spec).expect("create network device")
    }

    /// A virtio-net device of any kind.
    pub fn create_nic(&self, id: &str, spec: NetDeviceSpec) -> Result<Device, Status> {
        self.create(DeviceSpec {
            id: id.to_owned(),
            kind: Some(device_spec::Kind::Net(spec)),
            limits: None,
            net_limits: None,
        })
    }

    /// Makes security groups, or replaces them.
    pub fn set_security_groups(&self, groups: Vec<SecurityGroupSpec>) {
        let request = SetSecurityGroupsRequest { groups, validate_only: false };
        let mut client = NetworkCardClient::new(self.channel.clone());
        self.runtime.block_on(client.set_security_groups(request)).expect("set security groups");
    }

    /// A device as it is now.
    ///
    /// # Panics
    /// There is none of this name.
    pub fn device(&self, id: &str) -> Device {
        let list = self
            .runtime
            .block_on(CardClient::new(self.channel.clone()).list_devices(ListDevicesRequest::default()));
        let devices = list.expect("list of devices").into_inner().devices;
        let named = |d: &Device| d.spec.as_ref().is_some_and(|spec| spec.id == id);
        devices.into_iter().find(named).unwrap_or_else(|| panic!("no device {id}"))
    }

    /// Sets what a device may do per second.
    pub fn set_limits(&self, id: &str, limits: DeviceLimits) {
        let request = SetLimitsRequest { id: id.to_owned(), limits: Some(limits), net_limits: None };
        let answer = self.runtime.block_on(CardClient::new(self.channel.clone()).set_limits(request));
        answer.expect("set limits");
    }

    /// Removes a device; returns when nothing of it is left.
    pub fn delete(&self, id: &str) -> Result<(), Status> {
        let request = DeleteDeviceRequest { id: id.to_owned() };
        self.runtime.block_on(CardClient::new(self.channel.clone()).delete_device(request)).map(drop)
    }

    /// A device's counters, per queue.
    pub fn queue_stats(&self, device: &str) -> Vec<QueueStats> {
        self.stats(device).queues
    }

    fn stats(&self, device: &str) -> DeviceStats {
        self.stats_of(device).swap_remove(0)
    }

    /// All devices' counters.
    pub fn all_stats(&self) -> Vec<DeviceStats> {
        self.stats_of("")
    }

    fn stats_of(&self, device: &str) -> Vec<DeviceStats> {
        let request = GetCardStatsRequest { device_id: device.to_owned() };
        let stats = self.runtime.block_on(CardClient::new(self.channel.clone()).get_stats(request));
        stats.expect("card statistics").into_inner().devices
    }

    /// What a network device's network did not take from it.
    pub fn drops(&self, device: &str) -> NetDrops {
        self.stats(device).drops.expect("a network device")
    }

    /// Requests a device has taken, over all queues; `None`: the card does not serve it now.
    pub fn try_requests(&self, device: &str) -> Option<u64> {
        let request = GetCardStatsRequest { device_id: device.to_owned() };
        let stats = self.runtime.block_on(CardClient::new(self.channel.clone()).get_stats(request)).ok()?;
        let device = stats.into_inner().devices.pop()?;
        Some(device.queues.iter().map(|q| q.requests).sum())
    }

    /// Requests a device has taken, over all queues.
    pub fn requests(&self, device: &str) -> u64 {
        self.queue_stats(device).iter().map(|q| q.requests).sum()
    }
}

/// The MAC address that [`Card::nic`] gives.
pub fn mac(n: u8) -> [u8; 6] {
    [0x02, 0, 0, 0, 0x0b, n]
}

/// A network device's MAC address, in text.
///
/// # Panics
/// It is no network device.
pub fn mac_of(device: &Device) -> String {
    let spec = device.spec.as_ref().and_then(|s| s.kind.as_ref());
    let Some(device_spec::Kind::Net(spec)) = spec else { panic!("no network device") };
    let mac: Vec<_> = spec.mac.iter().map(|b| format!("{b:02x}")).collect();
    mac.join(":")
}
