//! Networks: kept here, made on their card, made again when it has lost them.

use proto::error::{Error, ErrorReason};
use proto::v1::{CreateNetworkRequest, Network};

use super::Controller;
use super::card::CardKind;
use super::registry::NetworkInfo;
use super::spec;

impl Controller {
    /// Makes a network; one that is there with the same specification is no error.
    ///
    /// # Errors
    /// INVALID_FIELD, NETWORK_EXISTS, CARD_UNREACHABLE, or what the card says; then nothing is left of it.
    pub(super) async fn create_network(&self, request: CreateNetworkRequest) -> Result<Network, Error> {
        let spec = spec::complete_network(request.spec.unwrap_or_default())?;
        let cards = &self.ctx.cards;
        let card = match request.card.as_str() {
            "" => cards.default_of(CardKind::Network).await?,
            name => cards.of_kind(name, CardKind::Network).await?,
        };
        if request.validate_only {
            card.check_network(&spec).await?;
            return Ok(Network { spec: Some(spec), devices: Vec::new() });
        }
        if let Some(there) = self.ctx.registry.reserve_network(&spec, card.name())? {
            // Made again if the card has lost it.
            card.create_network(&spec, &self.ctx.store).await?;
            return Ok(self.network_message(there));
        }
        let store = &self.ctx.store;
        let made = async {
            card.check_network(&spec).await?;
            // Written first: a network that is on the card and not in the database would never be deleted.
            store.put_network(spec.clone(), card.name()).await?;
            let made = card.create_network(&spec, store).await;
            if let Err(why) = &made {
                if why.reason() == ErrorReason::CardUnreachable {
                    // It may have been made all the same.
                    card.undo_network(&spec.id, store).await;
                }
                if let Err(e) = store.delete_network(&spec.id).await {
                    tracing::error!(network = spec.id, "{e}");
                }
            }
            made
        };
        let result = made.await;
        self.ctx.registry.settle_network(&spec.id, result.is_ok());
        result.map(|()| Network { spec: Some(spec), devices: Vec::new() })
    }

    /// Deletes a network.
    ///
    /// # Errors
    /// NETWORK_NOT_FOUND, NETWORK_IN_USE, CARD_UNREACHABLE; then it is there still.
    pub(super) async fn delete_network(&self, id: &str) -> Result<(), Error> {
        let network = self.ctx.registry.begin_network_removal(id)?;
        let deleted = async {
            self.ctx.cards.get(&network.card)?.delete_network(id).await?;
            self.ctx.store.delete_network(id).await
        };
        let result = deleted.await;
        self.ctx.registry.settle_network(id, result.is_err());
        result
    }

    /// All networks, by id.
    pub(super) fn list_networks(&self) -> Vec<Network> {
        self.ctx.registry.networks().into_iter().map(|n| self.network_message(n)).collect()
    }

    fn network_message(&self, network: NetworkInfo) -> Network {
        let devices = self.ctx.registry.devices_in(&network.spec.id);
        Network { spec: Some(network.spec), devices }
    }
}
