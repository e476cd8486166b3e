//! What is sent, by devices and by the host: whose turn it is, and taking it in.

use std::io::ErrorKind;

use vm_memory::VolatileSlice;

use super::port::{Pair, Port, tx_of};
use super::{NEW_LINK, Worker};
use crate::capture::Direction;
use crate::drops::DropReason;
use crate::flow::{self, Action};
use crate::frame::header::{LEN, VnetHeader};
use crate::frame::offload::{self, Allowed};
use crate::frame::{Bytes, Frame, HEAD_MAX, Memory};
use crate::mac::MacAddr;
use crate::network::tx::{self, TxHead};
use crate::network::uplink::Uplink;
use crate::switch::{Ingress, PortId};

/// Frames taken from one device before the next has its turn. At its end both sides are told, and work on what they got or got
/// back while we go on: with turns of 64, and senders that have so many under way, they and we worked in turns only.
const BUDGET: usize = 16;
/// The same of the host, who costs a system call to ask whether there are more.
const HOST_BUDGET: usize = 64;
/// And bytes.
const BUDGET_BYTES: usize = 256 << 10;
/// A chain's descriptors cost its sender as much of [`BUDGET_BYTES`] as so many bytes each.
const DESCRIPTOR_BYTES: usize = 128;

/// What is left of a source's turn.
struct Budget {
    frames: usize,
    bytes: usize,
}

impl Budget {
    fn is_spent(&self) -> bool {
        self.frames == 0 || self.bytes == 0
    }

    fn take(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

impl Worker {
    /// Takes frames from the transmit queues that are looked at; how many.
    pub(super) fn look(&mut self) -> usize {
        let mut all = 0;
        self.kept = 0;
        let hit = self.pacer.looks_in_vain();
        for i in 0..self.active.len() {
            let Some(id) = self.active.get(i).copied() else { break };
            let Some((pair, frames)) = self.transmit(id) else { continue };
            if all == 0
                && hit
                && let Some(queue) = tx_of(&mut self.ports, id, pair)
            {
                queue.ring.counters().poll_hits.add(1);
            }
            all += frames;
        }
        if all > 0 {
            self.pacer.worked();
        }
        if !self.waiting.is_empty() {
            self.active.retain(|id| !self.waiting.contains(*id));
        }
        all
    }

    /// Looks again at queues whose next frame may go now.
    pub(super) fn release(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.release(|id, queue, waited| self.resume(id, queue, waited));
        self.waiting = waiting;
    }

    /// Looks again at the queues of a port that has waited for its limits, because of this queue and for so many nanoseconds.
    pub(super) fn resume(&mut self, id: PortId, queue: u16, waited: u64) {
        if let Some(queue) = tx_of(&mut self.ports, id, usize::from(queue / 2)) {
            queue.ring.counters().throttled_ns.add(waited);
        }
        if self.ports.get(id.0).is_some_and(Option::is_some) {
            self.active.push(id);
        }
    }

    /// Asks for kicks, before the thread sleeps. Queues in which there is something already are still looked at.
    pub(super) fn rest(&mut self) {
        let ports = &mut self.ports;
        self.active.retain(|id| {
            let Some(port) = ports.get_mut(id.0).and_then(Option::as_mut) else { return false };
            port.listed = false;
            for queue in port.pairs.iter_mut().filter_map(|p| p.tx.as_mut()).filter(|q| q.active) {
                queue.active = queue.ring.enable_kicks();
                if queue.active {
                    queue.ring.disable_kicks();
                } else {
                    queue.ring.counters().sleeps.add(1);
                }
                port.listed |= queue.active;
            }
            port.listed
        });
    }

    /// Forwards frames that a device sends; how many, and the first pair from which some came. However many queues it has,
    /// it has no more than its turn: the queue that would have been next is the first in the next one.
    fn transmit(&mut self, id: PortId) -> Option<(usize, usize)> {
        let port = self.ports.get(id.0)?.as_ref()?;
        let (first, count, mac) = (port.next, port.pairs.len(), port.interface.mac);
        let mut budget = Budget { frames: BUDGET, bytes: BUDGET_BYTES };
        let mut found = None;
        for pair in (first..count).chain(0..first) {
            if !tx_of(&mut self.ports, id, pair).is_some_and(|queue| queue.active) {
                continue;
            }
            let before = budget.frames;
            let over = self.transmit_from(id, pair, mac, &mut budget);
            if budget.frames < before && found.is_none() {
                found = Some(pair);
            }
            if over {
                if let Some(port) = self.ports.get_mut(id.0).and_then(Option::as_mut) {
                    port.next = (pair + 1) % count;
                }
                break;
            }
        }
        Some((found?, BUDGET - budget.frames))
    }

    /// Forwards frames of one of its queues; true if that ends the device's turn, or its limits do.
    fn transmit_from(&mut self, id: PortId, pair: usize, mac: MacAddr, budget: &mut Budget) -> bool {
        let Some(queue) = tx_of(&mut self.ports, id, pair) else { return false };
        let allowed = queue.allowed;
        let mut chain = std::mem::take(&mut queue.chain);
        // Made when there is a frame: most looks at a queue find none.
        let mut buf: Option<TxHead> = None;
        let mut heads = 0;
        let mut held_back = false;
        while !budget.is_spent() {
            let Some(port) = self.ports.get_mut(id.0).and_then(Option::as_mut) else { return true };
            let Some(Pair { tx: Some(queue), .. }) = port.pairs.get_mut(pair) else { return true };
            if let Some(allowance) = &port.allowance
                && let Some(held) = allowance.holds_back(&mut queue.ring)
            {
                self.waiting.add(id, held);
                held_back = true;
                break;
            }
            match queue.ring.pop(&mut chain) {
                Ok(true) => budget.frames -= 1,
                Ok(false) => break,
                Err(e) => {
                    queue.ring.shared().log.say(|left_out| {
                        tracing::warn!(network = self.name, device = %mac, "transmit queue broken: {e}{left_out}");
                    });
                    break;
                }
            }
            let buf = buf.get_or_insert_with(tx::empty_head);
            let parsed = tx::parse(&chain, buf, allowed, self.mtu);
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
            budget.take(chain.readable_len() as usize + DESCRIPTOR_BYTES * usize::from(chain.descriptors()));
            let Some(port) = self.ports.get_mut(id.0).and_then(Option::as_mut) else { return true };
            let Port { pairs, drops, .. } = port;
            let Some(Pair { tx: Some(queue), .. }) = pairs.get_mut(pair) else { return true };
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
        if let Some(queue) = tx_of(&mut self.ports, id, pair) {
            queue.ring.counters().copied.add(heads as u64);
            queue.ring.publish();
            if queue.ring.memory_changed() {
                // It has been returned, and may be all that keeps what was removed.
                chain.clear();
            }
            queue.chain = chain;
        }
        held_back || budget.is_spent()
    }

    /// Forwards frames from the host.
    pub(super) fn receive(&mut self) {
        let mut buf = std::mem::take(&mut self.from_host);
        let mut bytes = 0;
        for _ in 0..HOST_BUDGET {
            if bytes > BUDGET_BYTES {
                break;
            }
            let Uplink::Up(_, link) = &self.uplink else { break };
            let n = match link.read(&mut buf) {
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => {
                    self.uplink.lost(&self.poller, NEW_LINK, &e);
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
