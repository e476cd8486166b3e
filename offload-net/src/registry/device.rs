//! The devices of a card: each is made in its network, and leaves its list when it ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use offload_card::device::not_limited;
use offload_card::qos::NetLimits;
use offload_card::{ConfigNotifier, Device, DeviceFactory, Identity};
use proto::error::Error;
use proto::v1::device_spec::Kind;
use proto::v1::{DeviceSpec, DeviceStats, NetDeviceSpec};

use super::{Networks, Plug, not_found};
use crate::device::NetDevice;
use crate::network::{address_taken, mac_taken};

impl DeviceFactory for Networks {
    fn validate(&self, spec: &DeviceSpec) -> Result<Identity, Error> {
        let net = net_spec(spec)?;
        if spec.limits.is_some_and(|l| !l.is_none()) {
            return Err(not_limited());
        }
        let groups = self.groups();
        let networks = self.lock();
        let entry = networks.get(&net.network).ok_or_else(|| not_found(&net.network))?;
        let settings = entry.settings(net)?;
        if let Some(wanted) = &settings.security {
            groups.rules_of(&wanted.groups)?;
        }
        for (_, other) in entry.devices.iter().filter(|(id, _)| **id != spec.id) {
            if other.interface.mac == settings.interface.mac {
                return Err(mac_taken(settings.interface.mac));
            }
            let mut theirs = other.interface.addresses();
            if let Some(taken) = theirs.find(|a| settings.interface.addresses().any(|own| own == *a)) {
                return Err(address_taken(taken));
            }
        }
        Ok(settings.identity())
    }

    fn create(&self, spec: &DeviceSpec, _notifier: ConfigNotifier) -> Result<Arc<dyn Device>, Error> {
        let net = net_spec(spec)?;
        let groups = self.groups();
        let mut networks = self.lock();
        let entry = networks.get_mut(&net.network).ok_or_else(|| not_found(&net.network))?;
        let settings = entry.settings(net)?;
        let network = entry.network(&self.0.making)?.clone();
        let device = self.filter(&groups, spec, &net.network, &settings, |filter| {
            NetDevice::plug(&settings, filter, network)
        })?;
        let number = self.0.made.fetch_add(1, Ordering::Relaxed);
        let groups = settings.security.map_or_else(Vec::new, |wanted| wanted.groups);
        let plug = Plug { interface: settings.interface, groups, port: device.port(), number };
        entry.devices.insert(spec.id.clone(), plug);
        let member =
            Member { networks: self.clone(), network: net.network.clone(), id: spec.id.clone(), number };
        Ok(Arc::new(Plugged { device, member }))
    }

    fn forget(&self, id: &str) {
        self.forget_connections(id);
    }
}

/// A device together with its place in the list of its network's devices.
struct Plugged {
    device: NetDevice,
    member: Member,
}

struct Member {
    networks: Networks,
    network: String,
    id: String,
    number: u64,
}

impl Device for Plugged {
    fn identity(&self) -> &Identity {
        self.device.identity()
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), Error> {
        self.device.write_config(offset, data)
    }

    fn start_queue(&self, ring: offload_card::Ring) -> Result<(), Error> {
        self.device.start_queue(ring)
    }

    fn set_net_limits(&self, limits: NetLimits) -> Result<(), Error> {
        self.device.set_net_limits(limits)
    }

    fn stop_queue(
        &self,
        index: u16,
        deadline: Instant,
    ) -> Result<Option<offload_card::RingState>, offload_card::Busy> {
        self.device.stop_queue(index, deadline)
    }

    fn reset(&self) {
        self.device.reset();
    }

    fn add_stats(&self, stats: &mut DeviceStats) {
        self.device.add_stats(stats);
    }

    fn close(&self) {
        self.device.close();
        let Member { networks, network, id, number } = &self.member;
        if let Some(entry) = networks.lock().get_mut(network)
            // A device that took long to end may have a successor of that name.
            && entry.devices.get(id).is_some_and(|plug| plug.number == *number)
        {
            entry.devices.remove(id);
        }
    }
}

fn net_spec(spec: &DeviceSpec) -> Result<&NetDeviceSpec, Error> {
    match &spec.kind {
        Some(Kind::Net(net)) => Ok(net),
        _ => Err(Error::invalid_field("kind", "this is a network card: it makes network devices only")
            .remedy("send the request to a storage card")),
    }
}
