//! The storage card: virtio-blk devices on raw and qcow2 image files and on block devices.
//!
//! [`BlockDevice`] is the engine. It knows rings and images, nothing of vhost-user or gRPC, and runs inside the card or
//! inside a VMM alike. A started queue is a [`BlockQueue`] that owns the ring, its requests and its way of doing I/O; a
//! [`QueueHost`] says who calls it: threads ([`Threads`]), or a VMM's vCPU thread ([`Inline`]).
//!
//! ```text
//!   ring ──pop──► request ──► slot (iovecs straight into guest memory) ──► a copy, preadv2, pwritev2, io_uring ──► image
//!     ▲                         │                    what O_DIRECT does not take: by the page cache
//!     └──push, publish── status ┘
//! ```
//!
//! Guarantees. A write that was answered before a FLUSH was sent is durable when the FLUSH is answered. A request is
//! answered once, whatever happens to this process: what was in flight is found in the ring's inflight area and done
//! again before anything newer. Nobody else writes to the image: it is locked, and the kernel keeps the lock until the
//! last request of a killed process is through.

mod config;
mod device;
mod erase;
mod image;
mod io;
mod mode;
mod qcow2;
mod queue;
mod request;
mod service;
mod share;
mod store;
mod suspect;
mod threads;
mod worker;

pub use device::{BlockDevice, DiskConfig, MAX_QUEUE_SIZE, MIN_QUEUE_SIZE};
pub use erase::{Erase, MAX_RANGE_SECTORS, MAX_RANGES, Range};
pub use image::{Geometry, Image, SECTOR_BYTES};
pub use io::{MapLimit, Register};
pub use mode::ModeFile;
pub use queue::{BlockQueue, Inline, Progress, QueueHost, QueueStart};
pub use request::{HEADER_BYTES, ID_BYTES, Limits, NoStatus, Request, Status, parse};
pub use service::{StorageCard, StorageService};
pub use share::Storage;
pub use store::{NullStore, Qcow2Store, Store};
pub use threads::Threads;
pub use worker::IoEngine;
