//! Security groups as they are shown.

use proto::v1::{self, security_group_rule::Peer};
use serde::Serialize;

use super::word;

/// A security group.
#[derive(Debug, Serialize)]
pub(crate) struct SecurityGroup {
    /// Its name.
    pub id: String,
    /// What it allows.
    pub rules: Vec<Rule>,
    /// Devices of VMs that are up and have it, as their card calls them.
    pub devices: Vec<String>,
}

/// A rule.
#[derive(Debug, Serialize)]
pub(crate) struct Rule {
    /// "ingress" or "egress".
    pub direction: String,
    /// "any", "tcp", "udp", "icmp" or "icmpv6".
    pub protocol: String,
    /// First port; 0: all.
    pub port_first: u32,
    /// Last port.
    pub port_last: u32,
    /// A prefix, or a security group's name, which has no '/'.
    pub peer: String,
}

impl From<v1::SecurityGroup> for SecurityGroup {
    fn from(g: v1::SecurityGroup) -> Self {
        let spec = g.spec.unwrap_or_default();
        Self { id: spec.id, rules: spec.rules.into_iter().map(Rule::from).collect(), devices: g.devices }
    }
}

impl From<v1::SecurityGroupRule> for Rule {
    fn from(r: v1::SecurityGroupRule) -> Self {
        Self {
            direction: word(r.direction().as_str_name(), "TRAFFIC_DIRECTION_"),
            protocol: word(r.protocol().as_str_name(), "RULE_PROTOCOL_"),
            port_first: r.port_first,
            port_last: r.port_last,
            peer: match r.peer {
                Some(Peer::Prefix(peer) | Peer::Group(peer)) => peer,
                None => String::new(),
            },
        }
    }
}
