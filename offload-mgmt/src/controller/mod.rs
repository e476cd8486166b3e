//! The controller: what it knows, and how it begins.
//!
//! [`Controller`] answers the API ([`service`]); [`serve`] puts it on its socket.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proto::error::{Error, ErrorReason};
use tokio::sync::{oneshot, watch};
use tonic::Code;

use crate::runner::Runner;

mod addresses;
mod capture;
mod card;
mod cards;
mod clock;
mod console;
mod create;
mod events;
pub(crate) mod host;
mod mac;
mod metadata;
mod network;
mod registry;
pub(crate) mod rpc;
mod security_group;
mod server;
mod service;
mod spec;
mod store;
mod vm;

pub use cards::CardConfig;
pub use server::{Api, ServeError};

pub(crate) use clock::now_us;

use cards::Cards;
use events::EventBus;
use registry::Registry;
use store::Store;

/// Longest time a controller that begins waits for hypervisors that do not answer before it serves.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(5);

/// How long others may take to answer.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// A call to a card.
    pub card: Duration,
    /// A call to a hypervisor that has nothing to do but answer.
    pub hypervisor: Duration,
    /// A hypervisor process, until it listens.
    pub start: Duration,
    /// Configure: the hypervisor reads the kernel and connects every slot.
    pub configure: Duration,
    /// A hypervisor that was told to end at once, until it has; then it is killed.
    pub shutdown: Duration,
    /// A process whose VM has ended, until it has exited; then it is killed.
    pub exit: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            card: Duration::from_secs(10),
            hypervisor: Duration::from_secs(5),
            start: Duration::from_secs(10),
            configure: Duration::from_secs(30),
            shutdown: Duration::from_secs(3),
            exit: Duration::from_secs(5),
        }
    }
}

/// What a controller is made of.
#[derive(Clone)]
pub struct Config {
    /// Directory of its database.
    pub state_dir: PathBuf,
    /// The cards it knows.
    pub cards: Vec<CardConfig>,
    /// Where hypervisor processes come from.
    pub runner: Arc<dyn Runner>,
    /// How long others may take to answer.
    pub deadlines: Deadlines,
}

/// What every part of the controller shares.
pub(crate) struct Context {
    runner: Arc<dyn Runner>,
    store: Store,
    cards: Cards,
    events: EventBus,
    registry: Registry,
    deadlines: Deadlines,
    boot_id: String,
}

/// The controller, cheap to clone.
#[derive(Clone)]
pub struct Controller {
    ctx: Arc<Context>,
    // True once streams must end because the process does.
    closing: Arc<watch::Sender<bool>>,
}

/// Why a stream ends though what it is about goes on.
pub(crate) fn ending() -> Error {
    Error::new(Code::Unavailable, ErrorReason::Internal, "the controller is ending; VMs run on")
        .remedy("try again in a moment; see: systemctl status outboard-mgmt")
}

impl Controller {
    /// Opens the database and finds what runs. VMs whose hypervisors do not answer within a few seconds are looked for
    /// in the background.
    ///
    /// # Errors
    /// The database cannot be used, or two cards have one name.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let cards = Cards::new(&config.cards, config.deadlines.card)?;
        let store = Store::open(&config.state_dir)?;
        let contents = store.load()?;
        let ctx = Arc::new(Context {
            runner: config.runner,
            store,
            cards,
            events: EventBus::default(),
            registry: Registry::default(),
            deadlines: config.deadlines,
            boot_id: host::boot_id(),
        });
        for entry in contents.networks.into_values() {
            let Some(spec) = entry.spec else { continue };
            match ctx.cards.get(&entry.card) {
                Ok(card) => {
                    card.want_network(&spec);
                    card.look_after();
                }
                Err(e) => tracing::warn!(network = spec.id, "not looked after: {e}"),
            }
            ctx.registry.adopt_network(spec, entry.card);
        }
        for entry in contents.security_groups.into_values() {
            let Some(spec) = entry.spec else { continue };
            match ctx.cards.get(&entry.card) {
                Ok(card) => {
                    card.want_security_group(&spec);
                    card.look_after();
                }
                Err(e) => tracing::warn!(group = spec.id, "not looked after: {e}"),
            }
            ctx.registry.adopt_group(spec, entry.card);
        }
        for (card, device) in contents.leftovers {
            if let Ok(card) = ctx.cards.get(&card) {
                card.add_leftover(&device);
                card.look_after();
            }
        }
        let mut recovering = Vec::new();
        for record in contents.vms.into_values() {
            let (ready, recovered) = oneshot::channel();
            ctx.registry.adopt(|| vm::spawn(&ctx, record, vm::Begin::Recover(ready)));
            recovering.push(recovered);
        }
        let all = async {
            for recovered in recovering {
                // The sender is dropped, not used.
                let _ = recovered.await;
            }
        };
        if tokio::time::timeout(RECOVERY_DEADLINE, all).await.is_err() {
            tracing::warn!("some hypervisors do not answer; serving without them for now");
        }
        for card in ctx.cards.iter() {
            let (card, store) = (Arc::clone(card), ctx.store.clone());
            tokio::spawn(async move { card.keep(&store).await });
        }
        Ok(Self { ctx, closing: Arc::new(watch::channel(false).0) })
    }

    /// Ends every stream; calls that are being answered go on.
    fn close(&self) {
        self.closing.send_replace(true);
        self.ctx.events.close();
    }
}
