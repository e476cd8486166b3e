//! The tokens that a guest holds.
//!
//! A token is 256 random bits and nothing else. It is kept with its device until it expires, so it is of no use to another
//! device, and a card that starts again knows none: its guests are told so (401) and ask for new ones, as every client of
//! the service must be ready to do. Nothing of it is written anywhere.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// For how many seconds a token may be asked for.
pub const TTL_SECONDS: RangeInclusive<u32> = 1..=21_600;
/// How many a device's guest may hold; with one more it loses the oldest.
const TOKENS_MAX: usize = 64;
const BYTES: usize = 32;
/// Length of a token as text.
pub const TEXT: usize = 2 * BYTES;

/// A device's tokens.
#[derive(Debug, Default)]
pub struct Tokens(VecDeque<Token>);

#[derive(Debug)]
struct Token {
    bytes: [u8; BYTES],
    expires: Instant,
}

impl Tokens {
    /// Makes one that is good until `ttl` has passed. `None`: the host has no random numbers to give.
    pub fn issue(&mut self, ttl: Duration, now: Instant) -> Option<String> {
        let mut bytes = [0; BYTES];
        getrandom::fill(&mut bytes).ok()?;
        self.expire(now);
        if self.0.len() >= TOKENS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(Token { bytes, expires: now + ttl });
        Some(bytes.iter().fold(String::with_capacity(TEXT), |mut text, byte| {
            text.extend([byte >> 4, byte & 0xf].map(|d| char::from_digit(d.into(), 16).unwrap_or('0')));
            text
        }))
    }

    /// How long this one is still good; `None`: it is not.
    pub fn left(&self, text: &[u8], now: Instant) -> Option<Duration> {
        let bytes = parse(text)?;
        // The time that it takes tells nothing about the tokens there are.
        let equal = |t: &&Token| t.bytes.iter().zip(&bytes).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0;
        self.0
            .iter()
            .filter(equal)
            .map(|t| t.expires.saturating_duration_since(now))
            .find(|left| !left.is_zero())
    }

    /// Forgets those that are good no more.
    pub fn expire(&mut self, now: Instant) {
        self.0.retain(|t| t.expires > now);
    }

    /// When the last of them expires.
    pub fn last(&self) -> Option<Instant> {
        self.0.iter().map(|t| t.expires).max()
    }
}

fn parse(text: &[u8]) -> Option<[u8; BYTES]> {
    if text.len() != TEXT {
        return None;
    }
    let mut bytes = [0; BYTES];
    for (byte, digits) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        for digit in digits {
            *byte = *byte << 4 | char::from(*digit).to_digit(16)? as u8;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_until_its_time_is_over() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let short = tokens.issue(Duration::from_secs(10), now).unwrap();
        let long = tokens.issue(Duration::from_secs(60), now).unwrap();
        assert_eq!((short.len(), short != long), (TEXT, true));
        let left = |text: &str, after| tokens.left(text.as_bytes(), now + Duration::from_secs(after));
        assert_eq!(left(&short, 4), Some(Duration::from_secs(6)));
        assert_eq!((left(&short, 10), left(&long, 10).is_some()), (None, true));
        assert_eq!((left("", 0), left(&short[1..], 0), left(&"g".repeat(TEXT), 0)), (None, None, None));
        assert_eq!(left(&"0".repeat(TEXT), 0), None);
        assert_eq!(Tokens::default().left(long.as_bytes(), now), None);
        assert_eq!(tokens.last(), Some(now + Duration::from_secs(60)));
        tokens.expire(now + Duration::from_secs(60));
        assert_eq!(tokens.last(), None);
    }

    #[test]
    fn who_wants_too_many_loses_the_oldest() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let all: Vec<_> =
            (0..=TOKENS_MAX).map(|_| tokens.issue(Duration::from_secs(9), now).unwrap()).collect();
        let good = all.iter().filter(|t| tokens.left(t.as_bytes(), now).is_some()).count();
        assert_eq!((good, tokens.left(all[0].as_bytes(), now)), (TOKENS_MAX, None));
    }
}
