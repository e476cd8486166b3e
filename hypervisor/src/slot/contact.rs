//! The first contact with a device: what is wrong is told to whoever configures the slot.

use std::thread;
use std::time::{Duration, Instant};

use proto::error::{Error, ErrorReason};
use tonic::Code;

use super::common::F_VERSION_1;
use super::layout;
use super::params::Params;
use super::vhost_user::{Cancel, Frontend, LinkError, Offer, Patience};

/// How long to try to reach a device at first, when its process may just be starting.
const FIRST_CONTACT: Duration = Duration::from_secs(1);
const FIRST_CONTACT_PAUSE: Duration = Duration::from_millis(10);

/// The first handshake. A device whose process is just starting (or starting again) gets some time.
///
/// # Errors
/// `DEVICE_UNREACHABLE`.
pub(super) fn first(
    params: &Params,
    patience: Patience,
    cancel: &Cancel,
) -> Result<(Frontend, Offer), Error> {
    let path = params.socket.display();
    let unreachable = |why: &dyn std::fmt::Display| {
        Error::new(
            Code::Unavailable,
            ErrorReason::DeviceUnreachable,
            format!("slot {}: no device at {path}: {why}", params.id),
        )
        .resource(path.to_string())
    };
    let start = Instant::now();
    let (frontend, offer) = loop {
        let attempt = Frontend::dial(&params.socket, patience, cancel.clone()).and_then(|mut frontend| {
            let offer = frontend.negotiate(params.config_size)?;
            Ok((frontend, offer))
        });
        match attempt {
            Ok(connected) => break connected,
            Err(LinkError::Unreachable(_) | LinkError::Closed) if start.elapsed() < FIRST_CONTACT => {
                thread::sleep(FIRST_CONTACT_PAUSE);
            }
            Err(e) => {
                let remedy = match &e {
                    LinkError::Refused("GET_CONFIG") => format!(
                        "set config_size to the length of the device's configuration space ({} bytes were asked for)",
                        params.config_size
                    ),
                    // A device serves one front-end: others are turned away, or wait until it has time for them.
                    LinkError::Closed | LinkError::TimedOut(_) => {
                        "is it plugged into another VM? A device serves one slot at a time; otherwise look at the card's log".to_owned()
                    }
                    _ => "check that the card runs and serves a device at this path".to_owned(),
                };
                return Err(unreachable(&e).remedy(remedy));
            }
        }
    };
    if offer.features & F_VERSION_1 == 0 {
        let why = format!("it offers features {:#x}, without VIRTIO_F_VERSION_1", offer.features);
        return Err(unreachable(&why).remedy("use a device that follows VirtIO 1.0 or later"));
    }
    Ok((frontend, offer))
}

/// How many queues the guest sees: as many as configured, else as many as the device has.
///
/// # Errors
/// `INVALID_FIELD` if nobody says how many, or if the device cannot have so many.
pub(super) fn queues(params: &Params, offer: &Offer) -> Result<u16, Error> {
    let id = &params.id;
    match (params.queues, offer.queues.filter(|&n| n > 0)) {
        // Some devices count pairs of queues.
        (Some(wanted), Some(has)) if u64::from(wanted) > has.saturating_mul(2) => {
            let message = format!("slot {id}: {wanted} queues are wanted, but the device has {has}");
            Err(Error::invalid_field("slots.queues", message)
                .resource(id)
                .remedy("set queues to at most that, or to 0 for as many as the device has"))
        }
        (Some(wanted), _) => Ok(wanted),
        (None, Some(has)) => Ok(has.min(u64::from(layout::MAX_QUEUES)) as u16),
        (None, None) => {
            let message = format!("slot {id}: the device does not say how many queues it has");
            Err(Error::invalid_field("slots.queues", message)
                .resource(id)
                .remedy("set the number of queues in the slot's configuration"))
        }
    }
}
