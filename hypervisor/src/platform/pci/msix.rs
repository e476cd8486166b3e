//! MSI-X: a table of messages and an array of pending bits (PCI Local Bus 3.0 section 6.8.2).
//!
//! This is the state a guest sees; who turns a vector into an interrupt is the function that owns the table.

/// Capability id.
pub const CAPABILITY_ID: u8 = 0x11;
/// Most vectors a table can have.
pub const MAX_VECTORS: u16 = 2048;
/// Length of a table entry in bytes.
pub const ENTRY_SIZE: u64 = 16;

/// Message control: vectors of this function interrupt.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// Vector control: this vector is masked.
const VECTOR_MASKED: u32 = 1;

/// What is written where to interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Message {
    /// Guest-physical address, of a local APIC if the guest is sane.
    pub address: u64,
    /// Vector and delivery mode.
    pub data: u32,
}

#[derive(Debug, Clone, Copy)]
struct Vector {
    message: Message,
    control: u32,
}

/// The table of one function.
#[derive(Debug)]
pub struct MsixTable {
    vectors: Vec<Vector>,
    pending: Vec<u64>,
    enabled: bool,
    function_masked: bool,
}

impl MsixTable {
    /// A table of `vectors` masked vectors (at most [`MAX_VECTORS`]), disabled.
    pub fn new(vectors: u16) -> Self {
        let masked = Vector { message: Message::default(), control: VECTOR_MASKED };
        let count = usize::from(vectors.min(MAX_VECTORS));
        Self {
            vectors: vec![masked; count],
            pending: vec![0; count.div_ceil(64)],
            enabled: false,
            function_masked: false,
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        *self = Self::new(self.len());
    }

    /// Number of vectors.
    pub fn len(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(MAX_VECTORS)
    }

    /// Whether the table has no vector at all.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// Body of the capability, behind its id and next pointer, and which bits of it the guest may change: table and pending
    /// bits are in BAR 0 at these offsets (multiples of 8).
    pub fn capability(&self, table_offset: u32, pending_offset: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&self.len().saturating_sub(1).to_le_bytes());
        body[2..6].copy_from_slice(&table_offset.to_le_bytes());
        body[6..].copy_from_slice(&pending_offset.to_le_bytes());
        (body, (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes())
    }

    /// Takes over what the guest wrote to the capability's message control.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.function_masked = control & CONTROL_FUNCTION_MASK != 0;
    }

    /// Whether the function interrupts by MSI-X.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// What an interrupt by `vector` is now; `None` if there is no such vector or it must wait.
    pub fn deliverable(&self, vector: u16) -> Option<Message> {
        let v = self.vectors.get(usize::from(vector))?;
        let unmasked = self.enabled && !self.function_masked && v.control & VECTOR_MASKED == 0;
        unmasked.then_some(v.message)
    }

    /// Remembers that `vector` has to interrupt once it may.
    pub fn set_pending(&mut self, vector: u16) {
        if usize::from(vector) < self.vectors.len() {
            self.pending[usize::from(vector / 64)] |= 1 << (vector % 64);
        }
    }

    /// Vectors that were pending and may interrupt now; they are not pending any more.
    pub fn take_deliverable(&mut self) -> Vec<Message> {
        if self.pending.iter().all(|&p| p == 0) {
            return Vec::new();
        }
        let pending = |p: &[u64], v: u16| p[usize::from(v / 64)] & (1 << (v % 64)) != 0;
        let due: Vec<_> = (0..self.len())
            .filter(|&v| pending(&self.pending, v))
            .filter_map(|v| self.deliverable(v).map(|m| (v, m)))
            .collect();
        due.into_iter()
            .map(|(v, message)| {
                self.pending[usize::from(v / 64)] &= !(1 << (v % 64));
                message
            })
            .collect()
    }

    /// The guest reads `data.len()` bytes at `offset` of the table; zeroes beyond its end.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset + i as u64;
            let vector = usize::try_from(at / ENTRY_SIZE).ok().and_then(|v| self.vectors.get(v));
            *byte = vector.map_or(0, |v| entry_bytes(v)[(at % ENTRY_SIZE) as usize]);
        }
    }

    /// The guest writes `data` at `offset` of the table: a doubleword or quadword, aligned. Anything else is ignored, as the
    /// specification allows. Says whether something changed.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> bool {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return false;
        }
        let index = usize::try_from(offset / ENTRY_SIZE).unwrap_or(usize::MAX);
        let Some(vector) = self.vectors.get_mut(index) else { return false };
        let mut bytes = entry_bytes(vector);
        let at = (offset % ENTRY_SIZE) as usize;
        bytes[at..at + data.len()].copy_from_slice(data);
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        vector.message.address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        vector.message.data = u32::from_le_bytes([i, j, k, l]);
        vector.control = u32::from_le_bytes([m, n, o, p]) & VECTOR_MASKED;
        true
    }

    /// The guest reads `data.len()` bytes at `offset` of the pending bits; `also` are vectors that are pending for reasons only
    /// their owner knows.
    pub fn read_pending(&self, offset: u64, data: &mut [u8], also: impl Iterator<Item = u16>) {
        let mut bits: Vec<u8> = self.pending.iter().flat_map(|word| word.to_le_bytes()).collect();
        for vector in also.filter(|&v| usize::from(v) < self.vectors.len()) {
            bits[usize::from(vector / 8)] |= 1 << (vector % 8);
        }
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|o| o.checked_add(i));
            *byte = at.and_then(|at| bits.get(at).copied()).unwrap_or(0);
        }
    }
}

fn entry_bytes(vector: &Vector) -> [u8; ENTRY_SIZE as usize] {
    let mut bytes = [0; ENTRY_SIZE as usize];
    bytes[..8].copy_from_slice(&vector.message.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&vector.message.data.to_le_bytes());
    bytes[12..].copy_from_slice(&vector.control.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENABLED: u16 = CONTROL_ENABLE;
    const ENABLED_MASKED: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;

    fn write_message(table: &mut MsixTable, vector: u64, address: u64, data: u32, masked: bool) {
        let at = vector * ENTRY_SIZE;
        assert!(table.write_table(at, &address.to_le_bytes()));
        assert!(table.write_table(at + 8, &data.to_le_bytes()));
        assert!(table.write_table(at + 12, &u32::from(masked).to_le_bytes()));
    }

    #[test]
    fn a_vector_interrupts_only_when_nothing_masks_it() {
        let mut table = MsixTable::new(3);
        assert_eq!(table.deliverable(1), None);
        write_message(&mut table, 1, 0xfee0_1000, 0x41, false);
        assert_eq!(table.deliverable(1), None);
        table.set_control(ENABLED_MASKED);
        assert_eq!(table.deliverable(1), None);
        table.set_control(ENABLED);
        assert_eq!(table.deliverable(1), Some(Message { address: 0xfee0_1000, data: 0x41 }));
        assert_eq!(table.deliverable(0), None);
        assert_eq!(table.deliverable(3), None);
        assert_eq!(table.deliverable(0xffff), None);
    }

    #[test]
    fn pending_is_delivered_once_after_unmasking() {
        let mut table = MsixTable::new(70);
        table.set_control(ENABLED);
        write_message(&mut table, 69, 0xfee0_0000, 0x50, true);
        table.set_pending(69);
        table.set_pending(70);
        assert_eq!(table.take_deliverable(), []);
        let mut bits = [0; 16];
        table.read_pending(0, &mut bits, [3, 900].into_iter());
        assert_eq!(u128::from_le_bytes(bits), 1 << 69 | 1 << 3);
        write_message(&mut table, 69, 0xfee0_0000, 0x50, false);
        assert_eq!(table.take_deliverable(), [Message { address: 0xfee0_0000, data: 0x50 }]);
        assert_eq!(table.take_deliverable(), []);
    }

    #[test]
    fn the_table_reads_as_written() {
        let mut table = MsixTable::new(2);
        write_message(&mut table, 1, 0x1_fee0_0000, 0x1234, true);
        let mut entry = [0; 16];
        table.read_table(16, &mut entry);
        assert_eq!(entry, [0, 0, 0xe0, 0xfe, 1, 0, 0, 0, 0x34, 0x12, 0, 0, 1, 0, 0, 0]);
        let mut quad = [0xaa; 8];
        table.read_table(32, &mut quad);
        assert_eq!(quad, [0; 8]);
    }

    proptest::proptest! {
        #[test]
        fn no_access_panics(
            vectors in 0..300u16,
            accesses in proptest::collection::vec((0..0x2000u64, 1..=8usize, proptest::num::u64::ANY), 1..100)
        ) {
            let mut table = MsixTable::new(vectors);
            for (offset, len, value) in accesses {
                table.set_control(value as u16);
                table.set_pending(value as u16);
                table.write_table(offset, &value.to_le_bytes()[..len]);
                let mut data = [0; 8];
                table.read_table(offset, &mut data[..len]);
                table.read_pending(offset, &mut data[..len], [value as u16].into_iter());
                table.take_deliverable();
                table.deliverable(value as u16);
            }
        }
    }
}
