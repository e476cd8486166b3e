//! Where a frame goes.
//!
//! The control plane is the truth: every device has the MAC address of its specification and speaks as nobody else.
//! Nothing is learnt, so there is nothing for a guest to poison: an address that is not in the table is somewhere
//! behind the uplink.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::drops::DropReason;
use crate::frame::Frame;
use crate::mac::MacAddr;

/// A device in its network, as the network's thread numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub usize);

/// Where a frame came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ingress {
    /// From a device with this address.
    Port(PortId, MacAddr),
    /// From the host.
    Uplink,
}

/// Where it goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Egress {
    /// To one device.
    Port(PortId),
    /// To the host.
    Uplink,
    /// To every device except the sender, and to the host unless it came from there.
    All,
    /// Nowhere.
    Drop(DropReason),
}

/// MAC addresses are ours to give, so the hash need not resist an attacker: mix and be done.
#[derive(Default)]
struct MacHasher(u64);

impl Hasher for MacHasher {
    fn finish(&self) -> u64 {
        let h = self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h ^ h >> 32
    }

    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = self.0 << 8 | u64::from(*b);
        }
    }

    // Called with the array's length, which is always 6.
    fn write_usize(&mut self, _: usize) {}
}

/// The forwarding table of one network.
#[derive(Default)]
pub struct Switch {
    table: HashMap<MacAddr, PortId, BuildHasherDefault<MacHasher>>,
}

impl Switch {
    /// Plugs a device in. `false`: another device has this address, and keeps it.
    pub fn insert(&mut self, mac: MacAddr, port: PortId) -> bool {
        let vacant = !self.table.contains_key(&mac);
        if vacant {
            self.table.insert(mac, port);
        }
        vacant
    }

    /// Unplugs the device that has this address.
    pub fn remove(&mut self, mac: MacAddr) {
        self.table.remove(&mac);
    }

    /// The device that has this address.
    pub fn port(&self, mac: MacAddr) -> Option<PortId> {
        self.table.get(&mac).copied()
    }

    /// Decides.
    pub fn forward(&self, frame: &Frame<'_>, from: Ingress) -> Egress {
        let (Some(destination), Some(source)) = (frame.destination(), frame.source()) else {
            return Egress::Drop(DropReason::NoDestination);
        };
        if let Ingress::Port(_, own) = from
            && source != own
        {
            return Egress::Drop(DropReason::SpoofedMac);
        }
        if destination.is_group() {
            return if destination.is_link_local() {
                Egress::Drop(DropReason::Multicast)
            } else {
                Egress::All
            };
        }
        match (self.table.get(&destination), from) {
            (Some(to), Ingress::Port(sender, _)) if *to == sender => Egress::Drop(DropReason::NoDestination),
            (Some(to), _) => Egress::Port(*to),
            (None, Ingress::Port(..)) => Egress::Uplink,
            (None, Ingress::Uplink) => Egress::Drop(DropReason::NoDestination),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::offload::Offloads;
    use crate::frame::{Bytes, Memory};

    const A: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
    const B: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 2]);
    const STRANGER: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 9]);

    fn send(switch: &Switch, from: Ingress, source: MacAddr, destination: MacAddr) -> Egress {
        let mut head = [0; 60];
        head[..6].copy_from_slice(&destination.0);
        head[6..12].copy_from_slice(&source.0);
        let tail_bytes = Bytes { start: 0, len: 0 };
        switch.forward(
            &Frame { head: &head, tail: Memory::Host(&[]), tail_bytes, offloads: Offloads::default() },
            from,
        )
    }

    #[test]
    fn forwarding() {
        let mut s = Switch::default();
        assert!(s.insert(A, PortId(0)));
        assert!(s.insert(B, PortId(1)));
        assert!(!s.insert(A, PortId(2)));
        let (a, up) = (Ingress::Port(PortId(0), A), Ingress::Uplink);
        let lldp = MacAddr([0x01, 0x80, 0xc2, 0, 0, 0x0e]);

        assert_eq!(send(&s, a, A, B), Egress::Port(PortId(1)));
        assert_eq!(send(&s, a, A, STRANGER), Egress::Uplink);
        assert_eq!(send(&s, a, A, MacAddr::BROADCAST), Egress::All);
        assert_eq!(send(&s, a, A, MacAddr([0x33, 0x33, 0, 0, 0, 1])), Egress::All);
        assert_eq!(send(&s, a, A, A), Egress::Drop(DropReason::NoDestination));
        assert_eq!(send(&s, a, A, lldp), Egress::Drop(DropReason::Multicast));
        assert_eq!(send(&s, a, B, STRANGER), Egress::Drop(DropReason::SpoofedMac));
        assert_eq!(send(&s, a, STRANGER, MacAddr::BROADCAST), Egress::Drop(DropReason::SpoofedMac));

        assert_eq!(send(&s, up, STRANGER, A), Egress::Port(PortId(0)));
        assert_eq!(send(&s, up, STRANGER, MacAddr::BROADCAST), Egress::All);
        assert_eq!(send(&s, up, A, STRANGER), Egress::Drop(DropReason::NoDestination));

        s.remove(B);
        assert_eq!(send(&s, a, A, B), Egress::Uplink);
    }
}
