//! One card as the controller sees it: calls with deadlines, and what should exist on it.
//!
//! Cards keep their devices themselves and come back with them. What a card has lost all the same (its runtime
//! directory is gone) is made again when a link to it breaks and when the controller starts: every request is
//! idempotent, so asking for what is there does no harm. A device or network that could not be deleted because its card
//! did not answer is remembered and deleted when it does. With nothing to do, nothing is sent.

mod security;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use proto::error::{Error, ErrorReason};
use proto::v1::card_client::CardClient;
use proto::v1::network_card_client::NetworkCardClient;
use proto::v1::storage_card_client::StorageCardClient;
use proto::v1::{
    CardInfo, CreateDeviceRequest, CreateNetworkRequest, DeleteDeviceRequest, DeleteNetworkRequest, Device,
    DeviceLimits, DeviceSpec, DeviceStats, GetCardStatsRequest, IdentifyRequest, NetLimits, Network,
    NetworkSpec, ResizeDeviceRequest, SecurityGroupSpec, SetLimitsRequest,
};
use tokio::sync::{Notify, OwnedMutexGuard};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::rpc::{self, Failure};
use super::store::Store;

/// Pauses between attempts to bring a card to what it should be.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MOST: Duration = Duration::from_secs(30);

/// What a network still to be deleted begins with among the leftovers; no device's id has a '/'.
const NETWORK: &str = "network/";

/// What a card serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CardKind {
    /// `offload-blk`.
    Storage,
    /// `offload-net`.
    Network,
    /// A card of another kind, which no device of ours can be on.
    Other,
}

/// A card, whether it answers or not.
#[derive(Debug)]
pub(crate) struct Card {
    name: String,
    socket: PathBuf,
    deadline: Duration,
    channel: Mutex<Option<Channel>>,
    kind: OnceLock<CardKind>,
    wanted: Mutex<Wanted>,
    changed: Notify,
    // A lock for every id that something is being done to: see `alone`.
    busy: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// What should exist on a card.
#[derive(Debug, Default)]
struct Wanted {
    networks: BTreeMap<String, NetworkSpec>,
    security_groups: BTreeMap<String, SecurityGroupSpec>,
    devices: BTreeMap<String, DeviceSpec>,
    /// To be deleted: devices by id, networks by [`NETWORK`] and id, security groups by
    /// [`security::GROUP`] and id.
    leftovers: BTreeSet<String>,
}

impl Card {
    /// A card that is dialled when first needed. Every call to it ends within `deadline`, or two of them where a
    /// connection turns out to be stale.
    pub(crate) fn new(name: &str, socket: &Path, deadline: Duration) -> Self {
        Self {
            name: name.to_owned(),
            socket: socket.to_owned(),
            deadline,
            channel: Mutex::default(),
            kind: OnceLock::new(),
            wanted: Mutex::default(),
            changed: Notify::new(),
            busy: Mutex::default(),
        }
    }

    /// The name devices choose it by.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its control socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Who it is.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or what it answers.
    pub(crate) async fn identify(&self) -> Result<CardInfo, Error> {
        let info = self
            .call(|c| async move { CardClient::new(c).identify(IdentifyRequest {}).await })
            .await
            .map_err(|f| self.error(f))?;
        let kind = match info.kind.as_str() {
            "offload-blk" => CardKind::Storage,
            "offload-net" => CardKind::Network,
            _ => CardKind::Other,
        };
        // The kind of a card's first answer stands: a name means one card.
        let _ = self.kind.set(kind);
        Ok(info)
    }

    /// What it serves, asked once.
    ///
    /// # Errors
    /// As [`Card::identify`].
    pub(crate) async fn kind(&self) -> Result<CardKind, Error> {
        if let Some(kind) = self.kind.get() {
            return Ok(*kind);
        }
        self.identify().await?;
        Ok(self.kind.get().copied().unwrap_or(CardKind::Other))
    }

    /// Asks whether a device could be made.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or what is wrong with the specification.
    pub(crate) async fn check_device(&self, spec: &DeviceSpec) -> Result<(), Error> {
        self.request_device(spec, true).await.map(|_| ()).map_err(|f| self.error(f))
    }

    /// Makes a device, and its network if the card has lost it. From now on it should exist.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or why the card does not make it. It may exist all the same when there was no answer:
    /// [`Card::delete_devices`] settles that.
    pub(crate) async fn create_device(&self, spec: &DeviceSpec, store: &Store) -> Result<Device, Error> {
        let _alone = self.alone(&spec.id).await;
        self.keep_leftover(&spec.id, store).await?;
        let device = self.request_device(spec, false).await.map_err(|f| self.error(f))?;
        self.want_device(spec);
        Ok(device)
    }

    /// A device that should exist, and may already.
    pub(crate) fn want_device(&self, spec: &DeviceSpec) {
        self.wanted().devices.insert(spec.id.clone(), spec.clone());
    }

    /// Sets what a device may do per second. One that the card has lost gets it when it is made again.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or why the card does not do it. It is to be as it was before; [`Card::look_after`] sees to that.
    pub(crate) async fn set_limits(
        &self,
        id: &str,
        limits: Option<DeviceLimits>,
        net_limits: Option<NetLimits>,
    ) -> Result<(), Error> {
        let _alone = self.alone(id).await;
        let request = SetLimitsRequest { id: id.to_owned(), limits, net_limits };
        let answer = self
            .call(|c| {
                let request = request.clone();
                async move { CardClient::new(c).set_limits(request).await }
            })
            .await;
        match answer {
            Err(Failure::Refused(e)) if e.code() == Code::NotFound => self.look_after(),
            Err(failure) => {
                // Without an answer they may be set.
                self.look_after();
                return Err(self.error(failure));
            }
            Ok(_) => {}
        }
        if let Some(spec) = self.wanted().devices.get_mut(id) {
            (spec.limits, spec.net_limits) = (limits, net_limits);
        }
        Ok(())
    }

    /// Deletes devices that may exist. If the card does not answer, that is remembered and done when it does; after the
    /// first it does not answer for it is not asked for the others, so that a hung card costs its deadline once.
    pub(crate) async fn delete_devices(&self, ids: &[String], store: &Store) {
        {
            let mut wanted = self.wanted();
            wanted.devices.retain(|id, _| !ids.contains(id));
        }
        let mut left = Vec::new();
        let mut ids = ids.iter();
        for id in ids.by_ref() {
            let Err(failure) = self.delete_device(id).await else { continue };
            let silent = matches!(failure, Failure::NoAnswer(_));
            let why = self.error(failure);
            tracing::warn!(card = self.name, device = id, "device not deleted, will be later: {why}");
            left.push(id);
            if silent {
                break;
            }
        }
        left.extend(ids);
        for id in left {
            self.leave(id, store).await;
        }
    }

    /// One of them. Waiting for what else is being done to it counts as waiting for the card.
    async fn delete_device(&self, id: &str) -> Result<(), Failure> {
        let deleted = async {
            let _alone = self.alone(id).await;
            self.request_delete(id).await
        };
        let in_time = tokio::time::timeout(self.deadline, deleted).await;
        in_time.unwrap_or_else(|_| Err(rpc::too_late(self.deadline)))
    }

    /// Remembers what is still to be deleted.
    async fn leave(&self, leftover: &str, store: &Store) {
        self.wanted().leftovers.insert(leftover.to_owned());
        if let Err(e) = store.put_leftover(&self.name, leftover).await {
            tracing::error!(card = self.name, leftover, "{e}");
        }
        self.changed.notify_one();
    }

    /// Forgets that something is to be deleted, if it is; the caller is [`Card::alone`] with it.
    async fn keep_leftover(&self, leftover: &str, store: &Store) -> Result<(), Error> {
        let was = self.wanted().leftovers.remove(leftover);
        if was { store.delete_leftover(&self.name, leftover).await } else { Ok(()) }
    }

    /// Waits until nothing else is being done to a device or network, and holds that off until the answer is dropped: what
    /// is made again or deleted late is never another one than was meant.
    async fn alone(&self, id: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            // Those that are held or waited for have another owner.
            busy.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(busy.entry(id.to_owned()).or_default())
        };
        lock.lock_owned().await
    }

    /// Counters of one device.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or what it answers.
    pub(crate) async fn device_stats(&self, id: &str) -> Result<Option<DeviceStats>, Error> {
        let request = GetCardStatsRequest { device_id: id.to_owned() };
        let stats = self
            .call(|c| {
                let request = request.clone();
                async move { CardClient::new(c).get_stats(request).await }
            })
            .await
            .map_err(|f| self.error(f))?;
        Ok(stats.devices.into_iter().find(|d| d.id == id))
    }

    /// Makes a disk longer; its size then, in bytes.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, DEVICE_NOT_FOUND, or why it cannot grow.
    pub(crate) async fn resize_device(&self, id: &str, size_bytes: u64) -> Result<u64, Error> {
        let request = ResizeDeviceRequest { id: id.to_owned(), size_bytes };
        let resized = self
            .call(|c| {
                let request = request.clone();
                async move { StorageCardClient::new(c).resize_device(request).await }
            })
            .await
            .map_err(|f| self.error(f))?;
        Ok(resized.size_bytes)
    }

    /// Asks whether a network could be made.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or what is wrong with the specification.
    pub(crate) async fn check_network(&self, spec: &NetworkSpec) -> Result<(), Error> {
        self.request_network(spec, true).await.map(|_| ()).map_err(|f| self.error(f))
    }

    /// Makes a network. From now on it should exist.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or why the card does not make it. It may exist all the same when there was no answer:
    /// [`Card::undo_network`] settles that.
    pub(crate) async fn create_network(&self, spec: &NetworkSpec, store: &Store) -> Result<(), Error> {
        let leftover = format!("{NETWORK}{}", spec.id);
        let _alone = self.alone(&leftover).await;
        self.keep_leftover(&leftover, store).await?;
        self.request_network(spec, false).await.map_err(|f| self.error(f))?;
        self.want_network(spec);
        Ok(())
    }

    /// Has a network deleted, as soon as the card answers, that was not to be and may exist.
    pub(crate) async fn undo_network(&self, id: &str, store: &Store) {
        self.wanted().networks.remove(id);
        self.leave(&format!("{NETWORK}{id}"), store).await;
    }

    /// A network that should exist, and may already.
    pub(crate) fn want_network(&self, spec: &NetworkSpec) {
        self.wanted().networks.insert(spec.id.clone(), spec.clone());
    }

    /// Deletes a network; one that is not there is no error.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or why the card does not delete it. It should exist still.
    pub(crate) async fn delete_network(&self, id: &str) -> Result<(), Error> {
        let _alone = self.alone(&format!("{NETWORK}{id}")).await;
        let was = self.wanted().networks.remove(id);
        self.request_network_delete(id).await.map_err(|failure| {
            if let Some(spec) = was {
                self.want_network(&spec);
            }
            self.error(failure)
        })
    }

    async fn request_network_delete(&self, id: &str) -> Result<(), Failure> {
        let request = DeleteNetworkRequest { id: id.to_owned() };
        let answer = self
            .call(|c| {
                let request = request.clone();
                async move { NetworkCardClient::new(c).delete_network(request).await }
            })
            .await;
        match answer {
            Err(Failure::Refused(e)) if e.code() == Code::NotFound => Ok(()),
            answer => answer.map(|_| ()),
        }
    }

    /// Something still to be deleted, from the database.
    pub(crate) fn add_leftover(&self, id: &str) {
        self.wanted().leftovers.insert(id.to_owned());
    }

    /// Has [`Card::keep`] look at the card: it may have lost something.
    pub(crate) fn look_after(&self) {
        self.changed.notify_one();
    }

    /// Brings the card to what it should be, whenever [`Card::look_after`] is called, for as long as it takes.
    pub(crate) async fn keep(&self, store: &Store) {
        loop {
            self.changed.notified().await;
            let (mut pause, mut told) = (RETRY_FIRST, false);
            while let Err(why) = self.restore(store).await {
                if !told {
                    tracing::warn!(card = self.name, "trying until it is as it should be: {why}");
                    told = true;
                }
                tokio::select! {
                    () = tokio::time::sleep(pause) => pause = (pause * 2).min(RETRY_MOST),
                    // Something else is to be done, or the card has just come back.
                    () = self.changed.notified() => pause = RETRY_FIRST,
                }
            }
            if told {
                tracing::info!(card = self.name, "as it should be again");
            }
        }
    }

    /// One attempt at that. The error is worth another attempt: no answer, or the first refusal, behind which everything
    /// else has been tried.
    async fn restore(&self, store: &Store) -> Result<(), Error> {
        let (networks, devices, leftovers) = {
            let wanted = self.wanted();
            (
                wanted.networks.values().cloned().collect::<Vec<_>>(),
                wanted.devices.values().cloned().collect::<Vec<_>>(),
                wanted.leftovers.iter().cloned().collect::<Vec<_>>(),
            )
        };
        let mut refused = None;
        // First: devices need them.
        self.settle(self.restore_security_groups().await, &mut refused)?;
        for network in networks {
            let _alone = self.alone(&format!("{NETWORK}{}", network.id)).await;
            if self.wanted().networks.get(&network.id) == Some(&network) {
                self.settle(self.request_network(&network, false).await, &mut refused)?;
            }
        }
        for device in devices {
            let _alone = self.alone(&device.id).await;
            // Deleted meanwhile, or about to be: that waits for us and has the last word.
            if self.wanted().devices.get(&device.id) == Some(&device) {
                self.settle(self.request_device(&device, false).await, &mut refused)?;
            }
        }
        for leftover in leftovers {
            let what =
                if leftover.starts_with(security::GROUP) { security::GROUP } else { leftover.as_str() };
            let _alone = self.alone(what).await;
            if !self.wanted().leftovers.contains(&leftover) {
                continue;
            }
            let deleted = if let Some(network) = leftover.strip_prefix(NETWORK) {
                self.request_network_delete(network).await
            } else if let Some(group) = leftover.strip_prefix(security::GROUP) {
                self.request_group_delete(group).await
            } else {
                self.request_delete(&leftover).await
            };
            if self.settle(deleted, &mut refused)? {
                self.keep_leftover(&leftover, store).await?;
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// Whether it is done; the first refusal is kept. No answer is an error at once: everything else would have to wait
    /// for its own deadline.
    fn settle<T>(&self, result: Result<T, Failure>, refused: &mut Option<Error>) -> Result<bool, Error> {
        match result {
            Ok(_) => Ok(true),
            Err(Failure::Refused(e)) => {
                refused.get_or_insert(e);
                Ok(false)
            }
            Err(failure) => Err(self.error(failure)),
        }
    }

    async fn request_device(&self, spec: &DeviceSpec, validate_only: bool) -> Result<Device, Failure> {
        let request = CreateDeviceRequest { spec: Some(spec.clone()), validate_only };
        let ask = || {
            self.call(|c| {
                let request = request.clone();
                async move { CardClient::new(c).create_device(request).await }
            })
        };
        let mut answer = ask().await;
        // What a card that has lost all has lost first. Once each: what is wrong otherwise stays so.
        let lost = |answer: &Result<Device, Failure>, reason: ErrorReason| matches!(answer, Err(Failure::Refused(e)) if e.reason() == reason);
        let Some(proto::v1::device_spec::Kind::Net(net)) = &spec.kind else { return answer };
        if lost(&answer, ErrorReason::NetworkNotFound) {
            let network = self.wanted().networks.get(&net.network).cloned();
            let Some(network) = network else { return answer };
            self.request_network(&network, false).await?;
            answer = ask().await;
        }
        if lost(&answer, ErrorReason::SecurityGroupNotFound) {
            self.restore_security_groups().await?;
            answer = ask().await;
        }
        answer
    }

    async fn request_delete(&self, id: &str) -> Result<(), Failure> {
        let request = DeleteDeviceRequest { id: id.to_owned() };
        let answer = self
            .call(|c| {
                let request = request.clone();
                async move { CardClient::new(c).delete_device(request).await }
            })
            .await;
        match answer {
            Err(Failure::Refused(e)) if e.code() == Code::NotFound => Ok(()),
            answer => answer.map(|_| ()),
        }
    }

    async fn request_network(&self, spec: &NetworkSpec, validate_only: bool) -> Result<Network, Failure> {
        let request = CreateNetworkRequest { spec: Some(spec.clone()), validate_only, card: String::new() };
        self.call(|c| {
            let request = request.clone();
            async move { NetworkCardClient::new(c).create_network(request).await }
        })
        .await
    }

    /// One call, repeated on a new connection if an old one proved broken: every call to a card is idempotent.
    async fn call<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let kept = self.kept().clone();
        if let Some(channel) = kept {
            let started = tokio::time::Instant::now();
            match rpc::call(self.deadline, call(channel)).await {
                Err(Failure::NoAnswer(why)) => {
                    *self.kept() = None;
                    if started.elapsed() >= self.deadline {
                        return Err(Failure::NoAnswer(why));
                    }
                }
                answer => return answer,
            }
        }
        let channel = rpc::dial(&self.socket).await.map_err(|e| Failure::NoAnswer(e.to_string()))?;
        *self.kept() = Some(channel.clone());
        let answer = rpc::call(self.deadline, call(channel)).await;
        if matches!(answer, Err(Failure::NoAnswer(_))) {
            *self.kept() = None;
        }
        answer
    }

    /// What a failed call is to a caller.
    pub(crate) fn error(&self, failure: Failure) -> Error {
        failure.or_else(|why| {
            let socket = self.socket.display().to_string();
            Error::new(
                Code::Unavailable,
                ErrorReason::CardUnreachable,
                format!("card {} does not answer on {socket}: {why}", self.name),
            )
            .resource(socket)
            .remedy("start the card (systemctl start offload-blk offload-net) and look at: outboard card ls")
        })
    }

    fn kept(&self) -> MutexGuard<'_, Option<Channel>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
