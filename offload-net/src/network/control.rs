//! A device's control queue (VirtIO 1.3 section 5.1.6.5), where its driver says how many queue pairs it uses.
//!
//! The number must outlive this process: a driver says it once. So it is noted where what is in flight is recorded
//! ([`Ring::set_note`]), which is in the front-end's keeping from the driver's beginning to its end.

use offload_card::event::Event;
use offload_card::ring::{Chain, Ring, RingState};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

/// Longest chain we look at. Drivers use three to five descriptors.
const DESCRIPTORS_MAX: u16 = 64;
/// Commands that are answered in one turn of the network's thread: there is more to do in it.
const PER_TURN: usize = 16;
/// Class, command and number of pairs.
const PAIRS_SET_LEN: usize = 4;

/// A started control queue.
pub struct ControlQueue {
    ring: Ring,
    chain: Chain,
    /// How many pairs the device has, if its driver may use more than one.
    max_pairs: u16,
    /// How many its driver uses.
    pairs: u16,
}

/// How many pairs a command asks for. `None`: it is not that command, or not so many.
fn pairs_wanted(command: &[u8; PAIRS_SET_LEN], max_pairs: u16) -> Option<u16> {
    let [class, command, low, high] = *command;
    let is_pairs_set =
        u32::from(class) == VIRTIO_NET_CTRL_MQ && u32::from(command) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    let pairs = u16::from_le_bytes([low, high]);
    (is_pairs_set && (1..=max_pairs).contains(&pairs)).then_some(pairs)
}

impl ControlQueue {
    /// Takes over a ring of a device with `max_pairs` pairs; 0 if the driver did not accept to use several. What a
    /// predecessor was told holds.
    pub fn new(mut ring: Ring, max_pairs: u16) -> Self {
        ring.limit_chains(DESCRIPTORS_MAX);
        // Not the guest's, but not ours alone either.
        let noted = u16::try_from(ring.note()).ok().filter(|pairs| (1..=max_pairs).contains(pairs));
        Self { ring, chain: Chain::new(), max_pairs, pairs: noted.unwrap_or(1) }
    }

    /// How many pairs the driver uses: before it has said so, one (section 5.1.6.5.6).
    pub fn pairs(&self) -> u16 {
        self.pairs
    }

    /// Index of the queue in its device.
    pub fn index(&self) -> u16 {
        self.ring.index()
    }

    /// The driver's kicks.
    pub fn kick(&self) -> &Event {
        self.ring.kick()
    }

    /// A kick has come.
    pub fn kicked(&mut self, apply: impl FnMut(u16)) {
        self.ring.counters().kicks.add(1);
        self.serve(apply);
    }

    /// Answers what waits, or as much of it as there is time for in a turn. When the driver uses another number of pairs
    /// it is given to `apply`, before the driver learns that its command was done.
    pub fn serve(&mut self, mut apply: impl FnMut(u16)) {
        for _ in 0..PER_TURN {
            match self.ring.pop(&mut self.chain) {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => {
                    self.ring.shared().log.say(|left_out| {
                        tracing::warn!(queue = self.ring.index(), "control queue broken: {e}{left_out}");
                    });
                    break;
                }
            }
            let done = self.obey(&mut apply);
            let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            // Both are below 256.
            let written = self.chain.write_at(0, &[answer as u8]);
            self.ring.counters().errors.add(u64::from(!done));
            self.ring.push(self.chain.head(), written as u32);
        }
        self.ring.publish();
        // It keeps memory that the front-end may remove, and is rarely needed.
        self.chain.clear();
        // Not for long if the guest floods us: others have their turn first.
        if self.ring.enable_kicks() {
            self.ring.kick().signal();
        }
    }

    /// Does the command in `chain`; false if it is none of ours, or nobody can be told.
    fn obey(&mut self, apply: &mut impl FnMut(u16)) -> bool {
        let mut command = [0; PAIRS_SET_LEN];
        if self.chain.readable_len() as usize != PAIRS_SET_LEN
            || self.chain.read_at(0, &mut command) != PAIRS_SET_LEN
            || self.chain.writable_len() == 0
        {
            return false;
        }
        let Some(pairs) = pairs_wanted(&command, self.max_pairs) else { return false };
        if pairs != self.pairs {
            self.pairs = pairs;
            self.ring.set_note(pairs.into());
            apply(pairs);
        }
        true
    }

    /// Gives the ring back.
    pub fn stop(self) -> RingState {
        self.ring.stop()
    }
}
