//! The task that owns a VM: takes commands one by one, follows the hypervisor's events, keeps the record.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use proto::error::Error;
use proto::v1::hypervisor_client::HypervisorClient;
use proto::v1::{
    HypervisorEvent, HypervisorState, LinkState, ResetRequest, ResumeRequest, ShutdownMode, ShutdownRequest,
    VmState, event, hypervisor_event,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::super::clock::now_us;
use super::super::store::{Phase, VmRecord};
use super::super::{Context, rpc};
use super::ending::End;
use super::start::{Up, bring_up, check, take_down};
use super::{Command, Creation, Reply, View, Vm, unreachable_hypervisor};

/// How an actor begins.
#[derive(Debug)]
pub(crate) enum Begin {
    /// The VM is to be made, and started.
    Create {
        /// Start it too.
        start: bool,
    },
    /// The VM was there before this controller; the sender is dropped when it is known what is true of it.
    Recover(oneshot::Sender<()>),
}

/// Makes a VM's handle from its record, and starts its actor. The caller takes the handle into the registry; it holds
/// the registry's lock meanwhile, or nothing else runs yet.
pub(crate) fn spawn(ctx: &Arc<Context>, record: VmRecord, begin: Begin) -> Arc<Vm> {
    let state = match (&begin, record.phase()) {
        (Begin::Create { start: false }, _) | (_, Phase::Stopped | Phase::Unspecified) => VmState::Stopped,
        (Begin::Create { start: true }, _) | (_, Phase::Creating | Phase::Starting) => VmState::Starting,
        (_, Phase::Running) => VmState::Running,
        (_, Phase::Failed) => VmState::Failed,
    };
    let view = View {
        state,
        detail: record.detail.clone(),
        started_us: record.started_us,
        pid: 0,
        resets: 0,
        remains: false,
        creation: if matches!(begin, Begin::Create { .. }) { Creation::Pending } else { Creation::Done },
        hypervisor: None,
        limits: record.spec.iter().flat_map(|s| &s.disks).map(|d| d.limits).collect(),
        nic_limits: record.spec.iter().flat_map(|s| &s.nics).map(|n| n.limits).collect(),
    };
    let (vm, view, commands) = Vm::new(&record, view);
    let actor = Actor {
        ctx: Arc::clone(ctx),
        vm: Arc::clone(&vm),
        record,
        view,
        commands,
        queue: VecDeque::new(),
        live: None,
    };
    tokio::spawn(actor.run(begin));
    vm
}

pub(super) struct Actor {
    pub(super) ctx: Arc<Context>,
    pub(super) vm: Arc<Vm>,
    pub(super) record: VmRecord,
    pub(super) view: watch::Sender<View>,
    commands: mpsc::Receiver<Command>,
    // Commands that came while something was being done.
    queue: VecDeque<Command>,
    pub(super) live: Option<Live>,
}

/// A VM that has a process.
#[derive(Default)]
pub(super) struct Live {
    /// None while contact is lost.
    pub(super) link: Option<Link>,
    /// When to try for contact again.
    pub(super) retry: Option<(Instant, Duration)>,
    pub(super) stopping: Option<Stopping>,
}

pub(super) struct Link {
    pub(super) channel: Channel,
    pub(super) events: Streaming<HypervisorEvent>,
}

/// A VM that is being stopped.
pub(super) struct Stopping {
    pub(super) stage: Stage,
    pub(super) until: Instant,
    /// The guest was asked first.
    pub(super) asked: bool,
    pub(super) waiters: Vec<Reply>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The power button was pressed; the guest has until then.
    PowerButton,
    /// The hypervisor was told to end at once; it has until then.
    AtOnce,
}

/// Whether the actor goes on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Flow {
    On,
    /// The VM does not exist any more.
    Gone,
}

enum Wake {
    Command(Option<Command>),
    Event(Result<Option<HypervisorEvent>, Status>),
    Deadline,
}

impl Live {
    fn deadline(&self) -> Option<Instant> {
        let stop = self.stopping.as_ref().map(|s| s.until);
        stop.into_iter().chain(self.retry.map(|(at, _)| at)).min()
    }
}

impl Actor {
    async fn run(mut self, begin: Begin) {
        let first = match begin {
            Begin::Create { start } => self.create(start).await,
            Begin::Recover(ready) => {
                let flow = self.recover().await;
                drop(ready);
                flow
            }
        };
        let mut flow = first;
        while flow == Flow::On {
            flow = match self.next().await {
                Wake::Command(Some(command)) => self.command(command).await,
                Wake::Command(None) => Flow::Gone,
                Wake::Event(Ok(Some(event))) => self.hypervisor_event(event).await,
                Wake::Event(Ok(None)) => self.lost_contact("it closed the connection").await,
                Wake::Event(Err(status)) => self.lost_contact(status.message()).await,
                Wake::Deadline => self.deadline().await,
            };
        }
        // Dropped replies answer that the VM is not there; for who wanted it gone, that is success.
        self.commands.close();
        while let Some(command) = self.queue.pop_front().or_else(|| self.commands.try_recv().ok()) {
            if let Command::Delete { reply, .. } = command {
                answer(reply, Ok(()));
            }
        }
    }

    async fn next(&mut self) -> Wake {
        if let Some(command) = self.queue.pop_front() {
            return Wake::Command(Some(command));
        }
        let Some(live) = &mut self.live else { return Wake::Command(self.commands.recv().await) };
        let deadline = live.deadline();
        tokio::select! {
            command = self.commands.recv() => Wake::Command(command),
            event = async {
                match &mut live.link {
                    Some(link) => link.events.message().await,
                    None => std::future::pending().await,
                }
            } => Wake::Event(event),
            () = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            } => Wake::Deadline,
        }
    }

    async fn command(&mut self, command: Command) -> Flow {
        match command {
            Command::Start(reply) => {
                let result = self.start().await;
                answer(reply, result);
            }
            Command::Stop { graceful: true, timeout, reply } => self.stop_gracefully(timeout, reply).await,
            Command::Stop { graceful: false, reply, .. } => self.stop_at_once(Some(reply)).await,
            Command::Reboot(reply) => {
                let result = self.reboot().await;
                answer(reply, result);
            }
            Command::SetLimits { device, limits, reply } => {
                let result = self.set_limits(&device, limits).await;
                answer(reply, result);
            }
            Command::Delete { force, reply } => {
                if self.live.is_some() && !force {
                    let remedy = format!("stop it first, or: outboard vm rm --force {}", self.vm.spec.name);
                    answer(reply, Err(self.vm.wrong_state("runs", remedy)));
                } else {
                    let result = self.delete().await;
                    let gone = result.is_ok();
                    answer(reply, result);
                    if gone {
                        return Flow::Gone;
                    }
                }
            }
        }
        Flow::On
    }

    async fn create(&mut self, start: bool) -> Flow {
        let result = self.try_create(start).await;
        let (creation, flow) = match result {
            Ok(()) => (Creation::Done, Flow::On),
            // What is left of it can be removed like any VM.
            Err(e) if self.vm.view().remains => (Creation::Failed(e), Flow::On),
            Err(e) => {
                self.ctx.registry.remove(&self.vm.id);
                (Creation::Failed(e), Flow::Gone)
            }
        };
        self.view.send_modify(|v| v.creation = creation);
        flow
    }

    async fn try_create(&mut self, start: bool) -> Result<(), Error> {
        check(&self.ctx, &self.vm.id, &self.vm.current_spec()).await?;
        if start {
            self.ctx.registry.check_images(&self.vm)?;
        }
        self.note(if start { Phase::Creating } else { Phase::Stopped }, "it has not been started yet")
            .await?;
        self.publish(event::Event::Created(true));
        if !start {
            self.set_state(VmState::Stopped, "it has not been started yet");
            return Ok(());
        }
        self.publish(event::Event::State(VmState::Starting.into()));
        let result = match self.bring_up().await {
            Ok(up) => self.up(up).await,
            Err(e) => Err(e),
        };
        if result.is_err() {
            self.undo_creation().await;
        }
        result
    }

    /// Leaves nothing of a VM whose creation failed, or a failed VM if its process does not end.
    pub(super) async fn undo_creation(&mut self) {
        self.live = None;
        if let Err(e) = take_down(&self.ctx, &self.vm.id, &self.vm.spec, Duration::ZERO).await {
            return self.remains(&format!("it could not be created, and {}", e.message())).await;
        }
        self.ctx.runner.clean(&self.vm.id).await;
        if let Err(e) = self.ctx.store.delete_vm(&self.vm.id).await {
            tracing::error!(vm = self.vm.id, "{e}; its record is removed at the next start");
        }
        self.view.send_modify(|v| (v.state, v.hypervisor) = (VmState::Stopped, None));
        self.publish(event::Event::Deleted(true));
    }

    /// Its process could not be ended: that is tried again before the VM is started or removed.
    async fn remains(&mut self, detail: &str) {
        if let Err(e) = self.note(Phase::Failed, detail).await {
            tracing::error!(vm = self.vm.id, "{e}");
        }
        self.view.send_modify(|v| (v.remains, v.hypervisor) = (true, None));
        self.set_state(VmState::Failed, detail);
    }

    /// Makes sure that nothing is left of a VM that failed, of which it is not known that its process has ended: it may have
    /// failed because that could not be done, or under an earlier controller.
    ///
    /// # Errors
    /// The process does not end.
    async fn clear_away(&mut self) -> Result<(), Error> {
        if self.vm.view().state == VmState::Failed {
            take_down(&self.ctx, &self.vm.id, &self.vm.spec, Duration::ZERO).await?;
            self.ctx.runner.clean(&self.vm.id).await;
            self.view.send_modify(|v| v.remains = false);
        }
        Ok(())
    }

    async fn start(&mut self) -> Result<(), Error> {
        if self.live.is_some() {
            let remedy = format!("see: outboard vm show {}", self.vm.spec.name);
            return Err(self.vm.wrong_state("runs already", remedy));
        }
        check(&self.ctx, &self.vm.id, &self.vm.current_spec()).await?;
        self.clear_away().await?;
        let before = self.vm.view();
        // Seen by others from here on, so that of two VMs with one image at most one is started.
        self.set_state(VmState::Starting, "");
        if let Err(e) = self.ctx.registry.check_images(&self.vm) {
            self.set_state(before.state, &before.detail);
            return Err(e);
        }
        let result = match self.note(Phase::Starting, "").await {
            Ok(()) => match self.bring_up().await {
                Ok(up) => self.up(up).await,
                Err(e) => Err(e),
            },
            Err(e) => Err(e),
        };
        if let Err(e) = &result {
            self.live = None;
            let detail = format!("the last start failed: {}", e.message());
            if let Err(e) = take_down(&self.ctx, &self.vm.id, &self.vm.spec, Duration::ZERO).await {
                self.remains(&format!("{detail}; and {}", e.message())).await;
                return result;
            }
            self.ctx.runner.clean(&self.vm.id).await;
            if let Err(e) = self.note(Phase::Stopped, &detail).await {
                tracing::error!(vm = self.vm.id, "{e}");
            }
            self.set_state(VmState::Stopped, &detail);
        }
        result
    }

    /// Brings the VM up, while commands that end it at once interrupt that and all others wait.
    async fn bring_up(&mut self) -> Result<Up, Error> {
        let (cancel, cancelled) = watch::channel(false);
        let up = bring_up(Arc::clone(&self.ctx), self.vm.id.clone(), self.vm.current_spec(), cancelled);
        tokio::pin!(up);
        loop {
            tokio::select! {
                result = &mut up => return result,
                Some(command) = self.commands.recv() => {
                    if command.jumps_the_queue() {
                        cancel.send_replace(true);
                    }
                    self.queue.push_back(command);
                }
            }
        }
    }

    /// The guest runs.
    async fn up(&mut self, up: Up) -> Result<(), Error> {
        self.record.started_us = now_us();
        self.note(Phase::Running, "").await?;
        let started_us = self.record.started_us;
        self.view.send_modify(|v| {
            v.started_us = started_us;
            v.pid = up.pid;
            v.resets = 0;
            v.hypervisor = Some(up.channel.clone());
        });
        self.live =
            Some(Live { link: Some(Link { channel: up.channel, events: up.events }), ..Live::default() });
        self.set_state(VmState::Running, "");
        Ok(())
    }

    async fn reboot(&mut self) -> Result<(), Error> {
        let deadline = self.ctx.deadlines.hypervisor;
        let mut client = self.client("be rebooted")?;
        let answer = rpc::call(deadline, client.reset(ResetRequest {})).await;
        answer.map(|_| ()).map_err(|f| f.or_else(|why| unreachable_hypervisor(&self.vm.spec.name, why)))
    }

    async fn stop_gracefully(&mut self, timeout: Duration, reply: Reply) {
        let until = Instant::now() + timeout;
        match &mut self.live {
            None => return answer(reply, Ok(())),
            Some(Live { stopping: Some(stopping), .. }) => {
                if stopping.stage == Stage::PowerButton {
                    stopping.until = stopping.until.min(until);
                }
                stopping.waiters.push(reply);
                return;
            }
            Some(_) => {}
        }
        if let Err(e) = self.press_power_button().await {
            return answer(reply, Err(e));
        }
        if let Some(live) = &mut self.live {
            let waiters = vec![reply];
            live.stopping = Some(Stopping { stage: Stage::PowerButton, until, asked: true, waiters });
        }
        self.set_state(VmState::Stopping, "its power button was pressed");
    }

    async fn press_power_button(&self) -> Result<(), Error> {
        let deadline = self.ctx.deadlines.hypervisor;
        let mut client = self.client("be stopped gracefully")?;
        let unreachable = |f: rpc::Failure| f.or_else(|why| unreachable_hypervisor(&self.vm.spec.name, why));
        if self.vm.view().state == VmState::Paused {
            // A guest that does not run cannot see its button.
            rpc::call(deadline, client.resume(ResumeRequest {})).await.map_err(unreachable)?;
        }
        let request = ShutdownRequest { mode: ShutdownMode::PowerButton.into() };
        rpc::call(deadline, client.shutdown(request)).await.map(|_| ()).map_err(unreachable)
    }

    /// Has the hypervisor end the VM now; `deadline` comes back for it if it does not.
    pub(super) async fn stop_at_once(&mut self, reply: Option<Reply>) {
        let deadlines = &self.ctx.deadlines;
        let Some(live) = &mut self.live else {
            if let Some(reply) = reply {
                answer(reply, Ok(()));
            }
            return;
        };
        let mut grace = Duration::ZERO;
        if let Some(link) = &live.link {
            let mut client = HypervisorClient::new(link.channel.clone());
            let request = ShutdownRequest { mode: ShutdownMode::Immediate.into() };
            if rpc::call(deadlines.shutdown, client.shutdown(request)).await.is_ok() {
                grace = deadlines.shutdown;
            }
        }
        let until = Instant::now() + grace;
        let stopping = live.stopping.get_or_insert_with(|| Stopping {
            stage: Stage::AtOnce,
            until,
            asked: false,
            waiters: Vec::new(),
        });
        stopping.stage = Stage::AtOnce;
        stopping.until = until;
        stopping.waiters.extend(reply);
        self.set_state(VmState::Stopping, "it is being ended at once");
    }

    async fn deadline(&mut self) -> Flow {
        let now = Instant::now();
        let Some(live) = &mut self.live else { return Flow::On };
        if live.retry.is_some_and(|(at, _)| at <= now) {
            return self.regain_contact().await;
        }
        match live.stopping.as_ref().filter(|s| s.until <= now).map(|s| s.stage) {
            Some(Stage::PowerButton) => self.stop_at_once(None).await,
            Some(Stage::AtOnce) => self.ended(End::Killed).await,
            None => {}
        }
        Flow::On
    }

    async fn delete(&mut self) -> Result<(), Error> {
        if self.live.is_some() {
            self.stop_at_once(None).await;
            self.finish(End::Killed).await?;
        }
        self.clear_away().await?;
        self.ctx.store.delete_vm(&self.vm.id).await?;
        self.ctx.runner.clean(&self.vm.id).await;
        self.ctx.registry.remove(&self.vm.id);
        self.publish(event::Event::Deleted(true));
        Ok(())
    }

    async fn hypervisor_event(&mut self, event: HypervisorEvent) -> Flow {
        match event.event {
            Some(hypervisor_event::Event::State(state)) => self.hypervisor_state(state),
            Some(hypervisor_event::Event::Link(link)) => {
                if link.state() == LinkState::Lost {
                    self.look_after_card(&link.slot_id);
                }
                self.publish(event::Event::Link(link));
            }
            Some(hypervisor_event::Event::Ended(ended)) => {
                self.publish(event::Event::Ended(ended.clone()));
                self.ended(End::Said(ended)).await;
            }
            Some(hypervisor_event::Event::Reset(reset)) => {
                self.view.send_modify(|v| v.resets += 1);
                self.publish(event::Event::Reset(reset));
            }
            Some(hypervisor_event::Event::ConfigChangedSlot(slot)) => {
                self.publish(event::Event::ConfigChangedSlot(slot));
            }
            None => {}
        }
        Flow::On
    }

    pub(super) fn hypervisor_state(&mut self, state: i32) {
        let stopping = self.live.as_ref().is_some_and(|l| l.stopping.is_some());
        match HypervisorState::try_from(state) {
            Ok(HypervisorState::Running) if !stopping => self.set_state(VmState::Running, ""),
            Ok(HypervisorState::Paused) if !stopping => {
                self.set_state(VmState::Paused, "its vCPUs are paused");
            }
            _ => {}
        }
    }

    /// A device's link broke: its card may come back without the device.
    fn look_after_card(&self, slot: &str) {
        if let Ok(devices) = self.ctx.cards.devices_of(&self.vm.id, &self.vm.spec)
            && let Some(device) = devices.iter().find(|d| d.slot == slot)
        {
            device.card.look_after();
        }
    }

    fn client(&self, what: &str) -> Result<HypervisorClient<Channel>, Error> {
        let live = self.live.as_ref().ok_or_else(|| {
            let remedy = format!("start it with: outboard vm start {}", self.vm.spec.name);
            self.vm.wrong_state(&format!("does not run and cannot {what}"), remedy)
        })?;
        let link = live.link.as_ref();
        let link =
            link.ok_or_else(|| unreachable_hypervisor(&self.vm.spec.name, "the connection to it is lost"))?;
        Ok(HypervisorClient::new(link.channel.clone()))
    }

    /// Writes down what is being done.
    pub(super) async fn note(&mut self, phase: Phase, detail: &str) -> Result<(), Error> {
        self.record.phase = phase.into();
        detail.clone_into(&mut self.record.detail);
        self.record.boot_id.clone_from(&self.ctx.boot_id);
        self.ctx.store.put_vm(self.record.clone()).await
    }

    /// Shows a state, and tells who watches if it is another one.
    pub(super) fn set_state(&self, state: VmState, detail: &str) {
        let mut changed = false;
        self.view.send_modify(|v| {
            changed = v.state != state;
            v.state = state;
            detail.clone_into(&mut v.detail);
        });
        if changed {
            let word = state.as_str_name().trim_start_matches("VM_STATE_").to_ascii_lowercase();
            let separator = if detail.is_empty() { "" } else { ": " };
            tracing::info!(vm = self.vm.id, "{} is {word}{separator}{detail}", self.vm.spec.name);
            self.publish(event::Event::State(state.into()));
        }
    }

    pub(super) fn publish(&self, event: event::Event) {
        self.ctx.events.publish(&self.vm.id, &self.vm.spec.name, event);
    }
}

/// Answers; a caller that has gone away is no error.
pub(super) fn answer(reply: Reply, result: Result<(), Error>) {
    let _ = reply.send(result);
}
