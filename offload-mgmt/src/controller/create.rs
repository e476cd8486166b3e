//! CreateVm: once per token, all or nothing.

use std::sync::Arc;

use prost::Message;
use proto::error::Error;
use proto::v1::{CreateVmRequest, VmSpec};

use super::card::CardKind;
use super::clock::now_us;
use super::spec::{self, CardNames};
use super::store::VmRecord;
use super::vm::{self, Vm};
use super::{Context, Controller};

/// Longest client token, in bytes.
const TOKEN_MAX: usize = 64;

impl Controller {
    /// Makes a VM, or answers with the one that this token has made.
    ///
    /// # Errors
    /// What is wrong with the request, or why the VM could not be made; then nothing is left of it.
    pub(super) async fn create_vm(&self, mut request: CreateVmRequest) -> Result<Arc<Vm>, Error> {
        let token = std::mem::take(&mut request.client_token);
        if token.len() > TOKEN_MAX {
            return Err(Error::invalid_field(
                "client_token",
                format!("the client token is {} bytes long, more than {TOKEN_MAX}", token.len()),
            )
            .remedy("use a short random one, such as a UUID"));
        }
        let fingerprint = request.encode_to_vec();
        if let Some(vm) = self.ctx.registry.with_token(&token, &fingerprint)? {
            vm.created().await?;
            return Ok(vm);
        }
        let start = !request.no_start;
        let spec = complete(&self.ctx, request.spec.unwrap_or_default()).await?;
        let ctx = &self.ctx;
        let made = ctx.registry.reserve(&token, &fingerprint, spec, |spec| {
            let record = VmRecord {
                id: new_id(),
                spec: Some(spec),
                created_us: now_us(),
                client_token: token.clone(),
                request: fingerprint.clone(),
                ..VmRecord::default()
            };
            vm::spawn(ctx, record, vm::Begin::Create { start })
        })?;
        made.created().await?;
        Ok(made)
    }
}

/// The specification with every default but the MAC addresses filled in.
async fn complete(ctx: &Context, spec: VmSpec) -> Result<VmSpec, Error> {
    let mut spec = spec::complete_vm(spec)?;
    let storage = if spec.disks.iter().any(|d| d.card.is_empty()) {
        ctx.cards.default_of(CardKind::Storage).await?.name()
    } else {
        ""
    };
    spec::place(&mut spec, &Names { ctx, storage })?;
    // Names the cards that are not known before anything else is done.
    ctx.cards.devices_of("", &spec)?;
    Ok(spec)
}

struct Names<'a> {
    ctx: &'a Context,
    storage: &'a str,
}

impl CardNames for Names<'_> {
    fn default_storage(&self) -> &str {
        self.storage
    }

    fn card_of_network(&self, network: &str) -> Option<String> {
        self.ctx.registry.network(network).map(|n| n.card)
    }
}

/// 12 random characters of [a-z0-9]: 62 bits.
fn new_id() -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut random = uuid::Uuid::new_v4().as_u128();
    let mut id = String::with_capacity(12);
    for _ in 0..12 {
        // The remainder of a division by 36 is an index into 36 digits.
        let digit = usize::try_from(random % 36).ok().and_then(|i| DIGITS.get(i)).copied();
        id.push(char::from(digit.unwrap_or(b'0')));
        random /= 36;
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_what_units_and_cards_accept() {
        let ids: std::collections::HashSet<_> = (0..1000).map(|_| new_id()).collect();
        assert_eq!(ids.len(), 1000);
        assert!(
            ids.iter()
                .all(|id| id.len() == 12 && id.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()))
        );
    }
}
