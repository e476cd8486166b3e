//! `outboard vm capture`: a pcapng file on standard output.

use std::io::{self, IsTerminal};
use std::time::Duration;

use proto::v1::CaptureNicRequest;
use tokio::io::AsyncWriteExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::client::{Client, QUICK};
use super::failure::Failure;
use crate::controller::rpc;

/// How long the last block may take to be written after a signal.
const LAST_WRITE: Duration = Duration::from_secs(1);

/// Captures until it is told to end, by a count or a signal, or nobody reads any more.
///
/// # Errors
/// Standard output is a terminal, the controller says no, or the connection breaks.
pub(super) async fn run(client: &Client, request: CaptureNicRequest) -> Result<(), Failure> {
    if io::stdout().is_terminal() {
        return Err(Failure::Local(
            "a capture is binary, and standard output is a terminal".to_owned(),
            "send it to a program or a file: outboard vm capture VM | tshark -r -".to_owned(),
        ));
    }
    let mut api = client.api();
    let mut signals = Signals::new()?;
    let mut parts = client.wait("Asking for the capture", QUICK, api.capture_nic(request)).await?;
    let (mut frames, mut lost) = (0, 0);
    let mut out = tokio::io::stdout();
    loop {
        let part = tokio::select! {
            part = parts.message() => part.map_err(|s| client.failure(rpc::failure(s)))?,
            () = signals.any() => break,
        };
        let Some(part) = part else { break };
        let written = async {
            out.write_all(&part.pcapng).await?;
            out.flush().await
        };
        tokio::pin!(written);
        tokio::select! {
            result = &mut written => result?,
            () = signals.any() => {
                // So that the file ends with a whole block, if whoever reads it still does.
                if let Ok(result) = tokio::time::timeout(LAST_WRITE, written).await {
                    result?;
                }
                break;
            }
        }
        (frames, lost) = (part.frames, part.lost);
    }
    let missing = match lost {
        0 => String::new(),
        _ => format!(", {lost} more were not: they came faster than they were read"),
    };
    eprintln!("{frames} frames captured{missing}");
    Ok(())
}

/// Those by which a person or the system ends a command.
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    async fn any(&mut self) {
        let [a, b, c] = &mut self.0;
        tokio::select! {
            _ = a.recv() => {}
            _ = b.recv() => {}
            _ = c.recv() => {}
        }
    }
}
