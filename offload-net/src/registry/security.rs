//! The security groups of a card, and what becomes of devices when they change.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};

use proto::error::{Error, ErrorReason};
use proto::v1::{DeviceSpec, SecurityGroupSpec};
use tonic::Code;

use super::Networks;
use crate::conntrack::Filter;
use crate::device::Settings;
use crate::security::groups::{self, Groups};

impl Networks {
    /// Makes security groups, or replaces them; it is in force when this returns.
    ///
    /// # Errors
    /// What is wrong with one of them; then all is as it was. Or what the host refuses.
    pub fn set_security_groups(&self, specs: &[SecurityGroupSpec], validate_only: bool) -> Result<(), Error> {
        let mut groups = self.groups();
        groups.check(specs)?;
        if validate_only {
            return Ok(());
        }
        // What of it could be written is in force in any case.
        let written = groups.set(specs);
        let networks = self.lock();
        for entry in networks.values() {
            let Some(network) = &entry.network else { continue };
            let concerned =
                entry.devices.values().filter(|plug| specs.iter().any(|spec| plug.groups.contains(&spec.id)));
            for plug in concerned {
                let (numbers, rules) = groups.rules_of(&plug.groups)?;
                network.set_rules(plug.port, numbers, Arc::new(rules))?;
            }
        }
        written?;
        for spec in specs {
            tracing::info!(group = spec.id, rules = spec.rules.len(), "security group set");
        }
        Ok(())
    }

    /// Deletes a security group.
    ///
    /// # Errors
    /// There is none, or a device or another group needs it.
    pub fn delete_security_group(&self, id: &str) -> Result<(), Error> {
        let mut groups = self.groups();
        let devices = self.devices_with(id);
        if !devices.is_empty() {
            return Err(groups::in_use(id, &format!("it is of devices {}", devices.join(", ")))
                .remedy("delete the virtual machines that use it first"));
        }
        groups.delete(id)?;
        tracing::info!(group = id, "security group deleted");
        Ok(())
    }

    /// All security groups by id, each with the devices that have it.
    pub fn list_security_groups(&self) -> Vec<(SecurityGroupSpec, Vec<String>)> {
        let groups = self.groups().list();
        groups
            .into_iter()
            .map(|spec| {
                let devices = self.devices_with(&spec.id);
                (spec, devices)
            })
            .collect()
    }

    fn devices_with(&self, group: &str) -> Vec<String> {
        let networks = self.lock();
        let all = networks.values().flat_map(|n| &n.devices);
        let mut devices: Vec<String> = all
            .filter(|(_, plug)| plug.groups.iter().any(|g| g == group))
            .map(|(id, _)| id.clone())
            .collect();
        devices.sort();
        devices
    }

    /// Makes a device with what decides what goes to it and comes from it; `None`: it has no security groups. If that fails,
    /// it leaves nothing that was not there before.
    pub(super) fn filter<T>(
        &self,
        groups: &Groups,
        spec: &DeviceSpec,
        network: &str,
        settings: &Settings,
        make: impl FnOnce(Option<Box<Filter>>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let Some(wanted) = &settings.security else { return make(None) };
        let (numbers, rules) = groups.rules_of(&wanted.groups)?;
        let path = self.connections_of(&spec.id);
        let there = path.exists();
        let owner = (settings.interface.mac, network);
        let filter = Filter::in_file(&numbers, Arc::new(rules), wanted.room, &path, owner);
        let made = filter
            .map_err(|e| {
                let what = format!("no room for {} connections of {}: {e}", wanted.room, spec.id);
                Error::new(Code::ResourceExhausted, ErrorReason::NotEnoughMemory, what)
                    .resource(&spec.id)
                    .remedy("give the device a smaller max_connections, or the host more memory")
            })
            .and_then(|filter| make(Some(Box::new(filter))));
        if made.is_err() && !there {
            self.forget_connections(&spec.id);
        }
        made
    }

    fn connections_of(&self, device: &str) -> PathBuf {
        self.0.connections.join(format!("{device}.connections"))
    }

    /// A device has been deleted, and its connections with it.
    pub(super) fn forget_connections(&self, device: &str) {
        let path = self.connections_of(device);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove {}: {e}", path.display());
            }
            _ => {}
        }
    }

    pub(super) fn groups(&self) -> MutexGuard<'_, Groups> {
        self.0.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the directory of the devices' connections, which are nobody else's to read.
pub(super) fn directory(path: PathBuf) -> Result<PathBuf, Error> {
    let made =
        fs::create_dir_all(&path).and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o700)));
    made.map_err(|e| {
        Error::new(Code::Internal, ErrorReason::Host, format!("cannot make {}: {e}", path.display()))
            .resource(path.display().to_string())
            .remedy("check the runtime directory's owner, mode and free space")
    })?;
    Ok(path)
}
