//! Interrupts by message: who has which route of KVM's global system interrupts.
//!
//! A route turns a global system interrupt (GSI) into an MSI message; an irqfd turns an eventfd into a GSI. So a device in
//! another process interrupts the guest by writing to an eventfd, and this process is not asked.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::platform::layout::FIRST_MSI_GSI;
use crate::platform::pci::msix::Message;

/// Pins of each of the two 8259s.
const PIC_PINS: u32 = 8;

/// Messages that can have a GSI each at one time: what KVM's table of routes has room for beside the interrupt controllers' pins.
pub const MESSAGES: usize = KVM_MAX_IRQ_ROUTES - (2 * PIC_PINS + FIRST_MSI_GSI) as usize;

/// A global system interrupt that belongs to whoever allocated it.
#[derive(Debug, PartialEq, Eq)]
pub struct Gsi(u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Free,
    Allocated,
    To(Message),
}

/// The routes of one KVM VM. A new VM after a reset gets a new router.
#[derive(Debug)]
pub struct IrqRouter {
    vm: Arc<VmFd>,
    // Routes of the GSIs from FIRST_MSI_GSI.
    routes: Mutex<Vec<Route>>,
}

impl IrqRouter {
    /// A router for `vm`, whose in-kernel interrupt controllers exist already.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, routes: Mutex::new(Vec::new()) }
    }

    /// Reserves a GSI; `None` when KVM has no more.
    pub fn allocate(&self) -> Option<Gsi> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let index = match routes.iter().position(|r| *r == Route::Free) {
            Some(index) => index,
            None if routes.len() < MESSAGES => {
                routes.push(Route::Free);
                routes.len() - 1
            }
            None => return None,
        };
        routes[index] = Route::Allocated;
        u32::try_from(index).ok().map(|i| Gsi(FIRST_MSI_GSI + i))
    }

    /// Gives a GSI back. Its route stays until the next change, which does no harm: nobody raises it.
    pub fn free(&self, gsi: &Gsi) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(route) = routes.get_mut((gsi.0 - FIRST_MSI_GSI) as usize) {
            *route = Route::Free;
        }
    }

    /// Routes GSIs to messages, all in one call to KVM, and none if nothing changes: the call makes KVM wait for all vCPUs.
    ///
    /// # Errors
    /// If KVM refuses; the routes are then as before.
    pub fn set(&self, changes: &[(&Gsi, Message)]) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new = routes.clone();
        for (gsi, message) in changes {
            if let Some(route) = new.get_mut((gsi.0 - FIRST_MSI_GSI) as usize) {
                *route = Route::To(*message);
            }
        }
        if new == *routes {
            return Ok(());
        }
        let messages = (FIRST_MSI_GSI..).zip(&new).filter_map(|(gsi, route)| match route {
            Route::To(message) => Some(message_entry(gsi, *message)),
            Route::Free | Route::Allocated => None,
        });
        let entries: Vec<_> = pins().chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.vm.set_gsi_routing(&table)?;
        *routes = new;
        Ok(())
    }

    /// Lets every write to `eventfd` raise `gsi` from now on, starting with one that waits in it already.
    ///
    /// # Errors
    /// What KVM says; what waited in the eventfd waits on then.
    pub fn attach(&self, eventfd: &EventFd, gsi: &Gsi) -> io::Result<()> {
        // KVM would raise the GSI for what waits but leave the count in the eventfd, where it would look like another interrupt
        // after the next detach.
        let waiting = eventfd.read().is_ok();
        let attached = self.vm.register_irqfd(eventfd, gsi.0);
        // If KVM refuses, it waits on.
        if waiting {
            eventfd.write(1)?;
        }
        Ok(attached?)
    }

    /// Undoes [`IrqRouter::attach`]: writes wait in the eventfd from now on.
    ///
    /// # Errors
    /// What KVM says.
    pub fn detach(&self, eventfd: &EventFd, gsi: &Gsi) -> io::Result<()> {
        Ok(self.vm.unregister_irqfd(eventfd, gsi.0)?)
    }

    /// Interrupts now.
    ///
    /// # Errors
    /// What KVM says; a message that no local APIC takes is none.
    pub fn signal(&self, message: Message) -> io::Result<()> {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        self.vm.signal_msi(msi)?;
        Ok(())
    }
}

/// The routes of the interrupt controllers' pins, as KVM sets them up: setting routes replaces all of them.
fn pins() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pic = (0..2 * PIC_PINS).map(|pin| {
        let chip = if pin < PIC_PINS { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
        pin_entry(pin, chip, pin % PIC_PINS)
    });
    let ioapic = (0..FIRST_MSI_GSI).map(|pin| pin_entry(pin, KVM_IRQCHIP_IOAPIC, pin));
    pic.chain(ioapic)
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    }
}

fn message_entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router() -> IrqRouter {
        let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        IrqRouter::new(Arc::new(vm))
    }

    #[test]
    fn gsis_are_distinct_and_come_back() {
        let router = router();
        let (a, b) = (router.allocate().unwrap(), router.allocate().unwrap());
        assert_eq!((a.0, b.0), (FIRST_MSI_GSI, FIRST_MSI_GSI + 1));
        router.free(&a);
        assert_eq!(router.allocate().unwrap(), Gsi(FIRST_MSI_GSI));
    }

    #[test]
    fn gsis_run_out_without_harm() {
        let router = router();
        let all: Vec<_> = std::iter::from_fn(|| router.allocate()).collect();
        assert_eq!((all.len(), pins().count()), (MESSAGES, KVM_MAX_IRQ_ROUTES - MESSAGES));
        router.free(&all[7]);
        assert_eq!(router.allocate(), Some(Gsi(FIRST_MSI_GSI + 7)));
    }

    #[test]
    fn what_waits_is_not_lost_if_kvm_refuses() {
        // Without interrupt controllers, as they would be what a GSI goes to.
        let router = IrqRouter::new(Arc::new(kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap()));
        let eventfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let gsi = router.allocate().unwrap();
        eventfd.write(1).unwrap();
        assert!(router.attach(&eventfd, &gsi).is_err());
        assert_eq!(eventfd.read().unwrap(), 1);
    }

    #[test]
    fn an_eventfd_is_drained_into_the_guest_while_attached() {
        let router = router();
        let eventfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let gsi = router.allocate().unwrap();
        router.set(&[(&gsi, Message { address: 0xfee0_0000, data: 0x41 })]).unwrap();
        eventfd.write(1).unwrap();
        router.attach(&eventfd, &gsi).unwrap();
        assert!(eventfd.read().is_err());
        eventfd.write(1).unwrap();
        assert!(eventfd.read().is_err());
        router.detach(&eventfd, &gsi).unwrap();
        eventfd.write(1).unwrap();
        assert_eq!(eventfd.read().unwrap(), 1);
    }
}
