//! `outboard-mgmt`: the controller daemon.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use offload_mgmt::controller::{Api, CardConfig, Config, Controller, Deadlines};
use offload_mgmt::runner::{ProcessRunner, Runner, SystemdRunner};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The hypervisor's file name.
const HYPERVISOR: &str = "outboard-hypervisor";

/// Outboard's controller: creates and keeps VMs, and answers the management API on a Unix socket.
///
/// It may be stopped, killed and restarted at any time: VMs run on, and the next controller finds them again.
#[derive(Debug, Parser)]
#[command(name = "outboard-mgmt", version = offload_mgmt::VERSION, after_help = EXAMPLES)]
struct Args {
    /// Socket of the management API
    #[arg(long, value_name = "SOCKET", default_value = "/run/outboard/api.sock")]
    api_socket: PathBuf,
    /// Where the database of VMs and networks is
    #[arg(long, value_name = "DIR", default_value = "/var/lib/outboard")]
    state_dir: PathBuf,
    /// Where the sockets and logs of hypervisors are that run as processes of this daemon
    #[arg(long, value_name = "DIR", default_value = "/run/outboard")]
    runtime_dir: PathBuf,
    /// A card by the name that devices use and its control socket; may be given several times
    #[arg(
        long = "card",
        value_name = "NAME=SOCKET",
        default_values = ["blk=/run/outboard-blk/control.sock", "net=/run/outboard-net/control.sock"]
    )]
    cards: Vec<CardConfig>,
    /// The hypervisor's program [default: outboard-hypervisor beside this program, else on PATH]
    #[arg(long, value_name = "PATH")]
    hypervisor: Option<PathBuf>,
    /// How hypervisors are started: as systemd units outboard-vm@ID.service or as processes; auto is systemd where it runs
    #[arg(long, value_enum, default_value_t = RunnerKind::Auto)]
    runner: RunnerKind,
    /// What is logged: error, warn, info, debug, trace, or a tracing filter
    #[arg(long, value_name = "LEVEL", env = "OUTBOARD_LOG", default_value = "info")]
    log: String,
}

const EXAMPLES: &str = "\
Examples:
  outboard-mgmt
  outboard-mgmt --card fast=/run/fast/control.sock --card net=/run/outboard-net/control.sock
  outboard-mgmt --runner process --api-socket /tmp/api.sock --state-dir /tmp/state --runtime-dir /tmp/run";

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RunnerKind {
    Auto,
    Systemd,
    Process,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(e) = init_log(&args.log) {
        eprintln!("error: --log {}: {e}\nhint: give error, warn, info, debug or trace", args.log);
        return ExitCode::from(2);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(args)),
        Err(e) => Err(format!("the runtime cannot be started: {e}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<(), String> {
    // Installed before anything is started, so that no moment is left in which the signal kills.
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| e.to_string())?;

    let config = Config {
        runner: runner(&args),
        state_dir: args.state_dir,
        cards: args.cards,
        deadlines: Deadlines::default(),
    };
    let controller = Controller::start(config).await.map_err(|e| e.to_string())?;
    let api = Api::bind(&args.api_socket).map_err(|e| chain(&e))?;
    tracing::info!("serving {}", args.api_socket.display());
    if let Err(e) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!("systemd is not told that the service is ready: {e}");
    }
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; VMs run on");
        // Not under systemd, or about to end anyway.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    };
    api.serve(controller, stop).await.map_err(|e| chain(&e))
}

fn runner(args: &Args) -> Arc<dyn Runner> {
    let systemd = match args.runner {
        RunnerKind::Systemd => true,
        RunnerKind::Process => false,
        RunnerKind::Auto => sd_notify::booted().unwrap_or(false),
    };
    if systemd {
        return Arc::new(SystemdRunner::default());
    }
    let hypervisor = args.hypervisor.clone().unwrap_or_else(|| {
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(HYPERVISOR)));
        beside.filter(|p| p.is_file()).unwrap_or_else(|| HYPERVISOR.into())
    });
    Arc::new(ProcessRunner::new(&hypervisor, &args.runtime_dir.join("vms")))
}

fn init_log(filter: &str) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::builder().parse(filter)?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // The journal has its own time stamps.
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().init();
    } else {
        log.init();
    }
    Ok(())
}

/// An error and its sources on one line.
fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(e) = source {
        text.push_str(&format!(": {e}"));
        source = e.source();
    }
    text
}
