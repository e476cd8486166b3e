//! The network card: virtio-net devices, the networks they are plugged into, and the networks' way to the host.
//!
//! ```text
//!   device (front-end's connection) ──start_queue──► network's thread
//!                                                      │  rings of all devices of the network, TAP
//!      guest A ──ring──► tx: copy headers, check ──► switch ──► rx: into B's buffers ──ring──► guest B
//!                                                      └──────► TAP ──► host
//! ```
//!
//! - [`frame`]: one Ethernet frame, what its sender left to do (checksum, segmentation), and doing it in software;
//! - [`switch`]: where a frame goes: the control plane's table, no learning, no spoofing;
//! - [`subnet`], [`guard`], [`answer`]: networks with a prefix: who has which address, what a guest may send, and what the
//!   card answers itself; [`drops`] counts what goes nowhere;
//! - [`security`], [`conntrack`]: security groups, and the connections that they have allowed;
//! - [`network`]: a network's thread and its queues; [`network::allowance`]: what limits do there;
//! - [`capture`]: copies of a device's frames as a pcapng file; [`flow`]: the flow log;
//! - [`host`]: TAP interfaces;
//! - [`device`]: the virtio-net device;
//! - [`registry`], [`store`], [`service`]: the networks of a card, kept across its restarts, and the gRPC service.
//!
//! Guarantees. A frame is copied once, from the sender's buffers into the receiver's, headers excepted, which are copied
//! before they are believed. A receiver that takes nothing loses its frames and delays nobody. What a device sends with a
//! MAC address that is not its own is dropped. A malformed frame is dropped, a malformed ring is stopped; both are
//! counted, and neither concerns another device.

// Whoever panics here takes all networks of the card with him: what can is to be looked at, and to say why it cannot.
#![cfg_attr(
    not(test),
    warn(
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::unwrap_used
    )
)]

pub mod answer;
pub mod capture;
pub mod conntrack;
pub mod device;
pub mod drops;
pub mod flow;
pub mod frame;
pub mod guard;
pub mod host;
pub mod mac;
pub mod metadata;
pub mod network;
pub mod registry;
pub mod security;
pub mod service;
pub mod store;
pub mod subnet;
pub mod switch;
