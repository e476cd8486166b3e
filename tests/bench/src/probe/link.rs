//! Frames that came through a network interface, as the kernel counts them.

/// Frames and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) frames: u64,
    pub(super) bytes: u64,
}

/// What the host received from an interface of our network namespace so far; nothing if there is no such interface.
pub(super) fn received(link: &str) -> Received {
    parse(&std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default(), link).unwrap_or_default()
}

fn parse(table: &str, link: &str) -> Option<Received> {
    let numbers = table.lines().find_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        (name.trim() == link).then_some(numbers)
    })?;
    let mut numbers = numbers.split_ascii_whitespace().map(str::parse::<u64>);
    let bytes = numbers.next()?.ok()?;
    // Those it took and those it had no room for: either way they were delivered to it.
    let frames = numbers.next()?.ok()?;
    let dropped = numbers.nth(1)?.ok()?;
    Some(Received { frames: frames + dropped, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_understood() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes    packets errs drop\n    lo:  1 2 0 0 0 0 0 0 1 2\n\
            tap0: 4096 64 1 3 0 0 0 0 9 9 0 0 0 0 0 0\n";
        assert_eq!(parse(table, "tap0"), Some(Received { frames: 67, bytes: 4096 }));
        assert_eq!(parse(table, "tap1"), None);
        assert_eq!(received("no-such-link"), Received::default());
    }
}
