//! `offload-net`: the network card's process.

use std::process::ExitCode;

use clap::Parser;
use offload_card::poll::PollArgs;
use offload_card::runtime::{self, CardArgs, Parts};
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
}

fn main() -> ExitCode {
    let args = Args::parse();
    runtime::run("offload-net", env!("CARGO_PKG_VERSION"), &args.card, |directory| {
        let networks = Networks::open(directory.join("networks"), args.poll.policy())?;
        let mut parts = Parts { factory: networks.clone(), routes: Default::default() };
        parts.routes.add_service(NetworkCardServer::new(networks));
        Ok(parts)
    })
}
