//! The cards this controller knows, by name, and what a VM's devices are called on them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proto::error::{Error, ErrorReason};
use proto::v1::{
    BlockDeviceSpec, DeviceSpec, DiskSpec, Metadata, NetDeviceSpec, NicSpec, VmSpec, device_spec::Kind,
};

use super::card::{Card, CardKind};
use super::mac::Mac;
use super::metadata;

/// A card as configured: a name and a control socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardConfig {
    /// The name devices choose it by.
    pub name: String,
    /// Its control socket.
    pub socket: PathBuf,
}

impl std::str::FromStr for CardConfig {
    type Err = String;

    /// `NAME=SOCKET`.
    fn from_str(s: &str) -> Result<Self, String> {
        let (name, socket) = s.split_once('=').ok_or("write it as NAME=SOCKET")?;
        let valid = !name.is_empty()
            && name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-');
        if !valid || socket.is_empty() {
            return Err(format!("\"{s}\": write it as NAME=SOCKET, the name of a-z, 0-9 and '-'"));
        }
        Ok(Self { name: name.to_owned(), socket: socket.into() })
    }
}

/// A device of a VM: where it is and what it is there.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    /// Its id within the VM, which is its slot's.
    pub slot: String,
    /// The card it is on.
    pub card: Arc<Card>,
    /// What the card is told.
    pub spec: DeviceSpec,
}

/// All cards.
#[derive(Debug)]
pub(crate) struct Cards {
    cards: Vec<Arc<Card>>,
}

impl Cards {
    /// Cards that are dialled when first needed.
    ///
    /// # Errors
    /// INVALID_FIELD if two have one name.
    pub(crate) fn new(configs: &[CardConfig], deadline: Duration) -> Result<Self, Error> {
        for (i, card) in configs.iter().enumerate() {
            if configs.iter().take(i).any(|c| c.name == card.name) {
                return Err(Error::invalid_field("card", format!("two cards are named {}", card.name))
                    .resource(card.name.clone())
                    .remedy("give every --card a name of its own"));
            }
        }
        let cards = configs.iter().map(|c| Arc::new(Card::new(&c.name, &c.socket, deadline))).collect();
        Ok(Self { cards })
    }

    /// All of them, in the order of the configuration.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Card>> {
        self.cards.iter()
    }

    /// The card of that name.
    ///
    /// # Errors
    /// INVALID_FIELD.
    pub(crate) fn get(&self, name: &str) -> Result<&Arc<Card>, Error> {
        self.cards.iter().find(|c| c.name() == name).ok_or_else(|| {
            let known = self.cards.iter().map(|c| c.name()).collect::<Vec<_>>().join(", ");
            Error::invalid_field("card", format!("there is no card {name}"))
                .resource(name)
                .remedy(format!("use one of: {known}"))
        })
    }

    /// The card of that name, which must be of that kind.
    ///
    /// # Errors
    /// INVALID_FIELD, CARD_UNREACHABLE.
    pub(crate) async fn of_kind(&self, name: &str, kind: CardKind) -> Result<&Arc<Card>, Error> {
        let card = self.get(name)?;
        if card.kind().await? == kind {
            return Ok(card);
        }
        Err(Error::invalid_field("card", format!("card {name} is no {} card", word(kind)))
            .resource(name)
            .remedy("see the kinds with: outboard card ls"))
    }

    /// The card for what names none: the one with the customary name, else the first of the kind that answers.
    ///
    /// # Errors
    /// CARD_UNREACHABLE when none is known to be of the kind.
    pub(crate) async fn default_of(&self, kind: CardKind) -> Result<&Arc<Card>, Error> {
        let customary = match kind {
            CardKind::Storage => "blk",
            CardKind::Network => "net",
            CardKind::Other => "",
        };
        if let Some(card) = self.cards.iter().find(|c| c.name() == customary) {
            return Ok(card);
        }
        let mut silent = None;
        for card in &self.cards {
            match card.kind().await {
                Ok(k) if k == kind => return Ok(card),
                Ok(_) => {}
                Err(e) => silent = Some(e),
            }
        }
        Err(silent.unwrap_or_else(|| {
            Error::new(
                tonic::Code::FailedPrecondition,
                ErrorReason::CardUnreachable,
                format!("the controller knows no {} card", word(kind)),
            )
            .remedy("start outboard-mgmt with --card NAME=SOCKET")
        }))
    }

    /// The devices of a VM whose specification is complete.
    ///
    /// # Errors
    /// INVALID_FIELD for a card that is no longer configured.
    pub(crate) fn devices_of(&self, vm: &str, spec: &VmSpec) -> Result<Vec<Placed>, Error> {
        let disks = spec.disks.iter().map(|d| (d.id.as_str(), d.card.as_str(), block(d), d.limits, None));
        let nics = spec.nics.iter().enumerate().map(|(i, n)| {
            let metadata = metadata::of_nic(vm, spec, i, n);
            (n.id.as_str(), n.card.as_str(), net(n, &spec.name, metadata), None, n.limits)
        });
        disks
            .chain(nics)
            .map(|(slot, card, kind, limits, net_limits)| {
                Ok(Placed {
                    slot: slot.to_owned(),
                    card: Arc::clone(self.get(card)?),
                    spec: DeviceSpec { id: device_id(vm, slot), kind: Some(kind), limits, net_limits },
                })
            })
            .collect()
    }
}

/// What a VM's device is called on its card.
pub(crate) fn device_id(vm: &str, slot: &str) -> String {
    format!("{vm}-{slot}")
}

fn block(disk: &DiskSpec) -> Kind {
    Kind::Block(BlockDeviceSpec {
        path: disk.path.clone(),
        read_only: disk.read_only,
        queues: disk.queues,
        queue_size: 0,
        // What the guest sees under /dev/disk/by-id: the id within the VM says more than one made of the VM's id.
        serial: disk.id.chars().take(20).collect(),
        direct: disk.direct,
        format: disk.format,
        ..Default::default()
    })
}

fn net(nic: &NicSpec, vm_name: &str, metadata: Option<Metadata>) -> Kind {
    Kind::Net(NetDeviceSpec {
        network: nic.network.clone(),
        mac: nic.mac.parse::<Mac>().map(|m| m.bytes().to_vec()).unwrap_or_default(),
        mtu: nic.mtu,
        queue_pairs: nic.queue_pairs,
        queue_size: 0,
        addresses: nic.addresses.clone(),
        // Only where there is DHCP to tell it: in other networks nothing would come of it.
        hostname: if nic.addresses.is_empty() { String::new() } else { vm_name.to_owned() },
        security_groups: nic.security_groups.clone(),
        max_connections: nic.max_connections,
        metadata,
    })
}

fn word(kind: CardKind) -> &'static str {
    match kind {
        CardKind::Storage => "storage",
        CardKind::Network => "network",
        CardKind::Other => "known",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_one_card() {
        let card = |name: &str| CardConfig { name: name.into(), socket: "/x".into() };
        assert!(Cards::new(&[card("a"), card("b")], Duration::ZERO).is_ok());
        let e = Cards::new(&[card("a"), card("b"), card("a")], Duration::ZERO).expect_err("twice");
        assert!(e.message().contains("named a") && e.fact("remedy").is_some(), "{e}");
    }

    #[test]
    fn a_card_is_a_name_and_a_socket() {
        let card: CardConfig = "fast=/run/x.sock".parse().expect("card");
        assert_eq!(card, CardConfig { name: "fast".into(), socket: "/run/x.sock".into() });
        for bad in ["", "fast", "=/x", "fast=", "Fa st=/x"] {
            assert!(bad.parse::<CardConfig>().is_err(), "{bad}");
        }
    }
}
