//! How far a connection is, and how long it is remembered without a packet.

use super::flow::{Content, Flags};

/// How far a connection is. In the file by its number, which is never given to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// UDP in one direction only.
    Udp = 1,
    /// UDP, answered.
    UdpAnswered = 2,
    /// An ICMP question.
    Query = 3,
    /// Another protocol.
    Other = 4,
    /// TCP: a SYN.
    Opening = 5,
    /// TCP: a SYN, and its answer.
    Answered = 6,
    /// TCP: a connection.
    Established = 7,
    /// TCP: whoever opened it has sent all.
    OriginClosed = 8,
    /// TCP: the other has.
    PeerClosed = 9,
    /// TCP: both have.
    Closed = 10,
    /// TCP: one says that there is no connection.
    Reset = 11,
}

/// All states, in the order of their numbers.
pub const STATES: [State; 11] = [
    State::Udp,
    State::UdpAnswered,
    State::Query,
    State::Other,
    State::Opening,
    State::Answered,
    State::Established,
    State::OriginClosed,
    State::PeerClosed,
    State::Closed,
    State::Reset,
];

impl State {
    /// The state with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        STATES.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// How long it is remembered without a packet, in milliseconds. That of an established TCP connection is what EC2's
    /// instances have by default; one whose guest has forgotten it does not stay for long, for its peer hears so (RST).
    pub fn timeout_ms(self) -> u64 {
        let seconds = match self {
            Self::Udp | Self::Query | Self::Opening => 30,
            Self::Answered => 60,
            Self::UdpAnswered => 180,
            Self::Other => 600,
            Self::Established => 432_000,
            Self::OriginClosed | Self::PeerClosed => 300,
            Self::Closed => 120,
            Self::Reset => 10,
        };
        seconds * 1000
    }

    /// What a connection is that begins with this packet. `None`: nothing begins with it.
    pub fn begin(content: &Content) -> Option<Self> {
        match content {
            Content::Tcp(_, _, flags) => flags.opens().then_some(Self::Opening),
            Content::Udp(..) => Some(Self::Udp),
            Content::Query { reply, .. } => (!reply).then_some(Self::Query),
            Content::Other => Some(Self::Other),
            Content::Error(_) | Content::Message | Content::Later => None,
        }
    }

    /// The state after a packet of the connection, from whoever has opened it or from the other. `None`: it does not
    /// belong to any connection.
    pub fn next(self, content: &Content, from_origin: bool) -> Option<Self> {
        match content {
            Content::Tcp(_, _, flags) => self.after_segment(*flags, from_origin),
            Content::Udp(..) if !from_origin => Some(Self::UdpAnswered),
            _ => Some(self),
        }
    }

    fn after_segment(self, flags: Flags, from_origin: bool) -> Option<Self> {
        if flags.is_nonsense() {
            return None;
        }
        let young = matches!(self, Self::Opening | Self::Answered);
        Some(match self {
            _ if flags.has(Flags::RST) => Self::Reset,
            Self::Reset | Self::Closed => self,
            _ if flags.has(Flags::FIN) => match (self, from_origin) {
                (Self::PeerClosed, true) | (Self::OriginClosed, false) => Self::Closed,
                (_, true) => Self::OriginClosed,
                (_, false) => Self::PeerClosed,
            },
            _ if young && flags.has(Flags::SYN) && flags.has(Flags::ACK) => Self::Answered,
            Self::Answered if from_origin && flags.has(Flags::ACK) => Self::Established,
            _ => self,
        })
    }

    /// A SYN is one more of those that the connection begins with, and not the first of another: it is being opened.
    /// From the other end too: both may open one connection at a time (RFC 9293 section 3.5).
    pub fn takes_syn(self) -> bool {
        matches!(self, Self::Opening | Self::Answered)
    }

    /// It has ended, and its ports may be used again.
    pub fn is_over(self) -> bool {
        matches!(self, Self::OriginClosed | Self::PeerClosed | Self::Closed | Self::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYN: u8 = Flags::SYN;
    const ACK: u8 = Flags::ACK;
    const FIN: u8 = Flags::FIN;
    const RST: u8 = Flags::RST;

    fn after(segments: &[(u8, bool)]) -> Option<State> {
        let mut state = State::begin(&Content::Tcp(1, 2, Flags(segments[0].0)))?;
        for (flags, from_origin) in &segments[1..] {
            state = state.next(&Content::Tcp(1, 2, Flags(*flags)), *from_origin)?;
        }
        Some(state)
    }

    #[test]
    fn a_tcp_connection_opens_and_closes() {
        assert_eq!(after(&[(SYN, true)]), Some(State::Opening));
        assert_eq!(after(&[(SYN, true), (SYN | ACK, false)]), Some(State::Answered));
        let open = [(SYN, true), (SYN | ACK, false), (ACK, true)];
        assert_eq!(after(&open), Some(State::Established));
        let closing = |more: &[(u8, bool)]| after(&[&open, more].concat());
        assert_eq!(closing(&[(FIN | ACK, true)]), Some(State::OriginClosed));
        assert_eq!(closing(&[(FIN | ACK, false), (ACK, true)]), Some(State::PeerClosed));
        assert_eq!(closing(&[(FIN | ACK, true), (FIN | ACK, false), (ACK, true)]), Some(State::Closed));
        assert_eq!(closing(&[(RST, false), (ACK, true)]), Some(State::Reset));
        // Refused.
        assert_eq!(after(&[(SYN, true), (RST | ACK, false)]), Some(State::Reset));
        // Only whoever opened it can say that the answer has come.
        assert_eq!(after(&[(SYN, true), (SYN | ACK, false), (ACK, false)]), Some(State::Answered));
        assert_eq!(after(&[(SYN, true), (ACK, true)]), Some(State::Opening));
    }

    #[test]
    fn only_a_syn_opens_one() {
        for flags in [ACK, SYN | ACK, FIN, RST, SYN | FIN, SYN | RST, 0, FIN | ACK, 8 | ACK] {
            assert_eq!(after(&[(flags, true)]), None, "{flags:#x}");
        }
        assert_eq!(after(&[(SYN | 0xc0, true)]), Some(State::Opening));
        assert_eq!(after(&[(SYN, true), (0, false)]), None);
        assert_eq!(after(&[(SYN, true), (SYN | FIN, false)]), None);
    }

    #[test]
    fn states_are_known_by_number() {
        for state in STATES {
            assert_eq!(State::from_number(state as u8), Some(state));
        }
        assert_eq!((State::from_number(0), State::from_number(12)), (None, None));
    }
}
