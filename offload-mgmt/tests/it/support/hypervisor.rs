//! Hypervisors that run no guest but behave as they are told, as tasks of this process, and the runner that starts them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use offload_mgmt::runner::{Exit, Liveness, Runner};
use proto::error::{Error, ErrorReason};
use proto::v1::hypervisor_event::Event as E;
use proto::v1::hypervisor_server::{Hypervisor, HypervisorServer};
use proto::v1::{
    BootRequest, BootResponse, ConfigureRequest, ConfigureResponse, ConsoleInput, ConsoleOutput, EndReason,
    EventsRequest, GetInfoRequest, GetStatsRequest, HypervisorConfig, HypervisorEvent, HypervisorInfo,
    HypervisorState, HypervisorStats, LinkState, PauseRequest, PauseResponse, ResetReason, ResetRequest,
    ResetResponse, ResumeRequest, ResumeResponse, ShutdownMode, ShutdownRequest, ShutdownResponse, SlotInfo,
    VmEnded, VmReset,
};
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream, UnixListenerStream};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};

/// What a hypervisor does other than what it should.
#[derive(Debug, Clone, Default)]
pub(crate) struct Behaviour {
    /// Does not start, with this as its last words.
    pub exits_at_once: Option<String>,
    /// Starts and never listens.
    pub never_listens: bool,
    pub refuse_configure: bool,
    pub refuse_boot: bool,
    /// Dies in the middle of Configure.
    pub dies_in_configure: bool,
    pub configure_takes: Duration,
    /// The guest does nothing when its power button is pressed.
    pub ignores_button: bool,
    /// Answers no call.
    pub hangs: bool,
    /// Does not end when told to end at once.
    pub ignores_shutdown: bool,
    /// Its process cannot be ended at all, as one that waits in the kernel.
    pub unkillable: bool,
}

/// One fake hypervisor process.
#[derive(Clone)]
pub(crate) struct Process {
    behaviour: Arc<Mutex<Behaviour>>,
    state: Arc<Mutex<State>>,
    ended: watch::Sender<Option<Exit>>,
}

#[derive(Default)]
struct State {
    config: Option<HypervisorConfig>,
    state: HypervisorState,
    resets: u64,
    sequence: u64,
    typed: Vec<u8>,
    watchers: Vec<mpsc::UnboundedSender<Result<HypervisorEvent, Status>>>,
}

impl Process {
    pub(crate) fn new(behaviour: Behaviour) -> Self {
        let state = State { state: HypervisorState::Unconfigured, ..State::default() };
        Self {
            behaviour: Arc::new(Mutex::new(behaviour)),
            state: Arc::new(Mutex::new(state)),
            ended: watch::Sender::new(None),
        }
    }

    pub(crate) fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.behaviour.lock().expect("behaviour"));
    }

    fn behaviour(&self) -> Behaviour {
        self.behaviour.lock().expect("behaviour").clone()
    }

    pub(crate) fn config(&self) -> HypervisorConfig {
        self.state.lock().expect("state").config.clone().expect("configured")
    }

    /// What came in on the console.
    pub(crate) fn typed(&self) -> Vec<u8> {
        self.state.lock().expect("state").typed.clone()
    }

    pub(crate) fn emit(&self, event: E) {
        let mut state = self.state.lock().expect("state");
        if let E::State(s) = &event {
            state.state = HypervisorState::try_from(*s).expect("state");
        }
        state.sequence += 1;
        let event =
            HypervisorEvent { sequence: state.sequence, event: Some(event), ..HypervisorEvent::default() };
        state.watchers.retain(|w| w.send(Ok(event.clone())).is_ok());
    }

    fn set(&self, state: HypervisorState) {
        self.emit(E::State(state.into()));
    }

    /// The VM ends and says so; the process exits.
    pub(crate) fn end(&self, reason: EndReason, detail: &str) {
        self.set(HypervisorState::Ended);
        self.emit(E::Ended(VmEnded { reason: reason.into(), detail: detail.into() }));
        self.exit(Exit { clean: true, how: "exited with status 0".into(), last_words: String::new() });
    }

    /// The process is gone without a word.
    pub(crate) fn die(&self) {
        let how = "was ended by signal 11".into();
        self.exit(Exit { clean: false, how, last_words: "something terrible".into() });
    }

    fn exit(&self, exit: Exit) {
        self.state.lock().expect("state").watchers.clear();
        self.ended.send_if_modified(|e| {
            e.is_none() && {
                *e = Some(exit);
                true
            }
        });
    }

    pub(crate) async fn serve(&self, socket: &Path) {
        let listener = UnixListener::bind(socket).expect("listen");
        let mut ended = self.ended.subscribe();
        let gone = async move {
            let _ = ended.wait_for(Option::is_some).await;
        };
        Server::builder()
            .add_service(HypervisorServer::new(self.clone()))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), gone)
            .await
            .expect("serve");
        let _ = std::fs::remove_file(socket);
    }

    async fn hang(&self) {
        if self.behaviour().hangs {
            std::future::pending::<()>().await;
        }
    }
}

async fn over(ended: &mut watch::Receiver<Option<Exit>>) {
    let _ = ended.wait_for(Option::is_some).await;
}

fn refused(call: &str) -> Status {
    Error::new(Code::InvalidArgument, ErrorReason::KernelInvalid, format!("{call} was refused"))
        .remedy("ask the test")
        .into()
}

#[tonic::async_trait]
impl Hypervisor for Process {
    async fn configure(
        &self,
        request: Request<ConfigureRequest>,
    ) -> Result<Response<ConfigureResponse>, Status> {
        self.hang().await;
        let behaviour = self.behaviour();
        if behaviour.refuse_configure {
            return Err(refused("Configure"));
        }
        if behaviour.dies_in_configure {
            self.die();
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(behaviour.configure_takes).await;
        self.state.lock().expect("state").config = request.into_inner().config;
        self.set(HypervisorState::Configured);
        let info = HypervisorInfo { pid: 4711, ..HypervisorInfo::default() };
        Ok(Response::new(ConfigureResponse { info: Some(info) }))
    }

    async fn boot(&self, _: Request<BootRequest>) -> Result<Response<BootResponse>, Status> {
        if self.behaviour().refuse_boot {
            return Err(refused("Boot"));
        }
        self.set(HypervisorState::Running);
        Ok(Response::new(BootResponse {}))
    }

    async fn pause(&self, _: Request<PauseRequest>) -> Result<Response<PauseResponse>, Status> {
        self.set(HypervisorState::Paused);
        Ok(Response::new(PauseResponse {}))
    }

    async fn resume(&self, _: Request<ResumeRequest>) -> Result<Response<ResumeResponse>, Status> {
        self.set(HypervisorState::Running);
        Ok(Response::new(ResumeResponse {}))
    }

    async fn shutdown(
        &self,
        request: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        self.hang().await;
        let (this, behaviour) = (self.clone(), self.behaviour());
        match request.into_inner().mode() {
            ShutdownMode::PowerButton if !behaviour.ignores_button => {
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    this.end(EndReason::GuestPowerOff, "");
                });
            }
            ShutdownMode::Immediate if !behaviour.ignores_shutdown => this.end(EndReason::Shutdown, ""),
            _ => {}
        }
        Ok(Response::new(ShutdownResponse {}))
    }

    async fn reset(&self, _: Request<ResetRequest>) -> Result<Response<ResetResponse>, Status> {
        self.hang().await;
        self.state.lock().expect("state").resets += 1;
        self.emit(E::Reset(VmReset { reason: ResetReason::Requested.into() }));
        Ok(Response::new(ResetResponse {}))
    }

    async fn get_info(&self, _: Request<GetInfoRequest>) -> Result<Response<HypervisorInfo>, Status> {
        self.hang().await;
        let state = self.state.lock().expect("state");
        let slots = state.config.iter().flat_map(|c| &c.slots).map(|s| SlotInfo {
            id: s.id.clone(),
            link: LinkState::Active.into(),
            ..SlotInfo::default()
        });
        Ok(Response::new(HypervisorInfo {
            vm_id: state.config.as_ref().map(|c| c.vm_id.clone()).unwrap_or_default(),
            state: state.state.into(),
            pid: 4711,
            resets: state.resets,
            slots: slots.collect(),
            ..HypervisorInfo::default()
        }))
    }

    async fn get_stats(&self, _: Request<GetStatsRequest>) -> Result<Response<HypervisorStats>, Status> {
        self.hang().await;
        Ok(Response::new(HypervisorStats { userspace_exits_total: 11, ..HypervisorStats::default() }))
    }

    type ConsoleStream = ReceiverStream<Result<ConsoleOutput, Status>>;

    /// Says "history", unless it is to be skipped, and then everything that is typed.
    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut input = request.into_inner();
        let (tx, rx) = mpsc::channel(16);
        let mut ended = self.ended.subscribe();
        let state = Arc::clone(&self.state);
        let say = |data: &[u8]| Ok(ConsoleOutput { data: data.to_vec(), dropped_bytes: 0 });
        tokio::spawn(async move {
            let mut first = true;
            let mut open = true;
            loop {
                tokio::select! {
                    message = input.message(), if open => {
                        let Ok(Some(message)) = message else { open = false; continue };
                        if std::mem::take(&mut first) && !message.skip_history {
                            let _ = tx.send(say(b"history\n")).await;
                        }
                        state.lock().expect("state").typed.extend(&message.data);
                        if !message.data.is_empty() {
                            let _ = tx.send(say(&message.data)).await;
                        }
                    }
                    () = over(&mut ended) => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    type EventsStream = UnboundedReceiverStream<Result<HypervisorEvent, Status>>;

    async fn events(&self, _: Request<EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        self.hang().await;
        let (tx, rx) = mpsc::unbounded_channel();
        let mut state = self.state.lock().expect("state");
        let event = Some(E::State(state.state.into()));
        let _ = tx.send(Ok(HypervisorEvent { event, ..HypervisorEvent::default() }));
        state.watchers.push(tx);
        Ok(Response::new(UnboundedReceiverStream::new(rx)))
    }
}

/// Runs [`Process`]es; outlives the controllers that use it, as processes do.
pub(crate) struct FakeRunner {
    dir: PathBuf,
    // Processes run on the test's runtime: the one that starts them is the controller's, which comes and goes.
    runtime: Handle,
    pub next: Mutex<Behaviour>,
    processes: Mutex<BTreeMap<String, Process>>,
}

impl FakeRunner {
    pub(crate) fn new(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).expect("directory");
        Self {
            dir: dir.to_owned(),
            runtime: Handle::current(),
            next: Mutex::default(),
            processes: Mutex::default(),
        }
    }

    /// How processes behave that are started from now on.
    pub(crate) fn behave(&self, behaviour: Behaviour) {
        *self.next.lock().expect("behaviour") = behaviour;
    }

    pub(crate) fn process(&self, vm: &str) -> Process {
        self.processes.lock().expect("processes").get(vm).cloned().expect("a process")
    }

    /// VMs whose processes run.
    pub(crate) fn processes(&self) -> Vec<String> {
        let processes = self.processes.lock().expect("processes");
        processes.iter().filter(|(_, p)| p.ended.borrow().is_none()).map(|(id, _)| id.clone()).collect()
    }
}

#[tonic::async_trait]
impl Runner for FakeRunner {
    fn control_socket(&self, vm: &str) -> PathBuf {
        self.dir.join(vm).join("control.sock")
    }

    fn log_hint(&self, _: &str) -> String {
        "see the log".into()
    }

    async fn start(&self, vm: &str) -> Result<(), Error> {
        let behaviour = self.next.lock().expect("behaviour").clone();
        let process = Process::new(behaviour.clone());
        std::fs::create_dir_all(self.dir.join(vm)).expect("directory");
        let before = self.processes.lock().expect("processes").insert(vm.into(), process.clone());
        assert!(before.is_none_or(|p| p.ended.borrow().is_some()), "a second process for VM {vm}");
        if let Some(last_words) = behaviour.exits_at_once {
            process.exit(Exit { clean: false, how: "exited with status 1".into(), last_words });
        } else if !behaviour.never_listens {
            let socket = self.control_socket(vm);
            self.runtime.spawn(async move {
                // As a real one, it takes a moment.
                tokio::time::sleep(Duration::from_millis(5)).await;
                process.serve(&socket).await;
            });
        }
        Ok(())
    }

    async fn liveness(&self, vm: &str) -> Liveness {
        let process = self.processes.lock().expect("processes").get(vm).cloned();
        match process.map(|p| p.ended.borrow().clone()) {
            Some(None) => Liveness::Alive,
            Some(Some(exit)) => Liveness::Ended(exit),
            None => Liveness::Ended(Exit::default()),
        }
    }

    async fn stop(&self, vm: &str, grace: Duration) -> Result<(), Error> {
        let process = self.processes.lock().expect("processes").get(vm).cloned();
        if let Some(process) = process {
            let mut ended = process.ended.subscribe();
            if tokio::time::timeout(grace, ended.wait_for(Option::is_some)).await.is_err() {
                if process.behaviour().unkillable {
                    let e = Error::new(Code::Internal, ErrorReason::HypervisorUnreachable, "it does not end");
                    return Err(e.remedy("ask the test"));
                }
                process.exit(Exit { clean: false, how: "was killed".into(), last_words: String::new() });
            }
        }
        let _ = std::fs::remove_file(self.control_socket(vm));
        Ok(())
    }

    async fn clean(&self, vm: &str) {
        self.processes.lock().expect("processes").remove(vm);
        let _ = std::fs::remove_dir_all(self.dir.join(vm));
    }
}
