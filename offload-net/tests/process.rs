//! The card as a process: control service, vhost-user sockets, TAP, SIGKILL. Needs root: each test has a network
//! namespace of its own, which goes with the test's process.

mod common;

use std::net::UdpSocket;

use common::card::{Card, retry};
use common::*;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use offload_net::frame::header::VnetHeader;
use proto::error::{Error, ErrorReason};
use proto::v1::device_spec::Kind;
use proto::v1::{
    CreateDeviceRequest, CreateNetworkRequest, DeleteDeviceRequest, DeleteNetworkRequest, DeviceSpec,
    GetCardStatsRequest, IdentifyRequest, ListDevicesRequest, ListNetworksRequest, NetDeviceSpec,
    NetworkSpec,
};

const PLAIN: VnetHeader = VnetHeader { flags: 0, csum_start: 0, csum_offset: 0, ..UDP_PARTIAL };
const TAP: &str = "ob-test1";
const HOST: [u8; 4] = [10, 99, 0, 1];
const HOST_IP: &str = "10.99.0.1";

fn network(id: &str, tap: &str) -> CreateNetworkRequest {
    let host_addresses =
        if tap.is_empty() { vec![] } else { vec![format!("{HOST_IP}/24"), "fd99::1/64".to_owned()] };
    let spec = NetworkSpec { id: id.to_owned(), tap: tap.to_owned(), host_addresses, ..Default::default() };
    CreateNetworkRequest { spec: Some(spec), ..Default::default() }
}

fn device(id: &str, network: &str, guest: &Guest) -> CreateDeviceRequest {
    let net = NetDeviceSpec { network: network.to_owned(), mac: guest.mac.to_vec(), ..Default::default() };
    let spec = DeviceSpec { id: id.to_owned(), kind: Some(Kind::Net(net)), limits: None, net_limits: None };
    CreateDeviceRequest { spec: Some(spec), ..Default::default() }
}

fn ip_of(guest: &Guest) -> [u8; 4] {
    [10, 99, 0, guest.mac[5]]
}

fn arp(operation: u8, to: [u8; 6], from: ([u8; 6], [u8; 4]), target: ([u8; 6], [u8; 4])) -> Vec<u8> {
    let mut f = to.to_vec();
    f.extend(from.0);
    f.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    f.extend(from.0);
    f.extend(from.1);
    f.extend(target.0);
    f.extend(target.1);
    f
}

/// The next frame that is not the host's IPv6 chatter; ARP requests for the guest are answered on the way.
fn receive_ipv4(guest: &mut Guest) -> (VnetHeader, Vec<u8>) {
    loop {
        let (header, f) = guest.receive().expect("a frame comes");
        match [f[12], f[13]] {
            [8, 6] if f[21] == 1 && f[38..42] == ip_of(guest) => {
                let host: [u8; 6] = f[6..12].try_into().unwrap();
                let reply = arp(2, host, (guest.mac, ip_of(guest)), (host, HOST));
                guest.send(&reply);
            }
            [8, 0] => return (header, f),
            _ => {}
        }
    }
}

/// The next frame of the tests' own type.
fn receive_ours(guest: &mut Guest) -> Vec<u8> {
    loop {
        let (_, f) = guest.receive().expect("a frame comes");
        if f[12..14] == [0x88, 0xb5] {
            return f;
        }
    }
}

/// Asks who the host is.
fn resolve_host(guest: &mut Guest) -> [u8; 6] {
    let request = arp(1, BROADCAST, (guest.mac, ip_of(guest)), ([0; 6], HOST));
    guest.send(&request);
    loop {
        let (_, f) = guest.receive().expect("the host answers");
        if f[12..14] == [8, 6] && f[21] == 2 {
            return f[6..12].try_into().unwrap();
        }
    }
}

/// UDP both ways between a guest and a socket of the host.
fn talk(guest: &mut Guest, host_mac: [u8; 6], socket: &UdpSocket, seed: u8) {
    let port = socket.local_addr().unwrap().port();
    let payload: Vec<u8> = (0..1400_u32).map(|i| (i as u8).wrapping_add(seed)).collect();
    let (macs, ips) = ((host_mac, guest.mac), ((ip_of(guest), 7), (HOST, port)));
    let partial = guest.features & 1 << virtio_bindings::virtio_net::VIRTIO_NET_F_CSUM != 0;
    let f = udp4(macs, ips.0, ips.1, &payload, partial);
    guest.send_pieces(if partial { &UDP_PARTIAL } else { &PLAIN }, &f, 500);
    let mut buf = [0; 2000];
    let (n, from) = socket.recv_from(&mut buf).expect("the host receives");
    assert_eq!((&buf[..n], from.port()), (&payload[..], 7));

    socket.send_to(&buf[..n], from).unwrap();
    let (header, f) = receive_ipv4(guest);
    assert_eq!(f[42..], payload);
    if guest.features & 1 << virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM != 0 {
        assert_eq!((header.flags & 1, header.csum_start, header.csum_offset), (1, 34, 6));
    } else {
        assert_eq!(header.flags, 0);
        assert!(udp4_checksum_holds(&f));
    }
}

fn host_socket() -> UdpSocket {
    let socket = UdpSocket::bind((HOST_IP, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

#[tokio::test]
async fn guests_speak_with_each_other_and_the_host_through_a_killed_card() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let card = Card::start(dir.path());
    card.networks().await.create_network(network("lan", TAP)).await.unwrap();
    let (mut a, mut b) = (Guest::new(2, FULL), Guest::new(3, BASE));
    for (id, guest) in [("a", &a), ("b", &b)] {
        let made = card.devices().await.create_device(device(id, "lan", guest)).await.unwrap().into_inner();
        assert_eq!(made.socket_path, card.socket(id).display().to_string());
        assert_eq!((made.virtio_device_id, made.queues, made.config_size), (1, 2, 12));
    }
    a.fill_rx(200, 2048);
    b.fill_rx(200, 2048);
    let mut link_a = a.connect(&card.socket("a"));
    let link_b = b.connect(&card.socket("b"));
    assert_eq!(link_a.config(12), [0x52, 0x54, 0, 0, 0, 2, 1, 0, 1, 0, 0xdc, 5]);

    let index = if_nametoindex(TAP).unwrap();
    let socket = host_socket();
    let host = resolve_host(&mut a);
    assert_eq!(resolve_host(&mut b), host);
    talk(&mut a, host, &socket, 1);
    talk(&mut b, host, &socket, 2);
    let f = frame(b.mac, a.mac, 3, 1000);
    a.send(&f);
    assert!(receive_ours(&mut b) == f);

    card.kill();
    assert_eq!(if_nametoindex(TAP).unwrap(), index, "the host keeps its interface");
    drop((link_a, link_b));
    // Sent while there is no card: found on the ring by the next one.
    let waiting = frame(b.mac, a.mac, 4, 1000);
    a.send(&waiting);
    let card = Card::start(dir.path());
    assert_eq!(
        card.devices().await.list_devices(ListDevicesRequest {}).await.unwrap().into_inner().devices.len(),
        2
    );
    let link_b = b.connect(&card.socket("b"));
    let link_a = a.connect(&card.socket("a"));
    assert!(receive_ours(&mut b) == waiting);
    talk(&mut a, host, &socket, 5);
    talk(&mut b, host, &socket, 6);
    assert_eq!(if_nametoindex(TAP).unwrap(), index);
    let networks =
        card.networks().await.list_networks(ListNetworksRequest {}).await.unwrap().into_inner().networks;
    assert_eq!(networks[0].devices, ["a", "b"]);
    let stats = card.devices().await.get_stats(GetCardStatsRequest::default()).await.unwrap().into_inner();
    assert!(stats.devices.iter().all(|d| d.connections == 1 && d.queues.iter().all(|q| q.in_flight == 0)));

    drop((link_a, link_b));
    let in_use = card.networks().await.delete_network(DeleteNetworkRequest { id: "lan".to_owned() }).await;
    assert_eq!(Error::from(in_use.unwrap_err()).reason(), ErrorReason::NetworkInUse);
    for id in ["a", "b"] {
        card.devices().await.delete_device(DeleteDeviceRequest { id: id.to_owned() }).await.unwrap();
    }
    card.networks().await.delete_network(DeleteNetworkRequest { id: "lan".to_owned() }).await.unwrap();
    assert!(if_nametoindex(TAP).is_err());
    assert!(card.terminate().success());
}

/// Traffic without a pause while the card is killed again and again: frames may be lost, the guests never hang, and
/// nothing arrives that was not sent.
#[tokio::test]
async fn a_card_killed_under_load_loses_frames_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut card = Some(Card::start(dir.path()));
    let made = card.as_ref().unwrap();
    made.networks().await.create_network(network("lan", "")).await.unwrap();
    let (mut a, mut b) = (Guest::new(2, FULL), Guest::new(3, FULL));
    for (id, guest) in [("a", &a), ("b", &b)] {
        made.devices().await.create_device(device(id, "lan", guest)).await.unwrap();
    }
    a.fill_rx(100, 2048);
    b.fill_rx(200, 512);
    let mut delivered = 0;
    let mut sequence = 0_u32;
    for _ in 0..10 {
        let serving = card.as_ref().unwrap();
        let links = (a.connect(&serving.socket("a")), b.connect(&serving.socket("b")));
        for i in 0..300 {
            sequence += 1;
            let mut f = frame(b.mac, a.mac, sequence as u8, 1200);
            f[14..18].copy_from_slice(&sequence.to_le_bytes());
            a.send(&f);
            if i == 250 {
                // In the middle of things; SIGKILL.
                card.take().unwrap().kill();
                break;
            }
            // Some are waited for, so that however slow the host is there is a load to kill the card under.
            let mut patience = if i < 200 && i % 2 == 1 { PATIENCE } else { std::time::Duration::ZERO };
            while let Some((_, got)) = b.receive_within(std::mem::take(&mut patience)) {
                let n = u32::from_le_bytes(got[14..18].try_into().unwrap());
                let mut expected = frame(b.mac, a.mac, n as u8, 1200);
                expected[14..18].copy_from_slice(&n.to_le_bytes());
                assert_eq!(got, expected);
                delivered += 1;
            }
        }
        drop(links);
        card = Some(Card::start(dir.path()));
    }
    assert!(delivered > 1000, "{delivered} of {sequence} frames arrived");
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_a_reason() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let card = Card::start(dir.path());
    let info = card.devices().await.identify(IdentifyRequest {}).await.unwrap().into_inner();
    assert_eq!(info.kind, "offload-net");
    let guest = Guest::new(2, FULL);

    let no_network = card.devices().await.create_device(device("a", "lan", &guest)).await;
    assert_eq!(Error::from(no_network.unwrap_err()).reason(), ErrorReason::NetworkNotFound);
    // The loopback device exists, and is no TAP: nothing is left behind.
    let taken = Error::from(card.networks().await.create_network(network("lan", "lo")).await.unwrap_err());
    assert!(taken.message().contains("no TAP of ours"), "{taken}");
    assert!(taken.to_string().contains("choose another name"), "{taken}");
    let bad_address =
        NetworkSpec { host_addresses: vec!["10.0.0.300/24".to_owned()], ..network("lan", TAP).spec.unwrap() };
    let request = CreateNetworkRequest { spec: Some(bad_address), ..Default::default() };
    let refused = Error::from(card.networks().await.create_network(request).await.unwrap_err());
    assert_eq!(refused.reason(), ErrorReason::InvalidField);
    assert!(if_nametoindex(TAP).is_err());
    assert!(
        card.networks()
            .await
            .list_networks(ListNetworksRequest {})
            .await
            .unwrap()
            .into_inner()
            .networks
            .is_empty()
    );

    card.networks().await.create_network(network("lan", TAP)).await.unwrap();
    card.networks().await.create_network(network("lan", TAP)).await.unwrap();
    let again = Error::from(card.networks().await.create_network(network("lan2", TAP)).await.unwrap_err());
    assert!(again.message().contains("uplink of network lan"), "{again}");
    let mut mq = device("a", "lan", &guest);
    if let Some(Kind::Net(net)) = mq.spec.as_mut().and_then(|s| s.kind.as_mut()) {
        net.queue_pairs = 33;
    }
    let refused = Error::from(card.devices().await.create_device(mq).await.unwrap_err());
    assert!(refused.message().contains("33 queue pairs are more than 32"), "{refused}");
}

#[tokio::test]
async fn a_missing_capability_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let card = Card::start_without_net_admin(dir.path());
    let refused = Error::from(card.networks().await.create_network(network("lan", TAP)).await.unwrap_err());
    assert_eq!(refused.reason(), ErrorReason::PermissionDenied);
    assert!(refused.to_string().contains("CAP_NET_ADMIN"), "{refused}");
    assert!(
        card.networks()
            .await
            .list_networks(ListNetworksRequest {})
            .await
            .unwrap()
            .into_inner()
            .networks
            .is_empty()
    );
    // A network that needs no interface is no trouble.
    card.networks().await.create_network(network("lan", "")).await.unwrap();
}

#[tokio::test]
async fn a_tap_that_is_deleted_comes_back() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let card = Card::start(dir.path());
    card.networks().await.create_network(network("lan", TAP)).await.unwrap();
    let mut a = Guest::new(2, FULL);
    card.devices().await.create_device(device("a", "lan", &a)).await.unwrap();
    a.fill_rx(200, 2048);
    let _link = a.connect(&card.socket("a"));
    resolve_host(&mut a);
    let index = if_nametoindex(TAP).unwrap();
    assert!(std::process::Command::new("ip").args(["link", "del", TAP]).status().unwrap().success());
    retry(|| if_nametoindex(TAP).ok().filter(|i| *i != index).ok_or("gone"));
    let socket = retry(|| UdpSocket::bind((HOST_IP, 0)));
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let host = resolve_host(&mut a);
    talk(&mut a, host, &socket, 1);
}

#[tokio::test]
async fn a_network_with_a_prefix_is_whole_without_the_controller() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let card = Card::start(directory.path());
    // The host gets the gateway's address without being told.
    let spec = NetworkSpec {
        id: "vpc".to_owned(),
        tap: TAP.to_owned(),
        ipv4_prefix: "10.99.0.0/24".to_owned(),
        ..Default::default()
    };
    let request = CreateNetworkRequest { spec: Some(spec.clone()), ..Default::default() };
    card.networks().await.create_network(request).await.unwrap();
    let mut guest = Guest::new(7, FULL);
    guest.fill_rx(100, 2048);
    let with = |addresses: &[&str], last: u8| {
        let mut request = device(&format!("g{last}"), "vpc", &Guest::new(last, FULL));
        if let Some(Kind::Net(net)) = request.spec.as_mut().and_then(|s| s.kind.as_mut()) {
            net.addresses = addresses.iter().map(|a| (*a).to_owned()).collect();
        }
        request
    };
    let mut devices = card.devices().await;
    devices.create_device(with(&["10.99.0.7"], 7)).await.unwrap();
    for (addresses, says) in [
        (&[][..], "1 to 8 addresses"),
        (&["10.99.0.1"], "the gateway's"),
        (&["10.98.0.1"], "not in the network's"),
        (&["10.99.0.7"], "another device in the network has the address"),
    ] {
        for validate_only in [true, false] {
            let request = CreateDeviceRequest { validate_only, ..with(addresses, 8) };
            let e = devices.create_device(request).await.unwrap_err();
            assert!(e.message().contains(says), "{addresses:?}: {e}");
        }
    }

    let socket = host_socket();
    let link = guest.connect(&card.socket("g7"));
    let gateway = resolve_host(&mut guest);
    let mac_of_tap = std::fs::read_to_string(format!("/sys/class/net/{TAP}/address"));
    // /sys shows the namespace in which it was mounted: absent here, or another's.
    if let Ok(text) = mac_of_tap {
        let own = offload_net::mac::MacAddr(gateway).to_string();
        assert_eq!(text.trim(), own);
    }
    // The host finds the guest without the guest having said a word of ARP about itself.
    talk(&mut guest, gateway, &socket, 1);
    drop(link);

    card.kill();
    let card = Card::start(directory.path());
    let _link = guest.connect(&card.socket("g7"));
    assert_eq!(resolve_host(&mut guest), gateway);
    talk(&mut guest, gateway, &socket, 2);
    let list = card.networks().await.list_networks(ListNetworksRequest {}).await.unwrap().into_inner();
    assert_eq!(list.networks[0].spec.as_ref(), Some(&spec));

    // As nobody else; and one can see it.
    let f = udp4((gateway, guest.mac), ([10, 99, 0, 8], 7), (HOST, 9), b"spoofed", false);
    guest.send(&f);
    let request = GetCardStatsRequest { device_id: "g7".to_owned() };
    let mut devices = card.devices().await;
    loop {
        let stats = devices.get_stats(request.clone()).await.unwrap().into_inner().devices.swap_remove(0);
        let drops = stats.drops.expect("a network device's");
        if drops.spoofed_address == 1 {
            assert_eq!((drops.spoofed_mac, stats.queues[1].dropped, stats.queues[1].errors), (0, 1, 1));
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}
