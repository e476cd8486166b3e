//! Guest memory, which the hypervisor makes and cards map.

use std::ffi::CStr;

/// What the hypervisor calls the memfd with a guest's RAM. Whoever is given a memfd of this name may rely on this: its pages stay
/// where they are, none is given back and replaced, from when a device's queue is started until it has stopped. So it
/// may hold on to them (registered buffers, DMA) as long as the queue runs.
pub const GUEST_RAM: &CStr = c"outboard-ram";
