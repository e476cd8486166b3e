//! What a guest is told about itself: EC2's instance metadata service, version 2, answered inside the card.
//!
//! ```text
//!   guest ──TCP to 169.254.169.254 or fd00:ec2::254, port 80──► guard ──► Endpoints ──► Endpoint (one per device)
//!                                                                          allowance │ tokens │ Engine: smoltcp
//!                                                                                             └► http ──► tree
//! ```
//!
//! - [`http`]: requests and answers; [`tree`]: what is at which path;
//! - [`token`]: the tokens that a device's guest holds;
//! - [`endpoint`]: the TCP connections of one device; [`Endpoints`] those of a network.
//!
//! All of it runs on the network's thread, on memory that is bounded per device and there only while it is used: a device
//! whose guest never asks costs nothing. Every packet goes out with a hop limit of 1, so that a guest which forwards for
//! others (containers, a VPN) does not hand its identity on by accident.

pub mod endpoint;
pub mod http;
pub mod token;
pub mod tree;
mod wire;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use crate::drops::DropReason;
use crate::mac::MacAddr;
use crate::subnet::{Interface, Subnet};
use endpoint::Endpoint;
pub use wire::Frames;

/// Where the service is, for IPv4.
pub const ADDRESS_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Where it is, for IPv6.
pub const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// It is one of the service's addresses.
pub fn is_service(address: IpAddr) -> bool {
    address == IpAddr::V4(ADDRESS_V4) || address == IpAddr::V6(ADDRESS_V6)
}

/// Those devices of a network whose guests have asked lately.
#[derive(Debug, Default)]
pub struct Endpoints {
    by_mac: BTreeMap<MacAddr, Endpoint>,
    /// When the first of them wants to be looked at, or earlier.
    next: Option<Instant>,
}

impl Endpoints {
    /// Takes an IP packet that a device's guest has sent to the service. What it is answered is in [`Self::frames`].
    ///
    /// # Errors
    /// The device has no metadata, or has sent too many packets.
    pub fn receive(
        &mut self,
        interface: &Interface,
        subnet: &Subnet,
        packet: &[u8],
        now: Instant,
    ) -> Result<(), DropReason> {
        let Some(metadata) = &interface.metadata else { return Err(DropReason::NoDestination) };
        let endpoint = self
            .by_mac
            .entry(interface.mac)
            .or_insert_with(|| Endpoint::new(interface.clone(), metadata.clone(), now));
        endpoint.receive(subnet, packet, now)?;
        let due = endpoint.due();
        self.next = Some(self.next.map_or(due, |next| next.min(due)));
        Ok(())
    }

    /// When [`Self::tend`] is to be called again; `None`: when there has been a packet.
    pub fn next(&self) -> Option<Instant> {
        self.next
    }

    /// Does what is due: retransmits, ends connections that take too long, and lets go of what is not used. Calls `send`
    /// for each device that has [`Self::frames`].
    pub fn tend(&mut self, subnet: &Subnet, now: Instant, mut send: impl FnMut(MacAddr, &mut Frames)) {
        self.by_mac.retain(|mac, endpoint| {
            if endpoint.due() > now {
                return true;
            }
            let goes_on = endpoint.tend(subnet, now);
            if let Some(frames) = endpoint.frames() {
                send(*mac, frames);
            }
            goes_on
        });
        self.next = self.by_mac.values().map(Endpoint::due).min();
    }

    /// What is to be sent to a device's guest.
    pub fn frames(&mut self, mac: MacAddr) -> Option<&mut Frames> {
        self.by_mac.get_mut(&mac)?.frames()
    }

    /// Forgets a device.
    pub fn remove(&mut self, mac: MacAddr) {
        self.by_mac.remove(&mac);
    }
}
