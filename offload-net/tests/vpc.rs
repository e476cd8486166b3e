//! A network with a prefix: a guest speaks as itself, hears what is meant for it, and is answered by the card.

mod common;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use common::*;
use offload_card::poll::PollPolicy;
use offload_net::drops::{DropReason, Drops};
use offload_net::frame::header::VnetHeader;
use offload_net::mac::MacAddr;
use offload_net::network::Network;
use offload_net::network::uplink::Uplink;
use offload_net::subnet::{Interface, Subnet};
use proptest::prelude::*;
use proto::v1::NetworkSpec;

const GATEWAY: [u8; 4] = [10, 0, 0, 1];

fn subnet() -> Subnet {
    let spec = NetworkSpec {
        id: "vpc".to_owned(),
        ipv4_prefix: "10.0.0.0/24".to_owned(),
        ipv6_prefix: "fd00::/64".to_owned(),
        ..Default::default()
    };
    Subnet::check(&spec, 1500, &[]).unwrap().unwrap()
}

fn network() -> Network {
    Network::start("test", 1500, Some(subnet()), Uplink::None, PollPolicy::default()).unwrap()
}

/// Guest `last` has 10.0.0.`last` and fd00::`last`.
fn ip(last: u8) -> [u8; 4] {
    [10, 0, 0, last]
}

fn ip6(last: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into())
}

struct Member {
    guest: Guest,
    drops: Arc<Drops>,
    last: u8,
}

impl Member {
    fn new(network: &Network, last: u8) -> Self {
        let mut guest = Guest::new(last, FULL);
        guest.fill_rx(200, 2048);
        let interface = Interface {
            ipv4: vec![ip(last).into()],
            ipv6: vec![ip6(last)],
            hostname: format!("guest-{last}"),
            ..Interface::plain(MacAddr(guest.mac))
        };
        let (_, drops) = guest.plug_as(network, interface);
        Self { guest, drops, last }
    }

    fn udp(&self, to: &Self, payload: &[u8]) -> Vec<u8> {
        let macs = (to.guest.mac, self.guest.mac);
        udp4(macs, (ip(self.last), 1000), (ip(to.last), 2000), payload, false)
    }

    /// Sends a frame that is to be dropped for this reason, and nobody is to hear of.
    fn is_refused(&mut self, frame: &[u8], why: DropReason, others: &mut [&mut Self]) {
        let before = self.drops.get(why);
        let all: u64 = self.guest.shared[1].counters.dropped.get();
        self.guest.send(frame);
        card::retry(|| {
            if self.guest.shared[1].counters.dropped.get() > all { Ok(()) } else { Err("not dropped") }
        });
        assert_eq!(self.drops.get(why), before + 1, "{why:?} {:?}", self.drops);
        // What was dropped before this one would have come by now: frames are forwarded in order.
        for other in others {
            let hello = self.udp(other, b"hello");
            self.guest.send(&hello);
            assert_eq!(other.guest.receive().unwrap().1, hello, "{why:?}");
        }
    }
}

fn arp(operation: u8, sender: ([u8; 6], [u8; 4]), target: [u8; 4], to: [u8; 6]) -> Vec<u8> {
    let mut f = to.to_vec();
    f.extend(sender.0);
    f.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    f.extend(sender.0);
    f.extend(sender.1);
    f.extend([0; 6]);
    f.extend(target);
    f
}

/// An IPv6 packet; the checksum is nobody's business here.
fn v6(macs: ([u8; 6], [u8; 6]), from: Ipv6Addr, to: Ipv6Addr, next: u8, body: &[u8]) -> Vec<u8> {
    let mut f = [macs.0, macs.1].concat();
    f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    f.extend((body.len() as u16).to_be_bytes());
    f.extend([next, 255]);
    f.extend(from.octets());
    f.extend(to.octets());
    f.extend(body);
    f
}

fn icmp6(kind: u8, target: Ipv6Addr) -> Vec<u8> {
    let mut b = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    b.extend(target.octets());
    b
}

#[test]
fn guests_exchange_frames_under_their_own_addresses() {
    let network = network();
    let (mut a, mut b) = (Member::new(&network, 11), Member::new(&network, 12));
    for len in [0, 100, 1400] {
        let f = a.udp(&b, &vec![7; len]);
        a.guest.send(&f);
        assert_eq!(b.guest.receive().unwrap().1, f);
        let f = b.udp(&a, &vec![8; len]);
        b.guest.send(&f);
        assert_eq!(a.guest.receive().unwrap().1, f);
    }
    // A super-frame, whole.
    let payload = vec![9; 30_000];
    let (header, mut f) = tcp4_super((b.guest.mac, a.guest.mac), &payload, 1448);
    (f[29], f[33]) = (11, 12);
    a.guest.send_pieces(&header, &f, 4096);
    assert_eq!(b.guest.receive().unwrap().1, f);
    // IPv6, from the address it was given and from the one that its MAC makes.
    let own = Interface::plain(MacAddr(a.guest.mac)).link_local();
    for from in [ip6(11), own] {
        let f = v6((b.guest.mac, a.guest.mac), from, ip6(12), 17, &[0, 9, 0, 9, 0, 8, 0, 0]);
        a.guest.send(&f);
        assert_eq!(b.guest.receive().unwrap().1, f);
    }
    // Fragments of what it may send.
    let mut f = a.udp(&b, &[1; 64]);
    f[20..22].copy_from_slice(&0x2001_u16.to_be_bytes());
    a.guest.send(&f);
    assert_eq!(b.guest.receive().unwrap().1, f);
    assert_eq!(a.guest.shared[1].counters.dropped.get() + b.guest.shared[1].counters.dropped.get(), 0);
}

#[test]
fn a_guest_speaks_as_nobody_else() {
    let network = network();
    let (mut a, mut b, mut c) =
        (Member::new(&network, 11), Member::new(&network, 12), Member::new(&network, 13));
    let others = &mut [&mut b, &mut c];
    let (mac_a, mac_b, mac_c) = (a.guest.mac, others[0].guest.mac, others[1].guest.mac);

    // Another's MAC address, under its own IP address.
    let mut f = a.udp(others[0], b"x");
    f[6..12].copy_from_slice(&mac_c);
    a.is_refused(&f, DropReason::SpoofedMac, others);
    // Another's IP address, the gateway's, none, one outside.
    for from in [ip(13), GATEWAY, [0; 4], [192, 0, 2, 1], [255; 4]] {
        let f = udp4((mac_b, mac_a), (from, 1000), (ip(12), 2000), b"x", false);
        a.is_refused(&f, DropReason::SpoofedAddress, others);
    }
    // No address is for DHCP to the server only.
    let f = udp4((mac_b, mac_a), ([0; 4], 68), (ip(12), 67), b"x", false);
    a.is_refused(&f, DropReason::SpoofedAddress, others);
    let f = udp4((BROADCAST, mac_a), (ip(13), 68), ([255; 4], 67), b"x", false);
    a.is_refused(&f, DropReason::SpoofedAddress, others);
    // As a fragment that has no ports.
    let mut f = udp4((mac_b, mac_a), (ip(13), 1000), (ip(12), 2000), b"12345678", false);
    f[21] = 1;
    a.is_refused(&f, DropReason::SpoofedAddress, others);
    // Over IPv6.
    for from in [ip6(13), "fe80::1".parse().unwrap(), Ipv6Addr::UNSPECIFIED] {
        let f = v6((mac_b, mac_a), from, ip6(12), 17, &[0, 9, 0, 9, 0, 8, 0, 0]);
        a.is_refused(&f, DropReason::SpoofedAddress, others);
    }

    // ARP: requests and replies about another, to everybody and to one.
    for to in [BROADCAST, mac_b] {
        for operation in [1, 2] {
            a.is_refused(&arp(operation, (mac_a, ip(13)), ip(12), to), DropReason::SpoofedNeighbour, others);
            let mut f = arp(operation, (mac_c, ip(11)), ip(12), to);
            f[6..12].copy_from_slice(&mac_a);
            a.is_refused(&f, DropReason::SpoofedNeighbour, others);
        }
    }
    // Neighbour advertisements.
    let f = v6((mac_b, mac_a), ip6(11), ip6(12), 58, &icmp6(136, ip6(13)));
    a.is_refused(&f, DropReason::SpoofedNeighbour, others);
    // True ones are contained: nobody but the card has asked.
    a.is_refused(&arp(2, (mac_a, ip(11)), ip(12), mac_b), DropReason::Multicast, others);
    let f = v6((mac_b, mac_a), ip6(11), ip6(12), 58, &icmp6(136, ip6(11)));
    a.is_refused(&f, DropReason::Multicast, others);

    // A DHCP server, a router.
    for (to, mac) in [([255; 4], BROADCAST), (ip(12), mac_b)] {
        let f = udp4((mac, mac_a), (ip(11), 67), (to, 68), b"x", false);
        a.is_refused(&f, DropReason::Server, others);
    }
    let f = v6((mac_b, mac_a), ip6(11), ip6(12), 17, &[2, 35, 2, 34, 0, 8, 0, 0]);
    a.is_refused(&f, DropReason::Server, others);
    for kind in [134, 137] {
        let f = v6((mac_b, mac_a), ip6(11), ip6(12), 58, &icmp6(kind, ip6(13)));
        a.is_refused(&f, DropReason::Server, others);
    }
    // Hidden behind extension headers: in sight, and out of it.
    let hidden = |extension: &[u8]| {
        let body = [extension, &icmp6(134, ip6(13))].concat();
        v6((mac_b, mac_a), ip6(11), ip6(12), 60, &body)
    };
    a.is_refused(&hidden(&[58, 0, 1, 4, 0, 0, 0, 0]), DropReason::Server, others);
    let long = [&[58, 31][..], &[0; 254]].concat();
    a.is_refused(&hidden(&long), DropReason::Malformed, others);
    // In a first fragment too small for the ports.
    let mut f = udp4((mac_b, mac_a), (ip(11), 67), (ip(12), 68), b"", false);
    (f[17], f[20]) = (23, 0x20);
    a.is_refused(&f, DropReason::Malformed, others);

    // Neither ARP nor IP; a VLAN tag in front of what would be spoofed.
    let f = frame(mac_b, mac_a, 1, 100);
    a.is_refused(&f, DropReason::Protocol, others);
    let mut f = a.udp(others[0], b"x");
    f.splice(12..12, [0x81, 0, 0, 5]);
    a.is_refused(&f, DropReason::Protocol, others);
    let mut f = a.udp(others[0], b"x");
    f[14] = 0x4f;
    a.is_refused(&f, DropReason::Malformed, others);
    let errors = a.guest.shared[1].counters.errors.get();
    assert!(errors >= 25, "{errors}");
}

#[test]
fn nothing_goes_to_everybody() {
    let network = network();
    let (mut a, mut b, mut c) =
        (Member::new(&network, 11), Member::new(&network, 12), Member::new(&network, 13));
    let others = &mut [&mut b, &mut c];
    let mac_a = a.guest.mac;
    for to in [BROADCAST, [1, 0, 0x5e, 0, 0, 251], [0x33, 0x33, 0, 0, 0, 1], [1, 0x80, 0xc2, 0, 0, 0]] {
        let f = udp4((to, mac_a), (ip(11), 5353), ([224, 0, 0, 251], 5353), b"x", false);
        a.is_refused(&f, DropReason::Multicast, others);
    }
    // What every guest says when it comes up.
    let routers = "ff02::16".parse().unwrap();
    let f = v6(([0x33, 0x33, 0, 0, 0, 0x16], mac_a), ip6(11), routers, 58, &icmp6(143, ip6(1)));
    a.is_refused(&f, DropReason::Multicast, others);
    // An address that nobody has, and the gateway, which is only answered for.
    for to in [[0x52, 0x54, 0, 0, 0, 99], subnet().gateway_mac.0, mac_a] {
        let f = udp4((to, mac_a), (ip(11), 1), (ip(99), 2), b"x", false);
        a.is_refused(&f, DropReason::NoDestination, others);
    }
    a.is_refused(&arp(1, (mac_a, ip(11)), ip(99), BROADCAST), DropReason::NoDestination, others);
    // No fault of the sender's, all of it.
    assert_eq!(a.guest.shared[1].counters.errors.get(), 0);
}

#[test]
fn networks_are_apart() {
    let (red, blue) = (network(), network());
    let (mut a, mut b) = (Member::new(&red, 11), Member::new(&blue, 12));
    a.is_refused(&a.udp(&b, b"x"), DropReason::NoDestination, &mut []);
    a.is_refused(&arp(1, (a.guest.mac, ip(11)), ip(12), BROADCAST), DropReason::NoDestination, &mut []);
    assert!(b.guest.receives_nothing());
}

#[test]
fn arp_is_answered_by_the_card() {
    let network = network();
    let (mut a, mut b) = (Member::new(&network, 11), Member::new(&network, 12));
    let mac = a.guest.mac;
    let ask = |a: &mut Member, sender, target, to| {
        a.guest.send(&arp(1, (mac, sender), target, to));
        let (header, f) = a.guest.receive().expect("an answer");
        assert_eq!((header, f.len(), &f[..6]), (VnetHeader::default(), 42, &mac[..]));
        // A reply, of the target, to the sender.
        assert_eq!((f[21], &f[28..32], &f[38..42]), (2, &target[..], &sender[..]));
        assert_eq!(&f[6..12], &f[22..28]);
        f[22..28].to_vec()
    };
    assert_eq!(ask(&mut a, ip(11), ip(12), BROADCAST), b.guest.mac);
    assert_eq!(ask(&mut a, ip(11), GATEWAY, BROADCAST), subnet().gateway_mac.0);
    // To see whether it is still there; and whether an address is free (RFC 5227), which it is not.
    assert_eq!(ask(&mut a, ip(11), ip(12), b.guest.mac), b.guest.mac);
    assert_eq!(ask(&mut a, [0; 4], ip(12), BROADCAST), b.guest.mac);
    // Its own is.
    for sender in [[0; 4], ip(11)] {
        a.guest.send(&arp(1, (mac, sender), ip(11), BROADCAST));
    }
    assert!(a.guest.receives_nothing() && b.guest.receives_nothing());
    assert_eq!(a.guest.shared[1].counters.dropped.get(), 0);
}

#[test]
fn neighbour_solicitations_are_answered_by_the_card() {
    let network = network();
    let (mut a, mut b) = (Member::new(&network, 11), Member::new(&network, 12));
    let mac = a.guest.mac;
    let link_local = Interface::plain(MacAddr(b.guest.mac)).link_local();
    for (from, target, answer) in [
        (ip6(11), ip6(12), b.guest.mac),
        (ip6(11), link_local, b.guest.mac),
        (ip6(11), ip6(1), subnet().gateway_mac.0),
        (Ipv6Addr::UNSPECIFIED, ip6(12), b.guest.mac),
    ] {
        let group =
            Ipv6Addr::from_bits(0xff02_0000_0000_0000_0000_0001_ff00_0000 | target.to_bits() & 0xff_ffff);
        let o = group.octets();
        let to = [0x33, 0x33, o[12], o[13], o[14], o[15]];
        a.guest.send(&v6((to, mac), from, group, 58, &icmp6(135, target)));
        let f = a.guest.receive().expect("an answer").1;
        assert_eq!((f.len(), &f[..6], f[54], &f[62..78]), (86, &mac[..], 136, &target.octets()[..]));
        assert_eq!((&f[78..80], &f[80..86]), (&[2, 1][..], &answer[..]));
    }
    // Duplicate address detection of its own.
    a.guest.send(&v6((BROADCAST, mac), Ipv6Addr::UNSPECIFIED, ip6(11), 58, &icmp6(135, ip6(11))));
    assert!(a.guest.receives_nothing() && b.guest.receives_nothing());
    assert_eq!(a.guest.shared[1].counters.dropped.get(), 0);
    // From another link it would have been forwarded: hop limit below 255.
    let mut far = v6((b.guest.mac, mac), ip6(11), ip6(12), 58, &icmp6(135, ip6(12)));
    far[21] = 254;
    a.is_refused(&far, DropReason::Malformed, &mut [&mut b]);
}

/// A DHCP message with these options.
fn dhcp(mac: [u8; 6], options: &[u8]) -> Vec<u8> {
    let mut m = vec![0; 240];
    m[..3].copy_from_slice(&[1, 1, 6]);
    m[4..8].copy_from_slice(b"xidx");
    m[28..34].copy_from_slice(&mac);
    m[236..].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
    m.extend(options);
    m.push(255);
    m
}

fn option(message: &[u8], code: u8) -> Option<Vec<u8>> {
    let mut rest = &message[240..];
    while let [c, l, more @ ..] = rest {
        if *c == code {
            return Some(more[..usize::from(*l)].to_vec());
        }
        rest = &more[usize::from(*l)..];
    }
    None
}

#[test]
fn dhcp_gives_a_guest_its_address() {
    let network = network();
    let (mut a, mut b) = (Member::new(&network, 11), Member::new(&network, 12));
    let mac = a.guest.mac;
    let mut talk = |options: &[u8]| {
        let f = udp4((BROADCAST, mac), ([0; 4], 68), ([255; 4], 67), &dhcp(mac, options), false);
        // In pieces, as some drivers send: most of the message is not in the copied head.
        a.guest.send_pieces(&VnetHeader::default(), &f, 100);
        let f = a.guest.receive().expect("an answer").1;
        assert_eq!((&f[..6], &f[6..12], &f[26..30]), (&mac[..], &subnet().gateway_mac.0[..], &GATEWAY[..]));
        assert!(udp4_checksum_holds(&f));
        let message = f[42..].to_vec();
        assert_eq!((message[0], &message[4..8], &message[16..20]), (2, &b"xidx"[..], &ip(11)[..]));
        message
    };
    let offer = talk(&[53, 1, 1, 12, 5, b'l', b'i', b'a', b'r', b's']);
    assert_eq!(option(&offer, 53), Some(vec![2]));
    let ack = talk(&[&[53, 1, 3, 54, 4][..], &GATEWAY, &[50, 4], &ip(11)].concat());
    assert_eq!((option(&ack, 53), option(&ack, 54)), (Some(vec![5]), Some(GATEWAY.to_vec())));
    assert_eq!((option(&ack, 1), option(&ack, 26)), (Some(vec![255, 255, 255, 0]), Some(vec![5, 220])));
    assert_eq!((option(&ack, 12), option(&ack, 3)), (Some(b"guest-11".to_vec()), None));
    assert_eq!(option(&ack, 51), Some(3600_u32.to_be_bytes().to_vec()));
    assert!(b.guest.receives_nothing());

    // In another's name.
    let f = udp4((BROADCAST, mac), ([0; 4], 68), ([255; 4], 67), &dhcp(b.guest.mac, &[53, 1, 1]), false);
    a.is_refused(&f, DropReason::SpoofedNeighbour, &mut [&mut b]);
    let f = udp4((BROADCAST, mac), ([0; 4], 68), ([255; 4], 67), b"no DHCP", false);
    a.is_refused(&f, DropReason::Malformed, &mut [&mut b]);
    // One that begins and does not end here.
    let mut f = udp4((BROADCAST, mac), ([0; 4], 68), ([255; 4], 67), &dhcp(mac, &[53, 1, 1]), false);
    f[20] = 0x20;
    a.is_refused(&f, DropReason::SpoofedAddress, &mut [&mut b]);
}

#[test]
fn ipv6_is_configured_by_the_card() {
    let network = network();
    let (mut a, mut b) = (Member::new(&network, 11), Member::new(&network, 12));
    let mac = a.guest.mac;
    let link_local = Interface::plain(MacAddr(mac)).link_local();
    let gateway = subnet().link_local();
    // A router solicitation, from its address and from none.
    let all_routers = "ff02::2".parse().unwrap();
    for (from, to) in [(link_local, link_local), (Ipv6Addr::UNSPECIFIED, "ff02::1".parse().unwrap())] {
        a.guest.send(&v6(
            ([0x33, 0x33, 0, 0, 0, 2], mac),
            from,
            all_routers,
            58,
            &[133, 0, 0, 0, 0, 0, 0, 0],
        ));
        let f = a.guest.receive().expect("an advertisement").1;
        assert_eq!((&f[..6], &f[22..38], &f[38..54]), (&mac[..], &gateway.octets()[..], &to.octets()[..]));
        // Addresses by DHCPv6, and no router: there is no way out.
        assert_eq!((f[54], f[59], &f[60..62]), (134, 0xc0, &[0, 0][..]));
    }
    // And who the advertisement says it is from can be found.
    a.guest.send(&v6(([0x33, 0x33, 0xff, 0, 0, 1], mac), link_local, gateway, 58, &icmp6(135, gateway)));
    assert_eq!(a.guest.receive().expect("an answer").1[80..86], subnet().gateway_mac.0);
    // DHCPv6: a solicitation with rapid commit.
    let mut udp = vec![2, 34, 2, 35, 0, 0, 0, 0];
    udp.extend([
        1, 7, 8, 9, 0, 1, 0, 4, 0, 9, 9, 9, 0, 14, 0, 0, 0, 3, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    udp[5] = udp.len() as u8;
    let servers = "ff02::1:2".parse().unwrap();
    let solicit = |from| v6(([0x33, 0x33, 0, 1, 0, 2], mac), from, servers, 17, &udp);
    a.guest.send(&solicit(link_local));
    let f = a.guest.receive().expect("a reply").1;
    assert_eq!((f[62], &f[38..54]), (7, &link_local.octets()[..]));
    assert!(f.windows(16).any(|w| w == ip6(11).octets()), "{f:?}");
    assert!(b.guest.receives_nothing());

    // In another's name, from farther away, no message at all.
    let others = &mut [&mut b];
    let of_b = Interface::plain(MacAddr(others[0].guest.mac)).link_local();
    a.is_refused(&solicit(of_b), DropReason::SpoofedAddress, others);
    a.is_refused(&solicit(Ipv6Addr::UNSPECIFIED), DropReason::SpoofedAddress, others);
    let mut far =
        v6(([0x33, 0x33, 0, 0, 0, 2], mac), link_local, all_routers, 58, &[133, 0, 0, 0, 0, 0, 0, 0]);
    far[21] = 254;
    a.is_refused(&far, DropReason::Malformed, others);
    udp.truncate(10);
    a.is_refused(
        &v6(([0x33, 0x33, 0, 1, 0, 2], mac), link_local, servers, 17, &udp),
        DropReason::Malformed,
        others,
    );
}

#[test]
fn addresses_are_given_once_and_free_again() {
    let network = network();
    let a = Guest::new(11, FULL);
    let interface = |mac: [u8; 6], ip: [u8; 4]| Interface {
        ipv4: vec![Ipv4Addr::from(ip)],
        ..Interface::plain(MacAddr(mac))
    };
    let (port, _) = a.plug_as(&network, interface(a.mac, ip(11)));
    let b = Guest::new(12, FULL);
    for taken in [ip(11), GATEWAY] {
        let e = network.plug(interface(b.mac, taken)).unwrap_err();
        assert!(e.to_string().contains("has the address"), "{e}");
    }
    // Nothing is left of the attempts.
    let (other, _) = network.plug(interface(b.mac, ip(12))).unwrap();
    network.unplug(other);
    for index in [0, 1] {
        network.stop_queue(port, index, std::time::Instant::now() + PATIENCE).unwrap();
    }
    network.unplug(port);
    assert!(network.plug(interface(b.mac, ip(11))).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Whatever one guest sends, another hears of nothing that is not from its own addresses, and the network lives.
    #[test]
    fn hostile_frames_are_in_their_senders_name(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..20),
        kinds in prop::collection::vec((0..4_usize, any::<u8>(), any::<bool>(), any::<bool>()), 20),
    ) {
        let network = network();
        let (mut a, mut b) = (Member::new(&network, 11), Member::new(&network, 12));
        for (mut f, (kind, protocol, own_ip, broadcast)) in frames.into_iter().zip(kinds) {
            let to = if broadcast { BROADCAST } else { b.guest.mac };
            if f.len() >= 60 {
                f[..6].copy_from_slice(&to);
                f[6..12].copy_from_slice(&a.guest.mac);
                f[12..14].copy_from_slice(&[[8, 0], [8, 6], [0x86, 0xdd], [0x81, 0]][kind]);
                if kind == 0 {
                    (f[14], f[16], f[23]) = (0x45, 0, protocol);
                    if own_ip { f[26..30].copy_from_slice(&ip(11)) }
                }
                if kind == 2 {
                    (f[14], f[18], f[20]) = (0x60, 0, protocol);
                    if own_ip { f[22..38].copy_from_slice(&ip6(11).octets()) }
                }
            }
            a.guest.send(&f);
        }
        let end = a.udp(&b, b"the end");
        a.guest.send(&end);
        loop {
            let f = b.guest.receive().expect("the end").1;
            if f == end { break }
            let own = match f[12..14] {
                [8, 0] => f[26..30] == ip(11),
                [0x86, 0xdd] => f[22..38] == ip6(11).octets(),
                _ => false,
            };
            prop_assert!(own && f[6..12] == a.guest.mac && f[..6] == b.guest.mac, "{f:?}");
        }
    }
}
