//! DHCP for IPv6 (RFC 8415): an interface is told the addresses that the control plane gave it, and no others.
//!
//! As for IPv4 there are no leases to keep, and the same question always has the same answer. Prefixes are not delegated.

use std::net::Ipv6Addr;

use super::{Buffer, Writer};
use crate::drops::DropReason;
use crate::frame::checksum::Sum;
use crate::frame::packet::{TYPE_IPV6, UDP};
use crate::mac::MacAddr;
use crate::subnet::{Interface, Subnet};

/// When a guest asks again, and for how long its addresses are good without that, in seconds.
const RENEW: u32 = 1800;
const REBIND: u32 = 2880;
const LIFETIME: u32 = 3600;

const SERVER_PORT: u16 = 547;
const CLIENT_PORT: u16 = 546;
/// All servers on the link.
pub const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// Longest identifier of a client (section 11.1).
const DUID_MAX: usize = 130;
/// Bindings that are answered; clients ask for one of addresses and one of prefixes.
const BINDINGS_MAX: usize = 4;
/// Addresses in a client's binding that are looked at.
const OLD_MAX: usize = 8;

/// Types of messages (section 7.3).
mod kind {
    pub(super) const SOLICIT: u8 = 1;
    pub(super) const ADVERTISE: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const CONFIRM: u8 = 4;
    pub(super) const RENEW: u8 = 5;
    pub(super) const REBIND: u8 = 6;
    pub(super) const REPLY: u8 = 7;
    pub(super) const RELEASE: u8 = 8;
    pub(super) const DECLINE: u8 = 9;
    pub(super) const INFORMATION: u8 = 11;
}

/// Codes of options (section 21).
mod code {
    pub(super) const CLIENT: u16 = 1;
    pub(super) const SERVER: u16 = 2;
    pub(super) const ADDRESSES: u16 = 3;
    pub(super) const TEMPORARY: u16 = 4;
    pub(super) const ADDRESS: u16 = 5;
    pub(super) const STATUS: u16 = 13;
    pub(super) const RAPID_COMMIT: u16 = 14;
    pub(super) const PREFIXES: u16 = 25;
}

/// What an answer says of a binding, or of all (section 21.13).
mod status {
    pub(super) const SUCCESS: u16 = 0;
    pub(super) const NO_ADDRESSES: u16 = 2;
    pub(super) const NOT_ON_LINK: u16 = 4;
    pub(super) const NO_PREFIXES: u16 = 6;
}

/// Options, one after the other. One that is cut off ends them with an error.
struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = Result<(u16, &'a [u8]), DropReason>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let option = self.0.split_first_chunk::<4>().and_then(|([a, b, c, d], rest)| {
            let (data, rest) = rest.split_at_checked(u16::from_be_bytes([*c, *d]).into())?;
            self.0 = rest;
            Some((u16::from_be_bytes([*a, *b]), data))
        });
        if option.is_none() {
            self.0 = &[];
        }
        Some(option.ok_or(DropReason::Malformed))
    }
}

/// What a client wants addresses or prefixes for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Binding<'a> {
    code: u16,
    id: [u8; 4],
    options: &'a [u8],
}

impl<'a> Binding<'a> {
    fn parse(code: u16, data: &'a [u8]) -> Result<Self, DropReason> {
        let (id, rest) = data.split_first_chunk().ok_or(DropReason::Malformed)?;
        // Two times, but for temporary addresses.
        let times = if code == code::TEMPORARY { 0 } else { 8 };
        Ok(Self { code, id: *id, options: rest.get(times..).ok_or(DropReason::Malformed)? })
    }

    /// The addresses in it.
    fn addresses(self) -> impl Iterator<Item = Result<Ipv6Addr, DropReason>> + 'a {
        Options(self.options)
            .filter(|o| !matches!(o, Ok((code, _)) if *code != code::ADDRESS))
            .map(|o| match o?.1.first_chunk::<16>() {
                Some(bytes) => Ok(Ipv6Addr::from(*bytes)),
                None => Err(DropReason::Malformed),
            })
            .take(OLD_MAX)
    }
}

/// What a client asks, as far as the answer depends on it.
#[derive(Debug, Default)]
struct Request<'a> {
    kind: u8,
    transaction: [u8; 3],
    client: Option<&'a [u8]>,
    server: Option<&'a [u8]>,
    rapid_commit: bool,
    bindings: [Option<Binding<'a>>; BINDINGS_MAX],
}

fn parse(message: &[u8]) -> Result<Request<'_>, DropReason> {
    let ([kind, transaction @ ..], options) =
        message.split_first_chunk::<4>().ok_or(DropReason::Malformed)?;
    let mut request = Request { kind: *kind, transaction: *transaction, ..Default::default() };
    // What relay agents send looks different, and there are none here.
    if !(kind::SOLICIT..=kind::INFORMATION).contains(kind) {
        return Ok(request);
    }
    let mut bindings = request.bindings.iter_mut();
    for option in Options(options) {
        let (code, data) = option?;
        match code {
            code::CLIENT if data.is_empty() || data.len() > DUID_MAX => return Err(DropReason::Malformed),
            code::CLIENT => request.client = Some(data),
            code::SERVER => request.server = Some(data),
            code::RAPID_COMMIT => request.rapid_commit = true,
            code::ADDRESSES | code::TEMPORARY | code::PREFIXES => {
                let binding = Binding::parse(code, data)?;
                if let Some(to) = bindings.next() {
                    *to = Some(binding);
                }
            }
            _ => {}
        }
    }
    Ok(request)
}

/// Its identifier is made of the gateway's MAC address (section 11.4): the same in every card process.
fn server_id(mac: MacAddr) -> [u8; 10] {
    let [a, b, c, d, e, f] = mac.0;
    [0, 3, 0, 1, a, b, c, d, e, f]
}

/// The answer's type; `None`: silence (section 16).
fn decide(request: &Request<'_>, server: &[u8]) -> Option<u8> {
    let to_us = request.server == Some(server);
    let to_all = request.server.is_none();
    let known = request.client.is_some();
    match request.kind {
        kind::SOLICIT if known && to_all => {
            Some(if request.rapid_commit { kind::REPLY } else { kind::ADVERTISE })
        }
        kind::REQUEST | kind::RENEW | kind::RELEASE | kind::DECLINE if known && to_us => Some(kind::REPLY),
        kind::CONFIRM | kind::REBIND if known && to_all => Some(kind::REPLY),
        kind::INFORMATION if to_us || to_all => Some(kind::REPLY),
        _ => None,
    }
}

/// Answers `message`, which `client` has sent to the servers from this address; the answer's length, or nothing to be said.
///
/// # Errors
/// No DHCPv6 message.
pub fn reply(
    message: &[u8],
    from: Ipv6Addr,
    client: &Interface,
    subnet: &Subnet,
    buffer: &mut Buffer,
) -> Result<Option<usize>, DropReason> {
    let request = parse(message)?;
    let server = server_id(subnet.gateway_mac);
    let Some(kind) = decide(&request, &server) else { return Ok(None) };

    let mut w = Writer::new(buffer);
    w.ethernet(client.mac, subnet.gateway_mac, TYPE_IPV6);
    let ip = w.len;
    w.put(&[0x60, 0, 0, 0, 0, 0, UDP, 64]);
    let addresses = w.len;
    w.put(&subnet.link_local().octets()).put(&from.octets());
    let udp = w.len;
    w.put(&SERVER_PORT.to_be_bytes()).put(&CLIENT_PORT.to_be_bytes()).put(&[0; 4]);
    w.put(&[kind]).put(&request.transaction);
    if let Some(id) = request.client {
        option(&mut w, code::CLIENT, |w| {
            w.put(id);
        });
    }
    option(&mut w, code::SERVER, |w| {
        w.put(&server);
    });
    match request.kind {
        kind::SOLICIT | kind::REQUEST | kind::RENEW | kind::REBIND => {
            if request.kind == kind::SOLICIT && request.rapid_commit {
                option(&mut w, code::RAPID_COMMIT, |_| {});
            }
            bindings(&request, client, &mut w)?;
        }
        kind::CONFIRM => match confirm(&request, client)? {
            Some(code) => say(&mut w, code),
            None => return Ok(None),
        },
        kind::RELEASE | kind::DECLINE => say(&mut w, status::SUCCESS),
        // To INFORMATION-REQUEST: there is nothing but addresses to be told.
        _ => {}
    }

    // What does not fit ends as no answer, in `finish`.
    let length = (w.len - udp) as u16;
    w.patch(ip + 4, length);
    w.patch(udp + 4, length);
    let mut sum = Sum::new();
    sum.add_u16(length);
    sum.add_u16(UDP.into());
    // It may have an odd length, so it comes last.
    sum.add(w.written(addresses));
    w.patch(
        udp + 6,
        match sum.finish() {
            // 0 would say that there is none (RFC 8200 section 8.1).
            0 => 0xffff,
            c => c,
        },
    );
    Ok(w.finish())
}

/// Writes an option around what `data` writes.
fn option(w: &mut Writer<'_>, code: u16, data: impl FnOnce(&mut Writer<'_>)) {
    w.put(&code.to_be_bytes());
    let length = w.len;
    w.put(&[0; 2]);
    data(w);
    w.patch(length, (w.len - length - 2) as u16);
}

fn say(w: &mut Writer<'_>, status: u16) {
    option(w, code::STATUS, |w| {
        w.put(&status.to_be_bytes());
    });
}

/// Answers each binding: the first for addresses gets all of the interface's, the others nothing.
fn bindings(request: &Request<'_>, client: &Interface, w: &mut Writer<'_>) -> Result<(), DropReason> {
    let has_some = matches!(request.kind, kind::RENEW | kind::REBIND);
    let mut given = client.ipv6.is_empty();
    for binding in request.bindings.iter().flatten() {
        let mut old = [None; OLD_MAX];
        for (to, address) in old.iter_mut().zip(binding.addresses()) {
            *to = Some(address?);
        }
        let give = binding.code == code::ADDRESSES && !given;
        given |= give;
        option(w, binding.code, |w| {
            w.put(&binding.id);
            if binding.code != code::TEMPORARY {
                let times = if give { [RENEW, REBIND] } else { [0; 2] };
                for seconds in times {
                    w.put(&seconds.to_be_bytes());
                }
            }
            if !give {
                let prefixes = binding.code == code::PREFIXES;
                return say(w, if prefixes { status::NO_PREFIXES } else { status::NO_ADDRESSES });
            }
            for own in &client.ipv6 {
                address(w, *own, LIFETIME);
            }
            // What it has from elsewhere it is to use no more (section 18.3.4).
            for old in old.into_iter().flatten().filter(|a| has_some && !client.ipv6.contains(a)) {
                address(w, old, 0);
            }
        });
    }
    Ok(())
}

fn address(w: &mut Writer<'_>, address: Ipv6Addr, seconds: u32) {
    option(w, code::ADDRESS, |w| {
        w.put(&address.octets()).put(&seconds.to_be_bytes()).put(&seconds.to_be_bytes());
    });
}

/// Whether all addresses that a client still has from before are its own; `None`: it has none (section 18.3.3).
fn confirm(request: &Request<'_>, client: &Interface) -> Result<Option<u16>, DropReason> {
    let mut answer = None;
    for binding in request.bindings.iter().flatten() {
        for address in binding.addresses() {
            let own = client.ipv6.contains(&address?);
            let all = own && answer != Some(status::NOT_ON_LINK);
            answer = Some(if all { status::SUCCESS } else { status::NOT_ON_LINK });
        }
    }
    Ok(answer)
}

#[cfg(test)]
#[path = "dhcp6_tests.rs"]
mod tests;
