//! Bringing a VM up and taking it down: its devices on the cards, its process, its guest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::error::{Error, ErrorReason};
use proto::v1::hypervisor_client::HypervisorClient;
use proto::v1::{
    BootRequest, ConfigureRequest, EventsRequest, HypervisorConfig, HypervisorEvent, SlotConfig, VmSpec,
};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

use super::super::card::{Card, CardKind};
use super::super::cards::Placed;
use super::super::{Context, host, rpc};
use crate::runner::{Exit, Liveness};

/// Pauses between attempts to reach a process that has just been started.
const DIAL_FIRST: Duration = Duration::from_millis(1);
const DIAL_MOST: Duration = Duration::from_millis(50);

/// A guest that runs.
#[derive(Debug)]
pub(super) struct Up {
    pub(super) channel: Channel,
    pub(super) events: Streaming<HypervisorEvent>,
    pub(super) pid: u32,
}

/// What a VM needs of the host and its cards, checked before anything is changed.
pub(super) async fn check(ctx: &Context, id: &str, spec: &VmSpec) -> Result<(), Error> {
    let on_host = spec.clone();
    // The files may be on a file system that does not answer: no matter for other VMs.
    let checked = tokio::task::spawn_blocking(move || check_host(&on_host)).await;
    // It is only not run when the process is about to end.
    checked.unwrap_or(Ok(()))?;
    for disk in &spec.disks {
        ctx.cards.of_kind(&disk.card, CardKind::Storage).await?;
    }
    for nic in &spec.nics {
        ctx.cards.of_kind(&nic.card, CardKind::Network).await?;
    }
    for device in ctx.cards.devices_of(id, spec)? {
        device.card.check_device(&device.spec).await?;
    }
    Ok(())
}

/// The host's part of [`check`]: files and memory.
fn check_host(spec: &VmSpec) -> Result<(), Error> {
    if let Some(boot) = &spec.boot {
        host::check_kernel(&boot.kernel_path)?;
        if !boot.initramfs_path.is_empty() {
            host::check_initramfs(&boot.initramfs_path)?;
        }
    }
    match host::Memory::of_this_host() {
        Some(memory) => host::check_memory(spec.memory_bytes, memory),
        None => Ok(()),
    }
}

/// Makes the devices, starts the process, configures and boots. After an error [`take_down`] is due.
///
/// `cancel` turning true interrupts it; a request to a card is never interrupted, so that what exists there is known.
pub(super) async fn bring_up(
    ctx: Arc<Context>,
    id: String,
    spec: VmSpec,
    mut cancel: watch::Receiver<bool>,
) -> Result<Up, Error> {
    let devices = ctx.cards.devices_of(&id, &spec)?;
    let cancelled = async {
        // The sender lives as long as this future is polled.
        let _ = cancel.wait_for(|c| *c).await;
        Error::new(
            Code::Aborted,
            ErrorReason::WrongState,
            format!("VM {} was stopped while it started", spec.name),
        )
        .remedy("another command ended it; start or create it again")
    };
    tokio::pin!(cancelled);
    let process = async {
        tokio::select! {
            channel = start_process(&ctx, &id) => channel,
            error = &mut cancelled => Err(error),
        }
    };
    let (slots, channel) = tokio::join!(create_devices(&ctx, &devices), process);
    let (slots, channel) = (slots?, channel?);
    tokio::select! {
        up = boot(&ctx, &id, &spec, slots, channel) => up,
        error = &mut cancelled => Err(error),
    }
}

async fn create_devices(ctx: &Context, devices: &[Placed]) -> Result<Vec<SlotConfig>, Error> {
    let mut slots = Vec::with_capacity(devices.len());
    for placed in devices {
        let device = placed.card.create_device(&placed.spec, &ctx.store).await?;
        slots.push(SlotConfig {
            id: placed.slot.clone(),
            socket_path: device.socket_path,
            virtio_device_id: device.virtio_device_id,
            queues: device.queues,
            queue_size: device.queue_size,
            config_size: device.config_size,
            ..SlotConfig::default()
        });
    }
    Ok(slots)
}

/// Starts the process and waits until it listens.
async fn start_process(ctx: &Context, id: &str) -> Result<Channel, Error> {
    ctx.runner.start(id).await?;
    let socket = ctx.runner.control_socket(id);
    let listens = async {
        let mut pause = DIAL_FIRST;
        loop {
            let error = match rpc::dial(&socket).await {
                Ok(channel) => return Ok(channel),
                Err(e) => e,
            };
            if let Liveness::Ended(exit) = ctx.runner.liveness(id).await {
                return Err(ended_early(ctx, id, &exit));
            }
            tracing::trace!(vm = id, "{}: {error}", socket.display());
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(DIAL_MOST);
        }
    };
    tokio::time::timeout(ctx.deadlines.start, listens).await.unwrap_or_else(|_| {
        Err(Error::new(
            Code::Unavailable,
            ErrorReason::HypervisorUnreachable,
            format!("the hypervisor was started but does not listen on {}", socket.display()),
        )
        .resource(socket.display().to_string())
        .remedy(ctx.runner.log_hint(id)))
    })
}

async fn boot(
    ctx: &Context,
    id: &str,
    spec: &VmSpec,
    slots: Vec<SlotConfig>,
    channel: Channel,
) -> Result<Up, Error> {
    let mut client = HypervisorClient::new(channel.clone());
    let config = HypervisorConfig {
        vm_id: id.to_owned(),
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        boot: spec.boot.clone(),
        slots,
    };
    // Subscribed before anything can happen, so that nothing is missed.
    let subscribed = rpc::call(ctx.deadlines.hypervisor, client.events(EventsRequest {})).await;
    let events = settle(ctx, id, "Events", subscribed).await?;
    let request = ConfigureRequest { config: Some(config) };
    let configured = rpc::call(ctx.deadlines.configure, client.configure(request)).await;
    let info = settle(ctx, id, "Configure", configured).await?.info.unwrap_or_default();
    let booted = rpc::call(ctx.deadlines.hypervisor, client.boot(BootRequest {})).await;
    settle(ctx, id, "Boot", booted).await?;
    Ok(Up { channel, events, pid: info.pid })
}

/// The hypervisor's own error, or the best that can be said when it did not answer.
async fn settle<T>(ctx: &Context, id: &str, call: &str, result: Result<T, rpc::Failure>) -> Result<T, Error> {
    let why = match result {
        Ok(answer) => return Ok(answer),
        Err(rpc::Failure::Refused(e)) => return Err(e),
        Err(rpc::Failure::NoAnswer(why)) => why,
    };
    // The connection of a process that dies is closed a moment before it can be seen to be dead.
    for _ in 0..10 {
        if let Liveness::Ended(exit) = ctx.runner.liveness(id).await {
            return Err(ended_early(ctx, id, &exit));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err(Error::new(
        Code::Unavailable,
        ErrorReason::HypervisorUnreachable,
        format!("the hypervisor does not answer {call}: {why}"),
    )
    .resource(id)
    .remedy(ctx.runner.log_hint(id)))
}

fn ended_early(ctx: &Context, id: &str, exit: &Exit) -> Error {
    let how = if exit.how.is_empty() { "ended" } else { &exit.how };
    let message = match exit.last_words.as_str() {
        "" => format!("the hypervisor {how} while it was started"),
        words => format!("the hypervisor {how} while it was started; its last words: {words}"),
    };
    let error = Error::new(Code::Internal, ErrorReason::HypervisorUnreachable, message).resource(id);
    // The log itself is removed with everything else; its last line is in the message.
    error.remedy(if exit.last_words.is_empty() {
        ctx.runner.log_hint(id)
    } else {
        "put right what it says, and try again".to_owned()
    })
}

/// Ends the process, after `grace`, and then deletes the devices, on all cards at the same time. A card that does not
/// answer deletes them later.
///
/// # Errors
/// The process does not end. It may use its devices still, so they stay; this is to be called again.
pub(super) async fn take_down(ctx: &Context, id: &str, spec: &VmSpec, grace: Duration) -> Result<(), Error> {
    if let Err(e) = ctx.runner.stop(id, grace).await {
        tracing::error!(vm = id, "{e}");
        return Err(e);
    }
    let devices = match ctx.cards.devices_of(id, spec) {
        Ok(devices) => devices,
        Err(e) => {
            tracing::warn!(vm = id, "its devices are not deleted: {e}");
            return Ok(());
        }
    };
    let mut by_card: BTreeMap<String, (Arc<Card>, Vec<String>)> = BTreeMap::new();
    for device in devices {
        let entry = by_card.entry(device.card.name().to_owned());
        entry.or_insert_with(|| (Arc::clone(&device.card), Vec::new())).1.push(device.spec.id);
    }
    let mut deletions = JoinSet::new();
    for (card, ids) in by_card.into_values() {
        let store = ctx.store.clone();
        deletions.spawn(async move { card.delete_devices(&ids, &store).await });
    }
    deletions.join_all().await;
    Ok(())
}
