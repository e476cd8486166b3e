//! One card as the controller sees it: calls with deadlines, and what should exist on it.
//!
//! Cards keep their devices themselves and come back with them. What a card has lost all the same (its runtime
//! directory is gone) is made again when a link to it breaks and when the controller starts: every request is
//! idempotent, so asking for what is there does no harm. A device that could not be deleted because its card did not
//! answer is remembered and deleted when it does. With nothing to do, nothing is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use proto::error::{Error, ErrorReason};
use proto::v1::card_client::CardClient;
use proto::v1::network_card_client::NetworkCardClient;
use proto::v1::{
    CardInfo, CreateDeviceRequest, CreateNetworkRequest, DeleteDeviceRequest, DeleteNetworkRequest, Device,
    DeviceSpec, DeviceStats, GetCardStatsRequest, IdentifyRequest, Network, NetworkSpec,
};
use tokio::sync::Notify;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::rpc::{self, Failure};
use super::store::Store;

/// Pauses between attempts to bring a card to what it should be.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MOST: Duration = Duration::from_secs(30);

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
    // Held while a leftover is deleted, so that its id is not made again under the deletion.
    cleaning: tokio::sync::Mutex<()>,
}

/// What should exist on a card.
#[derive(Debug, Default)]
struct Wanted {
    networks: BTreeMap<String, NetworkSpec>,
    devices: BTreeMap<String, DeviceSpec>,
    /// To be deleted.
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
            cleaning: tokio::sync::Mutex::default(),
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
    /// [`Card::delete_device`] settles that.
    pub(crate) async fn create_device(&self, spec: &DeviceSpec, store: &Store) -> Result<Device, Error> {
        let was_leftover = self.wanted().leftovers.contains(&spec.id);
        if was_leftover {
            let _alone = self.cleaning.lock().await;
            self.wanted().leftovers.remove(&spec.id);
            store.delete_leftover(&self.name, &spec.id).await?;
        }
        let device = self.request_device(spec, false).await.map_err(|f| self.error(f))?;
        self.want_device(spec);
        Ok(device)
    }

    /// A device that should exist, and may already.
    pub(crate) fn want_device(&self, spec: &DeviceSpec) {
        self.wanted().devices.insert(spec.id.clone(), spec.clone());
    }

    /// Deletes a device that may exist. If the card does not answer, that is remembered and done when it does.
    pub(crate) async fn delete_device(&self, id: &str, store: &Store) {
        self.wanted().devices.remove(id);
        let Err(failure) = self.request_delete(id).await else { return };
        let why = self.error(failure);
        tracing::warn!(card = self.name, device = id, "device not deleted, will be later: {why}");
        self.wanted().leftovers.insert(id.to_owned());
        if let Err(e) = store.put_leftover(&self.name, id).await {
            tracing::error!(card = self.name, device = id, "{e}");
        }
        self.changed.notify_one();
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

    /// Makes a network, or only asks whether it could be made. Once made, it should exist.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or why the card does not make it.
    pub(crate) async fn create_network(
        &self,
        spec: &NetworkSpec,
        validate_only: bool,
    ) -> Result<Network, Error> {
        let network = self.request_network(spec, validate_only).await.map_err(|f| self.error(f))?;
        if !validate_only {
            self.want_network(spec);
        }
        Ok(network)
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
        let was = self.wanted().networks.remove(id);
        let request = DeleteNetworkRequest { id: id.to_owned() };
        let answer = self
            .call(|c| {
                let request = request.clone();
                async move { NetworkCardClient::new(c).delete_network(request).await }
            })
            .await;
        match answer {
            Ok(_) => Ok(()),
            Err(Failure::Refused(e)) if e.code() == Code::NotFound => Ok(()),
            Err(failure) => {
                if let Some(spec) = was {
                    self.want_network(&spec);
                }
                Err(self.error(failure))
            }
        }
    }

    /// A device still to be deleted, from the database.
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
            let mut pause = RETRY_FIRST;
            while let Err(why) = self.restore(store).await {
                if pause == RETRY_FIRST {
                    tracing::warn!(card = self.name, "trying until it is as it should be: {}", why.message());
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MOST);
            }
            if pause > RETRY_FIRST {
                tracing::info!(card = self.name, "as it should be again");
            }
        }
    }

    /// One attempt at that. An `Err` is worth another; a refusal is logged and left.
    async fn restore(&self, store: &Store) -> Result<(), Error> {
        let (networks, devices, leftovers) = {
            let wanted = self.wanted();
            (
                wanted.networks.values().cloned().collect::<Vec<_>>(),
                wanted.devices.values().cloned().collect::<Vec<_>>(),
                wanted.leftovers.iter().cloned().collect::<Vec<_>>(),
            )
        };
        for network in networks {
            self.settle("network", &network.id, self.request_network(&network, false).await)?;
        }
        for device in devices {
            self.settle("device", &device.id, self.request_device(&device, false).await)?;
            let still = self.wanted().devices.contains_key(&device.id);
            if !still {
                // Deleted meanwhile, perhaps before it was made again here.
                self.settle("device", &device.id, self.request_delete(&device.id).await)?;
            }
        }
        for id in leftovers {
            let _alone = self.cleaning.lock().await;
            let still = self.wanted().leftovers.contains(&id);
            if !still {
                continue;
            }
            self.settle("left device", &id, self.request_delete(&id).await)?;
            self.wanted().leftovers.remove(&id);
            store.delete_leftover(&self.name, &id).await?;
        }
        Ok(())
    }

    fn settle<T>(&self, what: &str, id: &str, result: Result<T, Failure>) -> Result<(), Error> {
        match result {
            Ok(_) => Ok(()),
            Err(Failure::Refused(e)) => {
                tracing::warn!(card = self.name, "{what} {id}: {e}");
                Ok(())
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
        let first = ask().await;
        let lost_network = match (&first, &spec.kind) {
            (Err(Failure::Refused(e)), Some(proto::v1::device_spec::Kind::Net(net)))
                if e.reason() == ErrorReason::NetworkNotFound =>
            {
                self.wanted().networks.get(&net.network).cloned()
            }
            _ => None,
        };
        match lost_network {
            None => first,
            Some(network) => {
                self.request_network(&network, false).await?;
                ask().await
            }
        }
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

    fn error(&self, failure: Failure) -> Error {
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
