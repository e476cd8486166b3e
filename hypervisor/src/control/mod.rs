//! The control service: gRPC `outboard.v1.Hypervisor` on a Unix socket, on one thread of its own.
//!
//! Calls go to the machine's thread and wait for its answer without blocking this one, so that reading state, numbers, events
//! and the console works while the machine is busy.

mod listener;
mod service;
mod streams;

use std::io;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use proto::v1::hypervisor_server::HypervisorServer;
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::machine::{MachineHandle, Status};
use service::Service;

pub use listener::{ListenError, Listener};

/// Stack of the control thread in bytes. Its deepest frames are those of the HTTP/2 server in an unoptimised build.
const STACK_SIZE: usize = 512 << 10;

/// How long the last events and console bytes may take to be read by slow subscribers once the VM has ended.
const FAREWELL: Duration = Duration::from_secs(1);

/// The running service.
#[derive(Debug)]
pub struct Control {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
    path: Option<PathBuf>,
}

impl Control {
    /// Serves on `listener` from now on.
    ///
    /// # Errors
    /// What the host says to a thread and a runtime.
    pub fn start(listener: Listener, machine: MachineHandle, status: Arc<Status>) -> io::Result<Self> {
        let Listener { socket, path } = listener;
        socket.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let (stop, stopped) = oneshot::channel();
        let thread =
            thread::Builder::new().name("control".into()).stack_size(STACK_SIZE).spawn(move || {
                runtime.block_on(serve(socket, Service::new(machine, status), stopped));
            })?;
        Ok(Self { stop, thread, path })
    }

    /// Stops accepting, lets subscribers read the end of their streams for a bounded time, and returns.
    pub fn finish(self) {
        if let Some(path) = &self.path {
            // Gone already is as good.
            let _ = std::fs::remove_file(path);
        }
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}

async fn serve(socket: StdUnixListener, service: Service, stopped: oneshot::Receiver<()>) {
    let incoming = match UnixListener::from_std(socket) {
        Ok(listener) => UnixListenerStream::new(listener),
        Err(e) => {
            eprintln!("outboard-hypervisor: cannot serve the control socket: {e}");
            return;
        }
    };
    let (begin_farewell, farewell) = oneshot::channel();
    let stopped = async {
        // A dropped sender means the same.
        let _ = stopped.await;
        let _ = begin_farewell.send(());
    };
    let server =
        Server::builder().serve_with_incoming_shutdown(HypervisorServer::new(service), incoming, stopped);
    let deadline = async {
        let _ = farewell.await;
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        result = server => if let Err(e) = result {
            eprintln!("outboard-hypervisor: the control service failed: {e}");
        },
        () = deadline => {}
    }
}
