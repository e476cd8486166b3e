//! PCI: one root bus with a host bridge and single-function devices, reached by ECAM and by ports 0xcf8 to 0xcff.
//!
//! Addresses of BARs are assigned before the guest starts, as firmware would, and the guest may move them: memory accesses
//! in the bus's windows are dispatched by what the BARs say at that moment. Functions interrupt by MSI-X only; there is no
//! INTx routing.

mod access;
pub mod config;
pub mod msix;
mod root;

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

pub use root::{PciRoot, PlugError};

use crate::exits::Exit;

/// Bus 0, function 0, and this device number (0 to 31).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress(pub u8);

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0000:00:{:02x}.0", self.0)
    }
}

/// Where a function is put when it is plugged.
#[derive(Debug, Clone)]
pub struct Placement {
    /// Its address on the bus.
    pub address: PciAddress,
    /// Guest-physical address of its BAR, a multiple of the BAR's size.
    pub bar: u64,
    /// The windows in which a BAR is decoded. A BAR outside of them is reached by nobody.
    pub windows: Arc<[RangeInclusive<u64>]>,
}

/// A function of the bus, with at most one BAR. Called from vCPU threads, several at once: it must not block and must not
/// panic, whatever the guest does.
pub trait PciFunction: Send + Sync {
    /// The guest reads `data.len()` bytes (1 to 4, not crossing a multiple of 4) of configuration space at `offset`. If that stands
    /// for an access to the BAR, says what it is to be counted as.
    fn read_config(&self, offset: u8, data: &mut [u8]) -> Option<Exit>;

    /// The guest writes `data` (1 to 4 bytes, not crossing a multiple of 4) to configuration space at `offset`. If that stands for an
    /// access to the BAR, says what it is to be counted as.
    fn write_config(&self, offset: u8, data: &[u8]) -> Option<Exit>;

    /// Length of the BAR in bytes, a power of two of at least 4096, or 0 if there is none.
    fn bar_size(&self) -> u64;

    /// Guest-physical address of the BAR; `None` while the guest has not enabled decoding of memory accesses.
    fn bar(&self) -> Option<u64>;

    /// The guest reads `data.len()` bytes (1 to 8) at `offset` of the BAR; the access lies within the BAR.
    fn read_bar(&self, offset: u64, data: &mut [u8]) -> Exit;

    /// The guest writes `data` (1 to 8 bytes) at `offset` of the BAR; the access lies within the BAR.
    fn write_bar(&self, offset: u64, data: &[u8]) -> Exit;

    /// Says where the function is. Called once, before any access.
    fn place(&self, placement: Placement);
}
