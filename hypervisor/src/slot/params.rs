//! What a slot is configured to be, checked.

use std::path::PathBuf;

use proto::error::Error;
use proto::v1;

use super::layout;

/// Ring size if none is configured.
const DEFAULT_QUEUE_SIZE: u16 = 256;
/// Largest ring of VirtIO (1.3 section 2.7).
const MAX_QUEUE_SIZE: u32 = 32768;
/// Length of the configuration space if none is configured.
const DEFAULT_CONFIG_SIZE: usize = 60;
/// Virtio device ids have a PCI device id each up to this one.
const MAX_VIRTIO_ID: u32 = 63;

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

impl Params {
    /// Checks what can be checked without the device.
    ///
    /// # Errors
    /// `INVALID_FIELD`, naming the field.
    pub(super) fn new(config: &v1::SlotConfig) -> Result<Self, Error> {
        let invalid = |field: &str, what: String| {
            Error::invalid_field(&format!("slots.{field}"), format!("slot {}: {what}", config.id))
        };
        if config.id.is_empty() {
            return Err(Error::invalid_field("slots.id", "a slot has no id"));
        }
        if config.socket_path.is_empty() {
            return Err(invalid("socket_path", "no socket is given".into()));
        }
        let virtio_id = match config.virtio_device_id {
            id @ 1..=MAX_VIRTIO_ID => id as u16,
            id => {
                return Err(invalid("virtio_device_id", format!("{id} is no virtio device id (1 to 63)")));
            }
        };
        let queues = match config.queues {
            0 => None,
            n if n <= u32::from(layout::MAX_QUEUES) => Some(n as u16),
            n => return Err(invalid("queues", format!("{n} queues are more than {}", layout::MAX_QUEUES))),
        };
        let queue_size = match config.queue_size {
            0 => DEFAULT_QUEUE_SIZE,
            n if n.is_power_of_two() && n <= MAX_QUEUE_SIZE => n as u16,
            n => {
                let what = format!("{n} is no ring size: it must be a power of two up to {MAX_QUEUE_SIZE}");
                return Err(invalid("queue_size", what));
            }
        };
        let config_size = match config.config_size as usize {
            0 => DEFAULT_CONFIG_SIZE,
            n if n <= layout::MAX_CONFIG => n,
            n => {
                let what = format!("{n} bytes of configuration are more than {}", layout::MAX_CONFIG);
                return Err(invalid("config_size", what));
            }
        };
        if config.static_config.len() > layout::MAX_CONFIG {
            let what = format!("{} bytes are more than {}", config.static_config.len(), layout::MAX_CONFIG);
            return Err(invalid("static_config", what));
        }
        Ok(Self {
            id: config.id.clone(),
            socket: PathBuf::from(&config.socket_path),
            virtio_id,
            queues,
            queue_size,
            config_size,
            masked_features: config.masked_features,
            static_config: config.static_config.clone(),
        })
    }
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
            ("slots.socket_path", v1::SlotConfig { socket_path: String::new(), ..config() }),
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
            let expected = Error::invalid_field(field, error.message());
            assert_eq!(error, expected);
        }
    }
}
