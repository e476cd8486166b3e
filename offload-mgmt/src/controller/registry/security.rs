//! Security groups among what the controller keeps.

use proto::error::{Error, ErrorReason};
use proto::v1::security_group_rule::Peer;
use proto::v1::{SecurityGroupSpec, VmSpec};
use tonic::Code;

use super::{Inner, Registry, is_up};
use crate::controller::cards;

/// A security group the controller keeps.
#[derive(Debug, Clone)]
pub(crate) struct GroupInfo {
    /// With every default filled in.
    pub spec: SecurityGroupSpec,
    /// The card it is on.
    pub card: String,
    /// It is being made, changed or deleted.
    changing: bool,
    /// It is being made or deleted: nobody may be given it.
    passing: bool,
    /// What it is being changed to.
    next: Option<SecurityGroupSpec>,
}

impl GroupInfo {
    fn settled(spec: SecurityGroupSpec) -> Self {
        Self { spec, card: String::new(), changing: false, passing: false, next: None }
    }
}

impl Registry {
    /// All security groups, by id, with the devices of VMs that are up and have them.
    pub(crate) fn groups(&self) -> Vec<(SecurityGroupSpec, Vec<String>)> {
        let inner = self.lock();
        inner.groups.values().map(|g| (g.spec.clone(), inner.devices_with(&g.spec.id))).collect()
    }

    /// The devices of VMs that are up and have a security group, as their card calls them.
    pub(crate) fn devices_with(&self, group: &str) -> Vec<String> {
        self.lock().devices_with(group)
    }

    /// Takes in a security group that is to be made. True: there is the same one already.
    ///
    /// # Errors
    /// SECURITY_GROUP_EXISTS if there is another one with its id, or if it is being made or deleted;
    /// SECURITY_GROUP_NOT_FOUND if a rule names one that is not there.
    pub(crate) fn reserve_group(&self, spec: &SecurityGroupSpec, card: &str) -> Result<bool, Error> {
        let mut inner = self.lock();
        match inner.groups.get(&spec.id) {
            Some(there) if there.spec == *spec && there.card == card && !there.changing => return Ok(true),
            Some(there) => return Err(exists(&spec.id, there.changing)),
            None => {}
        }
        inner.check_peers(spec, card)?;
        let info = GroupInfo {
            spec: spec.clone(),
            card: card.to_owned(),
            changing: true,
            passing: true,
            next: None,
        };
        inner.groups.insert(spec.id.clone(), info);
        Ok(false)
    }

    /// Begins to change a security group as `change` says; the group as it was, and its specification as it is to be.
    ///
    /// # Errors
    /// SECURITY_GROUP_NOT_FOUND, SECURITY_GROUP_EXISTS if it is being changed just now, what `change` says.
    pub(crate) fn begin_group_change(
        &self,
        id: &str,
        change: impl FnOnce(&mut SecurityGroupSpec) -> Result<(), Error>,
    ) -> Result<(GroupInfo, SecurityGroupSpec), Error> {
        let mut inner = self.lock();
        let group = inner.groups.get(id).ok_or_else(|| group_not_found(id))?.clone();
        if group.changing {
            return Err(exists(id, true));
        }
        let mut spec = group.spec.clone();
        change(&mut spec)?;
        inner.check_peers(&spec, &group.card)?;
        if let Some(entry) = inner.groups.get_mut(id) {
            (entry.changing, entry.next) = (true, Some(spec.clone()));
        }
        Ok((group, spec))
    }

    /// Begins to delete a security group.
    ///
    /// # Errors
    /// SECURITY_GROUP_NOT_FOUND, SECURITY_GROUP_IN_USE.
    pub(crate) fn begin_group_removal(&self, id: &str) -> Result<GroupInfo, Error> {
        let mut inner = self.lock();
        let group = inner.groups.get(id).ok_or_else(|| group_not_found(id))?;
        if group.changing {
            return Err(exists(id, true));
        }
        let has = |spec: &VmSpec| spec.nics.iter().any(|n| n.security_groups.iter().any(|g| g == id));
        let users: Vec<_> =
            inner.vms.values().filter(|v| has(&v.spec)).map(|v| v.spec.name.clone()).collect();
        let names = |g: &&GroupInfo| {
            let specs = [Some(&g.spec), g.next.as_ref()];
            g.spec.id != id && specs.into_iter().flatten().flat_map(peers).any(|peer| peer == id)
        };
        let namer = inner.groups.values().find(names);
        let in_use = |why: String, remedy: &str| {
            Error::new(
                Code::FailedPrecondition,
                ErrorReason::SecurityGroupInUse,
                format!("security group {id} is in use: {why}"),
            )
            .resource(id)
            .remedy(remedy)
        };
        if !users.is_empty() {
            return Err(in_use(format!("VMs {} have it", users.join(", ")), "remove these VMs first"));
        }
        if let Some(other) = namer {
            let why = format!("a rule of security group {} names it", other.spec.id);
            return Err(in_use(why, "take that rule away with: outboard security-group revoke"));
        }
        let group = inner.groups.get_mut(id).ok_or_else(|| group_not_found(id))?;
        (group.changing, group.passing) = (true, true);
        Ok(group.clone())
    }

    /// The end of a change: the security group is so, or does not exist.
    pub(crate) fn settle_group(&self, id: &str, spec: Option<SecurityGroupSpec>) {
        let mut inner = self.lock();
        match spec {
            None => drop(inner.groups.remove(id)),
            Some(spec) => {
                if let Some(group) = inner.groups.get_mut(id) {
                    *group = GroupInfo { card: std::mem::take(&mut group.card), ..GroupInfo::settled(spec) };
                }
            }
        }
    }

    /// A security group that was there before this controller.
    pub(crate) fn adopt_group(&self, spec: SecurityGroupSpec, card: String) {
        let info = GroupInfo { card, ..GroupInfo::settled(spec) };
        self.lock().groups.insert(info.spec.id.clone(), info);
    }
}

impl Inner {
    fn devices_with(&self, group: &str) -> Vec<String> {
        let up = self.vms.values().filter(|v| is_up(v));
        up.flat_map(|v| {
            let nics = v.spec.nics.iter().filter(|n| n.security_groups.iter().any(|g| g == group));
            nics.map(|n| cards::device_id(&v.id, &n.id)).collect::<Vec<_>>()
        })
        .collect()
    }

    /// The groups that a group's rules name are there, on its card.
    fn check_peers(&self, spec: &SecurityGroupSpec, card: &str) -> Result<(), Error> {
        for peer in peers(spec).filter(|peer| *peer != spec.id) {
            self.check_group(peer, card, "spec.rules")?;
        }
        Ok(())
    }

    /// The groups of a VM's NICs are there, on the cards of their networks.
    pub(super) fn check_groups(&self, spec: &VmSpec) -> Result<(), Error> {
        for (i, nic) in spec.nics.iter().enumerate() {
            for group in &nic.security_groups {
                self.check_group(group, &nic.card, &format!("spec.nics[{i}].security_groups"))?;
            }
        }
        Ok(())
    }

    fn check_group(&self, id: &str, card: &str, field: &str) -> Result<(), Error> {
        let there = self.groups.get(id).filter(|g| !g.passing).ok_or_else(|| group_not_found(id))?;
        if there.card == card {
            return Ok(());
        }
        let what = format!("security group {id} is on card {}, not on {card}", there.card);
        Err(Error::invalid_field(field, what)
            .resource(id)
            .remedy(format!("make one on that card with: outboard security-group create --card {card}")))
    }
}

fn peers(spec: &SecurityGroupSpec) -> impl Iterator<Item = &str> {
    spec.rules.iter().filter_map(|rule| match &rule.peer {
        Some(Peer::Group(id)) => Some(id.as_str()),
        _ => None,
    })
}

fn exists(id: &str, changing: bool) -> Error {
    let (what, remedy) = if changing {
        ("is being changed just now", "try again in a moment")
    } else {
        (
            "exists and is different",
            "choose another name, or change it with: outboard security-group allow, or revoke",
        )
    };
    let what = format!("security group {id} {what}");
    Error::new(Code::AlreadyExists, ErrorReason::SecurityGroupExists, what).resource(id).remedy(remedy)
}

/// There is no such security group.
fn group_not_found(id: &str) -> Error {
    Error::new(Code::NotFound, ErrorReason::SecurityGroupNotFound, format!("there is no security group {id}"))
        .resource(id)
        .remedy(format!("make it with: outboard security-group create {id}"))
}
