//! What is where in a slot's configuration space and BAR.
//!
//! ```text
//!  BAR 0   0x0000  common configuration      0x1000  MSI-X table          0x4000  notification of queue 0
//!          0x0400  ISR status                0x3000  MSI-X pending bits   0x5000  notification of queue 1
//!          0x0800  device configuration                                   ...
//! ```
//!
//! Each queue's notification has a page of its own, so that it can be mapped where it is served.

use super::common;
use crate::platform::pci::config::{ConfigSpace, Identity};
use crate::platform::pci::msix::{self, MsixTable};

/// Most queues of a device: vhost-user numbers them by one byte in messages that carry an eventfd.
pub(super) const MAX_QUEUES: u16 = 256;

/// Longest device configuration space, in bytes.
pub(super) const MAX_CONFIG: usize = 256;

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x0400;
const DEVICE: u64 = 0x0800;
const MSIX_TABLE: u64 = 0x1000;
const MSIX_PENDING: u64 = 0x3000;
const NOTIFY: u64 = 0x4000;
const NOTIFY_STRIDE: u64 = 0x1000;

const CAPABILITY_VENDOR: u8 = 0x09;
/// `cfg_type` of the structures (VirtIO 1.3 section 4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

const VENDOR_VIRTIO: u16 = 0x1af4;
/// Device id of a virtio device with virtio id 0.
const DEVICE_BASE: u16 = 0x1040;
/// Unclassified. The specification leaves the class to the implementation, and drivers go by the ids.
const CLASS: [u8; 3] = [0x00, 0xff, 0x00];
/// Modern-only devices have a revision and a subsystem of at least these.
const REVISION: u8 = 1;
const SUBSYSTEM: u16 = 0x1100;

/// A place in the BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Common configuration, at this offset.
    Common(u64),
    /// ISR status.
    Isr,
    /// Device configuration, at this offset.
    Device(u64),
    /// MSI-X table, at this offset.
    MsixTable(u64),
    /// MSI-X pending bits, at this offset.
    MsixPending(u64),
    /// Notification of this queue, which may not exist.
    Notify(u64),
    /// Between the structures.
    Nothing,
}

/// What is at `offset` of the BAR.
pub(super) fn place(offset: u64) -> Place {
    match offset {
        COMMON..ISR => Place::Common(offset - COMMON),
        ISR => Place::Isr,
        DEVICE..MSIX_TABLE => Place::Device(offset - DEVICE),
        MSIX_TABLE..MSIX_PENDING => Place::MsixTable(offset - MSIX_TABLE),
        MSIX_PENDING..NOTIFY => Place::MsixPending(offset - MSIX_PENDING),
        _ if offset >= NOTIFY => Place::Notify((offset - NOTIFY) / NOTIFY_STRIDE),
        _ => Place::Nothing,
    }
}

/// Offset in the BAR of the notification of `queue`.
pub(super) fn notify(queue: u16) -> u64 {
    NOTIFY + u64::from(queue) * NOTIFY_STRIDE
}

/// Length of the BAR of a device with `queues` queues, in bytes.
pub(super) fn bar_size(queues: u16) -> u64 {
    notify(queues).next_power_of_two()
}

/// Offsets in configuration space of the capabilities that do something.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capabilities {
    /// Message control of MSI-X.
    pub(super) msix_control: u8,
    /// The window through which configuration accesses reach the BAR.
    pub(super) window: u8,
}

/// Offsets in the window's capability (VirtIO 1.3 section 4.1.4.9).
pub(super) mod window {
    /// Number of the BAR.
    pub(in crate::slot) const BAR: u8 = 4;
    /// Offset in the BAR.
    pub(in crate::slot) const OFFSET: u8 = 8;
    /// Length of the access.
    pub(in crate::slot) const LENGTH: u8 = 12;
    /// The data; accessing it accesses the BAR.
    pub(in crate::slot) const DATA: u8 = 16;
}

/// Configuration space of a device with this virtio id, number of queues and length of its configuration.
pub(super) fn config_space(
    virtio_id: u16,
    queues: u16,
    config_size: usize,
    table: &MsixTable,
) -> (ConfigSpace, Capabilities) {
    let mut space = ConfigSpace::new(&Identity {
        vendor: VENDOR_VIRTIO,
        device: DEVICE_BASE + virtio_id,
        class: CLASS,
        revision: REVISION,
        subsystem_vendor: VENDOR_VIRTIO,
        subsystem: SUBSYSTEM,
    });
    let (body, writable) = table.capability(MSIX_TABLE as u32, MSIX_PENDING as u32);
    let msix_control = space.add_capability(msix::CAPABILITY_ID, &body, &writable) + 2;
    let mut add = |kind: u8, offset: u64, length: u64, extra: &[u8], writable: &[u8]| {
        let mut body = vec![0; 14];
        body[0] = 16 + extra.len() as u8;
        body[1] = kind;
        body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
        body[10..].copy_from_slice(&(length as u32).to_le_bytes());
        body.extend_from_slice(extra);
        space.add_capability(CAPABILITY_VENDOR, &body, writable)
    };
    add(CAP_COMMON, COMMON, common::SIZE as u64, &[], &[]);
    let multiplier = (NOTIFY_STRIDE as u32).to_le_bytes();
    add(CAP_NOTIFY, NOTIFY, u64::from(queues) * NOTIFY_STRIDE, &multiplier, &[]);
    add(CAP_ISR, ISR, 1, &[], &[]);
    if config_size > 0 {
        add(CAP_DEVICE, DEVICE, config_size as u64, &[], &[]);
    }
    // The guest sets BAR, offset, length and data.
    let mut window_writable = [0xff; 18];
    window_writable[..2].fill(0);
    window_writable[3..6].fill(0);
    let window = add(CAP_PCI, 0, 0, &[0; 4], &window_writable);
    (space, Capabilities { msix_control, window })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_do_not_overlap() {
        assert!(COMMON + common::SIZE as u64 <= ISR);
        assert!(DEVICE + MAX_CONFIG as u64 <= MSIX_TABLE);
        let vectors = u64::from(MAX_QUEUES) + 1;
        assert!(MSIX_TABLE + vectors * msix::ENTRY_SIZE <= MSIX_PENDING);
        assert!(MSIX_PENDING + vectors.div_ceil(8) <= NOTIFY);
    }

    #[test]
    fn a_bar_has_room_for_every_queue() {
        assert_eq!(bar_size(1), 0x8000);
        assert_eq!(bar_size(4), 0x8000);
        assert_eq!(bar_size(5), 0x10000);
        assert_eq!(place(notify(4)), Place::Notify(4));
        assert_eq!(place(notify(5) - 1), Place::Notify(4));
        assert!(bar_size(MAX_QUEUES) >= notify(MAX_QUEUES));
    }

    #[test]
    fn every_capability_is_found() {
        let (space, capabilities) = config_space(5, 2, 60, &MsixTable::new(3));
        assert_eq!(space.u32(0), 0x1045_1af4);
        let mut at = space.u8(0x34);
        let mut kinds = Vec::new();
        while at != 0 {
            kinds.push((space.u8(at), space.u8(at + 3)));
            at = space.u8(at + 1);
        }
        assert_eq!(kinds[0].0, msix::CAPABILITY_ID);
        let virtio = [CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_PCI].map(|k| (CAPABILITY_VENDOR, k));
        assert_eq!(kinds[1..], virtio);
        assert_eq!(space.u16(capabilities.msix_control), 2);
    }
}
