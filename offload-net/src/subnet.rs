//! A network with a prefix: who is there under which address. The control plane says so; nothing is learnt.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{Ipv4Net, Ipv6Net};
use proto::error::Error;
use proto::v1::{Metadata, NetDeviceSpec, NetworkSpec};

use crate::host::netlink::Prefix;
use crate::mac::MacAddr;
use crate::metadata;

/// Shortest and longest IPv4 prefix: a network of its own with room for a gateway and a guest.
const IPV4_LEN: std::ops::RangeInclusive<u8> = 8..=30;
/// Shortest and longest IPv6 prefix.
const IPV6_LEN: std::ops::RangeInclusive<u8> = 48..=126;
/// Every IPv6 link carries this much (RFC 8200 section 5).
const IPV6_MTU_MIN: u32 = 1280;
/// Most name servers.
pub const DNS_MAX: usize = 3;
/// Most addresses of one interface.
const ADDRESSES_MAX: usize = 8;
/// Longest host name (RFC 1123).
const HOSTNAME_MAX: usize = 63;

/// What a network with a prefix is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subnet {
    /// The network's id.
    pub network: String,
    /// Its IPv4 network.
    pub ipv4: Ipv4Net,
    /// Its IPv6 network.
    pub ipv6: Option<Ipv6Net>,
    /// The gateway's IPv4 address: the host's on the TAP, somebody's behind the uplink, or one that the card only answers for.
    pub gateway: Ipv4Addr,
    /// Its IPv6 address, if there is an IPv6 network.
    pub gateway6: Option<Ipv6Addr>,
    /// The gateway's MAC address, which is the TAP's; or only what the card itself speaks as. Made of the network's id: a TAP
    /// that is made again has the same, and what guests have cached stays true.
    pub gateway_mac: MacAddr,
    /// There is a way out: the gateway is a router.
    pub routed: bool,
    /// The gateway is not the host, but somebody behind the uplink, and others of the network may be there, too.
    pub external: bool,
    /// Name servers; none: see [`Subnet::name_servers`].
    pub dns: Vec<Ipv4Addr>,
    /// Largest L3 packet in bytes.
    pub mtu: u16,
}

impl Subnet {
    /// Reads it from the specification of a network with this MTU and these addresses of the host; `None`: the network
    /// has no prefix.
    ///
    /// # Errors
    /// The field and what it may be.
    pub fn check(spec: &NetworkSpec, mtu: u32, host: &[Prefix]) -> Result<Option<Self>, Error> {
        if spec.ipv4_prefix.is_empty() {
            let needs = [
                ("ipv6_prefix", !spec.ipv6_prefix.is_empty()),
                ("dns", !spec.dns.is_empty()),
                ("gateway", !spec.gateway.is_empty()),
            ];
            return match needs.into_iter().find(|(_, there)| *there) {
                Some((field, _)) => {
                    Err(Error::invalid_field(field, format!("a network without ipv4_prefix has no {field}"))
                        .remedy("give the network an IPv4 prefix, e.g. 10.88.0.0/24"))
                }
                None => Ok(None),
            };
        }
        let ipv4: Ipv4Net = network("ipv4_prefix", &spec.ipv4_prefix, "10.88.0.0/24")?;
        bounded("ipv4_prefix", ipv4.prefix_len(), &IPV4_LEN)?;
        if ipv4 != ipv4.trunc() {
            return Err(not_truncated("ipv4_prefix", &ipv4.to_string(), &ipv4.trunc().to_string()));
        }
        let unusable = ipv4.network().is_unspecified()
            || ipv4.network().is_loopback()
            || ipv4.network().is_multicast()
            || ipv4.network() >= Ipv4Addr::new(240, 0, 0, 0);
        if unusable {
            let what = format!("{ipv4} holds no addresses that an interface can have");
            return Err(Error::invalid_field("ipv4_prefix", what).remedy("choose a private network"));
        }
        let ipv6 = match spec.ipv6_prefix.as_str() {
            "" => None,
            text => Some(ipv6_network(text, mtu)?),
        };
        let mut dns = Vec::new();
        for server in &spec.dns {
            let parsed = server.parse().map_err(|_| {
                Error::invalid_field("dns", format!("{server:?} is no IPv4 address")).resource(server)
            })?;
            dns.push(parsed);
        }
        if dns.len() > DNS_MAX {
            return Err(Error::invalid_field(
                "dns",
                format!("{} name servers are more than {DNS_MAX}", dns.len()),
            ));
        }
        let on_host = |inside: &dyn Fn(IpAddr) -> bool| host.iter().map(|p| p.address).find(|a| inside(*a));
        let external = !spec.interface.is_empty();
        let given = match spec.gateway.as_str() {
            "" => None,
            text => Some(router(text, &ipv4, external)?),
        };
        let gateway = match on_host(&|a| matches!(a, IpAddr::V4(a) if ipv4.contains(&a))) {
            Some(IpAddr::V4(a)) => a,
            _ => given.unwrap_or_else(|| first4(&ipv4)),
        };
        let gateway6 = ipv6.map(|net| match on_host(&|a| matches!(a, IpAddr::V6(a) if net.contains(&a))) {
            Some(IpAddr::V6(a)) => a,
            _ => first6(&net),
        });
        if metadata::is_service(gateway.into()) || gateway6.is_some_and(|a| metadata::is_service(a.into())) {
            let what = "the gateway's address would be the metadata service's";
            return Err(Error::invalid_field("host_addresses", what).remedy("choose another address"));
        }
        Ok(Some(Self {
            network: spec.id.clone(),
            ipv4,
            ipv6,
            gateway,
            gateway6,
            gateway_mac: gateway_mac(&spec.id),
            routed: external || !spec.tap.is_empty(),
            external,
            dns,
            // At most MTU_MAX: checked before.
            mtu: mtu.try_into().unwrap_or(u16::MAX),
        }))
    }

    /// The gateway's link-local address, which is the TAP's.
    pub fn link_local(&self) -> Ipv6Addr {
        link_local(self.gateway_mac)
    }

    /// The card speaks as the router of its IPv6 network. Who is that behind an uplink, it does not know.
    pub fn is_ipv6_router(&self) -> bool {
        self.routed && !self.external
    }

    /// The gateway's addresses as the host has them on the TAP.
    pub fn gateways(&self) -> impl Iterator<Item = Prefix> {
        let v6 = self.gateway6.zip(self.ipv6);
        [Prefix { address: self.gateway.into(), len: self.ipv4.prefix_len() }]
            .into_iter()
            .chain(v6.map(|(a, net)| Prefix { address: a.into(), len: net.prefix_len() }))
    }

    /// The name servers that DHCP tells.
    pub fn name_servers(&self) -> &[Ipv4Addr] {
        match self.dns.as_slice() {
            [] if self.routed => std::slice::from_ref(&self.gateway),
            dns => dns,
        }
    }

    /// One of its addresses that an interface can have.
    fn usable(&self, address: IpAddr) -> Result<(), &'static str> {
        match address {
            a if metadata::is_service(a) => Err("is the metadata service's"),
            IpAddr::V4(a) if !self.ipv4.contains(&a) => Err("is not in the network's IPv4 prefix"),
            IpAddr::V4(a) if a == self.ipv4.network() || a == self.ipv4.broadcast() => {
                Err("is the address or the broadcast address of the network itself")
            }
            IpAddr::V6(a) if !self.ipv6.is_some_and(|net| net.contains(&a)) => {
                Err("is not in the network's IPv6 prefix")
            }
            IpAddr::V6(a) if self.ipv6.is_some_and(|net| net.network() == a) => {
                Err("is the anycast address of the network's routers")
            }
            a if a == IpAddr::V4(self.gateway) || Some(a) == self.gateway6.map(IpAddr::V6) => {
                Err("is the gateway's")
            }
            _ => Ok(()),
        }
    }
}

/// The address of the router behind an uplink.
fn router(text: &str, net: &Ipv4Net, external: bool) -> Result<Ipv4Addr, Error> {
    let bad = |what: String| Error::invalid_field("gateway", what).resource(text);
    if !external {
        return Err(bad("a network without an interface of the host's has no gateway elsewhere".to_owned())
            .remedy("the gateway is the host's address on the TAP: give that as host address"));
    }
    let address: Ipv4Addr = text.parse().map_err(|_| bad(format!("{text:?} is no IPv4 address")))?;
    if !net.contains(&address) || address == net.network() || address == net.broadcast() {
        return Err(bad(format!("{address} is no router's address in {net}")));
    }
    Ok(address)
}

fn network<N: std::str::FromStr>(field: &str, text: &str, example: &str) -> Result<N, Error> {
    text.parse().map_err(|_| {
        Error::invalid_field(field, format!("{text:?} is no network"))
            .remedy(format!("write it like {example}"))
    })
}

fn ipv6_network(text: &str, mtu: u32) -> Result<Ipv6Net, Error> {
    let net: Ipv6Net = network("ipv6_prefix", text, "fd00:88::/64")?;
    bounded("ipv6_prefix", net.prefix_len(), &IPV6_LEN)?;
    if net != net.trunc() {
        return Err(not_truncated("ipv6_prefix", text, &net.trunc().to_string()));
    }
    if net.network().is_multicast() || net.network().is_unicast_link_local() {
        let what = format!("{net} holds no addresses that are an interface's own");
        return Err(
            Error::invalid_field("ipv6_prefix", what).remedy("choose one of fd00::/8, or a global one")
        );
    }
    if mtu < IPV6_MTU_MIN {
        let what = format!("IPv6 needs an MTU of {IPV6_MTU_MIN}, and the network's is {mtu}");
        return Err(Error::invalid_field("mtu", what).remedy("give it a larger MTU, or no IPv6 prefix"));
    }
    Ok(net)
}

fn bounded(field: &str, len: u8, bounds: &std::ops::RangeInclusive<u8>) -> Result<(), Error> {
    if bounds.contains(&len) {
        return Ok(());
    }
    let what = format!("prefix length {len} is not between {} and {}", bounds.start(), bounds.end());
    Err(Error::invalid_field(field, what))
}

fn not_truncated(field: &str, given: &str, meant: &str) -> Error {
    Error::invalid_field(field, format!("{given} has bits behind its prefix"))
        .remedy(format!("write {meant}"))
}

fn first4(net: &Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from_bits(net.network().to_bits() | 1)
}

fn first6(net: &Ipv6Net) -> Ipv6Addr {
    Ipv6Addr::from_bits(net.network().to_bits() | 1)
}

/// A locally administered address made of the network's id (FNV-1a): the same in every card process.
fn gateway_mac(id: &str) -> MacAddr {
    let hash =
        id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let [.., a, b, c, d] = hash.to_be_bytes();
    MacAddr([0x02, 0x0b, a, b, c, d])
}

/// A device as its network knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Interface {
    /// Its MAC address.
    pub mac: MacAddr,
    /// Its IPv4 addresses; DHCP gives it the first.
    pub ipv4: Vec<Ipv4Addr>,
    /// Its IPv6 addresses.
    pub ipv6: Vec<Ipv6Addr>,
    /// The name that DHCP gives it; may be empty.
    pub hostname: String,
    /// What its guest is told about itself.
    pub metadata: Option<Arc<Metadata>>,
}

impl Interface {
    /// One in a plain network.
    pub fn plain(mac: MacAddr) -> Self {
        Self { mac, ipv4: Vec::new(), ipv6: Vec::new(), hostname: String::new(), metadata: None }
    }

    /// Reads its addresses from a device's specification.
    ///
    /// # Errors
    /// The field and what it may be.
    pub fn check(spec: &NetDeviceSpec, mac: MacAddr, subnet: Option<&Subnet>) -> Result<Self, Error> {
        let mut interface = Self { hostname: spec.hostname.clone(), ..Self::plain(mac) };
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if spec.hostname.len() > HOSTNAME_MAX || !spec.hostname.chars().all(plain) {
            let what = format!(
                "host name {:?} is not up to {HOSTNAME_MAX} characters of a-z, 0-9 and '-'",
                spec.hostname
            );
            return Err(Error::invalid_field("net.hostname", what));
        }
        let Some(subnet) = subnet else {
            if spec.metadata.is_some() {
                let what = "the network has no prefix: nobody in it is told who they are";
                return Err(Error::invalid_field("net.metadata", what)
                    .remedy("give no metadata, or make a network with a prefix"));
            }
            return match spec.addresses.first() {
                None => Ok(interface),
                Some(address) => {
                    let what = "the network has no prefix: its devices choose their own addresses";
                    Err(Error::invalid_field("net.addresses", what)
                        .resource(address)
                        .remedy("give no address, or make a network with a prefix"))
                }
            };
        };
        if mac == subnet.gateway_mac {
            return Err(Error::invalid_field("net.mac", format!("{mac} is the gateway's MAC address"))
                .remedy("choose another MAC address"));
        }
        if let Some(metadata) = &spec.metadata {
            metadata.check()?;
            interface.metadata = Some(Arc::new(metadata.clone()));
        }
        for text in &spec.addresses {
            let bad = |what: String| Error::invalid_field("net.addresses", what).resource(text);
            let address: IpAddr = text.parse().map_err(|_| bad(format!("{text:?} is no IP address")))?;
            subnet.usable(address).map_err(|why| bad(format!("{address} {why}")))?;
            if interface.addresses().any(|a| a == address) {
                return Err(bad(format!("{address} is given twice")));
            }
            match address {
                IpAddr::V4(a) => interface.ipv4.push(a),
                IpAddr::V6(a) => interface.ipv6.push(a),
            }
        }
        if interface.ipv4.is_empty() || spec.addresses.len() > ADDRESSES_MAX {
            let what = format!(
                "a device in a network with a prefix has 1 to {ADDRESSES_MAX} addresses, one of them IPv4, and not {}",
                spec.addresses.len()
            );
            return Err(Error::invalid_field("net.addresses", what));
        }
        Ok(interface)
    }

    /// All its IP addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let v6 = self.ipv6.iter().copied().map(IpAddr::V6);
        self.ipv4.iter().copied().map(IpAddr::V4).chain(v6)
    }

    /// Its link-local address, as made of its MAC address (RFC 4291 appendix A). It may speak from this one too.
    pub fn link_local(&self) -> Ipv6Addr {
        link_local(self.mac)
    }
}

/// The link-local address that a MAC address makes (RFC 4291 appendix A).
fn link_local(mac: MacAddr) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// Whose addresses are whose in a network with a prefix: what ARP and neighbour discovery are answered from.
#[derive(Debug, Default)]
pub struct Neighbours(HashMap<IpAddr, MacAddr>);

impl Neighbours {
    /// The gateway of a network, before any device comes.
    pub fn of(subnet: &Subnet) -> Self {
        if subnet.external {
            return Self::default();
        }
        let link_local = subnet.ipv6.map(|_| subnet.link_local().into());
        let all = subnet.gateways().map(|p| p.address).chain(link_local);
        Self(all.map(|address| (address, subnet.gateway_mac)).collect())
    }

    /// Takes in a device.
    ///
    /// # Errors
    /// The address that is another's; then nothing is changed.
    pub fn insert(&mut self, interface: &Interface) -> Result<(), IpAddr> {
        match interface.addresses().find(|a| self.0.contains_key(a)) {
            Some(taken) => Err(taken),
            None => {
                self.0.extend(Self::all_of(interface).map(|a| (a, interface.mac)));
                Ok(())
            }
        }
    }

    /// Lets it go.
    pub fn remove(&mut self, interface: &Interface) {
        for address in Self::all_of(interface) {
            self.0.remove(&address);
        }
    }

    /// Who has an address.
    pub fn get(&self, address: IpAddr) -> Option<MacAddr> {
        self.0.get(&address).copied()
    }

    fn all_of(interface: &Interface) -> impl Iterator<Item = IpAddr> {
        interface.addresses().chain([IpAddr::V6(interface.link_local())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(edit: impl FnOnce(&mut NetworkSpec)) -> Result<Option<Subnet>, Error> {
        let mut spec =
            NetworkSpec { id: "n".to_owned(), ipv4_prefix: "10.88.0.0/24".to_owned(), ..Default::default() };
        edit(&mut spec);
        let host: Vec<Prefix> = spec.host_addresses.iter().map(|a| a.parse().unwrap()).collect();
        Subnet::check(&spec, if spec.mtu == 0 { 1500 } else { spec.mtu }, &host)
    }

    #[test]
    fn the_gateway_is_the_hosts_address_or_the_first() {
        let s = network(|_| {}).unwrap().unwrap();
        assert_eq!((s.gateway, s.routed, s.name_servers()), ([10, 88, 0, 1].into(), false, &[][..]));
        let s = network(|s| {
            s.tap = "t".to_owned();
            s.host_addresses = vec!["192.168.1.1/24".to_owned(), "10.88.0.254/24".to_owned()];
            s.ipv6_prefix = "fd00:88::/64".to_owned();
        });
        let s = s.unwrap().unwrap();
        assert_eq!((s.gateway, s.gateway6), ([10, 88, 0, 254].into(), "fd00:88::1".parse().ok()));
        assert_eq!((s.routed, s.name_servers()), (true, &[Ipv4Addr::new(10, 88, 0, 254)][..]));
        let s = network(|s| s.dns = vec!["9.9.9.9".to_owned()]).unwrap().unwrap();
        assert_eq!(s.name_servers(), [Ipv4Addr::new(9, 9, 9, 9)]);
        assert_eq!(network(|s| s.ipv4_prefix.clear()).unwrap(), None);
        assert!(s.gateway_mac.is_unicast() && gateway_mac("a") != gateway_mac("b"));
    }

    #[test]
    fn bad_networks_are_refused() {
        let bad = |edit: fn(&mut NetworkSpec)| network(edit).unwrap_err().to_string();
        assert!(bad(|s| s.ipv4_prefix = "10.88.0.0".to_owned()).contains("no network"));
        assert!(bad(|s| s.ipv4_prefix = "10.88.0.1/24".to_owned()).contains("bits behind"));
        assert!(bad(|s| s.ipv4_prefix = "10.88.0.0/31".to_owned()).contains("between 8 and 30"));
        assert!(bad(|s| s.ipv4_prefix = "0.0.0.0/8".to_owned()).contains("no addresses"));
        assert!(bad(|s| s.ipv4_prefix = "224.0.0.0/8".to_owned()).contains("no addresses"));
        assert!(bad(|s| s.ipv6_prefix = "fe80::/64".to_owned()).contains("no addresses"));
        assert!(bad(|s| s.ipv6_prefix = "fd00::/40".to_owned()).contains("between 48 and 126"));
        assert!(bad(|s| s.dns = vec!["::1".to_owned()]).contains("no IPv4 address"));
        assert!(bad(|s| s.dns = vec!["1.1.1.1".to_owned(); 4]).contains("more than 3"));
        assert!(bad(|s| (s.ipv6_prefix, s.mtu) = ("fd00::/64".to_owned(), 1279)).contains("1280"));
        let no_prefix = |s: &mut NetworkSpec| {
            s.ipv4_prefix.clear();
            s.ipv6_prefix = "fd00::/64".to_owned();
        };
        assert!(network(no_prefix).unwrap_err().to_string().contains("without ipv4_prefix"));
    }

    #[test]
    fn interfaces_have_addresses_of_their_network_only() {
        let subnet = network(|s| s.ipv6_prefix = "fd00:88::/64".to_owned()).unwrap().unwrap();
        let mac = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
        let check = |subnet: Option<&Subnet>, addresses: &[&str]| {
            let spec = NetDeviceSpec {
                addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
                ..Default::default()
            };
            Interface::check(&spec, mac, subnet).map_err(|e| e.to_string())
        };
        let good = check(Some(&subnet), &["fd00:88::5", "10.88.0.5", "10.88.0.6"]).unwrap();
        assert_eq!(good.ipv4, [Ipv4Addr::new(10, 88, 0, 5), Ipv4Addr::new(10, 88, 0, 6)]);
        assert_eq!(good.link_local(), "fe80::5054:ff:fe00:1".parse::<Ipv6Addr>().unwrap());
        for (addresses, says) in [
            (&[][..], "1 to 8"),
            (&["fd00:88::5"], "one of them IPv4"),
            (&["10.88.0.5"; 2], "twice"),
            (&["10.88.0.1"], "the gateway's"),
            (&["fd00:88::1", "10.88.0.5"], "the gateway's"),
            (&["10.88.0.0"], "the network itself"),
            (&["10.88.0.255"], "the network itself"),
            (&["10.88.1.5"], "not in the network's IPv4 prefix"),
            (&["fe80::1"], "not in the network's IPv6 prefix"),
            (&["fd00:88::"], "anycast"),
            (&["10.88.0.5/24"], "no IP address"),
        ] {
            let why = check(Some(&subnet), addresses).unwrap_err();
            assert!(why.contains(says), "{addresses:?}: {why}");
        }
        assert!(check(None, &["10.88.0.5"]).unwrap_err().contains("no prefix"));
        assert!(check(None, &[]).is_ok());
        let gateway = NetDeviceSpec { addresses: vec!["10.88.0.5".to_owned()], ..Default::default() };
        assert!(Interface::check(&gateway, subnet.gateway_mac, Some(&subnet)).is_err());
    }
}
