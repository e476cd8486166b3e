//! qcow2 images with backing files.
//!
//! Crate `imago` reads and writes the format. It waits for the storage, and the image's tables have locks, so queues do not
//! call it: a few threads per disk do ([`pool`]), for what needs the tables. What does not, which is nearly everything once
//! a disk has been in use, goes straight to the file: a queue looks up where a cluster is ([`map`]), and does its I/O there
//! as on a raw image.
//!
//! ```text
//!   queue ── cluster in the map? ── yes ──► io_uring at its place in the file
//!                     │ no
//!                     └──► pool: one thread writes, some read ──► imago ──► file, backing files
//!                               └── enters what it found into the map
//! ```
//!
//! That is right because a cluster that the guest may write in its place keeps that place while the disk is open: nothing
//! here ever frees a cluster. What is discarded is punched out of the file, where it is.
//!
//! A request that changes the tables is answered when they have been written to the file, data first: so a killed process
//! loses nothing, and a flush is a plain sync of the file.

mod header;
mod layer;
mod map;
mod pool;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::format::PreallocateMode;
use imago::qcow2::Qcow2 as Format;
use imago::raw::Raw;
use imago::{FormatAccess, Mapping};
use proto::error::Error;
use proto::v1::ErrorReason;
use tonic::Code;

use crate::image::{Geometry, Image};
use crate::io::Op;
use header::Header;
use layer::Layer;
use map::Map;
use pool::Pool;
pub(crate) use pool::{Mailbox, Work};

/// Files in a chain, at most: QEMU has no bound, and each costs every read of what is in none of them.
const MAX_CHAIN: usize = 17;
/// How much around a request is entered into the map with it, in bytes.
const LEARN_BYTES: u64 = 16 << 20;

/// What a file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Info {
    pub(crate) size_bytes: u64,
    pub(crate) backing_file: String,
}

/// Looks whether the file at `path` says it is a qcow2 image, and what it says then.
pub(crate) fn inspect(image: &Image) -> Result<Option<Info>, Error> {
    let mut start = [0; 8];
    let seen = layer::read(image, &mut start, 0).map(|()| header::claims(&start));
    if !seen.map_err(|e| failed("read", image, &e))? {
        return Ok(None);
    }
    let Header { size_bytes, backing, .. } = read_header(image)?;
    Ok(Some(Info { size_bytes, backing_file: backing.map(|b| b.name).unwrap_or_default() }))
}

/// An open image and its backing files.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    pool: Pool,
    geometry: Geometry,
}

/// What its threads share.
#[derive(Debug)]
struct Inner {
    access: FormatAccess<Layer>,
    image: Arc<Image>,
    map: Map,
    version: u32,
    /// What was done to the tables is in the file, but perhaps not durable.
    unsynced: AtomicBool,
}

impl Qcow2 {
    /// Opens the image at `path` and all its backing files, and locks them.
    ///
    /// # Errors
    /// As [`Image::open`] for each of them; `DiskInvalid`, `Unsupported`: one is not what it should be.
    pub(crate) fn open(path: &str, read_only: bool, direct: bool) -> Result<Self, Error> {
        Self::open_as(path, read_only, direct, !read_only)
    }

    /// Opens all of it as [`Qcow2::open`] does and closes it again: nothing is written, and a disk could.
    pub(crate) fn check(path: &str, read_only: bool, direct: bool) -> Result<Self, Error> {
        Self::open_as(path, read_only, direct, false)
    }

    /// To write to the tables is up to `writes`: the format has marks that say nobody has.
    fn open_as(path: &str, read_only: bool, direct: bool, writes: bool) -> Result<Self, Error> {
        let image = Arc::new(Image::open_container(path, read_only, direct)?);
        let header = read_header(&image)?;
        let of_file = image.geometry();
        let geometry = Geometry { size_bytes: header.size_bytes, block_device: false, ..*of_file };
        crate::image::check_size(path, &geometry)?;
        let access = open_qcow2(&image, &header, MAX_CHAIN, writes)?;
        let map = Map::new(header.size_bytes, header.cluster_bits);
        let inner = Inner { access, image, map, version: header.version, unsynced: AtomicBool::new(false) };
        let pool = Pool::new(inner).map_err(|e| {
            let message = format!("cannot start a thread for disk image {path}: {e}");
            Error::new(Code::Internal, ErrorReason::Host, message).resource(path)
        })?;
        Ok(Self { pool, geometry })
    }

    /// The file that is written to.
    pub(crate) fn image(&self) -> &Arc<Image> {
        &self.pool.inner().image
    }

    /// What the disk is, when it was opened.
    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Its space can be given back.
    pub(crate) fn discards(&self) -> bool {
        self.pool.inner().version >= 3 && self.image().punches()
    }

    /// Where byte `offset` of the disk is in the file, and how many of `length` bytes are there in one piece; `None`: that
    /// has to be found out by [`Qcow2::submit`] or [`Qcow2::perform`].
    #[inline]
    pub(crate) fn run(&self, offset: u64, length: u64) -> Option<(u64, u64)> {
        self.pool.inner().map.run(offset, length)
    }

    /// The tables may not be durable: then a write in place is not, either.
    pub(crate) fn unsynced(&self) -> bool {
        self.pool.inner().unsynced.load(Ordering::Relaxed)
    }

    /// Has `work` done, and its completion put into `done`.
    ///
    /// # Safety
    ///
    /// The memory that `work` names stays valid until its completion is there.
    pub(crate) unsafe fn submit(&self, tag: u16, work: Work, done: &Arc<Mailbox>) {
        self.pool.submit(tag, work, done);
    }

    /// Does `work` here and now: bytes moved or a negative errno.
    ///
    /// # Safety
    ///
    /// The memory that `work` names is valid.
    pub(crate) unsafe fn perform(&self, work: &Work) -> i32 {
        self.pool.perform(work)
    }

    /// Makes a disk of `from` bytes `to` bytes long, durably; 0: leaves it. Its length then.
    pub(crate) fn resize(&self, from: u64, to: u64) -> Result<u64, Error> {
        let path = self.image().path();
        if to == 0 || to == from {
            return Ok(from);
        }
        let cluster_bits = self.pool.inner().map.cluster_bits;
        self.image().check_resize(from, to, header::max_size_bytes(cluster_bits))?;
        if self.image().read_only() {
            return Err(Error::new(
                Code::FailedPrecondition,
                ErrorReason::DiskInvalid,
                format!("disk image {path} is read-only"),
            )
            .resource(path)
            .remedy("resize it with qemu-img while nobody uses it"));
        }
        let grown = self.pool.exclusively(|inner| {
            // What a longer backing file has there must not come to light.
            inner.access.resize_grow(to, PreallocateMode::Zero)?;
            inner.access.flush()?;
            inner.access.sync()
        });
        grown.map_err(|e| failed("make longer", self.image(), &e))?;
        Ok(to)
    }
}

impl Inner {
    /// Makes a range of the disk zeros ([`Op::Zero`]), giving its space back ([`Op::Punch`]), or forgets what is there as
    /// far as that costs nothing ([`Op::Discard`]).
    fn erase(&self, op: Op, mut offset: u64, mut length: u64) -> io::Result<()> {
        let cluster = 1u64 << self.map.cluster_bits;
        while length > 0 {
            let (mapping, run) = self.access.get_mapping(offset, length)?;
            let run = run.min(length);
            if run == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            match mapping {
                Mapping::Raw { offset: host, writable: true, .. } => {
                    let how = if op == Op::Zero { Op::Zero } else { Op::Punch };
                    if op != Op::Discard || self.image.punches() {
                        layer::zero(&self.image, how, host, run)?;
                    }
                }
                Mapping::Zero { .. } => {}
                // It is in a backing file, or where it cannot be written.
                _ if op == Op::Discard => {
                    let (from, to) = (offset.next_multiple_of(cluster), (offset + run) & !(cluster - 1));
                    if self.version >= 3 && from < to {
                        self.access.write_zeroes(from, to - from)?;
                    }
                }
                _ => self.zero(offset, run)?,
            }
            offset += run;
            length -= run;
        }
        Ok(())
    }

    /// Makes whole clusters zeros by the tables, if they can say so, and writes the rest. The last cluster is whole where the
    /// disk ends. (Imago does not count right in parts of a cluster if the disk is smaller than one.)
    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let cluster = 1u64 << self.map.cluster_bits;
        let end = offset + length;
        let from = offset.next_multiple_of(cluster);
        let to = if end == self.access.size() { end } else { end & !(cluster - 1) };
        if self.version < 3 || from >= to {
            return self.write_zeros(offset, length);
        }
        self.write_zeros(offset, from - offset)?;
        self.access.write_zeroes(from, to - from)?;
        self.write_zeros(to, end - to)
    }

    fn write_zeros(&self, mut offset: u64, mut length: u64) -> io::Result<()> {
        let zeros = [0; 4096];
        while length > 0 {
            let part = length.min(zeros.len() as u64);
            self.access.write(&zeros[..part as usize], offset)?;
            offset += part;
            length -= part;
        }
        Ok(())
    }

    /// Enters what can be written in its place from `offset` on into the map. Nobody changes the tables meanwhile, and they
    /// are in the file.
    fn learn(&self, offset: u64, length: u64) -> io::Result<()> {
        let cluster = 1u64 << self.map.cluster_bits;
        let mut at = offset & !(cluster - 1);
        let end = offset.saturating_add(length).min(self.access.size());
        let mut file_end = self.image.length()?;
        while at < end {
            let (mapping, run) = self.access.get_mapping(at, end - at)?;
            if run == 0 {
                break;
            }
            if let Mapping::Raw { offset: host, writable: true, .. } = mapping {
                let host_end = (host + run).next_multiple_of(cluster);
                // A cluster may be there in part only, and what is read is to be as long as what was asked for.
                if host_end > file_end && !self.image.geometry().block_device && !self.image.read_only() {
                    self.image.file().set_len(host_end)?;
                    file_end = host_end;
                }
                for i in 0..run.div_ceil(cluster) {
                    let place = host + i * cluster;
                    if place + cluster <= file_end {
                        self.map.enter(at + i * cluster, place);
                    }
                }
            }
            at += run.next_multiple_of(cluster);
        }
        Ok(())
    }
}

fn read_header(image: &Image) -> Result<Header, Error> {
    let length = image.length().map_err(|e| failed("measure", image, &e))?;
    header::read(length, |to, at| layer::read(image, to, at)).map_err(|e| malformed(image, &e))
}

/// Opens what `image`, whose header has been checked, is the top of: `left` files at most.
fn open_qcow2(
    image: &Arc<Image>,
    header: &Header,
    left: usize,
    writes: bool,
) -> Result<FormatAccess<Layer>, Error> {
    let backing = match &header.backing {
        Some(backing) => Some(open_backing(image, backing, left - 1)?),
        None => None,
    };
    let mut format =
        Format::<Layer>::open_image(Layer::new(image.clone()), writes).map_err(|e| malformed(image, &e))?;
    format.set_data_file(None);
    format.set_backing(backing);
    Ok(FormatAccess::new(format))
}

/// Opens a backing file of `image`, and its own.
fn open_backing(
    image: &Arc<Image>,
    backing: &header::Backing,
    left: usize,
) -> Result<FormatAccess<Layer>, Error> {
    if left == 0 {
        let e = io::Error::other(format!("the last of a chain of more than {MAX_CHAIN} files"));
        return Err(malformed(image, &e).remedy("shorten the chain: qemu-img rebase, or qemu-img convert"));
    }
    let path = header::resolve(Path::new(image.path()), &backing.name).map_err(|e| malformed(image, &e))?;
    let Some(path) = path.to_str() else {
        return Err(malformed(image, &io::Error::other("based on a file whose name is no text")));
    };
    let of = |e: Error| {
        let message = format!("{} (it is the backing file of {})", e.message(), image.path());
        let named = Error::new(e.code(), e.reason(), message).resource(path);
        match e.fact("remedy") {
            Some(remedy) => named.remedy(remedy),
            None => named,
        }
    };
    match backing.format.as_deref() {
        Some("qcow2") => {
            let file = Arc::new(Image::open_container(path, true, false).map_err(of)?);
            let header = read_header(&file).map_err(of)?;
            open_qcow2(&file, &header, left, false)
        }
        Some("raw") => {
            let file = Arc::new(Image::open_container(path, true, false).map_err(of)?);
            let raw = Raw::open_image(Layer::new(file.clone()), false).map_err(|e| malformed(&file, &e))?;
            Ok(FormatAccess::new(raw))
        }
        named => {
            let what = match named {
                None => format!("based on {path} without saying of which format that is"),
                Some(name) => format!("based on {path}, of format {name:?}, which is not served"),
            };
            let remedy =
                format!("say so: qemu-img rebase -u -F raw -b {path} {} (or -F qcow2)", image.path());
            Err(malformed(image, &io::Error::other(what)).remedy(remedy))
        }
    }
}

fn malformed(image: &Image, e: &io::Error) -> Error {
    let reason = match e.kind() {
        io::ErrorKind::Unsupported => ErrorReason::Unsupported,
        _ => ErrorReason::DiskInvalid,
    };
    let message = format!("disk image {} is {e}", image.path());
    let error = Error::new(Code::FailedPrecondition, reason, message).resource(image.path());
    error.remedy("look at it with: qemu-img info, qemu-img check")
}

fn failed(what: &str, image: &Image, e: &io::Error) -> Error {
    let message = format!("cannot {what} disk image {}: {e}", image.path());
    Error::new(Code::Internal, ErrorReason::Host, message)
        .resource(image.path())
        .remedy("look at the host's kernel log")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Transfer;

    fn perform(disk: &Qcow2, op: Op, offset: u64, data: &mut [u8]) -> i32 {
        let iovecs = [libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() }];
        let iovecs = if op.is_slow() { &[][..] } else { &iovecs };
        let length = data.len() as u64;
        let transfer = Transfer { op, offset, formatted: true, length, iovecs, unaligned: true };
        // SAFETY: `data` is there.
        unsafe { disk.perform(&Work::new(&transfer)) }
    }

    /// Zeros in a part of a cluster that is in a backing file, also of a disk smaller than a cluster.
    #[test]
    fn a_part_of_a_cluster_becomes_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        for size in [8192, 65536 + 8192] {
            std::fs::write(path("base.raw"), vec![7; size]).unwrap();
            let made = std::process::Command::new("qemu-img")
                .args(["create", "-qf", "qcow2", "-F", "raw", "-b", &path("base.raw"), &path("d.qcow2")])
                .status();
            assert!(made.expect("qemu-img is installed").success());
            let disk = Qcow2::open(&path("d.qcow2"), false, false).unwrap();
            let mut expected = vec![7; size];
            for (offset, length) in [(size - 4096, 1024), (512, 512), (size - 1024, 1024), (0, size / 2)] {
                expected[offset..offset + length].fill(0);
                assert_eq!(perform(&disk, Op::Zero, offset as u64, &mut vec![0; length]), 0);
                let mut data = vec![1; size];
                assert_eq!(perform(&disk, Op::Read, 0, &mut data), size as i32);
                assert!(data == expected, "{size}: {offset} {length}");
            }
        }
    }

    /// What the queues go by: a cluster has a place once it was written, and keeps it whatever is done to it.
    #[test]
    fn clusters_have_places_and_keep_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.qcow2");
        let path = path.to_str().unwrap();
        let made =
            std::process::Command::new("qemu-img").args(["create", "-qf", "qcow2", path, "1G"]).status();
        assert!(made.expect("qemu-img is installed").success());
        let disk = Qcow2::open(path, false, false).unwrap();
        assert_eq!(disk.run(0, 4096), None);
        let mut data = vec![7; 256 << 10];
        let length = data.len() as i32;
        assert_eq!(perform(&disk, Op::Read, 0, &mut data), length);
        assert!(disk.run(0, 4096).is_none() && data.iter().all(|b| *b == 0));
        data.fill(7);
        assert_eq!(perform(&disk, Op::Write, 100 << 16, &mut data), length);
        assert!(disk.unsynced());
        let place = disk.run(100 << 16, 4096).expect("it was written");
        assert_eq!(disk.run(104 << 16, 4096), None);
        for op in [Op::Discard, Op::Punch, Op::Zero, Op::WriteThrough] {
            assert_eq!(perform(&disk, op, 100 << 16, &mut data), if op.is_slow() { 0 } else { length });
            assert_eq!(disk.run(100 << 16, 4096), Some(place), "{op:?}");
        }
        assert!(!disk.unsynced());
        // The file is as long as what has a place in it.
        assert!(disk.image().length().unwrap() >= place.0 + 65536);
        drop(disk);
        let disk = Qcow2::open(path, true, false).unwrap();
        assert_eq!(perform(&disk, Op::Read, 99 << 16, &mut data[..512]), 512);
        assert_eq!(disk.run(100 << 16, 4096), Some(place), "a neighbour is seen with it");
        assert!(perform(&disk, Op::Write, 0, &mut data[..512]) < 0);
    }
}
