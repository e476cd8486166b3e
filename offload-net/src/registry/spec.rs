//! What a network is to be: its specification, checked.

use proto::error::Error;
use proto::v1::NetworkSpec;

use crate::device::{MTU_MAX, MTU_MIN};
use crate::host::nat::Nat;
use crate::host::netlink::Prefix;
use crate::host::tap;
use crate::network::uplink::{TapSpec, UplinkSpec};
use crate::subnet::Subnet;

const DEFAULT_MTU: u32 = 1500;
const ID_MAX: usize = 32;

/// A network's specification, checked.
pub(super) struct Checked {
    pub(super) mtu: u32,
    pub(super) subnet: Option<Subnet>,
    pub(super) uplink: Option<UplinkSpec>,
    pub(super) nat: Option<Nat>,
}

fn mtu_of(spec: &NetworkSpec) -> u32 {
    if spec.mtu == 0 { DEFAULT_MTU } else { spec.mtu }
}

/// Checks it.
///
/// # Errors
/// The field that is wrong, and why.
pub(super) fn check(spec: &NetworkSpec) -> Result<Checked, Error> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if spec.id.is_empty() || spec.id.len() > ID_MAX || !spec.id.chars().all(plain) {
        let what = format!("network id {:?} is not 1 to {ID_MAX} characters of a-z, 0-9 and '-'", spec.id);
        return Err(Error::invalid_field("id", what));
    }
    let mtu = mtu_of(spec);
    if !(MTU_MIN..=MTU_MAX).contains(&mtu) {
        return Err(Error::invalid_field("mtu", format!("MTU {mtu} is not between {MTU_MIN} and {MTU_MAX}")));
    }
    let parse = |a: &String| a.parse().map_err(|e| Error::invalid_field("host_addresses", e));
    let mut addresses = spec.host_addresses.iter().map(parse).collect::<Result<Vec<Prefix>, _>>()?;
    let subnet = Subnet::check(spec, mtu, &addresses)?;
    if !spec.tap.is_empty() && !spec.interface.is_empty() {
        return Err(Error::invalid_field(
            "interface",
            "a network has a TAP or an interface of the host's, and not both",
        )
        .remedy("name one of them"));
    }
    if spec.tap.is_empty() {
        if !addresses.is_empty() {
            return Err(Error::invalid_field(
                "host_addresses",
                "a network without a TAP has no host addresses",
            )
            .remedy("name a TAP, or leave the addresses out"));
        }
        if spec.nat {
            return Err(
                Error::invalid_field("nat", "a network without a TAP has no NAT").remedy("name a TAP")
            );
        }
        let uplink = match spec.interface.as_str() {
            "" => None,
            name => {
                tap::check_name(name).map_err(|e| Error::invalid_field("interface", e))?;
                Some(UplinkSpec::Interface { name: name.to_owned(), mtu })
            }
        };
        return Ok(Checked { mtu, subnet, uplink, nat: None });
    }
    tap::check_name(&spec.tap).map_err(|e| Error::invalid_field("tap", e))?;
    for gateway in subnet.iter().flat_map(Subnet::gateways) {
        if !addresses.iter().any(|a| a.address == gateway.address) {
            addresses.push(gateway);
        }
    }
    let nat = match &subnet {
        _ if !spec.nat => None,
        Some(subnet) => Some(Nat::new(&spec.id, &spec.tap, subnet, &addresses)),
        None => {
            return Err(Error::invalid_field("nat", "a network without ipv4_prefix has no NAT")
                .remedy("give the network an IPv4 prefix, e.g. 10.88.0.0/24"));
        }
    };
    let mac = subnet.as_ref().map(|s| s.gateway_mac);
    let uplink = UplinkSpec::Tap(TapSpec { name: spec.tap.clone(), mtu, addresses, mac, nat: spec.nat });
    Ok(Checked { mtu, subnet, uplink: Some(uplink), nat })
}
