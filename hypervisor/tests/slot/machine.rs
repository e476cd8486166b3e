//! Whole machines with a slot, driven through what the crate offers to other programs.

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hypervisor::machine::{Call, Machine, MachineHandle, SlotOptions, Status};
use hypervisor::platform::layout;
use hypervisor::slot::{Notifications, Options};
use proto::v1::{BootSource, EndReason, HypervisorConfig, ShutdownMode, VmEnded};
use tempfile::NamedTempFile;

use crate::device::{Device, Fault, Script, request};
use crate::driver::{config, until};

/// Where the guest's code is loaded.
const ADDRESS: u32 = 0x20_0000;

/// 32-bit code that sets queue 0 of device 1 up, notifies it, prints a byte and halts; as an ELF file with a PVH note.
fn kernel() -> NamedTempFile {
    let bar = u32::try_from(*layout::PCI_WINDOW_32.start()).unwrap();
    let mut code = Vec::new();
    // mov dx, port; mov eax, value; out dx, eax: memory decoding of device 1.
    for (port, value) in [(0xcf8u16, 0x8000_0804u32), (0xcfc, 6)] {
        code.extend(
            [&[0x66, 0xba][..], &port.to_le_bytes(), &[0xb8], &value.to_le_bytes(), &[0xef]].concat(),
        );
    }
    // mov [address], value of 1, 2 or 4 bytes.
    let mut store = |offset: u32, value: &[u8]| {
        let opcode: &[u8] = match value.len() {
            1 => &[0xc6, 0x05],
            2 => &[0x66, 0xc7, 0x05],
            _ => &[0xc7, 0x05],
        };
        code.extend([opcode, &(bar + offset).to_le_bytes(), value].concat());
    };
    store(0x14, &[3]);
    // VIRTIO_F_VERSION_1, FEATURES_OK.
    store(0x08, &1u32.to_le_bytes());
    store(0x0c, &1u32.to_le_bytes());
    store(0x14, &[0xb]);
    store(0x16, &[0, 0]);
    store(0x18, &64u16.to_le_bytes());
    for (offset, address) in [(0x20, 0x30_0000u32), (0x28, 0x30_1000), (0x30, 0x30_2000)] {
        store(offset, &address.to_le_bytes());
        store(offset + 4, &[0; 4]);
    }
    store(0x1c, &[1, 0]);
    store(0x14, &[0xf]);
    store(0x4000, &[0, 0]);
    // mov dx, 0x3f8; mov al, 'k'; out dx, al; cli; hlt
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'k', 0xee, 0xfa, 0xf4]);

    let mut note = [4u32, 4, 18].iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    note.extend(b"Xen\0");
    note.extend(ADDRESS.to_le_bytes());
    let mut elf = vec![0; 64];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    elf[16..20].copy_from_slice(&[2, 0, 62, 0]);
    elf[32] = 64;
    elf[54..58].copy_from_slice(&[56, 0, 2, 0]);
    let parts = [(4u32, 0, &note), (1, u64::from(ADDRESS), &code)];
    let mut offset = 64 + 2 * 56;
    for (kind, address, part) in parts {
        elf.extend([kind, 7].iter().flat_map(|w| w.to_le_bytes()));
        let size = part.len() as u64;
        elf.extend([offset, address, address, size, size, 4].iter().flat_map(|w| w.to_le_bytes()));
        offset += size;
    }
    elf.extend([note, code].concat());
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&elf).unwrap();
    file
}

/// A machine that has booted that guest.
struct Running {
    handle: MachineHandle,
    status: Arc<Status>,
    thread: JoinHandle<VmEnded>,
    device: Device,
    _files: (tempfile::TempDir, NamedTempFile),
}

impl Running {
    fn start(options: SlotOptions) -> Self {
        let (dir, kernel) = (tempfile::tempdir().unwrap(), kernel());
        let path = dir.path().join("s.sock");
        let device = Device::start(&path, Script::default());
        let mut machine = Machine::with_slot_options(Instant::now(), options);
        let (handle, status) = (machine.handle(), Arc::clone(machine.status()));
        let boot = BootSource { kernel_path: kernel.path().to_str().unwrap().into(), ..Default::default() };
        machine
            .start(&HypervisorConfig {
                vm_id: "vm".into(),
                vcpus: 1,
                memory_bytes: 16 << 20,
                boot: Some(boot),
                slots: vec![config(&path)],
            })
            .unwrap();
        let thread = thread::spawn(move || machine.run());
        Self { handle, status, thread, device, _files: (dir, kernel) }
    }

    fn end(self) {
        self.handle.call(Call::Shutdown(ShutdownMode::Immediate, Box::new(|_| ())));
        assert_eq!(self.thread.join().unwrap().reason(), EndReason::Shutdown);
    }
}

#[test]
fn a_program_that_links_the_machine_gets_its_notifications() {
    let (sender, called) = channel();
    let sender = std::sync::Mutex::new(sender);
    let options: SlotOptions = Arc::new(move |slot| {
        let (id, sender) = (slot.id.clone(), sender.lock().unwrap().clone());
        let call = move |queue| sender.send((id.clone(), queue)).unwrap();
        Options { notifications: Notifications::Call(Arc::new(call)) }
    });
    let running = Running::start(options);
    let console = running.status.console().subscribe(true).wait(Some(Duration::from_secs(20)));
    assert_eq!(console.unwrap().data, b"k");
    assert_eq!(called.try_recv().unwrap(), ("s0".to_owned(), 0));
    let stats = running.status.stats();
    assert_eq!((stats.userspace_exits["mmio:slot-notify"], stats.data_path_exits), (1, 1));
    running.end();
}

#[test]
fn a_life_gets_new_memory_if_a_device_of_the_one_before_hangs() {
    let running = Running::start(Arc::new(|_| Options::default()));
    let device = &running.device;
    let rings = |count| until("rings", || device.seen(request::SET_VRING_ENABLE).len() == count);
    let reset = || {
        let (sender, answer) = channel();
        running.handle.call(Call::Reset(Box::new(move |result| sender.send(result).unwrap())));
        answer.recv().unwrap().unwrap();
    };
    rings(1);
    reset();
    rings(2);
    assert_eq!(device.seen(request::ADD_MEM_REG).len(), 1);
    device.script().fault = Some((request::GET_VRING_BASE, Fault::Hang));
    let start = Instant::now();
    reset();
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    rings(3);
    assert_eq!(device.seen(request::ADD_MEM_REG).len(), 2);
    assert_eq!(running.status.info().resets, 2);
    assert_eq!(running.status.stats().data_path_exits, 0);
    // And the end does not wait for it either.
    let start = Instant::now();
    running.end();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}
