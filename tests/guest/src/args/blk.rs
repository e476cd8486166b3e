//! Options of the block jobs.

use super::Words;
use super::words::Error;
use crate::pattern::SECTOR;
use alloc::vec::Vec;

/// Largest request in bytes.
const MAX_BLOCK: u64 = 1 << 20;

/// Order of a pass over the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Ascending.
    Sequential,
    /// Scattered.
    Random,
}

/// What both `blk-verify` and `blk-bench` are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// Size of the region in bytes; `None`: the job's own choice.
    pub bytes: Option<u64>,
    /// Start of the region in bytes.
    pub offset: u64,
    /// Bytes per request.
    pub block: u32,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Pattern and order.
    pub seed: u64,
    /// How long.
    pub micros: Option<u64>,
    /// How many requests.
    pub ops: Option<u64>,
    /// Report the times without a completion that are at least this long, in microseconds.
    pub gaps_us: Option<u64>,
}

impl Load {
    fn parse(words: &mut Words<'_>) -> Result<Self, Error> {
        const SECTOR64: u64 = SECTOR as u64;
        let whole = |key: &str, value: u64| {
            if value.is_multiple_of(SECTOR64) {
                Ok(value)
            } else {
                Err(Error::new(&alloc::format!("{key}={value}"), "expected a multiple of 512"))
            }
        };
        let block = whole("bs", words.number("bs", 4096, 1, MAX_BLOCK)?)?;
        Ok(Self {
            bytes: words.maybe("bytes", SECTOR64, 1 << 50)?,
            offset: whole("offset", words.number("offset", 0, 0, 1 << 50)?)?,
            block: block as u32,
            depth: words.number("qd", 1, 1, u64::from(crate::ring::MAX_SIZE))? as u16,
            seed: words.number("seed", 1, 0, u64::MAX)?,
            micros: words.maybe_micros("secs")?,
            ops: words.maybe("ops", 1, 1 << 50)?,
            gaps_us: words.maybe_micros("gaps")?,
        })
    }
}

/// What `blk-verify` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyMode {
    /// Write all, read all, again and again.
    Passes,
    /// Write all, then reads and writes mixed, then read all.
    Mixed,
    /// Read what an earlier guest wrote.
    Read,
    /// Write for a later guest to read.
    Write,
}

/// Options of `blk-verify`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verify {
    /// Region, depth, length.
    pub load: Load,
    /// What to do.
    pub mode: VerifyMode,
    /// Order of the passes.
    pub order: Order,
    /// Generation of the first write pass, or expected by the first read.
    pub generation: u32,
    /// Passes, if there is no time.
    pub loops: u64,
    /// One of so many mixed requests does away with its block; 0: none.
    pub erase: u64,
}

impl Verify {
    pub(super) fn parse(words: &mut Words<'_>) -> Result<Self, Error> {
        let modes = [
            ("passes", VerifyMode::Passes),
            ("mixed", VerifyMode::Mixed),
            ("read", VerifyMode::Read),
            ("write", VerifyMode::Write),
        ];
        let orders = [("seq", Order::Sequential), ("random", Order::Random)];
        Ok(Self {
            load: Load::parse(words)?,
            mode: words.choice("verify", &modes, VerifyMode::Passes)?,
            order: words.choice("order", &orders, Order::Sequential)?,
            generation: words.number("gen", 1, 1, 1 << 30)? as u32,
            loops: words.number("loops", 1, 1, 1 << 30)?,
            erase: words.number("erase", 0, 0, 1 << 30)?,
        })
    }
}

/// Options of `blk-bench`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bench {
    /// Region, depth, length.
    pub load: Load,
    /// Percentage of writes.
    pub writes: u8,
    /// Order of the requests.
    pub order: Order,
    /// Time before the measurement begins, in microseconds.
    pub warmup_us: u64,
    /// Requests per second; `None`: as fast as they go.
    pub rate: Option<u64>,
    /// Report the distribution of the latencies.
    pub distribution: bool,
}

impl Bench {
    pub(super) fn parse(words: &mut Words<'_>) -> Result<Self, Error> {
        let kinds = [
            ("randread", (0, Order::Random)),
            ("randwrite", (100, Order::Random)),
            ("randrw", (50, Order::Random)),
            ("read", (0, Order::Sequential)),
            ("write", (100, Order::Sequential)),
        ];
        let (writes, order) = words.choice("rw", &kinds, (0, Order::Random))?;
        let mut load = Load::parse(words)?;
        if load.ops.is_none() {
            load.micros.get_or_insert(3_000_000);
        }
        let distribution = words.choice("hist", &[("0", false), ("1", true)], false)?;
        let rate = words.maybe("rate", 1, 1 << 30)?;
        Ok(Self { load, writes, order, rate, warmup_us: words.micros("warmup", 0)?, distribution })
    }
}

/// Options of `blk-malformed`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed<'a> {
    /// Cases to run; empty: all.
    pub cases: Vec<&'a str>,
}

impl<'a> Malformed<'a> {
    pub(super) fn parse(words: &mut Words<'a>) -> Self {
        let cases = words.take("cases").map(|(_, value)| value.split(',').collect());
        Self { cases: cases.unwrap_or_default() }
    }
}

/// Options of `blk-watch`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// How long to wait, in microseconds.
    pub micros: u64,
}

impl Watch {
    pub(super) fn parse(words: &mut Words<'_>) -> Result<Self, Error> {
        Ok(Self { micros: words.micros("secs", 10_000_000)? })
    }
}
