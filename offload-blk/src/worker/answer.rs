//! What the driver gets back.

use offload_card::ring::Segment;
use offload_card::{Chain, Ring};

use crate::io::Op;
use crate::request::Status;

/// Writes the status of the request in `chain` and returns it to the ring. `payload` is what was moved, if anything was to
/// be; `written` bytes were written at the beginning of what may be.
pub(super) fn answer(
    ring: &mut Ring,
    chain: &Chain,
    status: Status,
    payload: Option<(Op, u32)>,
    written: u32,
) {
    let counters = ring.counters();
    match (status, payload) {
        (Status::Ok, Some((op, length))) => {
            let counter = if op == Op::Read { &counters.bytes_in } else { &counters.bytes_out };
            counter.add(u64::from(length));
        }
        (Status::Ok, None) => {}
        (Status::IoError | Status::Unsupported, _) => counters.errors.add(1),
    }
    write_status(chain, status);
    // The driver may trust only what is written without a gap (VirtIO 1.3 section 2.7.8.2).
    let gap = chain.writable_len() - 1 != written;
    ring.push(chain.head(), if gap { written } else { written + 1 });
}

/// Writes the status, the last byte that may be written.
fn write_status(chain: &Chain, status: Status) {
    let Some(last) = chain.writable().last().map(Segment::iovec) else { return };
    // SAFETY: the segment is not empty, and the chain, which is borrowed, keeps it mapped. The guest may access it at the
    // same time, hence volatile.
    unsafe { last.iov_base.cast::<u8>().add(last.iov_len - 1).write_volatile(status.byte()) };
}
