//! What the reasons of [`NetDrops`] are called where they are shown.

use crate::v1::NetDrops;

impl NetDrops {
    /// The counters with their names, in the order of the message.
    pub fn by_reason(&self) -> [(&'static str, u64); 10] {
        // Without `..`: a reason that is added is not forgotten here.
        let Self {
            malformed,
            spoofed_mac,
            spoofed_address,
            spoofed_neighbour,
            server,
            protocol,
            multicast,
            no_destination,
            uplink,
            linklocal_allowance_exceeded,
        } = *self;
        [
            ("malformed", malformed),
            ("spoofed_mac", spoofed_mac),
            ("spoofed_address", spoofed_address),
            ("spoofed_neighbour", spoofed_neighbour),
            ("server", server),
            ("protocol", protocol),
            ("multicast", multicast),
            ("no_destination", no_destination),
            ("uplink", uplink),
            ("linklocal_allowance_exceeded", linklocal_allowance_exceeded),
        ]
    }
}
