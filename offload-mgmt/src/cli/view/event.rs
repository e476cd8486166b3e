//! What happened to VMs.

use proto::v1::{self, EndReason, ResetReason, VmState, event};
use serde::Serialize;

use super::{link, word};

/// Something that happened.
#[derive(Debug, Serialize)]
pub(crate) struct Event {
    /// Counts up within one controller process.
    pub sequence: u64,
    /// When.
    pub time_us: i64,
    /// To which VM.
    pub vm_id: String,
    /// Its name.
    pub vm_name: String,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// What happened: `event` names it, and the fields beside it say more.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[allow(missing_docs)]
pub(crate) enum What {
    Created,
    Deleted,
    State { state: String },
    Link { slot: String, link: String, reason: String },
    Ended { reason: String, detail: String },
    Reset { reason: String },
    ConfigChanged { slot: String },
    Missed { events: u64 },
    Unknown,
}

impl From<v1::Event> for Event {
    fn from(e: v1::Event) -> Self {
        let what = match e.event {
            Some(event::Event::Created(_)) => What::Created,
            Some(event::Event::Deleted(_)) => What::Deleted,
            Some(event::Event::State(state)) => {
                let state = VmState::try_from(state).unwrap_or_default();
                What::State { state: word(state.as_str_name(), "VM_STATE_") }
            }
            Some(event::Event::Link(l)) => {
                What::Link { link: link(l.state()), slot: l.slot_id, reason: l.reason }
            }
            Some(event::Event::Ended(e)) => What::Ended { reason: end(e.reason()), detail: e.detail },
            Some(event::Event::Reset(r)) => What::Reset { reason: reset(r.reason()) },
            Some(event::Event::ConfigChangedSlot(slot)) => What::ConfigChanged { slot },
            Some(event::Event::Missed(events)) => What::Missed { events },
            None => What::Unknown,
        };
        Self { sequence: e.sequence, time_us: e.time_us, vm_id: e.vm_id, vm_name: e.vm_name, what }
    }
}

fn end(reason: EndReason) -> String {
    word(reason.as_str_name(), "END_REASON_")
}

fn reset(reason: ResetReason) -> String {
    word(reason.as_str_name(), "RESET_REASON_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_flat_objects() {
        let event = v1::Event {
            sequence: 7,
            time_us: 1,
            vm_id: "a".into(),
            vm_name: "web".into(),
            event: Some(event::Event::State(VmState::Running.into())),
        };
        let json = serde_json::to_string(&Event::from(event)).expect("json");
        assert_eq!(
            json,
            r#"{"sequence":7,"time_us":1,"vm_id":"a","vm_name":"web","event":"state","state":"running"}"#
        );
    }
}
