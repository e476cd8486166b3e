//! A hypervisor process under test, driven as the controller drives it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use proto::v1::hypervisor_client::HypervisorClient;
use proto::v1::{
    BootRequest, BootSource, ConfigureRequest, ConsoleInput, Device, EventsRequest, GetInfoRequest,
    GetStatsRequest, HypervisorConfig, HypervisorEvent, HypervisorInfo, HypervisorStats, PauseRequest,
    ResetRequest, ResumeRequest, ShutdownMode, ShutdownRequest, SlotConfig, hypervisor_event::Event,
};
use tokio::runtime::Runtime;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use crate::card::channel;
use crate::guest::Reports;
use crate::process::Process;
use crate::{SOON, binary, wait_until};

/// What a VM under test is made of; the bench guest with 128 MiB and one vCPU unless changed.
pub fn config(id: &str, cmdline: &str, slots: Vec<SlotConfig>) -> HypervisorConfig {
    let kernel_path = binary("bench-guest").to_str().expect("path").to_owned();
    HypervisorConfig {
        vm_id: id.to_owned(),
        vcpus: 1,
        memory_bytes: 128 << 20,
        boot: Some(BootSource { kernel_path, cmdline: cmdline.to_owned(), ..Default::default() }),
        slots,
    }
}

/// The slot for a device, as the controller would configure it.
pub fn slot(id: &str, device: &Device) -> SlotConfig {
    SlotConfig {
        id: id.to_owned(),
        socket_path: device.socket_path.clone(),
        virtio_device_id: device.virtio_device_id,
        queues: device.queues,
        queue_size: device.queue_size,
        config_size: device.config_size,
        ..Default::default()
    }
}

/// A hypervisor process and its guest.
pub struct Vm {
    runtime: Runtime,
    client: HypervisorClient<Channel>,
    process: Process,
    /// What the guest said.
    pub reports: Reports,
    events: mpsc::Receiver<HypervisorEvent>,
    input: tokio::sync::mpsc::UnboundedSender<ConsoleInput>,
}

impl Vm {
    /// Starts a hypervisor process that waits for its configuration, and subscribes to its console and events.
    pub fn start(dir: &Path, name: &str) -> Self {
        let runtime = crate::runtime();
        let socket: PathBuf = dir.join(format!("{name}.sock"));
        let mut command = Command::new(binary("outboard-hypervisor"));
        command.arg("--control").arg(&socket);
        let process = Process::spawn(&mut command, &dir.join(format!("{name}.log")));
        let mut client = HypervisorClient::new(channel(&runtime, &socket));
        wait_until("the hypervisor to answer", SOON, || {
            runtime.block_on(client.get_info(GetInfoRequest {})).is_ok()
        });
        let reports = Reports::default();
        let (input, receiver) = tokio::sync::mpsc::unbounded_channel();
        let _ = input.send(ConsoleInput::default());
        let mut console = runtime
            .block_on(client.console(UnboundedReceiverStream::new(receiver)))
            .expect("subscribe to the console")
            .into_inner();
        let feed = reports.clone();
        runtime.spawn(async move {
            while let Some(Ok(output)) = console.next().await {
                assert_eq!(output.dropped_bytes, 0, "the console lost bytes");
                feed.feed(&output.data);
            }
            feed.close();
        });
        let (sender, events) = mpsc::channel();
        let mut stream =
            runtime.block_on(client.events(EventsRequest {})).expect("subscribe to events").into_inner();
        runtime.spawn(async move {
            while let Some(Ok(event)) = stream.next().await {
                let _ = sender.send(event);
            }
        });
        Self { runtime, client, process, reports, events, input }
    }

    /// Starts a hypervisor, configures it and boots.
    pub fn boot(dir: &Path, config: HypervisorConfig) -> Self {
        let mut vm = Self::start(dir, &config.vm_id.clone());
        vm.configure(config).expect("configure");
        vm.run();
        vm
    }

    /// Configures it.
    pub fn configure(&mut self, config: HypervisorConfig) -> Result<HypervisorInfo, Status> {
        let request = ConfigureRequest { config: Some(config) };
        let answer = self.runtime.block_on(self.client.configure(request))?;
        Ok(answer.into_inner().info.expect("info"))
    }

    /// Lets the guest run.
    pub fn run(&mut self) {
        self.runtime.block_on(self.client.boot(BootRequest {})).expect("boot");
    }

    /// Types into the guest's serial port.
    pub fn type_in(&self, data: &[u8]) {
        self.input.send(ConsoleInput { data: data.to_vec(), ..Default::default() }).expect("console is open");
    }

    /// Its state.
    pub fn info(&mut self) -> HypervisorInfo {
        self.runtime.block_on(self.client.get_info(GetInfoRequest {})).expect("info").into_inner()
    }

    /// Its counters.
    pub fn stats(&mut self) -> HypervisorStats {
        self.runtime.block_on(self.client.get_stats(GetStatsRequest {})).expect("statistics").into_inner()
    }

    /// Asks for its end.
    pub fn shutdown(&mut self, mode: ShutdownMode) -> Result<(), Status> {
        self.runtime.block_on(self.client.shutdown(ShutdownRequest { mode: mode.into() })).map(drop)
    }

    /// Resets the guest.
    pub fn reset(&mut self) -> Result<(), Status> {
        self.runtime.block_on(self.client.reset(ResetRequest {})).map(drop)
    }

    /// Pauses the guest.
    pub fn pause(&mut self) -> Result<(), Status> {
        self.runtime.block_on(self.client.pause(PauseRequest {})).map(drop)
    }

    /// Lets a paused guest go on.
    pub fn resume(&mut self) -> Result<(), Status> {
        self.runtime.block_on(self.client.resume(ResumeRequest {})).map(drop)
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits for an event that `wanted` accepts.
    ///
    /// # Panics
    /// After `limit`, with what came instead.
    pub fn wait_event<T>(
        &self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&Event) -> Option<T>,
    ) -> T {
        let end = std::time::Instant::now() + limit;
        let mut seen = Vec::new();
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            let Ok(event) = self.events.recv_timeout(left) else {
                panic!("no event {what} within {limit:?}; came: {seen:#?}");
            };
            if let Some(found) = event.event.as_ref().and_then(&mut wanted) {
                return found;
            }
            seen.push(event);
        }
    }

    /// What the process has open, as `/proc/PID/fd` tells it.
    pub fn open_files(&self) -> Vec<String> {
        let dir = format!("/proc/{}/fd", self.process.pid());
        let entries = std::fs::read_dir(dir).expect("/proc/PID/fd");
        let links = entries.filter_map(|e| std::fs::read_link(e.ok()?.path()).ok());
        links.map(|l| l.to_string_lossy().into_owned()).collect()
    }
}
