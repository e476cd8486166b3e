//! Waiting for kicks and orders, when nothing else can come.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use offload_card::poll::Poller;

use super::Wakers;

const KICK: u64 = 0;
const ORDERS: u64 = 1;

/// Waits for kicks and orders.
#[derive(Debug)]
pub(crate) struct Waiter {
    poller: Poller,
    /// Seen and not yet counted.
    pub(super) kicks: u64,
    /// Keeps what the poller watches open.
    _wakers: Wakers,
}

impl Waiter {
    pub(super) fn new(wakers: Wakers) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add_edge(&wakers.kick, KICK)?;
        poller.add_edge(&wakers.orders, ORDERS)?;
        Ok(Self { poller, kicks: 0, _wakers: wakers })
    }

    /// Can be read when a wait would end.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    /// For at most `timeout`.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.kicks += self.poller.wait(timeout)?.filter(|token| *token == KICK).count() as u64;
        Ok(())
    }
}
