use offload_card::{ConfigNotifier, DeviceFactory};
use proto::v1::DeviceSpec;
use proto::v1::device_spec::Kind;

use super::*;

fn spec(id: &str) -> NetworkSpec {
    NetworkSpec { id: id.to_owned(), ..Default::default() }
}

fn device(id: &str, network: &str, last: u8) -> DeviceSpec {
    let net =
        NetDeviceSpec { network: network.to_owned(), mac: vec![2, 0, 0, 0, 0, last], ..Default::default() };
    DeviceSpec { id: id.to_owned(), kind: Some(Kind::Net(net)), limits: None, net_limits: None }
}

#[test]
fn networks_are_made_once_kept_and_deleted_when_empty() {
    let dir = tempfile::tempdir().unwrap();
    let networks = Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap();
    networks.create(&spec("a"), false).unwrap();
    networks.create(&spec("a"), false).unwrap();
    networks.create(&spec("b"), true).unwrap();
    let other = NetworkSpec { mtu: 9000, ..spec("a") };
    assert_eq!(networks.create(&other, false).unwrap_err().reason(), ErrorReason::NetworkExists);

    let d = DeviceFactory::create(&networks, &device("vm-net0", "a", 1), ConfigNotifier::default()).unwrap();
    assert!(networks.validate(&device("vm-net0", "a", 1)).is_ok());
    assert_eq!(networks.validate(&device("x", "a", 1)).unwrap_err().reason(), ErrorReason::DeviceExists);
    let same_mac = DeviceFactory::create(&networks, &device("x", "a", 1), ConfigNotifier::default());
    assert_eq!(same_mac.err().unwrap().reason(), ErrorReason::DeviceExists);
    assert_eq!(networks.list(), [(spec("a"), vec!["vm-net0".to_owned()])]);
    assert_eq!(networks.delete("a").unwrap_err().reason(), ErrorReason::NetworkInUse);

    // What a card finds that comes after this one.
    let again = Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap();
    assert_eq!(again.list(), [(spec("a"), vec![])]);

    d.close();
    networks.delete("a").unwrap();
    assert_eq!(networks.delete("a").unwrap_err().reason(), ErrorReason::NetworkNotFound);
    assert!(Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap().list().is_empty());
}

#[test]
fn a_device_that_ends_late_takes_nothing_from_its_successor() {
    let dir = tempfile::tempdir().unwrap();
    let networks = Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap();
    networks.create(&spec("a"), false).unwrap();
    let make =
        |last| DeviceFactory::create(&networks, &device("d", "a", last), ConfigNotifier::default()).unwrap();
    let (old, new) = (make(1), make(2));
    old.close();
    assert_eq!(networks.list(), [(spec("a"), vec!["d".to_owned()])]);
    assert_eq!(networks.delete("a").unwrap_err().reason(), ErrorReason::NetworkInUse);
    new.close();
    networks.delete("a").unwrap();
}

#[test]
fn a_network_that_cannot_be_made_again_is_kept_and_says_why() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("networks");
    // A record that this version refuses.
    let bad = NetworkSpec { mtu: 67, ..spec("a") };
    Store::<NetworkRecord>::open(dir.clone()).unwrap().save(&bad).unwrap();
    let networks = Networks::open(dir.clone(), PollPolicy::default()).unwrap();
    assert_eq!(networks.list(), [(bad, vec![])]);
    let e = DeviceFactory::create(&networks, &device("d", "a", 1), ConfigNotifier::default());
    assert!(e.err().unwrap().message().contains("MTU 67"));
    networks.delete("a").unwrap();
    assert!(Networks::open(dir, PollPolicy::default()).unwrap().list().is_empty());
}

#[test]
fn bad_specifications_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let networks = Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap();
    let tap = |tap: &str, a: &[&str]| NetworkSpec {
        tap: tap.to_owned(),
        host_addresses: a.iter().map(|a| (*a).to_owned()).collect(),
        ..spec("a")
    };
    let bad = [
        spec(""),
        spec("A"),
        spec("../a"),
        spec(&"a".repeat(33)),
        NetworkSpec { mtu: 67, ..spec("a") },
        NetworkSpec { mtu: 65522, ..spec("a") },
        tap("sixteen-chars-xx", &[]),
        tap("", &["10.0.0.1/24"]),
        tap("ob0", &["10.0.0.1"]),
        // A name that is taken by an interface that is no TAP.
        tap("lo", &[]),
        NetworkSpec { nat: true, ipv4_prefix: "10.0.0.0/24".to_owned(), ..spec("a") },
        NetworkSpec { nat: true, ..tap("ob0", &["10.0.0.1/24"]) },
    ];
    for spec in bad {
        assert!(networks.create(&spec, false).is_err(), "{spec:?}");
    }
    assert!(networks.list().is_empty());
    assert!(Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap().list().is_empty());
}

#[test]
fn devices_need_a_network() {
    let dir = tempfile::tempdir().unwrap();
    let networks = Networks::open(dir.path().join("networks"), PollPolicy::default()).unwrap();
    let e = networks.validate(&device("d", "nowhere", 1)).unwrap_err();
    assert_eq!(e.reason(), ErrorReason::NetworkNotFound);
    assert!(
        networks
            .validate(&DeviceSpec { id: "d".to_owned(), kind: None, limits: None, net_limits: None })
            .is_err()
    );
}
