//! The card's process: from its command line to its exit status.
//!
//! ```no_run
//! # use std::process::ExitCode;
//! # fn card(args: offload_card::runtime::CardArgs) -> ExitCode {
//! # struct Factory;
//! # impl offload_card::DeviceFactory for Factory {
//! #     fn validate(&self, _: &proto::v1::DeviceSpec) -> Result<offload_card::Identity, proto::error::Error> { panic!() }
//! #     fn create(&self, _: &proto::v1::DeviceSpec, _: offload_card::ConfigNotifier)
//! #         -> Result<std::sync::Arc<dyn offload_card::Device>, proto::error::Error> { panic!() }
//! # }
//! offload_card::runtime::run("offload-xyz", env!("CARGO_PKG_VERSION"), &args, |_runtime_dir| {
//!     let factory = std::sync::Arc::new(Factory);
//!     // Services of this kind of card are added to `routes`; `Card` is there already.
//!     Ok(offload_card::runtime::Parts { factory, routes: Default::default() })
//! })
//! # }
//! ```
//!
//! In order: log, runtime directory, the card's own state (`build`), devices made again from their records, control
//! socket, readiness. A device that cannot be made again (its image is gone) is logged, listed as broken and tried
//! again from time to time; the controller can delete it. One whose storage does not answer holds readiness up for
//! [`RESTORE_TIMEOUT`] at most.
//!
//! A device's socket is kept by the service manager, if there is one: front-ends connect to it while no process serves it, and
//! are served by the next one.
//!
//! SIGTERM or SIGINT: the control socket closes, every device finishes what is in flight (for at most
//! [`DRAIN_TIMEOUT`]), and the process exits with 0; records stay, so the next process has the same devices.

mod control;
mod kept;
mod metrics;
mod records;
mod registry;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::error::Error;
use proto::socket;
use proto::v1::ErrorReason;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Code;
use tonic::service::RoutesBuilder;
use tonic::transport::Server;
use tracing::{debug, error, info};
use tracing_subscriber::EnvFilter;

use crate::factory::DeviceFactory;
use crate::schedule::{self, Turn};
use control::ControlService;
use kept::KeptSockets;
use registry::Registry;

/// How long a graceful stop waits for what is in flight. What is not finished by then stays recorded as in flight, and
/// is done again by the next process.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Where Prometheus finds the card's numbers, in its runtime directory.
pub const METRICS_SOCKET: &str = "metrics.sock";

/// How long readiness waits for devices to be made again. A storage that does not answer must not keep the others' guests
/// waiting; its own device is tried on.
pub const RESTORE_TIMEOUT: Duration = Duration::from_secs(3);

/// The command line every card has; `#[command(flatten)]` it into the binary's own.
#[derive(Debug, Clone, clap::Args)]
pub struct CardArgs {
    /// Unix socket of the control service. Not used when systemd passes a listening socket (LISTEN_FDS).
    #[arg(long, value_name = "SOCKET")]
    pub control: PathBuf,
    /// Directory for device sockets and for the records from which devices are made again after a crash.
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: PathBuf,
    /// Serve Prometheus metrics on this loopback address, beside the socket metrics.sock in the runtime directory.
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = metrics::loopback)]
    pub metrics_listen: Option<SocketAddr>,
    /// What to log: error, warn, info, debug, trace, or a filter as of tracing-subscriber.
    #[arg(long, value_name = "FILTER", env = "OUTBOARD_LOG", default_value = "info")]
    pub log: String,
}

/// What a kind of card adds to the runtime.
#[derive(Debug)]
pub struct Parts<F> {
    /// Makes its devices.
    pub factory: F,
    /// Its own gRPC services.
    pub routes: RoutesBuilder,
}

/// Runs a card until it is told to stop. `kind` is its name in `CardInfo.kind`. `build` gets the runtime directory, which
/// exists then, and restores what the card keeps beside devices.
pub fn run<F: DeviceFactory>(
    kind: &'static str,
    version: &'static str,
    args: &CardArgs,
    build: impl FnOnce(&Path) -> Result<Parts<F>, Error>,
) -> ExitCode {
    if let Err(e) = start_log(&args.log) {
        eprintln!("{kind}: {e}");
        return ExitCode::from(2);
    }
    match serve(kind, version, args, build) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn start_log(filter: &str) -> Result<(), Error> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|e| Error::invalid_field("log", format!("log filter {filter:?} is not valid: {e}")))?;
    let log = tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(filter).with_target(false);
    // Under systemd the journal has the time already.
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().with_ansi(false).init();
    } else {
        log.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).init();
    }
    Ok(())
}

fn serve<F: DeviceFactory>(
    kind: &'static str,
    version: &'static str,
    args: &CardArgs,
    build: impl FnOnce(&Path) -> Result<Parts<F>, Error>,
) -> Result<(), Error> {
    let host = |what: &str, e: io::Error| host_error(what, &e);
    records::make_directory(&args.runtime_dir, 0o755)?;
    let devices = args.runtime_dir.join("devices");
    records::make_device_directory(&devices)?;
    let Parts { factory, mut routes } = build(&args.runtime_dir)?;
    let (control, kept) = KeptSockets::from_environment().map_err(|e| control_failed(&args.control, &e))?;
    let registry = Arc::new(Registry::new(factory, devices, kept));
    // Guests may be waiting. The threads that talk to front-ends stay so.
    let soon = schedule::set(Turn::Soon);
    registry.restore(Instant::now() + RESTORE_TIMEOUT);
    if let Err(e) = soon.and_then(|()| schedule::set(Turn::Usual)) {
        debug!("the scheduler does not let threads run sooner: {e}");
    }
    // The one that systemd has passed is not ours to remove.
    let bound = control.is_none();
    let listener = match control {
        Some(listener) => listener,
        None => socket::listen(&args.control, |_| {}).map_err(|e| control_failed(&args.control, &e))?,
    };
    listener.set_nonblocking(true).map_err(|e| host("cannot set up the control socket", e))?;
    let metrics_socket = args.runtime_dir.join(METRICS_SOCKET);
    let (metrics_unix, metrics_tcp) = metrics_listeners(&metrics_socket, args.metrics_listen)?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| host("cannot start the control service", e))?;
    let served = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let scraped = registry.clone();
        let prefix = format!("outboard_{}", kind.trim_start_matches("offload-"));
        metrics::serve(
            tokio::net::UnixListener::from_std(metrics_unix)?,
            metrics_tcp.map(tokio::net::TcpListener::from_std).transpose()?,
            Arc::new(move || {
                let (stats, lost) = scraped.numbers();
                crate::metrics::encode(&prefix, version, &stats, lost)
            }),
        );
        let service = ControlService::new(kind, version, registry.clone());
        routes.add_service(proto::v1::card_server::CardServer::new(service));
        let incoming = UnixListenerStream::new(tokio::net::UnixListener::from_std(listener)?);
        let server = Server::builder().serve_with_incoming(routes.routes().prepare(), incoming);
        info!(
            "{kind} {version} serves {} devices, control socket {}",
            registry.len(),
            args.control.display()
        );
        notify(&[NotifyState::Ready]);
        tokio::select! {
            served = server => served.map_err(io::Error::other),
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    });
    // Calls that still run in worker threads may hang on a dead storage: nobody waits for them.
    runtime.shutdown_background();
    notify(&[NotifyState::Stopping]);
    info!("stopping");
    if bound {
        let _ = std::fs::remove_file(&args.control);
    }
    let _ = std::fs::remove_file(&metrics_socket);
    registry.stop_all(DRAIN_TIMEOUT);
    served.map_err(|e| host("the control service failed", e))
}

/// Tells systemd, if it asked to be told.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        error!("cannot notify systemd: {e}");
    }
}

fn control_failed(path: &Path, e: &io::Error) -> Error {
    host_error(&format!("cannot listen on control socket {}", path.display()), e)
        .resource(path.display().to_string())
        .remedy("check that its directory exists and may be written to")
}

/// Where metrics are served.
fn metrics_listeners(
    path: &Path,
    address: Option<SocketAddr>,
) -> Result<(UnixListener, Option<TcpListener>), Error> {
    let failed = |place: String| {
        move |e: io::Error| {
            host_error(&format!("cannot serve metrics on {place}"), &e)
                .resource(place.clone())
                .remedy("check that nothing else is there, and that the card may listen there")
        }
    };
    let unix = socket::listen(path, |_| {}).and_then(|l| l.set_nonblocking(true).map(|()| l));
    let unix = unix.map_err(failed(path.display().to_string()))?;
    let Some(address) = address else { return Ok((unix, None)) };
    let tcp = TcpListener::bind(address).and_then(|l| l.set_nonblocking(true).map(|()| l));
    Ok((unix, Some(tcp.map_err(failed(address.to_string()))?)))
}

/// The host said no.
pub(crate) fn host_error(what: &str, e: &io::Error) -> Error {
    let (code, reason) = match e.kind() {
        io::ErrorKind::PermissionDenied => (Code::PermissionDenied, ErrorReason::PermissionDenied),
        _ => (Code::Internal, ErrorReason::Host),
    };
    let error = Error::new(code, reason, format!("{what}: {e}"));
    match e.raw_os_error() {
        Some(errno) => error.with("errno", errno.to_string()),
        None => error,
    }
}
