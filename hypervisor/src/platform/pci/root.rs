//! The root bus: who is at which address, and who decodes which memory access.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU8, AtomicU32};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::access::{ConfigPorts, Ecam, Window};
use super::config::{ConfigSpace, Identity};
use super::{PciAddress, PciFunction, Placement};
use crate::exits::Exit;
use crate::platform::bus::BusDevice;

/// Device numbers of a bus; number 0 is the host bridge.
const DEVICES: usize = 32;

/// Why a function cannot be plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlugError {
    /// All 31 device numbers are taken.
    BusFull,
    /// No window has room for a BAR of so many bytes.
    NoWindow(u64),
}

impl fmt::Display for PlugError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PlugError::BusFull => write!(f, "a VM has at most {} PCI devices", DEVICES - 1),
            PlugError::NoWindow(size) => write!(f, "no room in the PCI windows for a BAR of {size} bytes"),
        }
    }
}

impl std::error::Error for PlugError {}

/// The bus. Lives through resets of the guest, as what is plugged into it does.
pub struct PciRoot {
    functions: RwLock<[Option<Arc<dyn PciFunction>>; DEVICES]>,
    windows: Arc<[RangeInclusive<u64>]>,
    // First address not yet given to a BAR, per window.
    free: Mutex<Vec<u64>>,
    /// Port 0xcf8.
    pub(super) config_address: AtomicU32,
    /// Port 0xcf9.
    pub(super) reset_control: AtomicU8,
    pub(super) request_reset: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciRoot").field("windows", &self.windows).finish_non_exhaustive()
    }
}

impl PciRoot {
    /// A bus with a host bridge. BARs are put into `windows`, in this order of preference. `request_reset` is called (on a vCPU
    /// thread: it must not block) when the guest asks for a reset by port 0xcf9.
    pub fn new(windows: &[RangeInclusive<u64>], request_reset: Box<dyn Fn() + Send + Sync>) -> Arc<Self> {
        let mut functions = [const { None }; DEVICES];
        functions[0] = Some(Arc::new(HostBridge::new()) as Arc<dyn PciFunction>);
        Arc::new(Self {
            functions: RwLock::new(functions),
            windows: windows.into(),
            free: Mutex::new(windows.iter().map(|w| *w.start()).collect()),
            config_address: AtomicU32::new(0),
            reset_control: AtomicU8::new(0),
            request_reset,
        })
    }

    /// Puts a function at the first free device number and its BAR at a free address.
    ///
    /// # Errors
    /// If there is no such number or address.
    pub fn plug(&self, function: Arc<dyn PciFunction>) -> Result<PciAddress, PlugError> {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        let number = functions.iter().position(Option::is_none).ok_or(PlugError::BusFull)?;
        let address = PciAddress(u8::try_from(number).map_err(|_| PlugError::BusFull)?);
        let bar = self.allocate(function.bar_size())?;
        function.place(Placement { address, bar, windows: Arc::clone(&self.windows) });
        functions[number] = Some(function);
        Ok(address)
    }

    fn allocate(&self, size: u64) -> Result<u64, PlugError> {
        if size == 0 {
            return Ok(0);
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        for (next, window) in free.iter_mut().zip(&*self.windows) {
            let Some(start) = next.checked_next_multiple_of(size) else { continue };
            let Some(end) = start.checked_add(size) else { continue };
            if end - 1 <= *window.end() {
                *next = end;
                return Ok(start);
            }
        }
        Err(PlugError::NoWindow(size))
    }

    /// Forgets what the guest left in the bus's own registers. What is plugged is reset by its owner.
    pub fn reset(&self) {
        self.config_address.store(0, std::sync::atomic::Ordering::Relaxed);
        self.reset_control.store(0, std::sync::atomic::Ordering::Relaxed);
    }

    /// What answers ports 0xcf8 to 0xcff, the reset control register 0xcf9 included.
    pub fn config_ports(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ConfigPorts(Arc::clone(self)))
    }

    /// What answers the 1 MiB of enhanced configuration access of bus 0.
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(Arc::clone(self)))
    }

    /// The windows and what answers each of them.
    pub fn windows(self: &Arc<Self>) -> Vec<(RangeInclusive<u64>, Arc<dyn BusDevice>)> {
        let device = |start| Arc::new(Window { root: Arc::clone(self), start }) as Arc<dyn BusDevice>;
        self.windows.iter().map(|w| (w.clone(), device(*w.start()))).collect()
    }

    pub(super) fn function(&self, device: usize) -> Option<Arc<dyn PciFunction>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).get(device)?.clone()
    }

    /// Who decodes an access of `len` bytes at `address`, and the offset in its BAR. The lowest device number wins where the
    /// guest has put BARs over one another.
    pub(super) fn decode(&self, address: u64, len: usize) -> Option<(Arc<dyn PciFunction>, u64)> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().flatten().find_map(|f| {
            let offset = address.checked_sub(f.bar()?)?;
            let end = offset.checked_add(len as u64)?;
            (end <= f.bar_size()).then(|| (Arc::clone(f), offset))
        })
    }
}

/// A host bridge that does nothing: guests look for one to find out whether configuration access works at all.
struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    fn new() -> Self {
        // The generic PCI Express host bridge of Red Hat's id space, known to guests as needing no driver.
        Self(Mutex::new(ConfigSpace::new(&Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: [0x06, 0x00, 0x00],
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })))
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u8, data: &mut [u8]) -> Option<Exit> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        None
    }

    fn write_config(&self, offset: u8, data: &[u8]) -> Option<Exit> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        None
    }

    fn bar_size(&self) -> u64 {
        0
    }

    fn bar(&self) -> Option<u64> {
        None
    }

    fn read_bar(&self, _offset: u64, data: &mut [u8]) -> Exit {
        data.fill(0xff);
        Exit::MmioUnclaimed
    }

    fn write_bar(&self, _offset: u64, _data: &[u8]) -> Exit {
        Exit::MmioUnclaimed
    }

    fn place(&self, _placement: Placement) {}
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::platform::pci::config;

    /// A function whose BAR echoes what was written last.
    struct Scratch {
        config: Mutex<ConfigSpace>,
        size: u64,
        last: AtomicU8,
    }

    impl Scratch {
        fn new(size: u64) -> Arc<Self> {
            let id = Identity {
                vendor: 0x1af4,
                device: 1,
                class: [0; 3],
                revision: 0,
                subsystem_vendor: 0,
                subsystem: 0,
            };
            Arc::new(Self { config: Mutex::new(ConfigSpace::new(&id)), size, last: AtomicU8::new(0) })
        }
    }

    impl PciFunction for Scratch {
        fn read_config(&self, offset: u8, data: &mut [u8]) -> Option<Exit> {
            self.config.lock().unwrap().read(offset, data);
            None
        }
        fn write_config(&self, offset: u8, data: &[u8]) -> Option<Exit> {
            self.config.lock().unwrap().write(offset, data);
            None
        }
        fn bar_size(&self) -> u64 {
            self.size
        }
        fn bar(&self) -> Option<u64> {
            self.config.lock().unwrap().bar()
        }
        fn read_bar(&self, offset: u64, data: &mut [u8]) -> Exit {
            data.fill(self.last.load(Ordering::Relaxed).wrapping_add(u8::try_from(offset & 0xff).unwrap()));
            Exit::MmioSlotDevice
        }
        fn write_bar(&self, _offset: u64, data: &[u8]) -> Exit {
            self.last.store(data[0], Ordering::Relaxed);
            Exit::MmioSlotDevice
        }
        fn place(&self, placement: Placement) {
            self.config.lock().unwrap().set_bar(self.size, placement.bar);
        }
    }

    const LOW: RangeInclusive<u64> = 0xc000_0000..=0xc000_ffff;
    const HIGH: RangeInclusive<u64> = 0x40_0000_0000..=0x40_ffff_ffff;

    fn root() -> (Arc<PciRoot>, Arc<AtomicUsize>) {
        let resets = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&resets);
        let request = Box::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        (PciRoot::new(&[LOW, HIGH], request), resets)
    }

    #[test]
    fn bars_are_placed_aligned_and_spill_into_the_next_window() {
        let (root, _) = root();
        let functions: Vec<_> = [0x1000, 0x8000, 0x8000, 0x1000].map(Scratch::new).into();
        for (i, f) in functions.iter().enumerate() {
            assert_eq!(root.plug(Arc::clone(f) as _).unwrap(), PciAddress(u8::try_from(i + 1).unwrap()));
            f.write_config(config::COMMAND, &config::COMMAND_MEMORY.to_le_bytes());
        }
        let bars: Vec<_> = functions.iter().map(|f| f.bar().unwrap()).collect();
        assert_eq!(bars, [0xc000_0000, 0xc000_8000, 0x40_0000_0000, 0x40_0000_8000]);
        assert_eq!(root.plug(Scratch::new(1 << 40)).unwrap_err(), PlugError::NoWindow(1 << 40));
    }

    #[test]
    fn a_full_bus_says_so() {
        let (root, _) = root();
        for _ in 0..31 {
            root.plug(Scratch::new(0x1000)).unwrap();
        }
        assert_eq!(root.plug(Scratch::new(0x1000)).unwrap_err(), PlugError::BusFull);
    }

    #[test]
    fn memory_accesses_follow_the_bar() {
        let (root, _) = root();
        let f = Scratch::new(0x1000);
        root.plug(Arc::clone(&f) as _).unwrap();
        let (_, window) = root.windows().swap_remove(0);
        let mut data = [0; 4];
        assert_eq!(window.read(0, &mut data), Exit::MmioUnclaimed);
        assert_eq!(data, [0xff; 4]);
        f.write_config(config::COMMAND, &config::COMMAND_MEMORY.to_le_bytes());
        window.write(0, &[7]);
        assert_eq!(window.read(2, &mut data), Exit::MmioSlotDevice);
        assert_eq!(data, [9; 4]);
        f.write_config(config::BAR0, &0xc000_4000u32.to_le_bytes());
        assert_eq!(window.read(2, &mut data), Exit::MmioUnclaimed);
        assert_eq!(window.read(0x4002, &mut data), Exit::MmioSlotDevice);
        // An access that only starts in the BAR is nobody's.
        assert_eq!(window.read(0x4ffe, &mut data), Exit::MmioUnclaimed);
    }

    #[test]
    fn configuration_by_ports_and_by_ecam_is_the_same() {
        let (root, resets) = root();
        root.plug(Scratch::new(0x1000)).unwrap();
        let (ports, ecam) = (root.config_ports(), root.ecam());
        let mut data = [0; 4];
        ports.write(0, &0x8000_0800u32.to_le_bytes());
        assert_eq!(ports.read(4, &mut data), Exit::IoPciConfig);
        assert_eq!(u32::from_le_bytes(data), 0x0001_1af4);
        ports.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0800);
        ports.write(0, &0x8000_0804u32.to_le_bytes());
        ports.write(4, &[2, 0]);
        ecam.read(1 << 15 | 4, &mut data);
        assert_eq!(data[0], 2);
        let mut wide = [0; 8];
        assert_eq!(ecam.read(1 << 15, &mut wide), Exit::MmioPciConfig);
        assert_eq!(u64::from_le_bytes(wide), 0x0000_0002_0001_1af4);
        // No such device, no such function, not enabled, beyond 256 bytes.
        for offset in [2 << 15, 1 << 15 | 1 << 12, 1 << 15 | 0x100] {
            ecam.read(offset, &mut data);
            assert_eq!(data, [0xff; 4]);
        }
        ports.write(0, &0x0000_0800u32.to_le_bytes());
        ports.read(4, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(resets.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn port_0xcf9_resets() {
        let (root, resets) = root();
        let ports = root.config_ports();
        assert_eq!(ports.write(1, &[0x02]), Exit::IoReset);
        assert_eq!(resets.load(Ordering::Relaxed), 0);
        ports.write(1, &[0x06]);
        assert_eq!(resets.load(Ordering::Relaxed), 1);
        let mut data = [0];
        assert_eq!(ports.read(1, &mut data), Exit::IoReset);
        assert_eq!(data, [0x02]);
    }

    proptest::proptest! {
        #[test]
        fn no_access_panics(
            accesses in proptest::collection::vec(
                (0..3usize, 0..0x20_0000u64, 1..=8usize, proptest::bool::ANY, proptest::num::u64::ANY), 1..200)
        ) {
            let (root, _) = root();
            root.plug(Scratch::new(0x1000)).unwrap();
            let devices = [root.config_ports(), root.ecam(), root.windows().swap_remove(0).1];
            for (device, offset, len, write, value) in accesses {
                let bytes = value.to_le_bytes();
                let mut data = [0; 8];
                let offset = if device == 0 { offset % 8 } else { offset };
                if write {
                    devices[device].write(offset, &bytes[..len]);
                } else {
                    devices[device].read(offset, &mut data[..len]);
                }
            }
        }
    }
}
