//! Messages as they are on the wire: a header of three 32-bit words, and a payload. Native byte order, which is little-endian on
//! the architectures there are.

/// Length of a header in bytes.
pub(super) const HEADER_SIZE: usize = 12;

/// Largest payload taken from a peer, in bytes: a whole device configuration space and its header, and room to spare.
pub(super) const MAX_PAYLOAD: usize = 4096;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0b11;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Protocol features (bit numbers as in the specification).
pub(in crate::slot) mod protocol {
    /// Number of queues can be asked for.
    pub(in crate::slot) const MQ: u64 = 1 << 0;
    /// Requests without an answer of their own are acknowledged on demand.
    pub(in crate::slot) const REPLY_ACK: u64 = 1 << 3;
    /// The device can ask things by itself, on a socket of its own.
    pub(in crate::slot) const BACKEND_REQ: u64 = 1 << 5;
    /// The device has a configuration space.
    pub(in crate::slot) const CONFIG: u64 = 1 << 9;
    /// What is in flight is kept in shared memory that survives the device.
    pub(in crate::slot) const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// A device can be put back into its initial state.
    pub(in crate::slot) const RESET_DEVICE: u64 = 1 << 13;
    /// Memory regions are told one by one.
    pub(in crate::slot) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

macro_rules! requests {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $number:literal, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub(super) enum $name { $($variant = $number),* }

        impl $name {
            /// The name in the specification.
            pub(super) fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),* }
            }
        }
    };
}

requests! {
    /// What a front-end asks of a device.
    Request {
        GetFeatures = 1, "GET_FEATURES";
        SetFeatures = 2, "SET_FEATURES";
        SetOwner = 3, "SET_OWNER";
        SetMemTable = 5, "SET_MEM_TABLE";
        SetVringNum = 8, "SET_VRING_NUM";
        SetVringAddr = 9, "SET_VRING_ADDR";
        SetVringBase = 10, "SET_VRING_BASE";
        GetVringBase = 11, "GET_VRING_BASE";
        SetVringKick = 12, "SET_VRING_KICK";
        SetVringCall = 13, "SET_VRING_CALL";
        SetVringErr = 14, "SET_VRING_ERR";
        GetProtocolFeatures = 15, "GET_PROTOCOL_FEATURES";
        SetProtocolFeatures = 16, "SET_PROTOCOL_FEATURES";
        GetQueueNum = 17, "GET_QUEUE_NUM";
        SetVringEnable = 18, "SET_VRING_ENABLE";
        SetBackendReqFd = 21, "SET_BACKEND_REQ_FD";
        GetConfig = 24, "GET_CONFIG";
        SetConfig = 25, "SET_CONFIG";
        GetInflightFd = 31, "GET_INFLIGHT_FD";
        SetInflightFd = 32, "SET_INFLIGHT_FD";
        ResetDevice = 34, "RESET_DEVICE";
        GetMaxMemSlots = 36, "GET_MAX_MEM_SLOTS";
        AddMemReg = 37, "ADD_MEM_REG";
    }
}

/// What a device tells by itself: its configuration space has changed. All others belong to features that are not offered.
pub(super) const BACKEND_CONFIG_CHANGE: u32 = 2;

/// The header of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Number of the request.
    pub(super) request: u32,
    flags: u32,
    /// Length of the payload in bytes.
    pub(super) size: u32,
}

impl Header {
    /// A request; `acknowledge`: an answer is wanted even if the request has none of its own.
    pub(super) fn request(request: Request, size: u32, acknowledge: bool) -> Self {
        let flags = if acknowledge { VERSION | NEED_REPLY } else { VERSION };
        Self { request: request as u32, flags, size }
    }

    /// The answer to a request with number `request`.
    pub(super) fn reply(request: u32, size: u32) -> Self {
        Self { request, flags: VERSION | REPLY, size }
    }

    /// Whether this is an answer in the version we speak.
    pub(super) fn is_reply(&self) -> bool {
        self.is_valid() && self.flags & REPLY != 0
    }

    /// Whether the sender waits for an answer.
    pub(super) fn wants_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// Whether version and length are ones that can be.
    pub(super) fn is_valid(&self) -> bool {
        self.flags & VERSION_MASK == VERSION && self.size as usize <= MAX_PAYLOAD
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[..4].copy_from_slice(&self.request.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.size.to_ne_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: [u8; HEADER_SIZE]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = bytes;
        Self {
            request: u32::from_ne_bytes([a, b, c, d]),
            flags: u32::from_ne_bytes([e, f, g, h]),
            size: u32::from_ne_bytes([i, j, k, l]),
        }
    }
}

/// Puts a payload together.
#[derive(Debug, Default)]
pub(super) struct Payload(Vec<u8>);

impl Payload {
    pub(super) fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub(super) fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend_from_slice(value);
        self
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

/// The 64-bit word at `offset` of a payload.
pub(super) fn u64_at(payload: &[u8], offset: usize) -> Option<u64> {
    let bytes = payload.get(offset..offset.checked_add(8)?)?;
    bytes.try_into().ok().map(u64::from_ne_bytes)
}

/// The 32-bit word at `offset` of a payload.
pub(super) fn u32_at(payload: &[u8], offset: usize) -> Option<u32> {
    let bytes = payload.get(offset..offset.checked_add(4)?)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        let header = Header::request(Request::SetConfig, 13, true);
        assert_eq!(Header::from_bytes(header.to_bytes()), header);
        assert!(header.wants_reply() && header.is_valid() && !header.is_reply());
        assert!(Header::reply(3, 8).is_reply());
    }

    proptest::proptest! {
        #[test]
        fn a_header_that_is_believed_is_sane(bytes in proptest::array::uniform12(proptest::num::u8::ANY)) {
            let header = Header::from_bytes(bytes);
            if header.is_reply() {
                assert!(header.size as usize <= MAX_PAYLOAD);
            }
            assert_eq!(header.to_bytes(), bytes);
        }
    }
}
