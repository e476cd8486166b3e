//! The 256 bytes of a function's configuration space (PCI Local Bus 3.0 section 6).

/// Length of configuration space in bytes.
pub const SIZE: usize = 256;

/// Offset of the command register.
pub const COMMAND: u8 = 0x04;
/// Command register: the function decodes memory accesses to its BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may access memory itself.
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register: the function must not use INTx.
const COMMAND_INTX_DISABLE: u16 = 1 << 10;

const STATUS: u8 = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Offset of BAR 0 (and, for a 64-bit BAR, of BAR 1 with its upper half).
pub const BAR0: u8 = 0x10;
const CAPABILITIES_POINTER: u8 = 0x34;
const INTERRUPT_LINE: u8 = 0x3c;
const FIRST_CAPABILITY: u8 = 0x40;

/// BAR bits: memory, 64 bits wide, not prefetchable (reading and writing registers has effects).
const BAR_MEMORY_64: u64 = 0b100;
const BAR_ADDRESS: u64 = !0xf;

/// What identifies a function.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class, subclass, programming interface.
    pub class: [u8; 3],
    /// Revision.
    pub revision: u8,
    /// Vendor of the subsystem.
    pub subsystem_vendor: u16,
    /// Device of the subsystem.
    pub subsystem: u16,
}

/// Configuration space: bytes, and which of their bits the guest may change.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    next_capability: u8,
    last_pointer: u8,
}

impl ConfigSpace {
    /// A function of type 0 without BARs and capabilities.
    pub fn new(id: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITIES_POINTER,
        };
        space.put(0x00, &id.vendor.to_le_bytes());
        space.put(0x02, &id.device.to_le_bytes());
        let [base, sub, interface] = id.class;
        space.put(0x08, &[id.revision, interface, sub, base]);
        space.put(0x2c, &id.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &id.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.put_writable(COMMAND, &command.to_le_bytes());
        space.put_writable(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Makes BARs 0 and 1 one 64-bit memory BAR of `size` bytes (a power of two, at least 16) at `address`. Writing all ones
    /// and reading back tells the guest the size, because the bits below it do not change.
    pub fn set_bar(&mut self, size: u64, address: u64) {
        let mask = !(size - 1) & BAR_ADDRESS;
        self.put(BAR0, &((address & mask) | BAR_MEMORY_64).to_le_bytes());
        self.put_writable(BAR0, &mask.to_le_bytes());
    }

    /// The address in BARs 0 and 1; `None` while the command register says that memory accesses are not decoded.
    pub fn bar(&self) -> Option<u64> {
        let decoded = self.u16(COMMAND) & COMMAND_MEMORY != 0;
        decoded.then(|| {
            let at = usize::from(BAR0);
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&self.bytes[at..at + 8]);
            u64::from_le_bytes(bytes) & BAR_ADDRESS
        })
    }

    /// Appends a capability: `id`, then `body`, of which the guest may change the bits set in `writable` (which may be shorter
    /// than `body`). Returns the capability's offset.
    ///
    /// # Panics
    /// If the capabilities do not fit: which there are is decided here and not by the guest.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let at = self.next_capability;
        let end = usize::from(at) + 2 + body.len();
        assert!(end <= SIZE, "capabilities do not fit");
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.put_writable(at + 2, writable);
        self.put(self.last_pointer, &[at]);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_pointer = at + 1;
        self.next_capability = u8::try_from(end.next_multiple_of(4)).unwrap_or(u8::MAX);
        at
    }

    /// Sets bytes, whether the guest may change them or not. What lies beyond the end is dropped.
    pub fn put(&mut self, offset: u8, data: &[u8]) {
        for (to, from) in self.bytes[usize::from(offset)..].iter_mut().zip(data) {
            *to = *from;
        }
    }

    fn put_writable(&mut self, offset: u8, mask: &[u8]) {
        for (to, from) in self.writable[usize::from(offset)..].iter_mut().zip(mask) {
            *to = *from;
        }
    }

    /// A byte.
    pub fn u8(&self, offset: u8) -> u8 {
        self.bytes[usize::from(offset)]
    }

    /// Two bytes, little-endian.
    pub fn u16(&self, offset: u8) -> u16 {
        u16::from_le_bytes([self.u8(offset), self.u8(offset.wrapping_add(1))])
    }

    /// Four bytes, little-endian.
    pub fn u32(&self, offset: u8) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset.wrapping_add(2))) << 16
    }

    /// The guest reads. What lies beyond the end is all ones.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0xff);
        }
    }

    /// The guest writes: only writable bits change.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        let at = usize::from(offset);
        for ((to, mask), from) in self.bytes[at..].iter_mut().zip(&self.writable[at..]).zip(data) {
            *to = (*to & !mask) | (from & mask);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(&Identity {
            vendor: 0x1234,
            device: 0x5678,
            class: [1, 2, 3],
            revision: 4,
            subsystem_vendor: 0x9abc,
            subsystem: 0xdef0,
        })
    }

    #[test]
    fn a_bar_is_sized_and_moved() {
        let mut space = space();
        space.set_bar(0x8000, 0xc000_8000);
        assert_eq!(space.bar(), None);
        space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(space.bar(), Some(0xc000_8000));
        space.write(BAR0, &[0xff; 4]);
        space.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!((space.u32(BAR0), space.u32(BAR0 + 4)), (0xffff_8004, 0xffff_ffff));
        space.write(BAR0, &0x1234_5678u32.to_le_bytes());
        space.write(BAR0 + 4, &2u32.to_le_bytes());
        assert_eq!(space.bar(), Some(0x2_1234_0000));
    }

    #[test]
    fn capabilities_are_chained() {
        let mut space = space();
        assert_eq!(space.u16(STATUS), 0);
        let first = space.add_capability(9, &[1, 2, 3], &[]);
        let second = space.add_capability(0x11, &[5, 6], &[0xff]);
        assert_eq!(space.u16(STATUS), STATUS_CAPABILITIES);
        assert_eq!(space.u8(CAPABILITIES_POINTER), first);
        assert_eq!((space.u8(first), space.u8(first + 1)), (9, second));
        assert_eq!((space.u8(second), space.u8(second + 1), second % 4), (0x11, 0, 0));
        space.write(second + 2, &[0xaa, 0xbb]);
        assert_eq!((space.u8(second + 2), space.u8(second + 3)), (0xaa, 6));
    }

    #[test]
    fn identity_is_read_only() {
        let mut space = space();
        space.write(0, &[0; 4]);
        assert_eq!(space.u32(0), 0x5678_1234);
        assert_eq!(space.u32(8), 0x0102_0304);
        assert_eq!(space.u32(0x2c), 0xdef0_9abc);
    }

    #[test]
    fn the_end_is_not_crossed() {
        let mut space = space();
        let mut data = [0; 4];
        space.read(0xfe, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
        space.write(0xfe, &[1; 8]);
    }
}
