//! `offload-bench`: measurements of Outboard on the machine it runs on.

mod figures;
mod metric;
mod report;
mod results;
mod source;
mod stats;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

/// Measures Outboard on this machine.
///
/// Systems that are compared are run in turns within one run; what is printed is the median and the spread.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  offload-bench figures\n  offload-bench figures --rounds 51 --output json\n  \
                  offload-bench report results.json -o page.html\n  offload-bench compare before.json after.json"
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
    /// The results of a run as tables, or as a page for the browser.
    Report {
        /// File that `offload-bench run` has written.
        results: PathBuf,
        /// Write a self-contained HTML page instead.
        #[arg(short, long, value_name = "PAGE.html")]
        output: Option<PathBuf>,
    },
    /// What got slower or faster from one run to another.
    ///
    /// A change is what the bootstrap tells from the scatter of rounds (95 %) and is beyond the threshold. Exit status: 0 if
    /// nothing got slower, 1 if something did, 2 on errors.
    Compare {
        /// File that `offload-bench run` has written before.
        old: PathBuf,
        /// File that it has written since.
        new: PathBuf,
        /// Smaller differences are no change.
        #[arg(long, default_value = "5%", value_parser = report::compare::parse_threshold)]
        threshold: f64,
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

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Figures { rounds, output } => figures::run(rounds, output == Output::Json)?,
        Command::Report { results, output } => report::run(&results, output.as_deref())?,
        Command::Compare { old, new, threshold, output } => {
            return report::compare::run(&old, &new, threshold, output == Output::Json);
        }
    }
    Ok(ExitCode::SUCCESS)
}
