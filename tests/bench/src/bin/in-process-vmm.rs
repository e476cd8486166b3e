//! Outboard's hypervisor and the cards' engines in one process, for `offload-bench` to compare with.
//!
//! The control path is the same as between processes: the slot connects to the device by vhost-user, over a socket in this
//! process. So are the rings, the eventfds and the engine. What differs is where the engine's code runs: on a thread of this
//! process, or in the thread of the vCPU that notifies it. For a product this is what Outboard is not: whoever gets out of the
//! guest has the disk.

use std::ffi::OsString;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clap::{Parser, ValueEnum};
use hypervisor::cli::{self, Command};
use hypervisor::process;
use hypervisor::slot::{Notifications, Options};
use offload_blk::{
    BlockDevice, DiskConfig, Image, Inline, IoEngine, Progress, QueueHost, QueueStart, Store, Threads,
};
use offload_card::poll::PollPolicy;
use offload_card::server::DeviceServer;
use offload_card::{ConfigNotifier, Device, DeviceFactory};
use offload_net::registry::Networks;
use proto::error::Error;
use proto::v1::{DeviceSpec, NetDeviceSpec, NetworkSpec, device_spec::Kind};

const QUEUE_SIZE: u16 = 256;
const NETWORK: &str = "bench";

/// Outboard's hypervisor with a device's engine in its own process: a system for `offload-bench` to compare with.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Which thread does a disk's I/O.
    #[arg(long, value_enum, default_value = "thread")]
    io: Host,
    /// Wait so many nanoseconds before requests that have come are looked at, with `--io thread`: for the test of offload-bench.
    #[arg(long, default_value_t = 0)]
    delay_ns: u32,
    /// Directory for sockets and state, made if it is not there.
    #[arg(long)]
    dir: PathBuf,
    /// A disk: `null=BYTES`, `file=PATH`, or `direct=PATH` for O_DIRECT.
    #[arg(long, value_parser = disk)]
    disk: Option<Disk>,
    /// Request queues of the disk.
    #[arg(long, default_value_t = 1)]
    queues: u16,
    /// A network device on this TAP.
    #[arg(long, requires = "mac")]
    tap: Option<String>,
    /// Its MAC address.
    #[arg(long, value_parser = mac)]
    mac: Option<[u8; 6]>,
    /// Options of outboard-hypervisor.
    #[arg(last = true)]
    hypervisor: Vec<OsString>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Host {
    /// One of its own.
    Thread,
    /// The vCPU's that notifies the queue.
    Inline,
}

#[derive(Clone)]
enum Disk {
    Null(u64),
    File { path: String, direct: bool },
}

fn disk(text: &str) -> Result<Disk, String> {
    let (kind, value) = text.split_once('=').ok_or("expected null=BYTES, file=PATH or direct=PATH")?;
    match kind {
        "null" => value.parse().map(Disk::Null).map_err(|e| format!("{value}: {e}")),
        "file" | "direct" => Ok(Disk::File { path: value.to_owned(), direct: kind == "direct" }),
        _ => Err(format!("{kind} is not null, file or direct")),
    }
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>();
    bytes.ok().and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| format!("{text} is no MAC address"))
}

fn main() -> ExitCode {
    let started = Instant::now();
    match run(&Args::parse(), started) {
        Ok(status) => status,
        Err(e) => {
            eprintln!("in-process-vmm: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, started: Instant) -> anyhow::Result<ExitCode> {
    std::fs::create_dir_all(&args.dir).with_context(|| format!("creating {}", args.dir.display()))?;
    let mut arguments = args.hypervisor.clone();
    let mut servers = Vec::new();
    let mut inline = None;
    if let Some(disk) = args.disk.clone() {
        let host: Arc<dyn QueueHost> = match args.io {
            Host::Thread if args.delay_ns == 0 => Arc::new(Threads::default()),
            Host::Thread => Arc::new(Slowed(Duration::from_nanos(args.delay_ns.into()))),
            Host::Inline => inline.insert(Arc::new(Inline::new(args.queues))).clone(),
        };
        let config = DiskConfig {
            name: "disk".into(),
            store: store(disk).map_err(say)?,
            queues: args.queues,
            queue_size: QUEUE_SIZE,
            serial: "disk".into(),
            engine: IoEngine::Auto,
            register: Default::default(),
            map_limit: Default::default(),
            poll: PollPolicy::default(),
            host,
            storage: Arc::default(),
            mode_file: None,
        };
        let device = Arc::new(BlockDevice::new(config).map_err(say)?);
        servers.push(serve(args, "disk", device, &ConfigNotifier::default(), &mut arguments)?);
    }
    if let (Some(tap), Some(mac)) = (&args.tap, args.mac) {
        let networks = Networks::open(args.dir.join("networks"), PollPolicy::default()).map_err(say)?;
        let spec = NetworkSpec { id: NETWORK.into(), tap: tap.clone(), ..Default::default() };
        Networks::create(&networks, &spec, false).map_err(say)?;
        let net = NetDeviceSpec { network: NETWORK.into(), mac: mac.to_vec(), ..Default::default() };
        let notifier = ConfigNotifier::default();
        let spec =
            DeviceSpec { id: "nic".into(), kind: Some(Kind::Net(net)), limits: None, net_limits: None };
        let device = DeviceFactory::create(&networks, &spec, notifier.clone()).map_err(say)?;
        servers.push(serve(args, "nic", device, &notifier, &mut arguments)?);
    }
    let options = match cli::parse(arguments)? {
        Command::Run(options) => options,
        Command::Help | Command::Version => {
            return Err(anyhow!("see outboard-hypervisor --help for its options"));
        }
    };
    let notify = inline.map(|inline| Notifications::Call(Arc::new(move |queue| inline.notify(queue))));
    let slot_options = Options { notifications: notify.unwrap_or_default() };
    let status = process::run_with(&options, started, Arc::new(move |_| slot_options.clone()));
    drop(servers);
    Ok(status)
}

/// A thread per queue that polls, and dawdles after everything it has found.
#[derive(Debug)]
struct Slowed(Duration);

impl QueueHost for Slowed {
    fn serve(&self, queue: QueueStart) -> Result<(), Error> {
        let delay = self.0;
        std::thread::spawn(move || {
            // The front-end is told by the end of the queue.
            let Ok(mut queue) = queue.open() else { return };
            loop {
                let began = Instant::now();
                match queue.turn() {
                    Progress::Ended => return,
                    Progress::Worked => while began.elapsed() < delay {},
                    Progress::Waiting | Progress::Throttled | Progress::Idle => {}
                }
            }
        });
        Ok(())
    }
}

fn say(error: Error) -> anyhow::Error {
    anyhow::Error::new(error)
}

fn store(disk: Disk) -> Result<Store, Error> {
    match disk {
        Disk::Null(bytes) => Store::null(bytes, false),
        Disk::File { path, direct } => {
            Image::open(&path, false, direct).map(|image| Store::Image(Arc::new(image)))
        }
    }
}

/// Serves a device on a socket, and plugs it into the hypervisor's next slot.
fn serve(
    args: &Args,
    name: &str,
    device: Arc<dyn Device>,
    notifier: &ConfigNotifier,
    arguments: &mut Vec<OsString>,
) -> anyhow::Result<DeviceServer> {
    let path = args.dir.join(format!("{name}.sock"));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))?;
    let identity = device.identity();
    arguments.push("--device".into());
    arguments.push(
        format!(
            "{},id={},queues={},queue-size={},config-size={}",
            path.display(),
            identity.virtio_id,
            identity.queues,
            identity.max_queue_size,
            identity.config_size
        )
        .into(),
    );
    DeviceServer::start(name, device, listener, notifier).with_context(|| format!("serving {name}"))
}
