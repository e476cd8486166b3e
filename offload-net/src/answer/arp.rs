//! ARP (RFC 826): requests are answered in the name of whoever has the address.

use super::{Buffer, Writer};
use crate::frame::packet::{Arp, TYPE_ARP};
use crate::mac::MacAddr;

/// Writes the reply that tells the sender of `request` that its target is at `mac`; its length.
pub fn reply(request: &Arp, mac: MacAddr, buffer: &mut Buffer) -> Option<usize> {
    let mut w = Writer::new(buffer);
    w.ethernet(request.sender_mac, mac, TYPE_ARP)
        .put(&[0, 1, 8, 0, 6, 4, 0, 2])
        .put(&mac.0)
        .put(&request.target.octets())
        .put(&request.sender_mac.0)
        .put(&request.sender.octets());
    w.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::MAX;
    use crate::frame::packet::{Packet, parse};

    #[test]
    fn a_reply_is_an_arp_packet_to_the_one_who_asked() {
        let (asks, has) = (MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([2, 0, 0, 0, 0, 2]));
        let request = Arp {
            operation: 1,
            sender_mac: asks,
            sender: [10, 0, 0, 1].into(),
            target: [10, 0, 0, 2].into(),
        };
        let mut buffer = [0; MAX];
        let n = reply(&request, has, &mut buffer).unwrap();
        assert_eq!((n, &buffer[..6], &buffer[6..12]), (42, &asks.0[..], &has.0[..]));
        let Ok(Packet::Arp(got)) = parse(&buffer[..n], n) else { panic!() };
        assert_eq!(
            got,
            Arp { operation: 2, sender_mac: has, sender: request.target, target: request.sender }
        );
        assert_eq!(&buffer[32..38], &asks.0);
    }
}
