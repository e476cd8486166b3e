//! A network with a prefix, and an interface in it.

use std::sync::LazyLock;

use offload_net::mac::MacAddr;
use offload_net::subnet::{Interface, Subnet};

/// The interface's MAC address.
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
/// Its IPv4 address.
pub const OWN: [u8; 4] = [10, 88, 0, 7];
/// Its IPv6 address.
pub const OWN6: [u8; 16] = [0xfd, 0, 0, 0x88, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];

/// The network.
pub static SUBNET: LazyLock<Subnet> = LazyLock::new(|| {
    let spec = proto::v1::NetworkSpec {
        id: "fuzz".to_owned(),
        ipv4_prefix: "10.88.0.0/24".to_owned(),
        ipv6_prefix: "fd00:88::/64".to_owned(),
        ..Default::default()
    };
    Subnet::check(&spec, 1500, &[]).expect("a good network").expect("with a prefix")
});

/// The interface, without metadata.
pub fn interface() -> Interface {
    Interface {
        ipv4: vec![OWN.into()],
        ipv6: vec![OWN6.into()],
        hostname: "fuzz".to_owned(),
        ..Interface::plain(MacAddr(MAC))
    }
}
