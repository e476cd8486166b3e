//! What a network's thread does because time has passed.

use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use super::addressed::{ADVERTISE_EVERY, Addressed};
use super::worker::Worker;
use crate::switch::PortId;

impl Worker {
    /// How long the thread may sleep; `None`: until somebody wakes it.
    pub(super) fn until_tending(&self) -> Option<Duration> {
        Some(self.next_tending()?.saturating_duration_since(Instant::now()))
    }

    fn next_tending(&self) -> Option<Instant> {
        let addressed = self.addressed.as_ref()?;
        addressed.metadata.next().into_iter().chain(addressed.next_advertisement).min()
    }

    /// Does what is due.
    pub(super) fn tend(&mut self) {
        let Some(next) = self.next_tending() else { return };
        let now = Instant::now();
        if now < next {
            return;
        }
        let Some(mut addressed) = self.addressed.take() else { return };
        addressed.tend_metadata(now, |mac, frames| match self.switch.port(mac) {
            Some(id) => frames.drain(|bytes| self.deliver_bytes(bytes, id)),
            None => frames.drain(|_| {}),
        });
        if addressed.next_advertisement.is_some_and(|at| at <= now) {
            addressed.next_advertisement = Some(now + ADVERTISE_EVERY);
            self.advertise(&mut addressed);
        }
        self.addressed = Some(addressed);
    }

    /// Tells all devices about IPv6, so that they do not take the gateway for gone.
    fn advertise(&mut self, addressed: &mut Addressed) {
        for id in (0..self.ports.len()).map(PortId) {
            let Some(port) = self.ports.get(id.0).and_then(Option::as_ref) else { continue };
            if let Some(length) = addressed.advertisement(&port.interface, Ipv6Addr::UNSPECIFIED)
                && let Some(bytes) = addressed.answer_bytes(length)
            {
                self.deliver_bytes(bytes, id);
            }
        }
    }
}
