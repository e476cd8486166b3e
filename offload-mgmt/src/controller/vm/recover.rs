//! What a new controller makes of the record of an earlier one: the process decides.

use std::time::Duration;

use proto::v1::{HypervisorState, VmState};

use super::super::store::Phase;
use super::actor::{Actor, Flow};
use super::ending::{Contact, End};
use crate::runner::Liveness;

/// A hypervisor that was being started when the controller died may listen a moment later.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(50);

impl Actor {
    /// Brings the record and what runs together.
    pub(super) async fn recover(&mut self) -> Flow {
        match self.record.phase() {
            Phase::Stopped | Phase::Unspecified => Flow::On,
            Phase::Failed => {
                // Perhaps because its process could not be ended.
                let alive = self.ctx.runner.liveness(&self.vm.id).await == Liveness::Alive;
                let remains = alive && self.record.boot_id == self.ctx.boot_id;
                self.view.send_modify(|v| v.remains = remains);
                Flow::On
            }
            Phase::Creating => {
                tracing::info!(vm = self.vm.id, "undoing a creation that was not finished");
                self.undo_creation().await;
                if self.vm.view().remains {
                    return Flow::On;
                }
                self.ctx.registry.remove(&self.vm.id);
                Flow::Gone
            }
            Phase::Starting | Phase::Running => {
                self.find().await;
                Flow::On
            }
        }
    }

    async fn find(&mut self) {
        if self.record.boot_id != self.ctx.boot_id {
            return self.ended(End::Known("the host was restarted")).await;
        }
        let was_starting = self.record.phase() == Phase::Starting;
        let mut contact = self.contact().await;
        for _ in 1..ATTEMPTS {
            if matches!(contact, Contact::Made(_)) {
                break;
            }
            tokio::time::sleep(PAUSE).await;
            contact = self.contact().await;
        }
        match contact {
            Contact::Made(found) => match found.1.state() {
                HypervisorState::Running | HypervisorState::Paused => {
                    tracing::info!(vm = self.vm.id, pid = found.1.pid, "found running");
                    // The state may have changed from what the record says; the hypervisor's word replaces it.
                    self.view.send_modify(|v| v.state = VmState::Running);
                    self.contact_made(found.0, &found.1);
                    self.adopted().await;
                }
                HypervisorState::Ended => self.ended(End::VanishedUnseen).await,
                _ => self.ended(End::Known("the controller ended while it started the VM")).await,
            },
            Contact::Nobody if was_starting => {
                self.ended(End::Known("the controller ended while it started the VM")).await;
            }
            Contact::Nobody => self.ended(End::VanishedUnseen).await,
            Contact::Silent(why) => {
                self.view.send_modify(|v| v.state = VmState::Running);
                self.retry_contact(&why);
                self.adopted().await;
            }
        }
    }

    /// The VM runs: so its devices should exist.
    async fn adopted(&mut self) {
        if self.record.phase() != Phase::Running
            && let Err(e) = self.note(Phase::Running, "").await
        {
            tracing::error!(vm = self.vm.id, "{e}");
        }
        match self.ctx.cards.devices_of(&self.vm.id, &self.vm.current_spec()) {
            Ok(devices) => {
                for device in devices {
                    device.card.want_device(&device.spec);
                    device.card.look_after();
                }
            }
            Err(e) => tracing::warn!(vm = self.vm.id, "its devices are not looked after: {e}"),
        }
    }
}
