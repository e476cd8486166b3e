//! `offload-net`: the network card's process.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use offload_card::poll::PollArgs;
use offload_card::runtime::{self, CardArgs, Parts};
use offload_net::flow::{FlowLog, Settings};
use offload_net::registry::Networks;
use proto::v1::network_card_server::NetworkCardServer;

/// The Outboard network card: serves virtio network devices over vhost-user, and switches between them and the host.
///
/// It needs the capability CAP_NET_ADMIN to make TAP interfaces. Networks and devices are created through the control
/// socket, normally by outboard-mgmt, and kept in the runtime directory: a card that was killed comes back with them.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    card: CardArgs,
    #[command(flatten)]
    poll: PollArgs,
    #[command(flatten)]
    flow_log: FlowLogArgs,
}

/// The flow log.
#[derive(Debug, clap::Args)]
struct FlowLogArgs {
    /// Write what devices send and are sent to this file, added up by flow: a JSON object per line
    ///
    /// Each has the network, the device's MAC address, the direction, start and end, addresses, protocol, ports, packets, bytes,
    /// and whether the frames were accepted, or why not.
    #[arg(long, value_name = "FILE")]
    flow_log: Option<PathBuf>,
    /// How long flows are added up before they are written, like 60s
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = interval, requires = "flow_log")]
    flow_log_interval: Duration,
    /// Count one in so many frames
    #[arg(long, value_name = "N", default_value_t = 1, requires = "flow_log",
          value_parser = clap::value_parser!(u32).range(1..))]
    flow_log_sample: u32,
}

/// A time in seconds or milliseconds, from 100 ms to a day.
fn interval(text: &str) -> Result<Duration, String> {
    let (digits, unit_ms) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(digits), _) => (digits, 1),
        (None, Some(digits)) => (digits, 1000),
        (None, None) => (text, 1000),
    };
    let ms = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit_ms));
    match ms {
        Some(ms) if (100..=86_400_000).contains(&ms) => Ok(Duration::from_millis(ms)),
        _ => Err(format!("{text:?} is no time from 100ms to 86400s; write it like 60s")),
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    runtime::run("offload-net", env!("CARGO_PKG_VERSION"), &args.card, |directory| {
        let FlowLogArgs { flow_log, flow_log_interval: interval, flow_log_sample: sample } = args.flow_log;
        let settings = flow_log.map(|file| Settings { file, interval, sample });
        let flows = settings.map(FlowLog::open).transpose()?;
        let networks = Networks::open_with(directory.join("networks"), args.poll.policy(), flows)?;
        let mut parts = Parts { factory: networks.clone(), routes: Default::default() };
        parts.routes.add_service(NetworkCardServer::new(networks));
        Ok(parts)
    })
}
