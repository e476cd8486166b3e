//! `outboard-hypervisor`: one virtual machine per process. See the library.

use std::process::ExitCode;
use std::time::Instant;

use hypervisor::cli::{self, Command};

fn main() -> ExitCode {
    let started = Instant::now();
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => {
            print!("{}", cli::HELP);
            ExitCode::SUCCESS
        }
        Ok(Command::Version) => {
            println!("outboard-hypervisor {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Command::Run(options)) => hypervisor::process::run(&options, started),
        Err(e) => {
            eprintln!("outboard-hypervisor: {e}");
            ExitCode::from(2)
        }
    }
}
