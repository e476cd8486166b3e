//! What is sent, by devices and by the host: whose turn it is, and taking it in.

use std::io::ErrorKind;

use vm_memory::VolatileSlice;

use super::port::{Port, tx_of};
use super::{NEW_TAP, Worker};
use crate::capture::Direction;
use crate::drops::DropReason;
use crate::flow::{self, Action};
use crate::frame::header::{LEN, VnetHeader};
use crate::frame::offload::{self, Allowed};
use crate::frame::{Bytes, Frame, HEAD_MAX, Memory};
use crate::network::tx::{self, TxHead};
use crate::network::uplink::Uplink;
use crate::switch::{Ingress, PortId};

/// Frames taken from one source before the next has its turn.
const BUDGET: usize = 64;
/// And bytes: receivers are told at the end of a turn, and are to work on what they got while we go on.
const BUDGET_BYTES: usize = 256 << 10;
/// A chain's descriptors cost its sender as much of [`BUDGET_BYTES`] as so many bytes each.
const DESCRIPTOR_BYTES: usize = 128;

impl Worker {
    /// Takes frames from the transmit queues that are looked at; how many.
    pub(super) fn look(&mut self) -> usize {
        let mut all = 0;
        for i in 0..self.active.len() {
            let Some(id) = self.active.get(i).copied() else { break };
            let frames = self.transmit(id);
            if frames > 0
                && all == 0
                && self.pacer.worked()
                && let Some(queue) = tx_of(&mut self.ports, id)
            {
                queue.ring.counters().poll_hits.add(1);
            }
            all += frames;
        }
        if !self.waiting.is_empty() {
            self.active.retain(|id| !self.waiting.contains(*id));
        }
        all
    }

    /// Looks again at queues whose next frame may go now.
    pub(super) fn release(&mut self) {
        let (ports, active) = (&mut self.ports, &mut self.active);
        self.waiting.release(|id, waited| {
            if let Some(queue) = tx_of(ports, id) {
                queue.ring.counters().throttled_ns.add(waited);
                active.push(id);
            }
        });
    }

    /// Asks for kicks, before the thread sleeps. Queues in which there is something already are still looked at.
    pub(super) fn rest(&mut self) {
        let ports = &mut self.ports;
        self.active.retain(|id| {
            let Some(queue) = tx_of(ports, *id) else { return false };
            queue.active = queue.ring.enable_kicks();
            if queue.active {
                queue.ring.disable_kicks();
            } else {
                queue.ring.counters().sleeps.add(1);
            }
            queue.active
        });
    }

    /// Forwards frames that a device sends; how many.
    fn transmit(&mut self, id: PortId) -> usize {
        let Some(port) = self.ports.get(id.0).and_then(Option::as_ref) else { return 0 };
        let mac = port.interface.mac;
        let Some(queue) = tx_of(&mut self.ports, id) else { return 0 };
        let allowed = queue.allowed;
        let mut chain = std::mem::take(&mut queue.chain);
        let mut buf: TxHead = [0; LEN + HEAD_MAX];
        let mut frames = 0;
        let mut bytes = 0;
        let mut heads = 0;
        while frames < BUDGET && bytes <= BUDGET_BYTES {
            let port = self.ports.get_mut(id.0).and_then(Option::as_mut);
            let Some(Port { tx: Some(queue), allowance, .. }) = port else { return frames };
            if let Some(allowance) = allowance
                && let Some(held) = allowance.holds_back(&mut queue.ring)
            {
                self.waiting.add(id, held);
                break;
            }
            match queue.ring.pop(&mut chain) {
                Ok(true) => frames += 1,
                Ok(false) => break,
                Err(e) => {
                    queue.ring.shared().log.say(|left_out| {
                        tracing::warn!(network = self.name, device = %mac, "transmit queue broken: {e}{left_out}");
                    });
                    break;
                }
            }
            let parsed = tx::parse(&chain, &mut buf, allowed, self.mtu);
            if let Some(port) = self.ports.get_mut(id.0).and_then(Option::as_mut) {
                if let Ok(frame) = &parsed {
                    port.capture(frame, Direction::Outbound);
                }
                if let Some(allowance) = &port.allowance {
                    let malformed = (1, chain.readable_len().into());
                    allowance.sent(parsed.as_ref().map_or(malformed, Frame::on_wire));
                }
            }
            let outcome = match parsed {
                Ok(frame) => {
                    let outcome = self.forward(&frame, Ingress::Port(id, mac));
                    if let Some(flows) = &mut self.flows {
                        let action = outcome.map_or_else(Action::Reject, |()| Action::Accept);
                        flows.add(mac, flow::Direction::Out, action, &frame);
                    }
                    outcome.map(|()| frame.bytes())
                }
                Err(_) => Err(DropReason::Malformed),
            };
            heads += (chain.readable_len() as usize).clamp(LEN, LEN + HEAD_MAX) - LEN;
            bytes += chain.readable_len() as usize + DESCRIPTOR_BYTES * usize::from(chain.descriptors());
            let Some(Port { tx: Some(queue), drops, .. }) = self.ports.get_mut(id.0).and_then(Option::as_mut)
            else {
                return frames;
            };
            let counters = queue.ring.counters();
            match outcome {
                Ok(bytes) => counters.bytes_out.add(bytes as u64),
                Err(reason) => {
                    counters.dropped.add(1);
                    counters.errors.add(u64::from(reason.is_senders_fault()));
                    drops.add(reason);
                }
            }
            queue.ring.push(chain.head(), 0);
        }
        if let Some(queue) = tx_of(&mut self.ports, id) {
            queue.ring.counters().copied.add(heads as u64);
            queue.ring.publish();
            if queue.ring.memory_changed() {
                // It has been returned, and may be all that keeps what was removed.
                chain.clear();
            }
            queue.chain = chain;
        }
        frames
    }

    /// Forwards frames from the host.
    pub(super) fn receive(&mut self) {
        let mut buf = std::mem::take(&mut self.from_host);
        let mut bytes = 0;
        for _ in 0..BUDGET {
            if bytes > BUDGET_BYTES {
                break;
            }
            let Uplink::Up(_, tap) = &self.uplink else { break };
            let n = match tap.read(&mut buf) {
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => {
                    self.uplink.lost(&self.poller, NEW_TAP, &e);
                    break;
                }
            };
            let Some((header, frame)) = buf.get_mut(..n).and_then(<[u8]>::split_first_chunk_mut) else {
                continue;
            };
            let header = VnetHeader::from_bytes(header);
            let len = frame.len();
            bytes += len;
            let (head, tail) = frame.split_at_mut(len.min(HEAD_MAX));
            // What the kernel gives us is well-formed, but nothing later would bear it if it were not.
            let Ok(offloads) = offload::check(&header, head, len, self.mtu, Allowed::HOST) else { continue };
            let tail_bytes = Bytes { start: 0, len: tail.len() };
            let tail = [VolatileSlice::from(tail)];
            // A frame that goes nowhere is the host's to count: it has no queue here.
            let _ = self
                .forward(&Frame { head, tail: Memory::Host(&tail), tail_bytes, offloads }, Ingress::Uplink);
        }
        self.from_host = buf;
    }
}
