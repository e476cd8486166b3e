//! The networks of a card, kept in its runtime directory so that a card that was killed comes back with them.

mod security;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use offload_card::device::not_limited;
use offload_card::poll::PollPolicy;
use offload_card::qos::NetLimits;
use offload_card::{ConfigNotifier, Device, DeviceFactory, Identity};
use proto::error::{Error, ErrorReason};
use proto::v1::device_spec::Kind;
use proto::v1::{DeviceSpec, DeviceStats, NetDeviceSpec, NetworkRecord, NetworkSpec};
use tonic::Code;

use crate::capture::{self, Source, Wanted};
use crate::device::{MTU_MAX, MTU_MIN, NetDevice, Settings};
use crate::flow::FlowLog;
use crate::host::nat::{self, Nat};
use crate::host::netlink::Prefix;
use crate::host::tap;
use crate::network::uplink::{Uplink, UplinkSpec};
use crate::network::{Network, address_taken, mac_taken};
use crate::security::groups::Groups;
use crate::store::Store;
use crate::subnet::{Interface, Subnet};
use crate::switch::PortId;

const DEFAULT_MTU: u32 = 1500;
const ID_MAX: usize = 32;

/// All networks of this card. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Networks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store<NetworkRecord>,
    /// Held while a group is changed or a device is made, before `networks`: what a device is made with is in force.
    groups: Mutex<Groups>,
    /// Where the connections of devices with security groups are kept.
    connections: PathBuf,
    /// Held while a network is made or deleted: rare, and never by a data thread.
    networks: Mutex<BTreeMap<String, Entry>>,
    /// Devices made so far.
    made: AtomicU64,
    making: Making,
}

/// What all networks have in common.
#[derive(Debug)]
struct Making {
    policy: PollPolicy,
    flows: Option<FlowLog>,
}

impl Making {
    fn start(&self, id: &str, checked: Checked, uplink: Uplink) -> Result<Network, Error> {
        let network = Network::start(id, checked.mtu, checked.subnet, uplink, self.policy)?;
        if let Some(log) = &self.flows {
            network.log_flows(log, id);
        }
        Ok(network)
    }
}

#[derive(Debug)]
struct Entry {
    spec: NetworkSpec,
    /// `None`: it could not be made again. Whoever needs it tries, and hears why not.
    network: Option<Arc<Network>>,
    /// By id.
    devices: BTreeMap<String, Plug>,
}

/// A device's place in its network.
#[derive(Debug)]
struct Plug {
    interface: Interface,
    /// Its security groups, by id.
    groups: Vec<String>,
    /// Its place in the network.
    port: PortId,
    /// Which device it is of those that had this id.
    number: u64,
}

impl Entry {
    fn new(spec: NetworkSpec, network: Option<Network>) -> Self {
        Self { spec, network: network.map(Arc::new), devices: BTreeMap::new() }
    }

    /// What a device in it is.
    fn settings(&self, spec: &NetDeviceSpec) -> Result<Settings, Error> {
        let Checked { mtu, subnet, .. } = check(&self.spec)?;
        Settings::check(spec, mtu, subnet.as_ref())
    }

    /// The network, made again if it was not there.
    fn network(&mut self, making: &Making) -> Result<&Arc<Network>, Error> {
        if self.network.is_none() {
            self.network = Some(Arc::new(restart(&self.spec, making)?));
            tracing::info!(network = self.spec.id, "network is back");
        }
        self.network.as_ref().ok_or_else(|| not_found(&self.spec.id))
    }
}

/// A network's specification, checked.
struct Checked {
    mtu: u32,
    subnet: Option<Subnet>,
    uplink: Option<UplinkSpec>,
    nat: Option<Nat>,
}

impl Networks {
    /// Takes up the networks that a predecessor left in `directory` (made if need be). A network whose TAP cannot be
    /// had now comes back without, and gets it as soon as that is possible.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(directory: PathBuf, policy: PollPolicy) -> Result<Self, Error> {
        Self::open_with(directory, policy, None)
    }

    /// The same with a flow log.
    ///
    /// # Errors
    /// As [`Networks::open`].
    pub fn open_with(directory: PathBuf, policy: PollPolicy, flows: Option<FlowLog>) -> Result<Self, Error> {
        let making = Making { policy, flows };
        let groups = Groups::open(directory.join("security-groups"))?;
        let connections = security::directory(directory.join("connections"))?;
        let store = Store::open(directory)?;
        let mut networks = BTreeMap::new();
        for spec in store.load()? {
            let mut entry = Entry::new(spec, None);
            if let Err(e) = entry.network(&making) {
                let id = &entry.spec.id;
                tracing::error!(
                    network = id,
                    "network cannot be made again, and is tried again when needed: {e}"
                );
            }
            networks.insert(entry.spec.id.clone(), entry);
        }
        Ok(Self(Arc::new(Inner {
            store,
            groups: Mutex::new(groups),
            connections,
            networks: Mutex::new(networks),
            made: AtomicU64::new(0),
            making,
        })))
    }

    /// Makes a network; the same one a second time is fine. Answers with the devices in it.
    ///
    /// # Errors
    /// A bad specification, another network of that id, or what the host refuses; nothing is left behind.
    pub fn create(&self, spec: &NetworkSpec, validate_only: bool) -> Result<Vec<String>, Error> {
        let checked = check(spec)?;
        let mut networks = self.lock();
        if let Some(existing) = networks.get_mut(&spec.id) {
            if existing.spec == *spec {
                existing.network(&self.0.making)?;
                // Somebody may have cleared the host's rules.
                if let Some(nat) = checked.nat {
                    nat.install()?;
                }
                return Ok(existing.devices.keys().cloned().collect());
            }
            return Err(Error::new(
                Code::AlreadyExists,
                ErrorReason::NetworkExists,
                format!("network {} exists with another specification", spec.id),
            )
            .resource(&spec.id)
            .remedy("choose another id, or delete the network first"));
        }
        if let Some(other) = networks.values().find(|n| !spec.tap.is_empty() && n.spec.tap == spec.tap) {
            let what = format!("interface {} is the uplink of network {}", spec.tap, other.spec.id);
            return Err(Error::invalid_field("tap", what).resource(&spec.tap).remedy("choose another name"));
        }
        if validate_only {
            return Ok(Vec::new());
        }
        // Written first: a card killed from here on makes the TAP again, and DeleteNetwork finds it.
        self.0.store.save(spec)?;
        let nat = checked.nat.clone();
        let started = start(&spec.id, checked, &self.0.making).and_then(|network| {
            match nat.as_ref().map_or(Ok(()), Nat::install) {
                Ok(()) => Ok(network),
                Err(e) => {
                    if let Err(e) = network.remove_uplink() {
                        tracing::warn!("{e}");
                    }
                    remove_nat(spec, &taps(&networks));
                    Err(e)
                }
            }
        });
        match started {
            Ok(network) => {
                networks.insert(spec.id.clone(), Entry::new(spec.clone(), Some(network)));
                tracing::info!(network = spec.id, tap = spec.tap, "network created");
                Ok(Vec::new())
            }
            Err(e) => {
                self.0.store.remove(&spec.id)?;
                Err(e)
            }
        }
    }

    /// Deletes a network and its TAP.
    ///
    /// # Errors
    /// No such network, or devices are in it.
    pub fn delete(&self, id: &str) -> Result<(), Error> {
        let mut networks = self.lock();
        let entry = networks.get(id).ok_or_else(|| not_found(id))?;
        if !entry.devices.is_empty() {
            let devices: Vec<&str> = entry.devices.keys().map(String::as_str).collect();
            return Err(Error::new(
                Code::FailedPrecondition,
                ErrorReason::NetworkInUse,
                format!("network {id} has devices: {}", devices.join(", ")),
            )
            .resource(id)
            .remedy("delete the virtual machines that use it first"));
        }
        match &entry.network {
            Some(network) => network.remove_uplink()?,
            None => remove_left_over(&entry.spec)?,
        }
        self.0.store.remove(id)?;
        if let Some(entry) = networks.remove(id) {
            remove_nat(&entry.spec, &taps(&networks));
        }
        tracing::info!(network = id, "network deleted");
        Ok(())
    }

    /// All networks by id, each with the devices in it.
    pub fn list(&self) -> Vec<(NetworkSpec, Vec<String>)> {
        self.lock().values().map(|n| (n.spec.clone(), n.devices.keys().cloned().collect())).collect()
    }

    /// Begins to capture a device's frames.
    ///
    /// # Errors
    /// No such device, or it has enough captures.
    pub fn capture(&self, device: &str, wanted: Wanted) -> Result<Source, Error> {
        let networks = self.lock();
        let found = networks.values().find_map(|n| Some((n.network.as_ref()?, n.devices.get(device)?.port)));
        let Some((network, port)) = found else {
            let what = format!("there is no device {device:?} on this card");
            return Err(Error::new(Code::NotFound, ErrorReason::DeviceNotFound, what)
                .resource(device)
                .remedy("list the card's devices for what there is"));
        };
        let (sink, source) = capture::new(device, wanted, network);
        network.capture(port, sink).map_err(|e| e.resource(device))?;
        Ok(source)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.networks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

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

fn mtu_of(spec: &NetworkSpec) -> u32 {
    if spec.mtu == 0 { DEFAULT_MTU } else { spec.mtu }
}

fn check(spec: &NetworkSpec) -> Result<Checked, Error> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if spec.id.is_empty() || spec.id.len() > ID_MAX || !spec.id.chars().all(plain) {
        let what = format!("network id {:?} is not 1 to {ID_MAX} characters of a-z, 0-9 and '-'", spec.id);
        return Err(Error::invalid_field("id", what));
    }
    let mtu = mtu_of(spec);
    if !(MTU_MIN..=MTU_MAX).contains(&mtu) {
        return Err(Error::invalid_field("mtu", format!("MTU {mtu} is not between {MTU_MIN} and {MTU_MAX}")));
    }
    let parse = |a: &String| a.parse().map_err(|e| Error::invalid_field("host_addresses", e));
    let mut addresses = spec.host_addresses.iter().map(parse).collect::<Result<Vec<Prefix>, _>>()?;
    let subnet = Subnet::check(spec, mtu, &addresses)?;
    if spec.tap.is_empty() {
        if !addresses.is_empty() {
            return Err(Error::invalid_field(
                "host_addresses",
                "a network without a TAP has no host addresses",
            )
            .remedy("name a TAP, or leave the addresses out"));
        }
        if spec.nat {
            return Err(
                Error::invalid_field("nat", "a network without a TAP has no NAT").remedy("name a TAP")
            );
        }
        return Ok(Checked { mtu, subnet, uplink: None, nat: None });
    }
    tap::check_name(&spec.tap).map_err(|e| Error::invalid_field("tap", e))?;
    for gateway in subnet.iter().flat_map(Subnet::gateways) {
        if !addresses.iter().any(|a| a.address == gateway.address) {
            addresses.push(gateway);
        }
    }
    let nat = match &subnet {
        _ if !spec.nat => None,
        Some(subnet) => Some(Nat::new(&spec.id, &spec.tap, subnet, &addresses)),
        None => {
            return Err(Error::invalid_field("nat", "a network without ipv4_prefix has no NAT")
                .remedy("give the network an IPv4 prefix, e.g. 10.88.0.0/24"));
        }
    };
    let mac = subnet.as_ref().map(|s| s.gateway_mac);
    let uplink = UplinkSpec { tap: spec.tap.clone(), mtu, addresses, mac, nat: spec.nat };
    Ok(Checked { mtu, subnet, uplink: Some(uplink), nat })
}

/// The TAPs of these networks.
fn taps(networks: &BTreeMap<String, Entry>) -> Vec<String> {
    networks.values().map(|n| n.spec.tap.clone()).filter(|tap| !tap.is_empty()).collect()
}

/// Undoes a network's NAT. That it cannot be undone does not keep a network from being deleted: its TAP is gone, so the rules
/// do nothing.
fn remove_nat(spec: &NetworkSpec, taps: &[String]) {
    if spec.nat
        && let Err(e) = nat::remove(&spec.id, taps)
    {
        tracing::error!(network = spec.id, "NAT rules are left on the host: {e}");
    }
}

/// A new network: the TAP must be there, or there is no network.
fn start(id: &str, mut checked: Checked, making: &Making) -> Result<Network, Error> {
    let uplink = match checked.uplink.take() {
        Some(spec) => {
            let tap = spec.open()?;
            Uplink::Up(spec, tap)
        }
        None => Uplink::None,
    };
    making.start(id, checked, uplink)
}

/// A network from before: it is there, with or without the TAP.
fn restart(spec: &NetworkSpec, making: &Making) -> Result<Network, Error> {
    let mut checked = check(spec)?;
    if let Some(nat) = checked.nat.take() {
        nat.install_later();
    }
    let uplink = match checked.uplink.take() {
        Some(spec) => match spec.open() {
            Ok(tap) => Uplink::Up(spec, tap),
            Err(e) => {
                tracing::error!("{e}; the network is there without its uplink, which is tried again");
                Uplink::Down(spec)
            }
        },
        None => Uplink::None,
    };
    making.start(&spec.id, checked, uplink)
}

/// Removes the TAP of a network that could not be made again, if there is one.
fn remove_left_over(spec: &NetworkSpec) -> Result<(), Error> {
    let there = !spec.tap.is_empty() && nix::net::if_::if_nametoindex(spec.tap.as_str()).is_ok();
    if there { tap::Tap::open(&spec.tap)?.remove() } else { Ok(()) }
}

fn not_found(id: &str) -> Error {
    Error::new(Code::NotFound, ErrorReason::NetworkNotFound, format!("this card has no network {id:?}"))
        .resource(id)
        .remedy("create the network first; ListNetworks shows those there are")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(id: &str) -> NetworkSpec {
        NetworkSpec { id: id.to_owned(), ..Default::default() }
    }

    fn device(id: &str, network: &str, last: u8) -> DeviceSpec {
        let net = NetDeviceSpec {
            network: network.to_owned(),
            mac: vec![2, 0, 0, 0, 0, last],
            ..Default::default()
        };
        DeviceSpec { id: id.to_owned(), kind: Some(Kind::Net(net)), limits: None, net_limits: None }
    }

    #[test]
    fn networks_are_made_once_kept_and_deleted_when_empty() {
        let dir = tempfile::tempdir().unwrap();
        let networks = Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap();
        networks.create(&spec("a"), false).unwrap();
        networks.create(&spec("a"), false).unwrap();
        networks.create(&spec("b"), true).unwrap();
        let other = NetworkSpec { mtu: 9000, ..spec("a") };
        assert_eq!(networks.create(&other, false).unwrap_err().reason(), ErrorReason::NetworkExists);

        let d =
            DeviceFactory::create(&networks, &device("vm-net0", "a", 1), ConfigNotifier::default()).unwrap();
        assert!(networks.validate(&device("vm-net0", "a", 1)).is_ok());
        assert_eq!(networks.validate(&device("x", "a", 1)).unwrap_err().reason(), ErrorReason::DeviceExists);
        let same_mac = DeviceFactory::create(&networks, &device("x", "a", 1), ConfigNotifier::default());
        assert_eq!(same_mac.err().unwrap().reason(), ErrorReason::DeviceExists);
        assert_eq!(networks.list(), [(spec("a"), vec!["vm-net0".to_owned()])]);
        assert_eq!(networks.delete("a").unwrap_err().reason(), ErrorReason::NetworkInUse);

        // What a card finds that comes after this one.
        let again = Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap();
        assert_eq!(again.list(), [(spec("a"), vec![])]);

        d.close();
        networks.delete("a").unwrap();
        assert_eq!(networks.delete("a").unwrap_err().reason(), ErrorReason::NetworkNotFound);
        assert!(
            Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap().list().is_empty()
        );
    }

    #[test]
    fn a_device_that_ends_late_takes_nothing_from_its_successor() {
        let dir = tempfile::tempdir().unwrap();
        let networks = Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap();
        networks.create(&spec("a"), false).unwrap();
        let make = |last| {
            DeviceFactory::create(&networks, &device("d", "a", last), ConfigNotifier::default()).unwrap()
        };
        let (old, new) = (make(1), make(2));
        old.close();
        assert_eq!(networks.list(), [(spec("a"), vec!["d".to_owned()])]);
        assert_eq!(networks.delete("a").unwrap_err().reason(), ErrorReason::NetworkInUse);
        new.close();
        networks.delete("a").unwrap();
    }

    #[test]
    fn a_network_that_cannot_be_made_again_is_kept_and_says_why() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("networks");
        // A record that this version refuses.
        let bad = NetworkSpec { mtu: 67, ..spec("a") };
        Store::<NetworkRecord>::open(dir.clone()).unwrap().save(&bad).unwrap();
        let networks = Networks::open(dir.clone(), PollPolicy::default()).unwrap();
        assert_eq!(networks.list(), [(bad, vec![])]);
        let e = DeviceFactory::create(&networks, &device("d", "a", 1), ConfigNotifier::default());
        assert!(e.err().unwrap().message().contains("MTU 67"));
        networks.delete("a").unwrap();
        assert!(Networks::open(dir, PollPolicy::default()).unwrap().list().is_empty());
    }

    #[test]
    fn bad_specifications_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let networks = Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap();
        let tap = |tap: &str, a: &[&str]| NetworkSpec {
            tap: tap.to_owned(),
            host_addresses: a.iter().map(|a| (*a).to_owned()).collect(),
            ..spec("a")
        };
        let bad = [
            spec(""),
            spec("A"),
            spec("../a"),
            spec(&"a".repeat(33)),
            NetworkSpec { mtu: 67, ..spec("a") },
            NetworkSpec { mtu: 65522, ..spec("a") },
            tap("sixteen-chars-xx", &[]),
            tap("", &["10.0.0.1/24"]),
            tap("ob0", &["10.0.0.1"]),
            // A name that is taken by an interface that is no TAP.
            tap("lo", &[]),
            NetworkSpec { nat: true, ipv4_prefix: "10.0.0.0/24".to_owned(), ..spec("a") },
            NetworkSpec { nat: true, ..tap("ob0", &["10.0.0.1/24"]) },
        ];
        for spec in bad {
            assert!(networks.create(&spec, false).is_err(), "{spec:?}");
        }
        assert!(networks.list().is_empty());
        assert!(
            Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap().list().is_empty()
        );
    }

    #[test]
    fn devices_need_a_network() {
        let dir = tempfile::tempdir().unwrap();
        let networks = Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap();
        let e = networks.validate(&device("d", "nowhere", 1)).unwrap_err();
        assert_eq!(e.reason(), ErrorReason::NetworkNotFound);
        assert!(
            networks
                .validate(&DeviceSpec { id: "d".to_owned(), kind: None, limits: None, net_limits: None })
                .is_err()
        );
    }
}
