//! The cache mode that a driver chose, kept where a killed card's successor finds it.
//!
//! A driver that switched the write-back cache off takes every answered write to be durable, and does not flush any more.
//! It does not notice that the card was killed, so the next one must know.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::PathBuf;

/// A file that exists while a disk's driver wants writes to be durable when they are answered.
///
/// It lies in the card's runtime directory, like everything that outlives the process but not the host, so nothing is
/// synced.
#[derive(Debug)]
pub struct ModeFile(PathBuf);

impl ModeFile {
    /// At `path`, whose directory exists.
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// What was chosen last.
    pub(crate) fn write_through(&self) -> bool {
        self.0.exists()
    }

    /// Keeps what is chosen now.
    ///
    /// # Errors
    /// It is as it was.
    pub(crate) fn set(&self, write_through: bool) -> io::Result<()> {
        if write_through {
            return File::create(&self.0).map(drop);
        }
        match fs::remove_file(&self.0) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}
