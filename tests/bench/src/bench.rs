//! What all measurements of a run share: directories, the test file, processors, durations.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::workload::Backing;

/// Length of the test file, and of disks without one.
pub(crate) const DISK_BYTES: u64 = 1 << 30;

const PAGE: u64 = 4096;
/// Threads that read a file into the page cache.
const READERS: u64 = 8;

/// Processors to pin to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Placement {
    /// For the vCPU of a guest that is alone.
    pub(crate) vcpu: usize,
    /// For what does its I/O, and everything else.
    pub(crate) backend: usize,
}

/// A run's environment. Dropping it removes what it made.
#[derive(Debug)]
pub(crate) struct Bench {
    /// Sockets, logs and images of one's own.
    pub(crate) dir: tempfile::TempDir,
    /// The file behind disks that have one; always written in full, never sparse.
    pub(crate) file: PathBuf,
    /// Seconds before a sample counts, and that count.
    pub(crate) warmup: f64,
    pub(crate) measure: f64,
    /// `None`: threads are left to the scheduler.
    pub(crate) placement: Option<Placement>,
}

impl Bench {
    /// Makes directories and the test file below `files`, which should be on a real file system.
    pub(crate) fn new(files: &Path, warmup: f64, measure: f64, pin: bool) -> anyhow::Result<Self> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        if cpus < 2 {
            bail!(
                "this machine has one processor; a guest and what serves it need one each: use a machine with two or more"
            );
        }
        fs::create_dir_all(files).with_context(|| format!("creating {}", files.display()))?;
        let bench = Self {
            dir: e2e::temp_dir(),
            file: files.join("disk.img"),
            warmup,
            measure,
            placement: pin.then_some(Placement { vcpu: 0, backend: 1 }),
        };
        bench.make_file()?;
        // However others have read it.
        forget(&bench.file)?;
        Ok(bench)
    }

    /// Writes the test file unless it is there from an earlier run.
    fn make_file(&self) -> anyhow::Result<()> {
        let what = || format!("writing the test file {}", self.file.display());
        let there = fs::metadata(&self.file).is_ok_and(|m| {
            use std::os::unix::fs::MetadataExt;
            m.len() == DISK_BYTES && m.blocks() * 512 >= DISK_BYTES
        });
        if there {
            return Ok(());
        }
        let mut file = File::create(&self.file).with_context(what)?;
        // Not compressible, not the same twice: whatever is below should have no easy life.
        let mut block = vec![0u64; 1 << 17];
        let mut state = 1u64;
        for _ in 0..DISK_BYTES / (block.len() as u64 * 8) {
            for word in &mut block {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *word = state;
            }
            let bytes: Vec<u8> = block.iter().flat_map(|word| word.to_le_bytes()).collect();
            file.write_all(&bytes).with_context(what)?;
        }
        file.sync_all().with_context(what)
    }

    /// The test file as a qcow2 file, all of it allocated and in the page cache. It is made if it is not there.
    pub(crate) fn qcow2(&self) -> anyhow::Result<PathBuf> {
        let path = self.file.with_extension("qcow2");
        // Any content will do that is there in full.
        if !path.exists() {
            let temporary = self.file.with_extension("qcow2.new");
            let output = Command::new("qemu-img")
                .args(["convert", "-f", "raw", "-O", "qcow2"])
                .args([&self.file, &temporary])
                .stdin(Stdio::null())
                .output()
                .context("running qemu-img (Debian's package qemu-utils)")?;
            if !output.status.success() {
                bail!("qemu-img convert: {}", String::from_utf8_lossy(&output.stderr).trim());
            }
            fs::rename(&temporary, &path).with_context(|| format!("creating {}", path.display()))?;
            forget(&path)?;
        }
        read_all(&path)?;
        Ok(path)
    }

    /// Makes the state that a backing is measured in: all of the file in the page cache, or nothing of it. A direct write has
    /// to evict what is cached of its place, for which io_uring needs a thread: who is measured first would pay for that.
    pub(crate) fn prepare(&self, backing: Backing) -> anyhow::Result<()> {
        match backing {
            Backing::Null => Ok(()),
            Backing::Buffered => read_all(&self.file),
            Backing::Direct => forget(&self.file),
        }
    }

    /// How long a guest's work may take before something is wrong.
    pub(crate) fn patience(&self) -> Duration {
        Duration::from_secs_f64(self.warmup + self.measure + 30.0)
    }
}

/// Reads a file, so that the page cache holds it, in pieces as the random requests of a guest leave it. Read from beginning to
/// end it would be cached in large folios, in which kernels from 6.16 on take ten times as long for a write of 4 KiB (ext4),
/// whoever writes: that would be all one sees.
fn read_all(path: &Path) -> anyhow::Result<()> {
    let what = || format!("reading {}", path.display());
    let file = File::open(path).with_context(what)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).with_context(what)?;
    let pages = file.metadata().with_context(what)?.len().div_ceil(PAGE);
    let part = |n: u64| -> std::io::Result<()> {
        let mut buffer = [0; PAGE as usize];
        (0..pages)
            .filter(|page| page % READERS == n)
            .try_for_each(|page| file.read_at(&mut buffer, page * PAGE).map(drop))
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|n| scope.spawn(move || part(n))).collect();
        readers
            .into_iter()
            .try_for_each(|reader| reader.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into())))
    })
    .with_context(what)
}

/// Takes a file out of the page cache.
fn forget(path: &Path) -> anyhow::Result<()> {
    let what = || format!("writing back {}", path.display());
    let file = File::open(path).with_context(what)?;
    file.sync_all().with_context(what)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).with_context(what)
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;

    use nix::sys::statfs::{TMPFS_MAGIC, statfs};
    use rustix::io::{Errno, ReadWriteFlags, preadv2};

    use super::*;

    fn is_cached(file: &Path) -> bool {
        let mut page = [0; PAGE as usize];
        match preadv2(File::open(file).unwrap(), &mut [IoSliceMut::new(&mut page)], 0, ReadWriteFlags::NOWAIT)
        {
            Ok(_) => true,
            Err(Errno::AGAIN) => false,
            Err(e) => panic!("{e}"),
        }
    }

    #[test]
    fn a_direct_sample_begins_without_cached_pages() {
        // Often, /tmp is in memory.
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        if statfs(dir.path()).unwrap().filesystem_type() == TMPFS_MAGIC {
            eprintln!("skipped: a file system in memory drops nothing");
            return;
        }
        let file = dir.path().join("disk.img");
        fs::write(&file, vec![1; 1 << 20]).unwrap();
        let bench = Bench { dir, file, warmup: 0.0, measure: 0.0, placement: None };
        bench.prepare(Backing::Buffered).unwrap();
        assert!(is_cached(&bench.file));
        bench.prepare(Backing::Direct).unwrap();
        assert!(!is_cached(&bench.file));
    }
}
