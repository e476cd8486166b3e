//! DHCP for IPv4 (RFC 2131): an interface is told the address that the control plane gave it, and no other.
//!
//! There are no leases to keep: the same question always has the same answer, whichever card process is asked.

use std::net::Ipv4Addr;

use smoltcp::wire::{
    ArpHardware as Hardware, DhcpFlags, DhcpMessageType as Kind, DhcpOpCode, DhcpOption, DhcpPacket,
    EthernetAddress,
};

use super::{Buffer, MAX, Writer};
use crate::drops::DropReason;
use crate::frame::checksum::Sum;
use crate::frame::packet::{TYPE_IPV4, UDP};
use crate::mac::MacAddr;
use crate::metadata;
use crate::subnet::{DNS_MAX, Interface, Subnet};

/// How long an address is given for. It is the interface's for good; this says how soon a guest hears of other options.
pub const LEASE_SECONDS: u32 = 3600;

const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
const MAGIC: u32 = 0x6382_5363;
/// Where the message begins in an answer.
const MESSAGE: usize = 14 + 20 + 8;
/// Longest client identifier that is sent back. Clients' are about 20 bytes long.
const CLIENT_ID_MAX: usize = 128;

/// Codes of options (RFC 2132).
mod code {
    pub(super) const MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const DNS: u8 = 6;
    pub(super) const HOST_NAME: u8 = 12;
    pub(super) const MTU: u8 = 26;
    pub(super) const REQUESTED: u8 = 50;
    pub(super) const LEASE: u8 = 51;
    pub(super) const KIND: u8 = 53;
    pub(super) const SERVER: u8 = 54;
    pub(super) const CLIENT_ID: u8 = 61;
    pub(super) const ROUTES: u8 = 121;
}

/// What a client asks, as far as the answer depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Request<'a> {
    kind: Kind,
    xid: u32,
    flags: DhcpFlags,
    /// The address that it has.
    has: Ipv4Addr,
    /// The address that it wants.
    wants: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    client_id: Option<&'a [u8]>,
}

/// Reads a message. `Ok(None)`: it is nothing that we answer.
fn parse<'a>(packet: &'a DhcpPacket<&'a [u8]>, from: MacAddr) -> Result<Option<Request<'a>>, DropReason> {
    packet.check_len().map_err(|_| DropReason::Malformed)?;
    let from_ethernet = packet.hardware_type() == Hardware::Ethernet && packet.hardware_len() == 6;
    if packet.opcode() != DhcpOpCode::Request || !from_ethernet || packet.magic_number() != MAGIC {
        return Err(DropReason::Malformed);
    }
    if packet.client_hardware_address().0 != from.0 || !packet.relay_agent_ip().is_unspecified() {
        return Err(DropReason::SpoofedNeighbour);
    }
    let mut request = Request {
        kind: Kind::Unknown(0),
        xid: packet.transaction_id(),
        flags: packet.flags(),
        has: packet.client_ip(),
        wants: None,
        server: None,
        client_id: None,
    };
    for DhcpOption { kind, data } in packet.options() {
        let address = || data.try_into().ok().map(|a: [u8; 4]| Ipv4Addr::from(a));
        match (kind, data) {
            (code::KIND, [k]) => request.kind = Kind::from(*k),
            (code::REQUESTED, _) => request.wants = address(),
            (code::SERVER, _) => request.server = address(),
            (code::CLIENT_ID, _) => request.client_id = Some(data),
            _ => {}
        }
    }
    Ok(matches!(request.kind, Kind::Discover | Kind::Request | Kind::Inform).then_some(request))
}

/// The answer's kind; `None`: silence.
fn decide(request: &Request<'_>, own: Ipv4Addr, server: Ipv4Addr) -> Option<Kind> {
    // It has chosen another server.
    if request.server.is_some_and(|s| s != server) {
        return None;
    }
    match request.kind {
        Kind::Discover => Some(Kind::Offer),
        Kind::Inform => (request.has == own).then_some(Kind::Ack),
        // Selecting and rebooting clients name the address as an option, renewing ones have it (section 4.3.2).
        Kind::Request => match request.wants.or(Some(request.has).filter(|a| !a.is_unspecified())) {
            Some(address) if address == own => Some(Kind::Ack),
            Some(_) => Some(Kind::Nak),
            None => None,
        },
        _ => None,
    }
}

/// Answers `message`, which `client` has sent to the server; the answer's length, or nothing to be said.
///
/// # Errors
/// No DHCP message, or one in another's name.
pub fn reply(
    message: &[u8],
    client: &Interface,
    subnet: &Subnet,
    buffer: &mut Buffer,
) -> Result<Option<usize>, DropReason> {
    let packet = DhcpPacket::new_unchecked(message);
    let Some(request) = parse(&packet, client.mac)? else { return Ok(None) };
    let Some(own) = client.ipv4.first().copied() else { return Ok(None) };
    let Some(kind) = decide(&request, own, subnet.gateway) else { return Ok(None) };
    let refused = kind == Kind::Nak;
    let informed = request.kind == Kind::Inform;

    let mut bytes = [0; MAX - MESSAGE];
    let mut message = DhcpPacket::new_unchecked(&mut bytes);
    message.set_opcode(DhcpOpCode::Reply);
    message.set_hardware_type(Hardware::Ethernet);
    message.set_hardware_len(6);
    message.set_transaction_id(request.xid);
    message.set_flags(request.flags);
    message.set_client_hardware_address(EthernetAddress(client.mac.0));
    message.set_magic_number(MAGIC);
    if !refused {
        message.set_client_ip(request.has);
        if !informed {
            message.set_your_ip(own);
        }
    }
    // All of this fits, whatever the client says: 20 bytes, 110 more unless refused, the identifier and the end.
    let mut options = message.options_mut();
    let mut put = |kind, data: &[u8]| options.emit(DhcpOption { kind, data });
    let mut all = || {
        put(code::KIND, &[kind.into()])?;
        put(code::SERVER, &subnet.gateway.octets())?;
        if !refused {
            if !informed {
                put(code::LEASE, &LEASE_SECONDS.to_be_bytes())?;
            }
            put(code::MASK, &subnet.ipv4.netmask().octets())?;
            if subnet.routed {
                put(code::ROUTER, &subnet.gateway.octets())?;
            }
            let mut servers = [0; 4 * DNS_MAX];
            for (to, server) in servers.chunks_exact_mut(4).zip(subnet.name_servers()) {
                to.copy_from_slice(&server.octets());
            }
            if let Some(servers @ [_, ..]) = servers.get(..4 * subnet.name_servers().len()) {
                put(code::DNS, servers)?;
            }
            // Where there is a gateway the service is behind it. Clients that know this option overlook the router's
            // (RFC 3442), so it is only there where that is absent.
            if client.metadata.is_some() && !subnet.routed {
                put(code::ROUTES, &to_metadata())?;
            }
            put(code::MTU, &subnet.mtu.to_be_bytes())?;
            if !client.hostname.is_empty() {
                put(code::HOST_NAME, client.hostname.as_bytes())?;
            }
        }
        // RFC 6842.
        match request.client_id {
            Some(id) if id.len() <= CLIENT_ID_MAX => put(code::CLIENT_ID, id),
            _ => Ok(()),
        }
    };
    let fits = all().and_then(|()| options.end());
    Ok(fits.ok().and_then(|()| datagram(subnet, client.mac, receiver(&request, kind, own), &bytes, buffer)))
}

/// The metadata service is on the link: a prefix of 32 bits, its address, and no gateway (RFC 3442).
fn to_metadata() -> [u8; 9] {
    let [a, b, c, d] = metadata::ADDRESS_V4.octets();
    [32, a, b, c, d, 0, 0, 0, 0]
}

/// To which IP address an answer goes (section 4.1). The frame goes to the client in any case: it has not its address yet,
/// but its MAC address it has.
fn receiver(request: &Request<'_>, kind: Kind, own: Ipv4Addr) -> Ipv4Addr {
    if kind == Kind::Nak || request.has.is_unspecified() && request.flags.contains(DhcpFlags::BROADCAST) {
        Ipv4Addr::BROADCAST
    } else {
        own
    }
}

fn datagram(
    subnet: &Subnet,
    mac: MacAddr,
    to: Ipv4Addr,
    message: &[u8],
    buffer: &mut Buffer,
) -> Option<usize> {
    let length = |headers: usize| ((headers + message.len()) as u16).to_be_bytes();
    let mut w = Writer::new(buffer);
    w.ethernet(if to.is_broadcast() { MacAddr::BROADCAST } else { mac }, subnet.gateway_mac, TYPE_IPV4);
    let ip = w.len;
    w.put(&[0x45, 0]).put(&length(28)).put(&[0, 0, 0x40, 0, 64, UDP, 0, 0]);
    let addresses = w.len;
    w.put(&subnet.gateway.octets()).put(&to.octets());
    let mut sum = Sum::new();
    sum.add(w.written(ip));
    w.patch(ip + 10, sum.finish());
    let udp = w.len;
    w.put(&SERVER_PORT.to_be_bytes())
        .put(&CLIENT_PORT.to_be_bytes())
        .put(&length(8))
        .put(&[0, 0])
        .put(message);
    let mut sum = Sum::new();
    sum.add(w.written(addresses));
    // The message has an even length.
    sum.add_u16(UDP.into());
    sum.add_u16((8 + message.len()) as u16);
    // 0 would say that there is none (RFC 768).
    w.patch(
        udp + 6,
        match sum.finish() {
            0 => 0xffff,
            c => c,
        },
    );
    w.finish()
}

#[cfg(test)]
#[path = "dhcp_tests.rs"]
mod tests;
