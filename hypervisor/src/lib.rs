//! One KVM virtual machine: CPUs, memory, and virtio-pci slots that other processes serve.
//!
//! This process runs a guest's CPUs and holds its memory, and nothing else. It knows no type of device: a [`slot`] learns what
//! is plugged into it from the device itself, by vhost-user, and once the guest's driver has set up its rings, guest and
//! device talk through shared memory and eventfds that KVM serves. No request comes by here.
//!
//! ```text
//!                gRPC ──► control ──calls──► machine ──starts, stops──► life: KVM VM, vCPUs, serial port, ACPI events
//!          (thread "control")     (main thread)   │                       │ exits, dispatched by platform::bus
//!                                                 │                       ▼
//!   console, events, numbers ◄── machine::Status  └──resets──► slot ◄── registers (answered at once, on the vCPU's thread)
//!                                                          (thread "slot:ID") ── vhost-user ──► device
//! ```
//!
//! | module | what it is |
//! | --- | --- |
//! | [`process`], [`cli`], [`stdio`] | the process: command line, signals, sockets, console on standard streams, exit status |
//! | [`control`] | the gRPC service `outboard.v1.Hypervisor`, on one thread |
//! | [`machine`] | what the VM is made of and its way from Configure to its end; one thread owns it |
//! | [`memory`], [`boot`] | RAM in a sealed memfd; kernels (PVH, bzImage) and what they are handed |
//! | [`vcpu`], [`exits`] | vCPU threads, their state at reset, exits counted by reason |
//! | [`platform`] | what answers outside of RAM: PCI, MSI-X, ACPI, power and reset registers, the serial port |
//! | [`slot`] | virtio-pci transport, vhost-user front-end, the link and its recovery |
//!
//! Three rules hold it together. **A vCPU waits for nobody**: registers are answered from this process's memory, orders go
//! through queues. **A life ends as a whole**: at a reset the KVM VM with its vCPUs and interrupt controllers is thrown away and a
//! new one is built on the same, emptied RAM, so that nothing of a former life can leak into the next; links, console and control
//! stay. **Nothing polls**: an idle VM does not wake this process up.

pub mod boot;
pub mod cli;
pub mod control;
pub mod exits;
pub mod machine;
pub mod memory;
pub mod platform;
pub mod process;
pub mod slot;
pub mod stdio;
pub mod vcpu;
