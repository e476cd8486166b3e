//! What a card binary brings: how its devices are made.

use std::sync::Arc;

use proto::error::Error;
use proto::v1::DeviceSpec;

use crate::device::{ConfigNotifier, Device, Identity};

/// Makes the devices of one kind of card.
///
/// Calls come from the control service's worker threads, several at a time for different devices, never two for the same
/// id. They may block (opening an image on a slow storage does); nothing else waits for them.
pub trait DeviceFactory: Send + Sync + 'static {
    /// Checks `spec` as completely as can be without changing anything, and answers what the device would be. A valid
    /// device id has been checked already, that the rest of the specification is for this kind of card has not.
    fn validate(&self, spec: &DeviceSpec) -> Result<Identity, Error>;

    /// Makes the device, or leaves nothing behind. Checks what `validate` checks, which has not been called before. The
    /// engine tells `notifier` when its configuration space changes.
    /// Limits are set by the caller ([`Device::set_limits`]).
    fn create(&self, spec: &DeviceSpec, notifier: ConfigNotifier) -> Result<Arc<dyn Device>, Error>;

    /// There is no device `id` (any more): what is kept of it beside its record goes. Called when it has been deleted, and when
    /// what was made cannot be one: it could not be served, or was deleted while it was being made.
    fn forget(&self, _id: &str) {}
}

impl<T: DeviceFactory> DeviceFactory for Arc<T> {
    fn validate(&self, spec: &DeviceSpec) -> Result<Identity, Error> {
        T::validate(self, spec)
    }

    fn create(&self, spec: &DeviceSpec, notifier: ConfigNotifier) -> Result<Arc<dyn Device>, Error> {
        T::create(self, spec, notifier)
    }

    fn forget(&self, id: &str) {
        T::forget(self, id);
    }
}
