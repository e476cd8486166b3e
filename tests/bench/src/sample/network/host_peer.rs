//! The host's end of the network workloads: answers what a guest sends to its address.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::system::HOST_IP;

/// The port of the guest's network jobs, unless they are told another.
const PORT: u16 = 9000;

/// How long the host's address may take to be there, and how often the thread looks whether it is to end.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(5);
const GLANCE: Duration = Duration::from_millis(50);

/// Echoes UDP on the host's address in the guests' network, until dropped.
pub(super) struct HostPeer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl HostPeer {
    /// Begins, when the address is there: on this thread's network namespace.
    pub(super) fn start() -> anyhow::Result<Self> {
        let began = Instant::now();
        let socket = loop {
            match UdpSocket::bind((HOST_IP, PORT)) {
                Err(e) if e.kind() == ErrorKind::AddrNotAvailable && began.elapsed() < ADDRESS_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                bound => break bound.with_context(|| format!("listening on {HOST_IP}:{PORT}"))?,
            }
        };
        socket.set_read_timeout(Some(GLANCE))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    // A guest that has gone needs no answer.
                    let _ = socket.send_to(&buffer[..length], from);
                }
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for HostPeer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
