//! Slots from both sides: a driver that reads and writes registers as a guest's would, and devices that behave, misbehave, die and
//! come back. No vCPU runs but where KVM's part is tested.

mod device;
mod driver;
mod faults;
mod foreign;
mod kvm;
mod machine;
mod registers;
