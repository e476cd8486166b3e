//! What is printed as JSON: a contract of its own, apart from the messages on the wire. Names are snake_case, times are
//! Unix time in microseconds, sizes are bytes; fields are only added.

mod event;
pub(crate) mod security;
mod stats;

use proto::v1::{self, ImageFormat, LinkState, VmState};
use serde::Serialize;

pub(crate) use event::{Event, What};
pub(crate) use stats::Stats;

/// A VM.
#[derive(Debug, Serialize)]
pub(crate) struct Vm {
    /// 12 characters of [a-z0-9].
    pub id: String,
    /// Its name.
    pub name: String,
    /// "stopped", "starting", "running", "paused", "stopping" or "failed".
    pub state: String,
    /// One sentence about the state; may be empty.
    pub detail: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Path of its kernel.
    pub kernel: String,
    /// Path of its initial RAM disk; may be empty.
    pub initramfs: String,
    /// The kernel's command line.
    pub cmdline: String,
    /// Its disks, in the guest's order.
    pub disks: Vec<Disk>,
    /// Its network interfaces, in the guest's order.
    pub nics: Vec<Nic>,
    /// When it was created.
    pub created_us: i64,
    /// When it was last started; 0: never.
    pub started_us: i64,
    /// Seconds since then if it runs, else null.
    pub uptime_seconds: Option<u64>,
    /// Process id of its hypervisor; 0: none.
    pub hypervisor_pid: u32,
    /// Guest resets since it was started.
    pub resets: u64,
    /// Links of its devices, while it runs; not in lists.
    pub slots: Vec<Slot>,
}

/// A disk.
#[derive(Debug, Serialize)]
pub(crate) struct Disk {
    /// Its id within the VM.
    pub id: String,
    /// The image or block device.
    pub path: String,
    /// "raw" or "qcow2".
    pub format: String,
    /// The guest may not write.
    pub read_only: bool,
    /// The host's page cache is not used.
    pub direct: bool,
    /// Request queues.
    pub queues: u32,
    /// The card that serves it.
    pub card: String,
    /// What the guest may do with it per second.
    pub limits: Limits,
}

/// Limits of a disk; 0: none.
#[derive(Debug, Serialize)]
pub(crate) struct Limits {
    /// Requests per second.
    pub iops: u64,
    /// Requests at once after a pause; 0: a hundredth of a second's.
    pub iops_burst: u64,
    /// Bytes per second, reads and writes together.
    pub bytes_per_second: u64,
    /// Bytes at once after a pause; 0: a hundredth of a second's.
    pub bytes_burst: u64,
}

/// How long a disk is.
#[derive(Debug, Serialize)]
pub(crate) struct DiskSize {
    /// Its id within the VM.
    pub disk: String,
    /// Its size as the guest sees it.
    pub size_bytes: u64,
}

/// A network interface.
#[derive(Debug, Serialize)]
pub(crate) struct Nic {
    /// Its id within the VM.
    pub id: String,
    /// The network it is plugged into.
    pub network: String,
    /// Its MAC address.
    pub mac: String,
    /// Its IP addresses; empty in a network without a prefix.
    pub addresses: Vec<String>,
    /// Largest packet in bytes; 0: the network's.
    pub mtu: u32,
    /// Receive/transmit queue pairs.
    pub queue_pairs: u32,
    /// The card that serves it.
    pub card: String,
    /// Its security groups; none: everything that its network carries.
    pub security_groups: Vec<String>,
    /// Connections that are tracked for it at a time; 0: 65536.
    pub max_connections: u32,
    /// What the guest may do with it per second.
    pub limits: NetLimits,
}

/// Limits of a network interface; 0: none.
#[derive(Debug, Serialize)]
pub(crate) struct NetLimits {
    /// Bits per second from the guest.
    pub bits_per_second_out: u64,
    /// Bits from the guest at once after a pause; 0: a hundredth of a second's.
    pub bits_burst_out: u64,
    /// Packets per second from the guest.
    pub packets_per_second_out: u64,
    /// Packets from the guest at once after a pause; 0: a hundredth of a second's.
    pub packets_burst_out: u64,
    /// Bits per second to the guest.
    pub bits_per_second_in: u64,
    /// As `bits_burst_out`.
    pub bits_burst_in: u64,
    /// Packets per second to the guest.
    pub packets_per_second_in: u64,
    /// As `packets_burst_out`.
    pub packets_burst_in: u64,
}

/// A device's link.
#[derive(Debug, Serialize)]
pub(crate) struct Slot {
    /// The device's id within the VM.
    pub id: String,
    /// "connecting", "negotiating", "active", "lost" or "removed".
    pub link: String,
    /// How long it has been so.
    pub link_state_age_ms: u64,
    /// Connections after the first.
    pub reconnects: u64,
    /// PCI address in the guest.
    pub pci_address: String,
    /// The guest's driver is ready.
    pub driver_ok: bool,
    /// Why the link was last lost; empty: never.
    pub last_error: String,
}

/// A network.
#[derive(Debug, Serialize)]
pub(crate) struct Network {
    /// Its name.
    pub id: String,
    /// The host's interface in it, made by the card; may be empty.
    pub tap: String,
    /// An interface of the host's that is its uplink instead; may be empty.
    pub interface: String,
    /// The gateway behind that; empty: the first address of its network.
    pub gateway: String,
    /// The host's addresses in it.
    pub host_addresses: Vec<String>,
    /// Its IPv4 network; empty: a plain switch.
    pub ipv4_prefix: String,
    /// Its IPv6 network; may be empty.
    pub ipv6_prefix: String,
    /// Name servers that DHCP tells; may be empty.
    pub dns: Vec<String>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Devices plugged in now, as their card calls them.
    pub devices: Vec<String>,
}

/// A card.
#[derive(Debug, Serialize)]
pub(crate) struct Card {
    /// The name devices choose it by.
    pub name: String,
    /// "offload-blk" or "offload-net"; null if it does not answer.
    pub kind: Option<String>,
    /// Its version; null if it does not answer.
    pub version: Option<String>,
    /// Its process id; null if it does not answer.
    pub pid: Option<u32>,
    /// Devices it serves; null if it does not answer.
    pub devices: Option<u32>,
    /// Its control socket.
    pub control_socket: String,
    /// Why it does not answer; empty if it does.
    pub error: String,
}

impl Vm {
    /// `now_us` is Unix time in microseconds.
    pub(crate) fn new(vm: v1::Vm, now_us: i64) -> Self {
        let runs = matches!(vm.state(), VmState::Running | VmState::Paused | VmState::Stopping);
        let uptime = u64::try_from((now_us - vm.started_us) / 1_000_000).ok();
        let state = word(vm.state().as_str_name(), "VM_STATE_");
        let spec = vm.spec.unwrap_or_default();
        let boot = spec.boot.unwrap_or_default();
        Self {
            id: vm.id,
            name: spec.name,
            state,
            detail: vm.detail,
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            kernel: boot.kernel_path,
            initramfs: boot.initramfs_path,
            cmdline: boot.cmdline,
            disks: spec.disks.into_iter().map(Disk::from).collect(),
            nics: spec.nics.into_iter().map(Nic::from).collect(),
            created_us: vm.created_us,
            started_us: vm.started_us,
            uptime_seconds: uptime.filter(|_| runs && vm.started_us > 0),
            hypervisor_pid: vm.hypervisor_pid,
            resets: vm.resets,
            slots: vm.slots.into_iter().map(Slot::from).collect(),
        }
    }
}

impl From<v1::DiskSpec> for Disk {
    fn from(d: v1::DiskSpec) -> Self {
        let format = match d.format() {
            ImageFormat::Unspecified | ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
        };
        let v1::DiskSpec { id, path, read_only, queues, card, direct, format: _, limits } = d;
        let limits = limits.unwrap_or_default().into();
        Self { id, path, format: format.to_owned(), read_only, direct, queues, card, limits }
    }
}

impl From<v1::DeviceLimits> for Limits {
    fn from(l: v1::DeviceLimits) -> Self {
        Self {
            iops: l.operations_per_second,
            iops_burst: l.operations_burst,
            bytes_per_second: l.bytes_per_second,
            bytes_burst: l.bytes_burst,
        }
    }
}

impl From<v1::NicSpec> for Nic {
    fn from(n: v1::NicSpec) -> Self {
        let v1::NicSpec {
            id,
            network,
            mac,
            mtu,
            queue_pairs,
            card,
            addresses,
            security_groups,
            max_connections,
            limits,
        } = n;
        let limits = limits.unwrap_or_default().into();
        Self { id, network, mac, addresses, mtu, queue_pairs, card, security_groups, max_connections, limits }
    }
}

impl From<v1::NetLimits> for NetLimits {
    fn from(l: v1::NetLimits) -> Self {
        Self {
            bits_per_second_out: l.bits_per_second_out,
            bits_burst_out: l.bits_burst_out,
            packets_per_second_out: l.packets_per_second_out,
            packets_burst_out: l.packets_burst_out,
            bits_per_second_in: l.bits_per_second_in,
            bits_burst_in: l.bits_burst_in,
            packets_per_second_in: l.packets_per_second_in,
            packets_burst_in: l.packets_burst_in,
        }
    }
}

impl From<v1::SlotInfo> for Slot {
    fn from(s: v1::SlotInfo) -> Self {
        Self {
            link: link(s.link()),
            id: s.id,
            link_state_age_ms: s.link_state_age_ms,
            reconnects: s.reconnects,
            pci_address: s.pci_address,
            driver_ok: s.driver_ok,
            last_error: s.last_error,
        }
    }
}

impl From<v1::Network> for Network {
    fn from(n: v1::Network) -> Self {
        let spec = n.spec.unwrap_or_default();
        Self {
            id: spec.id,
            tap: spec.tap,
            interface: spec.interface,
            gateway: spec.gateway,
            host_addresses: spec.host_addresses,
            ipv4_prefix: spec.ipv4_prefix,
            ipv6_prefix: spec.ipv6_prefix,
            dns: spec.dns,
            mtu: spec.mtu,
            devices: n.devices,
        }
    }
}

impl From<v1::CardStatus> for Card {
    fn from(c: v1::CardStatus) -> Self {
        let info = c.info;
        Self {
            name: c.name,
            kind: info.as_ref().map(|i| i.kind.clone()),
            version: info.as_ref().map(|i| i.version.clone()),
            pid: info.as_ref().map(|i| i.pid),
            devices: info.as_ref().map(|i| i.devices),
            control_socket: c.control_socket,
            error: c.error,
        }
    }
}

fn link(state: LinkState) -> String {
    word(state.as_str_name(), "LINK_STATE_")
}

/// `VM_STATE_RUNNING` as "running".
fn word(name: &str, prefix: &str) -> String {
    name.trim_start_matches(prefix).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uptime_is_that_of_what_runs() {
        let vm = |state: VmState| v1::Vm { state: state.into(), started_us: 5_000_000, ..v1::Vm::default() };
        assert_eq!(Vm::new(vm(VmState::Running), 8_500_000).uptime_seconds, Some(3));
        assert_eq!(Vm::new(vm(VmState::Stopped), 8_500_000).uptime_seconds, None);
    }
}
