//! First figures: start-up, memory, size.
//!
//! Each system boots the same bench guest with 128 MiB, one vCPU and one virtio-blk disk of 64 MiB, in turns. Time runs from
//! just before the process is spawned to its guest's first line on the serial port; memory is what the process has beyond
//! guest RAM, as the kernel shares it out (PSS of all mappings but guest RAM's), when the guest idles.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use comfy_table::{CellAlignment, Table};
use e2e::card::Card;
use serde::Serialize;

use crate::source::lines_of_code;
use crate::stats::Summary;

const GUEST_RAM_MIB: u64 = 128;
const DISK_BYTES: u64 = 64 << 20;
/// What the targets are: CONTRIBUTING.md, "First figures".
const TARGET_START_MS: f64 = 5.0;
const TARGET_MEMORY_MIB: f64 = 3.0;

#[derive(Serialize)]
struct System {
    name: &'static str,
    first_line_ms: Summary,
    memory_mib: Summary,
}

#[derive(Serialize)]
struct Figures {
    rounds: u32,
    systems: Vec<System>,
    hypervisor_lines_of_code: usize,
    target_first_line_ms: f64,
    target_memory_mib: f64,
}

/// Measures and prints.
pub(crate) fn run(rounds: u32, json: bool) -> anyhow::Result<()> {
    if cfg!(debug_assertions) {
        bail!(
            "this is a debug build, whose figures mean nothing; use `cargo run --release -p bench -- figures`"
        );
    }
    let dir = e2e::temp_dir();
    let card = Card::start("offload-blk", dir.path());
    let image = e2e::image(dir.path(), "disk.img", DISK_BYTES);
    let device = card.block("disk0", &image, 1);
    let kernel = e2e::binary("bench-guest");

    let mut ours = Command::new(e2e::binary("outboard-hypervisor"));
    ours.arg("--kernel").arg(&kernel).args([
        "--memory",
        "128M",
        "--cmdline",
        "job=idle",
        "--console",
        "stdio",
    ]);
    ours.arg("--device").arg(format!("{},id={},queues=1", device.socket_path, device.virtio_device_id));
    let mut systems = vec![("outboard-hypervisor + offload-blk", ours)];
    if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_ok() {
        // Its own image: the card keeps the other one locked.
        let image = e2e::image(dir.path(), "qemu.img", DISK_BYTES);
        systems.push(("qemu microvm, virtio-blk in process", qemu_microvm(&kernel, &image)));
    }

    let mut samples: Vec<(Vec<f64>, Vec<f64>)> = vec![Default::default(); systems.len()];
    for round in 0..=rounds {
        for ((name, command), (starts, memory)) in systems.iter_mut().zip(&mut samples) {
            let (start, mib) =
                boot_once(command).with_context(|| format!("booting the bench guest on {name}"))?;
            // The first round fills the page cache.
            if round > 0 {
                starts.push(start.as_secs_f64() * 1e3);
                memory.push(mib);
            }
        }
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../hypervisor/src");
    let figures = Figures {
        rounds,
        systems: systems
            .iter()
            .zip(&samples)
            .map(|((name, _), (starts, memory))| System {
                name,
                first_line_ms: Summary::of(starts),
                memory_mib: Summary::of(memory),
            })
            .collect(),
        hypervisor_lines_of_code: lines_of_code(&source).context("counting the hypervisor's source")?,
        target_first_line_ms: TARGET_START_MS,
        target_memory_mib: TARGET_MEMORY_MIB,
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        print(&figures);
    }
    Ok(())
}

fn qemu_microvm(kernel: &Path, image: &Path) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-enable-kvm",
        "-cpu",
        "host,migratable=off,-arch-capabilities",
        "-M",
        "microvm,x-option-roms=off,rtc=off",
    ]);
    qemu.args([
        "-m",
        "128",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-no-reboot",
    ]);
    qemu.arg("-kernel").arg(kernel).args(["-append", "job=idle"]);
    qemu.args(["-drive", &format!("if=none,id=d,format=raw,file={}", image.display())]);
    qemu.args(["-device", "virtio-blk-device,drive=d"]);
    qemu
}

/// Boots once; the time to the guest's first line, and MiB beyond guest RAM when it idles.
fn boot_once(command: &mut Command) -> anyhow::Result<(Duration, f64)> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let began = Instant::now();
    let mut child = Ended(command.spawn().context("starting the process")?);
    let mut stdout = child.0.stdout.take().context("no stdout")?;
    let (mut text, mut buffer, mut first) = (Vec::new(), [0; 4096], None);
    // The guest idles after its I/O phase has begun.
    while !text.windows(b"io_begin".len()).any(|w| w == b"io_begin") {
        let n = stdout.read(&mut buffer)?;
        if n == 0 {
            let mut said = String::new();
            child.0.stderr.take().context("no stderr")?.read_to_string(&mut said)?;
            bail!("it ended: {} {said}", String::from_utf8_lossy(&text));
        }
        text.extend_from_slice(&buffer[..n]);
        if first.is_none() && text.contains(&b'\n') {
            first = Some(began.elapsed());
        }
    }
    std::thread::sleep(Duration::from_millis(50));
    Ok((first.context("no line")?, memory_beyond_guest_ram(child.0.id())?))
}

/// PSS in MiB of all mappings of a process but its guest's RAM: the mapping of a memfd, or one as large as guest RAM.
fn memory_beyond_guest_ram(pid: u32) -> anyhow::Result<f64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut sum_kib, mut is_ram) = (0, false);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-').filter(|_| !first.ends_with(':')) {
            let size = u64::from_str_radix(end, 16)? - u64::from_str_radix(start, 16)?;
            is_ram = line.contains("/memfd:") || size == GUEST_RAM_MIB << 20;
        } else if first == "Pss:" && !is_ram {
            sum_kib += words.next().unwrap_or_default().parse::<u64>()?;
        }
    }
    Ok(sum_kib as f64 / 1024.0)
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn print(figures: &Figures) {
    let cell = |s: &Summary| format!("{:.2}  ({:.2} to {:.2})", s.median, s.p25, s.p75);
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["system", "exec to first serial line, ms", "memory beyond guest RAM, MiB"]);
    for system in &figures.systems {
        table.add_row([system.name.to_owned(), cell(&system.first_line_ms), cell(&system.memory_mib)]);
    }
    table.add_row([
        "target".to_owned(),
        format!("{:.2}", figures.target_first_line_ms),
        format!("{:.2}", figures.target_memory_mib),
    ]);
    for column in 1..3 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{table}");
    println!("median (middle half) of {} starts, in turns; 128 MiB guest, 1 vCPU, 1 disk", figures.rounds);
    println!("lines of code of the hypervisor crate: {}", figures.hypervisor_lines_of_code);
}
