//! The security groups of a card, kept in its runtime directory like its networks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use ipnet::IpNet;
use proto::error::{Error, ErrorReason};
use proto::v1::security_group_rule::Peer as PeerSpec;
use proto::v1::{RuleProtocol, SecurityGroupRecord, SecurityGroupRule, SecurityGroupSpec, TrafficDirection};
use tonic::Code;

use super::rules::{GroupId, Peer, Protocol, Rule, Rules};
use crate::conntrack::flow::{Direction, number};
use crate::store::Store;

const ID_MAX: usize = 32;
/// Most rules of a group.
const RULES_MAX: usize = 64;
/// Most groups of a card.
const GROUPS_MAX: usize = 1000;

/// All security groups of this card.
#[derive(Debug)]
pub struct Groups {
    store: Store<SecurityGroupRecord>,
    groups: BTreeMap<String, Group>,
    /// Groups made so far.
    made: u32,
}

#[derive(Debug)]
struct Group {
    number: GroupId,
    spec: SecurityGroupSpec,
}

impl Groups {
    /// Takes up the groups that a predecessor left in `directory`, which is made if need be.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(directory: PathBuf) -> Result<Self, Error> {
        let store = Store::open(directory)?;
        let mut groups = Self { groups: BTreeMap::new(), made: 0, store };
        for spec in groups.store.load()? {
            groups.put(spec);
        }
        Ok(groups)
    }

    fn put(&mut self, spec: SecurityGroupSpec) {
        if let Some(group) = self.groups.get_mut(&spec.id) {
            group.spec = spec;
            return;
        }
        self.made = self.made.wrapping_add(1);
        self.groups.insert(spec.id.clone(), Group { number: GroupId(self.made), spec });
    }

    /// Checks groups that are to be made or replaced.
    ///
    /// # Errors
    /// The field and what it may be, or a group that is named and not there.
    pub fn check(&self, specs: &[SecurityGroupSpec]) -> Result<(), Error> {
        let mut new: BTreeSet<&str> = BTreeSet::new();
        for spec in specs {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            if spec.id.is_empty() || spec.id.len() > ID_MAX || !spec.id.chars().all(plain) {
                let what = format!(
                    "security group id {:?} is not 1 to {ID_MAX} characters of a-z, 0-9 and '-'",
                    spec.id
                );
                return Err(Error::invalid_field("groups.id", what));
            }
            if !new.insert(&spec.id) {
                let what = format!("security group {} is given twice", spec.id);
                return Err(Error::invalid_field("groups.id", what).resource(&spec.id));
            }
        }
        let in_all = self.groups.len() + new.iter().filter(|id| !self.groups.contains_key(**id)).count();
        if in_all > GROUPS_MAX {
            let what = format!("{in_all} security groups are more than a card's {GROUPS_MAX}");
            return Err(Error::invalid_field("groups", what).remedy("delete those that no device has"));
        }
        for spec in specs {
            if spec.rules.len() > RULES_MAX {
                let what = format!(
                    "security group {} has {} rules, more than {RULES_MAX}",
                    spec.id,
                    spec.rules.len()
                );
                return Err(Error::invalid_field("groups.rules", what)
                    .resource(&spec.id)
                    .remedy("put the rules into several groups: a device can have 8"));
            }
            for (i, rule) in spec.rules.iter().enumerate() {
                let bad = |what: String| {
                    let what = format!("rule {i} of security group {}: {what}", spec.id);
                    Error::invalid_field("groups.rules", what).resource(&spec.id)
                };
                let named = compile(rule).map_err(bad)?.2;
                if let Some(peer) = named
                    && !new.contains(peer)
                    && !self.groups.contains_key(peer)
                {
                    return Err(not_found(peer));
                }
            }
        }
        Ok(())
    }

    /// Makes or replaces groups that have been checked.
    ///
    /// # Errors
    /// A record cannot be written; those before it have been.
    pub fn set(&mut self, specs: &[SecurityGroupSpec]) -> Result<(), Error> {
        for spec in specs {
            self.store.save(spec)?;
            self.put(spec.clone());
        }
        Ok(())
    }

    /// Deletes a group that no device has.
    ///
    /// # Errors
    /// There is none, or another group's rule names it.
    pub fn delete(&mut self, id: &str) -> Result<(), Error> {
        if !self.groups.contains_key(id) {
            return Err(not_found(id));
        }
        let names =
            |group: &&Group| group.spec.id != id && group.spec.rules.iter().any(|r| named(r) == Some(id));
        if let Some(other) = self.groups.values().find(names) {
            return Err(in_use(id, &format!("a rule of security group {} names it", other.spec.id))
                .remedy("take that rule away first"));
        }
        self.store.remove(id)?;
        self.groups.remove(id);
        Ok(())
    }

    /// All of them, by id.
    pub fn list(&self) -> Vec<SecurityGroupSpec> {
        self.groups.values().map(|g| g.spec.clone()).collect()
    }

    /// What an interface that has these groups may do.
    ///
    /// # Errors
    /// One is not there, or its record, from another version of the card, has rules that this one does not know.
    pub fn rules_of(&self, ids: &[String]) -> Result<(Vec<GroupId>, Rules), Error> {
        let mut numbers = Vec::new();
        let mut rules = Vec::new();
        for id in ids {
            let group = self.groups.get(id).ok_or_else(|| not_found(id))?;
            numbers.push(group.number);
            for rule in &group.spec.rules {
                let (direction, (protocol, ports), _) = compile(rule).map_err(|what| {
                    Error::invalid_field("groups.rules", format!("security group {id}: {what}")).resource(id)
                })?;
                let peer = match &rule.peer {
                    Some(PeerSpec::Prefix(text)) => prefix(text).ok(),
                    // One that is not there nobody has.
                    Some(PeerSpec::Group(peer)) => self.groups.get(peer).map(|g| Peer::Group(g.number)),
                    None => None,
                };
                rules.extend(peer.map(|peer| Rule { direction, protocol, ports, peer }));
            }
        }
        Ok((numbers, Rules::new(&rules)))
    }
}

/// The group that a rule names.
fn named(rule: &SecurityGroupRule) -> Option<&str> {
    match &rule.peer {
        Some(PeerSpec::Group(id)) => Some(id),
        _ => None,
    }
}

type Compiled<'a> = (Direction, (Protocol, (u16, u16)), Option<&'a str>);

/// Reads a rule; the group that it names is another's to find.
fn compile(rule: &SecurityGroupRule) -> Result<Compiled<'_>, String> {
    let direction = match rule.direction() {
        TrafficDirection::Ingress => Direction::In,
        TrafficDirection::Egress => Direction::Out,
        TrafficDirection::Unspecified => return Err("it has no direction: ingress or egress".to_owned()),
    };
    let protocol = match rule.protocol() {
        RuleProtocol::Any => Protocol::Any,
        RuleProtocol::Tcp => Protocol::Tcp,
        RuleProtocol::Udp => Protocol::Udp,
        RuleProtocol::Icmp => Protocol::Icmp,
        RuleProtocol::Icmpv6 => Protocol::Icmpv6,
        RuleProtocol::Unspecified => {
            return Err("it has no protocol: tcp, udp, icmp, icmpv6 or any".to_owned());
        }
    };
    let ports = match (rule.port_first, rule.port_last) {
        (0, 0) => (0, u16::MAX),
        (first, last) => {
            if !matches!(protocol, Protocol::Tcp | Protocol::Udp) {
                return Err("only rules for TCP and UDP have ports".to_owned());
            }
            let last = if last == 0 { first } else { last };
            match (u16::try_from(first), u16::try_from(last)) {
                (Ok(f), Ok(l)) if 0 < f && f <= l => (f, l),
                _ => return Err(format!("ports {first} to {last} are no range from 1 to 65535")),
            }
        }
    };
    match &rule.peer {
        None => return Err("it names no peer: a prefix or a security group".to_owned()),
        Some(PeerSpec::Group(_)) => {}
        Some(PeerSpec::Prefix(text)) => {
            let Peer::Prefix { v6, .. } = prefix(text)? else { return Err("it names no prefix".to_owned()) };
            let never = matches!((protocol, v6), (Protocol::Icmp, true) | (Protocol::Icmpv6, false));
            if never {
                return Err(format!("ICMP of one IP version, and {text} is of the other"));
            }
        }
    }
    Ok((direction, (protocol, ports), named(rule)))
}

fn prefix(text: &str) -> Result<Peer, String> {
    let net: IpNet =
        text.parse().map_err(|_| format!("{text:?} is no prefix; write it like 10.88.0.0/24 or ::/0"))?;
    if net != net.trunc() {
        return Err(format!("{text} has bits behind its prefix; write {}", net.trunc()));
    }
    let (network, v6) = number(net.network());
    let mask = number(net.netmask()).0;
    Ok(Peer::Prefix { v6, network, mask })
}

/// There is no such security group.
pub fn not_found(id: &str) -> Error {
    let what = format!("this card has no security group {id:?}");
    Error::new(Code::NotFound, ErrorReason::SecurityGroupNotFound, what)
        .resource(id)
        .remedy("create the security group first; ListSecurityGroups shows those there are")
}

/// It cannot be deleted.
pub fn in_use(id: &str, why: &str) -> Error {
    let what = format!("security group {id} is in use: {why}");
    Error::new(Code::FailedPrecondition, ErrorReason::SecurityGroupInUse, what).resource(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::flow::Key;
    use crate::security::rules::Members;

    fn rule(edit: impl FnOnce(&mut SecurityGroupRule)) -> SecurityGroupRule {
        let mut rule = SecurityGroupRule {
            direction: TrafficDirection::Ingress.into(),
            protocol: RuleProtocol::Tcp.into(),
            port_first: 443,
            port_last: 0,
            peer: Some(PeerSpec::Prefix("10.0.0.0/8".to_owned())),
        };
        edit(&mut rule);
        rule
    }

    fn group(id: &str, rules: Vec<SecurityGroupRule>) -> SecurityGroupSpec {
        SecurityGroupSpec { id: id.to_owned(), rules }
    }

    fn of(peer: &str) -> Option<PeerSpec> {
        Some(PeerSpec::Group(peer.to_owned()))
    }

    #[test]
    fn groups_are_kept_and_deleted_when_nobody_names_them() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Groups::open(dir.path().join("groups")).unwrap();
        let mut groups = open();
        let web = group("web", vec![rule(|_| {})]);
        // They may name each other, and themselves.
        let a = group("a", vec![rule(|r| r.peer = of("b")), rule(|r| r.peer = of("a"))]);
        let b = group("b", vec![rule(|r| r.peer = of("a"))]);
        let all = [a.clone(), b.clone(), web.clone()];
        assert_eq!(groups.check(&all[..1]).unwrap_err().reason(), ErrorReason::SecurityGroupNotFound);
        groups.check(&all).unwrap();
        groups.set(&all).unwrap();
        assert_eq!((groups.list(), open().list()), (all.to_vec(), all.to_vec()));

        assert_eq!(groups.delete("a").unwrap_err().reason(), ErrorReason::SecurityGroupInUse);
        assert_eq!(groups.delete("c").unwrap_err().reason(), ErrorReason::SecurityGroupNotFound);
        groups.set(&[group("b", vec![])]).unwrap();
        groups.delete("a").unwrap();
        assert_eq!(open().list(), [group("b", vec![]), web]);
    }

    #[test]
    fn bad_rules_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let groups = Groups::open(dir.path().join("groups")).unwrap();
        let bad = |edit: fn(&mut SecurityGroupRule)| {
            groups.check(&[group("web", vec![rule(edit)])]).unwrap_err().to_string()
        };
        for (edit, says) in [
            ((|r| r.direction = 0) as fn(&mut SecurityGroupRule), "no direction"),
            (|r| r.direction = 9, "no direction"),
            (|r| r.protocol = 0, "no protocol"),
            (|r| r.protocol = 77, "no protocol"),
            (|r| r.port_first = 65536, "no range"),
            (|r| r.port_last = 442, "no range"),
            (|r| (r.port_first, r.port_last) = (0, 5), "no range"),
            (|r| r.protocol = RuleProtocol::Any.into(), "only rules for TCP and UDP"),
            (|r| r.peer = None, "no peer"),
            (|r| r.peer = Some(PeerSpec::Prefix("10.0.0.1".to_owned())), "no prefix"),
            (|r| r.peer = Some(PeerSpec::Prefix("10.0.0.1/8".to_owned())), "write 10.0.0.0/8"),
            (|r| r.peer = Some(PeerSpec::Prefix("::/129".to_owned())), "no prefix"),
            (|r| r.peer = Some(PeerSpec::Group("db".to_owned())), "no security group \"db\""),
            (|r| (r.protocol, r.port_first) = (RuleProtocol::Icmpv6.into(), 0), "the other"),
        ] {
            assert!(bad(edit).contains(says), "{says}: {}", bad(edit));
        }
        let check = |id: &str, n| groups.check(&[group(id, vec![rule(|_| {}); n])]);
        assert!(check("web", 64).is_ok() && check("web", 65).is_err());
        assert!(check("", 1).is_err() && check("../a", 1).is_err() && check(&"a".repeat(33), 1).is_err());
        assert!(groups.check(&[group("a", vec![]), group("a", vec![])]).is_err());
    }

    #[test]
    fn an_interface_may_what_any_of_its_groups_allows() {
        let dir = tempfile::tempdir().unwrap();
        let mut groups = Groups::open(dir.path().join("groups")).unwrap();
        let v6 = |r: &mut SecurityGroupRule| r.peer = Some(PeerSpec::Prefix("fd00::/8".to_owned()));
        groups.set(&[group("a", vec![rule(|_| {})]), group("b", vec![rule(v6)])]).unwrap();
        let key = |peer: &str, v6| Key {
            v6,
            protocol: 6,
            local: 0,
            peer: number(peer.parse().unwrap()).0,
            local_port: 443,
            peer_port: 1,
        };
        let allows = |ids: &[&str]| {
            let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
            let (numbers, rules) = groups.rules_of(&ids).unwrap();
            assert_eq!(numbers.len(), ids.len());
            let members = Members::default();
            [("10.1.1.1", false), ("fd01::1", true), ("11.1.1.1", false)]
                .map(|(peer, v6)| rules.allow(&key(peer, v6), Direction::In, &members))
        };
        assert_eq!(allows(&["a"]), [true, false, false]);
        assert_eq!(allows(&["a", "b"]), [true, true, false]);
        assert!(groups.rules_of(&["c".to_owned()]).is_err());
    }
}
