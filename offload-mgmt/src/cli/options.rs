//! Values of options: sizes, disks, network interfaces.

pub(crate) mod security;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use proto::v1::{DeviceLimits, DiskSpec, ImageFormat, NetLimits, NicSpec};

/// A size in bytes, written with K, M, G or T for powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub u64);

const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

impl FromStr for Size {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("\"{s}\" is no size; write it like 512M or 4G (K, M, G, T are powers of 1024)");
        let (number, unit) = with_unit(s).ok_or_else(bad)?;
        let shift = unit.map_or(0, |(_, shift)| *shift);
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| format!("\"{s}\" is more than 2^64 bytes"))
    }
}

/// A number and what stands behind it.
fn with_unit(s: &str) -> Option<(u64, Option<&(char, u32)>)> {
    let upper = s.to_ascii_uppercase();
    let unit = UNITS.iter().find(|(unit, _)| upper.ends_with(*unit));
    let digits = unit.map_or(Some(upper.as_str()), |(unit, _)| upper.strip_suffix(*unit))?;
    // `parse` would take a sign.
    let number = !digits.is_empty() && digits.bytes().all(|c| c.is_ascii_digit());
    Some((number.then(|| digits.parse().ok())??, unit))
}

/// A number of bits or packets, written with K, M, G or T for powers of 1000, as is the custom with networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Decimal(pub u64);

impl FromStr for Decimal {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad =
            || format!("\"{s}\" is no number; write it like 100K or 1G (K, M, G, T are powers of 1000)");
        let (number, unit) = with_unit(s).ok_or_else(bad)?;
        let thousands = unit.map_or(0, |(_, shift)| shift / 10);
        number
            .checked_mul(1000_u64.pow(thousands))
            .map(Self)
            .ok_or_else(|| format!("\"{s}\" is more than 2^64"))
    }
}

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = |shift: u32| 1000_u64.pow(shift / 10);
        let largest =
            UNITS.iter().rev().find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(times(*shift)));
        match largest {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 / times(*shift)),
            None => write!(f, "{}", self.0),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let largest = UNITS.iter().rev().find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        match largest {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

/// `--disk PATH` or `--disk path=PATH,key=value,...`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DiskOption(pub DiskSpec);

impl FromStr for DiskOption {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (mut disk, mut limits) = (DiskSpec::default(), DeviceLimits::default());
        for pair in Pairs::new(s, "path") {
            match pair.key.as_str() {
                "path" => disk.path = absolute(&pair.value()?)?,
                "format" => disk.format = format(&pair.value()?)?.into(),
                "id" => disk.id = pair.value()?,
                "readonly" => disk.read_only = pair.flag()?,
                "direct" => disk.direct = pair.flag()?,
                "queues" => disk.queues = pair.number()?,
                "card" => disk.card = pair.value()?,
                "iops" => limits.operations_per_second = pair.count()?,
                "iops-burst" => limits.operations_burst = pair.count()?,
                "bps" => limits.bytes_per_second = pair.size()?,
                "bps-burst" => limits.bytes_burst = pair.size()?,
                _ => {
                    let known =
                        "path, format, id, readonly, direct, queues, card, iops, iops-burst, bps, bps-burst";
                    return Err(pair.unknown(known));
                }
            }
        }
        limits.check().map_err(|e| e.message().to_owned())?;
        disk.limits = Some(limits).filter(|l| !l.is_none());
        if disk.path.is_empty() {
            return Err("a disk needs a path: --disk /srv/root.img or --disk path=/srv/root.img".to_owned());
        }
        Ok(Self(disk))
    }
}

fn format(name: &str) -> Result<ImageFormat, String> {
    match name {
        "raw" => Ok(ImageFormat::Raw),
        "qcow2" => Ok(ImageFormat::Qcow2),
        _ => Err(format!("\"{name}\" is no image format known here; known are: raw, qcow2")),
    }
}

/// `--nic NETWORK` or `--nic network=NETWORK,key=value,...`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NicOption(pub NicSpec);

impl FromStr for NicOption {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (mut nic, mut limits) = (NicSpec::default(), NetLimits::default());
        for pair in Pairs::new(s, "network") {
            match pair.key.as_str() {
                "network" => nic.network = pair.value()?,
                "id" => nic.id = pair.value()?,
                "mac" => nic.mac = pair.value()?,
                "address" => nic.addresses.push(pair.value()?),
                "mtu" => nic.mtu = pair.number()?,
                "queue-pairs" => nic.queue_pairs = pair.number()?,
                "card" => nic.card = pair.value()?,
                "security-group" => {
                    let groups = pair.value()?;
                    nic.security_groups.extend(groups.split('+').map(str::to_owned));
                }
                "connections" => nic.max_connections = pair.number()?,
                "rate-out" => limits.bits_per_second_out = pair.decimal()?,
                "rate-out-burst" => limits.bits_burst_out = pair.decimal()?,
                "rate-in" => limits.bits_per_second_in = pair.decimal()?,
                "rate-in-burst" => limits.bits_burst_in = pair.decimal()?,
                "pps-out" => limits.packets_per_second_out = pair.decimal()?,
                "pps-out-burst" => limits.packets_burst_out = pair.decimal()?,
                "pps-in" => limits.packets_per_second_in = pair.decimal()?,
                "pps-in-burst" => limits.packets_burst_in = pair.decimal()?,
                _ => {
                    let known = "network, id, mac, address, mtu, queue-pairs, card, security-group, connections, and rate-out, rate-in, pps-out, \
                                 pps-in, each of these also with -burst";
                    return Err(pair.unknown(known));
                }
            }
        }
        limits.check().map_err(|e| e.message().to_owned())?;
        nic.limits = Some(limits).filter(|l| !l.is_none());
        if nic.network.is_empty() {
            return Err("an interface needs a network: --nic default or --nic network=default".to_owned());
        }
        Ok(Self(nic))
    }
}

/// A path as the controller, which has another working directory, understands it.
pub(crate) fn absolute(path: &str) -> Result<String, String> {
    let absolute = std::path::absolute(path).map_err(|e| format!("\"{path}\": {e}"))?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|p| format!("{} is not UTF-8", PathBuf::from(p).display()))
}

/// `a,key=value,flag`: the first word may go without its key. A comma in a value is written twice.
struct Pairs<'a> {
    rest: Option<&'a str>,
    first: Option<&'static str>,
}

struct Pair {
    key: String,
    value: Option<String>,
}

impl<'a> Pairs<'a> {
    fn new(s: &'a str, first: &'static str) -> Self {
        Self { rest: Some(s), first: Some(first) }
    }

    /// The text up to a single comma, with double ones made single.
    fn word(&mut self) -> Option<String> {
        let text = self.rest?;
        let mut word = String::new();
        let mut chars = text.char_indices().peekable();
        self.rest = None;
        while let Some((at, c)) = chars.next() {
            if c == ',' && chars.next_if(|(_, next)| *next == ',').is_none() {
                self.rest = text.get(at + 1..);
                break;
            }
            word.push(c);
        }
        Some(word)
    }
}

impl Iterator for Pairs<'_> {
    type Item = Pair;

    fn next(&mut self) -> Option<Pair> {
        let word = self.word()?;
        let first = self.first.take();
        let (key, value) = match (word.split_once('='), first) {
            // A path may have a '=' in it; a key has no '/'.
            (Some((key, value)), _) if !key.contains('/') => (key.to_owned(), Some(value.to_owned())),
            (_, Some(first)) => (first.to_owned(), Some(word)),
            (_, None) => (word, None),
        };
        Some(Pair { key, value })
    }
}

impl Pair {
    fn value(self) -> Result<String, String> {
        match self.value {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(format!("{0} needs a value: {0}=...", self.key)),
        }
    }

    fn number(self) -> Result<u32, String> {
        self.parsed()
    }

    fn count(self) -> Result<u64, String> {
        self.parsed()
    }

    fn parsed<T: FromStr>(self) -> Result<T, String> {
        let key = self.key.clone();
        let value = self.value()?;
        value.parse().map_err(|_| format!("{key}={value}: \"{value}\" is no number"))
    }

    fn size(self) -> Result<u64, String> {
        let key = self.key.clone();
        let size: Size = self.value()?.parse().map_err(|e| format!("{key}: {e}"))?;
        Ok(size.0)
    }

    fn decimal(self) -> Result<u64, String> {
        let key = self.key.clone();
        let number: Decimal = self.value()?.parse().map_err(|e| format!("{key}: {e}"))?;
        Ok(number.0)
    }

    fn flag(self) -> Result<bool, String> {
        match self.value.as_deref() {
            None | Some("on") => Ok(true),
            Some("off") => Ok(false),
            Some(other) => Err(format!("{0}={other}: write {0}, {0}=on or {0}=off", self.key)),
        }
    }

    fn unknown(&self, known: &str) -> String {
        format!("\"{}\" is not known here; known are: {known}", self.key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes() {
        let size = |s: &str| s.parse::<Size>().map(|s| s.0);
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("4g"), Ok(4 << 30));
        assert_eq!(size("1k"), Ok(1024));
        assert_eq!(size("0"), Ok(0));
        for bad in ["", "M", "1.5G", "-1M", "+1M", "12MM", "1 G", "512MB", "99999999999999999999"] {
            let e = size(bad).expect_err(bad);
            assert!(e.contains("powers of 1024"), "{e}");
        }
        assert!(size("99999999999T").expect_err("overflow").contains("2^64"));
        assert_eq!(Size(1536 << 20).to_string(), "1536M");
        assert_eq!(Size(0).to_string(), "0");
    }

    #[test]
    fn disks() {
        let disk = |s: &str| s.parse::<DiskOption>().map(|d| d.0);
        let plain = DiskSpec { path: "/x.img".into(), ..DiskSpec::default() };
        assert_eq!(disk("/x.img"), Ok(plain.clone()));
        assert_eq!(disk("path=/x.img"), Ok(plain.clone()));
        assert_eq!(disk("/x.img,readonly"), Ok(DiskSpec { read_only: true, ..plain.clone() }));
        assert_eq!(
            disk("path=/x.img,id=root,queues=4,direct,card=fast,readonly=off"),
            Ok(DiskSpec { id: "root".into(), queues: 4, direct: true, card: "fast".into(), ..plain })
        );
        assert_eq!(disk("/x.img,format=qcow2").map(|d| d.format()), Ok(ImageFormat::Qcow2));
        let limits =
            DeviceLimits { operations_per_second: 500, bytes_per_second: 20 << 20, ..Default::default() };
        assert_eq!(disk("/x.img,iops=500,bps=20M").map(|d| d.limits), Ok(Some(limits)));
        let burst = DeviceLimits { operations_burst: 900, bytes_burst: 1 << 30, ..limits };
        let option = "/x.img,iops=500,bps=20M,iops-burst=900,bps-burst=1G";
        assert_eq!(disk(option).map(|d| d.limits), Ok(Some(burst)));
        assert_eq!(disk("/x.img,iops=0").map(|d| d.limits), Ok(None));
        assert_eq!(disk("/a,,b=c").map(|d| d.path), Ok("/a,b=c".into()));
        let here = std::env::current_dir().expect("directory").join("x.img");
        assert_eq!(disk("x.img").map(|d| PathBuf::from(d.path)), Ok(here));
        for (bad, says) in [
            ("", "needs a value"),
            ("readonly", "absolute"),
            ("id=a", "needs a path"),
            ("/x,queues=many", "no number"),
            ("/x,queues", "needs a value"),
            ("/x,iops=5k", "no number"),
            ("/x,bps=fast", "powers of 1024"),
            ("/x,bps=1", "4096"),
            ("/x,iops-burst=5", "without a limit"),
            ("/x,fast", "known are"),
            ("/x,format=vmdk", "known are: raw, qcow2"),
            ("/x,readonly=maybe", "readonly=on"),
        ] {
            match disk(bad) {
                Err(e) => assert!(e.contains(says), "{bad}: {e}"),
                // The first word is a path, whatever it is called.
                Ok(d) => assert!(bad == "readonly" && d.path.ends_with("/readonly")),
            }
        }
    }

    #[test]
    fn interfaces() {
        let nic = |s: &str| s.parse::<NicOption>().map(|n| n.0);
        assert_eq!(nic("default").map(|n| n.network), Ok("default".into()));
        assert_eq!(
            nic(
                "network=default,mac=02:00:00:00:00:01,address=10.0.0.5,address=fd00::5,id=lan,mtu=9000,queue-pairs=2"
            ),
            Ok(NicSpec {
                network: "default".into(),
                mac: "02:00:00:00:00:01".into(),
                id: "lan".into(),
                mtu: 9000,
                queue_pairs: 2,
                addresses: vec!["10.0.0.5".into(), "fd00::5".into()],
                ..NicSpec::default()
            })
        );
        let groups = |s: &str| nic(s).map(|n| (n.security_groups.join(" "), n.max_connections));
        assert_eq!(groups("lan,security-group=web"), Ok(("web".to_owned(), 0)));
        assert_eq!(
            groups("lan,security-group=web,security-group=a+b,connections=100"),
            Ok(("web a b".to_owned(), 100))
        );
        assert!(nic("lan,security-group=").is_err() && nic("lan,connections=x").is_err());
        let limits = NetLimits {
            bits_per_second_out: 1_000_000_000,
            bits_burst_out: 5_000_000,
            packets_per_second_in: 100_000,
            ..NetLimits::default()
        };
        let option = "lan,rate-out=1G,rate-out-burst=5M,pps-in=100k";
        assert_eq!(nic(option).map(|n| n.limits), Ok(Some(limits)));
        assert_eq!(nic("lan,rate-in=0").map(|n| n.limits), Ok(None));
        assert!(nic("lan,rate-in=fast").expect_err("no number").contains("powers of 1000"));
        assert!(nic("lan,rate-in=1k").expect_err("too little").contains("32768"));
        assert!(nic("lan,pps-out-burst=5").expect_err("no limit").contains("without a limit"));
        assert!(nic("mac=02:00:00:00:00:01").is_err());
        assert!(nic("default,queue_pairs=2").expect_err("unknown").contains("queue-pairs"));
    }

    proptest! {
        #[test]
        fn a_size_prints_as_it_parses(bytes: u64) {
            prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }

        #[test]
        fn a_decimal_prints_as_it_parses(number: u64) {
            prop_assert_eq!(Decimal(number).to_string().parse(), Ok(Decimal(number)));
        }

        #[test]
        fn any_path_can_be_written(path in "/[a-z,=/. ]{1,20}") {
            let written = format!("path={},readonly", path.replace(',', ",,"));
            let disk = written.parse::<DiskOption>().map(|d| d.0).map_err(TestCaseError::fail)?;
            prop_assert_eq!(disk.path, absolute(&path).map_err(TestCaseError::fail)?);
            prop_assert!(disk.read_only);
        }

        #[test]
        fn nothing_panics(s in ".{0,40}") {
            let _ = s.parse::<Size>();
            let _ = s.parse::<DiskOption>();
            let _ = s.parse::<NicOption>();
        }
    }
}
