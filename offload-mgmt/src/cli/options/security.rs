//! Rules of security groups as they are written on the command line.

use std::str::FromStr;

use ipnet::IpNet;
use proto::v1::security_group_rule::Peer;
use proto::v1::{RuleProtocol, SecurityGroupRule, TrafficDirection};

use super::Pairs;

/// `--ingress PROTOCOL[,ports=N[-N]][,from=PEER]`, `--egress ...[,to=PEER]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RuleOption {
    protocol: RuleProtocol,
    ports: (u32, u32),
    /// Whether it was `from` or `to`, and what.
    peer: Option<(&'static str, Peer)>,
}

impl FromStr for RuleOption {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (mut protocol, mut ports, mut peer) = (None, (0, 0), None);
        for pair in Pairs::new(s, "protocol") {
            match pair.key.as_str() {
                "protocol" => protocol = Some(self::protocol(&pair.value()?)?),
                "ports" => ports = self::ports(&pair.value()?)?,
                "from" => peer = Some(("from", self::peer(&pair.value()?)?)),
                "to" => peer = Some(("to", self::peer(&pair.value()?)?)),
                _ => return Err(pair.unknown("protocol, ports, from, to")),
            }
        }
        let protocol =
            protocol.ok_or("a rule needs a protocol, like tcp,ports=443 or protocol=tcp,ports=443")?;
        if ports != (0, 0) && !matches!(protocol, RuleProtocol::Tcp | RuleProtocol::Udp) {
            return Err("only rules for tcp and udp have ports".to_owned());
        }
        Ok(Self { protocol, ports, peer })
    }
}

impl RuleOption {
    /// The rules that it stands for: without a peer one for everybody of each IP version.
    ///
    /// # Errors
    /// `from` of an egress rule, or `to` of an ingress rule.
    pub(crate) fn rules(&self, direction: TrafficDirection) -> Result<Vec<SecurityGroupRule>, String> {
        let (option, word) = match direction {
            TrafficDirection::Egress => ("--egress", "to"),
            _ => ("--ingress", "from"),
        };
        let all = |prefix: &str| Peer::Prefix(prefix.to_owned());
        let peers = match (&self.peer, self.protocol) {
            (Some((given, _)), _) if *given != word => {
                return Err(format!("{option} goes with {word}=, not with {given}="));
            }
            (Some((_, peer)), _) => vec![peer.clone()],
            (None, RuleProtocol::Icmp) => vec![all("0.0.0.0/0")],
            (None, RuleProtocol::Icmpv6) => vec![all("::/0")],
            (None, _) => vec![all("0.0.0.0/0"), all("::/0")],
        };
        let rule = |peer| SecurityGroupRule {
            direction: direction.into(),
            protocol: self.protocol.into(),
            port_first: self.ports.0,
            port_last: self.ports.1,
            peer: Some(peer),
        };
        Ok(peers.into_iter().map(rule).collect())
    }
}

fn protocol(name: &str) -> Result<RuleProtocol, String> {
    Ok(match name {
        "any" => RuleProtocol::Any,
        "tcp" => RuleProtocol::Tcp,
        "udp" => RuleProtocol::Udp,
        "icmp" => RuleProtocol::Icmp,
        "icmpv6" => RuleProtocol::Icmpv6,
        _ => {
            return Err(format!(
                "\"{name}\" is no protocol known here; known are: tcp, udp, icmp, icmpv6, any"
            ));
        }
    })
}

fn ports(text: &str) -> Result<(u32, u32), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |s: &str| s.parse::<u16>().ok().filter(|p| *p > 0).map(u32::from);
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok((first, last)),
        _ => Err(format!("ports={text}: write a port from 1 to 65535, or a range like 8000-8080")),
    }
}

/// What has a '/' is a prefix, an address one that holds nothing else, and anything else a security group.
fn peer(text: &str) -> Result<Peer, String> {
    if let Ok(address) = text.parse::<std::net::IpAddr>() {
        return Ok(Peer::Prefix(IpNet::from(address).to_string()));
    }
    if !text.contains('/') {
        return Ok(Peer::Group(text.to_owned()));
    }
    let net: IpNet =
        text.parse().map_err(|_| format!("\"{text}\" is no prefix; write it like 10.88.0.0/24"))?;
    Ok(Peer::Prefix(net.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rules() {
        let rules = |s: &str, direction| s.parse::<RuleOption>().and_then(|r| r.rules(direction));
        let tcp = |peer: Peer| SecurityGroupRule {
            direction: TrafficDirection::Ingress.into(),
            protocol: RuleProtocol::Tcp.into(),
            port_first: 80,
            port_last: 90,
            peer: Some(peer),
        };
        let all = |prefix: &str| Peer::Prefix(prefix.to_owned());
        let ingress = |s: &str| rules(s, TrafficDirection::Ingress);
        assert_eq!(ingress("tcp,ports=80-90"), Ok(vec![tcp(all("0.0.0.0/0")), tcp(all("::/0"))]));
        assert_eq!(ingress("tcp,ports=80-90,from=10.0.0.0/8"), Ok(vec![tcp(all("10.0.0.0/8"))]));
        assert_eq!(ingress("protocol=tcp,ports=80-90,from=fd00::5"), Ok(vec![tcp(all("fd00::5/128"))]));
        assert_eq!(ingress("tcp,ports=80-90,from=web"), Ok(vec![tcp(Peer::Group("web".to_owned()))]));
        assert_eq!(ingress("icmp").map(|r| r.len()), Ok(1));
        let egress = rules("any,to=db", TrafficDirection::Egress).expect("rule");
        assert_eq!((egress[0].direction(), egress[0].port_last), (TrafficDirection::Egress, 0));
        for (bad, says) in [
            ("", "needs a value"),
            ("sctp", "known are"),
            ("ports=80", "needs a protocol"),
            ("tcp,ports=0", "from 1 to 65535"),
            ("tcp,ports=90-80", "from 1 to 65535"),
            ("tcp,ports=65536", "from 1 to 65535"),
            ("icmp,ports=8", "tcp and udp"),
            ("tcp,from=10.0.0.0/33", "no prefix"),
            ("tcp,to=web", "goes with from="),
            ("tcp,peer=web", "known are"),
        ] {
            let e = ingress(bad).expect_err(bad);
            assert!(e.contains(says), "{bad}: {e}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(s in ".{0,40}") {
            let _ = s.parse::<RuleOption>();
        }
    }
}
