//! Neighbour discovery (RFC 4861): solicitations are answered in the name of whoever has the address.

use std::net::Ipv6Addr;

use super::{Buffer, Writer};
use crate::frame::checksum::Sum;
use crate::frame::packet::{ICMPV6, TYPE_IPV6};
use crate::mac::MacAddr;

const ADVERTISEMENT: u8 = 136;
/// Flags of an advertisement: from a router, an answer, override what is cached.
const ROUTER: u8 = 0x80;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;
/// Type, code, checksum, flags, target, and the option with the target's link-layer address.
const LEN: u16 = 32;

/// Who asked, and from where.
#[derive(Debug, Clone, Copy)]
pub struct Asker {
    /// Its MAC address.
    pub mac: MacAddr,
    /// Its address; unspecified: it checks whether the target is free (section 7.2.4).
    pub address: Ipv6Addr,
}

/// Writes the advertisement that tells `asker` that `target` is at `mac`; its length.
pub fn advertisement(
    asker: Asker,
    target: Ipv6Addr,
    mac: MacAddr,
    is_router: bool,
    buffer: &mut Buffer,
) -> Option<usize> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let (to, solicited) =
        if asker.address.is_unspecified() { (all_nodes, 0) } else { (asker.address, SOLICITED) };
    let flags = OVERRIDE | solicited | if is_router { ROUTER } else { 0 };
    let mut w = Writer::new(buffer);
    w.ethernet(asker.mac, mac, TYPE_IPV6);
    w.put(&[0x60, 0, 0, 0]).put(&LEN.to_be_bytes()).put(&[ICMPV6, 255]);
    let addresses = w.len;
    w.put(&target.octets()).put(&to.octets());
    let icmp = w.len;
    w.put(&[ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0]).put(&target.octets()).put(&[2, 1]).put(&mac.0);
    // The pseudo-header (RFC 8200 section 8.1): addresses, length, protocol.
    let mut sum = Sum::new();
    sum.add(w.written(addresses));
    sum.add_u16(LEN);
    sum.add_u16(ICMPV6.into());
    w.patch(icmp + 2, sum.finish());
    w.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::MAX;
    use crate::frame::packet::{Packet, parse};

    #[test]
    fn an_advertisement_is_addressed_and_summed_right() {
        let (asks, has) = (MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([2, 0, 0, 0, 0, 2]));
        let target: Ipv6Addr = "fd00::2".parse().unwrap();
        for (address, to, flags) in
            [("fd00::1", "fd00::1", SOLICITED | OVERRIDE), ("::", "ff02::1", OVERRIDE)]
        {
            let asker = Asker { mac: asks, address: address.parse().unwrap() };
            let mut buffer = [0; MAX];
            let n = advertisement(asker, target, has, false, &mut buffer).unwrap();
            let Ok(Packet::V6(p)) = parse(&buffer[..n], n) else { panic!() };
            assert_eq!((n, p.source, p.destination), (86, target, to.parse().unwrap()));
            assert_eq!((p.protocol, p.hop_limit, buffer[58]), (Some(ICMPV6), 255, flags));
            let mut sum = Sum::new();
            sum.add(&buffer[22..n]);
            sum.add_u16(LEN);
            sum.add_u16(58);
            assert_eq!(sum.finish(), 0);
        }
    }
}
