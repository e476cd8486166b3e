//! What a network with a prefix does with a frame: forwards it, answers it, or drops it.
//!
//! A guest speaks as itself: its own MAC address, its own IP addresses, ARP and neighbour discovery about itself, and
//! never as a DHCP server or a router. What it asks of everybody the card answers from what the control plane said, so
//! no frame needs to go to everybody, and none does. Everything is decided on the copied head of the frame.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::answer::dhcp6;
use crate::drops::DropReason;
use crate::frame::packet::{self, Arp, ICMPV6, Packet, Ports, Unclear, V4, V6};
use crate::frame::{Bytes, ETH_HEADER, Frame};
use crate::mac::MacAddr;
use crate::metadata;
use crate::subnet::{Interface, Neighbours, Subnet};

const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const DHCPV6_SERVER: u16 = 547;
const DHCPV6_CLIENT: u16 = 546;

/// ICMPv6 types (RFC 4861 section 4).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// Multicast listener reports and queries: the one other thing that may come from no address (RFC 3590).
const LISTENER: [u8; 4] = [130, 131, 132, 143];

/// What the card answers itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// Who has this IPv4 address? The packet is a request.
    Arp(Arp),
    /// Who has this IPv6 address?
    Neighbour {
        /// Who asks; unspecified: it wants to take the address.
        from: Ipv6Addr,
        /// Whose link-layer address it wants.
        target: Ipv6Addr,
    },
    /// A DHCP message to the server: these bytes of the frame.
    Dhcp(Bytes),
    /// Is there a router? Asked by this address, or none.
    Router(Ipv6Addr),
    /// A DHCPv6 message to the servers.
    Dhcp6 {
        /// Who asks.
        from: Ipv6Addr,
        /// These bytes of the frame.
        message: Bytes,
    },
    /// A packet to the metadata service: these bytes of the frame.
    Metadata(Bytes),
}

/// What to do with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes to whoever has its destination, which is a unicast address.
    Forward,
    /// The card answers.
    Answer(Question),
}

/// Judges a frame from `interface`.
///
/// # Errors
/// Why it goes nowhere.
pub fn from_device(subnet: &Subnet, interface: &Interface, frame: &Frame<'_>) -> Result<Verdict, DropReason> {
    if frame.source() != Some(interface.mac) {
        return Err(DropReason::SpoofedMac);
    }
    let verdict = match packet::parse(frame.head, frame.bytes()).map_err(unclear)? {
        Packet::V4(p) => v4_from_device(subnet, interface, &p)?,
        Packet::V6(_) if subnet.ipv6.is_none() => return Err(DropReason::Protocol),
        Packet::V6(p) => v6_from_device(interface, frame.head, &p)?,
        Packet::Arp(p) => arp_from_device(interface, p)?,
    };
    contained(frame, verdict)
}

/// Judges a frame from the host, which may say what it likes, but not to everybody.
///
/// # Errors
/// Why it goes nowhere.
pub fn from_uplink(subnet: &Subnet, frame: &Frame<'_>) -> Result<Verdict, DropReason> {
    let verdict = match packet::parse(frame.head, frame.bytes()).map_err(unclear)? {
        Packet::V4(_) => Verdict::Forward,
        Packet::V6(_) if subnet.ipv6.is_none() => return Err(DropReason::Protocol),
        Packet::V6(p) => match icmpv6_type(frame.head, &p) {
            Some(NEIGHBOUR_SOLICITATION) => solicitation(frame.head, &p)?,
            _ => Verdict::Forward,
        },
        Packet::Arp(p) if p.operation == 1 => Verdict::Answer(Question::Arp(p)),
        Packet::Arp(_) => return Err(DropReason::Multicast),
    };
    contained(frame, verdict)
}

/// Judges a frame from an uplink behind which there are others: they may be whoever they like, but not those who are here, the
/// metadata service among them, and neither servers nor routers of ours.
///
/// # Errors
/// Why it goes nowhere.
pub fn from_outside(
    subnet: &Subnet,
    neighbours: &Neighbours,
    frame: &Frame<'_>,
) -> Result<Verdict, DropReason> {
    let ours = |address: IpAddr| neighbours.get(address).is_some() || metadata::is_service(address);
    let verdict = match packet::parse(frame.head, frame.bytes()).map_err(unclear)? {
        Packet::V4(p) if ours(p.source.into()) => return Err(DropReason::SpoofedAddress),
        Packet::V4(V4 { udp: Some(Ports { source: DHCP_SERVER, destination: DHCP_CLIENT }), .. }) => {
            return Err(DropReason::Server);
        }
        Packet::V4(_) => Verdict::Forward,
        Packet::V6(_) if subnet.ipv6.is_none() => return Err(DropReason::Protocol),
        Packet::V6(p) if ours(p.source.into()) => return Err(DropReason::SpoofedAddress),
        Packet::V6(V6 { udp: Some(Ports { source: DHCPV6_SERVER, destination: DHCPV6_CLIENT }), .. }) => {
            return Err(DropReason::Server);
        }
        Packet::V6(p) => match icmpv6_type(frame.head, &p) {
            Some(NEIGHBOUR_SOLICITATION) => solicitation(frame.head, &p)?,
            Some(ROUTER_ADVERTISEMENT | REDIRECT) => return Err(DropReason::Server),
            Some(NEIGHBOUR_ADVERTISEMENT) => {
                let target = target(frame.head, &p).ok_or(DropReason::Malformed)?;
                if ours(target.into()) {
                    return Err(DropReason::SpoofedNeighbour);
                }
                Verdict::Forward
            }
            _ => Verdict::Forward,
        },
        Packet::Arp(p) if ours(p.sender.into()) => return Err(DropReason::SpoofedNeighbour),
        Packet::Arp(p) if p.operation == 1 => Verdict::Answer(Question::Arp(p)),
        // What a device has asked for.
        Packet::Arp(p) if p.operation == 2 && Some(p.sender_mac) == frame.source() => Verdict::Forward,
        Packet::Arp(p) if p.operation == 2 => return Err(DropReason::SpoofedNeighbour),
        Packet::Arp(_) => return Err(DropReason::Protocol),
    };
    contained(frame, verdict)
}

fn unclear(why: Unclear) -> DropReason {
    match why {
        Unclear::Protocol => DropReason::Protocol,
        Unclear::Malformed => DropReason::Malformed,
    }
}

/// What is not answered goes to one receiver, or nowhere.
fn contained(frame: &Frame<'_>, verdict: Verdict) -> Result<Verdict, DropReason> {
    match verdict {
        Verdict::Forward if frame.destination().is_none_or(MacAddr::is_group) => Err(DropReason::Multicast),
        verdict => Ok(verdict),
    }
}

fn v4_from_device(subnet: &Subnet, interface: &Interface, p: &V4) -> Result<Verdict, DropReason> {
    let own = interface.ipv4.contains(&p.source);
    match p.udp {
        Some(Ports { source: DHCP_SERVER, destination: DHCP_CLIENT }) => return Err(DropReason::Server),
        Some(Ports { source: DHCP_CLIENT, destination: DHCP_SERVER }) => {
            if !own && !p.source.is_unspecified() {
                return Err(DropReason::SpoofedAddress);
            }
            let to_server = p.destination.is_broadcast() || p.destination == subnet.gateway;
            if to_server && !p.fragment {
                // The UDP header is there: the ports were.
                let start = p.l4 + 8;
                return Ok(Verdict::Answer(Question::Dhcp(Bytes { start, len: p.end - start })));
            }
            // A relay agent's business, or a server elsewhere: as any other packet, which has an address.
        }
        _ => {}
    }
    match own {
        true if p.destination == metadata::ADDRESS_V4 => Ok(to_metadata(p.end)),
        true => Ok(Verdict::Forward),
        false => Err(DropReason::SpoofedAddress),
    }
}

/// Whoever the frame is addressed to: nobody but the card is at the service's addresses, in no network and behind none.
fn to_metadata(end: usize) -> Verdict {
    Verdict::Answer(Question::Metadata(Bytes { start: ETH_HEADER, len: end - ETH_HEADER }))
}

fn arp_from_device(interface: &Interface, p: Arp) -> Result<Verdict, DropReason> {
    // A probe (RFC 5227) has no sender's address yet.
    let own = interface.ipv4.contains(&p.sender) || p.operation == 1 && p.sender == Ipv4Addr::UNSPECIFIED;
    if p.sender_mac != interface.mac || !own {
        return Err(DropReason::SpoofedNeighbour);
    }
    match p.operation {
        1 => Ok(Verdict::Answer(Question::Arp(p))),
        // Nobody but the card has asked.
        _ => Err(DropReason::Multicast),
    }
}

fn v6_from_device(interface: &Interface, head: &[u8], p: &V6) -> Result<Verdict, DropReason> {
    if matches!(p.udp, Some(Ports { source: DHCPV6_SERVER, destination: DHCPV6_CLIENT })) {
        return Err(DropReason::Server);
    }
    let kind = icmpv6_type(head, p);
    let unspecified = p.source.is_unspecified();
    let own = interface.ipv6.contains(&p.source) || p.source == interface.link_local();
    let addressless = kind
        .is_some_and(|k| matches!(k, ROUTER_SOLICITATION | NEIGHBOUR_SOLICITATION) || LISTENER.contains(&k));
    if !(own || unspecified && addressless) {
        return Err(DropReason::SpoofedAddress);
    }
    match kind {
        Some(NEIGHBOUR_SOLICITATION) => solicitation(head, p),
        // Forwarded by nobody, and no fragment (RFC 6980).
        Some(ROUTER_SOLICITATION) if p.hop_limit != 255 || p.fragment => Err(DropReason::Malformed),
        Some(ROUTER_SOLICITATION) => Ok(Verdict::Answer(Question::Router(p.source))),
        Some(ROUTER_ADVERTISEMENT | REDIRECT) => Err(DropReason::Server),
        Some(NEIGHBOUR_ADVERTISEMENT) => {
            let target = target(head, p).ok_or(DropReason::Malformed)?;
            let own = interface.ipv6.contains(&target) || target == interface.link_local();
            // Nobody but the card has asked.
            Err(if own { DropReason::Multicast } else { DropReason::SpoofedNeighbour })
        }
        // Only to groups: RFC 3810.
        _ if unspecified => Err(DropReason::Multicast),
        _ if is_dhcp6(p) => {
            // The UDP header is there: the ports were.
            let start = p.l4 + 8;
            let message = Bytes { start, len: p.end - start };
            Ok(Verdict::Answer(Question::Dhcp6 { from: p.source, message }))
        }
        _ if p.destination == metadata::ADDRESS_V6 => Ok(to_metadata(p.end)),
        _ => Ok(Verdict::Forward),
    }
}

/// To all servers. To one of them nobody is told to send.
fn is_dhcp6(p: &V6) -> bool {
    let ports = Ports { source: DHCPV6_CLIENT, destination: DHCPV6_SERVER };
    p.udp == Some(ports) && p.destination == dhcp6::SERVERS && !p.fragment
}

fn icmpv6_type(head: &[u8], p: &V6) -> Option<u8> {
    if p.protocol == Some(ICMPV6) { head.get(p.l4).copied() } else { None }
}

/// The target of a neighbour solicitation or advertisement, which is no fragment (RFC 6980).
fn target(head: &[u8], p: &V6) -> Option<Ipv6Addr> {
    let whole = p.hop_limit == 255 && !p.fragment && p.l4 + 24 <= p.end;
    let bytes: [u8; 16] = head.get(p.l4 + 8..)?.first_chunk().copied()?;
    whole.then(|| bytes.into())
}

fn solicitation(head: &[u8], p: &V6) -> Result<Verdict, DropReason> {
    let target = target(head, p).ok_or(DropReason::Malformed)?;
    Ok(Verdict::Answer(Question::Neighbour { from: p.source, target }))
}
