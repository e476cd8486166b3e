//! The command `outboard`: everything the API can do, for people and scripts.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use ipnet::IpNet;
use proto::v1::{
    BootSource, CaptureNicRequest, CreateNetworkRequest, CreateVmRequest, DeleteNetworkRequest,
    DeleteVmRequest, GetVmRequest, ListCardsRequest, ListNetworksRequest, ListVmsRequest, NetworkSpec,
    RebootVmRequest, ResizeDiskRequest, StartVmRequest, StopVmRequest, Vm, VmSpec, WatchEventsRequest,
};

mod args;
mod capture;
mod client;
mod console;
mod failure;
mod limit;
mod metadata;
mod options;
mod render;
mod security;
mod view;

use args::{CardCommand, Cli, Command, Create, NetworkCommand, Output, VmCommand};
use client::{Client, QUICK, SLOW};
use failure::{BUG, Failure};
use options::Size;

use crate::controller::rpc;

/// How long a repeated CreateVm waits for the controller to be back, and how often it looks.
const COMEBACK: (u32, Duration) = (40, Duration::from_millis(250));
/// What the controller needs to end a VM after its guest's time is up.
const STOP_MARGIN: Duration = Duration::from_secs(60);

/// The whole command.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            let hint = "the host is out of memory, threads or files (see: ulimit -a)".to_owned();
            return report(&Failure::Local(format!("the runtime cannot be started: {e}"), hint));
        }
    };
    let result = runtime.block_on(run(&cli));
    // A thread that still waits for a key must not hold up the end.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

fn report(failure: &Failure) -> ExitCode {
    // Nothing can be said about standard error failing.
    let _ = io::stderr().write_all(failure.text().as_bytes());
    failure.exit_code()
}

async fn run(cli: &Cli) -> Result<(), Failure> {
    let connect = || Client::connect(&cli.socket);
    match &cli.command {
        Command::Vm(command) => vm(cli, &connect().await?, command).await,
        Command::Network(command) => network(cli, &connect().await?, command).await,
        Command::SecurityGroup(command) => security::run(cli, &connect().await?, command).await,
        Command::Card(CardCommand::Ls) => {
            let client = connect().await?;
            let mut api = client.api();
            let answer = client.wait("Asking the cards", QUICK, api.list_cards(ListCardsRequest {})).await?;
            let cards: Vec<_> = answer.cards.into_iter().map(view::Card::from).collect();
            render::print(cli.output, &cards, || render::cards(&cards))
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "outboard", &mut script);
            Ok(io::stdout().lock().write_all(&script)?)
        }
    }
}

async fn vm(cli: &Cli, client: &Client, command: &VmCommand) -> Result<(), Failure> {
    let mut api = client.api();
    match command {
        VmCommand::Create(options) => create(cli, client, options).await,
        VmCommand::Ls => {
            let answer = client.wait("Asking the controller", QUICK, api.list_vms(ListVmsRequest {})).await?;
            let vms: Vec<_> = answer.vms.into_iter().map(|v| view::Vm::new(v, now_us())).collect();
            render::print(cli.output, &vms, || render::vms(&vms))
        }
        VmCommand::Show(name) => {
            let request = GetVmRequest { vm: name.vm.clone() };
            let vm = view::Vm::new(
                client.wait("Asking the controller", QUICK, api.get_vm(request)).await?,
                now_us(),
            );
            render::print(cli.output, &vm, || render::vm(&vm))
        }
        VmCommand::Start(name) => {
            let request = StartVmRequest { vm: name.vm.clone() };
            let vm = client.wait(&format!("Starting {}", name.vm), SLOW, api.start_vm(request)).await?;
            changed(cli, vm)
        }
        VmCommand::Stop { vm, timeout, force } => {
            let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1);
            let request = StopVmRequest { vm: vm.vm.clone(), graceful: !force, timeout_ms };
            let deadline = timeout.saturating_add(STOP_MARGIN).min(Duration::from_secs(2 * 86_400));
            let vm = client.wait(&format!("Stopping {}", vm.vm), deadline, api.stop_vm(request)).await?;
            changed(cli, vm)
        }
        VmCommand::Reboot(name) => {
            let request = RebootVmRequest { vm: name.vm.clone() };
            let vm = client.wait(&format!("Rebooting {}", name.vm), SLOW, api.reboot_vm(request)).await?;
            changed(cli, vm)
        }
        VmCommand::ResizeDisk { vm, disk, size } => {
            let size_bytes = size.map_or(0, |s| s.0);
            let request = ResizeDiskRequest { vm: vm.vm.clone(), disk: disk.clone(), size_bytes };
            let resized = client.wait(&format!("Resizing {disk}"), SLOW, api.resize_disk(request)).await?;
            let size = view::DiskSize { disk: disk.clone(), size_bytes: resized.size_bytes };
            render::print(cli.output, &size, || format!("{disk} has {}\n", Size(size.size_bytes)))
        }
        VmCommand::Limit(options) => limit::set(cli, client, options).await,
        VmCommand::Capture { vm, nic, snaplen, count } => {
            let request = CaptureNicRequest {
                vm: vm.vm.clone(),
                nic: nic.clone().unwrap_or_default(),
                snap_bytes: snaplen.unwrap_or_default(),
                frames: count.unwrap_or_default(),
            };
            capture::run(client, request).await
        }
        VmCommand::Rm { vm, force } => {
            let request = DeleteVmRequest { vm: vm.vm.clone(), force: *force };
            client.wait(&format!("Removing {}", vm.vm), SLOW, api.delete_vm(request)).await?;
            removed(cli, &vm.vm)
        }
        VmCommand::Console { vm, new } => console::attach(client, &vm.vm, *new).await,
        VmCommand::Events { vm } => events(cli, client, vm.clone().unwrap_or_default()).await,
        VmCommand::Stats(name) => {
            let request = GetVmRequest { vm: name.vm.clone() };
            let stats = client.wait("Asking the cards", QUICK, api.get_vm_stats(request)).await?;
            let stats = view::Stats::from(stats);
            render::print(cli.output, &stats, || render::stats(&stats))
        }
    }
}

async fn create(cli: &Cli, client: &Client, options: &Create) -> Result<(), Failure> {
    let path = |p: &str| {
        options::absolute(p).map_err(|e| Failure::Local(e, "give a path that can be written as text".into()))
    };
    let boot = BootSource {
        kernel_path: path(&options.kernel)?,
        initramfs_path: options.initramfs.as_deref().map(path).transpose()?.unwrap_or_default(),
        cmdline: options.cmdline.clone(),
    };
    let spec = VmSpec {
        name: options.name.clone(),
        vcpus: options.vcpus,
        memory_bytes: options.memory.0,
        boot: Some(boot),
        disks: options.disks.iter().map(|d| d.0.clone()).collect(),
        nics: options.nics.iter().map(|n| n.0.clone()).collect(),
        metadata: Some(metadata::of(options)?),
    };
    let client_token = options.token.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let request = CreateVmRequest { client_token, spec: Some(spec), no_start: options.no_start };
    let doing = format!("Creating {}", options.name);
    let mut api = client.api();
    let vm = match client.wait(&doing, SLOW, api.create_vm(request.clone())).await {
        // The controller was restarted in the middle. The token makes asking again safe.
        Err(Failure::Unreachable(..)) => {
            let client = reconnect(cli).await?;
            let mut api = client.api();
            client.wait(&doing, SLOW, api.create_vm(request)).await?
        }
        answer => answer?,
    };
    let vm = view::Vm::new(vm, now_us());
    render::print(cli.output, &vm, || format!("{} {}\n", vm.name, vm.id))
}

async fn reconnect(cli: &Cli) -> Result<Client, Failure> {
    let (attempts, pause) = COMEBACK;
    let back = async {
        let mut last = Client::connect(&cli.socket).await;
        for _ in 1..attempts {
            if last.is_ok() {
                break;
            }
            tokio::time::sleep(pause).await;
            last = Client::connect(&cli.socket).await;
        }
        last
    };
    client::with_progress("Waiting for the controller to come back", back).await
}

async fn events(cli: &Cli, client: &Client, vm: String) -> Result<(), Failure> {
    let mut api = client.api();
    let mut events =
        client.wait("Asking the controller", QUICK, api.watch_events(WatchEventsRequest { vm })).await?;
    loop {
        let event = events.message().await.map_err(|s| client.failure(rpc::failure(s)))?;
        let Some(event) = event else { return Ok(()) };
        let event = view::Event::from(event);
        let line = match cli.output {
            Output::Table => render::event(&event),
            Output::Json => {
                let json = serde_json::to_string(&event);
                json.map_err(|e| Failure::Local(format!("the event is no JSON: {e}"), BUG.to_owned()))? + "\n"
            }
        };
        let mut out = io::stdout().lock();
        out.write_all(line.as_bytes())?;
        out.flush()?;
    }
}

async fn network(cli: &Cli, client: &Client, command: &NetworkCommand) -> Result<(), Failure> {
    let mut api = client.api();
    match command {
        NetworkCommand::Create {
            name,
            tap,
            interface,
            gateway,
            addresses,
            prefixes,
            dns,
            nat,
            mtu,
            card,
        } => {
            let (ipv4_prefix, ipv6_prefix) = by_version(prefixes)?;
            let spec = NetworkSpec {
                id: name.clone(),
                tap: tap.clone().unwrap_or_default(),
                host_addresses: addresses.clone(),
                mtu: mtu.unwrap_or_default(),
                ipv4_prefix,
                ipv6_prefix,
                dns: dns.iter().map(ToString::to_string).collect(),
                nat: *nat,
                interface: interface.clone().unwrap_or_default(),
                gateway: gateway.map(|g| g.to_string()).unwrap_or_default(),
            };
            let card = card.clone().unwrap_or_default();
            let request = CreateNetworkRequest { spec: Some(spec), validate_only: false, card };
            let answer = client.wait(&format!("Creating {name}"), QUICK, api.create_network(request)).await?;
            let network = view::Network::from(answer);
            render::print(cli.output, &network, || format!("{}\n", network.id))
        }
        NetworkCommand::Ls => {
            let answer = client
                .wait("Asking the controller", QUICK, api.list_networks(ListNetworksRequest {}))
                .await?;
            let networks: Vec<_> = answer.networks.into_iter().map(view::Network::from).collect();
            render::print(cli.output, &networks, || render::networks(&networks))
        }
        NetworkCommand::Rm { name } => {
            let request = DeleteNetworkRequest { id: name.clone() };
            client.wait(&format!("Removing {name}"), QUICK, api.delete_network(request)).await?;
            removed(cli, name)
        }
    }
}

/// One prefix of each version at most, as text.
fn by_version(prefixes: &[IpNet]) -> Result<(String, String), Failure> {
    let of = |v4: bool| {
        let mut all = prefixes.iter().filter(|p| matches!(p, IpNet::V4(_)) == v4).map(ToString::to_string);
        (all.next().unwrap_or_default(), all.next())
    };
    match (of(true), of(false)) {
        ((ipv4, None), (ipv6, None)) => Ok((ipv4, ipv6)),
        _ => Err(Failure::Local(
            "a network has one prefix of each IP version".to_owned(),
            "give --prefix once for IPv4 and once for IPv6, and make further networks for the others"
                .to_owned(),
        )),
    }
}

/// What a VM has become.
fn changed(cli: &Cli, vm: Vm) -> Result<(), Failure> {
    let vm = view::Vm::new(vm, now_us());
    render::print(cli.output, &vm, || match vm.detail.as_str() {
        "" => format!("{} is {}\n", vm.name, vm.state),
        detail => format!("{} is {}: {detail}\n", vm.name, vm.state),
    })
}

fn removed(cli: &Cli, name: &str) -> Result<(), Failure> {
    let json = serde_json::json!({ "removed": name });
    render::print(cli.output, &json, || format!("{name} is removed\n"))
}

fn now_us() -> i64 {
    crate::controller::now_us()
}
