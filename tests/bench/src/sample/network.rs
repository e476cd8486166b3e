//! Measurements of the suite `network`.

mod host_peer;

use anyhow::Context;

use super::{MEMORY_MIB, add_used, of_job, run_booted, timing};
use crate::bench::Bench;
use crate::results::{Metric, Sample};
use crate::system::{GuestSetup, HOST_IP, Setup, Vmm};
use crate::workload::{GuestMode, Peer, Traffic};
use host_peer::HostPeer;

const SENDER_IP: &str = "10.9.0.2";
const RECEIVER_IP: &str = "10.9.0.3";
/// Nobody's, so that the host drops what is sent there as soon as it has it: the host's own stack is not what is measured.
const NOBODY: &str = "peer=10.9.0.99 peer_mac=02:00:00:00:0b:63";

/// Ethernet, IPv4 and UDP headers in bytes.
const HEADERS: u16 = 14 + 20 + 8;

/// Payload bytes of the guest's frames.
fn payload(traffic: Traffic) -> u16 {
    match traffic {
        // The smallest that the guest's own header leaves.
        Traffic::Packets => 66 - HEADERS,
        Traffic::Frames => 1514 - HEADERS,
        Traffic::Bulk => 60 * 1024,
        Traffic::RoundTrip => 64,
    }
}

pub(super) fn sample(
    vmm: &mut impl Vmm,
    bench: &Bench,
    traffic: Traffic,
    peer: Peer,
    guest: GuestMode,
) -> anyhow::Result<Sample> {
    let (size, mode) = (payload(traffic), guest.name());
    let bulk = traffic == Traffic::Bulk;
    let offload = if bulk { "offload=csum,tso rxbuf=65536" } else { "" };
    let common = format!("mode={mode} size={size} wait=serial {offload}");
    let protocol = if bulk { "proto=tcp" } else { "" };
    let to = match (peer, traffic) {
        (Peer::Guest | Peer::Itself, _) => format!("peer={RECEIVER_IP}"),
        (Peer::Host, Traffic::RoundTrip) => format!("peer={HOST_IP}"),
        (Peer::Host, _) => NOBODY.to_owned(),
    };
    let one_by_one = traffic == Traffic::RoundTrip;
    let job = if one_by_one { "net-pingpong" } else { "net-send" };
    let sender = format!("job={job} ip={SENDER_IP} {to} {common} {protocol} {}", timing(bench));
    let receiver = if one_by_one {
        // It begins with the sender and ends after it.
        let longer = bench.warmup + bench.measure + 1.0;
        format!("net-echo ip={RECEIVER_IP} mode={mode} wait=serial secs={longer}")
    } else {
        // Its time runs from the first frame on.
        format!("net-recv ip={RECEIVER_IP} {common} min=1 {}", timing(bench))
    };
    let guests = match peer {
        Peer::Guest => vec![
            networked("sender", format!("end=halt {sender}"), &[2]),
            networked("receiver", format!("end=halt job={receiver}"), &[3]),
        ],
        Peer::Itself => {
            vec![networked("guest", format!("end=halt {sender} dev=0 also={receiver} dev=1"), &[2, 3])]
        }
        Peer::Host => vec![networked("sender", format!("end=halt {sender}"), &[2])],
    };
    let setup = Setup { guests, uplink: peer == Peer::Host, quick_start: false };
    let booted = vmm.boot(bench, &setup)?;
    let _echo = (one_by_one && peer == Peer::Host).then(HostPeer::start).transpose()?;
    let before = booted.network.as_deref().map(copies);
    let (booted, used) = run_booted(booted, bench, &setup)?;
    let sent = booted.guests[0].result(bench.patience())?;
    let counted = match (peer, one_by_one) {
        (Peer::Guest, false) => booted.guests.last().context("no guest")?.result(bench.patience())?,
        (Peer::Itself, false) => {
            booted.guests[0].results().pop().context("the guest did not report what it received")?
        }
        _ => sent,
    };
    let mut sample = of_job(&counted)?;
    if peer == Peer::Host && !one_by_one {
        // What arrived counts, not what was sent.
        sample.values.insert(Metric::OpsPerS, used.frames / used.seconds);
        sample.values.insert(Metric::BytesPerS, used.frame_bytes / used.seconds);
    }
    add_used(&mut sample, &used, std::slice::from_ref(&counted))?;
    if let (Some(card), Some(before), Peer::Guest | Peer::Itself) = (booted.network.as_deref(), before, peer)
    {
        let after = copies(card);
        let delivered = after.delivered.saturating_sub(before.delivered);
        let copied = after.copied.saturating_sub(before.copied);
        if delivered > 0 {
            sample.values.insert(Metric::CopiesPerByte, copied as f64 / delivered as f64);
        }
    }
    Ok(sample)
}

/// What a network card's devices have done, in bytes.
struct Copies {
    /// Frames put into guests' buffers.
    delivered: u64,
    /// As often as they were copied.
    copied: u64,
}

fn copies(card: &e2e::card::Card) -> Copies {
    let devices = card.all_stats();
    let queues = || devices.iter().flat_map(|device| &device.queues);
    Copies {
        delivered: queues().map(|queue| queue.bytes_in).sum(),
        copied: queues().map(|queue| queue.bytes_copied).sum(),
    }
}

fn networked(name: &str, cmdline: String, nics: &[u8]) -> GuestSetup {
    GuestSetup { name: name.into(), memory_mib: MEMORY_MIB, cmdline, disk: None, nics: nics.into() }
}
