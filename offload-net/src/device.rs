//! The virtio-net device (VirtIO 1.3 section 5.1): what a front-end sees of a port of a network.
//!
//! One or several pairs of a receive and a transmit queue. With several, there is a control queue behind them by which the
//! driver says how many it uses: it is the card's, as all queues. QEMU keeps the control queue to itself and starts and
//! stops the pairs accordingly; it does not let the card see VIRTIO_NET_F_CTRL_VQ. A front-end that shows the feature and
//! keeps the queue all the same (Cloud Hypervisor) gets all frames in the first pair.
//!
//! QEMU as the front-end answers the guest's reads of the configuration space itself, with the MAC address on its own
//! command line. If that is not the one in the device's specification the guest is mute: its frames count as spoofed.

use std::sync::Arc;
use std::time::Instant;

use offload_card::qos::NetLimits;
use offload_card::ring::{Ring, RingState};
use offload_card::{Busy, Device, Identity};
use proto::error::Error;
use proto::v1::{DeviceStats, NetDeviceSpec};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use crate::conntrack::Filter;
use crate::drops::Drops;
use crate::mac::MacAddr;
use crate::network::Network;
use crate::network::allowance::Exceeded;
use crate::security::Wanted;
use crate::subnet::{Interface, Subnet};
use crate::switch::PortId;

/// Most queue pairs of a device.
const QUEUE_PAIRS_MAX: u32 = 32;
/// `struct virtio_net_config` up to and including `mtu`.
const CONFIG_SIZE: usize = 12;
const DEFAULT_QUEUE_SIZE: u32 = 256;
/// Smallest and largest MTU: IPv4 needs the one (RFC 791), a TCP super-frame's IP packet is no longer than 65535 bytes,
/// of which 14 are kept for the Ethernet header as Linux does.
pub const MTU_MIN: u32 = 68;
/// See [`MTU_MIN`].
pub const MTU_MAX: u32 = 65521;

/// What a device with several queue pairs has besides: without a control queue its driver could not ask for them.
const FEATURES_OF_SEVERAL: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;

const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6;

/// A device's specification, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Its addresses.
    pub interface: Interface,
    /// Its security groups, if it has some.
    pub security: Option<Wanted>,
    /// Largest L3 packet in bytes.
    pub mtu: u16,
    /// Pairs of a receive and a transmit queue.
    pub queue_pairs: u16,
    /// Largest ring.
    pub queue_size: u16,
}

impl Settings {
    /// Checks a specification for a device in a network with this MTU and this prefix, if it has one.
    ///
    /// # Errors
    /// The field and what it may be.
    pub fn check(spec: &NetDeviceSpec, network_mtu: u32, subnet: Option<&Subnet>) -> Result<Self, Error> {
        let mac = MacAddr::try_from(spec.mac.as_slice()).map_err(|_| {
            Error::invalid_field("net.mac", format!("a MAC address has 6 bytes, not {}", spec.mac.len()))
        })?;
        if !mac.is_unicast() {
            let what = format!("{mac} is no address of an interface: it is a group address or zero");
            return Err(Error::invalid_field("net.mac", what)
                .remedy("choose a locally administered one, e.g. 52:54:00:12:34:56"));
        }
        let mtu = if spec.mtu == 0 { network_mtu } else { spec.mtu };
        if !(MTU_MIN..=network_mtu).contains(&mtu) {
            let what = format!("MTU {mtu} is not between {MTU_MIN} and the network's, {network_mtu}");
            return Err(Error::invalid_field("net.mtu", what));
        }
        let queue_pairs = spec.queue_pairs.max(1);
        if queue_pairs > QUEUE_PAIRS_MAX {
            let what = format!("{queue_pairs} queue pairs are more than {QUEUE_PAIRS_MAX}");
            return Err(Error::invalid_field("net.queue_pairs", what));
        }
        let queue_size = if spec.queue_size == 0 { DEFAULT_QUEUE_SIZE } else { spec.queue_size };
        if !queue_size.is_power_of_two() || queue_size > u32::from(offload_card::ring::MAX_SIZE) {
            let what = format!(
                "queue size {queue_size} is not a power of two up to {}",
                offload_card::ring::MAX_SIZE
            );
            return Err(Error::invalid_field("net.queue_size", what));
        }
        let interface = Interface::check(spec, mac, subnet)?;
        let security = Wanted::check(spec, subnet.is_some())?;
        // All fit: checked above.
        let (mtu, queue_pairs, queue_size) = (mtu as u16, queue_pairs as u16, queue_size as u16);
        Ok(Self { interface, security, mtu, queue_pairs, queue_size })
    }

    /// What a device with these settings is.
    pub fn identity(&self) -> Identity {
        let (more, control) = if self.queue_pairs > 1 { (FEATURES_OF_SEVERAL, 1) } else { (0, 0) };
        Identity {
            virtio_id: VIRTIO_ID_NET,
            features: FEATURES | more,
            queues: 2 * self.queue_pairs + control,
            max_queue_size: self.queue_size,
            config_size: CONFIG_SIZE as u32,
        }
    }

    /// The configuration space (VirtIO 1.3 section 5.1.4).
    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut c = [0; CONFIG_SIZE];
        c[..6].copy_from_slice(&self.interface.mac.0);
        c[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        c[8..10].copy_from_slice(&self.queue_pairs.to_le_bytes());
        c[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        c
    }
}

/// A device in a network.
#[derive(Debug)]
pub struct NetDevice {
    identity: Identity,
    config: [u8; CONFIG_SIZE],
    network: Arc<Network>,
    port: PortId,
    drops: Arc<Drops>,
    exceeded: Arc<Exceeded>,
}

impl NetDevice {
    /// Plugs a device into its network, with what its security groups let through.
    ///
    /// # Errors
    /// An address is taken.
    pub fn plug(
        settings: &Settings,
        filter: Option<Box<Filter>>,
        network: Arc<Network>,
    ) -> Result<Self, Error> {
        let (port, drops) = network.plug_pairs(settings.interface.clone(), filter, settings.queue_pairs)?;
        let (identity, config) = (settings.identity(), settings.config());
        Ok(Self { identity, config, network, port, drops, exceeded: Arc::default() })
    }
}

impl NetDevice {
    /// Its place in its network.
    pub fn port(&self) -> PortId {
        self.port
    }
}

impl Device for NetDevice {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let from = self.config.get(offset as usize..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    /// Nothing in it is the driver's to write, except the MAC address for drivers older than VirtIO 1.0; and that the
    /// control plane decides. As for read-only registers, a write has no effect.
    fn write_config(&self, _offset: u32, _data: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    fn start_queue(&self, ring: Ring) -> Result<(), Error> {
        self.network.start_queue(self.port, ring)
    }

    /// The network's thread waits for nobody: a queue stops as soon as it is that task's turn.
    fn stop_queue(&self, index: u16, deadline: Instant) -> Result<Option<RingState>, Busy> {
        self.network.stop_queue(self.port, index, deadline).ok_or(Busy { index, in_flight: 0 })
    }

    fn reset(&self) {}

    fn set_net_limits(&self, limits: NetLimits) -> Result<(), Error> {
        self.network.limit(self.port, limits, self.exceeded.clone())
    }

    fn add_stats(&self, stats: &mut DeviceStats) {
        stats.drops = Some(self.drops.message());
        stats.allowances = Some(self.exceeded.message());
    }

    fn close(&self) {
        self.network.unplug(self.port);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> NetDeviceSpec {
        NetDeviceSpec { network: "n".to_owned(), mac: vec![0x52, 0x54, 0, 1, 2, 3], ..Default::default() }
    }

    #[test]
    fn the_config_space_is_what_the_driver_needs() {
        let s = Settings::check(&spec(), 1400, None).unwrap();
        assert_eq!(s.config(), [0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0x78, 5]);
        assert_eq!((s.queue_size, s.identity().queues, s.identity().features), (256, 2, FEATURES));
    }

    #[test]
    fn several_queue_pairs_come_with_a_control_queue() {
        let s = Settings::check(&NetDeviceSpec { queue_pairs: 32, ..spec() }, 1500, None).unwrap();
        assert_eq!(s.config()[8..10], [32, 0]);
        assert_eq!(s.identity().queues, 65);
        assert_eq!(s.identity().features & !FEATURES, 1 << 22 | 1 << 17);
    }

    #[test]
    fn impossible_specifications_are_refused() {
        let with = |edit: fn(&mut NetDeviceSpec)| {
            let mut s = spec();
            edit(&mut s);
            Settings::check(&s, 1500, None).unwrap_err().to_string()
        };
        assert!(with(|s| s.mac = vec![1, 2]).contains("6 bytes"));
        assert!(with(|s| s.mac[0] = 1).contains("group address"));
        assert!(with(|s| s.mac = vec![0; 6]).contains("zero"));
        assert!(with(|s| s.mtu = 9000).contains("between 68 and the network's, 1500"));
        assert!(with(|s| s.mtu = 60).contains("MTU 60"));
        assert!(with(|s| s.queue_pairs = 33).contains("33 queue pairs are more than 32"));
        assert!(with(|s| s.queue_size = 300).contains("power of two"));
        assert!(with(|s| s.queue_size = 65536).contains("power of two"));
    }
}
