//! The common configuration structure of virtio-pci (VirtIO 1.3 section 4.1.4.3): what the guest's driver reads and writes to set
//! a device up. Only registers are here; what has to happen is told to the caller.

/// Length of the structure in bytes.
pub(super) const SIZE: usize = 64;

/// "No vector": no interrupts.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Device status bits (VirtIO 1.3 section 2.1).
pub(super) mod status {
    /// The driver is ready.
    pub(in crate::slot) const DRIVER_OK: u8 = 4;
    /// Feature negotiation is complete.
    pub(in crate::slot) const FEATURES_OK: u8 = 8;
    /// The device cannot go on and has to be reset.
    pub(in crate::slot) const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub(in crate::slot) const FAILED: u8 = 128;
    /// Bits that a driver may set: ACKNOWLEDGE, DRIVER, and those above but for NEEDS_RESET.
    pub(in crate::slot) const OF_DRIVER: u8 = 1 | 2 | DRIVER_OK | FEATURES_OK | FAILED;
}

/// Feature bit: the device follows VirtIO 1.0 or later.
pub(super) const F_VERSION_1: u64 = 1 << 32;

/// Offsets of the fields.
mod field {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: usize = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: usize = 0x12;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const GENERATION: usize = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: usize = 0x1e;
    pub(super) const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub(super) const QUEUE_AVAILABLE: u64 = 0x28;
    pub(super) const QUEUE_USED: u64 = 0x30;
    pub(super) const QUEUE_END: u64 = 0x38;
}

/// What a write asks for beyond the register itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing.
    None,
    /// An interrupt vector changed.
    Vectors,
    /// The driver is ready: the rings can start.
    Start,
    /// The device is to be reset. The status goes on to read as before until [`CommonConfig::reset`].
    Reset,
}

/// What the driver says about one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Queue {
    /// Number of descriptors.
    pub(super) size: u16,
    /// MSI-X vector, or [`NO_VECTOR`].
    pub(super) vector: u16,
    /// The driver has set the queue up.
    pub(super) enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub(super) descriptors: u64,
    /// Guest-physical address of the available ring.
    pub(super) available: u64,
    /// Guest-physical address of the used ring.
    pub(super) used: u64,
}

/// The registers.
#[derive(Debug)]
pub(super) struct CommonConfig {
    offered: u64,
    vectors: u16,
    max_queue_size: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    // The driver accepted a feature beyond bit 63, of which there is none.
    accepted_unknown: bool,
    config_vector: u16,
    status: u8,
    generation: u8,
    queue_select: u16,
    queues: Vec<Queue>,
}

impl CommonConfig {
    /// Registers after reset, of a device with `queues` queues of at most `max_queue_size` descriptors and `vectors` MSI-X vectors,
    /// that offers the features `offered`.
    pub(super) fn new(offered: u64, queues: u16, max_queue_size: u16, vectors: u16) -> Self {
        let queue = Queue {
            size: max_queue_size,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        };
        Self {
            offered,
            vectors,
            max_queue_size,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            accepted_unknown: false,
            config_vector: NO_VECTOR,
            status: 0,
            generation: 0,
            queue_select: 0,
            queues: vec![queue; usize::from(queues)],
        }
    }

    /// Back to the state after reset, offering `offered` from now on. The generation goes on: what a driver read before the reset
    /// must not look current.
    pub(super) fn reset(&mut self, offered: u64) {
        let queues = self.queues.len() as u16;
        *self = Self {
            generation: self.generation,
            ..Self::new(offered, queues, self.max_queue_size, self.vectors)
        };
    }

    /// Offers other features. Only before the driver has settled.
    pub(super) fn offer(&mut self, features: u64) {
        if !self.has(status::FEATURES_OK) {
            self.offered = features;
        }
    }

    /// Features that the driver accepted; 0 until it has settled.
    pub(super) fn driver_features(&self) -> u64 {
        if self.has(status::FEATURES_OK) { self.driver_features } else { 0 }
    }

    /// The vector of configuration changes, or [`NO_VECTOR`].
    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The queues, by number.
    pub(super) fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// Whether the driver may have rings in use.
    pub(super) fn driver_ok(&self) -> bool {
        self.has(status::DRIVER_OK)
    }

    /// The configuration space changed.
    pub(super) fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// The device cannot go on. Says whether that is news for a driver that is there to hear it.
    pub(super) fn set_needs_reset(&mut self) -> bool {
        let news = self.has(status::DRIVER_OK) && !self.has(status::NEEDS_RESET);
        self.status |= status::NEEDS_RESET;
        news
    }

    fn has(&self, bit: u8) -> bool {
        self.status & bit != 0
    }

    /// The guest reads `data.len()` bytes at `offset`; zeroes beyond the end. Reading has no effect, so any width and alignment
    /// gets the bytes that are there.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|o| o.checked_add(i));
            *byte = at.and_then(|at| image.get(at).copied()).unwrap_or(0);
        }
    }

    fn image(&self) -> [u8; SIZE] {
        let mut image = [0; SIZE];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(field::DEVICE_FEATURE_SELECT as usize, &self.device_feature_select.to_le_bytes());
        put(field::DEVICE_FEATURE, &half(self.offered, self.device_feature_select).to_le_bytes());
        put(field::DRIVER_FEATURE_SELECT as usize, &self.driver_feature_select.to_le_bytes());
        let accepted = half(self.driver_features, self.driver_feature_select);
        put(field::DRIVER_FEATURE as usize, &accepted.to_le_bytes());
        put(field::CONFIG_VECTOR as usize, &self.config_vector.to_le_bytes());
        put(field::NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(field::STATUS as usize, &[self.status]);
        put(field::GENERATION, &[self.generation]);
        put(field::QUEUE_SELECT as usize, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0 (section 4.1.4.3.2) and no vector.
        let Some(queue) = self.queues.get(usize::from(self.queue_select)) else {
            put(field::QUEUE_VECTOR as usize, &NO_VECTOR.to_le_bytes());
            return image;
        };
        put(field::QUEUE_SIZE as usize, &queue.size.to_le_bytes());
        put(field::QUEUE_VECTOR as usize, &queue.vector.to_le_bytes());
        put(field::QUEUE_ENABLE as usize, &u16::from(queue.enabled).to_le_bytes());
        put(field::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
        put(field::QUEUE_DESCRIPTORS as usize, &queue.descriptors.to_le_bytes());
        put(field::QUEUE_AVAILABLE as usize, &queue.available.to_le_bytes());
        put(field::QUEUE_USED as usize, &queue.used.to_le_bytes());
        image
    }

    /// The guest writes `data` at `offset`. Fields have to be written in their own width (section 4.1.3.1), 64-bit fields also by
    /// halves; anything else is ignored.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match *data {
            [value] => self.write_u8(offset, value),
            [a, b] => self.write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if is_address(offset) && offset.is_multiple_of(8) => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]))
            }
            _ => Action::None,
        }
    }

    fn write_u8(&mut self, offset: u64, value: u8) -> Action {
        if offset != field::STATUS {
            return Action::None;
        }
        if value == 0 {
            return Action::Reset;
        }
        // A driver must not clear bits (section 2.1.1), so what it does not repeat stays.
        let mut new = value & status::OF_DRIVER & !self.status;
        let acceptable = !self.accepted_unknown
            && self.driver_features & !self.offered == 0
            && self.driver_features & F_VERSION_1 != 0;
        if !acceptable {
            new &= !status::FEATURES_OK;
        }
        let settled = (self.status | new) & status::FEATURES_OK != 0;
        if !settled || self.has(status::FAILED) {
            new &= !status::DRIVER_OK;
        }
        self.status |= new;
        if new & status::DRIVER_OK != 0 { Action::Start } else { Action::None }
    }

    fn write_u16(&mut self, offset: u64, value: u16) -> Action {
        // A vector that does not exist reads back as none (section 4.1.5.1.2.2).
        let vector = if value < self.vectors { value } else { NO_VECTOR };
        match offset {
            field::CONFIG_VECTOR => {
                self.config_vector = vector;
                return Action::Vectors;
            }
            field::QUEUE_SELECT => {
                self.queue_select = value;
                return Action::None;
            }
            _ => {}
        }
        let may_enable = self.has(status::FEATURES_OK) && !self.has(status::DRIVER_OK);
        let max = self.max_queue_size;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return Action::None };
        match offset {
            field::QUEUE_VECTOR => {
                queue.vector = vector;
                return Action::Vectors;
            }
            field::QUEUE_SIZE if !queue.enabled && value.is_power_of_two() && value <= max => {
                queue.size = value;
            }
            // Writing 0 is forbidden (section 4.1.4.3.2), and queues start together at DRIVER_OK.
            field::QUEUE_ENABLE if value == 1 && may_enable => queue.enabled = true,
            _ => {}
        }
        Action::None
    }

    fn write_u32(&mut self, offset: u64, value: u32) -> Action {
        match offset {
            field::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            field::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            field::DRIVER_FEATURE if !self.has(status::FEATURES_OK) => match self.driver_feature_select {
                0 => self.driver_features = set_half(self.driver_features, 0, value),
                1 => self.driver_features = set_half(self.driver_features, 4, value),
                _ => self.accepted_unknown |= value != 0,
            },
            _ if is_address(offset) && offset.is_multiple_of(4) => {
                let shift = offset & 4;
                let queue = self.queues.get_mut(usize::from(self.queue_select)).filter(|q| !q.enabled);
                if let Some(queue) = queue {
                    let address = match offset & !4 {
                        field::QUEUE_DESCRIPTORS => &mut queue.descriptors,
                        field::QUEUE_AVAILABLE => &mut queue.available,
                        _ => &mut queue.used,
                    };
                    *address = set_half(*address, shift, value);
                }
            }
            _ => {}
        }
        Action::None
    }
}

/// Whether a field at `offset` is an address of the selected queue.
fn is_address(offset: u64) -> bool {
    (field::QUEUE_DESCRIPTORS..field::QUEUE_END).contains(&offset)
}

/// Half `select` (0: lower, 1: upper) of `value`; there are no more halves.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

/// `value` with the 32 bits at byte `at` (0 or 4) replaced.
fn set_half(value: u64, at: u64, bits: u32) -> u64 {
    let shift = at * 8;
    (value & !(0xffff_ffff << shift)) | u64::from(bits) << shift
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFERED: u64 = F_VERSION_1 | 1 << 28 | 0b101;

    fn config() -> CommonConfig {
        CommonConfig::new(OFFERED, 2, 256, 3)
    }

    fn read_u32(c: &CommonConfig, offset: u64) -> u32 {
        let mut data = [0; 4];
        c.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn read_u16(c: &CommonConfig, offset: u64) -> u16 {
        let mut data = [0; 2];
        c.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    fn status(c: &CommonConfig) -> u8 {
        let mut data = [0];
        c.read(field::STATUS, &mut data);
        data[0]
    }

    fn accept(c: &mut CommonConfig, features: u64) {
        for select in 0..2u32 {
            c.write(field::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            c.write(field::DRIVER_FEATURE, &half(features, select).to_le_bytes());
        }
    }

    #[test]
    fn features_are_read_by_halves() {
        let mut c = config();
        assert_eq!(read_u32(&c, 4), 1 << 28 | 0b101);
        c.write(0, &1u32.to_le_bytes());
        assert_eq!(read_u32(&c, 4), 1);
        c.write(0, &2u32.to_le_bytes());
        assert_eq!(read_u32(&c, 4), 0);
    }

    #[test]
    fn features_ok_needs_what_is_offered_and_version_1() {
        for (features, ok) in
            [(F_VERSION_1, true), (OFFERED, true), (0b101, false), (F_VERSION_1 | 2, false), (0, false)]
        {
            let mut c = config();
            accept(&mut c, features);
            c.write(field::STATUS, &[1 | 2 | 8]);
            assert_eq!(status(&c), if ok { 11 } else { 3 }, "{features:#x}");
            assert_eq!(c.driver_features(), if ok { features } else { 0 });
        }
    }

    #[test]
    fn a_feature_beyond_the_last_is_refused() {
        let mut c = config();
        accept(&mut c, F_VERSION_1);
        c.write(field::DRIVER_FEATURE_SELECT, &2u32.to_le_bytes());
        c.write(field::DRIVER_FEATURE, &1u32.to_le_bytes());
        c.write(field::STATUS, &[11]);
        assert_eq!(status(&c), 3);
    }

    #[test]
    fn features_are_settled_by_features_ok() {
        let mut c = config();
        accept(&mut c, F_VERSION_1);
        c.write(field::STATUS, &[11]);
        accept(&mut c, F_VERSION_1 | 1);
        c.offer(0);
        assert_eq!((c.driver_features(), c.offered), (F_VERSION_1, OFFERED));
    }

    #[test]
    fn a_queue_is_set_up_and_started_once() {
        let mut c = config();
        accept(&mut c, F_VERSION_1);
        c.write(field::QUEUE_SELECT, &1u16.to_le_bytes());
        c.write(field::QUEUE_ENABLE, &1u16.to_le_bytes());
        assert_eq!(read_u16(&c, field::QUEUE_ENABLE), 0);
        c.write(field::STATUS, &[11]);
        c.write(field::QUEUE_SIZE, &3u16.to_le_bytes());
        c.write(field::QUEUE_SIZE, &512u16.to_le_bytes());
        assert_eq!(read_u16(&c, field::QUEUE_SIZE), 256);
        c.write(field::QUEUE_SIZE, &128u16.to_le_bytes());
        assert_eq!(c.write(field::QUEUE_VECTOR, &2u16.to_le_bytes()), Action::Vectors);
        c.write(field::QUEUE_DESCRIPTORS, &0x1_2345_6000u64.to_le_bytes());
        c.write(field::QUEUE_AVAILABLE, &0x2000u32.to_le_bytes());
        c.write(field::QUEUE_AVAILABLE + 4, &3u32.to_le_bytes());
        c.write(field::QUEUE_ENABLE, &1u16.to_le_bytes());
        c.write(field::QUEUE_USED, &0x9000u32.to_le_bytes());
        let queue = Queue {
            size: 128,
            vector: 2,
            enabled: true,
            descriptors: 0x1_2345_6000,
            available: 0x3_0000_2000,
            used: 0,
        };
        assert_eq!(c.queues()[1], queue);
        assert_eq!(read_u16(&c, field::QUEUE_NOTIFY_OFF as u64), 1);
        assert_eq!(c.write(field::STATUS, &[15]), Action::Start);
        assert_eq!(c.write(field::STATUS, &[15]), Action::None);
        c.write(field::QUEUE_SELECT, &0u16.to_le_bytes());
        c.write(field::QUEUE_ENABLE, &1u16.to_le_bytes());
        assert!(!c.queues()[0].enabled);
    }

    #[test]
    fn driver_ok_without_features_ok_does_nothing() {
        let mut c = config();
        assert_eq!(c.write(field::STATUS, &[7]), Action::None);
        assert_eq!(status(&c), 3);
    }

    #[test]
    fn a_vector_that_does_not_exist_reads_back_as_none() {
        let mut c = config();
        c.write(field::CONFIG_VECTOR, &2u16.to_le_bytes());
        assert_eq!(c.config_vector(), 2);
        c.write(field::CONFIG_VECTOR, &3u16.to_le_bytes());
        assert_eq!(read_u16(&c, field::CONFIG_VECTOR), NO_VECTOR);
    }

    #[test]
    fn a_queue_that_does_not_exist_has_size_0() {
        let mut c = config();
        c.write(field::QUEUE_SELECT, &2u16.to_le_bytes());
        assert_eq!(read_u16(&c, field::QUEUE_SIZE), 0);
        c.write(field::QUEUE_DESCRIPTORS, &[1; 8]);
        assert_eq!(read_u32(&c, field::QUEUE_DESCRIPTORS), 0);
    }

    #[test]
    fn reset_is_asked_for_and_keeps_the_generation() {
        let mut c = config();
        accept(&mut c, F_VERSION_1);
        c.write(field::STATUS, &[11]);
        c.next_generation();
        assert_eq!(c.write(field::STATUS, &[0]), Action::Reset);
        assert_eq!(status(&c), 11);
        c.reset(1);
        assert_eq!((status(&c), c.offered, c.generation), (0, 1, 1));
    }

    proptest::proptest! {
        #[test]
        fn registers_stay_sane(
            accesses in proptest::collection::vec((0..80u64, 1..=8usize, proptest::num::u64::ANY), 1..200)
        ) {
            let mut c = config();
            for (offset, len, value) in accesses {
                let before = c.status;
                let action = c.write(offset, &value.to_le_bytes()[..len]);
                let mut data = [0; 8];
                c.read(offset, &mut data[..len]);
                assert_eq!(c.status & before, before);
                assert!(!c.has(status::NEEDS_RESET));
                assert!(c.queues.iter().all(|q| q.size.is_power_of_two() && q.size <= 256));
                assert!(c.queues.iter().all(|q| q.vector < 3 || q.vector == NO_VECTOR));
                assert!(c.driver_features() & !OFFERED == 0);
                if action == Action::Start {
                    assert!(c.has(status::FEATURES_OK) && c.driver_features() & F_VERSION_1 != 0);
                }
            }
        }
    }
}
