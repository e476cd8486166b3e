//! The configuration space of a slot's device, as the driver sees it, and what the driver wrote to it.
//!
//! The device's process may die at any time, and with it what the driver told it. So what the driver wrote is kept until the device
//! is reset, and told again to a device that is back before it gets its rings.

use std::collections::VecDeque;

/// Writes that wait for the link, and writes that are kept: so many each. A driver makes a handful in its life; one that floods
/// loses what is beyond.
const MAX_WRITES: usize = 64;

/// A write of the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ConfigWrite {
    /// Offset of its first byte.
    pub(super) offset: u32,
    /// What is written.
    pub(super) data: Vec<u8>,
}

impl ConfigWrite {
    fn range(&self) -> std::ops::Range<usize> {
        self.offset as usize..self.offset as usize + self.data.len()
    }

    /// Whether nothing of `self` is left after `later`.
    fn is_covered_by(&self, later: &Self) -> bool {
        let (old, new) = (self.range(), later.range());
        new.start <= old.start && old.end <= new.end
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct DeviceConfig {
    bytes: Vec<u8>,
    writable: bool,
    // Not yet taken by the device.
    waiting: VecDeque<ConfigWrite>,
    // Taken by the device.
    taken: VecDeque<ConfigWrite>,
}

impl DeviceConfig {
    /// A configuration space with these bytes; `writable`: the device takes writes.
    pub(super) fn new(bytes: Vec<u8>, writable: bool) -> Self {
        Self { bytes, writable, waiting: VecDeque::new(), taken: VecDeque::new() }
    }

    /// Its length in bytes.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The driver reads at `offset`. Bytes beyond the end stay as they are in `data`.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let from = self.bytes.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    /// The driver writes; says whether there is something for the device.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let Ok(start) = u32::try_from(offset) else { return false };
        let write = ConfigWrite { offset: start, data: data.to_vec() };
        let Some(target) = self.bytes.get_mut(write.range()).filter(|_| self.writable) else { return false };
        self.waiting.retain(|w| !w.is_covered_by(&write));
        if self.waiting.len() >= MAX_WRITES {
            return false;
        }
        // The driver reads back what it wrote; what the device makes of it replaces this when it has answered.
        target.copy_from_slice(data);
        self.waiting.push_back(write);
        true
    }

    /// The next write for the device. It stays until [`DeviceConfig::answered`].
    pub(super) fn next(&self) -> Option<&ConfigWrite> {
        self.waiting.front()
    }

    /// The device has taken or refused a write.
    pub(super) fn answered(&mut self, write: &ConfigWrite, taken: bool) {
        // Meanwhile the driver may have written over it.
        if self.waiting.front() == Some(write) {
            self.waiting.pop_front();
        }
        if taken {
            self.taken.retain(|w| !w.is_covered_by(write));
            self.taken.push_back(write.clone());
            if self.taken.len() > MAX_WRITES {
                self.taken.pop_front();
            }
        }
    }

    /// There is another device, or the same with a new life: it is to be told everything again.
    pub(super) fn tell_again(&mut self) {
        let later = std::mem::take(&mut self.waiting);
        self.waiting = std::mem::take(&mut self.taken);
        self.waiting.retain(|w| !later.iter().any(|l| w.is_covered_by(l)));
        self.waiting.extend(later);
    }

    /// The device is reset, or will be.
    pub(super) fn forget_writes(&mut self) {
        self.waiting.clear();
        self.taken.clear();
    }

    /// Whether the driver has written something that a reset has to undo.
    pub(super) fn is_written(&self) -> bool {
        !self.waiting.is_empty() || !self.taken.is_empty()
    }

    /// The device says that its configuration is this: so it is, but for what it has not been told yet. Says whether the driver sees
    /// a change.
    pub(super) fn update(&mut self, new: &[u8]) -> bool {
        let mut after = self.bytes.clone();
        for (to, from) in after.iter_mut().zip(new) {
            *to = *from;
        }
        for write in &self.waiting {
            if let Some(bytes) = after.get_mut(write.range()) {
                bytes.copy_from_slice(&write.data);
            }
        }
        let changed = after != self.bytes;
        self.bytes = after;
        // What the device made something else of is its own now.
        let bytes = &self.bytes;
        self.taken.retain(|w| bytes.get(w.range()) == Some(&w.data[..]));
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: &DeviceConfig) -> Vec<u8> {
        let mut bytes = vec![0; config.len()];
        config.read(0, &mut bytes);
        bytes
    }

    /// Lets the device take everything, and says what it was told.
    fn take_all(config: &mut DeviceConfig) -> Vec<(u32, Vec<u8>)> {
        let mut told = Vec::new();
        while let Some(write) = config.next().cloned() {
            config.answered(&write, true);
            told.push((write.offset, write.data));
        }
        told
    }

    #[test]
    fn what_was_taken_is_told_again_and_not_overwritten_before() {
        let mut config = DeviceConfig::new(vec![1; 4], true);
        assert!(config.write(2, &[7]) && config.is_written());
        assert_eq!(take_all(&mut config), [(2, vec![7])]);
        assert!(!config.update(&[1, 1, 7, 1]));
        // A new device, which knows nothing.
        config.tell_again();
        assert!(!config.update(&[1; 4]));
        assert_eq!(read(&config), [1, 1, 7, 1]);
        assert_eq!(take_all(&mut config), [(2, vec![7])]);
        config.forget_writes();
        config.tell_again();
        assert!(config.update(&[1; 4]) && !config.is_written());
        assert_eq!(take_all(&mut config), []);
    }

    #[test]
    fn a_write_stays_until_it_is_answered() {
        let mut config = DeviceConfig::new(vec![0; 4], true);
        config.write(0, &[1]);
        let sent = config.next().cloned().unwrap();
        // The device dies before it answers.
        config.tell_again();
        assert_eq!(config.next(), Some(&sent));
        // The driver writes something else while the first is on its way.
        config.write(0, &[2, 2]);
        config.answered(&sent, true);
        assert_eq!(take_all(&mut config), [(0, vec![2, 2])]);
        config.tell_again();
        assert_eq!(take_all(&mut config), [(0, vec![2, 2])]);
    }

    #[test]
    fn what_the_device_does_not_take_is_not_told_again() {
        let mut config = DeviceConfig::new(vec![0; 4], true);
        config.write(0, &[1]);
        config.write(1, &[1]);
        let refused = config.next().cloned().unwrap();
        config.answered(&refused, false);
        take_all(&mut config);
        assert!(config.update(&[0; 4]));
        config.tell_again();
        assert_eq!(take_all(&mut config), []);
    }

    #[test]
    fn nothing_is_written_beyond_the_end_nor_without_bound() {
        let mut config = DeviceConfig::new(vec![0; 256], true);
        assert!(!config.write(255, &[1, 1]) && !config.write(u64::MAX, &[1]));
        let taken = (0..256).filter(|&i| config.write(i, &[1])).count();
        assert_eq!(taken, MAX_WRITES);
        assert!(config.write(3, &[2]), "what is overwritten makes room");
        assert!(!DeviceConfig::new(vec![0; 4], false).write(0, &[1]));
    }
}
