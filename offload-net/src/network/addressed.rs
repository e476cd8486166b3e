//! What a network's thread has of a network with a prefix: who is there, and where answers are made.

use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use crate::answer::{self, arp, dhcp, dhcp6, neighbour, router};
use crate::drops::DropReason;
use crate::frame::{Bytes, Frame};
use crate::guard::{self, Question, Verdict};
use crate::mac::MacAddr;
use crate::metadata::{self, Endpoints};
use crate::subnet::{Interface, Neighbours, Subnet};

/// How often devices are told about IPv6 that they have heard long ago: the longest that RFC 4861 allows is three times this.
pub(super) const ADVERTISE_EVERY: Duration = Duration::from_secs(600);

/// A network's prefix, and who is in it.
pub(super) struct Addressed {
    subnet: Subnet,
    neighbours: Neighbours,
    /// Where answers are made.
    answer: Box<answer::Buffer>,
    /// Where questions that are longer than a frame's head are copied to.
    question: Box<[u8; answer::QUESTION_MAX]>,
    /// When the network's devices are told about IPv6 without having asked; `None`: it has no IPv6.
    pub(super) next_advertisement: Option<Instant>,
    /// Who has asked the metadata service, and what it has to say.
    pub(super) metadata: Endpoints,
}

impl Addressed {
    /// A network in which nobody is but the gateway.
    pub(super) fn new(subnet: Subnet) -> Self {
        Self {
            neighbours: Neighbours::of(&subnet),
            next_advertisement: subnet.ipv6.map(|_| Instant::now() + ADVERTISE_EVERY),
            subnet,
            answer: Box::new([0; answer::MAX]),
            question: Box::new([0; answer::QUESTION_MAX]),
            metadata: Endpoints::default(),
        }
    }

    /// Takes in a device.
    ///
    /// # Errors
    /// The address that is another's.
    pub(super) fn insert(&mut self, interface: &Interface) -> Result<(), IpAddr> {
        self.neighbours.insert(interface)
    }

    /// Lets it go.
    pub(super) fn remove(&mut self, interface: &Interface) {
        self.neighbours.remove(interface);
        self.metadata.remove(interface.mac);
    }

    /// Judges a frame from a device, or from the host.
    ///
    /// # Errors
    /// Why it goes nowhere.
    pub(super) fn judge(&self, frame: &Frame<'_>, from: Option<&Interface>) -> Result<Verdict, DropReason> {
        match from {
            Some(interface) => guard::from_device(&self.subnet, interface, frame),
            None if self.subnet.external => guard::from_outside(&self.subnet, &self.neighbours, frame),
            None => guard::from_uplink(&self.subnet, frame),
        }
    }

    /// A device's question that nobody here can answer is for those behind the uplink.
    pub(super) fn asks_outside(&self, question: Question) -> bool {
        let outside =
            |address: IpAddr| !metadata::is_service(address) && self.neighbours.get(address).is_none();
        self.subnet.external
            && match question {
                Question::Arp(request) => outside(request.target.into()),
                Question::Neighbour { target, .. } => outside(target.into()),
                Question::Dhcp(_) | Question::Router(_) | Question::Dhcp6 { .. } | Question::Metadata(_) => {
                    false
                }
            }
    }

    /// The answer made last, of which this is the length.
    pub(super) fn answer_bytes(&mut self, length: usize) -> Option<&mut [u8]> {
        self.answer.get_mut(..length)
    }

    /// Makes the answer to a question from a device, or from the host; its length, `None` if there is nothing to say.
    ///
    /// # Errors
    /// Nobody has the address that is asked for, or it is no question.
    pub(super) fn answer(
        &mut self,
        frame: &Frame<'_>,
        from: Option<&Interface>,
        question: Question,
    ) -> Result<Option<usize>, DropReason> {
        // Whoever asks for its own address wants to know whether it is another's. The host is the gateway.
        let own = from.map_or(self.subnet.gateway_mac, |i| i.mac);
        let others = |mac: MacAddr| mac != own;
        match question {
            Question::Arp(request) => match self.who_has(request.target.into(), from) {
                Some(mac) if others(mac) => Ok(arp::reply(&request, mac, &mut self.answer)),
                Some(_) => Ok(None),
                None => Err(DropReason::NoDestination),
            },
            Question::Neighbour { from: address, target } => match self.who_has(target.into(), from) {
                Some(mac) if others(mac) => {
                    let asker = neighbour::Asker { mac: frame.source().unwrap_or(mac), address };
                    let is_router = self.subnet.is_ipv6_router() && mac == self.subnet.gateway_mac;
                    Ok(neighbour::advertisement(asker, target, mac, is_router, &mut self.answer))
                }
                Some(_) => Ok(None),
                None => Err(DropReason::NoDestination),
            },
            Question::Dhcp(bytes) => {
                let Some(client) = from else { return Ok(None) };
                let message = copy(frame, bytes, &mut *self.question)?;
                dhcp::reply(message, client, &self.subnet, &mut self.answer)
            }
            Question::Router(address) => {
                let Some(client) = from else { return Ok(None) };
                Ok(self.advertisement(client, address))
            }
            Question::Dhcp6 { from: address, message } => {
                let Some(client) = from else { return Ok(None) };
                let message = copy(frame, message, &mut *self.question)?;
                dhcp6::reply(message, address, client, &self.subnet, &mut self.answer)
            }
            Question::Metadata(bytes) => {
                let Some(client) = from else { return Ok(None) };
                let packet = copy(frame, bytes, &mut *self.question)?;
                self.metadata.receive(client, &self.subnet, packet, Instant::now())?;
                Ok(None)
            }
        }
    }

    /// Makes what a device is told about IPv6, at its address, or at all; its length. `None`: it has no part in IPv6.
    pub(super) fn advertisement(&mut self, to: &Interface, address: Ipv6Addr) -> Option<usize> {
        if to.ipv6.is_empty() {
            return None;
        }
        let asker = neighbour::Asker { mac: to.mac, address };
        router::advertisement(asker, &self.subnet, to.metadata.is_some(), &mut self.answer)
    }

    /// Whose MAC address is told to whoever asks for an IP address. The metadata service's is the gateway's, for those to
    /// whom it speaks.
    fn who_has(&self, address: IpAddr, asks: Option<&Interface>) -> Option<MacAddr> {
        if metadata::is_service(address) {
            return asks.filter(|i| i.metadata.is_some()).map(|_| self.subnet.gateway_mac);
        }
        self.neighbours.get(address)
    }

    /// Does for the metadata service what is due.
    pub(super) fn tend_metadata(&mut self, now: Instant, send: impl FnMut(MacAddr, &mut metadata::Frames)) {
        self.metadata.tend(&self.subnet, now, send);
    }
}

/// Copies a part of a frame to where it can be read.
fn copy<'a>(frame: &Frame<'_>, bytes: Bytes, to: &'a mut [u8]) -> Result<&'a [u8], DropReason> {
    let to = to.get_mut(..bytes.len).ok_or(DropReason::Malformed)?;
    if frame.copy_out(bytes.start, to) { Ok(to) } else { Err(DropReason::Malformed) }
}
