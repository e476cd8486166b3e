//! What can be wrong with a ring.

use thiserror::Error;

use super::MAX_SIZE;

/// A ring that broke the rules.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum RingError {
    /// Not a power of two up to 32768.
    #[error("ring size {size} is not a power of two up to {MAX_SIZE}")]
    Size {
        /// The size.
        size: u16,
    },
    /// A ring area is not in guest memory or misaligned.
    #[error("{what} at {address:#x} is misaligned or outside guest memory")]
    Address {
        /// Which area.
        what: &'static str,
        /// Its guest-physical address.
        address: u64,
    },
    /// More made available than the ring has entries.
    #[error("the driver made {count} chains available in a ring of {size}")]
    AvailIndex {
        /// Chains that would be waiting.
        count: u16,
        /// Ring size.
        size: u16,
    },
    /// A descriptor index outside its table.
    #[error("chain {head} refers to descriptor {index}, which its table does not have")]
    Index {
        /// First descriptor of the chain.
        head: u16,
        /// The bad index.
        index: u16,
    },
    /// The same chain a second time before it was returned.
    #[error("chain {head} was made available while in flight")]
    InFlight {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A loop, or more descriptors than can be.
    #[error("chain {head} has a loop or too many descriptors")]
    Loop {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect table that is empty, uneven, nested, not negotiated, or outside memory.
    #[error("chain {head} has an invalid indirect table at {address:#x} of {length} bytes")]
    Indirect {
        /// First descriptor of the chain.
        head: u16,
        /// Guest-physical address of the table.
        address: u64,
        /// Its length in bytes.
        length: u32,
    },
    /// A readable buffer after a writable one (VirtIO 1.3 section 2.7.4.2).
    #[error("chain {head} has a readable buffer after a writable one")]
    Order {
        /// First descriptor of the chain.
        head: u16,
    },
    /// More than 4 GiB in one direction.
    #[error("chain {head} is longer than 4 GiB")]
    TooLong {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A buffer outside guest memory.
    #[error("chain {head} has a buffer of {length} bytes at {address:#x}, outside guest memory")]
    Buffer {
        /// First descriptor of the chain.
        head: u16,
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        length: u32,
    },
    /// Buffers that cross more borders of memory regions than we keep pieces for.
    #[error("chain {head} lies in too many pieces of memory")]
    Pieces {
        /// First descriptor of the chain.
        head: u16,
    },
    /// What the inflight area says cannot be.
    #[error("the inflight area names {count} chains in flight, more than the driver made available")]
    Inflight {
        /// Chains it names.
        count: usize,
    },
    /// The engine says so: a request it cannot even answer.
    #[error("{0}")]
    Request(String),
}
