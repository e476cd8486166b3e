//! The registers of a slot as one whole, and what they ask of the link.
//!
//! vCPU threads change registers and read them; the link's thread does what they ask and reports back. Both meet here, under one
//! lock. Nobody holds it while waiting for a device; but what the registers ask of KVM is asked under it, and KVM may take
//! milliseconds to attach or detach an eventfd or to change a route.

use std::sync::Arc;

use super::common::{Action, CommonConfig, F_VERSION_1, NO_VECTOR, Queue};
use super::device_config::DeviceConfig;
use super::layout::{self, Capabilities, Place, window};
use super::params::Params;
use super::ring;
use super::signals::{Binding, Channel, Doorbells, Interrupts};
use super::vhost_user::RingSetup;
use super::{Notifications, Options};
use crate::exits::Exit;
use crate::memory::GuestRam;
use crate::platform::pci::Placement;
use crate::platform::pci::config::ConfigSpace;
use crate::platform::pci::msix::MsixTable;

/// ISR status (VirtIO 1.3 section 4.1.4.5): a queue has something.
const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// Features that are passed on between driver and device: those of the device's type, and of those that all devices share
/// (VirtIO 1.3 section 6) the ones for which nothing has to be done here. Not among them: rings that are not split, resetting single
/// queues, and what needs an IOMMU.
const PASSED: u64 = 0x00ff_ffff | 1 << 28 | 1 << 29 | F_VERSION_1 | 1 << 35 | 1 << 36 | !0 << 50;

/// What is offered to a driver of what a device offers.
pub(super) fn offered(device_features: u64, masked: u64) -> u64 {
    device_features & PASSED & !masked
}

/// A driver that is ready, with its rings. The link serves one after the other.
#[derive(Debug)]
pub(super) struct Activation {
    /// Counts activations: rings of the same one go on where they were.
    pub(super) epoch: u64,
    /// Features that the driver accepted.
    pub(super) features: u64,
    /// The rings, by number of their queue.
    pub(super) rings: Vec<RingSetup>,
    /// Where they are.
    pub(super) ram: Arc<GuestRam>,
}

/// What the registers ask of the link.
#[derive(Debug, Default)]
pub(super) struct Orders {
    /// Rings that should be running.
    pub(super) activation: Option<Arc<Activation>>,
    /// A reset waits for the rings to stop.
    pub(super) resetting: bool,
    /// Nobody follows orders any more: the link has been shut down.
    pub(super) abandoned: bool,
    epoch: u64,
}

/// What a write to the BAR asks for beyond the registers. It is done without the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    Nothing,
    /// The link has something to do.
    Wake,
    /// The device is to look at this queue.
    Notify(u16),
}

/// What never changes, and the eventfds.
#[derive(Debug)]
pub(super) struct Fixed {
    pub(super) params: Params,
    pub(super) options: Options,
    pub(super) channels: Vec<Channel>,
}

/// Everything that the guest can see, and the orders.
#[derive(Debug)]
pub(super) struct State {
    fixed: Arc<Fixed>,
    ram: Arc<GuestRam>,
    pci: ConfigSpace,
    capabilities: Capabilities,
    common: CommonConfig,
    msix: MsixTable,
    isr: u8,
    pub(super) config: DeviceConfig,
    device_features: u64,
    placement: Option<Placement>,
    binding: Option<Binding>,
    doorbells: Doorbells,
    interrupts: Interrupts,
    pub(super) orders: Orders,
}

impl State {
    /// A slot after power-on whose device offers `device_features` and has this configuration.
    pub(super) fn new(
        fixed: Arc<Fixed>,
        ram: Arc<GuestRam>,
        device_features: u64,
        config: DeviceConfig,
    ) -> Self {
        let queues = fixed.channels.len() as u16;
        let msix = MsixTable::new(queues + 1);
        let (pci, capabilities) = layout::config_space(fixed.params.virtio_id, queues, config.len(), &msix);
        let features = offered(device_features, fixed.params.masked_features);
        let common = CommonConfig::new(features, queues, fixed.params.queue_size, msix.len());
        Self {
            fixed,
            ram,
            pci,
            capabilities,
            common,
            msix,
            isr: 0,
            config,
            device_features,
            placement: None,
            binding: None,
            doorbells: Doorbells::default(),
            interrupts: Interrupts::default(),
            orders: Orders::default(),
        }
    }

    /// Features that the device offers.
    pub(super) fn device_features(&self) -> u64 {
        self.device_features
    }

    /// Features that the driver accepted; 0 until it has settled.
    pub(super) fn driver_features(&self) -> u64 {
        self.common.driver_features()
    }

    /// Whether the driver is ready.
    pub(super) fn driver_ok(&self) -> bool {
        self.common.driver_ok()
    }

    /// The guest's memory.
    pub(super) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The guest has other memory now. No ring is running.
    pub(super) fn set_ram(&mut self, ram: Arc<GuestRam>) {
        self.ram = ram;
    }

    /// Where the slot is.
    pub(super) fn placement(&self) -> Option<&Placement> {
        self.placement.as_ref()
    }

    /// Says where the slot is.
    pub(super) fn place(&mut self, placement: Placement) {
        self.pci.set_bar(self.bar_size(), placement.bar);
        self.placement = Some(placement);
    }

    /// Length of the BAR in bytes.
    pub(super) fn bar_size(&self) -> u64 {
        layout::bar_size(self.fixed.channels.len() as u16)
    }

    /// Where the BAR is decoded.
    pub(super) fn bar(&self) -> Option<u64> {
        self.pci.bar()
    }

    /// The device is back, perhaps with other features than before. A driver that has not settled yet is offered those.
    pub(super) fn set_device_features(&mut self, features: u64) {
        self.device_features = features;
        self.common.offer(offered(features, self.fixed.params.masked_features));
    }

    /// Uses a KVM VM from now on.
    pub(super) fn bind(&mut self, binding: Binding) {
        self.unbind();
        self.binding = Some(binding);
        self.sync();
    }

    /// Uses no KVM VM any more: notifications and interrupts wait in their eventfds.
    pub(super) fn unbind(&mut self) {
        let Some(binding) = self.binding.take() else { return };
        self.doorbells.sync(Some(&binding), None, &[], &[], &self.fixed.channels);
        self.interrupts.sync(Some(&binding), &self.msix, std::iter::empty(), &self.fixed.channels);
        self.interrupts.release(Some(&binding));
    }

    fn windows(&self) -> Arc<[std::ops::RangeInclusive<u64>]> {
        self.placement.as_ref().map_or_else(|| Arc::from([]), |p| Arc::clone(&p.windows))
    }

    /// Makes KVM do what the registers say.
    fn sync(&mut self) {
        let by_kvm = matches!(self.fixed.options.notifications, Notifications::Kvm);
        let numbers: Vec<u16> = (0..)
            .zip(in_use(&self.common, &self.orders))
            .filter_map(|(number, queue)| queue.filter(|_| by_kvm).map(|_| number))
            .collect();
        let windows = self.windows();
        self.doorbells.sync(self.binding.as_ref(), self.pci.bar(), &windows, &numbers, &self.fixed.channels);
        self.sync_interrupts();
    }

    fn sync_interrupts(&mut self) {
        self.interrupts.sync(
            self.binding.as_ref(),
            &self.msix,
            in_use(&self.common, &self.orders),
            &self.fixed.channels,
        );
        self.deliver_pending();
    }

    fn deliver_pending(&mut self) {
        for message in self.msix.take_deliverable() {
            if let Some(binding) = &self.binding {
                // A message that reaches no APIC is the guest's own doing.
                let _ = binding.router.signal(message);
            }
        }
    }

    /// Tells the driver that the configuration changed, or that the device needs a reset.
    fn interrupt_config(&mut self) {
        self.isr |= ISR_CONFIG;
        let vector = self.common.config_vector();
        if vector != NO_VECTOR && self.msix.enabled() {
            self.msix.set_pending(vector);
            self.deliver_pending();
        }
    }

    /// The device's configuration is this now. Says whether that is a change; the driver is told of one, and `always` if the device
    /// says itself that there is one. A driver whose reset is not done yet sees it when it sees the reset done.
    pub(super) fn set_config(&mut self, new: &[u8], always: bool) -> bool {
        if self.orders.resetting {
            self.config.forget_writes();
            self.config.update(new);
            return false;
        }
        let news = self.config.update(new) || always;
        if news {
            self.common.next_generation();
            self.interrupt_config();
        }
        news
    }

    /// The device has found something in a ring with which it cannot go on.
    pub(super) fn set_needs_reset(&mut self) {
        if self.common.set_needs_reset() {
            self.interrupt_config();
        }
    }

    /// Asks for a reset. It is done at once if the device knows nothing of the driver; otherwise when the link has stopped the rings
    /// and reset the device. Returns whether the link has to be woken.
    pub(super) fn request_reset(&mut self) -> bool {
        if self.orders.resetting {
            return false;
        }
        let untouched = self.orders.activation.take().is_none() && !self.config.is_written();
        if untouched || self.orders.abandoned {
            self.finish_reset();
            return false;
        }
        self.orders.resetting = true;
        true
    }

    /// The rings are stopped: the driver sees the reset done.
    pub(super) fn finish_reset(&mut self) {
        self.orders.resetting = false;
        self.orders.activation = None;
        self.config.forget_writes();
        self.common.reset(offered(self.device_features, self.fixed.params.masked_features));
        self.isr = 0;
        self.sync();
        for channel in &self.fixed.channels {
            channel.drain();
        }
    }

    /// The machine is reset: configuration space and MSI-X as after power-on.
    pub(super) fn power_on(&mut self) {
        self.msix.reset();
        let queues = self.fixed.channels.len() as u16;
        let (pci, _) =
            layout::config_space(self.fixed.params.virtio_id, queues, self.config.len(), &self.msix);
        self.pci = pci;
        if let Some(placement) = self.placement.take() {
            self.place(placement);
        }
        self.sync();
    }

    /// Starts what the driver has set up. Returns whether the link has to be woken.
    fn start(&mut self) -> bool {
        if self.orders.activation.is_some() || self.orders.resetting {
            return false;
        }
        let enabled = (0..).zip(self.common.queues()).filter(|(_, queue)| queue.enabled);
        let rings: Option<Vec<_>> =
            enabled.map(|(index, queue)| ring::check(index, queue, &self.ram)).collect();
        let Some(rings) = rings else {
            self.set_needs_reset();
            return false;
        };
        self.orders.epoch += 1;
        let features = self.common.driver_features();
        let (epoch, ram) = (self.orders.epoch, Arc::clone(&self.ram));
        self.orders.activation = Some(Arc::new(Activation { epoch, features, rings, ram }));
        self.sync();
        true
    }

    /// The guest reads configuration space. For its window into the BAR see [`State::window`].
    pub(super) fn read_pci(&self, offset: u8, data: &mut [u8]) {
        self.pci.read(offset, data);
    }

    /// The guest writes configuration space.
    pub(super) fn write_pci(&mut self, offset: u8, data: &[u8]) {
        let (bar, control) = (self.pci.bar(), self.pci.u16(self.capabilities.msix_control));
        self.pci.write(offset, data);
        if self.pci.u16(self.capabilities.msix_control) != control {
            self.msix.set_control(self.pci.u16(self.capabilities.msix_control));
            self.sync_interrupts();
        }
        if self.pci.bar() != bar {
            self.sync();
        }
    }

    /// If an access of `length` bytes to configuration space at `offset` touches the data of the window: the offset and length in
    /// the BAR of the access that it stands for, if that is a valid one (VirtIO 1.3 section 4.1.4.9).
    pub(super) fn window(&self, offset: u8, length: usize) -> Option<Option<(u64, usize)>> {
        let at = self.capabilities.window;
        let data = at + window::DATA;
        let touched = offset < data + 4 && usize::from(offset) + length > usize::from(data);
        touched.then(|| {
            let start = u64::from(self.pci.u32(at + window::OFFSET));
            let length = u64::from(self.pci.u32(at + window::LENGTH));
            let valid = self.pci.u8(at + window::BAR) == 0
                && matches!(length, 1 | 2 | 4)
                && start.is_multiple_of(length)
                && start + length <= self.bar_size();
            valid.then_some((start, length as usize))
        })
    }

    /// The data of the window.
    pub(super) fn window_data(&self) -> [u8; 4] {
        self.pci.u32(self.capabilities.window + window::DATA).to_le_bytes()
    }

    /// Sets the data of the window.
    pub(super) fn set_window_data(&mut self, data: &[u8]) {
        self.pci.put(self.capabilities.window + window::DATA, &data[..data.len().min(4)]);
    }

    /// The guest reads the BAR.
    pub(super) fn read_bar(&mut self, offset: u64, data: &mut [u8]) -> Exit {
        data.fill(0);
        match layout::place(offset) {
            Place::Common(at) => {
                self.common.read(at, data);
                Exit::MmioSlotCommon
            }
            Place::Isr => {
                if let Some(first) = data.first_mut() {
                    *first = self.take_isr();
                }
                Exit::MmioSlotIsr
            }
            Place::Device(at) => {
                self.config.read(at, data);
                Exit::MmioSlotDevice
            }
            Place::MsixTable(at) => {
                self.msix.read_table(at, data);
                Exit::MmioMsix
            }
            Place::MsixPending(at) => {
                let queues = in_use(&self.common, &self.orders);
                let waiting = self.interrupts.waiting(queues, &self.fixed.channels);
                self.msix.read_pending(at, data, waiting);
                Exit::MmioMsix
            }
            Place::Notify(_) => Exit::MmioSlotNotify,
            Place::Nothing => Exit::MmioUnclaimed,
        }
    }

    /// Reading the ISR status clears it. A driver that uses no MSI-X finds there what would have been interrupts.
    fn take_isr(&mut self) -> u8 {
        let mut isr = std::mem::take(&mut self.isr);
        if !self.msix.enabled() {
            for channel in &self.fixed.channels {
                if channel.call.read().is_ok() {
                    isr |= ISR_QUEUE;
                }
            }
        }
        isr
    }

    /// The guest writes the BAR. Says how the access counts, and what has to be done.
    pub(super) fn write_bar(&mut self, offset: u64, data: &[u8]) -> (Exit, Effect) {
        let wake_if = |wake| if wake { Effect::Wake } else { Effect::Nothing };
        match layout::place(offset) {
            Place::Common(at) => (Exit::MmioSlotCommon, wake_if(self.write_common(at, data))),
            Place::Device(at) => (Exit::MmioSlotDevice, wake_if(self.write_config(at, data))),
            Place::MsixTable(at) => {
                if self.msix.write_table(at, data) {
                    self.sync_interrupts();
                }
                (Exit::MmioMsix, Effect::Nothing)
            }
            Place::Notify(queue) => {
                let queue = u16::try_from(queue).ok().filter(|&q| usize::from(q) < self.fixed.channels.len());
                (Exit::MmioSlotNotify, queue.map_or(Effect::Nothing, Effect::Notify))
            }
            Place::Isr => (Exit::MmioSlotIsr, Effect::Nothing),
            Place::MsixPending(_) => (Exit::MmioMsix, Effect::Nothing),
            Place::Nothing => (Exit::MmioUnclaimed, Effect::Nothing),
        }
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) -> bool {
        // Until the rings are stopped, nothing can be set up anew.
        if self.orders.resetting {
            return false;
        }
        match self.common.write(offset, data) {
            Action::None => false,
            Action::Vectors => {
                self.sync_interrupts();
                false
            }
            Action::Start => self.start(),
            Action::Reset => self.request_reset(),
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) -> bool {
        !self.orders.resetting && self.config.write(offset, data)
    }
}

/// The queues, by number, with `None` for those that are not in use: before the driver is ready nothing is.
fn in_use<'a>(common: &'a CommonConfig, orders: &'a Orders) -> impl Iterator<Item = Option<&'a Queue>> {
    let running = orders.activation.is_some() || orders.resetting;
    common.queues().iter().map(move |queue| Some(queue).filter(|q| running && q.enabled))
}
