//! The bench guest under QEMU: natively (KVM) where there is `/dev/kvm`, by emulation (TCG) everywhere.
//!
//! Skipped, with a message, only where `qemu-system-x86_64` is not installed.

mod blk;
mod life;
mod net;
mod tap;
mod vm;
