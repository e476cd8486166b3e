//! Router advertisements (RFC 4861 section 4.2): how a guest configures IPv6.
//!
//! Addresses are the control plane's to give, so a guest is told to make none of its own and to ask for them by DHCPv6 (M).
//! It is told what is on the link, how large packets may be, and the gateway, if there is a way out. Where the guest is also
//! told about itself, the metadata service's address is on the link: so it is reached without a gateway, too.

use std::net::Ipv6Addr;

use super::neighbour::Asker;
use super::{Buffer, Writer};
use crate::frame::checksum::Sum;
use crate::frame::packet::{ICMPV6, TYPE_IPV6};
use crate::metadata;
use crate::subnet::Subnet;

const ADVERTISEMENT: u8 = 134;
const HOP_LIMIT: u8 = 64;
/// Addresses by DHCPv6, and everything else, too.
const MANAGED: u8 = 0x80;
const OTHER: u8 = 0x40;
/// A prefix's addresses are on the link. Without the flag beside it, for addresses that guests make of the prefix.
const ON_LINK: u8 = 0x80;
/// For how long a guest keeps the gateway, in seconds: the longest that RFC 4861 allows. Advertisements come more often; a card
/// may be away for this long.
pub const ROUTER_SECONDS: u16 = 9000;
const FOREVER: [u8; 4] = [0xff; 4];

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Writes what a guest is told, whether it has asked or not; its length. `None`: the network has no IPv6.
pub fn advertisement(
    asker: Asker,
    subnet: &Subnet,
    with_metadata: bool,
    buffer: &mut Buffer,
) -> Option<usize> {
    let prefix = subnet.ipv6?;
    let to = if asker.address.is_unspecified() { ALL_NODES } else { asker.address };
    let mut w = Writer::new(buffer);
    w.ethernet(asker.mac, subnet.gateway_mac, TYPE_IPV6);
    let ip = w.len;
    w.put(&[0x60, 0, 0, 0, 0, 0, ICMPV6, 255]);
    let addresses = w.len;
    w.put(&subnet.link_local().octets()).put(&to.octets());
    let icmp = w.len;
    let lifetime = if subnet.is_ipv6_router() { ROUTER_SECONDS } else { 0 };
    w.put(&[ADVERTISEMENT, 0, 0, 0, HOP_LIMIT, MANAGED | OTHER]).put(&lifetime.to_be_bytes()).put(&[0; 8]);
    w.put(&[1, 1]).put(&subnet.gateway_mac.0);
    w.put(&[5, 1, 0, 0]).put(&u32::from(subnet.mtu).to_be_bytes());
    let mut on_link = |address: Ipv6Addr, length: u8| {
        w.put(&[3, 4, length, ON_LINK]).put(&FOREVER).put(&FOREVER).put(&[0; 4]).put(&address.octets());
    };
    on_link(prefix.network(), prefix.prefix_len());
    if with_metadata {
        on_link(metadata::ADDRESS_V6, 128);
    }
    // It is 96 bytes long at most.
    let length = (w.len - icmp) as u16;
    w.patch(ip + 4, length);
    let mut sum = Sum::new();
    sum.add(w.written(addresses));
    sum.add_u16(length);
    sum.add_u16(ICMPV6.into());
    w.patch(icmp + 2, sum.finish());
    w.finish()
}

#[cfg(test)]
mod tests {
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{
        EthernetFrame, Icmpv6Packet, Icmpv6Repr, Ipv6Packet, NdiscPrefixInfoFlags, NdiscRepr,
        NdiscRouterFlags,
    };

    use super::*;
    use crate::answer::MAX;
    use crate::mac::MacAddr;

    fn subnet(routed: bool) -> Subnet {
        let spec = proto::v1::NetworkSpec {
            id: "n".to_owned(),
            tap: if routed { "t".to_owned() } else { String::new() },
            ipv4_prefix: "10.88.0.0/24".to_owned(),
            ipv6_prefix: "fd00:88::/64".to_owned(),
            ..Default::default()
        };
        Subnet::check(&spec, 1400, &[]).unwrap().unwrap()
    }

    #[test]
    fn a_guest_is_told_the_link_and_the_gateway() {
        let mac = MacAddr([0x52, 0x54, 0, 0, 0, 7]);
        for (routed, address) in [(true, "fe80::7"), (false, "::")] {
            let subnet = subnet(routed);
            let mut buffer = [0; MAX];
            let asker = Asker { mac, address: address.parse().unwrap() };
            let n = advertisement(asker, &subnet, false, &mut buffer).unwrap();
            // Another's parser finds lengths and the checksum right.
            let ethernet = EthernetFrame::new_checked(&buffer[..n]).unwrap();
            assert_eq!((ethernet.dst_addr().0, ethernet.src_addr().0), (mac.0, subnet.gateway_mac.0));
            let ip = Ipv6Packet::new_checked(ethernet.payload()).unwrap();
            assert_eq!((ip.hop_limit(), ip.src_addr()), (255, subnet.link_local()));
            assert_eq!(ip.dst_addr(), if routed { asker.address } else { ALL_NODES });
            let icmp = Icmpv6Packet::new_checked(ip.payload()).unwrap();
            let checksums = ChecksumCapabilities::default();
            let repr = Icmpv6Repr::parse(&ip.src_addr(), &ip.dst_addr(), &icmp, &checksums).unwrap();
            let Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert {
                flags,
                router_lifetime,
                mtu,
                prefix_info,
                lladdr,
                ..
            }) = repr
            else {
                panic!("{repr:?}")
            };
            assert_eq!(flags, NdiscRouterFlags::MANAGED | NdiscRouterFlags::OTHER);
            assert_eq!(router_lifetime.secs(), if routed { 9000 } else { 0 });
            assert_eq!(mtu, Some(1400));
            assert_eq!(lladdr.unwrap().as_bytes(), subnet.gateway_mac.0);
            let prefix = prefix_info.unwrap();
            assert_eq!((prefix.prefix, prefix.prefix_len), ("fd00:88::".parse().unwrap(), 64));
            assert_eq!(prefix.flags, NdiscPrefixInfoFlags::ON_LINK);
        }
    }

    #[test]
    fn the_metadata_service_is_on_the_link_of_those_to_whom_it_speaks() {
        let asker = Asker { mac: MacAddr([2; 6]), address: Ipv6Addr::UNSPECIFIED };
        let mut buffer = [0; MAX];
        let without = advertisement(asker, &subnet(false), false, &mut buffer).unwrap();
        let with = advertisement(asker, &subnet(false), true, &mut buffer).unwrap();
        assert_eq!((with - without, &buffer[without..without + 4]), (32, &[3, 4, 128, ON_LINK][..]));
        assert_eq!(&buffer[with - 16..with], &metadata::ADDRESS_V6.octets());
    }
}
