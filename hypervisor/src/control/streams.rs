//! The two streams of the service: console and events.

use std::sync::Arc;
use std::time::Duration;

use proto::v1::hypervisor_event::Event;
use proto::v1::{ConsoleInput, ConsoleOutput, HypervisorEvent};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status as RpcStatus, Streaming};

use crate::machine::EventSubscription;
use crate::platform::console::{Console, Subscriber};

/// Messages that wait for a slow peer; what it does not take stays in the console's ring or the event queue.
const IN_FLIGHT: usize = 2;

/// The guest writes byte by byte; so long its output is gathered into one message.
const GATHER: Duration = Duration::from_millis(2);

type Sender<T> = mpsc::Sender<Result<T, RpcStatus>>;

/// Joins what the peer types to the console, and the console's output to the peer. Waits for the first message of the peer,
/// which says whether it wants what was written before.
pub(super) async fn console(
    console: Arc<Console>,
    mut input: Streaming<ConsoleInput>,
) -> Result<impl Stream<Item = Result<ConsoleOutput, RpcStatus>>, RpcStatus> {
    let first = input.message().await?.unwrap_or_default();
    let subscriber = console.subscribe(!first.skip_history);
    let (sender, output) = mpsc::channel(IN_FLIGHT);
    tokio::spawn(async move {
        let typing = async {
            console.type_in_all(&first.data).await;
            // A peer that has closed its side goes on reading.
            while let Ok(Some(message)) = input.message().await {
                console.type_in_all(&message.data).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = typing => {}
            () = send_output(subscriber, &sender) => {}
            () = sender.closed() => {}
        }
    });
    Ok(ReceiverStream::new(output))
}

async fn send_output(mut subscriber: Subscriber, sender: &Sender<ConsoleOutput>) {
    while subscriber.ready().await {
        tokio::time::sleep(GATHER).await;
        let Some(chunk) = subscriber.next().await else { return };
        let message = ConsoleOutput { data: chunk.data, dropped_bytes: chunk.dropped };
        if sender.send(Ok(message)).await.is_err() {
            return;
        }
    }
}

/// The current state, every later event, and an end after the VM's.
pub(super) fn events(
    subscription: EventSubscription,
) -> impl Stream<Item = Result<HypervisorEvent, RpcStatus>> {
    let (sender, output) = mpsc::channel(IN_FLIGHT);
    tokio::spawn(async move {
        tokio::select! {
            () = send_events(subscription, &sender) => {}
            () = sender.closed() => {}
        }
    });
    ReceiverStream::new(output)
}

async fn send_events(subscription: EventSubscription, sender: &Sender<HypervisorEvent>) {
    let EventSubscription { current, ended, mut later } = subscription;
    if sender.send(Ok(current)).await.is_err() {
        return;
    }
    if let Some(ended) = ended {
        let _ = sender.send(Ok(ended)).await;
        return;
    }
    loop {
        let event = match later.recv().await {
            Ok(event) => event,
            // The peer sees it by the gap in the sequence numbers.
            Err(RecvError::Lagged(_)) => continue,
            Err(RecvError::Closed) => return,
        };
        let is_last = matches!(event.event, Some(Event::Ended(_)));
        if sender.send(Ok(event)).await.is_err() || is_last {
            return;
        }
    }
}
