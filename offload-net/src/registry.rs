//! The networks of a card, kept in its runtime directory so that a card that was killed comes back with them.

mod device;
mod security;
mod spec;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use offload_card::poll::PollPolicy;
use proto::error::{Error, ErrorReason};
use proto::v1::{NetDeviceSpec, NetworkRecord, NetworkSpec};
use tonic::Code;

use crate::capture::{self, Source, Wanted};
use crate::device::Settings;
use crate::flow::FlowLog;
use crate::host::nat::{self, Nat};
use crate::host::tap;
use crate::network::Network;
use crate::network::uplink::Uplink;
use crate::security::groups::Groups;
use crate::store::Store;
use crate::subnet::Interface;
use crate::switch::PortId;
use spec::{Checked, check};

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
        let (field, name) =
            if spec.tap.is_empty() { ("interface", &spec.interface) } else { ("tap", &spec.tap) };
        let has_it = |other: &NetworkSpec| !name.is_empty() && [&other.tap, &other.interface].contains(&name);
        if let Some(other) = networks.values().find(|n| has_it(&n.spec)) {
            let what = format!("interface {name} is the uplink of network {}", other.spec.id);
            return Err(Error::invalid_field(field, what).resource(name).remedy("choose another name"));
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
                tracing::info!(network = spec.id, uplink = name, "network created");
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

/// A new network: its uplink must be there, or there is no network.
fn start(id: &str, mut checked: Checked, making: &Making) -> Result<Network, Error> {
    let uplink = match checked.uplink.take() {
        Some(spec) => {
            let link = spec.open()?;
            Uplink::Up(spec, link)
        }
        None => Uplink::None,
    };
    making.start(id, checked, uplink)
}

/// A network from before: it is there, with or without its uplink.
fn restart(spec: &NetworkSpec, making: &Making) -> Result<Network, Error> {
    let mut checked = check(spec)?;
    if let Some(nat) = checked.nat.take() {
        nat.install_later();
    }
    let uplink = match checked.uplink.take() {
        Some(spec) => match spec.open() {
            Ok(link) => Uplink::Up(spec, link),
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
