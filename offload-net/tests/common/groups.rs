//! Security groups of a card's process.

use proto::error::Error;
use proto::v1::device_spec::Kind;
use proto::v1::security_group_rule::Peer;
use proto::v1::{
    CreateDeviceRequest, DeviceSpec, GetCardStatsRequest, NetDeviceSpec, NetDrops, RuleProtocol,
    SecurityGroupRule, SecurityGroupSpec, SetSecurityGroupsRequest, TrafficDirection,
};

use super::Guest;
use super::card::Card;

pub fn everybody() -> Peer {
    Peer::Prefix("0.0.0.0/0".to_owned())
}

pub fn rule(direction: TrafficDirection, protocol: RuleProtocol, port: u32, peer: Peer) -> SecurityGroupRule {
    let (direction, protocol) = (direction.into(), protocol.into());
    SecurityGroupRule { direction, protocol, port_first: port, port_last: 0, peer: Some(peer) }
}

pub fn tcp_in(port: u32, peer: Peer) -> SecurityGroupRule {
    rule(TrafficDirection::Ingress, RuleProtocol::Tcp, port, peer)
}

pub fn group(id: &str, rules: Vec<SecurityGroupRule>) -> SecurityGroupSpec {
    SecurityGroupSpec { id: id.to_owned(), rules }
}

/// A device in the network `lan`, 10.0.0.0/24, where its address ends as its guest's MAC address does.
pub fn device(id: &str, guest: &Guest, groups: &[&str]) -> CreateDeviceRequest {
    let net = NetDeviceSpec {
        network: "lan".to_owned(),
        mac: guest.mac.to_vec(),
        addresses: vec![format!("10.0.0.{}", guest.mac[5])],
        security_groups: groups.iter().map(|g| (*g).to_owned()).collect(),
        max_connections: 1000,
        ..Default::default()
    };
    let spec = DeviceSpec { id: id.to_owned(), kind: Some(Kind::Net(net)), ..DeviceSpec::default() };
    CreateDeviceRequest { spec: Some(spec), ..Default::default() }
}

pub async fn set(card: &Card, groups: Vec<SecurityGroupSpec>) -> Result<(), Error> {
    let request = SetSecurityGroupsRequest { groups, validate_only: false };
    card.networks().await.set_security_groups(request).await.map(drop).map_err(Error::from)
}

pub async fn make(card: &Card, request: CreateDeviceRequest) -> Result<(), Error> {
    card.devices().await.create_device(request).await.map(drop).map_err(Error::from)
}

pub async fn drops(card: &Card, device: &str) -> NetDrops {
    let request = GetCardStatsRequest { device_id: device.to_owned() };
    card.devices().await.get_stats(request).await.unwrap().into_inner().devices[0].drops.unwrap()
}
