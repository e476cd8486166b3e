//! One life of the guest: from a reset to the next. A KVM VM with its vCPUs and the devices that start anew with it.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, Kvm, VmFd};
use proto::error::Error;
use vmm_sys_util::eventfd::EventFd;

use super::kvm::failed;
use crate::boot::Entry;
use crate::exits::ExitCounters;
use crate::memory::GuestRam;
use crate::platform::bus::{Bus, BusDevice};
use crate::platform::console::Console;
use crate::platform::ged::EventDevice;
use crate::platform::layout;
use crate::platform::power::{KeyboardController, PowerRegisters};
use crate::platform::requests::Requests;
use crate::platform::serial::SerialPort;
use crate::vcpu::{CpuidTemplate, Environment, RunControl, VcpuThread, reset_state};

/// What a life is made of.
pub(super) struct Parts<'a> {
    pub(super) cpuid: &'a CpuidTemplate,
    pub(super) console: &'a Arc<Console>,
    pub(super) requests: &'a Arc<Requests>,
    /// One per vCPU.
    pub(super) counters: &'a [Arc<ExitCounters>],
    /// Further ranges of port and memory space, with what answers there.
    pub(super) ports: Vec<BusRange>,
    pub(super) memory: Vec<BusRange>,
    pub(super) on_first_entry: Box<dyn Fn() + Send + Sync>,
    pub(super) on_failure: Box<dyn Fn(String) + Send + Sync>,
}

/// A range of a bus with what answers there.
pub(super) type BusRange = (std::ops::RangeInclusive<u64>, Arc<dyn BusDevice>);

/// A KVM VM without vCPUs: devices in other processes can be bound to it.
pub(super) struct BareVm {
    vm: Arc<VmFd>,
}

impl BareVm {
    /// Makes a KVM VM with RAM and interrupt controllers.
    pub(super) fn new(kvm: &Kvm, ram: &GuestRam) -> Result<Self, Error> {
        let vm = loop {
            match kvm.create_vm() {
                Ok(vm) => break vm,
                // A signal meanwhile.
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(failed("making a KVM VM", e)),
            }
        };
        if kvm.check_extension(Cap::SetIdentityMapAddr) {
            vm.set_identity_map_address(layout::IDENTITY_MAP)
                .map_err(|e| failed("KVM_SET_IDENTITY_MAP_ADDR", e))?;
        }
        if kvm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(layout::KVM_TSS as usize).map_err(|e| failed("KVM_SET_TSS_ADDR", e))?;
        }
        // Before the interrupt controllers: with them there, KVM waits for a grace period for every region (8 ms against 0.2).
        for (slot, region) in (0u32..).zip(ram.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.gpa,
                memory_size: region.size,
                userspace_addr: region.host_address,
            };
            // SAFETY: the mapping is `ram`'s, which outlives every KVM VM of the machine: vCPUs are stopped and the VM is
            // dropped before it.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(|e| failed("KVM_SET_USER_MEMORY_REGION", e))?;
        }
        vm.create_irq_chip().map_err(|e| failed("KVM_CREATE_IRQCHIP", e))?;
        Ok(Self { vm: Arc::new(vm) })
    }

    pub(super) fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Adds devices and vCPUs, which run (or wait, if `held`) when this returns.
    pub(super) fn live(self, parts: Parts<'_>, entry: Entry, held: bool) -> Result<Life, Error> {
        let vm = self.vm;
        let serial = SerialPort::new(parts.console, interrupt(&vm, layout::SERIAL_GSI)?);
        let events = Arc::new(EventDevice::new(interrupt(&vm, layout::GED_GSI)?));

        let mut ports = Bus::default();
        ports.insert(layout::SERIAL_PORTS, serial);
        ports.insert(layout::I8042_PORT, Arc::new(KeyboardController::new(Arc::clone(parts.requests))));
        ports.insert(layout::POWER_PORTS, Arc::new(PowerRegisters::new(Arc::clone(parts.requests))));
        let mut memory = Bus::default();
        memory.insert(layout::GED, Arc::clone(&events) as Arc<dyn BusDevice>);
        for (bus, ranges) in [(&mut ports, parts.ports), (&mut memory, parts.memory)] {
            for (range, device) in ranges {
                bus.insert(range, device);
            }
        }

        let environment = Arc::new(Environment {
            ports,
            memory,
            requests: Arc::clone(parts.requests),
            control: RunControl::new(held),
            on_first_entry: parts.on_first_entry,
            on_failure: parts.on_failure,
        });
        let mut fds = Vec::with_capacity(parts.counters.len());
        for index in 0..parts.counters.len() as u8 {
            let fd = vm.create_vcpu(u64::from(index)).map_err(|e| failed("KVM_CREATE_VCPU", e))?;
            let tsc_khz = fd.get_tsc_khz().ok();
            let cpuid = parts
                .cpuid
                .for_vcpu(index, tsc_khz)
                .map_err(|e| failed("building CPUID", std::io::Error::other(format!("{e:?}"))))?;
            fd.set_cpuid2(&cpuid).map_err(|e| failed("KVM_SET_CPUID2", e))?;
            reset_state(&fd, index, entry).map_err(|e| failed("setting vCPU registers", e))?;
            fds.push(fd);
        }
        let mut life = Life { environment, vcpus: Vec::with_capacity(fds.len()), events, _vm: vm };
        for ((index, fd), counters) in (0u8..).zip(fds).zip(parts.counters) {
            let vcpu = VcpuThread::spawn(index, fd, &life.environment, counters)
                .map_err(|e| failed("starting a vCPU thread", e))?;
            life.vcpus.push(vcpu);
        }
        Ok(life)
    }
}

/// An eventfd that raises `gsi`.
fn interrupt(vm: &VmFd, gsi: u32) -> Result<EventFd, Error> {
    let eventfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|e| failed("eventfd", e))?;
    vm.register_irqfd(&eventfd, gsi).map_err(|e| failed("KVM_IRQFD", e))?;
    Ok(eventfd)
}

/// Running vCPUs and what starts anew with them. Ends when dropped, which takes as long as the vCPUs take to leave the guest.
pub(super) struct Life {
    environment: Arc<Environment>,
    vcpus: Vec<VcpuThread>,
    events: Arc<EventDevice>,
    // After the vCPUs, so that it is the last of it to go.
    _vm: Arc<VmFd>,
}

impl Life {
    /// Takes every vCPU out of the guest; returns when they are.
    pub(super) fn hold(&self) {
        self.environment.control.hold();
        self.kick_all();
        self.environment.control.wait_until_parked(self.vcpus.len());
    }

    /// Lets them run again.
    pub(super) fn release(&self) {
        self.environment.control.release();
    }

    /// Tells the guest of [`ged`](crate::platform::ged) events.
    pub(super) fn raise(&self, events: u32) -> Result<(), Error> {
        self.events.raise(events).map_err(|e| failed("raising an ACPI event", e))
    }

    fn kick_all(&self) {
        for vcpu in &self.vcpus {
            vcpu.kick();
        }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        // All at once; each is waited for when its handle is dropped.
        self.environment.control.stop();
        self.kick_all();
    }
}
