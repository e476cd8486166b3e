//! The driver's side: a machine with one slot and no vCPU, and a driver for it.

use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hypervisor::exits::Exit;
use hypervisor::memory::GuestRam;
use hypervisor::platform::bus::BusDevice;
use hypervisor::platform::layout;
use hypervisor::platform::pci::PciRoot;
use hypervisor::slot::{LinkState, Options, Slot, SlotHost};
use proto::v1::SlotConfig;
use vm_memory::{Bytes, GuestAddress};

pub(crate) const VERSION_1: u64 = 1 << 32;

/// Waits until `condition`, or fails.
#[track_caller]
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "it never happened: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a slot told its host.
#[derive(Default)]
pub(crate) struct Events(Mutex<Vec<String>>);

impl Events {
    pub(crate) fn has(&self, text: &str) -> bool {
        self.0.lock().unwrap().iter().any(|e| e.contains(text))
    }
}

impl SlotHost for Events {
    fn link_changed(&self, slot: &str, state: LinkState, reason: &str) {
        self.0.lock().unwrap().push(format!("{slot} {} {reason}", state.as_str_name()));
    }

    fn config_changed(&self, slot: &str) {
        self.0.lock().unwrap().push(format!("{slot} config"));
    }
}

/// A machine with one slot at device 1.
pub(crate) struct Machine {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) slot: Arc<Slot>,
    pub(crate) events: Arc<Events>,
    ecam: Arc<dyn BusDevice>,
    window: Arc<dyn BusDevice>,
}

/// Offset in the ECAM of device 1.
const DEVICE: u64 = 1 << 15;
const COMMAND: u64 = 4;
const BAR: u64 = 0x10;

pub(crate) fn config(socket: &Path) -> SlotConfig {
    SlotConfig {
        id: "s0".into(),
        socket_path: socket.display().to_string(),
        virtio_device_id: 2,
        ..Default::default()
    }
}

impl Machine {
    pub(crate) fn new(config: &SlotConfig) -> Self {
        Self::with_ram(config, 16 << 20)
    }

    pub(crate) fn with_ram(config: &SlotConfig, bytes: u64) -> Self {
        Self::with(config, bytes, Options::default())
    }

    /// Goes on with other memory, as after a reset that left the old in doubt.
    pub(crate) fn replace_memory(&mut self) {
        self.ram = Arc::new(GuestRam::new(self.ram.size()).unwrap());
        self.slot.replace_memory(Arc::clone(&self.ram));
    }

    pub(crate) fn with(config: &SlotConfig, bytes: u64, options: Options) -> Self {
        let ram = Arc::new(GuestRam::new(bytes).unwrap());
        let events = Arc::new(Events::default());
        let slot = Slot::connect_with(config, Arc::clone(&ram), Arc::clone(&events) as _, options).unwrap();
        let root = PciRoot::new(&[layout::PCI_WINDOW_32], Box::new(|| ()));
        root.plug(Arc::clone(&slot) as _).unwrap();
        let window = root.windows().swap_remove(0).1;
        Self { ecam: root.ecam(), ram, slot, events, window }
    }

    pub(crate) fn config_read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.ecam.read(DEVICE + offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn config_write(&self, offset: u64, data: &[u8]) -> Exit {
        self.ecam.write(DEVICE + offset, data)
    }

    pub(crate) fn bar(&self) -> u64 {
        u64::from(self.config_read(BAR) & !0xf) | u64::from(self.config_read(BAR + 4)) << 32
    }

    pub(crate) fn move_bar(&self, address: u64) {
        self.config_write(BAR, &(address as u32).to_le_bytes());
        self.config_write(BAR + 4, &((address >> 32) as u32).to_le_bytes());
    }

    pub(crate) fn decode(&self, on: bool) {
        self.config_write(COMMAND, &(if on { 6u16 } else { 0 }).to_le_bytes());
    }

    pub(crate) fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.window.read(self.bar() + offset - layout::PCI_WINDOW_32.start(), &mut data);
        data
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Exit {
        self.window.write(self.bar() + offset - layout::PCI_WINDOW_32.start(), data)
    }

    /// Reads as [`Machine::read`], whatever the length and wherever the BAR.
    pub(crate) fn read_anywhere(&self, offset: u64, length: usize) {
        self.window.read(self.in_window(offset), &mut [0; 8][..length]);
    }

    /// Writes as [`Machine::write`], wherever the BAR.
    pub(crate) fn write_anywhere(&self, offset: u64, data: &[u8]) {
        self.window.write(self.in_window(offset), data);
    }

    fn in_window(&self, offset: u64) -> u64 {
        (self.bar().wrapping_add(offset)).wrapping_sub(*layout::PCI_WINDOW_32.start())
    }

    /// Offset in configuration space of the MSI-X capability.
    pub(crate) fn msix(&self) -> u64 {
        let mut at = u64::from(self.config_read(0x34) & 0xff);
        while self.config_read(at) & 0xff != 0x11 {
            at = u64::from((self.config_read(at) >> 8) & 0xff);
        }
        at
    }

    /// Offsets in configuration space of the virtio capabilities, by `cfg_type`.
    pub(crate) fn capability(&self, kind: u8) -> Option<u64> {
        let mut at = u64::from(self.config_read(0x34) & 0xff);
        while at != 0 {
            let word = self.config_read(at);
            if word & 0xff == 9 && (word >> 24) as u8 == kind {
                return Some(at);
            }
            at = u64::from((word >> 8) & 0xff);
        }
        None
    }

    fn structure(&self, kind: u8) -> u64 {
        u64::from(self.config_read(self.capability(kind).unwrap() + 8))
    }
}

/// A driver as a guest would have it.
pub(crate) struct Driver<'a> {
    pub(crate) machine: &'a Machine,
    common: u64,
    notify: u64,
    isr: u64,
    device: Option<u64>,
    // Next entry of the available ring and entries seen of the used ring, per queue.
    queues: Vec<(u16, u16)>,
    /// Guest-physical address from which the driver uses memory.
    pub(crate) base: u64,
}

pub(crate) const SIZE: u16 = 64;
const STATUS: u64 = 0x14;
/// Room for the rings and buffers of one queue.
const QUEUE_MEMORY: u64 = 0x10_0000;

impl<'a> Driver<'a> {
    /// Finds the structures and resets the device.
    pub(crate) fn new(machine: &'a Machine) -> Self {
        machine.decode(true);
        let driver = Self {
            machine,
            common: machine.structure(1),
            notify: machine.structure(2),
            isr: machine.structure(3),
            device: machine.capability(4).map(|_| machine.structure(4)),
            queues: Vec::new(),
            base: QUEUE_MEMORY,
        };
        driver.set_status(0);
        until("reset", || driver.status() == 0);
        driver
    }

    pub(crate) fn status(&self) -> u8 {
        self.machine.read::<1>(self.common + STATUS)[0]
    }

    pub(crate) fn set_status(&self, status: u8) {
        self.machine.write(self.common + STATUS, &[status]);
    }

    pub(crate) fn generation(&self) -> u8 {
        self.machine.read::<1>(self.common + 0x15)[0]
    }

    pub(crate) fn num_queues(&self) -> u16 {
        u16::from_le_bytes(self.machine.read(self.common + 0x12))
    }

    pub(crate) fn features(&self) -> u64 {
        (0..2u32)
            .map(|half| {
                self.machine.write(self.common, &half.to_le_bytes());
                u64::from(u32::from_le_bytes(self.machine.read(self.common + 4))) << (32 * half)
            })
            .sum()
    }

    /// Accepts features and sets up so many queues; DRIVER_OK is left to the caller.
    pub(crate) fn set_up(&mut self, features: u64, queues: u16) {
        self.set_status(1 | 2);
        for half in 0..2u32 {
            self.machine.write(self.common + 8, &half.to_le_bytes());
            self.machine.write(self.common + 0xc, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        self.set_status(1 | 2 | 8);
        assert_eq!(self.status(), 11, "features refused");
        self.queues.clear();
        for queue in 0..queues {
            let memory = self.memory(queue);
            self.machine
                .ram
                .memory()
                .write_slice(&vec![0; QUEUE_MEMORY as usize], GuestAddress(memory))
                .unwrap();
            self.set_queue(queue, memory, memory + 0x1000, memory + 0x2000, queue);
            self.queues.push((0, 0));
        }
    }

    pub(crate) fn memory(&self, queue: u16) -> u64 {
        self.base + u64::from(queue) * QUEUE_MEMORY
    }

    /// Where the driver may put data of a queue.
    pub(crate) fn buffers(&self, queue: u16) -> u64 {
        self.memory(queue) + 0x4000
    }

    pub(crate) fn set_queue(&self, queue: u16, descriptors: u64, available: u64, used: u64, vector: u16) {
        let write = |offset, data: &[u8]| self.machine.write(self.common + offset, data);
        write(0x16, &queue.to_le_bytes());
        write(0x18, &SIZE.to_le_bytes());
        write(0x1a, &vector.to_le_bytes());
        for (offset, address) in [(0x20, descriptors), (0x28, available), (0x30, used)] {
            write(offset, &(address as u32).to_le_bytes());
            write(offset + 4, &((address >> 32) as u32).to_le_bytes());
        }
        write(0x1c, &1u16.to_le_bytes());
    }

    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.machine.write(self.common + 0x10, &vector.to_le_bytes());
    }

    pub(crate) fn set_vector(&self, queue: u16, vector: u16) {
        self.machine.write(self.common + 0x16, &queue.to_le_bytes());
        self.machine.write(self.common + 0x1a, &vector.to_le_bytes());
    }

    pub(crate) fn driver_ok(&self) {
        self.set_status(1 | 2 | 4 | 8);
    }

    /// Ready with `features` and `queues`.
    pub(crate) fn start(machine: &'a Machine, features: u64, queues: u16) -> Self {
        let mut driver = Self::new(machine);
        driver.set_up(features, queues);
        driver.driver_ok();
        driver
    }

    /// Puts one request into a queue without notifying: buffers by address, length and whether the device writes them. The first
    /// descriptor is `head`.
    pub(crate) fn submit(&mut self, queue: u16, head: u16, buffers: &[(u64, u32, bool)]) {
        let memory = self.memory(queue);
        let ram = self.machine.ram.memory();
        for (i, &(address, length, writable)) in buffers.iter().enumerate() {
            let index = head + i as u16;
            let more = i + 1 < buffers.len();
            let flags = u64::from(more) | u64::from(writable) << 1;
            let low = u64::from(length) | flags << 32 | u64::from(index + 1) << 48;
            let at = memory + u64::from(index) * 16;
            ram.write_obj(address, GuestAddress(at)).unwrap();
            ram.write_obj(low, GuestAddress(at + 8)).unwrap();
        }
        let (next, _) = &mut self.queues[usize::from(queue)];
        let slot = u64::from(*next % SIZE);
        ram.write_obj(head, GuestAddress(memory + 0x1000 + 4 + slot * 2)).unwrap();
        *next = next.wrapping_add(1);
        fence(Ordering::SeqCst);
        ram.store(*next, GuestAddress(memory + 0x1000 + 2), Ordering::Release).unwrap();
    }

    pub(crate) fn notify(&self, queue: u16) {
        let exit = self.machine.write(self.notify + u64::from(queue) * 0x1000, &queue.to_le_bytes());
        assert_eq!(exit, Exit::MmioSlotNotify);
    }

    /// Requests done since last asked: their heads.
    pub(crate) fn completed(&mut self, queue: u16) -> Vec<u16> {
        let memory = self.memory(queue);
        let ram = self.machine.ram.memory();
        let (_, seen) = &mut self.queues[usize::from(queue)];
        let used: u16 = ram.load(GuestAddress(memory + 0x2000 + 2), Ordering::Acquire).unwrap();
        let mut heads = Vec::new();
        while *seen != used {
            let at = memory + 0x2000 + 4 + u64::from(*seen % SIZE) * 8;
            heads.push(ram.read_obj::<u32>(GuestAddress(at)).unwrap() as u16);
            *seen = seen.wrapping_add(1);
        }
        heads
    }

    /// Waits for `count` requests of a queue to be done.
    #[track_caller]
    pub(crate) fn wait(&mut self, queue: u16, count: usize) -> Vec<u16> {
        let mut heads = Vec::new();
        until("completion", || {
            heads.extend(self.completed(queue));
            heads.len() >= count
        });
        heads
    }

    pub(crate) fn isr(&self) -> u8 {
        self.machine.read::<1>(self.isr)[0]
    }

    pub(crate) fn device_config<const N: usize>(&self, offset: u64) -> [u8; N] {
        self.machine.read(self.device.expect("a device configuration") + offset)
    }

    pub(crate) fn write_device_config(&self, offset: u64, data: &[u8]) {
        self.machine.write(self.device.expect("a device configuration") + offset, data);
    }

    pub(crate) fn reset(&self) {
        self.set_status(0);
        until("reset", || self.status() == 0);
    }

    /// Tries to set a queue up while the device is being reset.
    pub(crate) fn set_up_is_ignored(&self) {
        self.set_queue(0, 0x1000, 0x2000, 0x3000, 0);
        self.driver_ok();
        self.machine.write(self.common + 0x16, &0u16.to_le_bytes());
        assert_ne!(self.machine.read::<8>(self.common + 0x20), 0x1000u64.to_le_bytes());
    }
}
