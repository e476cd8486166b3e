//! What a client asked for, checked field by field and with every default filled in. Nothing here looks at the host.

mod security;

use std::collections::HashSet;

use proto::error::Error;
use proto::v1::{BootSource, DiskSpec, ImageFormat, NetworkSpec, NicSpec, VmSpec};

use super::mac::Mac;
use super::metadata;
pub(crate) use security::{complete_group, complete_rule};

/// Guest memory comes in units of this many bytes.
const MEMORY_UNIT: u64 = 2 << 20;
const MEMORY_MIN: u64 = 16 << 20;
const MEMORY_DEFAULT: u64 = 512 << 20;
/// More than any KVM host allows; the hypervisor knows its own limit (KVM_CAP_MAX_VCPUS).
const VCPUS_MAX: u32 = 4096;
const CMDLINE_MAX: usize = 2047;
/// PCI devices 1 to 31 of bus 0; device 0 is the host bridge.
const DEVICES_MAX: usize = 31;
const DISK_QUEUES_MAX: u32 = 64;
const NIC_QUEUE_PAIRS_MAX: u32 = 32;
/// Bounds of an IPv4 link's MTU that a virtio-net device can carry.
const MTU: std::ops::RangeInclusive<u32> = 68..=65521;
const MTU_DEFAULT: u32 = 1500;

/// Where names of cards come from.
pub(crate) trait CardNames {
    /// The card a disk is on when it names none.
    fn default_storage(&self) -> &str;
    /// The network's card, if there is such a network.
    fn card_of_network(&self, network: &str) -> Option<String>;
}

/// Checks a VM's specification and fills in the defaults. NICs without a MAC keep an empty one: it is chosen when all
/// others are known.
///
/// # Errors
/// INVALID_FIELD with the field's name.
pub(crate) fn complete_vm(mut spec: VmSpec) -> Result<VmSpec, Error> {
    check_name("spec.name", "the VM's name", &spec.name, 63)?;
    if spec.vcpus == 0 {
        spec.vcpus = 1;
    }
    if spec.vcpus > VCPUS_MAX {
        return Err(Error::invalid_field(
            "spec.vcpus",
            format!("{} vCPUs are more than {VCPUS_MAX}", spec.vcpus),
        )
        .remedy("ask for fewer, at best no more than the host has CPUs"));
    }
    if spec.memory_bytes == 0 {
        spec.memory_bytes = MEMORY_DEFAULT;
    }
    if spec.memory_bytes < MEMORY_MIN || !spec.memory_bytes.is_multiple_of(MEMORY_UNIT) {
        return Err(Error::invalid_field(
            "spec.memory_bytes",
            format!("{} bytes of memory are not a multiple of 2 MiB from 16 MiB up", spec.memory_bytes),
        )
        .remedy("give the memory as, for example, 512M"));
    }
    check_boot(spec.boot.as_ref())?;
    if spec.disks.len() + spec.nics.len() > DEVICES_MAX {
        return Err(Error::invalid_field(
            "spec",
            format!(
                "{} devices are more than a VM's {DEVICES_MAX} slots",
                spec.disks.len() + spec.nics.len()
            ),
        )
        .remedy("give it fewer disks and NICs"));
    }
    let vcpus = spec.vcpus;
    for (i, disk) in spec.disks.iter_mut().enumerate() {
        complete_disk(i, disk, vcpus)?;
    }
    for (i, nic) in spec.nics.iter_mut().enumerate() {
        complete_nic(i, nic)?;
    }
    check_unique(&spec)?;
    metadata::complete(&mut spec)?;
    Ok(spec)
}

fn check_boot(boot: Option<&BootSource>) -> Result<(), Error> {
    let boot = boot.filter(|b| !b.kernel_path.is_empty()).ok_or_else(|| {
        Error::invalid_field("spec.boot.kernel_path", "the VM has no kernel").remedy("name one with --kernel")
    })?;
    check_path("spec.boot.kernel_path", "kernel", &boot.kernel_path)?;
    if !boot.initramfs_path.is_empty() {
        check_path("spec.boot.initramfs_path", "initramfs", &boot.initramfs_path)?;
    }
    if boot.cmdline.len() > CMDLINE_MAX {
        return Err(Error::invalid_field(
            "spec.boot.cmdline",
            format!(
                "the kernel's command line is {} bytes long, more than {CMDLINE_MAX}",
                boot.cmdline.len()
            ),
        )
        .remedy("shorten it, or put settings into the initramfs or the root file system"));
    }
    if boot.cmdline.contains(['\0', '\n']) {
        return Err(Error::invalid_field(
            "spec.boot.cmdline",
            "the kernel's command line has a NUL or a line break in it",
        )
        .remedy("write it as one line of words with blanks between them"));
    }
    Ok(())
}

fn complete_disk(i: usize, disk: &mut DiskSpec, vcpus: u32) -> Result<(), Error> {
    if disk.id.is_empty() {
        disk.id = format!("disk{i}");
    }
    check_name(&format!("spec.disks[{i}].id"), "a disk's id", &disk.id, 32)?;
    check_path(&format!("spec.disks[{i}].path"), "disk", &disk.path)?;
    if ImageFormat::try_from(disk.format).is_err() {
        let message = format!("disk {} has format {}, which is none", disk.id, disk.format);
        return Err(Error::invalid_field(&format!("spec.disks[{i}].format"), message)
            .remedy("leave it out for a raw image, or use a controller that knows it"));
    }
    disk.limits = disk.limits.filter(|l| !l.is_none());
    disk.limits.unwrap_or_default().check().map_err(|e| e.resource(disk.id.clone()))?;
    if disk.queues == 0 {
        disk.queues = vcpus.min(DISK_QUEUES_MAX);
    }
    if disk.queues > DISK_QUEUES_MAX {
        return Err(Error::invalid_field(
            &format!("spec.disks[{i}].queues"),
            format!("disk {} has {} queues, more than {DISK_QUEUES_MAX}", disk.id, disk.queues),
        )
        .remedy("leave the number out to have one per vCPU"));
    }
    Ok(())
}

fn complete_nic(i: usize, nic: &mut NicSpec) -> Result<(), Error> {
    if nic.id.is_empty() {
        nic.id = format!("nic{i}");
    }
    check_name(&format!("spec.nics[{i}].id"), "a NIC's id", &nic.id, 32)?;
    check_name(&format!("spec.nics[{i}].network"), "a network's id", &nic.network, 32)?;
    if !nic.mac.is_empty() {
        let mac: Mac = nic.mac.parse().map_err(|e| {
            Error::invalid_field(
                &format!("spec.nics[{i}].mac"),
                format!("\"{}\" is no MAC address: {e}", nic.mac),
            )
            .remedy("write it like 02:00:00:12:34:56, or leave it out to have one chosen")
        })?;
        nic.mac = mac.to_string();
    }
    for address in &mut nic.addresses {
        let parsed: std::net::IpAddr = address.parse().map_err(|_| {
            Error::invalid_field(
                &format!("spec.nics[{i}].addresses"),
                format!("\"{address}\" is no IP address"),
            )
            .remedy("write it like 10.88.0.5, without a prefix length, or leave it out to have one chosen")
        })?;
        *address = parsed.to_string();
    }
    security::check_nic(i, nic)?;
    nic.limits = nic.limits.filter(|l| !l.is_none());
    nic.limits.unwrap_or_default().check().map_err(|e| e.resource(nic.id.clone()))?;
    if nic.mtu != 0 {
        check_mtu(&format!("spec.nics[{i}].mtu"), nic.mtu)?;
    }
    if nic.queue_pairs == 0 {
        nic.queue_pairs = 1;
    }
    if nic.queue_pairs > NIC_QUEUE_PAIRS_MAX {
        return Err(Error::invalid_field(
            &format!("spec.nics[{i}].queue_pairs"),
            format!("NIC {} has {} queue pairs, more than {NIC_QUEUE_PAIRS_MAX}", nic.id, nic.queue_pairs),
        )
        .remedy("leave the number out to have one, or ask for as many as there are vCPUs"));
    }
    Ok(())
}

fn check_unique(spec: &VmSpec) -> Result<(), Error> {
    let mut ids = HashSet::new();
    for id in spec.disks.iter().map(|d| &d.id).chain(spec.nics.iter().map(|n| &n.id)) {
        if !ids.insert(id) {
            return Err(Error::invalid_field("spec", format!("two devices of the VM have the id {id}"))
                .remedy("give every device an id of its own"));
        }
    }
    let mut macs = HashSet::new();
    for mac in spec.nics.iter().map(|n| &n.mac).filter(|m| !m.is_empty()) {
        if !macs.insert(mac) {
            return Err(Error::invalid_field(
                "spec.nics",
                format!("two NICs of the VM have the MAC address {mac}"),
            )
            .remedy("give every NIC one of its own, or none to have one chosen"));
        }
    }
    for (i, disk) in spec.disks.iter().enumerate() {
        let same = |other: &&DiskSpec| other.path == disk.path && !(other.read_only && disk.read_only);
        if spec.disks.get(i + 1..).unwrap_or_default().iter().find(same).is_some() {
            return Err(Error::invalid_field(
                "spec.disks",
                format!("two disks of the VM are {} and the VM may write to it", disk.path),
            )
            .remedy("use the image once, or make both disks read-only"));
        }
    }
    Ok(())
}

/// Fills in which card every device is on.
///
/// # Errors
/// NETWORK_NOT_FOUND, or INVALID_FIELD for a NIC that names another card than its network's.
pub(crate) fn place(spec: &mut VmSpec, names: &impl CardNames) -> Result<(), Error> {
    for disk in &mut spec.disks {
        if disk.card.is_empty() {
            names.default_storage().clone_into(&mut disk.card);
        }
    }
    for (i, nic) in spec.nics.iter_mut().enumerate() {
        let card = names.card_of_network(&nic.network).ok_or_else(|| network_not_found(&nic.network))?;
        if !nic.card.is_empty() && nic.card != card {
            return Err(Error::invalid_field(
                &format!("spec.nics[{i}].card"),
                format!("network {} is on card {card}, not on {}", nic.network, nic.card),
            )
            .remedy("leave the card out, or name the network's"));
        }
        nic.card = card;
    }
    Ok(())
}

/// There is no such network.
pub(crate) fn network_not_found(network: &str) -> Error {
    Error::new(
        tonic::Code::NotFound,
        proto::error::ErrorReason::NetworkNotFound,
        format!("there is no network {network}"),
    )
    .resource(network)
    .remedy(format!("make it with: outboard network create {network}"))
}

/// Checks a network's specification and fills in the defaults.
///
/// # Errors
/// INVALID_FIELD with the field's name.
pub(crate) fn complete_network(mut spec: NetworkSpec) -> Result<NetworkSpec, Error> {
    check_name("spec.id", "a network's id", &spec.id, 32)?;
    for (field, name) in [("spec.tap", &spec.tap), ("spec.interface", &spec.interface)] {
        let ok = name.len() <= 15
            && name != "."
            && name != ".."
            && name.bytes().all(|c| c.is_ascii_graphic() && c != b'/' && c != b':');
        if !ok {
            let what = format!("\"{name}\" cannot be a network interface's name");
            return Err(Error::invalid_field(field, what).remedy("use up to 15 letters, digits and '-'"));
        }
    }
    if !spec.tap.is_empty() && !spec.interface.is_empty() {
        let what = "a network has a TAP or an interface of the host's, and not both";
        return Err(Error::invalid_field("spec.interface", what).remedy("name one of them"));
    }
    if spec.tap.is_empty() && !spec.host_addresses.is_empty() {
        return Err(Error::invalid_field(
            "spec.host_addresses",
            "a network without a TAP has no host addresses",
        )
        .remedy("name a TAP too"));
    }
    for address in &spec.host_addresses {
        check_prefix(address)?;
    }
    if spec.mtu == 0 {
        spec.mtu = MTU_DEFAULT;
    }
    check_mtu("spec.mtu", spec.mtu)?;
    check_net::<ipnet::Ipv4Net>("spec.ipv4_prefix", &spec.ipv4_prefix, "10.88.0.0/24")?;
    check_net::<ipnet::Ipv6Net>("spec.ipv6_prefix", &spec.ipv6_prefix, "fd00:88::/64")?;
    Ok(spec)
}

/// Only that it is one: what else it must be, its card says.
fn check_net<N: std::str::FromStr>(field: &str, net: &str, example: &str) -> Result<(), Error> {
    if net.is_empty() || net.parse::<N>().is_ok() {
        return Ok(());
    }
    Err(Error::invalid_field(field, format!("\"{net}\" is no such network"))
        .remedy(format!("write it like {example}")))
}

fn check_prefix(address: &str) -> Result<(), Error> {
    let valid = address.split_once('/').is_some_and(|(ip, length)| {
        let most = match ip.parse() {
            Ok(std::net::IpAddr::V4(_)) => 32,
            Ok(std::net::IpAddr::V6(_)) => 128,
            Err(_) => return false,
        };
        length.bytes().all(|c| c.is_ascii_digit()) && length.parse::<u8>().is_ok_and(|l| l <= most)
    });
    if valid {
        return Ok(());
    }
    Err(Error::invalid_field(
        "spec.host_addresses",
        format!("\"{address}\" is no address with a prefix length"),
    )
    .remedy("write it like 10.88.0.1/24 or fd00:88::1/64"))
}

fn check_mtu(field: &str, mtu: u32) -> Result<(), Error> {
    if MTU.contains(&mtu) {
        return Ok(());
    }
    Err(Error::invalid_field(
        field,
        format!("an MTU of {mtu} is not between {} and {}", MTU.start(), MTU.end()),
    )
    .remedy(format!("leave it out for {MTU_DEFAULT}, or give one that all links in the way carry")))
}

/// 1 to `max` characters of [a-z0-9-], with a letter or digit at either end.
fn check_name(field: &str, what: &str, name: &str, max: usize) -> Result<(), Error> {
    let alnum = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let ends = name.bytes().next().is_some_and(alnum) && name.bytes().last().is_some_and(alnum);
    if ends && name.len() <= max && name.bytes().all(|c| alnum(c) || c == b'-') {
        return Ok(());
    }
    Err(Error::invalid_field(field, format!("{what} cannot be \"{name}\""))
        .remedy(format!("use 1 to {max} characters of a-z, 0-9 and '-', not '-' at either end")))
}

fn check_path(field: &str, what: &str, path: &str) -> Result<(), Error> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(());
    }
    Err(Error::invalid_field(field, format!("{what} \"{path}\" is no absolute path"))
        .resource(path)
        .remedy("write the path from / on"))
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
