//! MAC addresses.

use std::fmt;
use std::str::FromStr;

/// A unicast MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Mac([u8; 6]);

/// Why a string is no MAC address a guest can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MacError {
    /// Not six pairs of hexadecimal digits with colons between them.
    #[error("it is not six pairs of hexadecimal digits, like 02:00:00:12:34:56")]
    Syntax,
    /// The group bit is set (IEEE 802-2014, 8.2.2).
    #[error("it is a group address; an interface needs a unicast one, with an even first byte")]
    Group,
    /// All zeros.
    #[error("it is all zeros")]
    Zero,
}

impl Mac {
    /// A random locally administered address.
    pub(crate) fn random() -> Self {
        let random = uuid::Uuid::new_v4();
        let [a, b, c, d, e, ..] = *random.as_bytes();
        Self([0x02, a, b, c, d, e])
    }

    /// The six bytes, as on the wire.
    pub(crate) fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(s: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = s.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(MacError::Syntax)?;
            if part.len() != 2 || !part.bytes().all(|c| c.is_ascii_hexdigit()) {
                return Err(MacError::Syntax);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError::Syntax)?;
        }
        match bytes {
            _ if parts.next().is_some() => Err(MacError::Syntax),
            [0, 0, 0, 0, 0, 0] => Err(MacError::Zero),
            [first, ..] if first & 1 != 0 => Err(MacError::Group),
            _ => Ok(Self(bytes)),
        }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_printed_parses_back(mut bytes: [u8; 6]) {
            bytes[0] &= 0xfe;
            prop_assume!(bytes != [0; 6]);
            let mac = Mac(bytes);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
            prop_assert_eq!(mac.to_string().to_uppercase().parse(), Ok(mac));
        }

        #[test]
        fn anything_else_is_refused_or_prints_back_as_it_was(s in ".{0,20}") {
            if let Ok(mac) = s.parse::<Mac>() {
                prop_assert_eq!(mac.to_string(), s.to_lowercase());
            }
        }
    }

    #[test]
    fn bad_addresses_say_why() {
        assert_eq!("01:00:00:00:00:01".parse::<Mac>(), Err(MacError::Group));
        assert_eq!("00:00:00:00:00:00".parse::<Mac>(), Err(MacError::Zero));
        for s in ["", "02:00:00:12:34", "02:00:00:12:34:56:78", "02-00-00-12-34-56", "+2:00:00:12:34:56"] {
            assert_eq!(s.parse::<Mac>(), Err(MacError::Syntax), "{s}");
        }
        assert_eq!(Mac::random().bytes()[0], 2);
    }
}
