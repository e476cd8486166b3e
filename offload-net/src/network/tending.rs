//! What a network's thread does because time has passed.

use std::time::{Duration, Instant};

use super::worker::Worker;

impl Worker {
    /// How long the thread may sleep; `None`: until somebody wakes it.
    pub(super) fn until_tending(&self) -> Option<Duration> {
        let next = self.addressed.as_ref()?.metadata.next()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Does what is due. Costs nothing while nobody has asked for anything.
    pub(super) fn tend(&mut self) {
        let Some(next) = self.addressed.as_ref().and_then(|a| a.metadata.next()) else { return };
        let now = Instant::now();
        if now < next {
            return;
        }
        let Some(mut addressed) = self.addressed.take() else { return };
        addressed.tend_metadata(now, |mac, frames| match self.switch.port(mac) {
            Some(id) => frames.drain(|bytes| self.deliver_bytes(bytes, id)),
            None => frames.drain(|_| {}),
        });
        self.addressed = Some(addressed);
    }
}
