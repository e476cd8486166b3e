//! An interface's security groups in the form in which a new connection is judged.
//!
//! Rules are put together by direction and protocol, so that only those are looked at that may apply. There are no more than
//! 8 groups of 64 rules, and each is two comparisons and a mask: a packet that no rule allows costs less than one that
//! goes to somebody.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::conntrack::flow::{Direction, Key, number};
use crate::frame::packet::{ICMPV6, TCP, UDP};
use crate::subnet::Interface;

/// A security group, by a number that no other has while the card runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupId(pub u32);

/// What a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// All.
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP for IPv4.
    Icmp,
    /// ICMPv6.
    Icmpv6,
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Those in a prefix.
    Prefix {
        /// IPv6.
        v6: bool,
        /// Its first address.
        network: u128,
        /// Its bits that count.
        mask: u128,
    },
    /// Those who have a group.
    Group(GroupId),
}

/// A rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Who opens the connection.
    pub direction: Direction,
    /// What it speaks.
    pub protocol: Protocol,
    /// The ports it is opened to, first and last; of what has none: all.
    pub ports: (u16, u16),
    /// The other end.
    pub peer: Peer,
}

/// Rules by protocol: TCP, UDP, ICMP, ICMPv6, others.
type Classes = [Box<[Clause]>; 5];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Clause {
    ports: (u16, u16),
    peer: Peer,
}

/// What an interface may open, and what may be opened to it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Rules {
    ingress: Classes,
    egress: Classes,
}

fn class(protocol: u8, v6: bool) -> usize {
    match (protocol, v6) {
        (TCP, _) => 0,
        (UDP, _) => 1,
        (1, false) => 2,
        (ICMPV6, true) => 3,
        _ => 4,
    }
}

impl Rules {
    /// Puts rules together.
    pub fn new(rules: &[Rule]) -> Self {
        let classes = |direction| -> Classes {
            let of = |own: Option<Protocol>| {
                let of_class = |r: &&Rule| {
                    r.direction == direction && (r.protocol == Protocol::Any || Some(r.protocol) == own)
                };
                rules.iter().filter(of_class).map(|r| Clause { ports: r.ports, peer: r.peer }).collect()
            };
            [
                of(Some(Protocol::Tcp)),
                of(Some(Protocol::Udp)),
                of(Some(Protocol::Icmp)),
                of(Some(Protocol::Icmpv6)),
                of(None),
            ]
        };
        Self { ingress: classes(Direction::In), egress: classes(Direction::Out) }
    }

    /// Whether a connection of this name may be opened in this direction.
    pub fn allow(&self, key: &Key, direction: Direction, members: &Members) -> bool {
        let (classes, port) = match direction {
            Direction::In => (&self.ingress, key.local_port),
            Direction::Out => (&self.egress, key.peer_port),
        };
        let class = class(key.protocol, key.v6);
        // What has no ports has other numbers in their place.
        let port = if class < 2 { port } else { 0 };
        let Some(clauses) = classes.get(class) else { return false };
        let mut groups = None;
        clauses.iter().any(|c| {
            if !(c.ports.0..=c.ports.1).contains(&port) {
                return false;
            }
            match c.peer {
                Peer::Prefix { v6, network, mask } => v6 == key.v6 && key.peer & mask == network,
                Peer::Group(id) => {
                    groups.get_or_insert_with(|| members.groups_of(key.peer, key.v6)).contains(&id)
                }
            }
        })
    }
}

/// Who in a network has which security groups.
#[derive(Debug, Default)]
pub struct Members {
    groups: HashMap<(u128, bool), Box<[GroupId]>>,
    epoch: u32,
}

impl Members {
    /// Takes in an interface.
    pub fn insert(&mut self, interface: &Interface, groups: &[GroupId]) {
        for address in Self::addresses(interface) {
            self.groups.insert(number(address), groups.into());
        }
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// Lets it go.
    pub fn remove(&mut self, interface: &Interface) {
        for address in Self::addresses(interface) {
            self.groups.remove(&number(address));
        }
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// Changes whenever somebody comes or goes.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    fn groups_of(&self, address: u128, v6: bool) -> &[GroupId] {
        self.groups.get(&(address, v6)).map_or(&[], |g| g)
    }

    fn addresses(interface: &Interface) -> impl Iterator<Item = IpAddr> {
        interface.addresses().chain([IpAddr::V6(interface.link_local())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mac::MacAddr;

    const WEB: GroupId = GroupId(1);
    const DB: GroupId = GroupId(2);

    fn key(protocol: u8, v6: bool, peer: &str, local_port: u16, peer_port: u16) -> Key {
        let peer = number(peer.parse().unwrap()).0;
        Key { v6, protocol, local: 1, peer, local_port, peer_port }
    }

    #[test]
    fn rules_apply_to_what_they_name() {
        let prefix = Peer::Prefix { v6: false, network: 0x0a00_0000, mask: 0xff00_0000 };
        let rule = |direction, protocol, ports, peer| Rule { direction, protocol, ports, peer };
        let all = (0, u16::MAX);
        let rules = Rules::new(&[
            rule(Direction::In, Protocol::Tcp, (80, 90), prefix),
            rule(Direction::In, Protocol::Udp, (53, 53), Peer::Group(WEB)),
            rule(Direction::In, Protocol::Icmp, all, prefix),
            rule(Direction::Out, Protocol::Any, all, Peer::Group(DB)),
        ]);
        let mut members = Members::default();
        let web =
            Interface { ipv4: vec![[10, 0, 0, 5].into()], ..Interface::plain(MacAddr([2, 0, 0, 0, 0, 5])) };
        members.insert(&web, &[DB, WEB]);
        let allows = |members: &Members, key, direction| rules.allow(&key, direction, members);
        let inward = |key| allows(&members, key, Direction::In);
        assert!(inward(key(6, false, "10.9.9.9", 80, 999)) && inward(key(6, false, "10.0.0.0", 90, 0)));
        assert!(!inward(key(6, false, "10.0.0.1", 79, 80)) && !inward(key(6, false, "10.0.0.1", 91, 80)));
        assert!(!inward(key(6, false, "11.0.0.1", 80, 80)));
        // The same number is no IPv4 address.
        assert!(!inward(key(6, true, "::10.9.9.9", 80, 80)));
        assert!(!inward(key(17, false, "10.0.0.1", 80, 80)));
        assert!(inward(key(17, false, "10.0.0.5", 53, 9)) && !inward(key(17, false, "10.0.0.6", 53, 9)));
        assert!(inward(key(17, true, "fe80::ff:fe00:5", 53, 9)));
        assert!(inward(key(1, false, "10.0.0.6", 7, 1)) && !inward(key(58, true, "fe80::1", 7, 1)));
        // Protocol 1 over IPv6 is not ICMP.
        assert!(!inward(key(1, true, "fe80::1", 7, 1)));
        for protocol in [1, 6, 17, 132] {
            assert!(allows(&members, key(protocol, false, "10.0.0.5", 1, 1), Direction::Out));
            assert!(!allows(&members, key(protocol, false, "10.0.0.6", 1, 1), Direction::Out));
        }
        let before = members.epoch();
        members.remove(&web);
        assert!(members.epoch() != before);
        assert!(!allows(&members, key(17, false, "10.0.0.5", 53, 9), Direction::In));
        assert!(!Rules::default().allow(&key(6, false, "10.0.0.5", 80, 9), Direction::In, &members));
    }
}
