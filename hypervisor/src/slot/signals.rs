//! The eventfds of a slot's queues and what KVM does with them: the guest's notifications go into `kick`, a device's interrupts
//! come out of `call`, and in steady state this process sees neither.

use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::common::Queue;
use super::layout;
use super::sys::{self, Wait};
use crate::platform::irq::{Gsi, IrqRouter};
use crate::platform::pci::msix::{Message, MsixTable};

/// `KVM_CAP_IOEVENTFD_ANY_LENGTH`, which kvm-ioctls does not name.
const CAP_IOEVENTFD_ANY_LENGTH: libc::c_ulong = 122;

/// The eventfds of one queue. They live as long as the slot, so that what is signalled while nobody listens is not lost.
#[derive(Debug)]
pub(super) struct Channel {
    /// Guest to device.
    pub(super) kick: EventFd,
    /// Device to guest.
    pub(super) call: EventFd,
}

impl Channel {
    pub(super) fn new() -> io::Result<Self> {
        let flags = libc::EFD_NONBLOCK | libc::EFD_CLOEXEC;
        Ok(Self { kick: EventFd::new(flags)?, call: EventFd::new(flags)? })
    }

    /// Forgets what is signalled.
    pub(super) fn drain(&self) {
        // An error is an eventfd without signal.
        let _ = self.kick.read();
        let _ = self.call.read();
    }

    /// Whether the device has signalled and nobody took it yet.
    fn call_waits(&self) -> bool {
        let waits = [Wait::event(&self.call)];
        sys::poll(waits, Some(std::time::Duration::ZERO)).is_ok_and(|[waits]| waits)
    }
}

/// The KVM VM that a slot is bound to.
#[derive(Debug)]
pub(super) struct Binding {
    vm: Arc<VmFd>,
    pub(super) router: Arc<IrqRouter>,
    any_length: bool,
}

impl Binding {
    pub(super) fn new(vm: Arc<VmFd>, router: Arc<IrqRouter>) -> Self {
        let any_length = vm.check_extension_raw(CAP_IOEVENTFD_ANY_LENGTH) > 0;
        Self { vm, router, any_length }
    }

    fn register(&self, kick: &EventFd, queue: u16, address: u64) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        // Drivers write the queue's number (16 bits): all that a kernel that wants a length can match.
        let r = match self.any_length {
            true => self.vm.register_ioevent(kick, &address, NoDatamatch),
            false => self.vm.register_ioevent(kick, &address, queue),
        };
        r.map_err(io::Error::from)
    }

    fn unregister(&self, kick: &EventFd, queue: u16, address: u64) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        let r = match self.any_length {
            true => self.vm.unregister_ioevent(kick, &address, NoDatamatch),
            false => self.vm.unregister_ioevent(kick, &address, queue),
        };
        r.map_err(io::Error::from)
    }
}

/// Which queues' notifications KVM puts into their eventfds, and at which address.
#[derive(Debug, Default)]
pub(super) struct Doorbells {
    bar: u64,
    registered: Vec<u16>,
}

impl Doorbells {
    /// Registers the notifications of the `queues` in use (by number) for a BAR at `bar`, and unregisters all others. A BAR outside
    /// of every window is nobody's: its notifications would take what belongs to the platform.
    pub(super) fn sync(
        &mut self,
        binding: Option<&Binding>,
        bar: Option<u64>,
        windows: &[RangeInclusive<u64>],
        queues: &[u16],
        channels: &[Channel],
    ) {
        let Some(binding) = binding else {
            self.registered.clear();
            return;
        };
        let last = layout::bar_size(channels.len() as u16) - 1;
        let bar = bar.filter(|&b| {
            let end = b.checked_add(last);
            end.is_some_and(|end| windows.iter().any(|w| w.contains(&b) && w.contains(&end)))
        });
        if bar == Some(self.bar) && queues == self.registered {
            return;
        }
        for queue in std::mem::take(&mut self.registered) {
            if let Some(channel) = channels.get(usize::from(queue)) {
                // It was registered like this, so the only failure is a VM that is going away with it.
                let _ = binding.unregister(&channel.kick, queue, self.bar + layout::notify(queue));
            }
        }
        let Some(bar) = bar else { return };
        self.bar = bar;
        for &queue in queues {
            let Some(channel) = channels.get(usize::from(queue)) else { continue };
            // Refused if the guest has put two BARs at one address. Notifications then come to this process, which passes them
            // on, so that only this guest is slow.
            if binding.register(&channel.kick, queue, bar + layout::notify(queue)).is_ok() {
                self.registered.push(queue);
            }
        }
    }
}

/// Which queues' interrupts KVM takes out of their eventfds, and as what.
#[derive(Debug, Default)]
pub(super) struct Interrupts {
    // By vector: allocated once needed.
    gsis: Vec<Option<Gsi>>,
    // By queue: the vector to which its eventfd is attached.
    attached: Vec<Option<u16>>,
    // That KVM did not do what was asked has been reported: once is enough, however often the guest tries.
    complained: bool,
}

/// Says once what KVM refused. The guest's interrupts wait in their eventfds then, and the guest may try again.
fn complain(complained: &mut bool, what: &str, why: &dyn std::fmt::Display) {
    if !std::mem::replace(complained, true) {
        eprintln!("outboard-hypervisor: {what}: {why}");
    }
}

impl Interrupts {
    /// Attaches the eventfd of every queue whose vector may interrupt and detaches all others, whose interrupts wait in the eventfd
    /// then. `queues`: all queues, by number, with `None` for those not in use.
    pub(super) fn sync<'a>(
        &mut self,
        binding: Option<&Binding>,
        msix: &MsixTable,
        queues: impl Iterator<Item = Option<&'a Queue>>,
        channels: &[Channel],
    ) {
        let Some(binding) = binding else {
            self.gsis.clear();
            self.attached.clear();
            return;
        };
        let wanted: Vec<Option<(u16, Message)>> = queues
            .map(|queue| queue.and_then(|q| msix.deliverable(q.vector).map(|m| (q.vector, m))))
            .collect();
        self.attached.resize(wanted.len().max(self.attached.len()), None);
        let wanted = wanted.into_iter().chain(std::iter::repeat(None));
        let plan: Vec<_> = channels.iter().zip(wanted).collect();
        for (attached, (channel, want)) in self.attached.iter_mut().zip(&plan) {
            if let Some(vector) = *attached
                && want.is_none_or(|(v, _)| v != vector)
            {
                if let Some(Some(gsi)) = self.gsis.get(usize::from(vector)) {
                    // As with notifications: what was attached can be detached.
                    let _ = binding.router.detach(&channel.call, gsi);
                }
                *attached = None;
            }
        }
        for (_, want) in &plan {
            if let Some((vector, _)) = *want {
                self.allocate(binding, vector);
            }
        }
        let routes: Vec<_> = plan
            .iter()
            .filter_map(|(_, want)| *want)
            .filter_map(|(vector, message)| Some((self.gsis.get(usize::from(vector))?.as_ref()?, message)))
            .collect();
        if let Err(e) = binding.router.set(&routes) {
            // A message that KVM does not take is one that the guest made up; its interrupts go where the vector went before.
            complain(&mut self.complained, "KVM does not take an MSI-X message of the guest", &e);
        }
        for (attached, (channel, want)) in self.attached.iter_mut().zip(&plan) {
            if attached.is_none()
                && let Some((vector, _)) = *want
                && let Some(Some(gsi)) = self.gsis.get(usize::from(vector))
            {
                match binding.router.attach(&channel.call, gsi) {
                    Ok(()) => *attached = Some(vector),
                    Err(e) => {
                        complain(&mut self.complained, "KVM does not attach the interrupt of a queue", &e);
                    }
                }
            }
        }
    }

    fn allocate(&mut self, binding: &Binding, vector: u16) {
        let index = usize::from(vector);
        if self.gsis.len() <= index {
            self.gsis.resize_with(index + 1, || None);
        }
        if self.gsis[index].is_none() {
            self.gsis[index] = binding.router.allocate();
            if self.gsis[index].is_none() {
                let why = "all of its routes are taken";
                complain(&mut self.complained, "KVM has no route for an interrupt of the guest", &why);
            }
        }
    }

    /// Gives all GSIs back; everything is detached.
    pub(super) fn release(&mut self, binding: Option<&Binding>) {
        for gsi in self.gsis.drain(..).flatten() {
            if let Some(binding) = binding {
                binding.router.free(&gsi);
            }
        }
        self.attached.clear();
    }

    /// Vectors of queues (as in [`Interrupts::sync`]) whose interrupts wait in their eventfds.
    pub(super) fn waiting<'a>(
        &'a self,
        queues: impl Iterator<Item = Option<&'a Queue>> + 'a,
        channels: &'a [Channel],
    ) -> impl Iterator<Item = u16> + 'a {
        let attached = self.attached.iter().copied().chain(std::iter::repeat(None));
        queues
            .zip(channels)
            .zip(attached)
            .filter_map(|((queue, channel), attached)| Some((queue?, channel, attached)))
            .filter(|(_, channel, attached)| attached.is_none() && channel.call_waits())
            .map(|(queue, ..)| queue.vector)
    }
}
