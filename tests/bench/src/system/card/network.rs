//! The guests' network on a card.

use std::rc::Rc;

use anyhow::anyhow;
use proto::v1::{
    NetDeviceSpec, NetworkSpec, RuleProtocol, SecurityGroupRule, SecurityGroupSpec, TrafficDirection,
    security_group_rule::Peer,
};

use crate::system::{HOST_IP, qemu};

const NETWORK: &str = "bench";
const GROUP: &str = "bench";
const PREFIX: &str = "10.9.0.0/24";

/// A network with a prefix, in which guests speak as themselves only. Removed when its last device is gone.
pub(super) struct Network {
    pub(super) card: Rc<e2e::card::Card>,
    groups: bool,
}

impl Network {
    /// `groups`: its devices have a security group.
    pub(super) fn new(card: &Rc<e2e::card::Card>, uplink: bool, groups: bool) -> anyhow::Result<Rc<Self>> {
        if groups {
            card.set_security_groups(vec![group()]);
        }
        let mut spec =
            NetworkSpec { id: NETWORK.into(), ipv4_prefix: PREFIX.into(), ..NetworkSpec::default() };
        if uplink {
            (spec.tap, spec.host_addresses) = (qemu::TAP.into(), vec![format!("{HOST_IP}/24")]);
        }
        card.create_network(spec).map_err(|e| anyhow!("creating a network: {}", e.message()))?;
        Ok(Rc::new(Self { card: card.clone(), groups }))
    }

    /// A device whose MAC and IP address end with this.
    pub(super) fn nic(&self, last: u8) -> NetDeviceSpec {
        NetDeviceSpec {
            network: NETWORK.into(),
            mac: e2e::card::mac(last).to_vec(),
            addresses: vec![format!("10.9.0.{last}")],
            security_groups: if self.groups { vec![GROUP.into()] } else { vec![] },
            ..NetDeviceSpec::default()
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Err(e) = self.card.delete_network(NETWORK) {
            eprintln!("offload-bench: removing network {NETWORK}: {}", e.message());
        }
    }
}

/// Both ends may open what the workloads send, and nothing else.
fn group() -> SecurityGroupSpec {
    let rule = |direction: TrafficDirection, protocol: RuleProtocol, peer| SecurityGroupRule {
        direction: direction.into(),
        protocol: protocol.into(),
        peer: Some(peer),
        ..SecurityGroupRule::default()
    };
    let mut rules = Vec::new();
    for protocol in [RuleProtocol::Udp, RuleProtocol::Tcp] {
        rules.push(rule(TrafficDirection::Ingress, protocol, Peer::Group(GROUP.into())));
        rules.push(rule(TrafficDirection::Egress, protocol, Peer::Prefix(PREFIX.into())));
    }
    SecurityGroupSpec { id: GROUP.into(), rules }
}
