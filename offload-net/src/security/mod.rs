//! Security groups: what their devices may send and get.
//!
//! - [`rules`]: an interface's groups as a new connection is judged by them;
//! - [`groups`]: the groups of a card, kept across its restarts.
//!
//! Connections that a rule has allowed, and what answers them, are [`crate::conntrack`]'s.

pub mod groups;
pub mod rules;

use std::collections::BTreeSet;

use proto::error::Error;
use proto::v1::NetDeviceSpec;

/// Most groups of a device.
const GROUPS_MAX: usize = 8;
/// Bounds of the connections that are tracked for a device, and how many there are by default.
const ROOM: std::ops::RangeInclusive<u32> = 16..=1 << 20;
const ROOM_DEFAULT: u32 = 65536;

/// What of a device's specification is about security groups. Whether there are such groups is not known here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its groups' ids, at least one.
    pub groups: Vec<String>,
    /// Connections that are tracked for it at a time.
    pub room: usize,
}

impl Wanted {
    /// Reads it; `None`: the device has no groups.
    ///
    /// # Errors
    /// The field and what it may be.
    pub fn check(spec: &NetDeviceSpec, has_prefix: bool) -> Result<Option<Self>, Error> {
        let room = if spec.max_connections == 0 { ROOM_DEFAULT } else { spec.max_connections };
        if !ROOM.contains(&room) {
            let what = format!("{room} connections are not between {} and {}", ROOM.start(), ROOM.end());
            return Err(Error::invalid_field("net.max_connections", what)
                .remedy(format!("leave it out for {ROOM_DEFAULT}")));
        }
        let groups = &spec.security_groups;
        let Some(first) = groups.first() else { return Ok(None) };
        let bad = |what: String| Error::invalid_field("net.security_groups", what).resource(first);
        if !has_prefix {
            return Err(bad("the network has no prefix, and so knows nobody's addresses".to_owned())
                .remedy("give no security groups, or make a network with a prefix"));
        }
        if groups.len() > GROUPS_MAX {
            return Err(bad(format!("{} security groups are more than {GROUPS_MAX}", groups.len())));
        }
        if groups.iter().collect::<BTreeSet<_>>().len() < groups.len() {
            return Err(bad("a security group is given twice".to_owned()));
        }
        Ok(Some(Self { groups: groups.clone(), room: room as usize }))
    }
}
