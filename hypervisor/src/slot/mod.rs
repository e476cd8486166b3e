//! Slots: virtio-pci functions whose devices are served by other processes over vhost-user.
//!
//! A slot knows no type of device. What a device offers (features, number of queues, configuration space) it learns from the device
//! itself, shows it to the guest, and passes back what the guest's driver chose; then the guest's rings are between the guest and
//! the device, in shared memory, with eventfds that KVM serves. What stays here are registers ([`state`]), and a thread per slot
//! ([`link`]) that keeps the connection.
//!
//! ```text
//!  vCPU thread ── configuration space, BAR ──► State (registers) ── orders ──► Link (thread) ── vhost-user ──► device
//!                 answered at once                  ▲                            │
//!                                                   └──── configuration, reset done
//! ```
//!
//! A vCPU never waits for a device: registers are answered from here. A device may die, hang or lie: the link is dropped and made
//! again, for ever, and requests wait in their rings meanwhile.
//!
//! A device process that is dropped because it hangs still has the guest's memory mapped. If the machine is reset after that, the
//! next life gets other memory ([`Slot::reset`]). If only the driver resets its device, the status register says so as soon as the
//! device has stopped or its time is up; what a device that wakes up later still writes into the buffers that it was given cannot
//! be helped.

mod common;
mod contact;
mod device_config;
mod layout;
mod link;
mod options;
mod params;
mod ring;
mod shared;
mod signals;
mod state;
mod sys;
mod vhost_user;

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::VmFd;
use proto::error::{Error, ErrorReason};
use proto::v1;
use tonic::Code;
use vmm_sys_util::eventfd::EventFd;

pub use options::{Notifications, Notify, Options};
pub use params::{check, check_id};
pub use proto::v1::LinkState;

use crate::exits::Exit;
use crate::memory::GuestRam;
use crate::platform::irq::IrqRouter;
use crate::platform::pci::{PciFunction, Placement};
use device_config::DeviceConfig;
use link::Link;
use params::Params;
use shared::{Guarded, LinkStatus, Shared};
use signals::{Binding, Channel};
use state::{Effect, Fixed, State};
use vhost_user::{Cancel, Patience};

/// Stack of a link's thread in bytes. Its deepest frame holds one message.
const STACK: usize = 128 << 10;

/// How long a shutdown, or a reset that has cut the connection, waits for the thread, which has nothing to wait for itself.
const FAREWELL: Duration = Duration::from_secs(1);

/// Who hears what happens to slots. Called from the links' threads, without any lock held; must not wait for
/// anything, least of all for a slot.
pub trait SlotHost: Send + Sync {
    /// The link of `slot` is in this state now; `reason` says why, for [`LinkState::Lost`].
    fn link_changed(&self, slot: &str, state: LinkState, reason: &str);

    /// The device of `slot` has changed its configuration space.
    fn config_changed(&self, slot: &str);
}

/// A virtio-pci function and its link to a device.
pub struct Slot {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot").field("id", &self.shared.fixed.params.id).finish_non_exhaustive()
    }
}

impl Slot {
    /// Connects to the device of `config` and learns what it is; the link lives from then on until [`Slot::shutdown`]. Takes a few
    /// seconds at most.
    ///
    /// # Errors
    /// `INVALID_FIELD` for a configuration that cannot work, `DEVICE_UNREACHABLE` if nobody answers at the socket or what answers is
    /// no vhost-user device that can be used.
    pub fn connect(
        config: &v1::SlotConfig,
        ram: Arc<GuestRam>,
        host: Arc<dyn SlotHost>,
    ) -> Result<Arc<Self>, Error> {
        Self::connect_with(config, ram, host, Options::default())
    }

    /// [`Slot::connect`] with options that the hypervisor itself does not use.
    ///
    /// # Errors
    /// As [`Slot::connect`].
    pub fn connect_with(
        config: &v1::SlotConfig,
        ram: Arc<GuestRam>,
        host: Arc<dyn SlotHost>,
        options: Options,
    ) -> Result<Arc<Self>, Error> {
        let patience = Patience::default();
        let params = Params::new(config)?;
        let id = params.id.clone();
        let of_host = |e: io::Error| {
            let errno = e.raw_os_error().unwrap_or(0).to_string();
            Error::new(Code::Internal, ErrorReason::Host, format!("slot {id}: {e}")).with("errno", errno)
        };
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(of_host);
        let cancel = Cancel { stop: Arc::new(event()?), cut: Arc::new(event()?) };
        let (frontend, offer) = contact::first(&params, patience, &cancel)?;
        let queues = contact::queues(&params, &offer)?;
        let queues_of_device = params.queues.is_none().then_some(u64::from(queues));
        let channels =
            (0..queues).map(|_| Channel::new()).collect::<io::Result<Vec<_>>>().map_err(of_host)?;
        let (wake, error) = (event()?, event()?);
        let device_config = device_config(&params, offer.config);
        let fixed = Arc::new(Fixed { params, options, channels });
        let state = State::new(Arc::clone(&fixed), ram, offer.features, device_config);
        let keeps_inflight = frontend.has_inflight();
        if !keeps_inflight {
            eprintln!(
                "outboard-hypervisor: slot {id}: the device does not keep what is in flight in shared memory: if it dies, requests \
                 that it finishes out of order may be lost or done twice"
            );
        }
        let shared = Arc::new(Shared {
            fixed,
            patience,
            host,
            queues_of_device,
            wake,
            error,
            cancel,
            stopped: AtomicBool::new(false),
            guarded: Mutex::new(Guarded { state, link: LinkStatus::new(keeps_inflight, offer.protocol) }),
            changed: Condvar::new(),
        });
        let link = Link::new(Arc::clone(&shared), frontend);
        let thread = thread::Builder::new()
            .name(format!("slot:{id}"))
            .stack_size(STACK)
            .spawn(move || link.run())
            .map_err(of_host)?;
        Ok(Arc::new(Self { shared, thread: Mutex::new(Some(thread)) }))
    }

    /// Lets the guest of a KVM VM use the slot: notifications and interrupts go through KVM from now on.
    pub fn bind(&self, vm: &Arc<VmFd>, router: &Arc<IrqRouter>) {
        let binding = Binding::new(Arc::clone(vm), Arc::clone(router));
        self.shared.lock().state.bind(binding);
    }

    /// Undoes [`Slot::bind`], before the KVM VM goes away. No vCPU may run.
    pub fn unbind(&self) {
        self.shared.lock().state.unbind();
    }

    /// Puts the slot into the state after power-on, as a reset of the machine does. Returns when the device has stopped using the
    /// rings, or has lost its connection for not doing so in time: after a few seconds at most. No vCPU may run.
    ///
    /// Says whether the guest's memory is quiet: `false` if a connection was lost while rings ran, since the memory is in use. Its
    /// device may not know, and write for as long as it lives; so the guest should go on with other memory
    /// ([`Slot::replace_memory`]).
    #[must_use]
    pub fn reset(&self) -> bool {
        self.shared.reset()
    }

    /// The guest has other memory from now on; a connection about the old is dropped and made again. Only right after
    /// [`Slot::reset`].
    pub fn replace_memory(&self, ram: Arc<GuestRam>) {
        self.shared.replace_memory(ram);
    }

    /// Number of MSI-X vectors, each of which may need a route of KVM's.
    pub fn vectors(&self) -> u16 {
        self.shared.fixed.channels.len() as u16 + 1
    }

    /// State and counters.
    pub fn info(&self) -> v1::SlotInfo {
        self.shared.info()
    }

    /// Closes the connection for good. Works in every state of the link, and never waits for the device. Idempotent.
    pub fn shutdown(&self) {
        self.shared.stop();
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        if self.shared.wait_until_removed(FAREWELL) {
            // It has said its last word; an error would be a panic, which ends the process.
            let _ = thread.join();
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// What a device does not say about its configuration was said by whoever configured the slot.
fn device_config(params: &Params, of_device: Option<Vec<u8>>) -> DeviceConfig {
    let writable = of_device.is_some();
    let mut bytes = of_device.unwrap_or_else(|| {
        let mut fixed = params.static_config.clone();
        if !fixed.is_empty() {
            fixed.resize(fixed.len().max(params.config_size), 0);
        }
        fixed
    });
    bytes.truncate(layout::MAX_CONFIG);
    DeviceConfig::new(bytes, writable)
}

impl PciFunction for Slot {
    fn read_config(&self, offset: u8, data: &mut [u8]) -> Option<Exit> {
        let window = self.shared.lock().state.window(offset, data.len());
        let exit = window.and_then(|access| {
            let mut bytes = [0xff; 4];
            let exit = access.map(|(at, length)| self.read_bar(at, &mut bytes[..length]));
            self.shared.lock().state.set_window_data(&bytes);
            exit
        });
        self.shared.lock().state.read_pci(offset, data);
        exit
    }

    fn write_config(&self, offset: u8, data: &[u8]) -> Option<Exit> {
        let (window, bytes) = {
            let mut shared = self.shared.lock();
            let window = shared.state.window(offset, data.len());
            shared.state.write_pci(offset, data);
            (window, shared.state.window_data())
        };
        let (at, length) = window??;
        Some(self.write_bar(at, &bytes[..length]))
    }

    fn bar_size(&self) -> u64 {
        layout::bar_size(self.shared.fixed.channels.len() as u16)
    }

    fn bar(&self) -> Option<u64> {
        self.shared.lock().state.bar()
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) -> Exit {
        self.shared.lock().state.read_bar(offset, data)
    }

    fn write_bar(&self, offset: u64, data: &[u8]) -> Exit {
        let mut shared = self.shared.lock();
        let (exit, effect) = shared.state.write_bar(offset, data);
        if effect == Effect::Wake {
            self.shared.wake(&shared);
        }
        drop(shared);
        if let Effect::Notify(queue) = effect {
            self.shared.notify(queue);
        }
        exit
    }

    fn place(&self, placement: Placement) {
        self.shared.lock().state.place(placement);
    }
}
