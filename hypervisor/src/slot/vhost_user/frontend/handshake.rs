//! The handshake, by which a device says what it is.

use std::time::Instant;

use super::Frontend;
use crate::slot::vhost_user::connection::raw;
use crate::slot::vhost_user::message::{Payload, Request, protocol};
use crate::slot::vhost_user::{F_PROTOCOL_FEATURES, LinkError};

/// Protocol features that we use if the device has them.
const WANTED: u64 = protocol::MQ
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS;

/// What a device says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::slot) struct Offer {
    /// Virtio feature bits, without those that are of vhost-user.
    pub(in crate::slot) features: u64,
    /// Number of queues, if the device can say.
    pub(in crate::slot) queues: Option<u64>,
    /// Configuration space, if the device has one.
    pub(in crate::slot) config: Option<Vec<u8>>,
    /// The protocol features that are used, if both sides know any.
    pub(in crate::slot) protocol: Option<u64>,
}

impl Frontend {
    /// Makes the handshake: asks the device what it is. `config_size`: how much of the configuration space to read, in bytes.
    pub(in crate::slot) fn negotiate(&mut self, config_size: usize) -> Result<Offer, LinkError> {
        let deadline = Instant::now() + self.patience.handshake;
        let features = self.get_u64(Request::GetFeatures, deadline)?;
        let protocol = match features & F_PROTOCOL_FEATURES {
            0 => None,
            _ => Some(self.get_u64(Request::GetProtocolFeatures, deadline)? & WANTED),
        };
        self.ask_the_rest(protocol, config_size, deadline)?;
        let (queues, config) = self.hear_the_rest(config_size, deadline)?;
        Ok(Offer { features: features & !F_PROTOCOL_FEATURES, queues, config, protocol })
    }

    /// As [`Frontend::negotiate`], with a device that is expected to speak the protocol as its predecessor did. Everything is
    /// asked at once and waited for once: each wait may cost the guest, which has no device meanwhile, a time slice on a busy
    /// host. `None`: the device speaks it in another way, and this connection is of no use.
    pub(in crate::slot) fn negotiate_as(
        &mut self,
        expected: Option<u64>,
        config_size: usize,
    ) -> Result<Option<Offer>, LinkError> {
        let deadline = Instant::now() + self.patience.handshake;
        self.connection.send(Request::GetFeatures, &[], &[], false, deadline)?;
        if expected.is_some() {
            self.connection.send(Request::GetProtocolFeatures, &[], &[], false, deadline)?;
        }
        self.ask_the_rest(expected, config_size, deadline)?;
        let features = self.hear_u64(Request::GetFeatures, deadline)?;
        if (features & F_PROTOCOL_FEATURES != 0) != expected.is_some() {
            return Ok(None);
        }
        if let Some(expected) = expected
            && self.hear_u64(Request::GetProtocolFeatures, deadline)? & WANTED != expected
        {
            return Ok(None);
        }
        let (queues, config) = self.hear_the_rest(config_size, deadline)?;
        Ok(Some(Offer { features: features & !F_PROTOCOL_FEATURES, queues, config, protocol: expected }))
    }

    /// Sends what a handshake still needs when it is known which protocol features both sides have, if they have any.
    fn ask_the_rest(
        &mut self,
        protocol: Option<u64>,
        config_size: usize,
        deadline: Instant,
    ) -> Result<(), LinkError> {
        if let Some(protocol) = protocol {
            let payload = Payload::default().u64(protocol);
            self.connection.send(Request::SetProtocolFeatures, payload.as_slice(), &[], false, deadline)?;
            self.has_protocol_features = true;
            self.protocol = protocol;
        }
        let acknowledge = self.has(protocol::REPLY_ACK);
        self.connection.send(Request::SetOwner, &[], &[], acknowledge, deadline)?;
        if self.has(protocol::MQ) {
            self.connection.send(Request::GetQueueNum, &[], &[], false, deadline)?;
        }
        if self.has(protocol::BACKEND_REQ) {
            let theirs = self.connection.open_backend_channel()?;
            self.connection.send(Request::SetBackendReqFd, &[], &[raw(&theirs)], acknowledge, deadline)?;
        }
        if self.has_config() && config_size > 0 {
            self.ask_config(config_size, deadline)?;
        }
        if self.has(protocol::CONFIGURE_MEM_SLOTS) {
            self.connection.send(Request::GetMaxMemSlots, &[], &[], false, deadline)?;
        }
        Ok(())
    }

    /// Takes the answers to [`Frontend::ask_the_rest`], in the same order: the number of queues and the configuration space.
    fn hear_the_rest(
        &mut self,
        config_size: usize,
        deadline: Instant,
    ) -> Result<(Option<u64>, Option<Vec<u8>>), LinkError> {
        let acknowledged = self.has(protocol::REPLY_ACK);
        if acknowledged {
            self.hear_acknowledgement(Request::SetOwner, deadline)?;
        }
        let queues = match self.has(protocol::MQ) {
            true => Some(self.hear_u64(Request::GetQueueNum, deadline)?),
            false => None,
        };
        if self.has(protocol::BACKEND_REQ) && acknowledged {
            match self.hear_acknowledgement(Request::SetBackendReqFd, deadline) {
                Err(LinkError::Refused(_)) => self.connection.close_backend_channel(),
                other => other?,
            }
        }
        let config = match self.has_config() && config_size > 0 {
            true => Some(self.hear_config(config_size, deadline)?),
            false => None,
        };
        if self.has(protocol::CONFIGURE_MEM_SLOTS) {
            self.memory_slots = self.hear_u64(Request::GetMaxMemSlots, deadline)?;
        }
        Ok((queues, config))
    }
}
