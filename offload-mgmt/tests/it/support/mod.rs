//! What the integration tests share: fake cards and hypervisors that fail on demand, and a controller in this process.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use offload_mgmt::controller::{Api, CardConfig, Config, Controller, Deadlines};
use offload_mgmt::runner::Runner;
use proto::error::{Error, ErrorReason};
use proto::v1::controller_client::ControllerClient;
use proto::v1::{
    BootSource, CreateNetworkRequest, CreateVmRequest, DiskSpec, Event, GetVmRequest, ListVmsRequest,
    NetworkSpec, NicSpec, Vm, VmSpec, VmState, WatchEventsRequest,
};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

pub(crate) mod card;
pub(crate) mod hypervisor;

use card::FakeCard;
use hypervisor::FakeRunner;

/// Long enough for anything that will happen at all.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) type Client = ControllerClient<Channel>;

/// A controller with a storage card, a network card and hypervisors, all fake but the controller.
pub(crate) struct Setup {
    pub dir: TempDir,
    pub blk: FakeCard,
    pub net: FakeCard,
    pub runner: Arc<FakeRunner>,
    pub deadlines: Deadlines,
    running: Option<Running>,
}

/// The controller has a runtime of its own, so that it can end as a process does: with everything in it.
struct Running {
    runtime: Runtime,
    stop: oneshot::Sender<()>,
    done: JoinHandle<()>,
}

impl Drop for Setup {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.runtime.shutdown_background();
        }
    }
}

impl Setup {
    /// Everything runs, and there is a network "default".
    pub(crate) async fn new() -> (Self, Client) {
        let dir = tempfile::tempdir().expect("directory");
        std::fs::write(dir.path().join("kernel"), b"\x7fELF and the rest of it").expect("kernel");
        let blk = FakeCard::start("offload-blk", &dir.path().join("blk"));
        let net = FakeCard::start("offload-net", &dir.path().join("net"));
        let runner = Arc::new(FakeRunner::new(&dir.path().join("vms")));
        let deadlines = Deadlines {
            card: Duration::from_secs(1),
            hypervisor: Duration::from_secs(1),
            start: Duration::from_secs(1),
            configure: Duration::from_secs(1),
            shutdown: Duration::from_millis(500),
            exit: Duration::from_millis(500),
        };
        let mut setup = Self { dir, blk, net, runner, deadlines, running: None };
        let mut client = setup.start().await;
        let spec = NetworkSpec { id: "default".into(), ..NetworkSpec::default() };
        let request = CreateNetworkRequest { spec: Some(spec), ..CreateNetworkRequest::default() };
        client.create_network(request).await.expect("network");
        (setup, client)
    }

    pub(crate) fn api_socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    pub(crate) fn kernel(&self) -> String {
        text(&self.dir.path().join("kernel"))
    }

    /// A VM with two disks and a NIC.
    pub(crate) fn spec(&self, name: &str) -> VmSpec {
        let disk = |n: u32| DiskSpec { path: format!("/images/{name}-{n}"), ..DiskSpec::default() };
        VmSpec {
            name: name.into(),
            memory_bytes: 64 << 20,
            boot: Some(BootSource { kernel_path: self.kernel(), ..BootSource::default() }),
            disks: vec![disk(0), disk(1)],
            nics: vec![NicSpec { network: "default".into(), ..NicSpec::default() }],
            ..VmSpec::default()
        }
    }

    pub(crate) fn request(&self, name: &str) -> CreateVmRequest {
        CreateVmRequest { spec: Some(self.spec(name)), ..CreateVmRequest::default() }
    }

    /// Starts the controller, or another one after [`Setup::stop`].
    pub(crate) async fn start(&mut self) -> Client {
        let config = Config {
            state_dir: self.dir.path().join("state"),
            cards: vec![
                CardConfig { name: "blk".into(), socket: self.blk.socket() },
                CardConfig { name: "net".into(), socket: self.net.socket() },
            ],
            runner: Arc::clone(&self.runner) as Arc<dyn Runner>,
            deadlines: self.deadlines,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("runtime");
        let socket = self.api_socket();
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, is_ready) = oneshot::channel();
        let done = runtime.spawn(async move {
            let controller = Controller::start(config).await.expect("controller");
            let api = Api::bind(&socket).expect("API socket");
            let _ = ready.send(());
            let stopped = async {
                let _ = stopped.await;
            };
            api.serve(controller, stopped).await.expect("serve");
        });
        self.running = Some(Running { runtime, stop, done });
        is_ready.await.expect("the controller to be ready");
        client(&self.api_socket()).await
    }

    /// Has the controller end as SIGTERM would.
    pub(crate) async fn stop(&mut self) {
        if let Some(Running { runtime, stop, done }) = self.running.take() {
            let _ = stop.send(());
            tokio::time::timeout(SOON, done).await.expect("ends in time").expect("no panic");
            end(runtime).await;
        }
    }

    /// Has the controller end wherever it is.
    pub(crate) async fn crash(&mut self) {
        if let Some(Running { runtime, stop, .. }) = self.running.take() {
            // Kept until then: dropping it would be a request to stop.
            end(runtime).await;
            drop(stop);
        }
    }

    /// Nothing of any VM is left, on the cards, among the processes, in the API.
    pub(crate) async fn assert_nothing_left(&self, client: &mut Client) {
        let vms = client.list_vms(ListVmsRequest {}).await.expect("list").into_inner().vms;
        assert_eq!(vms, [], "VMs");
        assert_eq!(self.blk.devices(), Vec::<String>::new(), "disks");
        assert_eq!(self.net.devices(), Vec::<String>::new(), "NICs");
        assert_eq!(self.runner.processes(), Vec::<String>::new(), "processes");
        let left: Vec<_> = std::fs::read_dir(self.dir.path().join("vms")).expect("directory").collect();
        assert!(left.is_empty(), "directories: {left:?}");
    }
}

async fn end(runtime: Runtime) {
    let ended = tokio::task::spawn_blocking(|| runtime.shutdown_timeout(SOON)).await;
    ended.expect("no panic");
}

pub(crate) fn text(path: &Path) -> String {
    path.to_str().expect("path").to_owned()
}

pub(crate) async fn client(socket: &Path) -> Client {
    let socket = socket.to_owned();
    let connect = move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    };
    let channel =
        Endpoint::from_static("http://api").connect_with_connector(tower::service_fn(connect)).await;
    ControllerClient::new(channel.expect("connect"))
}

pub(crate) async fn show(client: &mut Client, vm: &str) -> Vm {
    client.get_vm(GetVmRequest { vm: vm.into() }).await.expect("get").into_inner()
}

/// Waits for a state; the last one seen is in the failure.
pub(crate) async fn wait_for(client: &mut Client, vm: &str, state: VmState) -> Vm {
    let deadline = Instant::now() + SOON;
    loop {
        let vm = show(client, vm).await;
        if vm.state() == state {
            return vm;
        }
        assert!(Instant::now() < deadline, "is {:?} ({}), not {state:?}", vm.state(), vm.detail);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until `condition` holds.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "timed out waiting: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) async fn watch(client: &mut Client, vm: &str) -> Streaming<Event> {
    client.watch_events(WatchEventsRequest { vm: vm.into() }).await.expect("watch").into_inner()
}

/// The next event, as a word or two.
pub(crate) async fn next_event(events: &mut Streaming<Event>) -> String {
    let event =
        tokio::time::timeout(SOON, events.message()).await.expect("an event in time").expect("stream");
    event.map_or_else(|| "end".into(), |e| describe(&e))
}

pub(crate) fn describe(event: &Event) -> String {
    use proto::v1::event::Event as E;
    match event.event.as_ref().expect("something happened") {
        E::State(state) => {
            VmState::try_from(*state).expect("state").as_str_name().trim_start_matches("VM_STATE_").into()
        }
        E::Link(link) => format!("link {} {:?}", link.slot_id, link.state()),
        E::Ended(ended) => format!("ended {:?}", ended.reason()),
        E::Reset(reset) => format!("reset {:?}", reset.reason()),
        E::Created(_) => "created".into(),
        E::Deleted(_) => "deleted".into(),
        E::ConfigChangedSlot(slot) => format!("config {slot}"),
        E::Missed(n) => format!("missed {n}"),
    }
}

/// The reason of an error, which must have a remedy too.
pub(crate) fn reason<T: std::fmt::Debug>(result: Result<T, Status>) -> ErrorReason {
    error(result).reason()
}

/// An error, which must say what to do.
pub(crate) fn error<T: std::fmt::Debug>(result: Result<T, Status>) -> Error {
    let e = Error::from(result.expect_err("must fail"));
    assert!(e.fact("remedy").is_some_and(|r| !r.is_empty()), "no remedy: {e}");
    e
}
