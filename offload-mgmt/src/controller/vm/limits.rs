//! What a VM may do with its devices, changed while it is there.

use proto::error::{Error, ErrorReason};
use proto::v1::{DeviceLimits, NetLimits};
use tonic::Code;

use super::actor::Actor;

/// Limits for a device of one kind; `None`: none.
#[derive(Debug, Clone, Copy)]
pub(super) enum NewLimits {
    Disk(Option<DeviceLimits>),
    Nic(Option<NetLimits>),
}

impl Actor {
    /// Sets a device's limits: written down first, so that they are not forgotten once they are in force; then told to the
    /// card if the device is on it, which it is while the VM has a process.
    pub(super) async fn set_limits(&mut self, device: &str, limits: NewLimits) -> Result<(), Error> {
        let vm = self.vm.clone();
        let (kind, place) = match limits {
            NewLimits::Disk(_) => ("disk", vm.spec.disks.iter().position(|d| d.id == device)),
            NewLimits::Nic(_) => ("network interface", vm.spec.nics.iter().position(|n| n.id == device)),
        };
        let Some(index) = place else {
            let message = format!("VM {} has no {kind} {device:?}", vm.spec.name);
            return Err(Error::new(Code::NotFound, ErrorReason::DeviceNotFound, message)
                .resource(device)
                .remedy(format!("see: outboard vm show {}", vm.spec.name)));
        };
        let before = self.record.clone();
        if let Some(spec) = &mut self.record.spec {
            match limits {
                NewLimits::Disk(limits) => put(spec.disks.get_mut(index).map(|d| &mut d.limits), limits),
                NewLimits::Nic(limits) => put(spec.nics.get_mut(index).map(|n| &mut n.limits), limits),
            }
        }
        let mut done = self.ctx.store.put_vm(self.record.clone()).await;
        if done.is_ok() && self.live.is_some() {
            let devices = self.ctx.cards.devices_of(&vm.id, &vm.spec)?;
            if let Some(placed) = devices.iter().find(|d| d.slot == device) {
                let (disk, nic) = match limits {
                    NewLimits::Disk(limits) => (limits, None),
                    NewLimits::Nic(limits) => (None, limits),
                };
                done = placed.card.set_limits(&placed.spec.id, disk, nic).await;
            }
        }
        if let Err(e) = done {
            self.record = before;
            if let Err(e) = self.ctx.store.put_vm(self.record.clone()).await {
                tracing::error!(vm = vm.id, "{e}");
            }
            return Err(e);
        }
        self.view.send_modify(|v| match limits {
            NewLimits::Disk(limits) => put(v.limits.get_mut(index), limits),
            NewLimits::Nic(limits) => put(v.nic_limits.get_mut(index), limits),
        });
        tracing::info!(vm = vm.id, device, "{} has other limits for a {kind}", vm.spec.name);
        Ok(())
    }
}

fn put<T>(place: Option<&mut T>, value: T) {
    if let Some(place) = place {
        *place = value;
    }
}
