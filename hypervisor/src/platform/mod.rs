//! The platform a guest finds: buses, interrupts, PCI, ACPI, a serial port.

pub mod acpi;
pub mod bus;
pub mod console;
pub mod ged;
pub mod irq;
pub mod layout;
pub mod pci;
pub mod power;
pub mod requests;
pub mod serial;
