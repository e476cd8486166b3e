//! How things look to a person.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use comfy_table::{Table, presets};
use serde::Serialize;

use super::args::Output;
use super::failure::{BUG, Failure};
use super::options::{Decimal, Size};
use super::view::security::SecurityGroup;
use super::view::{Card, Event, Limits, NetLimits, Network, Stats, Vm, What};

/// Prints `text`, or `json` as one document.
///
/// # Errors
/// Standard output cannot be written.
pub(crate) fn print(
    output: Output,
    json: &impl Serialize,
    text: impl FnOnce() -> String,
) -> Result<(), Failure> {
    let text = match output {
        Output::Table => plain(&text()),
        Output::Json => {
            let text = serde_json::to_string_pretty(json);
            text.map_err(|e| Failure::Local(format!("the answer is no JSON: {e}"), BUG.to_owned()))? + "\n"
        }
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// `outboard vm ls`
pub(crate) fn vms(vms: &[Vm]) -> String {
    let rows = vms.iter().map(|v| {
        let uptime = v.uptime_seconds.map(duration).unwrap_or_default();
        let memory = Size(v.memory_bytes).to_string();
        vec![v.name.clone(), v.id.clone(), v.state.clone(), v.vcpus.to_string(), memory, uptime]
    });
    table(&["NAME", "ID", "STATE", "VCPUS", "MEMORY", "UPTIME"], rows)
}

/// `outboard vm show`
pub(crate) fn vm(vm: &Vm) -> String {
    let state = match vm.detail.as_str() {
        "" => vm.state.clone(),
        detail => format!("{} ({detail})", vm.state),
    };
    let started = if vm.started_us == 0 { "never".into() } else { time(vm.started_us) };
    let mut lines = vec![
        ("Name", vm.name.clone()),
        ("Id", vm.id.clone()),
        ("State", state),
        ("vCPUs", vm.vcpus.to_string()),
        ("Memory", Size(vm.memory_bytes).to_string()),
        ("Kernel", vm.kernel.clone()),
        ("Initramfs", vm.initramfs.clone()),
        ("Command line", vm.cmdline.clone()),
        ("Created", time(vm.created_us)),
        ("Started", started),
        ("Uptime", vm.uptime_seconds.map(duration).unwrap_or_default()),
    ];
    if vm.hypervisor_pid != 0 {
        lines.push(("Hypervisor", format!("process {}", vm.hypervisor_pid)));
        lines.push(("Guest resets", vm.resets.to_string()));
    }
    let mut text = String::new();
    for (name, value) in lines.into_iter().filter(|(_, value)| !value.is_empty()) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:<14}{value}", format!("{name}:"));
    }
    let link = |id: &str| {
        let slot = vm.slots.iter().find(|s| s.id == id);
        slot.map_or((String::new(), String::new()), |s| {
            let link = match s.last_error.as_str() {
                "" => s.link.clone(),
                _ if s.link == "active" => format!("active ({} reconnects)", s.reconnects),
                error => format!("{}: {error}", s.link),
            };
            (s.pci_address.clone(), link)
        })
    };
    let disks = vm.disks.iter().map(|d| {
        let (pci, link) = link(&d.id);
        let options = [("read-only", d.read_only), ("direct", d.direct), ("qcow2", d.format == "qcow2")];
        let options: Vec<_> = options.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
        let (queues, limits) = (d.queues.to_string(), limits(&d.limits));
        vec![d.id.clone(), d.path.clone(), d.card.clone(), queues, options.join(","), limits, pci, link]
    });
    if !vm.disks.is_empty() {
        text.push('\n');
        text += &table(&["DISK", "PATH", "CARD", "QUEUES", "OPTIONS", "LIMITS", "PCI", "LINK"], disks);
    }
    let nics = vm.nics.iter().map(|n| {
        let (pci, link) = link(&n.id);
        let queues = n.queue_pairs.to_string();
        let addresses = n.addresses.join(" ");
        let groups = n.security_groups.join(" ");
        let (network, card, limits) = (n.network.clone(), n.card.clone(), net_limits(&n.limits));
        vec![n.id.clone(), network, card, n.mac.clone(), addresses, groups, queues, limits, pci, link]
    });
    if !vm.nics.is_empty() {
        text.push('\n');
        let columns =
            ["NIC", "NETWORK", "CARD", "MAC", "ADDRESSES", "GROUPS", "PAIRS", "LIMITS", "PCI", "LINK"];
        text += &table(&columns, nics);
    }
    text
}

/// A disk's limits in words; empty if there are none.
pub(crate) fn limits(limits: &Limits) -> String {
    let mut words = Vec::new();
    let mut add = |rate: Option<String>, burst: Option<String>| match (rate, burst) {
        (Some(rate), Some(burst)) => words.push(format!("{rate} (burst {burst})")),
        (Some(rate), None) => words.push(rate),
        (None, _) => {}
    };
    let set = |n: u64| Some(n).filter(|n| *n > 0);
    add(set(limits.iops).map(|n| format!("{n} IOPS")), set(limits.iops_burst).map(|n| n.to_string()));
    let size = |n| Size(n).to_string();
    add(set(limits.bytes_per_second).map(|n| format!("{}/s", size(n))), set(limits.bytes_burst).map(size));
    words.join(", ")
}

/// A network interface's limits in words; empty if there are none.
pub(crate) fn net_limits(limits: &NetLimits) -> String {
    let NetLimits {
        bits_per_second_out,
        bits_burst_out,
        packets_per_second_out,
        packets_burst_out,
        bits_per_second_in,
        bits_burst_in,
        packets_per_second_in,
        packets_burst_in,
    } = *limits;
    let all = [
        (bits_per_second_out, bits_burst_out, "bit/s out"),
        (packets_per_second_out, packets_burst_out, "packets/s out"),
        (bits_per_second_in, bits_burst_in, "bit/s in"),
        (packets_per_second_in, packets_burst_in, "packets/s in"),
    ];
    let words = all.into_iter().filter(|(rate, ..)| *rate > 0).map(|(rate, burst, unit)| match burst {
        0 => format!("{} {unit}", Decimal(rate)),
        _ => format!("{} {unit} (burst {})", Decimal(rate), Decimal(burst)),
    });
    words.collect::<Vec<_>>().join(", ")
}

/// `outboard vm stats`
pub(crate) fn stats(stats: &Stats) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "Exits to the hypervisor: {}", stats.userspace_exits_total);
    let _ = writeln!(text, "  of the data path:      {}", stats.data_path_exits);
    let _ = writeln!(text, "Console bytes:           {}", stats.console_bytes);
    if stats.first_console_byte_us > 0 {
        let _ = writeln!(text, "First console byte:      {} us after exec", stats.first_console_byte_us);
    }
    if !stats.userspace_exits.is_empty() {
        text.push('\n');
        let exits = stats.userspace_exits.iter().map(|(reason, n)| vec![reason.clone(), n.to_string()]);
        text += &table(&["EXIT", "COUNT"], exits);
    }
    let mut operations =
        stats.devices.iter().flat_map(|d| d.operations.iter().map(move |o| (d, o))).peekable();
    if operations.peek().is_some() {
        text.push('\n');
        let operations = operations.map(|(d, o)| {
            let time = |ns: Option<u64>| ns.map(micros).unwrap_or_default();
            let (requests, errors) = (o.requests.to_string(), o.errors.to_string());
            vec![
                d.id.clone(),
                o.name.clone(),
                requests,
                errors,
                time(o.mean_ns),
                time(o.p50_ns),
                time(o.p99_ns),
            ]
        });
        text += &table(&["DEVICE", "REQUEST", "COUNT", "ERRORS", "MEAN US", "P50 US", "P99 US"], operations);
    }
    let queues = stats.devices.iter().flat_map(|d| {
        d.queues.iter().map(|q| {
            let numbers =
                [q.requests, q.bytes_in, q.bytes_out, q.errors, q.dropped, q.kicks, q.calls, q.in_flight];
            let mut row = vec![d.id.clone(), q.index.to_string()];
            row.extend(numbers.iter().map(u64::to_string));
            row.push((q.throttled_ns / 1_000_000).to_string());
            row
        })
    });
    let queues = table(
        &[
            "DEVICE",
            "QUEUE",
            "REQUESTS",
            "IN",
            "OUT",
            "ERRORS",
            "DROPPED",
            "KICKS",
            "CALLS",
            "IN FLIGHT",
            "LIMITED MS",
        ],
        queues,
    );
    if !stats.devices.is_empty() {
        text.push('\n');
        text += &queues;
    }
    for (device, drops) in stats.devices.iter().filter_map(|d| Some((&d.id, d.drops.as_ref()?))) {
        let told: Vec<_> =
            drops.iter().filter(|(_, n)| **n > 0).map(|(reason, n)| format!("{reason} {n}")).collect();
        if !told.is_empty() {
            let _ = writeln!(text, "\nFrames not taken from or given to {device}: {}", told.join(", "));
        }
    }
    for (device, allowances) in stats.devices.iter().filter_map(|d| Some((&d.id, d.allowances.as_ref()?))) {
        let told: Vec<_> =
            allowances.iter().filter(|(_, n)| **n > 0).map(|(name, n)| format!("{name} {n}")).collect();
        if !told.is_empty() {
            let _ = writeln!(text, "\nLimits of {device} that were reached: {}", told.join(", "));
        }
    }
    text
}

/// `outboard network ls`
pub(crate) fn networks(networks: &[Network]) -> String {
    let rows = networks.iter().map(|n| {
        let addresses = n.host_addresses.join(" ");
        let prefixes = format!("{} {}", n.ipv4_prefix, n.ipv6_prefix).trim().to_owned();
        let uplink = if n.tap.is_empty() { &n.interface } else { &n.tap };
        vec![
            n.id.clone(),
            prefixes,
            uplink.clone(),
            addresses,
            n.mtu.to_string(),
            n.devices.len().to_string(),
        ]
    });
    table(&["NAME", "PREFIX", "UPLINK", "HOST ADDRESSES", "MTU", "DEVICES"], rows)
}

/// `outboard security-group ls`
pub(crate) fn security_groups(groups: &[SecurityGroup]) -> String {
    let rows = groups.iter().map(|g| {
        let rules = |direction: &str| g.rules.iter().filter(|r| r.direction == direction).count().to_string();
        vec![g.id.clone(), rules("ingress"), rules("egress"), g.devices.len().to_string()]
    });
    table(&["NAME", "INGRESS", "EGRESS", "DEVICES"], rows)
}

/// `outboard security-group show`
pub(crate) fn security_group(group: &SecurityGroup) -> String {
    let rows = group.rules.iter().map(|r| {
        let ports = match (r.port_first, r.port_last) {
            (0, _) => "all".to_owned(),
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}-{last}"),
        };
        vec![r.direction.clone(), r.protocol.clone(), ports, r.peer.clone()]
    });
    let mut text = table(&["DIRECTION", "PROTOCOL", "PORTS", "PEER"], rows);
    if !group.devices.is_empty() {
        let _ = writeln!(text, "\nDevices that have it: {}", group.devices.join(" "));
    }
    text
}

/// `outboard card ls`
pub(crate) fn cards(cards: &[Card]) -> String {
    let number = |n: Option<u32>| n.map(|n| n.to_string()).unwrap_or_default();
    let rows = cards.iter().map(|c| {
        let state = if c.error.is_empty() { "answers".to_owned() } else { c.error.clone() };
        let text = |s: &Option<String>| s.clone().unwrap_or_default();
        vec![c.name.clone(), text(&c.kind), text(&c.version), number(c.pid), number(c.devices), state]
    });
    table(&["NAME", "KIND", "VERSION", "PID", "DEVICES", "STATE"], rows)
}

/// One line of `outboard vm events`
pub(crate) fn event(event: &Event) -> String {
    let what = match &event.what {
        What::Created => "created".to_owned(),
        What::Deleted => "deleted".to_owned(),
        What::State { state } => state.clone(),
        What::Link { slot, link, reason } if reason.is_empty() => format!("link of {slot} {link}"),
        What::Link { slot, link, reason } => format!("link of {slot} {link}: {reason}"),
        What::Ended { reason, detail } if detail.is_empty() => format!("ended: {reason}"),
        What::Ended { reason, detail } => format!("ended: {reason}: {detail}"),
        What::Reset { reason } => format!("reset: {reason}"),
        What::ConfigChanged { slot } => format!("configuration of {slot} changed"),
        What::Missed { events } => format!("{events} events were missed: this watcher is too slow"),
        What::Unknown => "something this version does not know".to_owned(),
    };
    plain(&format!("{}  {}  {what}\n", time(event.time_us), event.vm_name))
}

/// Without control characters: some of what is shown was said by hypervisors and cards, and a terminal obeys escapes.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c }).collect()
}

fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().copied()).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = String::new();
    for line in table.lines() {
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// Nanoseconds as microseconds, to three digits or more.
fn micros(ns: u64) -> String {
    match ns {
        // What was longer than the longest bucket.
        u64::MAX => "> 30000000".to_owned(),
        0..10_000 => format!("{}.{:02}", ns / 1000, ns % 1000 / 10),
        10_000..100_000 => format!("{}.{}", ns / 1000, ns % 1000 / 100),
        _ => (ns / 1000).to_string(),
    }
}

/// "2d 3h", "3h 12m", "5m 7s", "42s".
fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86_400 => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// Unix time in microseconds as RFC 3339.
fn time(us: i64) -> String {
    let since = Duration::from_micros(u64::try_from(us).unwrap_or_default());
    humantime::format_rfc3339_millis(SystemTime::UNIX_EPOCH + since).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_plain_columns() {
        let text = table(&["NAME", "STATE"], [vec!["web".to_owned(), "running".to_owned()]].into_iter());
        assert_eq!(text, "NAME  STATE\nweb   running\n");
    }

    #[test]
    fn nobody_talks_to_the_terminal() {
        assert_eq!(plain("a\x1b[2Jb\n\u{9b}c"), "a\u{fffd}[2Jb\n\u{fffd}c");
    }

    #[test]
    fn limits_are_said_in_words() {
        let none = Limits { iops: 0, iops_burst: 0, bytes_per_second: 0, bytes_burst: 0 };
        assert_eq!(limits(&none), "");
        let net = proto::v1::NetLimits { bits_per_second_out: 1_000_000_000, ..Default::default() };
        assert_eq!(net_limits(&net.into()), "1G bit/s out");
        let net = proto::v1::NetLimits { packets_per_second_in: 1500, packets_burst_in: 2000, ..net };
        assert_eq!(net_limits(&net.into()), "1G bit/s out, 1500 packets/s in (burst 2K)");
        assert_eq!(limits(&Limits { iops: 500, ..none }), "500 IOPS");
        let all = Limits { iops: 500, iops_burst: 900, bytes_per_second: 20 << 20, bytes_burst: 1 << 30 };
        assert_eq!(limits(&all), "500 IOPS (burst 900), 20M/s (burst 1G)");
        assert_eq!([1234, 12_345, 123_456].map(micros), ["1.23", "12.3", "123"]);
    }

    #[test]
    fn durations_have_two_units() {
        assert_eq!(duration(7), "7s");
        assert_eq!(duration(307), "5m 7s");
        assert_eq!(duration(11_520), "3h 12m");
        assert_eq!(duration(183_600), "2d 3h");
        assert_eq!(time(1_000), "1970-01-01T00:00:00.001Z");
    }
}
