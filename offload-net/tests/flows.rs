//! The flow log of a card's process.

mod common;

use std::path::Path;
use std::process::Command;

use common::card::{Card, retry};
use common::*;
use proto::v1::device_spec::Kind;
use proto::v1::{
    CreateDeviceRequest, CreateNetworkRequest, DeviceSpec, NetDeviceSpec, NetLimits, NetworkSpec,
};

/// The value of a field of a line, as it is written.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let key = format!("\"{name}\":");
    let start = line.find(&key).unwrap_or_else(|| panic!("no {name} in {line}")) + key.len();
    line[start..].split([',', '}']).next().unwrap().trim_matches('"')
}

fn lines(file: &Path) -> Vec<String> {
    std::fs::read_to_string(file).unwrap_or_default().lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn flows_are_added_up_per_device_and_direction_with_what_became_of_them() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("flows.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_offload-net"));
    command.arg("--flow-log").arg(&file).arg("--flow-log-interval=300ms");
    let card = Card::start_by(command, directory.path());
    let spec =
        NetworkSpec { id: "n".to_owned(), ipv4_prefix: "10.0.0.0/24".to_owned(), ..Default::default() };
    let create = CreateNetworkRequest { spec: Some(spec), ..Default::default() };
    card.networks().await.create_network(create).await.unwrap();
    let mut guests = Vec::new();
    for last in [2, 3] {
        let mut guest = Guest::new(last, FULL);
        let net = NetDeviceSpec {
            network: "n".into(),
            mac: guest.mac.to_vec(),
            addresses: vec![format!("10.0.0.{last}")],
            ..Default::default()
        };
        // The receiver takes 5 packets, and then none for long.
        let net_limits = (last == 3).then(|| NetLimits {
            packets_per_second_in: 1,
            packets_burst_in: 5,
            ..Default::default()
        });
        let spec =
            DeviceSpec { id: format!("d{last}"), kind: Some(Kind::Net(net)), net_limits, limits: None };
        let create = CreateDeviceRequest { spec: Some(spec), ..Default::default() };
        card.devices().await.create_device(create).await.unwrap();
        guest.fill_rx(100, 2048);
        let link = guest.connect(&card.socket(&format!("d{last}")));
        guests.push((guest, link));
    }
    let macs = (guests[1].0.mac, guests[0].0.mac);
    let f = udp4(macs, ([10, 0, 0, 2], 1000), ([10, 0, 0, 3], 53), b"question", false);
    let spoofed = udp4(macs, ([10, 0, 0, 9], 1000), ([10, 0, 0, 3], 53), b"question", false);
    for _ in 0..8 {
        guests[0].0.send(&f);
    }
    guests[0].0.send(&spoofed);

    // Nobody sends any more, and the log is written all the same, at its time.
    retry(|| if lines(&file).len() == 4 { Ok(()) } else { Err(lines(&file)) });
    let mut seen = Vec::new();
    for line in lines(&file) {
        let of = |name| field(&line, name).to_owned();
        assert_eq!(
            (of("network"), of("protocol"), of("destination_port")),
            ("n".into(), "17".into(), "53".into())
        );
        assert!(of("start_us").parse::<u64>().unwrap() <= of("end_us").parse().unwrap());
        let packets: usize = of("packets").parse().unwrap();
        assert_eq!(of("bytes").parse::<usize>().unwrap(), packets * f.len());
        let reason = if of("action") == "reject" { of("reason") } else { "accept".to_owned() };
        seen.push((of("mac"), of("direction"), of("source"), packets, reason));
    }
    seen.sort();
    let (a, b) = ("52:54:00:00:00:02".to_owned(), "52:54:00:00:00:03".to_owned());
    let (from, out, into) = ("10.0.0.2".to_owned(), "out".to_owned(), "in".to_owned());
    let expected = [
        (a.clone(), out.clone(), from.clone(), 8, "accept".to_owned()),
        (a, out, "10.0.0.9".to_owned(), 1, "spoofed_address".to_owned()),
        (b.clone(), into.clone(), from.clone(), 3, "allowance_exceeded".to_owned()),
        (b, into, from, 5, "accept".to_owned()),
    ];
    assert_eq!(seen, expected);

    // A file that is moved away is made again.
    std::fs::remove_file(&file).unwrap();
    guests[0].0.send(&f);
    retry(|| if lines(&file).is_empty() { Err("nothing") } else { Ok(()) });
}
