//! The part of the bench guest that does not need to be a guest: the command line, block and frame patterns, the driver's
//! side of a virtqueue, latency histograms, the reliable exchange between two guests and the JSON writer. `README.md` of this
//! package describes the guest as its users see it; `bench-guest/` holds the freestanding program.
//!
//! Host programs that play the other side of a job (a UDP peer, something that inspects a disk image) use [`pattern`] and
//! [`frame`] from here.

#![no_std]

extern crate alloc;

pub mod args;
pub mod exchange;
pub mod frame;
pub mod gaps;
pub mod hex;
pub mod histogram;
pub mod json;
pub mod pace;
pub mod pattern;
pub mod payload;
pub mod requests;
pub mod ring;
pub mod s5;
pub mod span;
