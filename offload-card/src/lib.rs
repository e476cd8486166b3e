//! The runtime every card shares.
//!
//! A card is a host service that is the back-end of virtio devices. This crate is everything about that which is not
//! the devices' own business:
//!
//! - [`ring`]: a started virtqueue as its one owner thread sees it, with the record of what is in flight;
//! - [`device`]: the contract between an engine and whoever runs it;
//! - [`poll`]: what a data thread's loop is made of;
//! - [`qos`]: limits of what a device does per second;
//! - [`server`]: a device's vhost-user socket: listens, is connected to again and again, starts and stops queues;
//! - [`runtime`]: the card's process: devices kept in its runtime directory, the control service, readiness, the end;
//! - [`metrics`]: its numbers, for Prometheus.
//!
//! ```text
//!   controller ──gRPC──► runtime ──creates──► server (one control thread per device) ◄──vhost-user── front-end
//!                                                │ start_queue(ring), stop_queue
//!                                                ▼
//!                                             engine (data threads: each ring belongs to one) ◄──shared memory──► guest
//! ```
//!
//! Guarantees. A queue belongs to one thread; no lock is shared between queues. Nothing a guest or a front-end does
//! reaches another device. A card that is killed comes back with its devices, and what was in flight is done again.

pub mod clock;
pub mod device;
pub mod event;
pub mod factory;
pub mod limit;
pub mod memory;
pub mod metrics;
pub mod poll;
pub mod qos;
pub mod ring;
pub mod runtime;
pub mod schedule;
pub mod server;
#[cfg(feature = "testing")]
pub mod testing;

pub use device::{Busy, ConfigNotifier, Device, Identity};
pub use factory::DeviceFactory;
pub use ring::{Chain, Ring, RingConfig, RingError, RingState};
