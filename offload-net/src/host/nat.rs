//! A network's way out under the host's address: masquerading, and forwarding on the host.
//!
//! The rules of a network are an nftables table of its own, made and removed as a whole by the program `nft`. They
//! masquerade what the network's guests send elsewhere, let in what belongs to it, and let nobody begin a connection to a
//! guest, nor a guest one to another network of ours.
//!
//! The host must forward. Packets are forwarded by the setting of the interface they come in by, so that of the TAP would
//! be enough for what guests send, but not for the answers: the host as a whole has to (`net.ipv4.ip_forward`, and
//! `net.ipv6.conf.all.forwarding`, which has no equal per interface). If it does already, it is left alone. If not, it is
//! made to, and to no more than is needed: a second table, [`Family::guard`], keeps the interfaces that are there from
//! becoming a way into each other, and our other networks from becoming reachable. That table is also the mark that the
//! setting is ours; with the last network that needs it both go.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use proto::error::{Error, ErrorReason};
use tonic::Code;

use super::netlink::Prefix;
use crate::subnet::Subnet;

/// The link group (`ip link show group`) of TAPs of networks without NAT.
pub const GROUP_PLAIN: u32 = 0x6f62;
/// And of those with NAT.
pub const GROUP_NAT: u32 = 0x6f63;

/// Beginning of the names of networks' tables.
const TABLE: &str = "outboard_nat_";
const GUARD: &str = "outboard_forward";
/// Where `nft` is looked for: a service's PATH may have no directories of the administrator's.
const NFT: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];

/// The networks that are to have NAT. Held while anything is changed: each change looks first.
static WANTED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// An IP version on the host.
#[derive(Debug, Clone, Copy)]
struct Family {
    /// What nft calls it.
    name: &'static str,
    /// Whether the host forwards.
    setting: &'static str,
}

const IPV4: Family = Family { name: "ip", setting: "/proc/sys/net/ipv4/ip_forward" };
const IPV6: Family = Family { name: "ip6", setting: "/proc/sys/net/ipv6/conf/all/forwarding" };

/// A network whose guests go out under the host's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nat {
    network: String,
    tap: String,
    /// Networks, with what the host has in them.
    prefixes: Vec<(Prefix, Vec<IpAddr>)>,
}

impl Nat {
    /// Of the network `id` with this prefix, and the host's `addresses` on the TAP.
    pub fn new(id: &str, tap: &str, subnet: &Subnet, addresses: &[Prefix]) -> Self {
        let ipv4 = Prefix { address: subnet.ipv4.network().into(), len: subnet.ipv4.prefix_len() };
        let ipv6 = subnet.ipv6.map(|n| Prefix { address: n.network().into(), len: n.prefix_len() });
        let of = |prefix: Prefix| {
            let same = |a: &IpAddr| a.is_ipv4() == prefix.address.is_ipv4();
            (prefix, addresses.iter().map(|a| a.address).filter(same).collect())
        };
        Self {
            network: id.to_owned(),
            tap: tap.to_owned(),
            prefixes: [Some(ipv4), ipv6].into_iter().flatten().map(of).collect(),
        }
    }

    /// Puts the rules in place, in place of those that are there, and has the host forward.
    ///
    /// # Errors
    /// `nft` is not installed or refuses, or the host's settings cannot be written. Some of it may be done.
    pub fn install(&self) -> Result<(), Error> {
        let mut wanted = wanted();
        wanted.insert(self.network.clone());
        self.install_now()
    }

    /// The same, in a thread of its own, for a card that comes back: the rules are there as a rule, and guests wait for the
    /// card. That it fails is logged.
    pub fn install_later(self) {
        wanted().insert(self.network.clone());
        let spawned = std::thread::Builder::new().name("nat".into()).spawn(move || {
            let wanted = wanted();
            // Else the network has been deleted meanwhile.
            if wanted.contains(&self.network)
                && let Err(e) = self.install_now()
            {
                let network = self.network;
                tracing::error!(
                    network,
                    "{e}; the network is there without NAT until it is created once more"
                );
            }
        });
        if let Err(e) = spawned {
            tracing::error!("no thread for NAT rules: {e}");
        }
    }

    /// The caller holds [`WANTED`].
    fn install_now(&self) -> Result<(), Error> {
        nft(&["-f", "-"], &self.rules()).map_err(|e| e.resource(&self.network))?;
        for (prefix, _) in &self.prefixes {
            let family = if prefix.address.is_ipv4() { IPV4 } else { IPV6 };
            family.forward(&self.tap)?;
        }
        Ok(())
    }

    fn rules(&self) -> String {
        let table = table(&self.network);
        let tap = &self.tap;
        let mut masquerade = String::new();
        for (prefix, host) in &self.prefixes {
            let family = if prefix.address.is_ipv4() { IPV4.name } else { IPV6.name };
            let host: Vec<_> = host.iter().map(ToString::to_string).collect();
            // The host's own packets have an address already that it chose.
            let not_host = if host.is_empty() {
                String::new()
            } else {
                format!(" {family} saddr != {{ {} }}", host.join(", "))
            };
            masquerade +=
                &format!("        {family} saddr {prefix}{not_host} oifname != \"{tap}\" masquerade\n");
        }
        format!(
            "add table inet {table}
delete table inet {table}
table inet {table} {{
    chain forward {{
        type filter hook forward priority filter; policy accept;
        oifname \"{tap}\" ct state established,related accept
        oifname \"{tap}\" drop
        iifname \"{tap}\" oifgroup {{ {GROUP_PLAIN}, {GROUP_NAT} }} drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
{masquerade}    }}
}}
"
        )
    }
}

/// Removes the rules of network `id`, if there are any; with those of the last network, what was done to the host. `taps`
/// are the TAPs of the card's other networks.
///
/// # Errors
/// As [`Nat::install`].
pub fn remove(id: &str, taps: &[String]) -> Result<(), Error> {
    let mut wanted = wanted();
    wanted.remove(id);
    let table = table(id);
    nft(&["-f", "-"], &format!("add table inet {table}\ndelete table inet {table}\n"))
        .map_err(|e| e.resource(id))?;
    let tables = nft(&["list", "tables"], "")?;
    if tables.lines().any(|l| l.starts_with(&format!("table inet {TABLE}"))) {
        return Ok(());
    }
    for family in [IPV4, IPV6] {
        if tables.lines().any(|l| l == format!("table {} {GUARD}", family.name)) {
            family.restore(taps)?;
        }
    }
    Ok(())
}

fn wanted() -> MutexGuard<'static, BTreeSet<String>> {
    WANTED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn table(network: &str) -> String {
    // Networks' ids have no '_', tables no '-'.
    format!("{TABLE}{}", network.replace('-', "_"))
}

impl Family {
    /// Has the host forward, if it does not.
    fn forward(self, tap: &str) -> Result<(), Error> {
        let now = fs::read_to_string(self.setting).map_err(|e| setting_failed("read", self.setting, &e))?;
        if now.trim() != "0" {
            return Ok(());
        }
        let before: Vec<String> = interfaces()?.into_iter().filter(|i| i != tap).collect();
        nft(&["-f", "-"], &self.guard(&before))?;
        if self.name == IPV6.name {
            keep_router_advertisements();
        }
        fs::write(self.setting, "1").map_err(|e| setting_failed("write", self.setting, &e))?;
        tracing::info!(
            "the host forwards {} packets from now on, for networks with NAT ({})",
            self.name,
            self.setting
        );
        Ok(())
    }

    /// Between the interfaces of `before` nothing is forwarded that was not before, nor from or to our other networks.
    /// Interfaces that come later, of containers for instance, are somebody else's who knows what he does. What goes in or
    /// out by a network with NAT is its own table's business.
    fn guard(self, before: &[String]) -> String {
        let names: Vec<_> = before.iter().map(|name| format!("\"{name}\"")).collect();
        let elements =
            if names.is_empty() { String::new() } else { format!(" elements = {{ {} }};", names.join(", ")) };
        let family = self.name;
        format!(
            "add table {family} {GUARD}
delete table {family} {GUARD}
table {family} {GUARD} {{
    set before {{ type ifname;{elements} }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifgroup {GROUP_NAT} accept
        oifgroup {GROUP_NAT} accept
        iifname @before oifname @before drop
        iifgroup {GROUP_PLAIN} drop
        oifgroup {GROUP_PLAIN} drop
    }}
}}
"
        )
    }

    /// The host forwards no more, and needs no guard. Unless others have come who may count on it: then both stay.
    fn restore(self, taps: &[String]) -> Result<(), Error> {
        let listed = nft(&["list", "set", self.name, GUARD, "before"], "")?;
        let known = |name: &String| taps.contains(name) || listed.contains(&format!("\"{name}\""));
        if let Some(other) = interfaces()?.iter().find(|name| !known(name)) {
            tracing::info!(
                "the host goes on forwarding {} packets: interface {other}, which came later, may need it",
                self.name
            );
            return Ok(());
        }
        fs::write(self.setting, "0").map_err(|e| setting_failed("write", self.setting, &e))?;
        nft(&["delete", "table", self.name, GUARD], "")?;
        tracing::info!("the host forwards {} packets no more ({})", self.name, self.setting);
        Ok(())
    }
}

/// All interfaces but the loopback.
fn interfaces() -> Result<Vec<String>, Error> {
    let all = nix::net::if_::if_nameindex().map_err(|e| {
        Error::new(Code::Internal, ErrorReason::Host, format!("the host's interfaces cannot be listed: {e}"))
    })?;
    let names = all.iter().filter_map(|i| i.name().to_str().ok()).map(str::to_owned);
    Ok(names.filter(|name| name != "lo").collect())
}

/// A host that forwards takes no router's advertisements any more, and may lose its own way out, unless an interface says
/// that it does all the same: 2 instead of 1, which means the same to a host that does not forward.
fn keep_router_advertisements() {
    for entry in fs::read_dir("/proc/sys/net/ipv6/conf").into_iter().flatten().flatten() {
        let setting = entry.path().join("accept_ra");
        if fs::read_to_string(&setting).is_ok_and(|s| s.trim() == "1")
            && let Err(e) = fs::write(&setting, "2")
        {
            tracing::warn!("{} cannot be set to 2: {e}", setting.display());
        }
    }
}

/// Runs `nft` with `input`; what it says.
fn nft(args: &[&str], input: &str) -> Result<String, Error> {
    let failed = |e: io::Error| {
        Error::new(Code::FailedPrecondition, ErrorReason::Host, format!("the program nft cannot be run: {e}"))
            .remedy("install it on the host: apt install nftables (dnf install nftables)")
    };
    let spawn = |program: &str| {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    };
    let mut spawned = Err(io::Error::from(io::ErrorKind::NotFound));
    for program in NFT {
        spawned = spawn(program);
        if !matches!(&spawned, Err(e) if e.kind() == io::ErrorKind::NotFound) {
            break;
        }
    }
    let mut child = spawned.map_err(failed)?;
    // It reads all before it writes; one that does not read says why below.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let why = said.lines().next().unwrap_or("it does not say why").trim();
    if why.contains("not permitted") {
        return Err(Error::new(
            Code::PermissionDenied,
            ErrorReason::PermissionDenied,
            format!("the host's firewall rules cannot be changed: {why}: the network card lacks the capability CAP_NET_ADMIN"),
        )
        .remedy("start it as its service (offload-net.service), or as root"));
    }
    Err(Error::new(
        Code::FailedPrecondition,
        ErrorReason::Host,
        format!("the host's firewall rules cannot be changed: nft says: {why}"),
    )
    .remedy("NAT needs nft 1.0 and the kernel's nf_tables with nft_masq; or make the network without NAT"))
}

fn setting_failed(what: &str, setting: &str, e: &io::Error) -> Error {
    let code = match e.kind() {
        io::ErrorKind::PermissionDenied => Code::PermissionDenied,
        _ => Code::FailedPrecondition,
    };
    Error::new(code, ErrorReason::Host, format!("cannot {what} {setting}: {e}"))
        .resource(setting)
        .remedy("set it to 1 on the host (sysctl), or let the network card's service do it: it needs CAP_NET_ADMIN and must see /proc/sys writable (ProtectKernelTunables=no)")
}

#[cfg(test)]
mod tests {
    use proto::v1::NetworkSpec;

    use super::*;

    #[test]
    fn the_rules_name_the_network_and_nothing_else() {
        let spec = NetworkSpec {
            id: "my-lan".to_owned(),
            tap: "ob0".to_owned(),
            ipv4_prefix: "10.88.0.0/24".to_owned(),
            ipv6_prefix: "fd00:88::/64".to_owned(),
            ..Default::default()
        };
        let subnet = Subnet::check(&spec, 1500, &[]).unwrap().unwrap();
        let addresses = ["10.88.0.1/24".parse().unwrap(), "fd00:88::1/64".parse().unwrap()];
        let rules = Nat::new("my-lan", "ob0", &subnet, &addresses).rules();
        for rule in [
            "table inet outboard_nat_my_lan {",
            "ip saddr 10.88.0.0/24 ip saddr != { 10.88.0.1 } oifname != \"ob0\" masquerade\n",
            "ip6 saddr fd00:88::/64 ip6 saddr != { fd00:88::1 } oifname != \"ob0\" masquerade\n",
            "oifname \"ob0\" drop\n",
        ] {
            assert!(rules.contains(rule), "{rule} is not in {rules}");
        }
        assert!(IPV6.guard(&[]).contains("set before { type ifname; }"));
        let guard = IPV4.guard(&["eth0".to_owned(), "eth1".to_owned()]);
        assert!(guard.contains("elements = { \"eth0\", \"eth1\" };"), "{guard}");
    }
}
