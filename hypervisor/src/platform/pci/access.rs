//! The ways by which a guest reaches the bus: configuration ports, ECAM, memory windows.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::root::PciRoot;
use crate::exits::Exit;
use crate::platform::bus::BusDevice;

/// Calls `f` with the pieces of an access of `len` bytes at `offset` that lie in one doubleword each: their offset in the
/// space, and their place in the data.
fn by_doubleword(offset: u64, len: usize, mut f: impl FnMut(u64, std::ops::Range<usize>)) {
    let mut at = 0;
    while at < len {
        let here = offset + at as u64;
        let piece = (4 - (here & 3) as usize).min(len - at);
        f(here, at..at + piece);
        at += piece;
    }
}

/// Reads from a function's configuration space; all ones where there is none. Says whether that counts as something else.
fn read(root: &PciRoot, device: usize, function: u64, register: u64, data: &mut [u8]) -> Option<Exit> {
    let target = if function == 0 { root.function(device) } else { None };
    match (target, u8::try_from(register)) {
        (Some(f), Ok(register)) => f.read_config(register, data),
        _ => {
            data.fill(0xff);
            None
        }
    }
}

/// Writes to a function's configuration space; ignored where there is none. Says whether that counts as something else.
fn write(root: &PciRoot, device: usize, function: u64, register: u64, data: &[u8]) -> Option<Exit> {
    let target = if function == 0 { root.function(device) } else { None };
    let (Some(f), Ok(register)) = (target, u8::try_from(register)) else { return None };
    f.write_config(register, data)
}

/// Ports 0xcf8 to 0xcff: configuration mechanism #1 (PCI Local Bus 3.0 section 3.2.2.3.2), and the reset control register that
/// chipsets put at 0xcf9.
pub(super) struct ConfigPorts(pub(super) Arc<PciRoot>);

const CONFIG_ENABLE: u32 = 1 << 31;
const RESET_CONTROL: u64 = 1;
const RESET_CPU: u8 = 1 << 2;
const CONFIG_DATA: u64 = 4;

impl ConfigPorts {
    /// Device, function and register that an access to the data port means, if enabled and on bus 0.
    fn target(&self, offset: u64) -> Option<(usize, u64, u64)> {
        let address = self.0.config_address.load(Ordering::Relaxed);
        let bus = (address >> 16) & 0xff;
        (address & CONFIG_ENABLE != 0 && bus == 0).then(|| {
            let register = u64::from(address & 0xfc) + (offset - CONFIG_DATA);
            (((address >> 11) & 0x1f) as usize, u64::from((address >> 8) & 7), register)
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) -> Exit {
        if offset == RESET_CONTROL && data.len() == 1 {
            data.fill(self.0.reset_control.load(Ordering::Relaxed) & !RESET_CPU);
            return Exit::IoReset;
        }
        if offset < CONFIG_DATA {
            let bytes = self.0.config_address.load(Ordering::Relaxed).to_le_bytes();
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = bytes.get(offset as usize + i).copied().unwrap_or(0xff);
            }
        } else if data.len() <= config_data_end().saturating_sub(offset) as usize {
            match self.target(offset) {
                Some((device, function, register)) => {
                    return read(&self.0, device, function, register, data).unwrap_or(Exit::IoPciConfig);
                }
                None => data.fill(0xff),
            }
        } else {
            data.fill(0xff);
        }
        Exit::IoPciConfig
    }

    fn write(&self, offset: u64, data: &[u8]) -> Exit {
        if offset == RESET_CONTROL
            && let &[value] = data
        {
            self.0.reset_control.store(value, Ordering::Relaxed);
            if value & RESET_CPU != 0 {
                (self.0.request_reset)();
            }
            return Exit::IoReset;
        }
        if offset == 0
            && let Ok(bytes) = <[u8; 4]>::try_from(data)
        {
            self.0.config_address.store(u32::from_le_bytes(bytes), Ordering::Relaxed);
        } else if (CONFIG_DATA..config_data_end()).contains(&offset)
            && data.len() <= (config_data_end() - offset) as usize
            && let Some((device, function, register)) = self.target(offset)
        {
            return write(&self.0, device, function, register, data).unwrap_or(Exit::IoPciConfig);
        }
        Exit::IoPciConfig
    }
}

/// First offset behind the data port.
const fn config_data_end() -> u64 {
    CONFIG_DATA + 4
}

/// Enhanced configuration access: 4 KiB for each function of bus 0 (PCI Express 5.0 section 7.2.2).
pub(super) struct Ecam(pub(super) Arc<PciRoot>);

fn ecam_target(address: u64) -> (usize, u64, u64) {
    // Functions have no extended configuration space: what is beyond 256 bytes does not answer.
    (((address >> 15) & 0x1f) as usize, (address >> 12) & 7, address & 0xfff)
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) -> Exit {
        let mut exit = Exit::MmioPciConfig;
        by_doubleword(offset, data.len(), |address, piece| {
            let (device, function, register) = ecam_target(address);
            exit = read(&self.0, device, function, register, &mut data[piece]).unwrap_or(exit);
        });
        exit
    }

    fn write(&self, offset: u64, data: &[u8]) -> Exit {
        let mut exit = Exit::MmioPciConfig;
        by_doubleword(offset, data.len(), |address, piece| {
            let (device, function, register) = ecam_target(address);
            exit = write(&self.0, device, function, register, &data[piece]).unwrap_or(exit);
        });
        exit
    }
}

/// A window of memory addresses in which BARs are decoded.
pub(super) struct Window {
    pub(super) root: Arc<PciRoot>,
    pub(super) start: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) -> Exit {
        match self.root.decode(self.start.wrapping_add(offset), data.len()) {
            Some((function, offset)) => function.read_bar(offset, data),
            None => {
                data.fill(0xff);
                Exit::MmioUnclaimed
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Exit {
        match self.root.decode(self.start.wrapping_add(offset), data.len()) {
            Some((function, offset)) => function.write_bar(offset, data),
            None => Exit::MmioUnclaimed,
        }
    }
}
