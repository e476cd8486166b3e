//! What a disk stores on.

use std::sync::Arc;

use proto::error::Error;
use proto::v1::ErrorReason;
use tonic::Code;

use crate::config::Erases;
use crate::image::{Geometry, Image, SECTOR_BYTES};
use crate::qcow2::Qcow2;

/// What a disk stores on.
#[derive(Debug, Clone)]
pub enum Store {
    /// A raw file or a block device.
    Image(Arc<Image>),
    /// A qcow2 image.
    Qcow2(Qcow2Store),
    /// Nothing, for benchmarks: a write is dropped, and a read leaves in the guest's buffer what it held. What remains is
    /// the cost of the queues.
    Null(NullStore),
}

/// A disk without storage.
#[derive(Debug, Clone, Copy)]
pub struct NullStore {
    geometry: Geometry,
    read_only: bool,
}

/// A qcow2 image and its backing files, open.
#[derive(Debug, Clone)]
pub struct Qcow2Store(pub(crate) Arc<Qcow2>);

impl Store {
    /// The qcow2 image at `path` and its backing files, which are locked: it for writing, if it is written to.
    ///
    /// # Errors
    /// As [`Image::open`], for any of them. `DiskInvalid`, `Unsupported`: one is not what it is said to be.
    pub fn qcow2(path: &str, read_only: bool, direct: bool) -> Result<Self, Error> {
        Ok(Self::Qcow2(Qcow2Store(Arc::new(Qcow2::open(path, read_only, direct)?))))
    }

    /// The same to be looked at: nothing is written to it.
    pub(crate) fn qcow2_to_check(path: &str, read_only: bool, direct: bool) -> Result<Self, Error> {
        Ok(Self::Qcow2(Qcow2Store(Arc::new(Qcow2::check(path, read_only, direct)?))))
    }

    /// A disk of `size_bytes`, a multiple of 512 and not 0, without storage.
    pub fn null(size_bytes: u64, read_only: bool) -> Result<Self, Error> {
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            let message = format!("{size_bytes} bytes are not a positive multiple of {SECTOR_BYTES}");
            return Err(Error::invalid_field("null_bytes", message));
        }
        let geometry = Geometry {
            size_bytes,
            logical_block: SECTOR_BYTES as u32,
            physical_block: 4096,
            block_device: false,
            memory_alignment: 1,
        };
        Ok(Self::Null(NullStore { geometry, read_only }))
    }

    /// What it looks like.
    pub fn geometry(&self) -> &Geometry {
        match self {
            Self::Image(image) => image.geometry(),
            Self::Qcow2(qcow2) => qcow2.0.geometry(),
            Self::Null(null) => &null.geometry,
        }
    }

    /// What it is on.
    pub(crate) fn file(&self) -> Option<&Arc<Image>> {
        match self {
            Self::Image(image) => Some(image),
            Self::Qcow2(qcow2) => Some(qcow2.0.image()),
            Self::Null(_) => None,
        }
    }

    /// Where byte `offset` of the disk is in [`Store::file`], if that is known.
    pub(crate) fn place(&self, offset: u64) -> Option<u64> {
        match self {
            Self::Image(_) => Some(offset),
            Self::Qcow2(qcow2) => qcow2.0.run(offset, 1).map(|(place, _)| place),
            Self::Null(_) => None,
        }
    }

    /// How data can be done away with.
    pub(crate) fn erases(&self) -> Erases {
        match self {
            Self::Image(image) if !image.read_only() => {
                Erases { discard: image.punches(), write_zeroes: true }
            }
            Self::Qcow2(qcow2) if !qcow2.0.image().read_only() => {
                Erases { discard: qcow2.0.discards(), write_zeroes: true }
            }
            Self::Image(_) | Self::Qcow2(_) | Self::Null(_) => Erases::default(),
        }
    }

    /// Makes what is `from` bytes long `to` bytes long; 0: as long as what it is on has become. Its length then.
    pub(crate) fn resize(&self, from: u64, to: u64) -> Result<u64, Error> {
        match self {
            Self::Image(image) => image.resize(from, to),
            Self::Qcow2(qcow2) => qcow2.0.resize(from, to),
            Self::Null(_) => Err(Error::new(
                Code::FailedPrecondition,
                ErrorReason::Unsupported,
                "a disk without storage cannot be resized",
            )
            .remedy("delete it and create one of the new size")),
        }
    }

    /// Nothing can be written.
    pub fn read_only(&self) -> bool {
        match self {
            Self::Image(image) => image.read_only(),
            Self::Qcow2(qcow2) => qcow2.0.image().read_only(),
            Self::Null(null) => null.read_only,
        }
    }
}
