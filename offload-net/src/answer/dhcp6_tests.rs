use proptest::prelude::*;

use super::*;
use crate::answer::MAX;
use crate::frame::packet::{Packet, Ports, parse as parse_frame};

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 7]);
const OWN: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x88, 0, 0, 0, 0, 0, 7);
const OTHER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x88, 0, 0, 0, 0, 0, 8);
const CLIENT: &[u8] = &[0, 4, 1, 2, 3, 4, 5];
/// Where the message begins in an answer.
const MESSAGE: usize = 14 + 40 + 8;

fn subnet() -> Subnet {
    let spec = proto::v1::NetworkSpec {
        id: "n".to_owned(),
        ipv4_prefix: "10.88.0.0/24".to_owned(),
        ipv6_prefix: "fd00:88::/64".to_owned(),
        ..Default::default()
    };
    Subnet::check(&spec, 1500, &[]).unwrap().unwrap()
}

fn client(ipv6: &[Ipv6Addr]) -> Interface {
    Interface { ipv4: vec![[10, 88, 0, 7].into()], ipv6: ipv6.to_vec(), ..Interface::plain(MAC) }
}

fn opt(code: u16, data: &[u8]) -> Vec<u8> {
    [&code.to_be_bytes(), &(data.len() as u16).to_be_bytes(), data].concat()
}

fn binding(code: u16, id: u8, addresses: &[Ipv6Addr]) -> Vec<u8> {
    let mut data = vec![0, 0, 0, id];
    data.extend([0; 8]);
    for a in addresses {
        data.extend(opt(code::ADDRESS, &[&a.octets()[..], &[0; 8]].concat()));
    }
    opt(code, &data)
}

fn to_server() -> Vec<u8> {
    opt(code::SERVER, &server_id(subnet().gateway_mac))
}

/// A message with a client's identifier and these options.
fn message(kind: u8, options: &[&[u8]]) -> Vec<u8> {
    let mut m = vec![kind, 7, 8, 9];
    m.extend(opt(code::CLIENT, CLIENT));
    m.extend(options.concat());
    m
}

/// The answer's type and options.
type Answer = (u8, Vec<(u16, Vec<u8>)>);

fn options(bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
    Options(bytes).map(|o| o.map(|(code, data)| (code, data.to_vec())).unwrap()).collect()
}

fn ask_as(client: &Interface, message: &[u8]) -> Option<Answer> {
    let mut buffer = [0; MAX];
    let n = reply(message, client.link_local(), client, &subnet(), &mut buffer).unwrap()?;
    let Ok(Packet::V6(p)) = parse_frame(&buffer[..n], n) else { panic!() };
    assert_eq!((p.source, p.destination, p.end), (subnet().link_local(), client.link_local(), n));
    assert_eq!(p.udp, Some(Ports { source: 547, destination: 546 }));
    assert_eq!((&buffer[..6], &buffer[6..12]), (&MAC.0[..], &subnet().gateway_mac.0[..]));
    let mut sum = Sum::new();
    sum.add_u16(17);
    sum.add_u16((n - 54) as u16);
    sum.add(&buffer[22..n]);
    assert_eq!(sum.finish(), 0);
    assert_eq!(&buffer[MESSAGE + 1..MESSAGE + 4], &[7, 8, 9]);
    Some((buffer[MESSAGE], options(&buffer[MESSAGE + 4..n])))
}

fn ask(message: &[u8]) -> Option<Answer> {
    ask_as(&client(&[OWN]), message)
}

/// What is said of a binding: times, addresses with their lifetimes, a status.
fn of_binding(data: &[u8]) -> (Vec<u32>, Vec<(Ipv6Addr, u32)>, Option<u16>) {
    let number = |b: &[u8]| u32::from_be_bytes(b.try_into().unwrap());
    let times = data[4..12].chunks(4).map(number).collect();
    let (mut addresses, mut status) = (Vec::new(), None);
    for (code, data) in options(&data[12..]) {
        match code {
            code::ADDRESS => {
                let octets: [u8; 16] = data[..16].try_into().unwrap();
                assert_eq!(data[16..20], data[20..24]);
                addresses.push((octets.into(), number(&data[16..20])));
            }
            code::STATUS => status = Some(u16::from_be_bytes([data[0], data[1]])),
            _ => panic!("{code}"),
        }
    }
    (times, addresses, status)
}

#[test]
fn a_client_gets_its_address() {
    let ia = binding(code::ADDRESSES, 1, &[]);
    let (kind, options) = ask(&message(kind::SOLICIT, &[&ia])).unwrap();
    assert_eq!(kind, kind::ADVERTISE);
    assert_eq!(options[0], (code::CLIENT, CLIENT.to_vec()));
    assert_eq!(options[1], (code::SERVER, server_id(subnet().gateway_mac).to_vec()));
    assert_eq!((options.len(), options[2].0, &options[2].1[..4]), (3, code::ADDRESSES, &[0, 0, 0, 1][..]));
    assert_eq!(of_binding(&options[2].1), (vec![RENEW, REBIND], vec![(OWN, LIFETIME)], None));
    for (kind, to) in [(kind::REQUEST, to_server()), (kind::RENEW, to_server()), (kind::REBIND, vec![])] {
        let ia = binding(code::ADDRESSES, 1, &[OWN]);
        let (answer, options) = ask(&message(kind, &[&to, &ia])).unwrap();
        assert_eq!(answer, kind::REPLY);
        assert_eq!(of_binding(&options[2].1).1, [(OWN, LIFETIME)]);
    }
    // In two messages instead of four.
    let rapid = opt(code::RAPID_COMMIT, &[]);
    let (kind, options) = ask(&message(kind::SOLICIT, &[&rapid, &ia])).unwrap();
    assert_eq!((kind, &options[2]), (kind::REPLY, &(code::RAPID_COMMIT, vec![])));
}

#[test]
fn an_address_that_is_not_its_own_it_is_to_use_no_more() {
    let ia = binding(code::ADDRESSES, 1, &[OTHER]);
    let (_, options) = ask(&message(kind::RENEW, &[&to_server(), &ia])).unwrap();
    assert_eq!(of_binding(&options[2].1).1, [(OWN, LIFETIME), (OTHER, 0)]);
    // One that it only wishes for is passed over.
    let (_, options) = ask(&message(kind::SOLICIT, &[&ia])).unwrap();
    assert_eq!(of_binding(&options[2].1).1, [(OWN, LIFETIME)]);
    for (addresses, status) in
        [(&[OWN][..], status::SUCCESS), (&[OTHER], status::NOT_ON_LINK), (&[OTHER, OWN], status::NOT_ON_LINK)]
    {
        let ia = binding(code::ADDRESSES, 1, addresses);
        let (kind, options) = ask(&message(kind::CONFIRM, &[&ia])).unwrap();
        assert_eq!((kind, &options[2]), (kind::REPLY, &(code::STATUS, status.to_be_bytes().to_vec())));
    }
    assert_eq!(ask(&message(kind::CONFIRM, &[&binding(code::ADDRESSES, 1, &[])])), None);
}

#[test]
fn there_is_one_binding_and_no_prefixes() {
    let asked = [
        binding(code::PREFIXES, 1, &[]),
        binding(code::ADDRESSES, 2, &[]),
        binding(code::ADDRESSES, 3, &[]),
        opt(code::TEMPORARY, &[0, 0, 0, 4]),
        binding(code::ADDRESSES, 5, &[]),
    ];
    let (_, options) = ask(&message(kind::SOLICIT, &[&asked.concat()])).unwrap();
    assert_eq!(options.len(), 2 + BINDINGS_MAX);
    assert_eq!(of_binding(&options[2].1).2, Some(status::NO_PREFIXES));
    assert_eq!(of_binding(&options[3].1).1, [(OWN, LIFETIME)]);
    assert_eq!(of_binding(&options[4].1), (vec![0, 0], vec![], Some(status::NO_ADDRESSES)));
    assert_eq!(options[5], (code::TEMPORARY, [&[0, 0, 0, 4][..], &opt(code::STATUS, &[0, 2])].concat()));
    // Who has no address is told so.
    let (_, options) = ask_as(&client(&[]), &message(kind::SOLICIT, &[&asked[1]])).unwrap();
    assert_eq!(of_binding(&options[2].1).2, Some(status::NO_ADDRESSES));
}

#[test]
fn the_most_that_can_be_answered_fits() {
    let own: Vec<_> = (1..=7).map(|i| Ipv6Addr::new(0xfd00, 0x88, 0, 0, 0, 0, 1, i)).collect();
    let old: Vec<_> = (1..=9).map(|i| Ipv6Addr::new(0xfd00, 0x88, 0, 0, 0, 0, 2, i)).collect();
    let ia = [binding(code::ADDRESSES, 1, &old), binding(code::PREFIXES, 2, &[])].concat();
    let (_, options) = ask_as(&client(&own), &message(kind::RENEW, &[&to_server(), &ia])).unwrap();
    assert_eq!(of_binding(&options[2].1).1.len(), own.len() + OLD_MAX);
    assert_eq!(of_binding(&options[3].1).2, Some(status::NO_PREFIXES));
}

#[test]
fn what_ends_and_what_asks_for_nothing_is_answered_and_what_is_for_others_is_not() {
    for kind in [kind::RELEASE, kind::DECLINE] {
        let ia = binding(code::ADDRESSES, 1, &[OWN]);
        let (_, options) = ask(&message(kind, &[&to_server(), &ia])).unwrap();
        assert_eq!(options[2..], [(code::STATUS, vec![0, 0])]);
    }
    assert_eq!(ask(&message(kind::INFORMATION, &[])).unwrap().1.len(), 2);
    // Without any identifier (section 18.2.6).
    assert_eq!(ask(&[kind::INFORMATION, 7, 8, 9]).unwrap().1.len(), 1);
    let other = opt(code::SERVER, b"another");
    for silent in [
        message(kind::SOLICIT, &[&to_server()]),
        message(kind::REQUEST, &[]),
        message(kind::REQUEST, &[&other]),
        message(kind::RENEW, &[&other]),
        message(kind::REBIND, &[&to_server()]),
        message(kind::INFORMATION, &[&other]),
        message(kind::ADVERTISE, &[]),
        message(kind::REPLY, &[]),
        message(12, &[]),
        vec![kind::SOLICIT, 7, 8, 9],
    ] {
        assert_eq!(ask(&silent), None, "{silent:?}");
    }
    let mut buffer = [0; MAX];
    for bad in [
        vec![1, 2],
        message(kind::SOLICIT, &[&[0]]),
        message(kind::SOLICIT, &[&[0, 3, 0, 9, 0]]),
        message(kind::SOLICIT, &[&opt(code::ADDRESSES, &[0; 11])]),
        message(kind::SOLICIT, &[&opt(code::CLIENT, &[0; 131])]),
        message(kind::SOLICIT, &[&opt(code::CLIENT, &[])]),
        message(
            kind::CONFIRM,
            &[&opt(code::ADDRESSES, &[&[0; 12][..], &opt(code::ADDRESS, &[0; 15])].concat())],
        ),
    ] {
        let got = reply(&bad, OWN, &client(&[OWN]), &subnet(), &mut buffer);
        assert_eq!(got, Err(DropReason::Malformed), "{bad:?}");
    }
}

proptest! {
    /// Whatever a client says, it is given no address but its own, and the answer is whole.
    #[test]
    fn any_message_is_borne(
        kind in 0..14_u8,
        parts in prop::collection::vec(
            (prop::sample::select(vec![1_u16, 2, 3, 4, 5, 14, 25, 999]), prop::collection::vec(any::<u8>(), 0..60)),
            0..8,
        ),
        tail in prop::collection::vec(any::<u8>(), 0..9), ours: bool,
    ) {
        let mut m = vec![kind, 7, 8, 9];
        for (code, data) in parts {
            m.extend(opt(code, &data));
        }
        if ours {
            m.extend(to_server());
        }
        m.extend(tail);
        let mut buffer = [0; MAX];
        if let Ok(Some(n)) = reply(&m, OWN, &client(&[OWN]), &subnet(), &mut buffer) {
            for (code, data) in options(&buffer[MESSAGE + 4..n]) {
                if code == code::ADDRESSES {
                    prop_assert!(of_binding(&data).1.iter().all(|(a, seconds)| *seconds == 0 || *a == OWN));
                }
            }
        }
    }
}
