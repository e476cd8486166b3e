//! Which VMs, networks and security groups there are, in memory: names, tokens, MAC addresses and images, each used once.
//!
//! One lock, held for moments and never across a call, so that a name cannot be taken twice and a network cannot go
//! while a VM is being plugged into it.

mod security;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::error::{Error, ErrorReason};
use proto::v1::{NetworkSpec, VmSpec, VmState};
use tonic::Code;

use super::addresses::Pool;
use super::mac::Mac;
use super::vm::Vm;
pub(crate) use security::GroupInfo;

/// A network the controller keeps.
#[derive(Debug, Clone)]
pub(crate) struct NetworkInfo {
    /// With every default filled in.
    pub spec: NetworkSpec,
    /// The card it is on.
    pub card: String,
    /// It is being made or deleted: nothing may be plugged in.
    pub changing: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    vms: BTreeMap<String, Arc<Vm>>,
    networks: BTreeMap<String, NetworkInfo>,
    groups: BTreeMap<String, GroupInfo>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM of that id or name.
    ///
    /// # Errors
    /// VM_NOT_FOUND, or INVALID_FIELD if `vm` is empty.
    pub(crate) fn find(&self, vm: &str) -> Result<Arc<Vm>, Error> {
        if vm.is_empty() {
            return Err(Error::invalid_field("vm", "no VM is named").remedy("give its id or its name"));
        }
        let inner = self.lock();
        let found = inner.vms.get(vm).or_else(|| inner.vms.values().find(|v| v.spec.name == vm));
        found.cloned().ok_or_else(|| vm_not_found(vm))
    }

    /// All VMs, by name.
    pub(crate) fn vms(&self) -> Vec<Arc<Vm>> {
        let mut vms: Vec<_> = self.lock().vms.values().cloned().collect();
        vms.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
        vms
    }

    /// The VM that was made with this token.
    ///
    /// # Errors
    /// TOKEN_REUSED if it was made by another request.
    pub(crate) fn with_token(&self, token: &str, request: &[u8]) -> Result<Option<Arc<Vm>>, Error> {
        self.lock().with_token(token, request)
    }

    /// Takes in a VM that is to be made, unless one has been made with its token. `make` gets its specification, with
    /// every NIC's MAC and IP addresses chosen; nothing else is taken in or found while it runs.
    ///
    /// # Errors
    /// VM_EXISTS, TOKEN_REUSED, NETWORK_NOT_FOUND, SECURITY_GROUP_NOT_FOUND, INVALID_FIELD for an address that another VM has or the network cannot
    /// give.
    pub(crate) fn reserve(
        &self,
        token: &str,
        request: &[u8],
        mut spec: VmSpec,
        make: impl FnOnce(VmSpec) -> Arc<Vm>,
    ) -> Result<Arc<Vm>, Error> {
        let mut inner = self.lock();
        if let Some(vm) = inner.with_token(token, request)? {
            return Ok(vm);
        }
        if let Some(other) = inner.vms.values().find(|v| v.spec.name == spec.name || v.id == spec.name) {
            return Err(Error::new(
                Code::AlreadyExists,
                ErrorReason::VmExists,
                format!("there is a VM {} already (id {})", other.spec.name, other.id),
            )
            .resource(spec.name)
            .remedy("choose another name, or remove that VM with: outboard vm rm"));
        }
        inner.choose_macs(&mut spec)?;
        for nic in &spec.nics {
            if inner.networks.get(&nic.network).is_none_or(|n| n.changing) {
                return Err(super::spec::network_not_found(&nic.network));
            }
        }
        inner.check_groups(&spec)?;
        inner.choose_addresses(&mut spec)?;
        let vm = make(spec);
        inner.vms.insert(vm.id.clone(), Arc::clone(&vm));
        Ok(vm)
    }

    /// Takes in a VM that was there before this controller.
    /// Taken in before its actor can have itself removed.
    pub(crate) fn adopt(&self, make: impl FnOnce() -> Arc<Vm>) {
        let mut inner = self.lock();
        let vm = make();
        inner.vms.insert(vm.id.clone(), vm);
    }

    /// Forgets a VM.
    pub(crate) fn remove(&self, id: &str) {
        self.lock().vms.remove(id);
    }

    /// Whether a VM that is up uses one of this VM's images in a way that one of them would see the other's writes.
    ///
    /// # Errors
    /// DISK_IN_USE.
    pub(crate) fn check_images(&self, vm: &Vm) -> Result<(), Error> {
        let inner = self.lock();
        let up = inner.vms.values().filter(|v| v.id != vm.id && is_up(v));
        for other in up {
            for theirs in &other.spec.disks {
                let shared = vm
                    .spec
                    .disks
                    .iter()
                    .find(|ours| ours.path == theirs.path && !(ours.read_only && theirs.read_only));
                if let Some(ours) = shared {
                    return Err(Error::new(
                        Code::FailedPrecondition,
                        ErrorReason::DiskInUse,
                        format!("disk {} is in use by VM {}", ours.path, other.spec.name),
                    )
                    .resource(ours.path.clone())
                    .remedy(format!(
                        "stop VM {} first, or use a copy of the image, or make both disks read-only",
                        other.spec.name
                    )));
                }
            }
        }
        Ok(())
    }

    /// A network.
    pub(crate) fn network(&self, id: &str) -> Option<NetworkInfo> {
        self.lock().networks.get(id).cloned()
    }

    /// All networks, by id.
    pub(crate) fn networks(&self) -> Vec<NetworkInfo> {
        self.lock().networks.values().cloned().collect()
    }

    /// Takes in a network that is to be made. `Some` if there is the same one already.
    ///
    /// # Errors
    /// NETWORK_EXISTS if there is another one with its id, or if it is being made or deleted.
    pub(crate) fn reserve_network(
        &self,
        spec: &NetworkSpec,
        card: &str,
    ) -> Result<Option<NetworkInfo>, Error> {
        let mut inner = self.lock();
        match inner.networks.get(&spec.id) {
            Some(there) if there.spec == *spec && there.card == card && !there.changing => {
                Ok(Some(there.clone()))
            }
            Some(there) => {
                let what =
                    if there.changing { "is being changed just now" } else { "exists and is different" };
                Err(Error::new(
                    Code::AlreadyExists,
                    ErrorReason::NetworkExists,
                    format!("network {} {what}", spec.id),
                )
                .resource(spec.id.clone())
                .remedy("choose another name, or remove that network with: outboard network rm"))
            }
            None => {
                let info = NetworkInfo { spec: spec.clone(), card: card.to_owned(), changing: true };
                inner.networks.insert(spec.id.clone(), info);
                Ok(None)
            }
        }
    }

    /// The end of a change: the network exists (`true`) or does not.
    pub(crate) fn settle_network(&self, id: &str, exists: bool) {
        let mut inner = self.lock();
        if !exists {
            inner.networks.remove(id);
        } else if let Some(network) = inner.networks.get_mut(id) {
            network.changing = false;
        }
    }

    /// A network that was there before this controller.
    pub(crate) fn adopt_network(&self, spec: NetworkSpec, card: String) {
        self.lock().networks.insert(spec.id.clone(), NetworkInfo { spec, card, changing: false });
    }

    /// Begins to delete a network.
    ///
    /// # Errors
    /// NETWORK_NOT_FOUND, NETWORK_IN_USE.
    pub(crate) fn begin_network_removal(&self, id: &str) -> Result<NetworkInfo, Error> {
        let mut inner = self.lock();
        let users: Vec<_> = inner
            .vms
            .values()
            .filter(|v| v.spec.nics.iter().any(|n| n.network == id))
            .map(|v| v.spec.name.clone())
            .collect();
        let network = inner.networks.get_mut(id).filter(|n| !n.changing);
        let network = network.ok_or_else(|| super::spec::network_not_found(id))?;
        if !users.is_empty() {
            return Err(Error::new(
                Code::FailedPrecondition,
                ErrorReason::NetworkInUse,
                format!("network {id} is used by {}", users.join(", ")),
            )
            .resource(id)
            .remedy("remove these VMs first"));
        }
        network.changing = true;
        Ok(network.clone())
    }

    /// Devices plugged into a network now: those of VMs that are up, as their card calls them.
    pub(crate) fn devices_in(&self, network: &str) -> Vec<String> {
        let inner = self.lock();
        inner
            .vms
            .values()
            .filter(|v| is_up(v))
            .flat_map(|v| {
                let nics = v.spec.nics.iter().filter(|n| n.network == network);
                nics.map(|n| super::cards::device_id(&v.id, &n.id)).collect::<Vec<_>>()
            })
            .collect()
    }
}

impl Inner {
    fn with_token(&self, token: &str, request: &[u8]) -> Result<Option<Arc<Vm>>, Error> {
        let made = self.vms.values().find(|v| !token.is_empty() && v.token == token);
        let Some(vm) = made else { return Ok(None) };
        if vm.request == request {
            return Ok(Some(Arc::clone(vm)));
        }
        Err(Error::new(
            Code::AlreadyExists,
            ErrorReason::TokenReused,
            format!("client token {token} was used before, with another request, for VM {}", vm.spec.name),
        )
        .resource(token)
        .remedy("use a new token for every new request"))
    }

    fn choose_macs(&self, spec: &mut VmSpec) -> Result<(), Error> {
        let owner = |mac: &str| self.vms.values().find(|v| v.spec.nics.iter().any(|n| n.mac == mac));
        for i in 0..spec.nics.len() {
            let own: Vec<_> = spec.nics.iter().map(|n| n.mac.clone()).collect();
            let Some(nic) = spec.nics.get_mut(i) else { continue };
            if nic.mac.is_empty() {
                let free = |m: &String| owner(m).is_none() && !own.contains(m);
                // 40 random bits: the first is almost always free.
                nic.mac = std::iter::repeat_with(|| Mac::random().to_string()).find(free).unwrap_or_default();
            } else if let Some(other) = owner(&nic.mac) {
                return Err(Error::invalid_field(
                    &format!("spec.nics[{i}].mac"),
                    format!("MAC address {} is VM {}'s already", nic.mac, other.spec.name),
                )
                .resource(nic.mac.clone())
                .remedy("give another one, or none to have one chosen"));
            }
        }
        Ok(())
    }

    /// Gives every NIC in a network with a prefix its addresses. Those that are asked for come first, so that none of
    /// them is chosen for another NIC of the same VM.
    fn choose_addresses(&self, spec: &mut VmSpec) -> Result<(), Error> {
        let mut pools: BTreeMap<String, Pool> = BTreeMap::new();
        for (i, nic) in spec.nics.iter().enumerate() {
            let field = format!("spec.nics[{i}].addresses");
            let Some(network) = self.networks.get(&nic.network) else { continue };
            let Some(new) = Pool::of(&network.spec) else {
                let Some(address) = nic.addresses.first() else { continue };
                let what =
                    format!("network {} has no prefix: its guests choose their own addresses", nic.network);
                return Err(Error::invalid_field(&field, what)
                    .resource(address.clone())
                    .remedy("give no address, or use a network that was made with --prefix"));
            };
            let pool = match pools.entry(nic.network.clone()) {
                Entry::Occupied(there) => there.into_mut(),
                Entry::Vacant(place) => {
                    let pool = place.insert(new);
                    let others = self.vms.values().flat_map(|v| &v.spec.nics);
                    for other in others.filter(|n| n.network == nic.network) {
                        pool.take(other);
                    }
                    pool
                }
            };
            if let Some(taken) = pool.take(nic) {
                let what = format!("{taken} in network {} is another NIC's or the gateway's", nic.network);
                return Err(Error::invalid_field(&field, what)
                    .resource(taken.to_string())
                    .remedy("give another one, or none to have one chosen"));
            }
        }
        for (i, nic) in spec.nics.iter_mut().enumerate() {
            if let Some(pool) = pools.get_mut(&nic.network) {
                pool.complete(&format!("spec.nics[{i}]"), nic)?;
            }
        }
        Ok(())
    }
}

/// It has a process, or may have one, and its devices exist.
fn is_up(vm: &Vm) -> bool {
    let view = vm.view();
    view.remains || !matches!(view.state, VmState::Stopped | VmState::Failed | VmState::Unspecified)
}

/// There is no such VM.
pub(crate) fn vm_not_found(vm: &str) -> Error {
    Error::new(Code::NotFound, ErrorReason::VmNotFound, format!("there is no VM {vm}"))
        .resource(vm)
        .remedy("see which there are with: outboard vm ls")
}
