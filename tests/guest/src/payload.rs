//! The numbered, patterned payload of the guest's datagrams.

use crate::pattern;

/// First four bytes of every payload, little endian: "OBG1".
pub const MAGIC: u32 = 0x3147_424f;
/// Length of the header, the smallest payload, in bytes.
pub const HEADER: usize = 24;

/// What a datagram carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A frame of the job, followed by its pattern.
    Data,
    /// Only the acknowledgement counts.
    Acknowledgement,
}

/// The header of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// The sender has received everything and knows that everything it sent was received.
    pub finished: bool,
    /// Number of this data frame, from 0.
    pub sequence: u64,
    /// All data frames below this number have been received from the peer.
    pub acknowledged: u64,
}

impl Header {
    /// Writes a whole payload: header and, for data, the pattern of (`seed`, sequence).
    ///
    /// # Panics
    /// If `out` is shorter than [`HEADER`].
    pub fn write(&self, seed: u64, out: &mut [u8]) {
        let (header, rest) = out.split_at_mut(HEADER);
        header[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        header[4] = u8::from(self.kind == Kind::Acknowledgement);
        header[5] = u8::from(self.finished);
        header[6..8].fill(0);
        header[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        header[16..24].copy_from_slice(&self.acknowledged.to_le_bytes());
        pattern::fill_payload(seed, self.sequence, rest);
    }

    /// Reads a payload; `None` if it is not one of ours.
    #[must_use]
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let (header, _) = payload.split_first_chunk::<HEADER>()?;
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        if header[0..4] != MAGIC.to_le_bytes() || header[6..8] != [0, 0] {
            return None;
        }
        let kind = match header[4] {
            0 => Kind::Data,
            1 => Kind::Acknowledgement,
            _ => return None,
        };
        Some(Self { kind, finished: header[5] & 1 != 0, sequence: word(8), acknowledged: word(16) })
    }

    /// Whether the pattern behind the header is as [`write`](Self::write) makes it.
    #[must_use]
    pub fn intact(&self, seed: u64, payload: &[u8]) -> bool {
        payload.get(HEADER..).is_some_and(|rest| pattern::check_payload(seed, self.sequence, rest).is_none())
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip(seed: u64, sequence: u64, acknowledged: u64, finished: bool, ack: bool, len in HEADER..300) {
            let kind = if ack { Kind::Acknowledgement } else { Kind::Data };
            let header = Header { kind, finished, sequence, acknowledged };
            let mut payload = std::vec![0; len];
            header.write(seed, &mut payload);
            prop_assert_eq!(Header::parse(&payload), Some(header));
            prop_assert!(header.intact(seed, &payload));
            if len > HEADER {
                payload[len - 1] ^= 1;
                prop_assert!(!header.intact(seed, &payload));
            }
        }

        #[test]
        fn anything_parses_or_not(bytes: std::vec::Vec<u8>) {
            let _ = Header::parse(&bytes);
        }
    }
}
