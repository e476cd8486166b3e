//! Security groups in what a client asked for.

use std::collections::HashSet;

use ipnet::IpNet;
use proto::error::Error;
use proto::v1::security_group_rule::Peer;
use proto::v1::{NicSpec, RuleProtocol, SecurityGroupRule, SecurityGroupSpec, TrafficDirection};

use super::check_name;

const GROUPS_MAX: usize = 8;

/// Checks a NIC's security groups; whether they are there is not known here.
pub(super) fn check_nic(i: usize, nic: &NicSpec) -> Result<(), Error> {
    let field = format!("spec.nics[{i}].security_groups");
    let mut seen = HashSet::new();
    for group in &nic.security_groups {
        check_name(&field, "a security group's id", group, 32)?;
        if !seen.insert(group) {
            return Err(Error::invalid_field(
                &field,
                format!("NIC {} has security group {group} twice", nic.id),
            )
            .remedy("name it once"));
        }
    }
    if seen.len() > GROUPS_MAX {
        return Err(Error::invalid_field(
            &field,
            format!("NIC {} has {} security groups, more than {GROUPS_MAX}", nic.id, seen.len()),
        )
        .remedy("put the rules of some into one"));
    }
    Ok(())
}

/// Checks a security group's specification and fills in the defaults; without `no_egress` a group without egress rules
/// allows its devices to open any connection.
///
/// # Errors
/// INVALID_FIELD with the field's name. What else a rule must be, the group's card says.
pub(crate) fn complete_group(
    mut spec: SecurityGroupSpec,
    no_egress: bool,
) -> Result<SecurityGroupSpec, Error> {
    check_name("spec.id", "a security group's id", &spec.id, 32)?;
    let mut rules: Vec<SecurityGroupRule> = Vec::new();
    for rule in std::mem::take(&mut spec.rules) {
        let rule = complete_rule(rule)?;
        if !rules.contains(&rule) {
            rules.push(rule);
        }
    }
    if !no_egress && !rules.iter().any(|r| r.direction() == TrafficDirection::Egress) {
        rules.extend(["0.0.0.0/0", "::/0"].map(|all| SecurityGroupRule {
            direction: TrafficDirection::Egress.into(),
            protocol: RuleProtocol::Any.into(),
            peer: Some(Peer::Prefix(all.to_owned())),
            ..Default::default()
        }));
    }
    spec.rules = rules;
    Ok(spec)
}

/// A rule in the one form in which it is kept, so that it is found when it is to be taken away.
///
/// # Errors
/// INVALID_FIELD.
pub(crate) fn complete_rule(mut rule: SecurityGroupRule) -> Result<SecurityGroupRule, Error> {
    let bad = |what: String, remedy: &str| Error::invalid_field("spec.rules", what).remedy(remedy);
    if rule.port_last == 0 {
        rule.port_last = rule.port_first;
    }
    match &mut rule.peer {
        Some(Peer::Prefix(text)) => {
            let net: IpNet = text.parse().map_err(|_| {
                bad(format!("\"{text}\" is no prefix"), "write it like 10.88.0.0/24, 10.88.0.5/32 or ::/0")
            })?;
            if net != net.trunc() {
                let remedy = format!("write {}", net.trunc());
                return Err(bad(format!("{text} has bits behind its prefix"), &remedy));
            }
            *text = net.to_string();
        }
        Some(Peer::Group(id)) => check_name("spec.rules", "a security group's id", id, 32)?,
        None => {
            let remedy = "name a prefix or a security group";
            return Err(bad("a rule does not say who is at the other end".to_owned(), remedy));
        }
    }
    Ok(rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(direction: TrafficDirection, peer: &str) -> SecurityGroupRule {
        SecurityGroupRule {
            direction: direction.into(),
            protocol: RuleProtocol::Tcp.into(),
            port_first: 443,
            port_last: 0,
            peer: Some(Peer::Prefix(peer.to_owned())),
        }
    }

    #[test]
    fn a_new_group_lets_everything_out_unless_told_otherwise() {
        let group = |rules: Vec<SecurityGroupRule>, no_egress| {
            let spec = SecurityGroupSpec { id: "web".into(), rules };
            complete_group(spec, no_egress).map(|g| g.rules)
        };
        let ingress = rule(TrafficDirection::Ingress, "10.0.0.0/8");
        let rules = group(vec![ingress.clone(), ingress.clone()], false).expect("group");
        assert_eq!(rules.len(), 3);
        assert_eq!((rules[0].port_first, rules[0].port_last), (443, 443));
        let all = |r: &SecurityGroupRule| r.protocol() == RuleProtocol::Any && r.port_last == 0;
        assert!(rules[1..].iter().all(|r| r.direction() == TrafficDirection::Egress && all(r)));
        assert_eq!(group(vec![ingress.clone()], true).expect("group").len(), 1);
        assert_eq!(group(vec![], true).expect("group"), []);
        let egress = rule(TrafficDirection::Egress, "10.0.0.0/8");
        assert_eq!(group(vec![ingress, egress], false).expect("group").len(), 2);
        let bad = |peer: &str| {
            let e = group(vec![rule(TrafficDirection::Ingress, peer)], false).expect_err(peer);
            e.to_string()
        };
        assert!(bad("10.0.0.1/8").contains("write 10.0.0.0/8") && bad("everybody").contains("no prefix"));
        assert!(complete_group(SecurityGroupSpec { id: "-".into(), rules: vec![] }, false).is_err());
    }

    #[test]
    fn a_nic_has_eight_groups_at_most_each_once() {
        let nic = |groups: &[&str]| {
            let security_groups = groups.iter().map(|g| (*g).to_owned()).collect();
            check_nic(0, &NicSpec { security_groups, ..NicSpec::default() }).map_err(|e| e.to_string())
        };
        assert_eq!(nic(&["a", "b", "c", "d", "e", "f", "g", "h"]), Ok(()));
        assert!(
            nic(&["a", "b", "c", "d", "e", "f", "g", "h", "i"]).expect_err("nine").contains("more than 8")
        );
        assert!(nic(&["a", "a"]).expect_err("twice").contains("twice"));
        assert!(nic(&["A"]).is_err());
    }
}
