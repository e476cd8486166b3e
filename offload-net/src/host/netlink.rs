//! The three things we tell the kernel about a TAP: up, its MTU, its addresses.
//!
//! That is two rtnetlink requests (RTM_NEWLINK, RTM_NEWADDR: rtnetlink(7)), so they are written out here instead of
//! bringing in a netlink library and its executor.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::str::FromStr;

use nix::sys::socket::{self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::mac::MacAddr;

/// An address with the length of its network's prefix, e.g. `10.88.0.1/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// The host's address.
    pub address: IpAddr,
    /// Bits of the network.
    pub len: u8,
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let (address, len) =
            s.split_once('/').ok_or_else(|| format!("{s:?} has no prefix length, e.g. \"10.88.0.1/24\""))?;
        let address: IpAddr = address.parse().map_err(|_| format!("{address:?} is no IP address"))?;
        let max = if address.is_ipv4() { 32 } else { 128 };
        match len.parse() {
            Ok(len) if len <= max && len > 0 => Ok(Self { address, len }),
            _ => Err(format!("prefix length {len:?} is not a number from 1 to {max}")),
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.len)
    }
}

/// Sets an interface up with this MTU, in this link group, and with this MAC address if one is given.
///
/// # Errors
/// The kernel's answer, or no answer within a second.
pub fn set_up(index: u32, mtu: u32, group: u32, mac: Option<MacAddr>) -> io::Result<()> {
    const IFLA_MTU: u16 = libc::IFLA_MTU;
    let up = libc::IFF_UP as u32;
    let mut m = Message::new(libc::RTM_NEWLINK, 0);
    // struct ifinfomsg: family, padding, type, index, flags, change mask.
    m.put(&[0, 0, 0, 0]).put(&index.to_ne_bytes()).put(&up.to_ne_bytes()).put(&up.to_ne_bytes());
    m.attribute(IFLA_MTU, &mtu.to_ne_bytes());
    m.attribute(libc::IFLA_GROUP, &group.to_ne_bytes());
    if let Some(mac) = mac {
        m.attribute(libc::IFLA_ADDRESS, &mac.0);
    }
    m.send()
}

/// Gives an interface an address; that it has it already is fine.
///
/// # Errors
/// As [`set_up`].
pub fn add_address(index: u32, prefix: Prefix) -> io::Result<()> {
    let (family, address) = match prefix.address {
        IpAddr::V4(a) => (libc::AF_INET, a.octets().to_vec()),
        IpAddr::V6(a) => (libc::AF_INET6, a.octets().to_vec()),
    };
    let mut m = Message::new(libc::RTM_NEWADDR, (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16);
    // struct ifaddrmsg: family, prefix length, flags, scope, index. Nobody else can have an address on a link we have
    // just made, so IPv6 need not wait for duplicate address detection.
    let flags = if family == libc::AF_INET6 { libc::IFA_F_NODAD as u8 } else { 0 };
    m.put(&[family as u8, prefix.len, flags, 0]).put(&index.to_ne_bytes());
    m.attribute(libc::IFA_LOCAL, &address);
    m.attribute(libc::IFA_ADDRESS, &address);
    if let Some(broadcast) = broadcast(prefix) {
        m.attribute(libc::IFA_BROADCAST, &broadcast.octets());
    }
    m.send()
}

/// The broadcast address of an IPv4 network that has one.
fn broadcast(prefix: Prefix) -> Option<Ipv4Addr> {
    match prefix.address {
        IpAddr::V4(a) if prefix.len < 31 => Some(Ipv4Addr::from_bits(a.to_bits() | u32::MAX >> prefix.len)),
        _ => None,
    }
}

/// A netlink request being written: header (nlmsghdr) and body.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let flags = flags | (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let mut m = Self(Vec::with_capacity(128));
        // Length (set when sent), type, flags, sequence number, port.
        m.put(&[0; 4])
            .put(&kind.to_ne_bytes())
            .put(&flags.to_ne_bytes())
            .put(&1_u32.to_ne_bytes())
            .put(&[0; 4]);
        m
    }

    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }

    /// struct rtattr, padded to 4 bytes.
    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.put(&(4 + value.len() as u16).to_ne_bytes()).put(&kind.to_ne_bytes()).put(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// Sends the request and waits for the acknowledgement.
    fn send(mut self) -> io::Result<()> {
        let len = self.0.len() as u32;
        self.0.iter_mut().zip(len.to_ne_bytes()).for_each(|(to, byte)| *to = byte);
        let socket = route_socket()?;
        socket::sendto(socket.as_raw_fd(), &self.0, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut answer = [0; 1024];
        let n = socket::recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        acknowledged(answer.get(..n).unwrap_or_default())
    }
}

fn route_socket() -> io::Result<OwnedFd> {
    let socket = socket::socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    socket::setsockopt(&socket, socket::sockopt::ReceiveTimeout, &TimeVal::seconds(1))?;
    Ok(socket)
}

/// An acknowledgement is an NLMSG_ERROR message with error 0.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "unexpected answer from rtnetlink");
    let kind = answer.get(4..6).and_then(<[u8]>::first_chunk).ok_or_else(bad)?;
    let error = answer.get(16..20).and_then(<[u8]>::first_chunk).ok_or_else(bad)?;
    if i32::from(u16::from_ne_bytes(*kind)) != libc::NLMSG_ERROR {
        return Err(bad());
    }
    match i32::from_ne_bytes(*error) {
        0 => Ok(()),
        e => Err(io::Error::from_raw_os_error(e.saturating_neg())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes() {
        let p: Prefix = "10.88.0.1/24".parse().unwrap();
        assert_eq!(p.to_string(), "10.88.0.1/24");
        assert_eq!(broadcast(p), Some(Ipv4Addr::new(10, 88, 0, 255)));
        assert_eq!(broadcast("10.0.0.0/31".parse().unwrap()), None);
        assert!("fd00::1/64".parse::<Prefix>().is_ok());
        for bad in
            ["10.88.0.1", "10.88.0.1/33", "10.88.0/24", "fd00::1/129", "10.0.0.1/0", "/8", "1.2.3.4/-1"]
        {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn answers() {
        assert!(acknowledged(&[]).is_err());
        let mut m = [0_u8; 36];
        m[4..6].copy_from_slice(&2_u16.to_ne_bytes());
        assert!(acknowledged(&m).is_ok());
        m[16..20].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(acknowledged(&m).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
}
