//! Dispatch of port and memory accesses to what answers them.

use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::exits::Exit;

/// Something that answers accesses within one address range. Called from vCPU threads, several at once: it must not
/// block and must not panic, whatever the guest does.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes (1, 2, 4 or 8) at `offset` from the start of the range. Bytes that mean nothing
    /// are all ones. Says what the access is to be counted as.
    fn read(&self, offset: u64, data: &mut [u8]) -> Exit;

    /// The guest writes `data` at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]) -> Exit;
}

/// An address space (ports or memory) with its devices. Fixed once the machine is built: what moves at run time (PCI BARs)
/// is dispatched by its owner inside one fixed window.
#[derive(Default)]
pub struct Bus {
    // Sorted by start, not overlapping. A handful of entries: a binary search beats a tree.
    ranges: Vec<(RangeInclusive<u64>, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Puts `device` at `range`. The platform's map is fixed, so an overlap is a mistake of ours, not of the guest.
    ///
    /// # Panics
    /// If the range overlaps another one.
    pub fn insert(&mut self, range: RangeInclusive<u64>, device: Arc<dyn BusDevice>) {
        let at = self.ranges.partition_point(|(r, _)| r.end() < range.start());
        assert!(self.ranges.get(at).is_none_or(|(r, _)| range.end() < r.start()), "overlap at {range:#x?}");
        self.ranges.insert(at, (range, device));
    }

    /// The guest reads: all ones (and `None`) where nobody answers.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Option<Exit> {
        if let Some((offset, device)) = self.find(address) {
            return Some(device.read(offset, data));
        }
        data.fill(0xff);
        None
    }

    /// The guest writes: ignored (and `None`) where nobody answers.
    pub fn write(&self, address: u64, data: &[u8]) -> Option<Exit> {
        self.find(address).map(|(offset, device)| device.write(offset, data))
    }

    fn find(&self, address: u64) -> Option<(u64, &dyn BusDevice)> {
        let at = self.ranges.partition_point(|(r, _)| *r.end() < address);
        let (range, device) = self.ranges.get(at)?;
        range.contains(&address).then(|| (address - range.start(), device.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) -> Exit {
            data.fill(self.0 + u8::try_from(offset).unwrap());
            Exit::IoSerial
        }
        fn write(&self, _offset: u64, _data: &[u8]) -> Exit {
            Exit::IoSerial
        }
    }

    #[test]
    fn accesses_reach_the_range_they_fall_into() {
        let mut bus = Bus::default();
        bus.insert(0x20..=0x2f, Arc::new(Echo(0x40)));
        bus.insert(0x10..=0x17, Arc::new(Echo(0x80)));
        let read = |address| {
            let mut data = [0];
            bus.read(address, &mut data).map(|_| data[0])
        };
        assert_eq!(
            [0x0f, 0x10, 0x17, 0x18, 0x20, 0x2f, 0x30].map(read),
            [None, Some(0x80), Some(0x87), None, Some(0x40), Some(0x4f), None]
        );
    }

    #[test]
    fn nobody_answers_with_all_ones() {
        let mut data = [0; 4];
        assert_eq!(Bus::default().read(7, &mut data), None);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn ranges_do_not_overlap() {
        let mut bus = Bus::default();
        bus.insert(0x10..=0x1f, Arc::new(Echo(0)));
        bus.insert(0x1f..=0x20, Arc::new(Echo(0)));
    }
}
