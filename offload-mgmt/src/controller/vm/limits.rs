//! What a VM may do with its disks, changed while it is there.

use proto::error::{Error, ErrorReason};
use proto::v1::DeviceLimits;
use tonic::Code;

use super::actor::Actor;

impl Actor {
    /// Sets a disk's limits: written down first, so that they are not forgotten once they are in force; then told to the
    /// card if the disk is on it, which it is while the VM has a process.
    pub(super) async fn set_disk_limits(
        &mut self,
        disk: &str,
        limits: Option<DeviceLimits>,
    ) -> Result<(), Error> {
        let vm = self.vm.clone();
        let Some(index) = vm.spec.disks.iter().position(|d| d.id == disk) else {
            let message = format!("VM {} has no disk {disk:?}", vm.spec.name);
            return Err(Error::new(Code::NotFound, ErrorReason::DeviceNotFound, message)
                .resource(disk)
                .remedy(format!("see: outboard vm show {}", vm.spec.name)));
        };
        let before = self.record.clone();
        if let Some(disk) = self.record.spec.as_mut().and_then(|s| s.disks.get_mut(index)) {
            disk.limits = limits;
        }
        let mut done = self.ctx.store.put_vm(self.record.clone()).await;
        if done.is_ok() && self.live.is_some() {
            let devices = self.ctx.cards.devices_of(&vm.id, &vm.spec)?;
            if let Some(device) = devices.iter().find(|d| d.slot == disk) {
                done = device.card.set_limits(&device.spec.id, limits).await;
            }
        }
        if let Err(e) = done {
            self.record = before;
            if let Err(e) = self.ctx.store.put_vm(self.record.clone()).await {
                tracing::error!(vm = vm.id, "{e}");
            }
            return Err(e);
        }
        self.view.send_modify(|v| {
            if let Some(place) = v.limits.get_mut(index) {
                *place = limits;
            }
        });
        tracing::info!(vm = vm.id, disk, "{} has other limits for a disk", vm.spec.name);
        Ok(())
    }
}
