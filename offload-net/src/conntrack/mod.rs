//! What an interface with security groups gets and sends: what its rules allow, and what belongs to that.
//!
//! A packet passes when it belongs to a connection that the rules allow, or opens one; an ICMP error passes when the packet
//! that it is about belonged to one. A connection has a place in the interface's own table, which others can neither
//! fill nor empty: a new one for which there is no room is dropped. TCP connections begin with a SYN. What the rules
//! allowed once is judged again when they change, at its next packet, so that a change is in force at once and costs
//! the network's thread nothing.
//!
//! - [`flow`]: what a packet says; [`tcp`]: how far a connection is;
//! - [`table`]: the connections, and [`slots`]: the file in which they outlive the card;
//! - [`fragments`]: packets in several parts.

pub mod flow;
pub mod fragments;
pub mod slots;
pub mod table;
pub mod tcp;

#[cfg(test)]
mod model_tests;

use std::path::Path;
use std::sync::Arc;

use nix::time::{ClockId, clock_gettime};

use crate::mac::MacAddr;
use crate::security::rules::{GroupId, Members, Rules};
use flow::{Content, Direction, Key, Packet};
use fragments::Fragments;
use slots::{Owner, Slots};
use table::{Found, Slot, Table};
use tcp::State;

/// Milliseconds since the host booted: the same clock for every process. Read by every packet, so to a few milliseconds
/// only, without a system call.
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE);
    let ms = |t: nix::sys::time::TimeSpec| t.tv_sec() as u64 * 1000 + t.tv_nsec() as u64 / 1_000_000;
    // There is this clock on every Linux; without, connections are not forgotten.
    now.map_or(0, ms)
}

/// Why a packet does not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// No rule allows it, and it belongs to nothing that one has allowed.
    Rule,
    /// There is no room for one more connection.
    Full,
    /// A part of a packet of which the first part has not passed.
    Fragment,
}

/// An interface's rules and connections.
#[derive(Debug)]
pub struct Filter {
    groups: Box<[GroupId]>,
    rules: Arc<Rules>,
    /// Counts the interface's rules.
    version: u32,
    table: Table,
    fragments: Fragments,
}

impl Filter {
    /// A filter whose connections go with this process.
    ///
    /// # Errors
    /// No memory.
    pub fn in_memory(groups: &[GroupId], rules: Arc<Rules>, room: usize) -> std::io::Result<Self> {
        Ok(Self::with(groups, rules, Table::new(Slots::in_memory(room)?, now()).0))
    }

    /// A filter whose connections are kept in a file, and those that are there. Where no file can be had, they go with this
    /// process: that is worse than before, and better than no device.
    ///
    /// # Errors
    /// No memory.
    pub fn in_file(
        groups: &[GroupId],
        rules: Arc<Rules>,
        room: usize,
        path: &Path,
        owner: (MacAddr, &str),
    ) -> std::io::Result<Self> {
        let (mac, network) = owner;
        let owner = Owner { boot: boot_id(), mac: mac.0, network: fnv(network) };
        let (slots, replaced) = match Slots::in_file(path, room, &owner) {
            Ok(opened) => opened,
            Err(e) => {
                tracing::warn!("{}: {e}; the connections of {mac} will not survive the card", path.display());
                return Self::in_memory(groups, rules, room);
            }
        };
        let (table, damaged) = Table::new(slots, now());
        if replaced || damaged {
            tracing::warn!("{} is not what {mac} has left; it starts without connections", path.display());
        }
        Ok(Self::with(groups, rules, table))
    }

    fn with(groups: &[GroupId], rules: Arc<Rules>, table: Table) -> Self {
        Self { groups: groups.into(), rules, version: 1, table, fragments: Fragments::default() }
    }

    /// The security groups it is made of.
    pub fn groups(&self) -> &[GroupId] {
        &self.groups
    }

    /// Connections that are tracked.
    pub fn connections(&self) -> usize {
        self.table.len()
    }

    /// From now on these rules hold, for what there is as well.
    pub fn set_rules(&mut self, rules: Arc<Rules>) {
        self.rules = rules;
        self.version = self.version.wrapping_add(1).max(1);
    }

    /// Judges a packet that is to go to or from the interface, at the time `now`.
    ///
    /// # Errors
    /// It does not pass.
    pub fn admit(
        &mut self,
        packet: &Packet,
        direction: Direction,
        members: &Members,
        now: u64,
    ) -> Result<(), Denied> {
        let epoch = u64::from(self.version) << 32 | u64::from(members.epoch());
        let at = At { direction, members, epoch, now };
        match &packet.content {
            Content::Later if self.fragments.pass(packet, direction, epoch, now) => return Ok(()),
            Content::Later => return Err(Denied::Fragment),
            Content::Error(about) => {
                let key = about.key(packet, direction);
                let belongs = key.is_some_and(|key| self.known(&key, &at).is_some());
                if !belongs && !self.allow_message(packet, &at) {
                    return Err(Denied::Rule);
                }
            }
            Content::Message if self.allow_message(packet, &at) => {}
            Content::Message => return Err(Denied::Rule),
            content => self.connection(packet, content, &at)?,
        }
        if packet.part.is_some() {
            self.fragments.remember(packet, direction, epoch, now);
        }
        Ok(())
    }

    /// A packet that belongs to a connection, or opens one.
    fn connection(&mut self, packet: &Packet, content: &Content, at: &At<'_>) -> Result<(), Denied> {
        let Some(key) = packet.key(at.direction) else { return Err(Denied::Rule) };
        let syn = matches!(content, Content::Tcp(_, _, flags) if flags.opens());
        // A SYN is the first of another connection, unless it is one more of those this one begins with.
        if let Some(found) = self.table.find(&key, at.now)
            && (!syn || found.state.takes_syn())
        {
            self.still_allowed(&key, &found, at)?;
            let next = found.state.next(content, found.origin == at.direction).ok_or(Denied::Rule)?;
            self.table.touch(found.slot, next, at.now);
            return Ok(());
        }
        let state = State::begin(content).ok_or(Denied::Rule)?;
        if !self.rules.allow(&key, at.direction, at.members) {
            return Err(Denied::Rule);
        }
        match self.table.find(&key, at.now) {
            Some(found) if found.state.is_over() => self.table.remove(found.slot),
            // One end has forgotten the connection: the other tells it so, and what is known stays true till then.
            Some(_) => return Ok(()),
            None => {}
        }
        self.table.insert(&key, at.direction, state, at.epoch, at.now).map_err(|_| Denied::Full)
    }

    /// A connection that the rules still allow.
    fn known(&mut self, key: &Key, at: &At<'_>) -> Option<Slot> {
        let found = self.table.find(key, at.now)?;
        self.still_allowed(key, &found, at).ok()?;
        Some(found.slot)
    }

    fn still_allowed(&mut self, key: &Key, found: &Found, at: &At<'_>) -> Result<(), Denied> {
        if found.epoch == at.epoch {
            return Ok(());
        }
        if !self.rules.allow(key, found.origin, at.members) {
            self.table.revoke(found.slot, at.now);
            return Err(Denied::Rule);
        }
        self.table.allow(found.slot, at.epoch);
        Ok(())
    }

    /// What belongs to no connection passes where rules allow ICMP.
    fn allow_message(&self, packet: &Packet, at: &At<'_>) -> bool {
        let ((source, v6), (destination, _)) =
            (flow::number(packet.source), flow::number(packet.destination));
        let (local, peer) = match at.direction {
            Direction::Out => (source, destination),
            Direction::In => (destination, source),
        };
        let key = Key { v6, protocol: packet.protocol, local, peer, local_port: 0, peer_port: 0 };
        self.rules.allow(&key, at.direction, at.members)
    }
}

/// What a packet is judged by.
struct At<'a> {
    direction: Direction,
    members: &'a Members,
    /// The version of rules and members.
    epoch: u64,
    now: u64,
}

/// The boot of the host.
fn boot_id() -> u128 {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    u128::from_str_radix(&text.trim().replace('-', ""), 16).unwrap_or(0)
}

/// FNV-1a.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}
