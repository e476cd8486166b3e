//! The memory that connections are kept in: a file that a killed card's successor finds again.
//!
//! ```text
//!   bytes    0        64       4096
//!            [ header | 0 ...  | slot 0 | slot 1 | ...                     a slot: 6 words of 8 bytes
//!                                  ├─ 0, 1  the interface's address
//!                                  ├─ 2, 3  the other's
//!                                  ├─ 4     ports, protocol, IP version, who opened it
//!                                  └─ 5     state, and when it is forgotten; 0: the slot is free
//! ```
//!
//! The last word makes a slot valid and is written last, by one store: a process that is killed at any instant leaves
//! whole connections. All numbers are the host's own; the file does not leave it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::posix_fallocate;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::flow::{Direction, Key};
use super::tcp::State;

/// "outbrdct", and the version of the layout, which is raised by every change.
const MAGIC: u64 = u64::from_be_bytes(*b"outbrdct");
const VERSION: u64 = 1;
/// Bytes before the first slot: a page.
const HEADER: usize = 4096;
/// Words of the header that say whose connections these are.
const OWNER_WORDS: usize = 6;
const SLOT_WORDS: usize = 6;
const SLOT: usize = SLOT_WORDS * 8;
const STATE_SHIFT: u32 = 56;

/// Whose connections a file has: those of another interface, or of another boot, say nothing about this one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The boot of the host, whose clock the times are of.
    pub boot: u128,
    /// The interface's MAC address.
    pub mac: [u8; 6],
    /// A number made of its network's id.
    pub network: u64,
}

/// A connection as it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// Its name.
    pub key: Key,
    /// The direction of the packet that opened it.
    pub origin: Direction,
    /// How far it is.
    pub state: State,
    /// When it is forgotten, in milliseconds of the host's monotonic clock.
    pub expires: u64,
}

/// Room for a number of connections.
#[derive(Debug)]
pub struct Slots {
    memory: MmapRegion<()>,
    count: usize,
}

impl Slots {
    /// Room that goes with this process.
    ///
    /// # Errors
    /// No memory.
    pub fn in_memory(count: usize) -> io::Result<Self> {
        let memory = MmapRegion::new(HEADER + count * SLOT).map_err(io::Error::other)?;
        Ok(Self { memory, count })
    }

    /// Room in a file, with what is in it, or empty if there is none; then true: it was there, and not as it should be.
    /// All of its memory is taken now, so that no store into it fails for want of some.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn in_file(path: &Path, count: usize, owner: &Owner) -> io::Result<(Self, bool)> {
        let length = HEADER + count * SLOT;
        // What is no file of ours is not followed or waited for.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let there = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        if let Ok(file) = &there {
            let metadata = file.metadata()?;
            if metadata.is_file() && metadata.len() == length as u64 {
                // One with holes, which nobody here makes, would be as bad as none.
                posix_fallocate(file, 0, length as i64)?;
                let slots = Self::map(file, count, length)?;
                if slots.header() == Some(header(count, owner)) {
                    return Ok((slots, false));
                }
            }
        }
        let damaged = match there {
            Ok(_) => true,
            Err(e) => e.kind() != io::ErrorKind::NotFound,
        };
        // A new file beside it, put into its place when it is whole: what may still be mapped is not touched.
        let new = path.with_extension("new");
        let _ = std::fs::remove_file(&new);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600).custom_flags(flags);
        let made = options.open(&new).and_then(|file| {
            posix_fallocate(&file, 0, length as i64)?;
            let slots = Self::map(&file, count, length)?;
            for (i, word) in header(count, owner).into_iter().enumerate() {
                slots.store(i * 8, word);
            }
            std::fs::rename(&new, path)?;
            Ok(slots)
        });
        if made.is_err() {
            let _ = std::fs::remove_file(&new);
        }
        made.map(|slots| (slots, damaged))
    }

    fn map(file: &File, count: usize, length: usize) -> io::Result<Self> {
        let at = FileOffset::new(file.try_clone()?, 0);
        Ok(Self { memory: MmapRegion::from_file(at, length).map_err(io::Error::other)?, count })
    }

    /// How many there is room for.
    pub fn count(&self) -> usize {
        self.count
    }

    fn word(&self, at: usize) -> Option<&AtomicU64> {
        self.memory.get_atomic_ref::<AtomicU64>(at).ok()
    }

    fn store(&self, at: usize, value: u64) {
        if let Some(word) = self.word(at) {
            word.store(value, Ordering::Release);
        }
    }

    fn load(&self, at: usize) -> Option<u64> {
        Some(self.word(at)?.load(Ordering::Acquire))
    }

    fn header(&self) -> Option<[u64; OWNER_WORDS]> {
        let mut words = [0; OWNER_WORDS];
        for (i, word) in words.iter_mut().enumerate() {
            *word = self.load(i * 8)?;
        }
        Some(words)
    }

    /// The connection in slot `i`. `None`: there is none, or nothing that could have been written there.
    pub fn get(&self, i: usize) -> Option<Kept> {
        let last = self.load(at(i, 5)).filter(|w| *w != 0)?;
        let state = State::from_number((last >> STATE_SHIFT) as u8)?;
        let pair =
            |word| Some(u128::from(self.load(at(i, word))?) << 64 | u128::from(self.load(at(i, word + 1))?));
        let fields = self.load(at(i, 4))?;
        // What is left of the word is always 0.
        if fields >> 42 != 0 {
            return None;
        }
        let key = Key {
            v6: fields & 1 << 40 != 0,
            protocol: (fields >> 32) as u8,
            local: pair(0)?,
            peer: pair(2)?,
            local_port: (fields >> 16) as u16,
            peer_port: fields as u16,
        };
        let origin = if fields & 1 << 41 != 0 { Direction::Out } else { Direction::In };
        Some(Kept { key, origin, state, expires: last & ((1 << STATE_SHIFT) - 1) })
    }

    /// Whether something is written in slot `i`, sense or not.
    pub fn is_used(&self, i: usize) -> bool {
        self.load(at(i, 5)).is_some_and(|w| w != 0)
    }

    /// How far the connection in slot `i` is, and when it is forgotten.
    pub fn status(&self, i: usize) -> Option<(State, u64)> {
        let last = self.load(at(i, 5))?;
        Some((State::from_number((last >> STATE_SHIFT) as u8)?, last & ((1 << STATE_SHIFT) - 1)))
    }

    /// Writes a connection into slot `i`, which is free.
    pub fn put(&self, i: usize, kept: &Kept) {
        let key = &kept.key;
        let flags = u64::from(key.v6) | u64::from(kept.origin == Direction::Out) << 1;
        let fields = flags << 40
            | u64::from(key.protocol) << 32
            | u64::from(key.local_port) << 16
            | u64::from(key.peer_port);
        self.store(at(i, 0), (key.local >> 64) as u64);
        self.store(at(i, 1), key.local as u64);
        self.store(at(i, 2), (key.peer >> 64) as u64);
        self.store(at(i, 3), key.peer as u64);
        self.store(at(i, 4), fields);
        self.set_status(i, kept.state, kept.expires);
    }

    /// Changes it.
    pub fn set_status(&self, i: usize, state: State, expires: u64) {
        let expires = expires.min((1 << STATE_SHIFT) - 1);
        self.store(at(i, 5), (state as u64) << STATE_SHIFT | expires);
    }

    /// Frees slot `i`.
    pub fn clear(&self, i: usize) {
        self.store(at(i, 5), 0);
    }
}

/// Where a word of a slot is.
fn at(i: usize, word: usize) -> usize {
    HEADER + i * SLOT + word * 8
}

fn header(count: usize, owner: &Owner) -> [u64; OWNER_WORDS] {
    let [a, b, c, d, e, f] = owner.mac;
    let shape = VERSION << 48 | (SLOT as u64) << 32 | count as u64;
    let mac = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
    [MAGIC, shape, (owner.boot >> 64) as u64, owner.boot as u64, mac, owner.network]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::conntrack) const OWNER: Owner =
        Owner { boot: 7 << 70 | 9, mac: [2, 0, 0, 0, 0, 1], network: 5 };

    fn kept() -> Kept {
        Kept {
            key: Key {
                v6: true,
                protocol: 6,
                local: 1 << 100 | 2,
                peer: 3 << 90 | 4,
                local_port: 0xfffe,
                peer_port: 443,
            },
            origin: Direction::Out,
            state: State::Established,
            expires: 123_456_789,
        }
    }

    #[test]
    fn what_is_written_is_there_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.ct");
        let (slots, damaged) = Slots::in_file(&path, 16, &OWNER).unwrap();
        assert!(!damaged);
        let other = Kept { key: Key { v6: false, ..kept().key }, origin: Direction::In, ..kept() };
        slots.put(3, &kept());
        slots.put(15, &other);
        slots.put(4, &kept());
        slots.clear(4);
        // As a process that was killed leaves it: nobody has unmapped or synced anything.
        let (again, damaged) = Slots::in_file(&path, 16, &OWNER).unwrap();
        assert!(!damaged);
        let all: Vec<_> = (0..16).filter_map(|i| again.get(i).map(|k| (i, k))).collect();
        assert_eq!(all, [(3, kept()), (15, other)]);
        assert_eq!((again.get(16), again.status(3)), (None, Some((State::Established, 123_456_789))));
    }

    #[test]
    fn what_is_anothers_or_damaged_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.ct");
        let others = [
            (16, Owner { boot: 8, ..OWNER }),
            (16, Owner { mac: [2, 0, 0, 0, 0, 2], ..OWNER }),
            (16, Owner { network: 6, ..OWNER }),
            (17, OWNER),
        ];
        for (count, owner) in others {
            Slots::in_file(&path, 16, &OWNER).unwrap().0.put(1, &kept());
            let (slots, damaged) = Slots::in_file(&path, count, &owner).unwrap();
            assert_eq!((damaged, slots.get(1)), (true, None));
        }
        for content in [&b""[..], &[0xff; HEADER + 16 * SLOT][..], &[0; HEADER + 16 * SLOT]] {
            std::fs::write(&path, content).unwrap();
            let (slots, damaged) = Slots::in_file(&path, 16, &OWNER).unwrap();
            assert_eq!((damaged, slots.get(1)), (true, None));
        }
        // A link that leads elsewhere is not followed.
        let elsewhere = dir.path().join("elsewhere");
        std::fs::write(&elsewhere, b"precious").unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert!(Slots::in_file(&path, 16, &OWNER).unwrap().1);
        assert_eq!(std::fs::read(&elsewhere).unwrap(), b"precious");
        assert!(Slots::in_file(&dir.path().join("no/where"), 16, &OWNER).is_err());
    }
}
