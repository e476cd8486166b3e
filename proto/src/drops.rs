//! What the reasons of [`NetDrops`], and [`NetAllowances`], are called where they are shown.

use crate::v1::{NetAllowances, NetDrops};

impl NetAllowances {
    /// The counters with their names, in the order of the message.
    pub fn by_name(&self) -> [(&'static str, u64); 3] {
        // Without `..`, as below.
        let Self { bw_in_allowance_exceeded, bw_out_allowance_exceeded, pps_allowance_exceeded } = *self;
        [
            ("bw_in_allowance_exceeded", bw_in_allowance_exceeded),
            ("bw_out_allowance_exceeded", bw_out_allowance_exceeded),
            ("pps_allowance_exceeded", pps_allowance_exceeded),
        ]
    }
}

impl NetDrops {
    /// The counters with their names, in the order of the message.
    pub fn by_reason(&self) -> [(&'static str, u64); 14] {
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
            denied_out,
            denied_in,
            conntrack_allowance_exceeded,
            fragment,
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
            ("denied_out", denied_out),
            ("denied_in", denied_in),
            ("conntrack_allowance_exceeded", conntrack_allowance_exceeded),
            ("fragment", fragment),
            ("linklocal_allowance_exceeded", linklocal_allowance_exceeded),
        ]
    }
}
