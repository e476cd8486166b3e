//! A hypervisor process under test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use proto::error::Error;
use proto::v1::hypervisor_client::HypervisorClient;
use proto::v1::hypervisor_event::Event;
use proto::v1::{
    BootRequest, BootSource, ConfigureRequest, ConsoleInput, ConsoleOutput, EventsRequest, HypervisorConfig,
    HypervisorEvent, HypervisorInfo, HypervisorState,
};
use tempfile::TempDir;
use tokio_stream::StreamExt;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// More than anything here takes, also on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard-hypervisor"));
    command.env_remove("NOTIFY_SOCKET").env_remove("LISTEN_FDS");
    command
}

/// A process, which is killed if a test forgets it.
pub(crate) struct Process(pub(crate) Child);

impl Process {
    pub(crate) fn pid(&self) -> libc::pid_t {
        libc::pid_t::try_from(self.0.id()).unwrap()
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: the process is our child and not waited for yet, so its id is its own.
        assert_eq!(unsafe { libc::kill(self.pid(), signal) }, 0);
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < SOON, "the hypervisor does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A hypervisor that waits for orders, and a client of it.
pub(crate) struct Vm {
    pub(crate) process: Process,
    pub(crate) client: HypervisorClient<Channel>,
    pub(crate) events: Streaming<HypervisorEvent>,
    directory: TempDir,
}

impl Vm {
    pub(crate) async fn spawn() -> Self {
        let directory = TempDir::new().unwrap();
        let socket = directory.path().join("control.sock");
        let child = binary().arg("--control").arg(&socket).stdin(Stdio::null()).spawn().unwrap();
        let process = Process(child);
        let mut client = connect(&socket).await;
        let events = client.events(EventsRequest {}).await.unwrap().into_inner();
        let mut vm = Self { process, client, events, directory };
        vm.expect_state(HypervisorState::Unconfigured).await;
        vm
    }

    /// With the guest configured and booted.
    pub(crate) async fn boot(kernel: &Path, vcpus: u32) -> Self {
        let mut vm = Self::spawn().await;
        vm.configure(config(kernel, vcpus)).await.unwrap();
        vm.expect_state(HypervisorState::Configured).await;
        vm.client.boot(BootRequest {}).await.unwrap();
        vm.expect_state(HypervisorState::Running).await;
        vm
    }

    pub(crate) fn control_socket(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    pub(crate) async fn configure(&mut self, config: HypervisorConfig) -> Result<HypervisorInfo, Error> {
        let response = self.client.configure(ConfigureRequest { config: Some(config) }).await?;
        Ok(response.into_inner().info.unwrap())
    }

    pub(crate) async fn next_event(&mut self) -> Option<Event> {
        let event = tokio::time::timeout(SOON, self.events.next()).await.expect("no event in time");
        event.map(|e| e.unwrap().event.unwrap())
    }

    pub(crate) async fn expect_state(&mut self, state: HypervisorState) {
        assert_eq!(self.next_event().await, Some(Event::State(state.into())));
    }

    /// The end of the VM, as an event and as an exit status.
    pub(crate) async fn end(mut self) -> (proto::v1::VmEnded, ExitStatus) {
        self.expect_state(HypervisorState::Ended).await;
        let Some(Event::Ended(ended)) = self.next_event().await else { panic!("the end is not told") };
        assert_eq!(self.next_event().await, None);
        let status = self.process.end();
        assert!(!self.control_socket().exists());
        (ended, status)
    }

    pub(crate) async fn console(&mut self) -> Console {
        let (input, messages) = tokio::sync::mpsc::channel(4);
        input.send(ConsoleInput::default()).await.unwrap();
        let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
        let output = self.client.console(messages).await.unwrap().into_inner();
        Console { input, output, seen: Vec::new() }
    }
}

/// A console subscriber.
pub(crate) struct Console {
    input: tokio::sync::mpsc::Sender<ConsoleInput>,
    output: Streaming<ConsoleOutput>,
    pub(crate) seen: Vec<u8>,
}

impl Console {
    pub(crate) async fn write(&self, data: &[u8]) {
        self.input.send(ConsoleInput { data: data.to_vec(), ..Default::default() }).await.unwrap();
    }

    /// Reads until `done` with all that was seen.
    pub(crate) async fn read_until(&mut self, done: impl Fn(&[u8]) -> bool) {
        let start = Instant::now();
        while !done(&self.seen) {
            assert!(start.elapsed() < SOON, "saw only {:?}", String::from_utf8_lossy(&self.seen));
            if let Ok(message) = tokio::time::timeout(Duration::from_millis(100), self.output.next()).await {
                self.seen.extend(message.expect("the console has ended").unwrap().data);
            }
        }
    }

    /// What comes until nothing comes for a while.
    pub(crate) async fn drain(&mut self) {
        while let Ok(Some(Ok(message))) =
            tokio::time::timeout(Duration::from_millis(200), self.output.next()).await
        {
            self.seen.extend(message.data);
        }
    }
}

pub(crate) fn config(kernel: &Path, vcpus: u32) -> HypervisorConfig {
    HypervisorConfig {
        vm_id: "test".into(),
        vcpus,
        memory_bytes: 32 << 20,
        boot: Some(BootSource { kernel_path: kernel.to_str().unwrap().into(), ..Default::default() }),
        slots: Vec::new(),
    }
}

pub(crate) async fn connect(socket: &Path) -> HypervisorClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
    let start = Instant::now();
    loop {
        match endpoint.connect().await {
            Ok(channel) => return HypervisorClient::new(channel),
            Err(e) => assert!(start.elapsed() < SOON, "{e:?}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
