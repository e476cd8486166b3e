//! A VM whose network device is driven by hand: a test says what it sends and sees what it is sent (the bench guest's
//! `net-raw`).

use std::fmt::Write;
use std::path::Path;

use proto::v1::{Device, HypervisorConfig};

use crate::SOON;
use crate::frames::{self, End};
use crate::vm::{Vm, config, slot};

/// The VM. It answers nothing by itself.
pub struct Station {
    /// Where it is, if it tells the truth.
    pub end: End,
    vm: Vm,
    name: String,
    sent: usize,
    received: usize,
}

impl Station {
    /// Boots a VM called `name` on a device that is number `n` in its network.
    pub fn boot(dir: &Path, name: &str, n: u8, device: &Device) -> Self {
        let config = HypervisorConfig {
            memory_bytes: 32 << 20,
            ..config(name, "job=net-raw mode=irq", vec![slot("nic0", device)])
        };
        let vm = Vm::boot(dir, config);
        vm.reports.wait("io_begin", SOON);
        Self { end: End::new(n), vm, name: name.to_owned(), sent: 0, received: 0 }
    }

    /// Sends a frame. The card is done with it when this returns: it has dropped it, or given it to who gets it.
    pub fn send(&mut self, frame: &[u8]) {
        let mut line = String::new();
        for byte in frame {
            let _ = write!(line, "{byte:02x}");
        }
        line.push('\n');
        self.vm.type_in(line.as_bytes());
        self.sent += 1;
        self.vm.reports.wait_nth("sent", self.sent, SOON);
    }

    /// The next frame that it is sent, but for what the card's router says of itself.
    ///
    /// # Panics
    /// If none comes.
    pub fn receive(&mut self) -> Vec<u8> {
        loop {
            self.received += 1;
            let report = self.vm.reports.wait_nth("frame", self.received, SOON);
            let hex = report["hex"].as_str().expect("a frame's bytes");
            let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("two digits");
            let frame: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
            let from_a_station = frame[6..11] == self.end.mac[..5];
            if from_a_station || !frames::is_router_advertisement(&frame) {
                return frame;
            }
        }
    }

    /// The next frame that it is sent is this.
    ///
    /// # Panics
    /// If it is another, or none comes.
    pub fn receives(&mut self, frame: &[u8]) {
        let got = self.receive();
        assert!(got == frame, "{} was sent {got:02x?} and not {frame:02x?}", self.name);
    }

    /// Sends a frame to another station, which gets it.
    pub fn reaches(&mut self, to: &mut Self, frame: &[u8]) {
        self.send(frame);
        to.receives(frame);
    }

    /// Sends a frame that another station is not to get, and then one that it is to get: frames of one sender to one receiver
    /// keep their order, so what has not come before the second does not come.
    pub fn does_not_reach(&mut self, to: &mut Self, frame: &[u8], control: &[u8]) {
        assert_ne!(frame, control);
        self.send(frame);
        self.reaches(to, control);
    }

    /// Ends its job, and says how many frames it was sent.
    ///
    /// # Panics
    /// If something was wrong with its device.
    pub fn finish(self) -> u64 {
        self.vm.type_in(b"\n");
        let results = self.vm.reports.finish(SOON);
        results[0]["rx"].as_u64().expect("frames")
    }
}
