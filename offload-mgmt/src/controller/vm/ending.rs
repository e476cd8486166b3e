//! How a VM comes to have no process: it said so, it was killed, or it is just not there any more.

use std::time::Duration;

use proto::error::Error;
use proto::v1::hypervisor_client::HypervisorClient;
use proto::v1::{
    EndReason, EventsRequest, GetInfoRequest, HypervisorInfo, HypervisorState, VmEnded, VmState,
};
use tokio::time::Instant;

use super::super::rpc;
use super::super::store::Phase;
use super::actor::{Actor, Flow, Link, Stage, Stopping, answer};
use super::start::take_down;
use crate::runner::{Exit, Liveness};

/// Pauses between attempts to find a hypervisor again that is there and does not answer.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MOST: Duration = Duration::from_secs(10);
/// Longest account of a failure that is kept, in characters: KVM's reason and a dump of registers fit.
const DETAIL_MAX: usize = 4096;

/// How it ended.
#[derive(Debug)]
pub(super) enum End {
    /// The hypervisor said it, and why.
    Said(VmEnded),
    /// The controller ended it.
    Killed,
    /// Its process is gone without a word.
    Vanished,
    /// As [`End::Vanished`], while no controller ran.
    VanishedUnseen,
    /// No process can be left: what is true is this.
    Known(&'static str),
}

impl Actor {
    /// The VM has ended or must end now. A process that does not end shows in the VM's state.
    pub(super) async fn ended(&mut self, end: End) {
        let _ = self.finish(end).await;
    }

    /// Takes the VM down, notes and tells how it ended, and answers who waits for it.
    ///
    /// # Errors
    /// Its process does not end.
    pub(super) async fn finish(&mut self, end: End) -> Result<(), Error> {
        let stopping = self.live.take().and_then(|l| l.stopping);
        // Nobody is to be given the connection of a process that goes away.
        self.view.send_modify(|v| v.hypervisor = None);
        let (grace, exit) = match end {
            End::Killed | End::Known(_) => (Duration::ZERO, Exit::default()),
            End::Said(_) => (self.ctx.deadlines.exit, Exit::default()),
            // Asked before the process is cleared away, and with it what is known of it.
            End::Vanished | End::VanishedUnseen => (Duration::ZERO, self.exit().await),
        };
        let taken_down = take_down(&self.ctx, &self.vm.id, &self.vm.spec, grace).await;
        let (state, detail) = match &taken_down {
            Ok(()) => self.verdict(end, &exit, stopping.as_ref()),
            Err(e) => (VmState::Failed, e.message().to_owned()),
        };
        let phase = if state == VmState::Failed { Phase::Failed } else { Phase::Stopped };
        if state != VmState::Failed {
            self.ctx.runner.clean(&self.vm.id).await;
        }
        if let Err(e) = self.note(phase, &detail).await {
            tracing::error!(vm = self.vm.id, "{e}");
        }
        let remains = taken_down.is_err();
        self.view.send_modify(|v| {
            v.pid = 0;
            v.remains = remains;
        });
        self.set_state(state, &detail);
        for waiter in stopping.into_iter().flat_map(|s| s.waiters) {
            answer(waiter, taken_down.clone());
        }
        taken_down
    }

    /// What to call the end.
    fn verdict(&self, end: End, exit: &Exit, stopping: Option<&Stopping>) -> (VmState, String) {
        let stopped = |detail: &str| (VmState::Stopped, detail.to_owned());
        let by_us = match stopping {
            Some(Stopping { asked: true, .. }) => "it was ended because the guest did not power off in time",
            _ => "it was ended at once",
        };
        let at_once = stopping.is_some_and(|s| s.stage == Stage::AtOnce);
        match end {
            End::Said(ended) => match ended.reason() {
                EndReason::GuestPowerOff => stopped("the guest powered off"),
                EndReason::Shutdown => stopped(by_us),
                EndReason::Signal => stopped("its hypervisor process was ended by a signal"),
                EndReason::Failure | EndReason::Unspecified => (VmState::Failed, clip(ended.detail)),
            },
            End::Killed => stopped(by_us),
            End::Known(detail) => stopped(detail),
            End::Vanished if at_once => stopped(by_us),
            End::Vanished | End::VanishedUnseen => {
                let state = if exit.clean { VmState::Stopped } else { VmState::Failed };
                let unseen = matches!(end, End::VanishedUnseen);
                let when = if unseen { " while the controller was not running" } else { "" };
                (state, self.epitaph(exit, when))
            }
        }
    }

    /// How the process ended. The connection of a process that dies breaks a moment before it can be seen to be dead.
    async fn exit(&self) -> Exit {
        let deadline = Instant::now() + self.ctx.deadlines.exit;
        let mut pause = Duration::from_millis(1);
        loop {
            match self.ctx.runner.liveness(&self.vm.id).await {
                Liveness::Ended(exit) => return exit,
                Liveness::Alive if Instant::now() >= deadline => return Exit::default(),
                Liveness::Alive => tokio::time::sleep(pause).await,
            }
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    fn epitaph(&self, exit: &Exit, when: &str) -> String {
        let how = if exit.how.is_empty() { "ended without saying why" } else { &exit.how };
        let hint = self.ctx.runner.log_hint(&self.vm.id);
        match exit.last_words.as_str() {
            _ if exit.clean => format!("its hypervisor process ended{when}"),
            "" => format!("its hypervisor process {how}{when}; {hint}"),
            words => format!("its hypervisor process {how}{when}; its last words: {words}; {hint}"),
        }
    }

    /// The event stream broke: the process is gone, or it is not.
    pub(super) async fn lost_contact(&mut self, why: &str) -> Flow {
        tracing::warn!(vm = self.vm.id, "contact to the hypervisor lost: {why}");
        if let Some(live) = &mut self.live {
            live.link = None;
        }
        self.view.send_modify(|v| v.hypervisor = None);
        self.regain_contact().await
    }

    /// One attempt to find the hypervisor again; another one follows if it is there and does not answer.
    pub(super) async fn regain_contact(&mut self) -> Flow {
        match self.contact().await {
            Contact::Made(found) => match found.1.state() {
                HypervisorState::Running | HypervisorState::Paused => self.contact_made(found.0, &found.1),
                // Another process than the one that ran the guest, or the same about to exit.
                _ => self.ended(End::Vanished).await,
            },
            Contact::Nobody => self.ended(End::Vanished).await,
            Contact::Silent(why) => self.retry_contact(&why),
        }
        Flow::On
    }

    pub(super) fn contact_made(&mut self, link: Link, info: &HypervisorInfo) {
        self.view.send_modify(|v| {
            v.pid = info.pid;
            v.resets = info.resets;
            v.hypervisor = Some(link.channel.clone());
        });
        let live = self.live.get_or_insert_default();
        live.link = Some(link);
        live.retry = None;
        self.hypervisor_state(info.state);
    }

    pub(super) fn retry_contact(&mut self, why: &str) {
        let live = self.live.get_or_insert_default();
        let pause = live.retry.map_or(RETRY_FIRST, |(_, pause)| (pause * 2).min(RETRY_MOST));
        live.retry = Some((Instant::now() + pause, pause));
        let state = self.vm.view().state;
        self.set_state(state, &format!("its hypervisor does not answer: {why}"));
    }

    /// Dials the VM's control socket and subscribes to its events.
    pub(super) async fn contact(&self) -> Contact {
        let deadline = self.ctx.deadlines.hypervisor;
        let channel = match rpc::dial(&self.ctx.runner.control_socket(&self.vm.id)).await {
            Ok(channel) => channel,
            Err(e) if rpc::nobody_listens(&e) => return Contact::Nobody,
            Err(e) => return Contact::Silent(e.to_string()),
        };
        let mut client = HypervisorClient::new(channel.clone());
        let silent = |f: rpc::Failure| {
            Contact::Silent(f.or_else(|why| Error::invalid_field("", why)).message().to_owned())
        };
        // Subscribed first: what happens after the answer to GetInfo is then in the stream.
        let events = match rpc::call(deadline, client.events(EventsRequest {})).await {
            Ok(events) => events,
            Err(e) => return silent(e),
        };
        match rpc::call(deadline, client.get_info(GetInfoRequest {})).await {
            Ok(info) => Contact::Made(Box::new((Link { channel, events }, info))),
            Err(e) => silent(e),
        }
    }
}

/// No more of what a hypervisor says about itself than is worth keeping.
fn clip(mut detail: String) -> String {
    if let Some((end, _)) = detail.char_indices().nth(DETAIL_MAX) {
        detail.truncate(end);
        detail.push_str("...");
    }
    detail
}

/// Who is at a VM's control socket.
pub(super) enum Contact {
    /// Its hypervisor.
    Made(Box<(Link, HypervisorInfo)>),
    /// Nobody: no socket, or nobody listens on it.
    Nobody,
    /// Somebody who does not answer, and why.
    Silent(String),
}
