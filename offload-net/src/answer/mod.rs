//! What the card answers in a network with a prefix: ARP, neighbour and router solicitations, DHCP of both kinds.
//!
//! An answer is made in a buffer of the network's thread, of what the control plane said and of the question alone:
//! nothing is kept per client, so guests can make nothing grow, and a card that was killed answers as before.

pub mod arp;
pub mod dhcp;
pub mod dhcp6;
pub mod neighbour;
pub mod router;

/// Largest answer in bytes: a DHCP message of the size that every client takes (RFC 2131 section 2) and its headers.
pub const MAX: usize = 14 + 20 + 8 + 548;
/// Largest question in bytes that is looked at: what clients send in one frame. To the metadata service that is what its
/// window allows, with the headers.
pub const QUESTION_MAX: usize = 4096;

/// Room for an answer.
pub type Buffer = [u8; MAX];

/// Writes one thing after another into a buffer. What does not fit is left out, and [`Writer::finish`] says so.
struct Writer<'a> {
    buffer: &'a mut Buffer,
    len: usize,
}

impl<'a> Writer<'a> {
    fn new(buffer: &'a mut Buffer) -> Self {
        Self { buffer, len: 0 }
    }

    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        if let Some(to) = self.buffer.get_mut(self.len..self.len + bytes.len()) {
            to.copy_from_slice(bytes);
        }
        self.len += bytes.len();
        self
    }

    /// Ethernet header.
    fn ethernet(&mut self, to: crate::mac::MacAddr, from: crate::mac::MacAddr, ethertype: u16) -> &mut Self {
        self.put(&to.0).put(&from.0).put(&ethertype.to_be_bytes())
    }

    /// Puts a checksum where it belongs.
    fn patch(&mut self, at: usize, value: u16) {
        if let Some(to) = self.buffer.get_mut(at..at + 2) {
            to.copy_from_slice(&value.to_be_bytes());
        }
    }

    /// What has been written from `start` on.
    fn written(&self, start: usize) -> &[u8] {
        self.buffer.get(start..self.len).unwrap_or_default()
    }

    /// Length of the answer, or none if it did not fit.
    fn finish(self) -> Option<usize> {
        (self.len <= MAX).then_some(self.len)
    }
}
