//! KVM's part: notifications that never reach this process, and interrupts that never leave the kernel.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use hypervisor::exits::Exit;
use hypervisor::platform::irq::IrqRouter;
use hypervisor::slot::{Notifications, Options, Slot};
use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

use crate::device::{Device, Script, request};
use crate::driver::{Driver, Machine, VERSION_1, config, until};

/// Where the guest's only instructions are.
const CODE: u64 = 0x1000;
/// A port that tells that they are done.
const DONE: u16 = 0x80;
const VECTOR: u8 = 0x41;

/// A KVM VM with one vCPU in 32-bit protected mode over the machine's RAM.
struct Guest {
    vm: Arc<VmFd>,
    vcpu: VcpuFd,
    router: Arc<IrqRouter>,
}

impl Guest {
    fn new(machine: &Machine) -> Self {
        let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        for (slot, region) in (0..).zip(machine.ram.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                guest_phys_addr: region.gpa,
                memory_size: region.size,
                userspace_addr: region.host_address,
                flags: 0,
            };
            // SAFETY: the machine keeps its RAM mapped for longer than this VM lives.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        let vcpu = vm.create_vcpu(0).unwrap();
        let flat = |type_, selector| kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            ..Default::default()
        };
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cr0 |= 1;
        sregs.cs = flat(0xb, 8);
        (sregs.ds, sregs.es, sregs.ss) = (flat(3, 16), flat(3, 16), flat(3, 16));
        vcpu.set_sregs(&sregs).unwrap();
        // Software-enable the local APIC (spurious interrupt vector register).
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[0xf1] |= 1;
        vcpu.set_lapic(&lapic).unwrap();
        let router = Arc::new(IrqRouter::new(Arc::clone(&vm)));
        Self { vm, vcpu, router }
    }

    /// Lets the guest write a 16-bit 0 to `address`; says whether that came to this process.
    fn write(&mut self, machine: &Machine, address: u64) -> bool {
        // mov word [address], 0; out 0x80, al
        let mut code = vec![0x66, 0xc7, 0x05];
        code.extend_from_slice(&(address as u32).to_le_bytes());
        code.extend_from_slice(&[0, 0, 0xe6, DONE as u8]);
        machine.ram.memory().write_slice(&code, GuestAddress(CODE)).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (CODE, 2);
        self.vcpu.set_regs(&regs).unwrap();
        let mut came = false;
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::MmioWrite(at, _) => {
                    assert_eq!(at, address);
                    came = true;
                }
                VcpuExit::IoOut(DONE, _) => return came,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Whether the local APIC has been asked to interrupt since this was last asked.
    fn interrupted(&self) -> bool {
        let byte = 0x200 + usize::from(VECTOR / 32) * 0x10 + usize::from(VECTOR % 32 / 8);
        let mut lapic = self.vcpu.get_lapic().unwrap();
        let bit = 1 << (VECTOR % 8);
        if lapic.regs[byte] & bit == 0 {
            return false;
        }
        lapic.regs[byte] &= !bit;
        self.vcpu.set_lapic(&lapic).unwrap();
        true
    }
}

struct Setup {
    machine: Machine,
    device: Device,
    _dir: tempfile::TempDir,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.sock");
    let device = Device::start(&path, Script::default());
    Setup { machine: Machine::new(&config(&path)), device, _dir: dir }
}

const NOTIFY: u64 = 0x4000;
const TABLE: u64 = 0x1000;
const PENDING: u64 = 0x3000;

#[test]
fn notifications_follow_the_bar() {
    let Setup { machine, device: _device, _dir } = setup();
    let mut guest = Guest::new(&machine);
    machine.slot.bind(&guest.vm, &guest.router);
    let mut driver = Driver::start(&machine, VERSION_1, 2);
    let mut round = |driver: &mut Driver<'_>, bar: u64, quiet: bool| {
        driver.submit(1, 5, &[(driver.buffers(1), 16, false)]);
        assert_eq!(guest.write(&machine, bar + NOTIFY + 0x1000), !quiet, "{bar:#x}");
        if quiet {
            assert_eq!(driver.wait(1, 1), [5]);
        } else {
            driver.notify(1);
            assert_eq!(driver.wait(1, 1), [5]);
        }
    };
    let first = machine.bar();
    round(&mut driver, first, true);
    machine.move_bar(first + 0x10_0000);
    round(&mut driver, first, false);
    round(&mut driver, first + 0x10_0000, true);
    machine.decode(false);
    machine.decode(true);
    round(&mut driver, first + 0x10_0000, true);
    // A queue that is not in use, and a device that is reset, are nobody's in KVM.
    driver.reset();
    assert!(guest.write(&machine, first + 0x10_0000 + NOTIFY + 0x1000));
    // Outside of the windows, nothing is taken.
    let driver = Driver::start(&machine, VERSION_1, 1);
    machine.move_bar(0xfd00_0000);
    assert!(guest.write(&machine, 0xfd00_0000 + NOTIFY));
    drop(driver);
}

#[test]
fn notifications_that_are_not_for_kvm_come_to_this_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.sock");
    let _device = Device::start(&path, Script::default());
    let (sender, called) = channel();
    let sender = Mutex::new(sender);
    let slot: Arc<OnceLock<Weak<Slot>>> = Arc::default();
    let of_call = Arc::clone(&slot);
    let call = Notifications::Call(Arc::new(move |queue| {
        // Were the slot's lock held, this would wait for ever.
        let slot = of_call.get().and_then(Weak::upgrade).unwrap();
        sender.lock().unwrap().send((queue, slot.info().driver_ok)).unwrap();
    }));
    for notifications in [Notifications::Exit, call] {
        let calls = matches!(notifications, Notifications::Call(_));
        let machine = Machine::with(&config(&path), 16 << 20, Options { notifications });
        if calls {
            slot.set(Arc::downgrade(&machine.slot)).unwrap();
        }
        let mut guest = Guest::new(&machine);
        machine.slot.bind(&guest.vm, &guest.router);
        let mut driver = Driver::start(&machine, VERSION_1, 2);
        until("rings", || machine.slot.info().driver_ok);
        driver.submit(1, 5, &[(driver.buffers(1), 16, false)]);
        assert!(guest.write(&machine, machine.bar() + NOTIFY + 0x1000), "an ioeventfd took it");
        driver.notify(1);
        if calls {
            assert_eq!(called.try_recv(), Ok((1, true)));
            // By the window in configuration space: BAR 0, offset, length, data.
            let window = machine.capability(5).unwrap();
            machine.config_write(window + 8, &(NOTIFY as u32).to_le_bytes());
            machine.config_write(window + 12, &2u32.to_le_bytes());
            assert_eq!(machine.config_write(window + 16, &[0, 0]), Exit::MmioSlotNotify);
            assert_eq!(called.try_recv(), Ok((0, true)));
            // A queue that does not exist is nobody's.
            assert_eq!(machine.write(NOTIFY + 0x2000, &[2, 0]), Exit::MmioSlotNotify);
            assert!(called.try_recv().is_err());
            // The device was not told.
            assert!(driver.completed(1).is_empty());
        } else {
            assert_eq!(driver.wait(1, 1), [5]);
        }
        driver.reset();
    }
}

#[test]
fn interrupts_wait_while_they_are_masked() {
    let Setup { machine, device, _dir } = setup();
    let guest = Guest::new(&machine);
    machine.slot.bind(&guest.vm, &guest.router);
    let mut driver = Driver::new(&machine);
    driver.set_up(VERSION_1, 1);
    driver.set_config_vector(2);
    let set_vector = |vector: u64, masked: bool| {
        machine.write(TABLE + vector * 16, &0xfee0_0000u64.to_le_bytes());
        machine.write(TABLE + vector * 16 + 8, &u32::from(VECTOR).to_le_bytes());
        machine.write(TABLE + vector * 16 + 12, &u32::from(masked).to_le_bytes());
    };
    let control = machine.msix() + 2;
    set_vector(0, false);
    set_vector(2, true);
    machine.config_write(control, &0x8000u16.to_le_bytes());
    driver.driver_ok();
    let mut head = 0;
    let mut request = |driver: &mut Driver<'_>| {
        head = (head + 1) % 60;
        driver.submit(0, head, &[(driver.buffers(0), 16, false)]);
        driver.notify(0);
        assert_eq!(driver.wait(0, 1), [head]);
    };
    // Unmasked: by irqfd, in the kernel.
    request(&mut driver);
    until("interrupt", || guest.interrupted());
    // Masked by vector, then by function.
    for masked_by_vector in [true, false] {
        if masked_by_vector {
            set_vector(0, true);
        } else {
            machine.config_write(control, &0xc000u16.to_le_bytes());
        }
        request(&mut driver);
        until("pending bit", || machine.read::<8>(PENDING) == 1u64.to_le_bytes());
        assert!(!guest.interrupted());
        if masked_by_vector {
            set_vector(0, false);
        } else {
            machine.config_write(control, &0x8000u16.to_le_bytes());
        }
        until("interrupt", || guest.interrupted());
        assert_eq!(machine.read::<8>(PENDING), [0; 8]);
    }
    // The vector of configuration changes is masked.
    device.change_config(vec![1; 60]);
    until("pending bit", || machine.read::<8>(PENDING) == 4u64.to_le_bytes());
    assert!(!guest.interrupted());
    set_vector(2, false);
    assert!(guest.interrupted());
    device.change_config(vec![2; 60]);
    until("interrupt", || guest.interrupted());
    // No vector, no interrupt.
    driver.set_vector(0, 0xffff);
    request(&mut driver);
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert!(!guest.interrupted());
    // What the device signalled meanwhile is one interrupt too many, which a driver has to bear.
    driver.set_vector(0, 2);
    until("interrupt", || guest.interrupted());
    request(&mut driver);
    until("interrupt", || guest.interrupted());
}

#[test]
fn a_slot_moves_from_one_vm_to_the_next() {
    let Setup { machine, device, _dir } = setup();
    for _ in 0..3 {
        let mut guest = Guest::new(&machine);
        machine.slot.bind(&guest.vm, &guest.router);
        let mut driver = Driver::new(&machine);
        driver.set_up(VERSION_1, 1);
        machine.write(TABLE, &0xfee0_0000u64.to_le_bytes());
        machine.write(TABLE + 8, &u32::from(VECTOR).to_le_bytes());
        machine.write(TABLE + 12, &[0; 4]);
        machine.config_write(machine.msix() + 2, &0x8000u16.to_le_bytes());
        driver.driver_ok();
        driver.submit(0, 1, &[(driver.buffers(0), 16, false)]);
        assert!(!guest.write(&machine, machine.bar() + NOTIFY));
        assert_eq!(driver.wait(0, 1), [1]);
        until("interrupt", || guest.interrupted());
        let _ = machine.slot.reset();
        machine.slot.unbind();
    }
    assert_eq!(device.seen(request::SET_VRING_KICK).len(), 3);
    assert_eq!(machine.slot.info().reconnects, 0);
}
