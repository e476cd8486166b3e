//! Disks whose image has made a library panic.
//!
//! A panic ends the card, which is started again, makes its devices again, and does again what was in flight. If that is what made
//! it panic, the card dies again, and with it every other VM's disk, for ever. So whoever gives an image to code that is not ours
//! says beforehand for which disk; the panic's hook leaves a mark, and a disk with a mark is not made again: it is listed as broken,
//! and the others go on.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

thread_local! {
    /// Where a panic of this thread leaves its mark.
    static MARK: RefCell<Option<Arc<Path>>> = const { RefCell::new(None) };
}

/// The marks of a card's disks, in a directory that outlives the process.
#[derive(Debug)]
pub(crate) struct Suspects(PathBuf);

impl Suspects {
    /// With their marks in `directory`, which is made. From now on panics leave marks.
    pub(crate) fn new(directory: PathBuf) -> io::Result<Self> {
        static HOOK: Once = Once::new();
        fs::create_dir_all(&directory)?;
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                if let Some(mark) = current() {
                    // There is nobody to tell but the log, and that is what is next.
                    let _ = fs::write(mark, panic.to_string());
                }
                before(panic);
            }));
        });
        Ok(Self(directory))
    }

    /// Where the mark of disk `id` is, for [`watched`].
    pub(crate) fn mark(&self, id: &str) -> Arc<Path> {
        self.0.join(id).into()
    }

    /// What the panic said that disk `id` is to blame for.
    pub(crate) fn why(&self, id: &str) -> Option<String> {
        let said = fs::read(self.mark(id)).ok()?;
        Some(String::from_utf8_lossy(&said).into_owned())
    }

    /// Disk `id` has a new life.
    pub(crate) fn forget(&self, id: &str) -> io::Result<()> {
        match fs::remove_file(self.mark(id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

/// The mark that this thread leaves if it panics now.
pub(crate) fn current() -> Option<Arc<Path>> {
    // The thread may be ending.
    MARK.try_with(|mark| mark.try_borrow().ok()?.clone()).ok().flatten()
}

/// Does `work`; if that panics, `mark` is left.
pub(crate) fn watched<T>(mark: Option<Arc<Path>>, work: impl FnOnce() -> T) -> T {
    /// Puts back what was there.
    struct Before(Option<Arc<Path>>);
    impl Drop for Before {
        fn drop(&mut self) {
            MARK.set(self.0.take());
        }
    }
    let _before = Before(MARK.replace(mark));
    work()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_panic_over_the_image_leaves_a_mark() {
        let dir = tempfile::tempdir().unwrap();
        let suspects = Suspects::new(dir.path().join("suspects")).unwrap();
        let panics = |mark: Option<Arc<Path>>| {
            let thread = std::thread::spawn(move || {
                watched(mark, || watched(None, || ()));
                assert!(current().is_none());
                panic!("somewhere else");
            });
            thread.join().unwrap_err();
        };
        panics(Some(suspects.mark("a")));
        assert_eq!(suspects.why("a"), None);
        let mark = suspects.mark("a");
        std::thread::spawn(move || watched(Some(mark), || panic!("over the image"))).join().unwrap_err();
        assert!(suspects.why("a").is_some_and(|why| why.contains("over the image")));
        assert_eq!(suspects.why("b"), None);
        suspects.forget("a").unwrap();
        suspects.forget("a").unwrap();
        assert_eq!(suspects.why("a"), None);
    }
}
