//! The command line: global words, then stages of jobs. The grammar is in `README.md`.

mod blk;
mod net;
mod words;

pub use blk::{Bench, Load, Malformed, Order, Verify, VerifyMode, Watch};
pub use net::{Echo, Net, Offload, PingPong, Receive, Send, Window};
pub use words::Error;

use alloc::vec::Vec;
use words::Words;

/// Words that VMMs add for Linux and that say nothing to this guest.
const FOR_LINUX: &[&str] = &[
    "8250.nr_uarts",
    "console",
    "earlyprintk",
    "i8042.noaux",
    "i8042.nokbd",
    "i8042.nomux",
    "i8042.dumbkbd",
    "i8042.nopnp",
    "nomodule",
    "noreplace-smp",
    "panic",
    "quiet",
    "reboot",
    "ro",
    "root",
    "rootfstype",
    "rw",
];

/// A virtio-mmio device as `virtio_mmio.device=` describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical address of its registers.
    pub address: u64,
    /// Its global system interrupt.
    pub irq: u32,
}

/// How to look for PCI functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PciAccess {
    /// By ECAM if ACPI tells where it is, by ports otherwise.
    #[default]
    Auto,
    /// Not at all.
    Off,
    /// By ECAM at this address.
    Ecam(u64),
    /// By ports 0xcf8 and 0xcfc.
    Ports,
}

/// Width of a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Word,
    /// 32 bits.
    Long,
}

/// How the VM ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum End {
    /// Sleep for ever.
    #[default]
    Halt,
    /// Port 0xcf9, then i8042, then a triple fault.
    Reset,
    /// The keyboard controller's reset line, port 0x64.
    I8042,
    /// A triple fault.
    Triple,
    /// ACPI S5.
    PowerOff,
    /// A write to a port.
    Port(u16, Width, u32),
    /// A write to a register in memory.
    Memory(u64, Width, u32),
}

/// What every job that drives a device is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device<'a> {
    /// Number of the device among those of its kind.
    pub index: usize,
    /// Queues (pairs) to use; `None`: as many as there are.
    pub queues: Option<u16>,
    /// Largest ring.
    pub ring: u16,
    /// Sleep until interrupts instead of polling.
    pub interrupts: bool,
    /// Give the queues interrupt vectors, though nobody waits for them.
    pub vectors: bool,
    /// Give up after so many microseconds without a completion.
    pub timeout_us: u64,
    /// Names of features not to accept.
    pub refused: Vec<&'a str>,
}

impl Device<'_> {
    /// Whether the feature of this name is not to be accepted.
    #[must_use]
    pub fn refuses(&self, feature: &str) -> bool {
        self.refused.contains(&feature)
    }
}

/// What a job does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind<'a> {
    /// `blk-verify`
    BlkVerify(Device<'a>, Verify),
    /// `blk-bench`
    BlkBench(Device<'a>, Bench),
    /// `blk-first`
    BlkFirst(Device<'a>),
    /// `blk-malformed`
    BlkMalformed(Device<'a>, Malformed<'a>),
    /// `blk-watch`
    BlkWatch(Device<'a>, Watch),
    /// `net-echo`
    NetEcho(Device<'a>, Net, Echo),
    /// `net-send`
    NetSend(Device<'a>, Net, Send),
    /// `net-recv`
    NetReceive(Device<'a>, Net, Receive),
    /// `net-exchange`
    NetExchange(Device<'a>, Net, Window),
    /// `net-pingpong`
    NetPingPong(Device<'a>, Net, PingPong),
    /// `net-raw`
    NetRaw(Device<'a>, Net),
    /// `idle`, for microseconds (0: for ever)
    Idle(u64),
    /// `compute`, for microseconds; `None`: until the other jobs of the stage have ended
    Compute(Option<u64>),
    /// `spin`, for microseconds
    Spin(u64),
    /// `serial-echo`
    SerialEcho,
    /// `panic`
    Panic,
    /// `fault`
    Fault,
    /// `reboot`, `triple-fault`, `poweroff`
    End(End),
}

/// One job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job<'a> {
    /// Position on the command line, from 1.
    pub number: u32,
    /// `job=` value.
    pub name: &'a str,
    /// `name=` value.
    pub label: Option<&'a str>,
    /// Wait for a byte on the serial port before the stage's I/O.
    pub wait_serial: bool,
    /// What it does.
    pub kind: Kind<'a>,
}

/// Everything the command line says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan<'a> {
    /// Frequency of the time stamp counter.
    pub tsc_khz: Option<u64>,
    /// What to do in the end.
    pub end: End,
    /// How to look for PCI functions.
    pub pci: PciAccess,
    /// virtio-mmio devices in the order of the command line.
    pub mmio: Vec<MmioDevice>,
    /// Global words that mean nothing to this guest.
    pub ignored: Vec<&'a str>,
    /// Jobs that run at the same time, stage by stage.
    pub stages: Vec<Vec<Job<'a>>>,
}

impl<'a> Plan<'a> {
    /// Reads a command line.
    ///
    /// # Errors
    /// The word that is wrong and why.
    pub fn parse(line: &'a str) -> Result<Self, Error> {
        let mut plan = Self::default();
        let mut jobs: Vec<(bool, &'a str, Words<'a>)> = Vec::new();
        for word in line.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "virtio_mmio.device" => plan.mmio.push(words::mmio(word, value)?),
                "job" => jobs.push((true, value, Words::default())),
                "also" if jobs.is_empty() => return Err(Error::new(word, "there is no job before it")),
                "also" => jobs.push((false, value, Words::default())),
                "pci" => plan.pci = words::pci(word, value)?,
                "end" => plan.end = words::end(word, value)?,
                "tsc_khz" => {
                    let khz = words::number(value).filter(|khz| (1_000..100_000_000).contains(khz));
                    plan.tsc_khz = Some(khz.ok_or_else(|| Error::new(word, "expected a frequency in kHz"))?);
                }
                _ => match jobs.last_mut() {
                    None => plan.ignored.push(word),
                    Some((_, _, words)) => words.add(word, key, value),
                },
            }
        }
        for (number, (opens, name, words)) in (1..).zip(jobs) {
            let job = job(number, name, words)?;
            match plan.stages.last_mut() {
                Some(stage) if !opens => stage.push(job),
                _ => plan.stages.push(Vec::from([job])),
            }
        }
        Ok(plan)
    }
}

/// What `end=` says on a command line that is otherwise wrong.
#[must_use]
pub fn end_of(line: &str) -> End {
    let value = |word: &str| word.strip_prefix("end=").and_then(|value| words::end(word, value).ok());
    line.split_ascii_whitespace().rev().find_map(value).unwrap_or_default()
}

fn job<'a>(number: u32, name: &'a str, mut words: Words<'a>) -> Result<Job<'a>, Error> {
    let label = words.take("name").map(|(_, value)| value);
    let wait_serial = match words.take("wait") {
        None => false,
        Some((_, "serial")) => true,
        Some((word, _)) => return Err(Error::new(word, "expected wait=serial")),
    };
    let w = &mut words;
    let kind = match name {
        "blk-verify" => Kind::BlkVerify(device(w, 30)?, Verify::parse(w)?),
        "blk-bench" => Kind::BlkBench(device(w, 30)?, Bench::parse(w)?),
        "blk-first" => Kind::BlkFirst(device(w, 30)?),
        "blk-malformed" => Kind::BlkMalformed(device(w, 1)?, Malformed::parse(w)),
        "blk-watch" => Kind::BlkWatch(device(w, 30)?, Watch::parse(w)?),
        "net-echo" => Kind::NetEcho(device(w, 30)?, Net::parse(w)?, Echo::parse(w)?),
        "net-send" => Kind::NetSend(device(w, 30)?, Net::parse_with_peer(w)?, Send::parse(w)?),
        "net-recv" => Kind::NetReceive(device(w, 5)?, Net::parse(w)?, Receive::parse(w)?),
        "net-exchange" => Kind::NetExchange(device(w, 30)?, Net::parse_with_peer(w)?, Window::parse(w)?),
        "net-pingpong" => Kind::NetPingPong(device(w, 30)?, Net::parse_with_peer(w)?, PingPong::parse(w)?),
        "net-raw" => Kind::NetRaw(device(w, 30)?, Net::parse(w)?),
        "idle" => Kind::Idle(w.micros("secs", 0)?),
        "compute" => Kind::Compute(w.maybe_micros("secs")?),
        "spin" => Kind::Spin(w.micros("secs", 1_000_000)?),
        "serial-echo" => Kind::SerialEcho,
        "panic" => Kind::Panic,
        "fault" => Kind::Fault,
        "reboot" => Kind::End(End::Reset),
        "triple-fault" => Kind::End(End::Triple),
        "poweroff" => match w.take("how") {
            Some((word, value)) => Kind::End(words::end(word, value)?),
            None => Kind::End(End::PowerOff),
        },
        _ => return Err(Error::new(name, "no such job; README.md of the guest lists them")),
    };
    match words.rest().find(|(_, key)| !FOR_LINUX.contains(key)) {
        Some((word, _)) => Err(Error::new(word, "this job has no such option")),
        None => Ok(Job { number, name, label, wait_serial, kind }),
    }
}

fn device<'a>(words: &mut Words<'a>, timeout_secs: u64) -> Result<Device<'a>, Error> {
    const FEATURES: &[&str] = &["eventidx", "indirect", "mq", "mrg", "flush", "erase", "mtu", "status"];
    let interrupts = words.choice("mode", &[("poll", false), ("irq", true)], false)?;
    let queues = match words.take("queues") {
        None => Some(1),
        Some((_, "max")) => None,
        Some((word, value)) => Some(words::within(word, value, 1, 256)? as u16),
    };
    let ring = words.number("qsize", 256, 1, u64::from(crate::ring::MAX_SIZE))?;
    if !ring.is_power_of_two() {
        return Err(Error::new("qsize", "a ring's size is a power of two"));
    }
    let mut refused = Vec::new();
    if let Some((word, value)) = words.take("no") {
        for feature in value.split(',') {
            if !FEATURES.contains(&feature) {
                return Err(Error::new(word, "features: eventidx, indirect, mq, mrg, flush, mtu, status"));
            }
            refused.push(feature);
        }
    }
    Ok(Device {
        index: words.number("dev", 0, 0, 255)? as usize,
        queues,
        ring: ring as u16,
        interrupts,
        vectors: words.choice("vectors", &[("0", false), ("1", true)], interrupts)?,
        timeout_us: words.micros("timeout", timeout_secs * 1_000_000)?,
        refused,
    })
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::string::{String, ToString};

    #[test]
    fn stages_and_options() {
        let line = "console=ttyS0 tsc_khz=2000000 end=port:0x604:w:0x2000 \
                    job=blk-verify bytes=64M queues=2 qd=32 mode=irq no=eventidx,indirect secs=1.5 \
                    also=net-echo ip=10.1.2.3 root=/dev/vda virtio_mmio.device=4K@0xd0000000:5 job=idle";
        let plan = Plan::parse(line).expect("a good line");
        assert_eq!(plan.ignored, ["console=ttyS0"]);
        assert_eq!(plan.tsc_khz, Some(2_000_000));
        assert_eq!(plan.end, End::Port(0x604, Width::Word, 0x2000));
        assert_eq!(plan.mmio, [MmioDevice { address: 0xd000_0000, irq: 5 }]);
        assert_eq!(plan.stages.len(), 2);
        let Kind::BlkVerify(device, verify) = &plan.stages[0][0].kind else { panic!("{plan:?}") };
        assert_eq!((device.queues, device.interrupts, device.ring), (Some(2), true, 256));
        assert!(device.refuses("indirect") && !device.refuses("mq"));
        assert_eq!(verify.load.bytes, Some(64 << 20));
        assert_eq!(verify.load.depth, 32);
        assert_eq!(verify.load.micros, Some(1_500_000));
        let Kind::NetEcho(_, net, _) = &plan.stages[0][1].kind else { panic!("{plan:?}") };
        assert_eq!(net.ip, [10, 1, 2, 3]);
        assert_eq!(plan.stages[1][0].kind, Kind::Idle(0));
        assert_eq!(plan.stages[1][0].number, 3);
    }

    #[test]
    fn errors_name_the_word() {
        for (line, word) in [
            ("job=blk-verify bytes=64X", "bytes=64X"),
            ("job=blk-verify bs=100", "bs=100"),
            ("job=blk-verify qd=0", "qd=0"),
            ("job=blk-verify verify=maybe", "verify=maybe"),
            ("job=blk-verfy", "blk-verfy"),
            ("job=idle colour=red", "colour=red"),
            ("also=idle", "also=idle"),
            ("end=now", "end=now"),
            ("job=net-send", "peer"),
            ("job=net-send peer=10.0.0", "peer=10.0.0"),
            ("virtio_mmio.device=4K", "virtio_mmio.device=4K"),
            ("tsc_khz=fast", "tsc_khz=fast"),
            ("job=poweroff how=gently", "how=gently"),
        ] {
            let error = Plan::parse(line).expect_err(line).to_string();
            assert!(error.starts_with(word), "{line}: {error}");
        }
    }

    #[test]
    fn what_a_receiver_waits_for() {
        for (words, count, min) in [
            ("", 1000, 1000),
            ("count=5", 5, 5),
            ("count=5 min=2", 5, 2),
            ("secs=2", u64::MAX, 1),
            ("secs=2 min=7", u64::MAX, 7),
            ("secs=2 count=9", 9, 9),
        ] {
            let line = std::format!("job=net-recv warmup=0.5 {words}");
            let plan = Plan::parse(&line).expect("a good line");
            let Kind::NetReceive(_, net, receive) = &plan.stages[0][0].kind else { panic!("{plan:?}") };
            assert_eq!((receive.count, receive.min, net.warmup_us), (count, min, 500_000), "{line}");
        }
    }

    #[test]
    fn the_end_of_a_wrong_line() {
        assert_eq!(end_of("end=triple job=nonsense x=y"), End::Triple);
        assert_eq!(end_of("job=nonsense end=never"), End::Halt);
    }

    proptest! {
        #[test]
        fn any_line_is_survived(line in "[ -~]*") {
            let _ = Plan::parse(&line);
        }

        #[test]
        fn any_values_are_survived(
            job in "blk-verify|blk-bench|blk-malformed|net-send|net-recv|net-echo|net-exchange|net-pingpong|net-raw|idle|poweroff",
            words in proptest::collection::vec(
                ("bytes|bs|qd|queues|secs|offset|seed|ip|peer|peer_mac|how|end|pci|virtio_mmio.device|timeout|dev|size|count|qsize",
                 "[0-9a-fxKMGT.:@]{0,12}"), 0..6),
        ) {
            let mut line = std::format!("job={job}");
            for (key, value) in words {
                line.push_str(&std::format!(" {key}={value}"));
            }
            let line: String = line;
            let _ = Plan::parse(&line);
        }
    }
}
