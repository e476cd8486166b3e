//! `offload-blk`: the storage card.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use offload_blk::{IoEngine, MapLimit, Register, StorageCard, StorageService};
use offload_card::poll::PollArgs;
use offload_card::runtime::{self, CardArgs, Parts};
use proto::v1::storage_card_server::StorageCardServer;
use tonic::service::RoutesBuilder;

/// Outboard's storage card: serves disks to virtual machines over vhost-user.
///
/// Disks are made and removed by the controller over the control socket; they come back by themselves when the card is
/// started again with the same runtime directory.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Example:\n  offload-blk --control /run/outboard-blk/control.sock --runtime-dir /run/outboard-blk"
)]
struct Args {
    #[command(flatten)]
    card: CardArgs,
    /// How to do I/O.
    #[arg(long, value_enum, default_value_t)]
    io: IoEngine,
    /// Whether guest memory that disks without the page cache use again and again is registered with the kernel, which keeps it
    /// in memory and makes requests cheaper.
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    register_memory: Register,
    /// How much of the disks' images may be mapped in all, in MiB, to read what is in the page cache without system calls; 0:
    /// nothing. A GiB that is mapped costs 2 MiB of page tables, and 14 ms of the pause when the card is killed.
    #[arg(long, value_name = "MIB", default_value_t = MapLimit::DEFAULT_BYTES >> 20)]
    map_mib: u64,
    #[command(flatten)]
    poll: PollArgs,
}

fn main() -> ExitCode {
    let args = Args::parse();
    runtime::run("offload-blk", env!("CARGO_PKG_VERSION"), &args.card, |runtime_dir| {
        let factory = Arc::new(StorageCard::new(
            args.io,
            args.register_memory,
            MapLimit::new(args.map_mib.saturating_mul(1 << 20)),
            args.poll.policy(),
            runtime_dir,
        )?);
        let mut routes = RoutesBuilder::default();
        routes.add_service(StorageCardServer::new(StorageService(factory.clone())));
        Ok(Parts { factory, routes })
    })
}
