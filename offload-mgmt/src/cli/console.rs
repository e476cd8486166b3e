//! `outboard vm console`: a terminal, or a pipe, on a VM's serial port.

use std::io::{self, IsTerminal, Write};

use nix::sys::termios::{self, SetArg, Termios};
use proto::v1::{ConsoleInput, ConsoleOutput};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::client::{Client, QUICK};
use super::failure::Failure;
use crate::controller::rpc;

/// Ctrl-], as telnet has it.
const ESCAPE: u8 = 0x1d;

/// Attaches until the VM ends, or the escape character is typed.
///
/// # Errors
/// The controller says no, or the connection breaks.
pub(crate) async fn attach(client: &Client, vm: &str, skip_history: bool) -> Result<(), Failure> {
    let (sender, input) = mpsc::channel(64);
    let first = ConsoleInput { vm: vm.to_owned(), data: Vec::new(), skip_history };
    // There is room: the channel is new.
    let _ = sender.try_send(first);
    let mut api = client.api();
    let output =
        client.wait("Asking for the console", QUICK, api.console(ReceiverStream::new(input))).await?;

    // Raw only once the VM is known to be there: an error before leaves the terminal alone.
    let raw = RawMode::enter()?;
    let interactive = raw.is_some();
    if interactive {
        note(&format!("Connected to {vm}. Leave with Ctrl-]."));
    }
    let (leave, left) = oneshot::channel();
    tokio::spawn(read_keys(sender, interactive, leave));
    let mut terminated = signal(SignalKind::terminate())?;
    let mut hung_up = signal(SignalKind::hangup())?;
    let result = tokio::select! {
        result = print(client, output) => result.map(|()| format!("{vm}'s console has ended.")),
        Ok(()) = left => Ok(format!("Left {vm}; it runs on.")),
        _ = terminated.recv() => Ok(String::new()),
        _ = hung_up.recv() => Ok(String::new()),
    };
    drop(raw);
    let last = result?;
    if interactive && !last.is_empty() {
        eprintln!("\n{last}");
    }
    Ok(())
}

async fn print(client: &Client, mut output: Streaming<ConsoleOutput>) -> Result<(), Failure> {
    loop {
        let message = output.message().await.map_err(|s| client.failure(rpc::failure(s)))?;
        let Some(message) = message else { return Ok(()) };
        if message.dropped_bytes > 0 {
            note(&format!("[{} bytes of output were lost here]", message.dropped_bytes));
        }
        let mut out = io::stdout().lock();
        out.write_all(&message.data)?;
        out.flush()?;
    }
}

/// Passes on what is typed or piped. On a terminal, the escape character leaves.
async fn read_keys(sender: mpsc::Sender<ConsoleInput>, interactive: bool, leave: oneshot::Sender<()>) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = [0; 4096];
    loop {
        let bytes = match stdin.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(n) => buffer.get(..n).unwrap_or_default(),
        };
        let escape = bytes.iter().position(|b| interactive && *b == ESCAPE);
        let data = bytes.get(..escape.unwrap_or(bytes.len())).unwrap_or_default().to_vec();
        if !data.is_empty() && sender.send(ConsoleInput { data, ..ConsoleInput::default() }).await.is_err() {
            break;
        }
        if escape.is_some() {
            // Nobody waits only if all is over.
            let _ = leave.send(());
            return;
        }
    }
    if !interactive {
        // The end of the input is not the end of the output: the stream stays open, and leaving is the caller's.
        std::future::pending::<()>().await;
    }
    // A terminal that ended: nobody is there.
    let _ = leave.send(());
}

/// A line on standard error, whatever mode the terminal is in.
fn note(text: &str) {
    // Nothing can be said about standard error failing.
    let _ = io::stderr().write_all(format!("\r{text}\r\n").as_bytes());
}

/// The terminal passes every key on as it is, until this is dropped.
struct RawMode {
    before: Termios,
}

impl RawMode {
    /// `None` if standard input is no terminal.
    fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        // A panic aborts, so nothing would be dropped.
        let (saved, earlier) = (before.clone(), std::panic::take_hook());
        let saved = std::sync::Mutex::new(saved);
        std::panic::set_hook(Box::new(move |panic| {
            if let Ok(saved) = saved.lock() {
                let _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &saved);
            }
            earlier(panic);
        }));
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no mode.
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before);
    }
}
