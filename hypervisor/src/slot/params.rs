//! What a slot is configured to be, checked.

use std::path::PathBuf;

use proto::error::Error;
use proto::v1;

use super::layout;

/// Longest id, in characters.
const MAX_ID: usize = 64;
/// Longest path of a Unix socket, in bytes (`sun_path`).
const MAX_SOCKET_PATH: usize = 107;
/// Ring size if none is configured.
const DEFAULT_QUEUE_SIZE: u16 = 256;
/// Largest split ring (VirtIO 1.3 section 2.7).
const MAX_QUEUE_SIZE: u32 = 32768;
/// Length of the configuration space if none is configured.
const DEFAULT_CONFIG_SIZE: usize = 60;
/// Last virtio device id that has a PCI device id (VirtIO 1.3 section 4.1.2.1: 0x1040 + id up to 0x107f).
const MAX_VIRTIO_ID: u32 = 0x3f;

/// A checked [`v1::SlotConfig`].
#[derive(Debug, Clone)]
pub(super) struct Params {
    pub(super) id: String,
    pub(super) socket: PathBuf,
    pub(super) virtio_id: u16,
    /// Number of queues; `None`: what the device says.
    pub(super) queues: Option<u16>,
    pub(super) queue_size: u16,
    pub(super) config_size: usize,
    pub(super) masked_features: u64,
    pub(super) static_config: Vec<u8>,
}

/// Checks what can be checked of a slot's configuration without its device.
///
/// # Errors
/// `INVALID_FIELD`, naming the field.
pub fn check(config: &v1::SlotConfig) -> Result<(), Error> {
    Params::new(config).map(|_| ())
}

/// Checks a name: of a VM or a slot. `field` is where it was given.
///
/// # Errors
/// `INVALID_FIELD`.
pub fn check_id(field: &str, id: &str) -> Result<(), Error> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if id.is_empty() || id.len() > MAX_ID || !id.chars().all(allowed) {
        return Err(Error::invalid_field(field, format!("{id:?} is not allowed as {field}"))
            .resource(id)
            .remedy("use 1 to 64 of a-z, 0-9 and -"));
    }
    Ok(())
}

impl Params {
    /// See [`check`].
    ///
    /// # Errors
    /// As [`check`].
    pub(super) fn new(config: &v1::SlotConfig) -> Result<Self, Error> {
        let id = &config.id;
        check_id("slots.id", id)?;
        let wrong = |field: &str, what: String, remedy: String| {
            Error::invalid_field(&format!("slots.{field}"), format!("slot {id}: {what}"))
                .resource(id)
                .remedy(remedy)
        };
        let path = &config.socket_path;
        if !path.starts_with('/') || path.contains('\0') || path.len() > MAX_SOCKET_PATH {
            return Err(wrong(
                "socket_path",
                format!("{path:?} is no absolute path of a Unix socket"),
                format!("give one of at most {MAX_SOCKET_PATH} bytes"),
            ));
        }
        let virtio_id = match config.virtio_device_id {
            id @ 1..=MAX_VIRTIO_ID => id as u16,
            id => {
                return Err(wrong(
                    "virtio_device_id",
                    format!("{id} is no virtio device id"),
                    format!("give the id of VirtIO 1.3 section 5, 1 to {MAX_VIRTIO_ID}"),
                ));
            }
        };
        let queues = match config.queues {
            0 => None,
            n if n <= u32::from(layout::MAX_QUEUES) => Some(n as u16),
            n => {
                return Err(wrong(
                    "queues",
                    format!("{n} queues are too many"),
                    format!("give at most {}, or 0 for as many as the device has", layout::MAX_QUEUES),
                ));
            }
        };
        let queue_size = match config.queue_size {
            0 => DEFAULT_QUEUE_SIZE,
            n if n.is_power_of_two() && n <= MAX_QUEUE_SIZE => n as u16,
            n => {
                return Err(wrong(
                    "queue_size",
                    format!("{n} is no possible ring size"),
                    format!("give a power of two up to {MAX_QUEUE_SIZE}, or 0 for the default"),
                ));
            }
        };
        let config_size = match config.config_size as usize {
            0 => DEFAULT_CONFIG_SIZE,
            n if n <= layout::MAX_CONFIG => n,
            n => return Err(wrong("config_size", format!("{n} bytes are too long"), at_most_config())),
        };
        if config.static_config.len() > layout::MAX_CONFIG {
            let what = format!("{} bytes are too long", config.static_config.len());
            return Err(wrong("static_config", what, at_most_config()));
        }
        Ok(Self {
            id: id.clone(),
            socket: PathBuf::from(path),
            virtio_id,
            queues,
            queue_size,
            config_size,
            masked_features: config.masked_features,
            static_config: config.static_config.clone(),
        })
    }
}

fn at_most_config() -> String {
    format!("give at most {} bytes", layout::MAX_CONFIG)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> v1::SlotConfig {
        v1::SlotConfig { id: "a".into(), socket_path: "/s".into(), virtio_device_id: 2, ..Default::default() }
    }

    #[test]
    fn zeroes_mean_defaults() {
        let p = Params::new(&config()).unwrap();
        assert_eq!((p.queues, p.queue_size, p.config_size), (None, 256, 60));
    }

    #[test]
    fn each_bad_value_is_named() {
        let bad = [
            ("slots.id", v1::SlotConfig { id: String::new(), ..config() }),
            ("slots.id", v1::SlotConfig { id: "/".into(), ..config() }),
            ("slots.socket_path", v1::SlotConfig { socket_path: String::new(), ..config() }),
            ("slots.socket_path", v1::SlotConfig { socket_path: "x.sock".into(), ..config() }),
            (
                "slots.socket_path",
                v1::SlotConfig { socket_path: format!("/{}", "x".repeat(107)), ..config() },
            ),
            ("slots.virtio_device_id", v1::SlotConfig { virtio_device_id: 0, ..config() }),
            ("slots.virtio_device_id", v1::SlotConfig { virtio_device_id: 64, ..config() }),
            ("slots.queues", v1::SlotConfig { queues: 257, ..config() }),
            ("slots.queue_size", v1::SlotConfig { queue_size: 100, ..config() }),
            ("slots.queue_size", v1::SlotConfig { queue_size: 65536, ..config() }),
            ("slots.config_size", v1::SlotConfig { config_size: 257, ..config() }),
            ("slots.static_config", v1::SlotConfig { static_config: vec![0; 257], ..config() }),
        ];
        for (field, config) in bad {
            let error = Params::new(&config).unwrap_err();
            let text = format!("{error:?}");
            assert!(text.contains(&format!("\"field\": \"{field}\"")) && text.contains("remedy"), "{text}");
        }
    }
}
