//! Options of the network jobs.

use super::Words;
use super::words::Error;
use crate::frame::{Ipv4, Mac, Protocol};
use crate::payload;

/// Largest payload: what an IPv4 packet holds, with room for the headers.
const MAX_PAYLOAD: u64 = 65_000;

/// Work to leave to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// Checksums.
    pub checksum: bool,
    /// Segmentation of TCP.
    pub tso: bool,
}

/// What every network job is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Net {
    /// Own address.
    pub ip: Ipv4,
    /// The other's.
    pub peer: Option<Ipv4>,
    /// Its Ethernet address, if it is not to be asked for.
    pub peer_mac: Option<Mac>,
    /// Port the jobs use on both sides.
    pub port: u16,
    /// Flows to send; there are at least as many as queue pairs.
    pub flows: u32,
    /// Payload bytes per frame; `None`: the job's default.
    pub size: Option<u16>,
    /// Pattern.
    pub seed: u64,
    /// Frames in flight to send.
    pub depth: u16,
    /// Work left to the device.
    pub offload: Offload,
    /// Bytes of a receive buffer.
    pub receive_buffer: u32,
    /// Time before the measurement begins, from the first frame, in microseconds.
    pub warmup_us: u64,
    /// Times of at least so long without a frame are reported, in microseconds.
    pub gaps_us: Option<u64>,
}

impl Net {
    pub(super) fn parse(words: &mut Words<'_>) -> Result<Self, Error> {
        let mut offload = Offload::default();
        if let Some((word, value)) = words.take("offload") {
            for part in value.split(',') {
                match part {
                    "csum" => offload.checksum = true,
                    "tso" => offload.tso = true,
                    "none" => {}
                    _ => return Err(Error::new(word, "expected csum, tso or both, comma between")),
                }
            }
        }
        let smallest = payload::HEADER as u64;
        Ok(Self {
            ip: words.ipv4("ip")?.unwrap_or([10, 0, 0, 2]),
            peer: words.ipv4("peer")?,
            peer_mac: words.mac("peer_mac")?,
            port: words.number("port", 9000, 1, 65535)? as u16,
            flows: words.number("flows", 1, 1, 1 << 16)? as u32,
            size: words.maybe("size", smallest, MAX_PAYLOAD)?.map(|size| size as u16),
            seed: words.number("seed", 1, 0, u64::MAX)?,
            depth: words.number("qd", 64, 1, u64::from(crate::ring::MAX_SIZE))? as u16,
            offload,
            receive_buffer: words.number("rxbuf", 2048, 128, 1 << 17)? as u32,
            warmup_us: words.micros("warmup", 0)?,
            gaps_us: words.maybe_micros("gaps")?,
        })
    }

    /// The same for a job that has somebody to talk to.
    pub(super) fn parse_with_peer(words: &mut Words<'_>) -> Result<Self, Error> {
        let net = Self::parse(words)?;
        match net.peer {
            Some(_) => Ok(net),
            None => Err(Error::new("peer", "this job needs peer=A.B.C.D")),
        }
    }
}

/// Options of `net-echo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Echo {
    /// Requests after which it ends; 0: never.
    pub count: u64,
    /// Time after which it ends, in microseconds; 0: never.
    pub micros: u64,
}

impl Echo {
    pub(super) fn parse(words: &mut Words<'_>) -> Result<Self, Error> {
        Ok(Self { count: words.number("count", 0, 0, 1 << 50)?, micros: words.micros("secs", 0)? })
    }
}

/// Options of `net-send`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Send {
    /// Frames.
    pub count: u64,
    /// Time after which it ends, in microseconds; 0: never.
    pub micros: u64,
    /// Frames per second; 0: as fast as it goes.
    pub rate: u64,
    /// UDP or TCP.
    pub protocol: Protocol,
}

impl Send {
    pub(super) fn parse(words: &mut Words<'_>) -> Result<Self, Error> {
        let micros = words.micros("secs", 0)?;
        // A time alone means: as many as fit.
        let count = words.number("count", if micros > 0 { u64::MAX } else { 1000 }, 1, 1 << 50)?;
        let protocols = [("udp", Protocol::Udp), ("tcp", Protocol::Tcp)];
        Ok(Self {
            count,
            micros,
            rate: words.number("rate", 0, 0, 1 << 40)?,
            protocol: words.choice("proto", &protocols, Protocol::Udp)?,
        })
    }
}

/// Options of `net-recv`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receive {
    /// Frames after which it ends.
    pub count: u64,
    /// Frames that make it a success.
    pub min: u64,
    /// Time after which it ends, in microseconds; 0: never.
    pub micros: u64,
}

impl Receive {
    pub(super) fn parse(words: &mut Words<'_>) -> Result<Self, Error> {
        let micros = words.micros("secs", 0)?;
        let count = words.maybe("count", 1, 1 << 50)?;
        // A time alone means: as many as come, if any do.
        let (default, least) = if micros > 0 { (u64::MAX, 1) } else { (1000, 1000) };
        let min = words.number("min", count.unwrap_or(least), 0, 1 << 50)?;
        Ok(Self { count: count.unwrap_or(default), min, micros })
    }
}

/// Options of `net-exchange`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Frames each way.
    pub count: u64,
    /// Frames unacknowledged.
    pub frames: u64,
}

impl Window {
    pub(super) fn parse(words: &mut Words<'_>) -> Result<Self, Error> {
        Ok(Self {
            count: words.number("count", 1000, 1, 1 << 50)?,
            frames: words.number("window", 64, 1, 1 << 16)?,
        })
    }
}

/// Options of `net-pingpong`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PingPong {
    /// Round trips.
    pub count: u64,
    /// Time after which it ends, in microseconds; 0: never.
    pub micros: u64,
    /// Time after which a request is sent again, in microseconds.
    pub retry_us: u64,
    /// Report the distribution of the round-trip times.
    pub distribution: bool,
}

impl PingPong {
    pub(super) fn parse(words: &mut Words<'_>) -> Result<Self, Error> {
        let micros = words.micros("secs", 0)?;
        Ok(Self {
            count: words.number("count", if micros > 0 { u64::MAX } else { 1000 }, 1, 1 << 50)?,
            micros,
            retry_us: words.micros("retry", 100_000)?,
            distribution: words.choice("hist", &[("0", false), ("1", true)], false)?,
        })
    }
}
