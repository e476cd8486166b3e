//! What security groups have to say about a frame that the switch has found a way for.

use std::sync::Arc;

use super::Worker;
use super::port::Port;
use crate::conntrack::flow::{Direction, Packet};
use crate::conntrack::{self, Denied};
use crate::drops::DropReason;
use crate::frame::Frame;
use crate::security::rules::{GroupId, Rules};
use crate::switch::{Egress, Ingress, PortId};

impl Worker {
    /// Gives a device's filter other rules, if it is still the one with these groups.
    pub(super) fn set_rules(&mut self, id: PortId, groups: &[GroupId], rules: Arc<Rules>) {
        if let Some(filter) = filtered(&mut self.ports, Some(id)).and_then(|p| p.filter.as_mut())
            && filter.groups() == groups
        {
            filter.set_rules(rules);
        }
    }

    /// Whether a frame goes where it is to go: its sender's security groups let it out, and its receiver's in. What they do
    /// not let in is the receiver's to count, and as good as delivered to the sender, who is not to learn who has which.
    ///
    /// # Errors
    /// It is not let out.
    pub(super) fn admit(
        &mut self,
        frame: &Frame<'_>,
        from: Ingress,
        egress: Egress,
    ) -> Result<bool, DropReason> {
        let from = match from {
            Ingress::Port(id, _) => Some(id),
            Ingress::Uplink => None,
        };
        let to = match egress {
            Egress::Port(id) => Some(id),
            Egress::Uplink => None,
            // Networks with a prefix have no such frames, and others no security groups.
            Egress::All | Egress::Drop(_) => return Ok(true),
        };
        let ports = &mut self.ports;
        if filtered(ports, from).is_none() && filtered(ports, to).is_none() {
            return Ok(true);
        }
        let packet = Packet::of(frame).ok_or(DropReason::Malformed)?;
        let now = conntrack::now();
        if let Some(filter) = filtered(ports, from).and_then(|p| p.filter.as_mut()) {
            let admitted = filter.admit(&packet, Direction::Out, &self.members, now);
            admitted.map_err(|why| reason(why, DropReason::DeniedOut))?;
        }
        if let Some(Port { filter: Some(filter), drops, .. }) = filtered(ports, to)
            && let Err(why) = filter.admit(&packet, Direction::In, &self.members, now)
        {
            drops.add(reason(why, DropReason::DeniedIn));
            return Ok(false);
        }
        Ok(true)
    }
}

/// The port, if it has security groups.
fn filtered(ports: &mut [Option<Port>], id: Option<PortId>) -> Option<&mut Port> {
    ports.get_mut(id?.0)?.as_mut().filter(|p| p.filter.is_some())
}

fn reason(why: Denied, by_rule: DropReason) -> DropReason {
    match why {
        Denied::Rule => by_rule,
        Denied::Full => DropReason::ConntrackAllowanceExceeded,
        Denied::Fragment => DropReason::Fragment,
    }
}
