//! virtio devices: finding them, the handshake (VirtIO 1.3, 3.1), queues.

mod mmio;
mod pci;

use crate::apic::Vector;
use crate::memory::{Dma, Registers};
use crate::time::{self, Clock};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::Cell;
use guest::args::{Device as Wanted, Plan};
use guest::json::Object;
use guest::ring::{Layout, SplitQueue};

/// `VIRTIO_F_INDIRECT_DESC`, `VIRTIO_F_EVENT_IDX`, `VIRTIO_F_VERSION_1`, `VIRTIO_F_ACCESS_PLATFORM`.
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;

/// Device IDs (VirtIO 1.3, 5).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Type {
    Net = 1,
    Block = 2,
}

impl Type {
    /// The name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "blk",
        }
    }
}

/// The registers of a device, by either transport.
#[derive(Clone)]
enum Transport {
    Pci(pci::Pci),
    Mmio(mmio::Mmio),
}

macro_rules! both {
    ($transport:expr, $t:ident => $e:expr) => {
        match $transport {
            Transport::Pci($t) => $e,
            Transport::Mmio($t) => $e,
        }
    };
}

/// A device that was found.
pub(crate) struct Found {
    kind: u32,
    transport: Transport,
    taken: Cell<bool>,
}

/// Finds all virtio devices: PCI functions first, then virtio-mmio in command-line order.
pub(crate) fn find(plan: &Plan<'_>, rsdp: u64) -> Result<Vec<Found>, String> {
    let mut found = Vec::new();
    for function in crate::pci::scan(plan.pci, rsdp)? {
        if let Some(kind) = pci::kind(&function) {
            let transport = Transport::Pci(pci::Pci::new(function)?);
            found.push(Found { kind, transport, taken: Cell::new(false) });
        }
    }
    for device in &plan.mmio {
        let (kind, transport) = mmio::Mmio::new(device)?;
        found.push(Found { kind, transport: Transport::Mmio(transport), taken: Cell::new(false) });
    }
    Ok(found)
}

/// Rings a queue's bell.
#[derive(Clone, Copy)]
pub(crate) struct Doorbell {
    registers: Registers,
    queue: u16,
    wide: bool,
}

impl Doorbell {
    /// Notifies the device (VirtIO 1.3, 4.1.5.2 and 4.2.2).
    pub(crate) fn ring(&self) {
        if self.wide {
            self.registers.write(0, u32::from(self.queue));
        } else {
            self.registers.write(0, self.queue);
        }
    }
}

/// Notifications either way.
#[derive(Clone, Copy, Default)]
pub(crate) struct Signals {
    /// Doorbells rung.
    pub(crate) kicks: u64,
    /// Interrupts taken.
    pub(crate) interrupts: u64,
    /// Time the doorbells took, in ticks, and the longest of them.
    ticks: u64,
    longest: u64,
}

impl Signals {
    /// Adds them to a result: those after the warm-up, and all of them.
    pub(crate) fn report(event: Object, measured: Self, total: Self, clock: &Clock) -> Object {
        event
            .number("kicks", measured.kicks)
            .number("irqs", measured.interrupts)
            .number("total_kicks", total.kicks)
            .number("total_irqs", total.interrupts)
            .number("kick_us", clock.micros(total.ticks))
            .number("max_kick_ns", clock.nanos(total.longest))
    }
}

impl core::ops::Add for Signals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            kicks: self.kicks + other.kicks,
            interrupts: self.interrupts + other.interrupts,
            ticks: self.ticks + other.ticks,
            longest: self.longest.max(other.longest),
        }
    }
}

/// A queue in use.
pub(crate) struct Queue {
    /// The ring.
    pub(crate) ring: SplitQueue,
    /// Its doorbell.
    pub(crate) bell: Doorbell,
    /// Since the beginning of the I/O phase, and when the warm-up ended.
    total: Signals,
    warmup: Signals,
    vector: Option<Vector>,
    /// The ring's memory lives as long as the ring.
    _memory: Dma,
}

impl Queue {
    /// Publishes what was pushed and notifies the device if it wants that.
    pub(crate) fn kick(&mut self) {
        if self.ring.publish() {
            let begun = time::now();
            self.bell.ring();
            let took = time::now() - begun;
            self.total.kicks += 1;
            self.total.ticks += took;
            self.total.longest = self.total.longest.max(took);
        }
    }

    fn interrupts(&self) -> u64 {
        self.vector.map_or(0, |vector| vector.count())
    }

    /// The I/O phase begins: what came before does not count.
    pub(crate) fn begin(&mut self) {
        // Interrupts are counted by the vector, so here is how many it had.
        self.total = Signals { interrupts: self.interrupts(), ..Signals::default() };
        self.warmup = Signals::default();
    }

    /// The warm-up ends.
    pub(crate) fn measure(&mut self) {
        self.warmup = self.signals();
    }

    /// Since the beginning of the I/O phase.
    pub(crate) fn signals(&self) -> Signals {
        Signals { interrupts: self.interrupts() - self.total.interrupts, ..self.total }
    }

    /// Since the warm-up.
    pub(crate) fn measured(&self) -> Signals {
        let total = self.signals();
        Signals {
            kicks: total.kicks - self.warmup.kicks,
            interrupts: total.interrupts - self.warmup.interrupts,
            ..total
        }
    }
}

/// A device in use. Dropping it resets the device.
pub(crate) struct Device<'a> {
    found: &'a Found,
    clock: Clock,
    offered: u64,
    /// Features in force.
    pub(crate) features: u64,
    interrupts: bool,
    vectors: bool,
    ring_size: u16,
    config_vector: Option<Vector>,
    /// Interrupts that had been taken when the last one was acknowledged.
    acknowledged: Cell<u64>,
}

/// Where a job's device is in its life, for the report.
pub(crate) struct Health {
    pub(crate) needs_reset: bool,
    pub(crate) config_interrupts: u64,
}

impl<'a> Device<'a> {
    /// Resets the wanted device and agrees on features: those of `wanted_features` that it offers and that are not refused.
    pub(crate) fn open(
        all: &'a [Found],
        kind: Type,
        wanted: &Wanted<'_>,
        wanted_features: u64,
        clock: Clock,
    ) -> Result<Self, String> {
        let mut of_kind = all.iter().filter(|found| found.kind == kind as u32);
        let found = of_kind.nth(wanted.index).ok_or_else(|| {
            let count = all.iter().filter(|found| found.kind == kind as u32).count();
            let name = kind.name();
            alloc::format!(
                "dev={}: there are {count} {name} devices on PCI bus 0 and the command line",
                wanted.index
            )
        })?;
        if found.taken.replace(true) {
            return Err(alloc::format!("dev={}: another job of this stage uses this device", wanted.index));
        }
        let mut this = Self {
            found,
            clock,
            offered: 0,
            features: 0,
            interrupts: wanted.interrupts,
            vectors: wanted.vectors || wanted.interrupts,
            ring_size: wanted.ring,
            config_vector: None,
            acknowledged: Cell::new(u64::MAX),
        };
        let mut mask = wanted_features | INDIRECT_DESC | EVENT_IDX;
        for (name, feature) in [("indirect", INDIRECT_DESC), ("eventidx", EVENT_IDX)] {
            if wanted.refuses(name) {
                mask &= !feature;
            }
        }
        this.handshake(mask)?;
        Ok(this)
    }

    fn handshake(&mut self, mask: u64) -> Result<(), String> {
        self.reset()?;
        both!(&self.found.transport, t => {
            t.set_status(ACKNOWLEDGE);
            t.set_status(ACKNOWLEDGE | DRIVER);
            self.offered = t.features();
            if self.offered & VERSION_1 == 0 {
                return Err("the device is a legacy one: it does not offer VIRTIO_F_VERSION_1 (disable-legacy=on)".to_string());
            }
            self.features = self.offered & (mask | VERSION_1);
            t.set_features(self.features);
            t.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
            if t.status() & FEATURES_OK == 0 {
                return Err(alloc::format!("the device refuses the features {:#x}", self.features));
            }
        });
        if self.vectors {
            crate::apic::enable(&self.clock)?;
            let vector = Vector::take();
            both!(&self.found.transport, t => t.set_config_vector(&vector)?);
            self.config_vector = Some(vector);
        }
        Ok(())
    }

    /// Resets the device and waits until it says so.
    fn reset(&self) -> Result<(), String> {
        both!(&self.found.transport, t => {
            t.disable_interrupts();
            t.set_status(0);
            for _ in 0..50_000 {
                if t.status() == 0 {
                    return Ok(());
                }
                self.clock.delay(100);
            }
        });
        Err("the device does not finish its reset".to_string())
    }

    /// Whether a feature is in force.
    pub(crate) fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Sets up queue `index`.
    pub(crate) fn queue(&self, index: u16) -> Result<Queue, String> {
        let max = both!(&self.found.transport, t => t.select_queue(index));
        if max == 0 {
            return Err(alloc::format!("the device has no queue {index}: fewer queues="));
        }
        // A size that is no power of two is rounded down: rings are masked here.
        let size = self.ring_size.min(max).min(guest::ring::MAX_SIZE);
        let size = 1 << size.ilog2();
        let memory = Dma::new(Layout::new(size).bytes)?;
        // SAFETY: the block has the ring's size and alignment and stays with the queue.
        let ring = unsafe { SplitQueue::new(memory.pointer(), size, self.has(EVENT_IDX)) };
        let vector = self.vectors.then(Vector::take);
        let bell =
            both!(&self.found.transport, t => t.start_queue(index, size, ring.addresses(), vector.as_ref())?);
        let (total, warmup) = (Signals::default(), Signals::default());
        Ok(Queue { ring, bell, total, warmup, vector, _memory: memory })
    }

    /// Tells the device to go.
    pub(crate) fn start(&self) {
        both!(&self.found.transport, t => t.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK));
    }

    /// Reads `N` bytes of the device's configuration, all of one generation (VirtIO 1.3, 2.5.4).
    pub(crate) fn config<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        both!(&self.found.transport, t => {
            // A device that changes its mind all the time is taken as it is.
            for _ in 0..16 {
                let before = t.generation();
                t.config(offset, &mut bytes);
                if t.generation() == before {
                    break;
                }
            }
        });
        bytes
    }

    /// The generation of the configuration.
    pub(crate) fn generation(&self) -> u32 {
        both!(&self.found.transport, t => t.generation())
    }

    /// Configuration-change interrupts so far.
    pub(crate) fn config_interrupts(&self) -> u64 {
        self.config_vector.map_or(0, |vector| vector.count())
    }

    /// A level that virtio-mmio keeps raised until it is acknowledged. An exit to the VMM, so only after interrupts. Call it before looking
    /// at the rings.
    pub(crate) fn acknowledge(&self) {
        if let (Transport::Mmio(t), true) = (&self.found.transport, self.interrupts) {
            let taken = crate::gate::interrupts();
            if self.acknowledged.replace(taken) != taken {
                t.acknowledge();
            }
        }
    }

    /// Looks at the device's status.
    pub(crate) fn health(&self) -> Health {
        let status = both!(&self.found.transport, t => t.status());
        Health { needs_reset: status & NEEDS_RESET != 0, config_interrupts: self.config_interrupts() }
    }

    /// The beginning of the `device` event.
    pub(crate) fn describe(&self, kind: Type, queues: usize, ring: u16) -> Object {
        let (bus, at) = match &self.found.transport {
            Transport::Pci(t) => ("pci", t.function().to_string()),
            Transport::Mmio(t) => ("mmio", alloc::format!("{:#x}", t.address())),
        };
        Object::event("device")
            .text("bus", bus)
            .text("at", at)
            .text("kind", kind.name())
            .hex("offered", self.offered)
            .hex("accepted", self.features)
            .number("queues", queues as u64)
            .number("qsize", ring)
            .text("mode", if self.interrupts { "irq" } else { "poll" })
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        // Its memory is about to be reused. One that does not finish a reset keeps the report it already got.
        if self.reset().is_err() {
            crate::serial::print(Object::event("error").text("what", "the device does not finish its reset"));
        }
        self.found.taken.set(false);
    }
}
