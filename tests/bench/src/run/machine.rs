//! The machine it is measured on.

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::time::{Instant, SystemTime};

use crate::probe::place_thread;
use crate::results::Machine;

/// Block that a copy is measured with, in bytes.
const BLOCK: usize = 4096;
/// Blocks to copy from: more than the caches hold, as a page cache has. Blocks to copy to: what 32 requests of a guest use.
const SOURCES: usize = 1 << 14;
const TARGETS: usize = 32;
const COPIES: usize = 1 << 15;

/// The time, RFC 3339.
pub(super) fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// What there is to know of this machine, whose test files are in `files`.
pub(super) fn describe(files: &Path) -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = field(&cpuinfo, "model name").unwrap_or("unknown").to_owned();
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let memory_kib = field(&read("/proc/meminfo"), "MemTotal")
        .and_then(|text| text.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0);
    let kernel = read("/proc/sys/kernel/osrelease").trim().to_owned();
    let kvm = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .find(|module| Path::new(&format!("/sys/module/{module}")).exists());
    let mut remarks = Vec::new();
    if cpus < 3 {
        remarks.push(format!(
            "{cpus} processors: the vCPU has one, and the card, the VMM's other threads and the rest of the host share the other"
        ));
    }
    if kvm == Some("kvm_pvm") {
        remarks.push(
            "KVM without hardware virtualization (PVM): exits cost several times what they do with VT-x or SVM, which favours whatever causes fewer"
                .to_owned(),
        );
    }
    if field(&cpuinfo, "flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")) {
        remarks.push("itself a virtual machine, with neighbours that cannot be seen from inside".to_owned());
    }
    Machine {
        cpu,
        cpus,
        memory_bytes: memory_kib << 10,
        kernel,
        kvm: kvm.unwrap_or("unknown").to_owned(),
        file_system: file_system(files),
        remarks,
    }
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// Type of the file system of a directory, as `df` of coreutils tells it.
fn file_system(path: &Path) -> String {
    let output = Command::new("df").args(["--output=fstype,source"]).arg(path).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let words: Vec<_> = text.lines().nth(1).unwrap_or("unknown").split_ascii_whitespace().collect();
    words.join(" on ")
}

/// Nanoseconds that a copy of 4 KiB takes, from memory that is in no cache to memory that is, on `cpu`.
pub(super) fn copy_ns(cpu: Option<usize>) -> f64 {
    let measure = move || {
        place_thread(nix::unistd::gettid().as_raw().cast_unsigned(), cpu);
        let source = vec![1u8; SOURCES * BLOCK];
        let mut target = vec![0u8; TARGETS * BLOCK];
        let began = Instant::now();
        let mut from = 1usize;
        for n in 0..COPIES {
            from = (from.wrapping_mul(48_271)) % SOURCES;
            let to = n % TARGETS * BLOCK;
            target[to..to + BLOCK].copy_from_slice(black_box(&source[from * BLOCK..(from + 1) * BLOCK]));
            black_box(&mut target);
        }
        began.elapsed().as_nanos() as f64 / COPIES as f64
    };
    // A panic ends the process.
    std::thread::spawn(measure).join().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_described() {
        let machine = describe(Path::new("/"));
        assert!(machine.cpus > 0 && machine.memory_bytes > 0);
        assert!(!machine.kernel.is_empty() && machine.file_system != "unknown");
        assert!(now().ends_with('Z'));
    }

    #[test]
    fn a_copy_takes_time() {
        let ns = copy_ns(None);
        assert!(ns > 1.0 && ns < 1e6, "{ns}");
    }
}
