//! A vhost-user front-end, by crate `vhost`.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use super::{DriverQueue, TestGuest, USER_BASE};

/// The inflight area as a front-end keeps it.
pub struct Inflight {
    /// What it is.
    pub info: VhostUserInflight,
    /// Its memory.
    pub file: File,
}

/// A connection to a device.
pub struct Front {
    /// For messages that have no method here.
    pub frontend: Frontend,
    /// Features the device offers.
    pub offered: u64,
}

impl Front {
    /// Connects and negotiates the protocol; every message asks for an acknowledgement.
    pub fn connect(socket: &Path) -> Self {
        Self::try_connect(socket).expect("front-end connects")
    }

    /// As `connect`, once.
    pub fn try_connect(socket: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let stream = UnixStream::connect(socket)?;
        let mut frontend = Frontend::from_stream(stream, 64);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let protocol = frontend.get_protocol_features()?;
        frontend.set_protocol_features(protocol)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        Ok(Self { frontend, offered })
    }

    /// As `connect`, again and again until a device answers.
    pub fn connect_within(socket: &Path, patience: Duration) -> Self {
        let since = Instant::now();
        loop {
            match Self::try_connect(socket) {
                Ok(front) => return front,
                Err(e) if since.elapsed() > patience => panic!("no device at {}: {e}", socket.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Protocol features the device offers.
    pub fn protocol_features(&mut self) -> VhostUserProtocolFeatures {
        self.frontend.get_protocol_features().expect("protocol features")
    }

    /// Acknowledges `features` and shares the guest's memory.
    pub fn set_up(&mut self, guest: &TestGuest, features: u64) {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(features | protocol).expect("features");
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: guest.size(),
            userspace_addr: USER_BASE,
            mmap_offset: 0,
            mmap_handle: guest.file().as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).expect("memory table");
    }

    /// Asks the device for a new inflight area.
    pub fn new_inflight(&mut self, queues: u16, queue_size: u16) -> Inflight {
        let wanted = VhostUserInflight::new(0, 0, queues, queue_size);
        let (info, file) = self.frontend.get_inflight_fd(&wanted).expect("inflight area");
        Inflight { info, file }
    }

    /// Gives the device the inflight area.
    pub fn set_inflight(&mut self, inflight: &Inflight) {
        self.frontend.set_inflight_fd(&inflight.info, inflight.file.as_raw_fd()).expect("inflight area");
    }

    /// Starts a queue at `base`.
    pub fn start(&mut self, index: usize, queue: &DriverQueue, base: u16) {
        self.try_start(index, queue, base).expect("queue starts");
    }

    /// As `start`.
    pub fn try_start(&mut self, index: usize, queue: &DriverQueue, base: u16) -> Result<(), vhost::Error> {
        let at = queue.addresses;
        let config = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: USER_BASE + at.descriptors,
            used_ring_addr: USER_BASE + at.used,
            avail_ring_addr: USER_BASE + at.avail,
            log_addr: None,
        };
        let f = &mut self.frontend;
        f.set_vring_num(index, queue.size)?;
        f.set_vring_addr(index, &config)?;
        f.set_vring_base(index, base)?;
        f.set_vring_call(index, &event(&queue.call))?;
        f.set_vring_err(index, &event(&queue.error))?;
        f.set_vring_kick(index, &event(&queue.kick))?;
        f.set_vring_enable(index, true)
    }

    /// Stops a queue; where the next start begins.
    pub fn stop(&mut self, index: usize) -> u16 {
        self.frontend.get_vring_base(index).expect("queue stops") as u16
    }

    /// Reads the configuration space.
    pub fn config(&mut self, offset: u32, length: u32) -> Vec<u8> {
        let space = vec![0; length as usize];
        let flags = VhostUserConfigFlags::WRITABLE;
        self.frontend.get_config(offset, length, flags, &space).expect("configuration space").1
    }
}

/// The same eventfd as crate `vhost` wants it.
fn event(event: &crate::event::Event) -> vmm_sys_util::eventfd::EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
    let fd: OwnedFd = event.try_clone().expect("eventfd").into();
    // SAFETY: the descriptor is an eventfd, and ours to give away.
    unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(fd.into_raw_fd()) }
}
