//! Where a frame goes once it has been taken in.

use vm_memory::VolatileSlice;

use super::port::{Pair, Port, rx_of};
use super::{NEW_LINK, Worker};
use crate::capture::Direction;
use crate::drops::DropReason;
use crate::flow::{self, Action};
use crate::frame::offload::Offloads;
use crate::frame::{Bytes, Frame, HEAD_MAX, Memory};
use crate::guard::{Question, Verdict};
use crate::network::addressed::Addressed;
use crate::network::uplink::Uplink;
use crate::switch::{Egress, Ingress, PortId};

impl Worker {
    /// Sends a frame where it goes. `Err`: it went nowhere.
    pub(super) fn forward(&mut self, frame: &Frame<'_>, from: Ingress) -> Result<(), DropReason> {
        let egress = match &self.addressed {
            None => self.switch.forward(frame, from),
            Some(addressed) => {
                let verdict = match from {
                    Ingress::Uplink => addressed.judge(frame, None)?,
                    Ingress::Port(id, _) => match self.ports.get(id.0).and_then(Option::as_ref) {
                        Some(port) => addressed.judge(frame, Some(&port.interface))?,
                        None => return Err(DropReason::NoDestination),
                    },
                };
                match verdict {
                    Verdict::Forward => self.switch.forward(frame, from),
                    Verdict::Answer(question) => return self.answer(frame, from, question),
                }
            }
        };
        if !self.admit(frame, from, egress)? {
            return Ok(());
        }
        match egress {
            Egress::Port(to) => {
                self.deliver(frame, to);
                Ok(())
            }
            Egress::Uplink => self.send_up(frame),
            Egress::All => {
                let sender = match from {
                    Ingress::Port(id, _) => Some(id),
                    Ingress::Uplink => None,
                };
                for id in (0..self.ports.len()).map(PortId).filter(|id| Some(*id) != sender) {
                    self.deliver(frame, id);
                }
                // That the host did not take its copy is no loss to the others.
                let _ = if sender.is_some() { self.send_up(frame) } else { Ok(()) };
                Ok(())
            }
            Egress::Drop(reason) => Err(reason),
        }
    }

    /// Answers a frame, to where it came from.
    fn answer(&mut self, frame: &Frame<'_>, from: Ingress, question: Question) -> Result<(), DropReason> {
        let outside = |addressed: &Addressed| addressed.asks_outside(question);
        if matches!(from, Ingress::Port(..)) && self.addressed.as_ref().is_some_and(outside) {
            return self.send_up(frame);
        }
        let Some(mut addressed) = self.addressed.take() else { return Ok(()) };
        let interface = match from {
            Ingress::Port(id, _) => self.ports.get(id.0).and_then(Option::as_ref).map(|p| &p.interface),
            Ingress::Uplink => None,
        };
        let length = addressed.answer(frame, interface, question);
        if let Ok(Some(length)) = length
            && let Some(bytes) = addressed.answer_bytes(length)
        {
            match from {
                // It was paid for as a question.
                Ingress::Port(id, _) => self.deliver_bytes(bytes, id),
                // The host asks again.
                Ingress::Uplink => drop(with_frame(bytes, |answer| self.send_up(answer))),
            }
        }
        if let (Question::Metadata(_), Ingress::Port(id, mac)) = (question, from)
            && let Some(frames) = addressed.metadata.frames(mac)
        {
            frames.drain(|bytes| self.deliver_bytes(bytes, id));
        }
        self.addressed = Some(addressed);
        length.map(drop)
    }

    /// To a device, a frame of our own, whatever its limits.
    pub(in crate::network) fn deliver_bytes(&mut self, bytes: &mut [u8], to: PortId) {
        with_frame(bytes, |frame| self.give(frame, to));
    }

    /// To a device, as far as its limits admit it.
    fn deliver(&mut self, frame: &Frame<'_>, to: PortId) {
        let Some(port) = self.ports.get_mut(to.0).and_then(Option::as_mut) else { return };
        let mut action = Action::Accept;
        let Port { pairs, allowance, .. } = port;
        if let Some(Pair { rx: Some(queue), .. }) = pairs.first_mut()
            && let Some(allowance) = allowance
            && !allowance.admits(frame)
        {
            queue.refuse();
            action = Action::Limited;
        }
        if let Some(flows) = &mut self.flows {
            flows.add(port.interface.mac, flow::Direction::In, action, frame);
        }
        if action == Action::Accept {
            self.give(frame, to);
        }
    }

    /// To a device. A device without a running queue is like a cable with nobody at its end.
    fn give(&mut self, frame: &Frame<'_>, to: PortId) {
        let Some(port) = self.ports.get_mut(to.0).and_then(Option::as_mut) else { return };
        port.capture(frame, Direction::Inbound);
        let pair = self.steering.queue(frame, port.spread);
        self.kept += usize::from(self.with_rx(to, pair, |queue| queue.deliver(frame)).unwrap_or(false));
    }

    /// To the host.
    fn send_up(&mut self, frame: &Frame<'_>) -> Result<(), DropReason> {
        let link = match &self.uplink {
            Uplink::Up(_, link) => link,
            Uplink::None => return Err(DropReason::NoDestination),
            Uplink::Down(_) | Uplink::Awaited(..) => return Err(DropReason::Uplink),
        };
        match link.send(frame) {
            Ok(()) => Ok(()),
            Err(e) => {
                if link.is_lost(&e) {
                    self.uplink.lost(&self.poller, NEW_LINK, &e);
                }
                Err(DropReason::Uplink)
            }
        }
    }

    /// Shows guests what they have received in this turn: one interrupt each, at most.
    pub(super) fn publish(&mut self) {
        while let Some((id, pair)) = self.dirty.pop() {
            if let Some(queue) = rx_of(&mut self.ports, id, pair) {
                queue.settle();
            }
        }
    }
}

/// A frame of our own, which needs nothing more.
fn with_frame<T>(bytes: &mut [u8], f: impl FnOnce(&Frame<'_>) -> T) -> T {
    let (head, tail) = bytes.split_at_mut(bytes.len().min(HEAD_MAX));
    let tail_bytes = Bytes { start: 0, len: tail.len() };
    let tail = [VolatileSlice::from(tail)];
    f(&Frame { head, tail: Memory::Host(&tail), tail_bytes, offloads: Offloads::default() })
}
