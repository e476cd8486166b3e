//! Things done to all slots at once. Each may have to wait for its device, for a bounded time; so all of them wait together.

use std::sync::Arc;
use std::thread;

use proto::error::Error;
use proto::v1::SlotConfig;

use super::{SlotOptions, Status};
use crate::memory::GuestRam;
use crate::platform::irq;
use crate::slot::Slot;

/// Does `what` to every slot.
pub(super) fn for_each(slots: &[Arc<Slot>], what: impl Fn(&Slot) + Sync) {
    together(slots, |slot| what(slot));
}

/// Does `what` to every slot; says whether it was `true` for all.
pub(super) fn all(slots: &[Arc<Slot>], what: impl Fn(&Slot) -> bool + Sync) -> bool {
    together(slots, |slot| what(slot)).into_iter().all(|yes| yes)
}

/// Checks that KVM has a route for every interrupt that the slots may use at once.
pub(super) fn check_vectors(slots: &[Arc<Slot>]) -> Result<(), Error> {
    check_sum(slots.iter().map(|s| usize::from(s.vectors())).sum())
}

fn check_sum(wanted: usize) -> Result<(), Error> {
    match irq::MESSAGES {
        enough if wanted <= enough => Ok(()),
        most => Err(Error::invalid_field(
            "slots.queues",
            format!("the slots have {wanted} interrupts in all, one for each queue and one for each slot"),
        )
        .remedy(format!("KVM has {most}: give the slots fewer queues"))),
    }
}

/// Connects every slot to its device; none if one fails.
pub(super) fn connect(
    configs: &[SlotConfig],
    ram: &Arc<GuestRam>,
    status: &Arc<Status>,
    options: &SlotOptions,
) -> Result<Vec<Arc<Slot>>, Error> {
    together(configs, |config| {
        Slot::connect_with(config, Arc::clone(ram), Arc::clone(status) as _, options(config))
    })
    .into_iter()
    .collect()
}

/// The results of `what` for each of `all`, in order, one thread for each but the first.
fn together<T: Sync, R: Send>(all: &[T], what: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let Some((first, others)) = all.split_first() else { return Vec::new() };
    thread::scope(|scope| {
        let what = &what;
        let threads: Vec<_> = others.iter().map(|one| scope.spawn(move || what(one))).collect();
        let mut results = vec![what(first)];
        // A panic would have ended the process.
        results.extend(threads.into_iter().filter_map(|t| t.join().ok()));
        results
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn more_interrupts_than_kvm_has_are_refused() {
        assert!(check_sum(irq::MESSAGES).is_ok());
        let error = check_sum(irq::MESSAGES + 1).unwrap_err();
        assert_eq!(error.reason(), proto::error::ErrorReason::InvalidField);
        assert!(error.to_string().contains("fewer queues"), "{error}");
    }

    #[test]
    fn results_are_in_order_and_waits_overlap() {
        let all = Barrier::new(4);
        let doubled = together(&[1, 2, 3, 4], |n| {
            all.wait();
            n * 2
        });
        assert_eq!(doubled, [2, 4, 6, 8]);
    }
}
