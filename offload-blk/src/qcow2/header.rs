//! What a qcow2 file says of itself, checked before anything believes it.
//!
//! Images come from strangers. Crate `imago` reads the format, and takes much of a header at its word: so what would make
//! it allocate without bounds or fail badly is refused here, and everything that we do not serve, by name.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// "QFI\xfb".
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Lengths of the headers of version 2 and of the least of version 3, in bytes.
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// Cluster sizes, as powers of two: what is smaller than a page would tear blocks apart.
const CLUSTER_BITS: Range<u32> = 12..22;
/// Longest level 1 table and refcount table in bytes: what QEMU takes.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Where a refcount block is, in an entry of the refcount table; 0: there is none.
const REFCOUNT_BLOCK: u64 = !511;
/// Longest name of a backing file in bytes.
const MAX_NAME_BYTES: u32 = 1023;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const FEATURE_NAME_BYTES: usize = 48;

/// A backing file, as a header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backing {
    /// Its name.
    pub(crate) name: String,
    /// Its format, if that is said.
    pub(crate) format: Option<String>,
}

/// A header that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// 2 or 3.
    pub(crate) version: u32,
    /// Unit of allocation in bytes, as a power of two.
    pub(crate) cluster_bits: u32,
    /// Length of the disk in bytes.
    pub(crate) size_bytes: u64,
    /// What shows through where nothing has been written.
    pub(crate) backing: Option<Backing>,
}

/// Says whether a file that begins with `start` claims to be a qcow2 image. A guest can make a raw image do so.
pub(crate) fn claims(start: &[u8]) -> bool {
    start.starts_with(&MAGIC)
}

/// Reads the header of a file of `length` bytes; `read` fills a buffer from an offset, with zeros behind the end.
///
/// # Errors
/// `InvalidData`, `Unsupported`: what is wrong with it, as the rest of "the image is". What `read` answers.
pub(crate) fn read(length: u64, read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> io::Result<Header> {
    let mut first = [0; V3_BYTES];
    read(&mut first, 0)?;
    let word = |at: usize| u32::from_be_bytes([first[at], first[at + 1], first[at + 2], first[at + 3]]);
    let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
    if !claims(&first) {
        return Err(invalid("no qcow2 image: it does not begin like one"));
    }
    let version = word(4);
    if !matches!(version, 2 | 3) {
        return Err(unsupported(format!("of qcow2 version {version}, and 2 and 3 are known")));
    }
    let cluster_bits = word(20);
    if !CLUSTER_BITS.contains(&cluster_bits) {
        return Err(unsupported(format!("in clusters of 2^{cluster_bits} bytes, not 4 KiB to 2 MiB")));
    }
    let cluster = 1u64 << cluster_bits;
    if word(32) != 0 {
        return Err(unsupported("encrypted"));
    }
    let header_bytes = if version == 2 { V2_BYTES as u32 } else { word(100) };
    if version == 3 {
        features(long(72))?;
        if !(V3_BYTES as u32..=4096).contains(&header_bytes) || !header_bytes.is_multiple_of(8) {
            return Err(invalid(format!("damaged: its header is {header_bytes} bytes long")));
        }
        if word(96) > 6 {
            return Err(invalid("damaged: its reference counts have no width"));
        }
    }
    let size_bytes = long(24);
    let l1 = u64::from(word(36)) * 8;
    // An entry of the level 1 table is for one cluster of entries of level 2.
    let reach = u128::from(word(36)) << (2 * cluster_bits - 3);
    if l1 > MAX_L1_BYTES || u128::from(size_bytes) > reach {
        return Err(invalid("damaged: its level 1 table does not suit its size"));
    }
    let table = u64::from(word(56)) << cluster_bits;
    if table == 0 || table > MAX_REFCOUNT_TABLE_BYTES.max(cluster) {
        return Err(invalid("damaged: its refcount table has no sensible size"));
    }
    for (what, offset, bytes) in [("level 1", long(40), l1), ("refcount", long(48), table)] {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= length.next_multiple_of(cluster));
        if !offset.is_multiple_of(cluster) || !inside || (offset == 0 && bytes > 0) {
            return Err(invalid(format!("damaged: its {what} table is not in the file")));
        }
    }
    let mut counts = [0; 8];
    read(&mut counts, long(48))?;
    if u64::from_be_bytes(counts) & REFCOUNT_BLOCK == 0 {
        // Imago would make that block where the header is, not find it there, and make it again until the stack is full.
        return Err(invalid(
            "damaged: its header is not counted as used; repair it with: qemu-img check -r all",
        ));
    }
    let format = if version == 2 { None } else { extensions(u64::from(header_bytes), cluster, &read)? };
    let (offset, bytes) = (long(8), word(16));
    let backing = if offset == 0 {
        None
    } else {
        if bytes == 0
            || bytes > MAX_NAME_BYTES
            || offset.checked_add(bytes.into()).is_none_or(|end| end >= cluster)
        {
            return Err(invalid("damaged: the name of its backing file is not in its header"));
        }
        let mut name = vec![0; bytes as usize];
        read(&mut name, offset)?;
        let name = String::from_utf8(name).ok().filter(|n| !n.contains('\0'));
        let name = name.ok_or_else(|| invalid("damaged: the name of its backing file is no text"))?;
        Some(Backing { name, format })
    };
    Ok(Header { version, cluster_bits, size_bytes, backing })
}

/// Longest disk in clusters of `1 << cluster_bits` bytes, in bytes.
pub(crate) fn max_size_bytes(cluster_bits: u32) -> u64 {
    (MAX_L1_BYTES / 8).checked_shl(2 * cluster_bits - 3).map_or(1 << 56, |max| max.min(1 << 56))
}

/// Refuses incompatible features: all but none.
fn features(bits: u64) -> io::Result<()> {
    let what = match bits {
        0 => return Ok(()),
        b if b & 2 != 0 => "marked corrupt; repair it with: qemu-img check -r all",
        b if b & 1 != 0 => "marked dirty; repair it with: qemu-img check -r all",
        b if b & 4 != 0 => "only the map of an external data file, which is not served",
        b if b & 8 != 0 => "compressed by something other than zlib, which is not served",
        b if b & 16 != 0 => "with subclusters (extended_l2=on), which are not served",
        _ => return Err(unsupported(format!("of a newer kind of qcow2 (features {bits:#x})"))),
    };
    Err(unsupported(what))
}

/// Walks the header extensions; the format of the backing file, if one names it.
fn extensions(
    mut at: u64,
    cluster: u64,
    read: &impl Fn(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<Option<String>> {
    let damaged = || invalid("damaged: its header extensions have no end");
    let mut format: Option<String> = None;
    loop {
        let mut head = [0; 8];
        if at + 8 > cluster {
            return Err(damaged());
        }
        read(&mut head, at)?;
        let [k0, k1, k2, k3, l0, l1, l2, l3] = head;
        let (kind, bytes) = (u32::from_be_bytes([k0, k1, k2, k3]), u32::from_be_bytes([l0, l1, l2, l3]));
        at += 8;
        if at + u64::from(bytes) > cluster {
            return Err(damaged());
        }
        match kind {
            EXTENSION_END => return Ok(format),
            EXTENSION_BACKING_FORMAT => {
                let mut name = vec![0; bytes.min(64) as usize];
                read(&mut name, at)?;
                let name = String::from_utf8_lossy(&name).into_owned();
                if format.as_ref().is_some_and(|f| *f != name) {
                    return Err(invalid("damaged: it names two formats of its backing file"));
                }
                format = Some(name);
            }
            EXTENSION_FEATURE_NAMES if !(bytes as usize).is_multiple_of(FEATURE_NAME_BYTES) => {
                return Err(invalid("damaged: its table of feature names is cut"));
            }
            _ => {}
        }
        at += u64::from(bytes).next_multiple_of(8);
    }
}

/// Where a backing file is that the image at `path` calls `name`.
///
/// # Errors
/// `Unsupported`: it is no file.
pub(crate) fn resolve(path: &Path, name: &str) -> io::Result<PathBuf> {
    // QEMU's names of other things: json:{...}, nbd://host, file:..., fat:dir.
    let protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    if protocol {
        return Err(unsupported(format!("based on {name:?}, which is no file")));
    }
    Ok(path.parent().unwrap_or(path).join(name))
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what.into())
}

fn unsupported(what: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::Unsupported, what.into())
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The first cluster of an image: version 3, 64 KiB clusters, 1 GiB.
    pub(crate) fn sample() -> Vec<u8> {
        let mut bytes = vec![0; 4 << 16];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(4, &3u32.to_be_bytes());
        put(20, &16u32.to_be_bytes());
        put(24, &(1u64 << 30).to_be_bytes());
        put(36, &2u32.to_be_bytes());
        put(40, &(3u64 << 16).to_be_bytes());
        put(48, &(1u64 << 16).to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        put(1 << 16, &(2u64 << 16).to_be_bytes());
        bytes
    }

    fn with_backing(name: &str, format: &str) -> Vec<u8> {
        let mut bytes = sample();
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(8, &512u64.to_be_bytes());
        put(16, &(name.len() as u32).to_be_bytes());
        put(512, name.as_bytes());
        put(104, &EXTENSION_BACKING_FORMAT.to_be_bytes());
        put(108, &(format.len() as u32).to_be_bytes());
        put(112, format.as_bytes());
        bytes
    }

    fn parse(bytes: &[u8]) -> io::Result<Header> {
        read(bytes.len() as u64, |to, at| {
            let from = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
            let n = to.len().min(from.len());
            to.fill(0);
            to[..n].copy_from_slice(&from[..n]);
            Ok(())
        })
    }

    #[test]
    fn what_is_said_is_understood() {
        let header = parse(&sample()).unwrap();
        assert_eq!((header.version, header.cluster_bits, header.size_bytes), (3, 16, 1 << 30));
        assert_eq!(header.backing, None);
        let backing = parse(&with_backing("base.img", "raw")).unwrap().backing;
        assert_eq!(backing, Some(Backing { name: "base.img".into(), format: Some("raw".into()) }));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let says = |at: usize, value: &[u8], what: &str| {
            let mut bytes = sample();
            bytes[at..at + value.len()].copy_from_slice(value);
            let e = parse(&bytes).unwrap_err().to_string();
            assert!(e.contains(what), "{at}: {e}");
        };
        says(0, b"x", "does not begin like one");
        says(4, &[0, 0, 0, 9], "version 9");
        says(20, &[0, 0, 0, 9], "2^9");
        says(32, &[0, 0, 0, 1], "encrypted");
        says(36, &[0, 0, 0, 1], "does not suit its size");
        says(36, &[0, 0xff, 0, 1], "does not suit its size");
        says(40, &[0xff], "level 1 table is not in the file");
        says(48, &[0, 0, 0, 0, 0, 0, 0, 1], "refcount table is not in the file");
        says(56, &[0xff], "no sensible size");
        says(1 << 16, &[0, 0, 0, 0, 0, 0, 1, 0xff], "header is not counted");
        says(72, &[0, 0, 0, 0, 0, 0, 0, 1], "qemu-img check");
        says(72, &[0, 0, 0, 0, 0, 0, 0, 4], "external data file");
        says(72, &[1], "newer kind");
        says(96, &[0, 0, 0, 7], "no width");
        says(100, &[0, 0, 0, 9], "9 bytes long");
        says(104, &[1, 1, 1, 1, 0xff], "have no end");
        // One cut entry makes imago look behind it.
        says(104, &[0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 49], "feature names is cut");
        says(8, &[0, 0, 0, 0, 0, 0, 0xff, 0xf0, 0, 0, 4, 0], "not in its header");
    }

    #[test]
    fn backing_files_are_files() {
        let resolved = |name| resolve(Path::new("/srv/a.qcow2"), name);
        assert_eq!(resolved("base/x.img").unwrap(), Path::new("/srv/base/x.img"));
        assert_eq!(resolved("/other/x.img").unwrap(), Path::new("/other/x.img"));
        assert_eq!(resolved("./a:b").unwrap(), Path::new("/srv/./a:b"));
        for bad in ["json:{}", "nbd://host/x", "file:/x", "fat:rw:/tmp"] {
            assert_eq!(resolved(bad).unwrap_err().kind(), ErrorKind::Unsupported, "{bad}");
        }
    }

    proptest! {
        /// Any damage: an answer, in bounded time and memory.
        #[test]
        fn rubbish_is_refused_or_understood(
            damage in prop::collection::vec((0usize..600, any::<u8>()), 0..40),
            length in 0usize..(4 << 16),
        ) {
            let mut bytes = with_backing("base.img", "qcow2");
            damage.iter().for_each(|(at, value)| bytes[*at] = *value);
            bytes.truncate(length);
            if let Ok(header) = parse(&bytes) {
                prop_assert!(CLUSTER_BITS.contains(&header.cluster_bits));
                prop_assert!(header.backing.is_none_or(|b| b.name.len() <= 1023));
            }
        }
    }
}
