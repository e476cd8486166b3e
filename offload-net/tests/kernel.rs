//! A kernel as the guest: the host's, in a network namespace of its own, with a TAP for a network interface. Its own TCP asks
//! for metadata, and its own IPv6 believes the router advertisements. Needs root.

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::card::retry;
use common::*;
use nix::sched::{CloneFlags, unshare};
use offload_card::poll::PollPolicy;
use offload_net::frame::header::LEN;
use offload_net::frame::offload::{self, Allowed};
use offload_net::frame::{Bytes, FRAME_MAX, Frame, HEAD_MAX, Memory};
use offload_net::host::tap::Tap;
use offload_net::mac::MacAddr;
use offload_net::metadata::{ADDRESS_V4, ADDRESS_V6};
use offload_net::network::Network;
use offload_net::network::uplink::Uplink;
use offload_net::subnet::{Interface, Subnet};
use proto::v1::{Metadata, NetworkSpec, SshPublicKey};
use vm_memory::VolatileSlice;

const TAP: &str = "guest0";

/// Frames between the kernel's TAP and the guest's rings, until it is told to end.
fn pump(tap: &Tap, guest: &mut Guest, end: &AtomicBool) {
    let mut buf = vec![0; LEN + FRAME_MAX];
    while !end.load(Ordering::Relaxed) {
        let mut idle = true;
        while let Ok(n) = tap.read(&mut buf) {
            idle = false;
            guest.send_raw(&buf[..n], 1 << 16);
        }
        let patience = if idle { Duration::from_millis(1) } else { Duration::ZERO };
        while let Some((header, mut bytes)) = guest.receive_within(patience) {
            let len = bytes.len();
            let (head, tail) = bytes.split_at_mut(len.min(HEAD_MAX));
            let offloads = offload::check(&header, head, len, 1500, Allowed::HOST).expect("a good frame");
            let tail_bytes = Bytes { start: 0, len: tail.len() };
            let tail = [VolatileSlice::from(tail)];
            // Its queue may be full.
            let _ = tap.send(&Frame { head, tail: Memory::Host(&tail), tail_bytes, offloads });
        }
    }
}

fn ask(to: IpAddr, request: &str) -> String {
    let mut stream = retry(|| TcpStream::connect_timeout(&SocketAddr::new(to, 80), PATIENCE));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer to the end");
    answer
}

#[test]
fn a_kernel_finds_the_metadata_service_over_both_protocols() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let spec = NetworkSpec {
        id: "vpc".to_owned(),
        ipv4_prefix: "10.0.0.0/24".to_owned(),
        ipv6_prefix: "fd00::/64".to_owned(),
        ..Default::default()
    };
    let subnet = Subnet::check(&spec, 1500, &[]).unwrap().unwrap();
    let network = Network::start("test", 1500, Some(subnet), Uplink::None, PollPolicy::default()).unwrap();
    let mut guest = Guest::new(11, FULL);
    guest.fill_rx(200, 2048);
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHUTq9vy7AmBqPcqvXG8Ho5Wn2cJ0y7b3lRnVf1dJkXq anna@home";
    let metadata = Metadata {
        instance_id: "i-11".to_owned(),
        instance_type: "outboard.1c512m".to_owned(),
        ssh_keys: vec![SshPublicKey { name: "anna".to_owned(), key: key.to_owned() }],
        user_data: b"#cloud-config\n".repeat(1000),
        tokens_optional: true,
        ..Default::default()
    };
    let interface = Interface {
        ipv4: vec![[10, 0, 0, 11].into()],
        ipv6: vec!["fd00::b".parse().unwrap()],
        hostname: "guest-11".to_owned(),
        metadata: Some(Arc::new(metadata)),
        ..Interface::plain(MacAddr(guest.mac))
    };
    guest.plug_as(&network, interface);
    let tap = Tap::open(TAP).unwrap();
    let end = Arc::new(AtomicBool::new(false));
    let addresses = ["10.0.0.11/24".parse().unwrap(), "fd00::b/64".parse().unwrap()];
    tap.configure(1500, Some(MacAddr(guest.mac)), &addresses, false).unwrap();
    let pumping = std::thread::spawn({
        let end = end.clone();
        move || pump(&tap, &mut guest, &end)
    });
    // As DHCP says it.
    ip(&format!("route add {ADDRESS_V4}/32 dev {TAP}"));
    // As the advertisement says it, which the kernel asks for when the link comes up.
    retry(|| {
        let routes = ip("-6 route show");
        if routes.contains(&format!("{ADDRESS_V6} dev {TAP} proto kernel")) { Ok(()) } else { Err(routes) }
    });
    let on_link = ip("-6 route show fd00::/64");
    assert!(
        !ip("-6 address show").contains("fd00::5054"),
        "it makes itself no address of the prefix: {on_link}"
    );

    for address in [IpAddr::from(ADDRESS_V4), ADDRESS_V6.into()] {
        let put = "PUT /latest/api/token HTTP/1.0\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n";
        let answer = ask(address, put);
        let token = answer.rsplit("\r\n\r\n").next().unwrap();
        let answer = ask(
            address,
            &format!("GET /latest/user-data HTTP/1.0\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n"),
        );
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.matches("#cloud-config").count() == 1000);
        // So often that what is left of earlier connections is in nobody's way.
        for _ in 0..30 {
            assert!(
                ask(address, "GET /latest/meta-data/instance-id HTTP/1.0\r\n\r\n").ends_with("\r\n\r\ni-11")
            );
        }
    }
    end.store(true, Ordering::Relaxed);
    pumping.join().unwrap();
}
