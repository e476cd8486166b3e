//! What a network's thread has of a network with a prefix: who is there, and where answers are made.

use std::net::IpAddr;

use crate::answer::{self, arp, dhcp, neighbour};
use crate::drops::DropReason;
use crate::frame::Frame;
use crate::guard::{self, Question, Verdict};
use crate::mac::MacAddr;
use crate::subnet::{Interface, Neighbours, Subnet};

/// A network's prefix, and who is in it.
pub(super) struct Addressed {
    subnet: Subnet,
    neighbours: Neighbours,
    /// Where answers are made.
    answer: Box<answer::Buffer>,
    /// Where questions that are longer than a frame's head are copied to.
    question: Box<[u8; answer::QUESTION_MAX]>,
}

impl Addressed {
    /// A network in which nobody is but the gateway.
    pub(super) fn new(subnet: Subnet) -> Self {
        Self {
            neighbours: Neighbours::of(&subnet),
            subnet,
            answer: Box::new([0; answer::MAX]),
            question: Box::new([0; answer::QUESTION_MAX]),
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
    }

    /// Judges a frame from a device, or from the host.
    ///
    /// # Errors
    /// Why it goes nowhere.
    pub(super) fn judge(&self, frame: &Frame<'_>, from: Option<&Interface>) -> Result<Verdict, DropReason> {
        match from {
            Some(interface) => guard::from_device(&self.subnet, interface, frame),
            None => guard::from_uplink(&self.subnet, frame),
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
        // Whoever asks for its own address wants to know whether it is another's.
        let others = |mac: MacAddr| from.is_none_or(|i| i.mac != mac);
        match question {
            Question::Arp(request) => match self.neighbours.get(request.target.into()) {
                Some(mac) if others(mac) => Ok(arp::reply(&request, mac, &mut self.answer)),
                Some(_) => Ok(None),
                None => Err(DropReason::NoDestination),
            },
            Question::Neighbour { from: address, target } => match self.neighbours.get(target.into()) {
                Some(mac) if others(mac) => {
                    let asker = neighbour::Asker { mac: frame.source().unwrap_or(mac), address };
                    let is_router = self.subnet.routed && mac == self.subnet.gateway_mac;
                    Ok(neighbour::advertisement(asker, target, mac, is_router, &mut self.answer))
                }
                Some(_) => Ok(None),
                None => Err(DropReason::NoDestination),
            },
            Question::Dhcp(bytes) => {
                let Some(client) = from else { return Ok(None) };
                let Some(message) = self.question.get_mut(..bytes.len) else {
                    return Err(DropReason::Malformed);
                };
                if !frame.copy_out(bytes.start, message) {
                    return Err(DropReason::Malformed);
                }
                dhcp::reply(message, client, &self.subnet, &mut self.answer)
            }
        }
    }
}
