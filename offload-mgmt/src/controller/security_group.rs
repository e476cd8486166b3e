//! Security groups: kept here, in force on their card, set there again when it has lost them.

use proto::error::{Error, ErrorReason};
use proto::v1::{ChangeSecurityGroupRequest, CreateSecurityGroupRequest, SecurityGroup, SecurityGroupRule};
use tonic::Code;

use super::Controller;
use super::card::CardKind;
use super::registry::GroupInfo;
use super::spec;

impl Controller {
    /// Makes a security group; one that is there with the same rules is no error.
    ///
    /// # Errors
    /// INVALID_FIELD, SECURITY_GROUP_EXISTS, SECURITY_GROUP_NOT_FOUND (one that a rule names), CARD_UNREACHABLE, or what the
    /// card says; then nothing is left of it.
    pub(super) async fn create_security_group(
        &self,
        request: CreateSecurityGroupRequest,
    ) -> Result<SecurityGroup, Error> {
        let spec = spec::complete_group(request.spec.unwrap_or_default(), request.no_egress)?;
        let cards = &self.ctx.cards;
        let card = match request.card.as_str() {
            "" => cards.default_of(CardKind::Network).await?,
            name => cards.of_kind(name, CardKind::Network).await?,
        };
        let (store, registry) = (&self.ctx.store, &self.ctx.registry);
        if registry.reserve_group(&spec, card.name())? {
            // Set again if the card has lost it.
            card.set_security_group(&spec, store).await?;
            let devices = registry.devices_with(&spec.id);
            return Ok(SecurityGroup { spec: Some(spec), devices });
        }
        let made = async {
            card.check_security_group(&spec).await?;
            // Written first: a group that is on the card and not in the database would never be deleted.
            store.put_security_group(spec.clone(), card.name()).await?;
            let made = card.set_security_group(&spec, store).await;
            if let Err(why) = &made {
                if why.reason() == ErrorReason::CardUnreachable {
                    // It may have been made all the same.
                    card.undo_security_group(&spec.id, store).await;
                }
                if let Err(e) = store.delete_security_group(&spec.id).await {
                    tracing::error!(group = spec.id, "{e}");
                }
            }
            made
        };
        let result = made.await;
        registry.settle_group(&spec.id, result.is_ok().then(|| spec.clone()));
        result.map(|()| SecurityGroup { spec: Some(spec), devices: Vec::new() })
    }

    /// Adds rules to a security group and takes others away.
    ///
    /// # Errors
    /// INVALID_FIELD, SECURITY_GROUP_NOT_FOUND, SECURITY_GROUP_EXISTS (it is being changed), CARD_UNREACHABLE, or what the
    /// card says; then it is as it was, on the card as soon as that answers.
    pub(super) async fn change_security_group(
        &self,
        request: ChangeSecurityGroupRequest,
    ) -> Result<SecurityGroup, Error> {
        let complete = |rules: Vec<SecurityGroupRule>| {
            rules.into_iter().map(spec::complete_rule).collect::<Result<Vec<_>, _>>()
        };
        let (add, remove) = (complete(request.add)?, complete(request.remove)?);
        let id = &request.id;
        let (store, registry) = (&self.ctx.store, &self.ctx.registry);
        let (group, spec) = registry.begin_group_change(id, |spec| {
            for rule in &remove {
                let at = spec.rules.iter().position(|r| r == rule).ok_or_else(|| no_such_rule(id))?;
                spec.rules.remove(at);
            }
            for rule in add {
                if !spec.rules.contains(&rule) {
                    spec.rules.push(rule);
                }
            }
            Ok(())
        })?;
        let GroupInfo { spec: was, card, .. } = group;
        let changed = async {
            let card = self.ctx.cards.get(&card)?;
            card.check_security_group(&spec).await?;
            store.put_security_group(spec.clone(), card.name()).await?;
            let set = card.set_security_group(&spec, store).await;
            if set.is_err() {
                if let Err(e) = store.put_security_group(was.clone(), card.name()).await {
                    tracing::error!(group = id, "{e}");
                }
                // Without an answer it may be in force.
                card.look_after();
            }
            set
        };
        let result = changed.await;
        let now = if result.is_ok() { spec } else { was };
        registry.settle_group(id, Some(now.clone()));
        let devices = registry.devices_with(id);
        result.map(|()| SecurityGroup { spec: Some(now), devices })
    }

    /// Deletes a security group.
    ///
    /// # Errors
    /// SECURITY_GROUP_NOT_FOUND, SECURITY_GROUP_IN_USE, CARD_UNREACHABLE; then it is there still.
    pub(super) async fn delete_security_group(&self, id: &str) -> Result<(), Error> {
        let group = self.ctx.registry.begin_group_removal(id)?;
        let deleted = async {
            self.ctx.cards.get(&group.card)?.delete_security_group(id).await?;
            self.ctx.store.delete_security_group(id).await
        };
        let result = deleted.await;
        self.ctx.registry.settle_group(id, result.is_err().then_some(group.spec));
        result
    }

    /// All security groups, by id.
    pub(super) fn list_security_groups(&self) -> Vec<SecurityGroup> {
        let groups = self.ctx.registry.groups();
        groups.into_iter().map(|(spec, devices)| SecurityGroup { spec: Some(spec), devices }).collect()
    }
}

fn no_such_rule(group: &str) -> Error {
    let what = format!("security group {group} has no such rule");
    Error::new(Code::NotFound, ErrorReason::InvalidField, what)
        .resource(group)
        .with("field", "remove")
        .remedy(format!("see which it has with: outboard security-group show {group}"))
}
