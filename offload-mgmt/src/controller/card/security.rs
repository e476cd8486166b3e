//! Security groups on their card.

use proto::error::Error;
use proto::v1::network_card_client::NetworkCardClient;
use proto::v1::{DeleteSecurityGroupRequest, SecurityGroupSpec, SetSecurityGroupsRequest};
use tonic::Code;

use super::Card;
use crate::controller::rpc::Failure;
use crate::controller::store::Store;

/// What a security group still to be deleted begins with among the leftovers; no device's id has a '/'. Also what
/// [`Card::alone`] is asked for: groups name each other, so only one thing is done to any of them at a time.
pub(super) const GROUP: &str = "security-group/";

impl Card {
    /// Asks whether a security group could be made or replaced so.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or what is wrong with the specification.
    pub(crate) async fn check_security_group(&self, spec: &SecurityGroupSpec) -> Result<(), Error> {
        self.set(spec, true).await.map_err(|f| self.error(f))
    }

    /// Makes or replaces a security group. From now on it should be so.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or why the card does not do it. It may be so all the same when there was no answer: if another one
    /// was wanted, [`Card::look_after`] settles that, and for a new one [`Card::undo_security_group`].
    pub(crate) async fn set_security_group(
        &self,
        spec: &SecurityGroupSpec,
        store: &Store,
    ) -> Result<(), Error> {
        let _alone = self.alone(GROUP).await;
        self.keep_leftover(&format!("{GROUP}{}", spec.id), store).await?;
        self.set(spec, false).await.map_err(|f| self.error(f))?;
        self.want_security_group(spec);
        Ok(())
    }

    /// Sets one group; with those that it needs, should the card have lost them.
    async fn set(&self, spec: &SecurityGroupSpec, validate_only: bool) -> Result<(), Failure> {
        let first = self.request_groups(vec![spec.clone()], validate_only).await;
        match first {
            Err(Failure::Refused(e)) if e.code() == Code::NotFound => {
                let mut all = self.wanted_groups();
                all.retain(|group| group.id != spec.id);
                all.push(spec.clone());
                self.request_groups(all, validate_only).await
            }
            answer => answer,
        }
    }

    /// A security group that should be so, and may be already.
    pub(crate) fn want_security_group(&self, spec: &SecurityGroupSpec) {
        self.wanted().security_groups.insert(spec.id.clone(), spec.clone());
    }

    /// Has a security group deleted, as soon as the card answers, that was not to be and may exist.
    pub(crate) async fn undo_security_group(&self, id: &str, store: &Store) {
        self.wanted().security_groups.remove(id);
        self.leave(&format!("{GROUP}{id}"), store).await;
    }

    /// Deletes a security group; one that is not there is no error.
    ///
    /// # Errors
    /// CARD_UNREACHABLE, or why the card does not delete it. It should exist still.
    pub(crate) async fn delete_security_group(&self, id: &str) -> Result<(), Error> {
        let _alone = self.alone(GROUP).await;
        let was = self.wanted().security_groups.remove(id);
        self.request_group_delete(id).await.map_err(|failure| {
            if let Some(spec) = was {
                self.want_security_group(&spec);
            }
            self.error(failure)
        })
    }

    /// Sets all security groups that there should be, at once, for they may name each other.
    pub(super) async fn restore_security_groups(&self) -> Result<(), Failure> {
        let _alone = self.alone(GROUP).await;
        let groups = self.wanted_groups();
        if groups.is_empty() { Ok(()) } else { self.request_groups(groups, false).await }
    }

    fn wanted_groups(&self) -> Vec<SecurityGroupSpec> {
        self.wanted().security_groups.values().cloned().collect()
    }

    async fn request_groups(
        &self,
        groups: Vec<SecurityGroupSpec>,
        validate_only: bool,
    ) -> Result<(), Failure> {
        let request = SetSecurityGroupsRequest { groups, validate_only };
        self.call(|c| {
            let request = request.clone();
            async move { NetworkCardClient::new(c).set_security_groups(request).await }
        })
        .await
        .map(drop)
    }

    pub(super) async fn request_group_delete(&self, id: &str) -> Result<(), Failure> {
        let request = DeleteSecurityGroupRequest { id: id.to_owned() };
        let answer = self
            .call(|c| {
                let request = request.clone();
                async move { NetworkCardClient::new(c).delete_security_group(request).await }
            })
            .await;
        match answer {
            Err(Failure::Refused(e)) if e.code() == Code::NotFound => Ok(()),
            answer => answer.map(drop),
        }
    }
}
