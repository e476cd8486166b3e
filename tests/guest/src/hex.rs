//! Frames as lines of hexadecimal digits, as somebody types them and reads them.

use alloc::vec::Vec;
use core::fmt;

/// Longest frame of a line: an Ethernet frame without a tag. What is typed beyond that is not kept.
pub const MAX_FRAME: usize = 1514;

/// A line that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// Bytes.
    Frame(Vec<u8>),
    /// Nothing: there is no more to come.
    Empty,
    /// Something else, or too much of it.
    Wrong,
}

/// Puts lines together from what is typed.
#[derive(Debug, Default)]
pub struct Lines {
    bytes: Vec<u8>,
    high: Option<u8>,
    wrong: bool,
}

impl Lines {
    /// Takes a byte; the line, if that was its end.
    pub fn push(&mut self, byte: u8) -> Option<Line> {
        if byte == b'\n' {
            let Self { bytes, high, wrong } = core::mem::take(self);
            return Some(match (wrong || high.is_some(), bytes.is_empty()) {
                (true, _) => Line::Wrong,
                (false, true) => Line::Empty,
                (false, false) => Line::Frame(bytes),
            });
        }
        let digit = char::from(byte).to_digit(16).map(|digit| digit as u8);
        match (digit, self.high.take()) {
            (Some(high), None) => self.high = Some(high),
            (Some(low), Some(high)) if self.bytes.len() < MAX_FRAME => self.bytes.push(high << 4 | low),
            _ => self.wrong = true,
        }
        None
    }
}

/// Bytes as such a line.
#[derive(Debug, Clone, Copy)]
pub struct Hex<'a>(pub &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    fn lines(typed: &[u8]) -> Vec<Line> {
        let mut lines = Lines::default();
        typed.iter().filter_map(|byte| lines.push(*byte)).collect()
    }

    #[test]
    fn a_wrong_line_spoils_no_other() {
        let typed = b"0aFf\n0g\nabc\n\n00\n";
        let expected =
            [Line::Frame([10, 255].into()), Line::Wrong, Line::Wrong, Line::Empty, Line::Frame([0].into())];
        assert_eq!(lines(typed), expected);
    }

    #[test]
    fn a_line_is_bounded() {
        let longest = std::vec![7; MAX_FRAME];
        assert_eq!(lines(std::format!("{}\n", Hex(&longest)).as_bytes()), [Line::Frame(longest)]);
        let mut endless = Lines::default();
        for _ in 0..10 * MAX_FRAME {
            assert_eq!(endless.push(b'0'), None);
        }
        assert!(endless.bytes.len() <= MAX_FRAME);
        assert_eq!(endless.push(b'\n'), Some(Line::Wrong));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(bytes in proptest::collection::vec(any::<u8>(), 1..200)) {
            let mut line = Hex(&bytes).to_string();
            line.push('\n');
            prop_assert_eq!(lines(line.as_bytes()), [Line::Frame(bytes)]);
        }
    }
}
