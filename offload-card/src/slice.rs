//! How long the scheduler lets a thread run at a time.
//!
//! Guests that poll keep every processor busy. Linux from 6.12 on lets a thread that is woken run at once if it asks for a shorter slice
//! than the one that runs, and otherwise when that one's slice is over, which takes up to a tick. What a guest waits for while
//! it has no device consists of many short steps of several threads, each of which would wait so long. It needs no right, as nobody
//! gets more of a processor by it: only sooner. (`sched(7)`, `sched_setattr(2)`.)

use std::io;

/// As short as the kernel allows, in nanoseconds.
const SHORTEST_NS: u64 = 100_000;

/// The calling thread, and those it starts, run for a short time and soon.
///
/// # Errors
/// What the host says; nothing has changed.
pub fn shorten() -> io::Result<()> {
    set(SHORTEST_NS)
}

/// The calling thread, and those it starts, run as others do.
///
/// # Errors
/// What the host says; nothing has changed.
pub fn reset() -> io::Result<()> {
    set(0)
}

/// Sets the slice, and leaves the rest as it is.
fn set(slice_ns: u64) -> io::Result<()> {
    let mut attributes = attributes()?;
    // Real-time threads have none.
    if attributes.sched_policy != libc::SCHED_OTHER.unsigned_abs() {
        return Ok(());
    }
    attributes.sched_runtime = slice_ns;
    attributes.sched_flags = 0;
    // SAFETY: the attributes outlive the call, which reads as many bytes of them as they say.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
}

fn attributes() -> io::Result<libc::sched_attr> {
    // SAFETY: all zeroes is a valid sched_attr.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: the call writes `size` bytes at most to the attributes, which have as many and outlive it.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) })?;
    attributes.size = size;
    Ok(attributes)
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_inherited_and_can_be_given_back() {
        let before = attributes().unwrap();
        shorten().unwrap();
        let short = attributes().unwrap();
        // Kernels before 6.12 say nothing of it.
        assert!([0, SHORTEST_NS].contains(&short.sched_runtime), "{}", short.sched_runtime);
        assert_eq!(short.sched_nice, before.sched_nice);
        let child = std::thread::spawn(|| {
            let inherited = attributes().unwrap().sched_runtime;
            reset().unwrap();
            (inherited, attributes().unwrap().sched_runtime)
        });
        let (inherited, given_back) = child.join().unwrap();
        assert_eq!(inherited, short.sched_runtime);
        assert_eq!(given_back, before.sched_runtime);
        reset().unwrap();
        assert_eq!(attributes().unwrap().sched_runtime, before.sched_runtime);
    }
}
