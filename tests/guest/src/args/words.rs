//! Values of words: numbers, sizes, times, addresses, choices.

use super::{End, MmioDevice, PciAccess, Width};
use crate::frame::{Ipv4, Mac};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

/// What is wrong with a command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    word: String,
    reason: String,
}

impl Error {
    pub(super) fn new(word: &str, reason: &str) -> Self {
        Self { word: word.to_string(), reason: reason.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.word, self.reason)
    }
}

impl core::error::Error for Error {}

/// The words of one job, taken out one by one; what is left is unknown.
#[derive(Debug, Default)]
pub(super) struct Words<'a>(Vec<(&'a str, &'a str, &'a str)>);

impl<'a> Words<'a> {
    pub(super) fn add(&mut self, word: &'a str, key: &'a str, value: &'a str) {
        self.0.push((word, key, value));
    }

    /// The last word with this key, for error messages, and its value. All words of the key are gone then.
    pub(super) fn take(&mut self, key: &str) -> Option<(&'a str, &'a str)> {
        let found = self.0.iter().rev().find(|(_, k, _)| *k == key).map(|(word, _, value)| (*word, *value));
        self.0.retain(|(_, k, _)| *k != key);
        found
    }

    /// Words and keys nobody took.
    pub(super) fn rest(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().map(|(word, key, _)| (*word, *key))
    }

    pub(super) fn maybe(&mut self, key: &str, min: u64, max: u64) -> Result<Option<u64>, Error> {
        self.take(key).map(|(word, value)| within(word, value, min, max)).transpose()
    }

    pub(super) fn number(&mut self, key: &str, default: u64, min: u64, max: u64) -> Result<u64, Error> {
        Ok(self.maybe(key, min, max)?.unwrap_or(default))
    }

    pub(super) fn maybe_micros(&mut self, key: &str) -> Result<Option<u64>, Error> {
        let Some((word, value)) = self.take(key) else { return Ok(None) };
        micros(value)
            .map(Some)
            .ok_or_else(|| Error::new(word, "expected seconds, as 2 or 0.5, at most 1000000"))
    }

    pub(super) fn micros(&mut self, key: &str, default: u64) -> Result<u64, Error> {
        Ok(self.maybe_micros(key)?.unwrap_or(default))
    }

    pub(super) fn choice<T: Copy>(&mut self, key: &str, of: &[(&str, T)], default: T) -> Result<T, Error> {
        let Some((word, value)) = self.take(key) else { return Ok(default) };
        of.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice).ok_or_else(|| {
            let mut reason = String::from("expected one of");
            for (name, _) in of {
                reason.push(' ');
                reason.push_str(name);
            }
            Error::new(word, &reason)
        })
    }

    pub(super) fn ipv4(&mut self, key: &str) -> Result<Option<Ipv4>, Error> {
        self.take(key)
            .map(|(word, value)| bytes(value, '.', 10).ok_or_else(|| Error::new(word, "expected A.B.C.D")))
            .transpose()
    }

    pub(super) fn mac(&mut self, key: &str) -> Result<Option<Mac>, Error> {
        self.take(key)
            .map(|(word, value)| {
                bytes(value, ':', 16).map(Mac).ok_or_else(|| Error::new(word, "expected xx:xx:xx:xx:xx:xx"))
            })
            .transpose()
    }
}

fn bytes<const N: usize>(value: &str, separator: char, radix: u32) -> Option<[u8; N]> {
    let mut out = [0; N];
    let mut parts = value.split(separator);
    for byte in &mut out {
        *byte = u8::from_str_radix(parts.next()?, radix).ok()?;
    }
    parts.next().is_none().then_some(out)
}

/// A number, decimal or `0x` hexadecimal, with an optional suffix K, M or G (1024).
pub(super) fn number(value: &str) -> Option<u64> {
    let (digits, shift) = match value.as_bytes().last()? {
        b'K' | b'k' => (&value[..value.len() - 1], 10),
        b'M' | b'm' => (&value[..value.len() - 1], 20),
        b'G' | b'g' => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let number = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    number.checked_mul(1 << shift)
}

pub(super) fn within(word: &str, value: &str, min: u64, max: u64) -> Result<u64, Error> {
    number(value).filter(|n| (min..=max).contains(n)).ok_or_else(|| {
        Error::new(word, &alloc::format!("expected a number from {min} to {max} (suffixes K, M, G)"))
    })
}

/// Seconds with up to six decimals, in microseconds.
fn micros(value: &str) -> Option<u64> {
    let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
    let seconds: u64 = whole.parse().ok().filter(|s| *s <= 1_000_000)?;
    if fraction.len() > 6 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let mut micros = 0;
    for at in 0..6 {
        micros = micros * 10 + fraction.as_bytes().get(at).map_or(0, |b| u64::from(b - b'0'));
    }
    Some(seconds * 1_000_000 + micros)
}

pub(super) fn mmio(word: &str, value: &str) -> Result<MmioDevice, Error> {
    let parse = || {
        let (_, rest) = value.split_once('@')?;
        let mut parts = rest.split(':');
        let address = number(parts.next()?)?;
        let irq = number(parts.next()?)?;
        // Registers end at 0x100 and the configuration space is small; a page is what a device has.
        let whole = address.checked_add(0x1000).is_some_and(|end| end < 1 << 46);
        (whole && address.is_multiple_of(4) && irq < 1024).then_some(MmioDevice { address, irq: irq as u32 })
    };
    parse().ok_or_else(|| Error::new(word, "expected SIZE@ADDRESS:IRQ, as 4K@0xd0000000:5"))
}

pub(super) fn pci(word: &str, value: &str) -> Result<PciAccess, Error> {
    match value {
        "off" => Ok(PciAccess::Off),
        "cf8" => Ok(PciAccess::Ports),
        "auto" => Ok(PciAccess::Auto),
        _ => value
            .strip_prefix("ecam:")
            .and_then(number)
            .filter(|address| address.is_multiple_of(0x10_0000) && *address < 1 << 46)
            .map(PciAccess::Ecam)
            .ok_or_else(|| Error::new(word, "expected auto, off, cf8 or ecam:ADDRESS")),
    }
}

pub(super) fn end(word: &str, value: &str) -> Result<End, Error> {
    let register = |rest: &str| {
        let mut parts = rest.split(':');
        let address = number(parts.next()?)?;
        let width = match parts.next()? {
            "b" => Width::Byte,
            "w" => Width::Word,
            "l" => Width::Long,
            _ => return None,
        };
        let value = u32::try_from(number(parts.next()?)?).ok()?;
        parts.next().is_none().then_some((address, width, value))
    };
    let port = |(address, width, value)| Some(End::Port(u16::try_from(address).ok()?, width, value));
    let memory = |(address, width, value)| (address < 1 << 46).then_some(End::Memory(address, width, value));
    let parsed = match value.split_once(':') {
        Some(("port", rest)) => register(rest).and_then(port),
        Some(("mem", rest)) => register(rest).and_then(memory),
        Some(_) => None,
        None => match value {
            "halt" => Some(End::Halt),
            "reset" => Some(End::Reset),
            "i8042" => Some(End::I8042),
            "triple" => Some(End::Triple),
            "poweroff" => Some(End::PowerOff),
            _ => None,
        },
    };
    parsed.ok_or_else(|| {
        Error::new(
            word,
            "expected halt, poweroff, reset, i8042, triple, port:PORT:b|w|l:VALUE or mem:ADDRESS:b|w|l:VALUE",
        )
    })
}
