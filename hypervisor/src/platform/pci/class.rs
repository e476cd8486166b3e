//! PCI class codes of virtio devices.

/// Class, subclass and programming interface for a virtio device id (VirtIO 1.3 section 5). The specification leaves them to
/// the implementation: these are the ones that guests have seen from other hypervisors, and nothing depends on them.
pub fn of_virtio_device(virtio_id: u16) -> [u8; 3] {
    match virtio_id {
        // Network card: ethernet controller.
        1 => [0x02, 0x00, 0x00],
        // Block device, SCSI host: SCSI storage controller.
        2 | 8 => [0x01, 0x00, 0x00],
        // Console: other communication controller.
        3 => [0x07, 0x80, 0x00],
        // GPU: other display controller.
        16 => [0x03, 0x80, 0x00],
        // Input device: other input controller.
        18 => [0x09, 0x80, 0x00],
        // Socket device: other communication controller.
        19 => [0x07, 0x80, 0x00],
        // Crypto device: other encryption controller.
        20 => [0x10, 0x80, 0x00],
        // Sound: audio device.
        25 => [0x04, 0x01, 0x00],
        // File system, persistent memory: other mass storage controller.
        26 | 27 => [0x01, 0x80, 0x00],
        // Unclassified.
        _ => [0x00, 0xff, 0x00],
    }
}
