//! Captures of a device's frames, as the card's process gives them to whoever asks.

mod common;

use std::io::Write;
use std::process::{Command, Stdio};

use common::card::{Card, Link};
use common::*;
use proto::error::{Error, ErrorReason};
use proto::v1::device_spec::Kind;
use proto::v1::{
    CapturePart, CaptureRequest, CreateDeviceRequest, CreateNetworkRequest, DeleteDeviceRequest, DeviceSpec,
    NetDeviceSpec, NetworkSpec,
};
use tonic::{Code, Streaming};

const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Direction, length and bytes of the packets of a pcapng file.
fn packets(mut file: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut all = Vec::new();
    while !file.is_empty() {
        let length = u32_at(file, 4) as usize;
        if u32_at(file, 0) == 6 {
            let kept = u32_at(file, 20) as usize;
            let flags = 28 + kept.next_multiple_of(4) + 4;
            all.push((u32_at(file, flags), u32_at(file, 24), file[28..28 + kept].to_vec()));
        }
        file = &file[length..];
    }
    all
}

async fn file(mut parts: Streaming<CapturePart>) -> (Vec<u8>, CapturePart) {
    let (mut file, mut last) = (Vec::new(), CapturePart::default());
    while let Some(part) = parts.message().await.unwrap() {
        file.extend(&part.pcapng);
        last = part;
    }
    (file, last)
}

struct Setup {
    card: Card,
    guests: Vec<(Guest, Link)>,
    _directory: tempfile::TempDir,
}

impl Setup {
    /// Devices d1, d2, ... in one network.
    async fn new(devices: u8) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let card = Card::start(directory.path());
        let spec = NetworkSpec { id: "n".to_owned(), ..Default::default() };
        let create = CreateNetworkRequest { spec: Some(spec), ..Default::default() };
        card.networks().await.create_network(create).await.unwrap();
        let mut guests = Vec::new();
        for last in 1..=devices {
            let mut guest = Guest::new(last, FULL);
            let net = NetDeviceSpec { network: "n".into(), mac: guest.mac.to_vec(), ..Default::default() };
            let spec =
                DeviceSpec { id: format!("d{last}"), kind: Some(Kind::Net(net)), ..Default::default() };
            let create = CreateDeviceRequest { spec: Some(spec), ..Default::default() };
            card.devices().await.create_device(create).await.unwrap();
            guest.fill_rx(200, 2048);
            let link = guest.connect(&card.socket(&format!("d{last}")));
            guests.push((guest, link));
        }
        Self { card, guests, _directory: directory }
    }

    async fn capture(
        &self,
        device: &str,
        snap_bytes: u32,
        frames: u64,
    ) -> Result<Streaming<CapturePart>, Error> {
        let request = CaptureRequest { device_id: device.to_owned(), snap_bytes, frames };
        let answer = self.card.networks().await.capture(request).await;
        answer.map(tonic::Response::into_inner).map_err(Error::from)
    }

    /// From one guest to another, and there.
    fn send(&mut self, from: usize, to: usize, payload: usize) -> Vec<u8> {
        let f = frame(self.guests[to].0.mac, self.guests[from].0.mac, payload as u8, payload);
        self.guests[from].0.send(&f);
        assert_eq!(self.guests[to].0.receive().unwrap().1, f);
        f
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_has_both_directions_of_one_device_and_ends_by_its_count() {
    let mut setup = Setup::new(3).await;
    let whole = setup.capture("d1", 0, 3).await.unwrap();
    let cut = setup.capture("d1", 100, 2).await.unwrap();
    let first = setup.send(0, 1, 1000);
    // Not d1's.
    setup.send(1, 2, 500);
    let second = setup.send(1, 0, 60);
    let third = setup.send(0, 2, 1486);
    setup.send(0, 2, 1);
    let (bytes, last) = file(whole).await;
    assert_eq!((last.frames, last.lost), (3, 0));
    let expected = [(OUTBOUND, &first), (INBOUND, &second), (OUTBOUND, &third)];
    let expected = expected.map(|(flags, f)| (flags, f.len() as u32, f.clone()));
    assert_eq!(packets(&bytes), expected);
    let (short, _) = file(cut).await;
    let expected = [(OUTBOUND, &first), (INBOUND, &second)];
    let expected = expected.map(|(flags, f)| (flags, f.len() as u32, f[..f.len().min(100)].to_vec()));
    assert_eq!(packets(&short), expected);
    wireshark_agrees(&bytes);
}

/// Where it is installed; what it would say has been checked by what is above.
fn wireshark_agrees(file: &[u8]) {
    let fields = [
        "-T",
        "fields",
        "-e",
        "frame.len",
        "-e",
        "frame.packet_flags_direction",
        "-e",
        "frame.interface_name",
    ];
    let tshark = Command::new("tshark")
        .args(["-r", "-"])
        .args(fields)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut tshark) = tshark else { return };
    tshark.stdin.take().unwrap().write_all(file).unwrap();
    let output = tshark.wait_with_output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let lengths: Vec<_> = lines.lines().map(|l| l.split('\t').collect::<Vec<_>>()).collect();
    let directions: Vec<u32> = lengths.iter().map(|l| number(l[1])).collect();
    assert_eq!(lengths.iter().map(|l| l[0]).collect::<Vec<_>>(), ["1014", "74", "1500"], "{lines}");
    assert_eq!(directions, [OUTBOUND, INBOUND, OUTBOUND], "{lines}");
    assert!(lengths.iter().all(|l| l[2] == "d1"), "{lines}");
}

/// Written in hexadecimal or not, as the version has it.
fn number(s: &str) -> u32 {
    s.strip_prefix("0x").map_or_else(|| s.parse().unwrap(), |hex| u32::from_str_radix(hex, 16).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn captures_are_few_and_one_whose_reader_has_gone_makes_room() {
    let mut setup = Setup::new(2).await;
    let mut captures = Vec::new();
    for _ in 0..4 {
        captures.push(setup.capture("d1", 0, 0).await.unwrap());
    }
    let e = setup.capture("d1", 0, 0).await.err().unwrap();
    assert_eq!((e.code(), e.fact("resource")), (Code::ResourceExhausted, Some("d1")), "{e}");
    drop(captures.pop());
    let soon = std::time::Instant::now() + PATIENCE;
    let again = loop {
        match setup.capture("d1", 0, 0).await {
            Ok(capture) => break capture,
            Err(e) => assert!(std::time::Instant::now() < soon, "{e}"),
        }
    };
    captures.push(again);
    let e = setup.capture("nothing", 0, 0).await.err().unwrap();
    assert_eq!(e.reason(), ErrorReason::DeviceNotFound);
    let f = setup.send(0, 1, 100);

    // They end with their device, and have what went before.
    let delete = DeleteDeviceRequest { id: "d1".to_owned() };
    setup.card.devices().await.delete_device(delete).await.unwrap();
    for capture in captures {
        assert_eq!(packets(&file(capture).await.0), [(OUTBOUND, f.len() as u32, f.clone())]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_loses_frames_and_holds_nobody_up() {
    let mut setup = Setup::new(2).await;
    let mut stalled = setup.capture("d1", 0, 0).await.unwrap();
    // More than the card, the connection and the client hold: 30 MB.
    let sent = 20_000;
    for _ in 0..sent {
        setup.send(0, 1, 1486);
    }
    // Now it reads, and gets everything that was kept though no further frame comes.
    let (mut bytes, mut last) = (Vec::new(), CapturePart::default());
    while last.frames + last.lost < sent {
        let part = tokio::time::timeout(PATIENCE, stalled.message())
            .await
            .expect("the rest comes")
            .unwrap()
            .unwrap();
        bytes.extend(&part.pcapng);
        last = part;
    }
    assert!(last.lost > 0, "{} frames kept", last.frames);
    assert_eq!(packets(&bytes).len() as u64, last.frames);
}
