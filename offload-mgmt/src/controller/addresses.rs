//! IP addresses of NICs in networks with a prefix: those asked for, each once, and others chosen.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proto::error::{Error, ErrorReason};
use proto::v1::{NetworkSpec, NicSpec};
use tonic::Code;

/// What addresses a network has to give.
#[derive(Debug)]
pub(crate) struct Pool {
    ipv4: Ipv4Net,
    ipv6: Option<Ipv6Net>,
    /// Of NICs, and the gateway's.
    used: HashSet<IpAddr>,
}

impl Pool {
    /// Of a network in which nobody is but the gateway. `None`: it has no prefix, or one that its card will refuse.
    pub(crate) fn of(network: &NetworkSpec) -> Option<Self> {
        let ipv4: Ipv4Net = network.ipv4_prefix.parse().ok()?;
        let ipv6: Option<Ipv6Net> = network.ipv6_prefix.parse().ok();
        // As the network card finds the gateway: the host's first address in the prefix, else the prefix's first.
        let hosts =
            || network.host_addresses.iter().filter_map(|a| a.split('/').next()?.parse::<IpAddr>().ok());
        let gateway = |net: IpNet, first: IpAddr| hosts().find(|a| net.contains(a)).unwrap_or(first);
        let first = Ipv4Addr::from_bits(ipv4.network().to_bits() | 1);
        let mut used = HashSet::from([gateway(ipv4.into(), first.into())]);
        if let Some(net) = ipv6 {
            used.insert(gateway(net.into(), Ipv6Addr::from_bits(net.network().to_bits() | 1).into()));
        }
        Some(Self { ipv4, ipv6, used })
    }

    /// Takes what a NIC has; of addresses that are not free, the first.
    pub(crate) fn take(&mut self, nic: &NicSpec) -> Option<IpAddr> {
        let addresses = nic.addresses.iter().filter_map(|a| a.parse().ok());
        addresses.filter(|a| !self.used.insert(*a)).min()
    }

    /// Gives a NIC that has been taken an address of each version that it has none of.
    ///
    /// # Errors
    /// INVALID_FIELD: the network is full.
    pub(crate) fn complete(&mut self, field: &str, nic: &mut NicSpec) -> Result<(), Error> {
        let has =
            |v4: bool| nic.addresses.iter().any(|a| a.parse::<IpAddr>().is_ok_and(|a| a.is_ipv4() == v4));
        let (no_v4, no_v6) = (!has(true), !has(false));
        let mut chosen = Vec::new();
        if no_v4 {
            chosen.push(self.free_ipv4());
        }
        if no_v6 && let Some(net) = self.ipv6 {
            chosen.push(self.free_ipv6(&net));
        }
        for address in chosen {
            let address = address.ok_or_else(|| {
                Error::new(
                    Code::ResourceExhausted,
                    ErrorReason::InvalidField,
                    format!("network {} has no address left for {field}", nic.network),
                )
                .resource(nic.network.clone())
                .remedy("remove VMs that are not needed, or use a network with a shorter prefix")
            })?;
            self.used.insert(address);
            nic.addresses.push(address.to_string());
        }
        Ok(())
    }

    /// The lowest that is free: the first of one more than there are taken, if the network is so large.
    fn free_ipv4(&self) -> Option<IpAddr> {
        self.ipv4.hosts().map(IpAddr::V4).find(|a| !self.used.contains(a))
    }

    fn free_ipv6(&self, net: &Ipv6Net) -> Option<IpAddr> {
        let mut hosts = (1..=u128::MAX).map(|n| Ipv6Addr::from_bits(net.network().to_bits().wrapping_add(n)));
        let free = hosts.find(|a| !net.contains(a) || !self.used.contains(&IpAddr::V6(*a)))?;
        net.contains(&free).then_some(IpAddr::V6(free))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(ipv4: &str, ipv6: &str, host: &[&str]) -> NetworkSpec {
        NetworkSpec {
            id: "n".into(),
            ipv4_prefix: ipv4.into(),
            ipv6_prefix: ipv6.into(),
            host_addresses: host.iter().map(|a| (*a).into()).collect(),
            ..NetworkSpec::default()
        }
    }

    fn nic(addresses: &[&str]) -> NicSpec {
        NicSpec { addresses: addresses.iter().map(|a| (*a).into()).collect(), ..NicSpec::default() }
    }

    #[test]
    fn the_lowest_free_address_is_given_and_never_the_gateways() {
        let mut pool = Pool::of(&network("10.0.0.0/29", "fd00::/64", &[])).expect("pool");
        assert_eq!(pool.take(&nic(&["10.0.0.3", "fd00::2"])), None);
        let mut given = Vec::new();
        for _ in 0..4 {
            let mut nic = nic(&[]);
            pool.complete("nic0", &mut nic).expect("an address");
            given.push(nic.addresses.join(" "));
        }
        assert_eq!(given, ["10.0.0.2 fd00::3", "10.0.0.4 fd00::4", "10.0.0.5 fd00::5", "10.0.0.6 fd00::6"]);
        let e = pool.complete("nic0", &mut nic(&[])).expect_err("full");
        assert!(e.fact("remedy").is_some() && e.message().contains("no address left"), "{e}");
        // What was asked for is kept.
        let mut asked = nic(&["fd00::9"]);
        assert!(pool.complete("nic0", &mut asked).is_err());
        assert_eq!(asked.addresses, ["fd00::9"]);
    }

    #[test]
    fn the_gateway_is_the_hosts_address() {
        let mut pool = Pool::of(&network("10.0.0.0/29", "", &["10.0.0.2/29", "10.0.0.3/29"])).expect("pool");
        assert_eq!(pool.take(&nic(&["10.0.0.2"])), Some([10, 0, 0, 2].into()));
        let mut first = nic(&[]);
        pool.complete("nic0", &mut first).expect("an address");
        assert_eq!(first.addresses, ["10.0.0.1"]);
        assert!(Pool::of(&network("", "", &[])).is_none());
    }

    #[test]
    fn a_small_ipv6_network_runs_out() {
        let mut pool = Pool::of(&network("10.0.0.0/24", "fd00::/126", &[])).expect("pool");
        let mut nics = [nic(&[]), nic(&[]), nic(&[])];
        let ok: Vec<_> = nics.iter_mut().map(|n| pool.complete("nic0", n).is_ok()).collect();
        assert_eq!(ok, [true, true, false]);
    }
}
