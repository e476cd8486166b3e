//! `offload-bench`: measurements of Outboard on the machine it runs on.

mod bench;
mod figures;
mod metric;
mod probe;
mod report;
mod results;
mod run;
mod sample;
mod source;
mod stats;
mod system;
mod vm;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use workload::Profile;

/// Measures Outboard on this machine.
///
/// Systems that are compared are run in turns within one run; what is printed is the median and the spread.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  offload-bench quick\n  offload-bench full -o results\n  offload-bench full --suite block --only qd32 --systems card,thread,qemu\n  offload-bench figures\n  offload-bench figures --rounds 51 --output json\n  \
                  offload-bench report results.json -o page.html\n  offload-bench compare before.json after.json"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Offloaded I/O against in-process I/O with the same guest: a glance, in less than three minutes.
    Quick(run::Options),
    /// The same in full, with all systems that are installed: most of an hour.
    Full {
        #[command(flatten)]
        options: run::Options,
        /// Every combination of parameters: a night.
        #[arg(long)]
        exhaustive: bool,
    },
    /// Whether this harness sees differences that are there, and none that are not.
    SelfTest {
        /// Where the test file (1 GiB) is made and kept.
        #[arg(long, value_name = "DIR", default_value = "/var/tmp/outboard-bench")]
        files: PathBuf,
    },
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
        /// File that `offload-bench full` has written.
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
        /// File that `offload-bench full` has written before.
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

fn status(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Quick(options) => return Ok(status(run::run(&options, Profile::Quick)?)),
        Command::Full { options, exhaustive } => {
            let profile = if exhaustive { Profile::Exhaustive } else { Profile::Full };
            return Ok(status(run::run(&options, profile)?));
        }
        Command::SelfTest { files } => return Ok(status(run::self_test::run(&files)?)),
        Command::Figures { rounds, output } => figures::run(rounds, output == Output::Json)?,
        Command::Report { results, output } => report::run(&results, output.as_deref())?,
        Command::Compare { old, new, threshold, output } => {
            return report::compare::run(&old, &new, threshold, output == Output::Json);
        }
    }
    Ok(ExitCode::SUCCESS)
}
