//! The card's process, and the front-end's side of vhost-user.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use proto::v1::card_client::CardClient;
use proto::v1::network_card_client::NetworkCardClient;
use tonic::transport::{Channel, Endpoint};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Queue, SIZE};
use super::{Guest, MEMORY, PATIENCE};

const PROTOCOL_FEATURES: u64 = 1 << 30;

/// `offload-net` as a process; killed when dropped.
pub struct Card {
    process: Child,
    pub runtime_dir: PathBuf,
    control: PathBuf,
}

impl Card {
    /// Starts it in `directory` and waits until it answers.
    pub fn start(directory: &Path) -> Self {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_offload-net")), directory)
    }

    /// Starts it without the right to make interfaces.
    pub fn start_without_net_admin(directory: &Path) -> Self {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-net_admin", env!("CARGO_BIN_EXE_offload-net")]);
        Self::start_by(command, directory)
    }

    /// Starts it by a command that has its program, and arguments beyond those that it always has.
    pub fn start_by(mut command: Command, directory: &Path) -> Self {
        let (control, runtime_dir) = (directory.join("control.sock"), directory.join("run"));
        let process = command
            .arg("--control")
            .arg(&control)
            .arg("--runtime-dir")
            .arg(&runtime_dir)
            .arg("--log=info")
            .spawn()
            .unwrap();
        let card = Self { process, runtime_dir, control };
        retry(|| UnixStream::connect(&card.control));
        card
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// SIGTERM; its exit status.
    pub fn terminate(mut self) -> std::process::ExitStatus {
        let pid = nix::unistd::Pid::from_raw(self.process.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.process.wait().unwrap()
    }

    pub fn socket(&self, device: &str) -> PathBuf {
        self.runtime_dir.join("devices").join(format!("{device}.sock"))
    }

    async fn channel(&self) -> Channel {
        Endpoint::try_from(format!("unix:{}", self.control.display())).unwrap().connect().await.unwrap()
    }

    pub async fn devices(&self) -> CardClient<Channel> {
        CardClient::new(self.channel().await)
    }

    pub async fn networks(&self) -> NetworkCardClient<Channel> {
        NetworkCardClient::new(self.channel().await)
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Tries again until it works.
pub fn retry<T, E: std::fmt::Debug>(mut f: impl FnMut() -> Result<T, E>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        match f() {
            Ok(t) => return t,
            Err(e) if Instant::now() > until => panic!("{e:?}"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// A front-end's connection to a device; the device stops when it is dropped.
pub struct Link {
    pub frontend: Frontend,
    pub offered: u64,
}

impl Link {
    /// The whole handshake, as often as needed until it works: a card may just be coming back.
    pub fn up(guest: &Guest, socket: &Path) -> Self {
        retry(|| Self::try_up(guest, socket))
    }

    fn try_up(guest: &Guest, socket: &Path) -> io::Result<Self> {
        let other = |e: vhost::Error| io::Error::other(e);
        let mut frontend = Frontend::from_stream(UnixStream::connect(socket)?, 2);
        frontend.set_owner().map_err(other)?;
        let offered = frontend.get_features().map_err(other)?;
        assert_eq!(guest.features & !offered, 0, "the device offers what the guest takes");
        let wanted = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIG;
        let protocol = frontend.get_protocol_features().map_err(io::Error::other)?;
        assert!(protocol.contains(wanted));
        frontend.set_protocol_features(wanted).map_err(io::Error::other)?;
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(guest.features | PROTOCOL_FEATURES).map_err(other)?;
        let region =
            vm_memory::GuestMemoryBackend::get_host_address(&*guest.mem, vm_memory::GuestAddress(0)).unwrap();
        let user = region as u64;
        frontend
            .set_mem_table(&[VhostUserMemoryRegionInfo {
                guest_phys_addr: 0,
                memory_size: MEMORY as u64,
                userspace_addr: user,
                mmap_offset: 0,
                mmap_handle: guest.file.as_raw_fd(),
            }])
            .map_err(other)?;
        for (index, queue) in [&guest.rx, &guest.tx].into_iter().enumerate() {
            start(&mut frontend, index, queue, user).map_err(other)?;
        }
        Ok(Self { frontend, offered })
    }

    /// The device's configuration space.
    pub fn config(&mut self, length: u32) -> Vec<u8> {
        let buf = vec![0; length as usize];
        self.frontend.get_config(0, length, VhostUserConfigFlags::empty(), &buf).unwrap().1
    }
}

fn start(frontend: &mut Frontend, index: usize, queue: &Queue, user: u64) -> vhost::Result<()> {
    let event = |e: &offload_card::event::Event| {
        let fd = std::os::fd::OwnedFd::from(e.try_clone().unwrap());
        // SAFETY: the descriptor is ours, and given away here.
        unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
    };
    let at = queue.addresses();
    frontend.set_vring_num(index, SIZE)?;
    frontend.set_vring_addr(
        index,
        &VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: user + at.descriptors,
            used_ring_addr: user + at.used,
            avail_ring_addr: user + at.avail,
            log_addr: None,
        },
    )?;
    // What a front-end does that could not ask the last back-end: everything from the used index on is still to be done.
    frontend.set_vring_base(index, queue.device_used_idx())?;
    frontend.set_vring_call(index, &event(&queue.call))?;
    frontend.set_vring_kick(index, &event(&queue.kick))?;
    frontend.set_vring_enable(index, true)
}
