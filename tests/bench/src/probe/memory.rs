//! Memory of a VMM beyond its guest's.

use anyhow::Context;

/// PSS in bytes of all mappings of a process but its guest's RAM: the mapping of a memfd, or one of exactly `ram_bytes`.
pub(crate) fn beyond_guest_ram(pid: u32, ram_bytes: u64) -> anyhow::Result<u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))
        .with_context(|| format!("looking at the memory of process {pid}"))?;
    sum(&smaps, ram_bytes)
}

fn sum(smaps: &str, ram_bytes: u64) -> anyhow::Result<u64> {
    let (mut sum_kib, mut is_ram) = (0, false);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-').filter(|_| !first.ends_with(':')) {
            let size = u64::from_str_radix(end, 16)? - u64::from_str_radix(start, 16)?;
            is_ram = line.contains("/memfd:") || size == ram_bytes;
        } else if first == "Pss:" && !is_ram {
            sum_kib += words.next().unwrap_or_default().parse::<u64>()?;
        }
    }
    Ok(sum_kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_does_not_count() {
        let smaps = "55d0-55e0 r-xp 00000000 fe:00 1 /usr/bin/vmm\nRss: 16 kB\nPss: 12 kB\n\
            7f00-7f10 rw-s 00000000 00:01 2 /memfd:ram (deleted)\nPss: 4000 kB\n\
            10000-20000 rw-p 00000000 00:00 0\nPss: 64 kB\n20000-20100 rw-p 00000000 00:00 0 [heap]\nPss: 3 kB\n";
        assert_eq!(sum(smaps, 0x10000).unwrap(), 15 << 10);
        assert!(beyond_guest_ram(std::process::id(), 1).unwrap() > 0);
    }
}
