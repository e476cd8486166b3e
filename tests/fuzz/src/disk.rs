//! A disk with one queue, and the engine behind it in this process.

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use offload_blk::{BlockDevice, DiskConfig, Image, Inline, IoEngine, QueueHost, Register, Store, Threads};
use offload_card::Device;
use offload_card::poll::{PollMode, PollPolicy};

use crate::PATIENCE;
use crate::guest::MAX_SIZE;
use crate::memfd::{memfd, path};

/// The disk.
pub struct Disk {
    /// Its device.
    pub device: BlockDevice,
    /// `None`: its queue has a thread.
    inline: Option<Arc<Inline>>,
    /// Its image.
    pub file: Option<File>,
}

impl Disk {
    /// On `store`; with `inline`, the queue works in the thread that notifies it.
    pub fn new(store: Store, engine: IoEngine, inline: bool, queues: u16) -> Self {
        let inline = inline.then(|| Arc::new(Inline::new(queues)));
        let host: Arc<dyn QueueHost> = match &inline {
            Some(inline) => inline.clone(),
            None => Arc::new(Threads::default()),
        };
        let device = BlockDevice::new(DiskConfig {
            name: "fuzz".into(),
            store,
            queues,
            queue_size: MAX_SIZE,
            serial: "fuzz".into(),
            engine,
            register: Register::AtOnce,
            map_limit: Default::default(),
            poll: PollPolicy { mode: PollMode::Never, ..Default::default() },
            host,
            storage: Arc::default(),
            mode_file: None,
        });
        Self { device: device.expect("device"), inline, file: None }
    }

    /// Tells the device of a kick, if nobody waits for one.
    pub fn notify(&self) {
        if let Some(inline) = &self.inline {
            inline.notify(0);
        }
    }

    /// Stops the queue, which must not take long.
    pub fn stop(&self) {
        self.device.begin_stop(0);
        let stopped = self.device.stop_queue(0, Instant::now() + PATIENCE);
        assert!(stopped.expect("the queue stops").is_some());
    }
}

/// A raw image in memory.
pub fn raw(bytes: u64) -> (Store, File) {
    let file = memfd(bytes, false);
    let image = Image::open(&path(&file), false, false).expect("image");
    (Store::Image(Arc::new(image)), file)
}

/// A disk with one queue on such an image.
pub fn image(bytes: u64, engine: IoEngine, inline: bool) -> Disk {
    let (store, file) = raw(bytes);
    Disk { file: Some(file), ..Disk::new(store, engine, inline, 1) }
}

/// A disk with one queue that stores nothing.
pub fn null(bytes: u64, inline: bool) -> Disk {
    Disk::new(Store::null(bytes, false).expect("null store"), IoEngine::Auto, inline, 1)
}
