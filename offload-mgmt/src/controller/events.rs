//! What happened, told to every watcher. The queue is bounded: a watcher that is too slow learns how much it missed,
//! and holds nobody up.

use std::sync::{Mutex, PoisonError};

use proto::v1::{Event, event};
use tokio::sync::{broadcast, mpsc};
use tonic::Status;

use super::clock::now_us;
use super::ending;

/// Events a watcher may be behind.
const BACKLOG: usize = 1024;

/// The one queue of events of this controller process.
#[derive(Debug)]
pub(crate) struct EventBus {
    // None once closed.
    sender: Mutex<(u64, Option<broadcast::Sender<Event>>)>,
}

impl Default for EventBus {
    fn default() -> Self {
        Self { sender: Mutex::new((0, Some(broadcast::channel(BACKLOG).0))) }
    }
}

impl EventBus {
    /// Tells every watcher. Sequence numbers are given under the same lock that orders the queue.
    pub(crate) fn publish(&self, vm_id: &str, vm_name: &str, event: event::Event) {
        let mut guard = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        let (sequence, sender) = &mut *guard;
        *sequence += 1;
        if let Some(sender) = sender {
            // No watcher is no error.
            let _ = sender.send(Event {
                sequence: *sequence,
                time_us: now_us(),
                vm_id: vm_id.to_owned(),
                vm_name: vm_name.to_owned(),
                event: Some(event),
            });
        }
    }

    /// Events from now on, of one VM or of all. The stream of one VM ends after its `deleted`; every stream ends with
    /// an error at [`EventBus::close`].
    pub(crate) fn watch(&self, vm_id: Option<String>) -> mpsc::Receiver<Result<Event, Status>> {
        let (tx, rx) = mpsc::channel(16);
        let source = {
            let guard = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
            guard.1.as_ref().map(broadcast::Sender::subscribe)
        };
        match source {
            Some(source) => drop(tokio::spawn(forward(source, tx, vm_id))),
            // There is room: the channel is new.
            None => drop(tx.try_send(Err(ending().into()))),
        }
        rx
    }

    /// Ends every watcher's stream, after what is queued for it.
    pub(crate) fn close(&self) {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).1 = None;
    }
}

async fn forward(
    mut source: broadcast::Receiver<Event>,
    tx: mpsc::Sender<Result<Event, Status>>,
    vm_id: Option<String>,
) {
    loop {
        let received = tokio::select! {
            received = source.recv() => received,
            () = tx.closed() => return,
        };
        let event = match received {
            Ok(event) if vm_id.as_ref().is_some_and(|id| *id != event.vm_id) => continue,
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                Event { time_us: now_us(), event: Some(event::Event::Missed(missed)), ..Event::default() }
            }
            Err(broadcast::error::RecvError::Closed) => {
                // A watcher that is gone needs no word.
                let _ = tx.send(Err(ending().into())).await;
                return;
            }
        };
        let last = vm_id.is_some() && matches!(event.event, Some(event::Event::Deleted(_)));
        if tx.send(Ok(event)).await.is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn drain(rx: &mut mpsc::Receiver<Result<Event, Status>>) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(Ok(e)) = rx.recv().await {
            events.push(e);
        }
        events
    }

    #[tokio::test]
    async fn a_watcher_of_one_vm_sees_only_it_until_it_is_deleted() {
        let bus = EventBus::default();
        let mut rx = bus.watch(Some("a".into()));
        bus.publish("a", "one", event::Event::Created(true));
        bus.publish("b", "two", event::Event::Created(true));
        bus.publish("a", "one", event::Event::Deleted(true));
        bus.publish("a", "one", event::Event::Created(true));
        let events = drain(&mut rx).await;
        assert_eq!(events.iter().map(|e| e.sequence).collect::<Vec<_>>(), [1, 3]);
    }

    #[tokio::test]
    async fn a_slow_watcher_learns_how_many_it_missed_and_gets_the_rest() {
        let bus = EventBus::default();
        let mut rx = bus.watch(None);
        let sent = BACKLOG as u64 * 3;
        for _ in 0..sent {
            bus.publish("a", "one", event::Event::Created(true));
        }
        bus.close();
        let mut events = Vec::new();
        let end = loop {
            match rx.recv().await.expect("an error before the end") {
                Ok(e) => events.push(e),
                Err(end) => break end,
            }
        };
        // Not as if there were nothing more to come; nor for who comes later.
        assert_eq!((end.code(), rx.recv().await.is_none()), (tonic::Code::Unavailable, true));
        let late = bus.watch(None).recv().await.expect("an error");
        assert_eq!(late.expect_err("an error").code(), tonic::Code::Unavailable);
        let missed: u64 = events
            .iter()
            .filter_map(|e| if let Some(event::Event::Missed(n)) = e.event { Some(n) } else { None })
            .sum();
        let delivered = events.iter().filter(|e| matches!(e.event, Some(event::Event::Created(_)))).count();
        assert!(missed > 0);
        assert_eq!(missed + delivered as u64, sent);
        assert_eq!(events.last().map(|e| e.sequence), Some(sent));
    }
}
