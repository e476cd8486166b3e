//! Why a network does not take a frame from a device, or does not give it one, counted per device.

use offload_card::ring::Counter;
use proto::v1::NetDrops;

/// Why a frame goes nowhere. In the order of [`NetDrops`], where each is explained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// Not the frame it claims to be.
    Malformed,
    /// Another's MAC address as source.
    SpoofedMac,
    /// Another's IP address as source.
    SpoofedAddress,
    /// ARP, neighbour discovery or DHCP in another's name.
    SpoofedNeighbour,
    /// What only a DHCP server or a router sends.
    Server,
    /// A protocol that the network does not carry.
    Protocol,
    /// Broadcast and multicast that is contained; addresses that no bridge forwards.
    Multicast,
    /// Nobody has this address.
    NoDestination,
    /// The host does not take it.
    Uplink,
    /// The sender's security groups do not allow it.
    DeniedOut,
    /// The receiver's do not; counted by the receiver.
    DeniedIn,
    /// There is no room for one more connection, of the sender's or the receiver's.
    ConntrackAllowanceExceeded,
    /// A part of a packet of which the first part has not passed.
    Fragment,
    /// More packets to the metadata service than it takes from a device.
    LinkLocalAllowance,
}

const REASONS: usize = DropReason::LinkLocalAllowance as usize + 1;

impl DropReason {
    /// A correct driver in a correct guest does not send such a frame.
    pub fn is_senders_fault(self) -> bool {
        (self as usize) <= Self::Server as usize
    }
}

/// A device's dropped frames by reason: written by the network's thread, read by anybody.
#[derive(Debug, Default)]
pub struct Drops([Counter; REASONS]);

impl Drops {
    /// One more. Only the network's thread may.
    pub fn add(&self, reason: DropReason) {
        self.counter(reason).add(1);
    }

    #[cfg_attr(not(test), expect(clippy::indexing_slicing, reason = "there are as many as reasons"))]
    fn counter(&self, reason: DropReason) -> &Counter {
        &self.0[reason as usize]
    }

    /// Frames dropped for this reason.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.counter(reason).get()
    }

    /// All of them.
    pub fn message(&self) -> NetDrops {
        NetDrops {
            malformed: self.get(DropReason::Malformed),
            spoofed_mac: self.get(DropReason::SpoofedMac),
            spoofed_address: self.get(DropReason::SpoofedAddress),
            spoofed_neighbour: self.get(DropReason::SpoofedNeighbour),
            server: self.get(DropReason::Server),
            protocol: self.get(DropReason::Protocol),
            multicast: self.get(DropReason::Multicast),
            no_destination: self.get(DropReason::NoDestination),
            uplink: self.get(DropReason::Uplink),
            denied_out: self.get(DropReason::DeniedOut),
            denied_in: self.get(DropReason::DeniedIn),
            conntrack_allowance_exceeded: self.get(DropReason::ConntrackAllowanceExceeded),
            fragment: self.get(DropReason::Fragment),
            linklocal_allowance_exceeded: self.get(DropReason::LinkLocalAllowance),
        }
    }
}
