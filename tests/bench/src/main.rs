//! `offload-bench`: measurements of Outboard on the machine it runs on.

mod figures;
mod source;
mod stats;

use clap::{Parser, Subcommand, ValueEnum};

/// Measures Outboard on this machine.
///
/// Systems that are compared are run in turns within one run; what is printed is the median and the spread.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  offload-bench figures\n  offload-bench figures --rounds 51 --output json"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start-up time, memory of a hypervisor beyond its guest's RAM, and size of its source.
    Figures {
        /// Starts of each system.
        #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u32).range(3..=1000))]
        rounds: u32,
        /// How to print the result.
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Figures { rounds, output } => figures::run(rounds, output == Output::Json),
    }
}
