use proptest::prelude::*;
use smoltcp::wire::DhcpRepr;

use super::*;

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 7]);
const OWN: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 7);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);

fn subnet(routed: bool) -> Subnet {
    let spec = proto::v1::NetworkSpec {
        id: "n".to_owned(),
        tap: if routed { "t".to_owned() } else { String::new() },
        ipv4_prefix: "10.88.0.0/24".to_owned(),
        ..Default::default()
    };
    Subnet::check(&spec, 1400, &[]).unwrap().unwrap()
}

fn client() -> Interface {
    Interface { ipv4: vec![OWN], hostname: "web".to_owned(), ..Interface::plain(MAC) }
}

fn request(kind: Kind) -> DhcpRepr<'static> {
    DhcpRepr {
        message_type: kind,
        transaction_id: 0x1234_5678,
        secs: 0,
        client_hardware_address: EthernetAddress(MAC.0),
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: false,
        requested_ip: None,
        client_identifier: None,
        server_identifier: None,
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    }
}

fn bytes(repr: &DhcpRepr<'_>) -> Vec<u8> {
    let mut bytes = vec![0; 548];
    repr.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).unwrap();
    bytes
}

/// The answer's frame.
fn ask(repr: &DhcpRepr<'_>, subnet: &Subnet) -> Option<Vec<u8>> {
    let mut buffer = [0; MAX];
    let length = reply(&bytes(repr), &client(), subnet, &mut buffer).unwrap()?;
    Some(buffer[..length].to_vec())
}

fn with_answer(repr: &DhcpRepr<'_>, check: impl FnOnce(&[u8], DhcpRepr<'_>)) {
    let frame = ask(repr, &subnet(true)).expect("an answer");
    let packet = DhcpPacket::new_checked(&frame[MESSAGE..]).unwrap();
    let answer = DhcpRepr::parse(&packet).unwrap();
    assert_eq!(answer.transaction_id, 0x1234_5678);
    assert_eq!(answer.client_hardware_address.0, MAC.0);
    assert_eq!(answer.server_identifier, Some(GATEWAY));
    check(&frame, answer);
}

#[test]
fn a_client_gets_its_address_and_all_it_needs() {
    with_answer(&request(Kind::Discover), |_, offer| {
        assert_eq!((offer.message_type, offer.your_ip), (Kind::Offer, OWN));
    });
    let selecting = DhcpRepr {
        requested_ip: Some(OWN),
        server_identifier: Some(GATEWAY),
        client_identifier: Some(EthernetAddress(MAC.0)),
        ..request(Kind::Request)
    };
    with_answer(&selecting, |frame, ack| {
        assert_eq!((ack.message_type, ack.your_ip), (Kind::Ack, OWN));
        assert_eq!(ack.subnet_mask, Some(Ipv4Addr::new(255, 255, 255, 0)));
        assert_eq!((ack.router, ack.lease_duration), (Some(GATEWAY), Some(LEASE_SECONDS)));
        assert_eq!(ack.dns_servers.as_deref(), Some(&[GATEWAY][..]));
        assert_eq!(ack.client_identifier, Some(EthernetAddress(MAC.0)));
        let packet = DhcpPacket::new_unchecked(&frame[MESSAGE..]);
        let option = |code| packet.options().find(|o| o.kind == code).map(|o| o.data.to_vec());
        assert_eq!(option(code::MTU), Some(1400_u16.to_be_bytes().to_vec()));
        assert_eq!(option(code::HOST_NAME), Some(b"web".to_vec()));
        // Ethernet, and checksums that hold.
        assert_eq!((&frame[..6], &frame[6..12]), (&MAC.0[..], &subnet(true).gateway_mac.0[..]));
        let mut sum = Sum::new();
        sum.add(&frame[14..34]);
        assert_eq!(sum.finish(), 0);
        let mut sum = Sum::new();
        sum.add(&frame[26..]);
        sum.add_u16(17);
        sum.add_u16((frame.len() - 34) as u16);
        assert_eq!(sum.finish(), 0);
        assert_eq!(&frame[26..34], &[GATEWAY.octets(), OWN.octets()].concat());
    });
}

#[test]
fn a_network_without_a_way_out_has_no_router() {
    let frame = ask(&request(Kind::Discover), &subnet(false)).unwrap();
    let packet = DhcpPacket::new_unchecked(&frame[MESSAGE..]);
    let offer = DhcpRepr::parse(&packet).unwrap();
    assert_eq!((offer.router, offer.dns_servers, offer.your_ip), (None, None, OWN));
}

#[test]
fn the_metadata_service_is_on_the_link_where_no_gateway_leads_there() {
    let metadata =
        std::sync::Arc::new(proto::v1::Metadata { instance_id: "i".to_owned(), ..Default::default() });
    let client = Interface { metadata: Some(metadata), ..client() };
    for routed in [false, true] {
        let mut buffer = [0; MAX];
        let n =
            reply(&bytes(&request(Kind::Discover)), &client, &subnet(routed), &mut buffer).unwrap().unwrap();
        let packet = DhcpPacket::new_unchecked(&buffer[MESSAGE..n]);
        let routes = packet.options().find(|o| o.kind == code::ROUTES).map(|o| o.data.to_vec());
        assert_eq!(routes, (!routed).then_some(vec![32, 169, 254, 169, 254, 0, 0, 0, 0]));
    }
}

#[test]
fn another_address_is_refused() {
    let other = Ipv4Addr::new(10, 88, 0, 8);
    for wrong in [
        DhcpRepr { requested_ip: Some(other), ..request(Kind::Request) },
        DhcpRepr { client_ip: other, ..request(Kind::Request) },
    ] {
        with_answer(&wrong, |frame, nak| {
            assert_eq!((nak.message_type, nak.your_ip), (Kind::Nak, Ipv4Addr::UNSPECIFIED));
            assert_eq!((nak.lease_duration, nak.router), (None, None));
            assert_eq!((&frame[..6], &frame[30..34]), (&[0xff; 6][..], &[255; 4][..]));
        });
    }
}

#[test]
fn renewing_and_informing_clients_are_answered_where_they_are() {
    with_answer(&DhcpRepr { client_ip: OWN, ..request(Kind::Request) }, |frame, ack| {
        assert_eq!((ack.message_type, ack.your_ip, ack.client_ip), (Kind::Ack, OWN, OWN));
        assert_eq!(&frame[30..34], &OWN.octets());
    });
    with_answer(&DhcpRepr { client_ip: OWN, ..request(Kind::Inform) }, |_, ack| {
        assert_eq!((ack.message_type, ack.your_ip), (Kind::Ack, Ipv4Addr::UNSPECIFIED));
        assert_eq!((ack.lease_duration, ack.router), (None, Some(GATEWAY)));
    });
    // A client that cannot take unicast before it has its address says so.
    with_answer(&DhcpRepr { broadcast: true, ..request(Kind::Discover) }, |frame, offer| {
        assert!(offer.broadcast);
        assert_eq!((&frame[..6], &frame[30..34]), (&[0xff; 6][..], &[255; 4][..]));
    });
}

#[test]
fn what_is_not_for_us_is_not_answered() {
    let subnet = subnet(true);
    let elsewhere = Some(Ipv4Addr::new(10, 88, 0, 66));
    for silent in [
        DhcpRepr { server_identifier: elsewhere, requested_ip: Some(OWN), ..request(Kind::Request) },
        request(Kind::Request),
        request(Kind::Release),
        request(Kind::Decline),
        request(Kind::Inform),
    ] {
        assert_eq!(ask(&silent, &subnet), None, "{silent:?}");
    }
    let mut buffer = [0; MAX];
    let mut refused = |bytes: &[u8]| reply(bytes, &client(), &subnet, &mut buffer);
    let other =
        DhcpRepr { client_hardware_address: EthernetAddress([2, 0, 0, 0, 0, 8]), ..request(Kind::Discover) };
    assert_eq!(refused(&bytes(&other)), Err(DropReason::SpoofedNeighbour));
    let relayed = DhcpRepr { relay_agent_ip: OWN, ..request(Kind::Discover) };
    assert_eq!(refused(&bytes(&relayed)), Err(DropReason::SpoofedNeighbour));
    assert_eq!(refused(&bytes(&request(Kind::Offer))), Err(DropReason::Malformed));
    assert_eq!(refused(&bytes(&request(Kind::Discover))[..239]), Err(DropReason::Malformed));
    let mut no_magic = bytes(&request(Kind::Discover));
    no_magic[236] = 0;
    assert_eq!(refused(&no_magic), Err(DropReason::Malformed));
}

proptest! {
    /// Whatever a client says, the answer is one that it understands, in its own name, and never an address but its own.
    #[test]
    fn any_message_is_borne(
        mut message in prop::collection::vec(any::<u8>(), 0..1500),
        options in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..=255)), 0..6),
        kind in 0..10_u8, sensible: bool,
    ) {
        if sensible {
            message = bytes(&request(Kind::Discover))[..240].to_vec();
            message.extend([53, 1, kind]);
            for (code, data) in options {
                message.extend([code, data.len() as u8]);
                message.extend(data);
            }
        }
        let mut buffer = [0; MAX];
        if let Ok(Some(length)) = reply(&message, &client(), &subnet(true), &mut buffer) {
            let packet = DhcpPacket::new_checked(&buffer[MESSAGE..length]).unwrap();
            prop_assert!(packet.your_ip().is_unspecified() || packet.your_ip() == OWN);
            prop_assert_eq!(packet.client_hardware_address().0, MAC.0);
            prop_assert!(packet.options().any(|o| o.kind == code::SERVER));
        }
    }
}
