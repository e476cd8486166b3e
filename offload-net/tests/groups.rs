//! Security groups of a card's process: bad ones are refused, and connections outlive the card.

mod common;

use std::path::Path;

use common::card::{Card, Link, retry};
use common::groups::{device, drops, everybody, group, make, set, tcp_in};
use common::*;
use proto::error::{Error, ErrorReason};
use proto::v1::device_spec::Kind;
use proto::v1::security_group_rule::Peer;
use proto::v1::{
    CreateNetworkRequest, DeleteDeviceRequest, DeleteSecurityGroupRequest, ListSecurityGroupsRequest,
    NetDeviceSpec, NetworkSpec,
};

const SYN: u8 = 2;
const ACK: u8 = 16;

fn network() -> CreateNetworkRequest {
    let spec =
        NetworkSpec { id: "lan".to_owned(), ipv4_prefix: "10.0.0.0/24".to_owned(), ..Default::default() };
    CreateNetworkRequest { spec: Some(spec), ..Default::default() }
}

fn tcp(from: &Guest, to: &Guest, ports: (u16, u16), flags: u8) -> Vec<u8> {
    let (_, mut f) = tcp4_super((to.mac, from.mac), b"data", 1448);
    f[26..34].copy_from_slice(&[10, 0, 0, from.mac[5], 10, 0, 0, to.mac[5]]);
    f[34..36].copy_from_slice(&ports.0.to_be_bytes());
    f[36..38].copy_from_slice(&ports.1.to_be_bytes());
    f[47] = flags;
    f
}

/// A server with a group, and a client without.
struct Pair {
    server: Guest,
    client: Guest,
    links: Option<[Link; 2]>,
}

impl Pair {
    async fn new(card: &Card) -> Self {
        card.networks().await.create_network(network()).await.unwrap();
        set(card, vec![group("web", vec![tcp_in(80, everybody())])]).await.unwrap();
        let (mut server, mut client) = (Guest::new(11, FULL), Guest::new(12, FULL));
        make(card, device("server", &server, &["web"])).await.unwrap();
        make(card, device("client", &client, &[])).await.unwrap();
        server.fill_rx(100, 2048);
        client.fill_rx(100, 2048);
        let mut pair = Self { server, client, links: None };
        pair.connect(card);
        pair
    }

    fn connect(&mut self, card: &Card) {
        // A device has one front-end at a time.
        drop(self.links.take());
        let links =
            [self.server.connect(&card.socket("server")), self.client.connect(&card.socket("client"))];
        self.links = Some(links);
    }

    fn asks(&mut self, ports: (u16, u16), flags: u8) -> bool {
        let frame = tcp(&self.client, &self.server, ports, flags);
        self.client.send(&frame);
        self.server.receive_within(MOMENT * 5).is_some_and(|(_, f)| f == frame)
    }

    fn answers(&mut self, ports: (u16, u16), flags: u8) -> bool {
        let frame = tcp(&self.server, &self.client, ports, flags);
        self.server.send(&frame);
        self.client.receive_within(MOMENT * 5).is_some_and(|(_, f)| f == frame)
    }

    fn open(&mut self, port: u16) {
        assert!(self.asks((port, 80), SYN));
        assert!(self.answers((80, port), SYN | ACK));
        assert!(self.asks((port, 80), ACK));
    }
}

fn connections(card: &Card, device: &str) -> std::path::PathBuf {
    card.runtime_dir.join("networks/connections").join(format!("{device}.connections"))
}

#[tokio::test]
async fn a_stream_goes_on_when_the_card_is_killed_or_restarted() {
    let dir = tempfile::tempdir().unwrap();
    let mut card = Card::start(dir.path());
    let mut pair = Pair::new(&card).await;
    pair.open(1000);
    for kill in [true, false, true] {
        if kill {
            card.kill();
        } else {
            assert!(card.terminate().success());
        }
        card = Card::start(dir.path());
        pair.connect(&card);
        // The stream goes on; what was never opened does not begin in the middle.
        assert!(pair.asks((1000, 80), ACK) && pair.answers((80, 1000), ACK));
        assert!(!pair.asks((1001, 80), ACK) && !pair.answers((80, 1001), ACK));
        assert!(!pair.asks((1000, 81), SYN));
        let d = drops(&card, "server").await;
        assert_eq!((d.denied_in, d.denied_out), (2, 1));
    }
    // The rules are as they were, too, without anybody's having told the new card.
    let list = card.networks().await.list_security_groups(ListSecurityGroupsRequest {}).await.unwrap();
    let list = list.into_inner().groups;
    assert_eq!(list.len(), 1);
    assert_eq!(list[0].spec, Some(group("web", vec![tcp_in(80, everybody())])));
    assert_eq!(list[0].devices, ["server"]);
}

#[tokio::test]
async fn a_damaged_file_costs_the_connections_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut card = Card::start(dir.path());
    let mut pair = Pair::new(&card).await;
    let damage: [&dyn Fn(&Path); 4] = [
        // Nonsense from the first slot on; nothing; a directory; a state that is none.
        &|path| {
            let mut bytes = std::fs::read(path).unwrap();
            bytes[4096..].fill(0x5a);
            std::fs::write(path, bytes).unwrap();
        },
        &|path| std::fs::write(path, b"").unwrap(),
        &|path| std::fs::remove_file(path).unwrap(),
        &|path| {
            let mut bytes = std::fs::read(path).unwrap();
            bytes[4096 + 47] = 99;
            std::fs::write(path, bytes).unwrap();
        },
    ];
    for damage in damage {
        pair.open(1000);
        assert!(pair.asks((1000, 80), ACK));
        let path = connections(&card, "server");
        card.kill();
        damage(&path);
        card = Card::start(dir.path());
        pair.connect(&card);
        assert!(!pair.asks((1000, 80), ACK) && !pair.answers((80, 1000), ACK));
    }
    pair.open(1000);
}

#[tokio::test]
async fn rules_change_at_once_and_a_deleted_devices_connections_go() {
    let dir = tempfile::tempdir().unwrap();
    let card = Card::start(dir.path());
    let mut pair = Pair::new(&card).await;
    pair.open(1000);
    set(&card, vec![group("web", vec![tcp_in(81, everybody())])]).await.unwrap();
    assert!(!pair.asks((1000, 80), ACK) && !pair.answers((80, 1000), ACK));
    assert!(pair.asks((1000, 81), SYN));
    set(&card, vec![group("web", vec![tcp_in(80, everybody())])]).await.unwrap();
    assert!(pair.asks((1000, 80), ACK) && pair.answers((80, 1000), ACK));

    let path = connections(&card, "server");
    assert!(path.exists());
    pair.links = None;
    let delete = DeleteDeviceRequest { id: "server".to_owned() };
    card.devices().await.delete_device(delete).await.unwrap();
    assert!(!path.exists());
    make(&card, device("server", &pair.server, &["web"])).await.unwrap();
    pair.connect(&card);
    assert!(!pair.asks((1000, 80), ACK));
    pair.open(1000);
}

#[tokio::test]
async fn bad_requests_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let card = Card::start(dir.path());
    let pair = Pair::new(&card).await;
    let of = |id: &str| Peer::Group(id.to_owned());
    let refused = |e: Result<(), Error>, reason| {
        let e = e.unwrap_err();
        assert_eq!(e.reason(), reason, "{e}");
    };
    // One bad group spoils all.
    let good = group("new", vec![]);
    let bad = group("bad", vec![tcp_in(80, of("nobody"))]);
    refused(set(&card, vec![good.clone(), bad]).await, ErrorReason::SecurityGroupNotFound);
    let bad = group("bad", vec![tcp_in(80, Peer::Prefix("10.0.0.1/24".to_owned()))]);
    refused(set(&card, vec![good, bad]).await, ErrorReason::InvalidField);
    // Devices.
    let stranger = Guest::new(13, FULL);
    refused(make(&card, device("x", &stranger, &["new"])).await, ErrorReason::SecurityGroupNotFound);
    refused(make(&card, device("x", &stranger, &["web", "web"])).await, ErrorReason::InvalidField);
    refused(make(&card, device("x", &stranger, &["web"; 9])).await, ErrorReason::InvalidField);
    let with = |edit: &dyn Fn(&mut NetDeviceSpec)| {
        let mut request = device("x", &stranger, &["web"]);
        if let Some(Kind::Net(net)) = request.spec.as_mut().and_then(|s| s.kind.as_mut()) {
            edit(net);
        }
        request
    };
    refused(make(&card, with(&|n| n.max_connections = 15)).await, ErrorReason::InvalidField);
    refused(make(&card, with(&|n| n.max_connections = 1 << 21)).await, ErrorReason::InvalidField);
    // An address that is taken: no file is left of the attempt.
    refused(
        make(&card, with(&|n| n.addresses = vec!["10.0.0.11".to_owned()])).await,
        ErrorReason::DeviceExists,
    );
    assert!(!connections(&card, "x").exists());
    let plain = NetworkSpec { id: "plain".to_owned(), ..Default::default() };
    let request = CreateNetworkRequest { spec: Some(plain), ..Default::default() };
    card.networks().await.create_network(request).await.unwrap();
    let in_plain = with(&|n| (n.network, n.addresses) = ("plain".to_owned(), vec![]));
    refused(make(&card, in_plain).await, ErrorReason::InvalidField);

    // A group that is needed.
    set(&card, vec![group("other", vec![tcp_in(22, of("other")), tcp_in(80, of("web"))])]).await.unwrap();
    let delete = |id: &str| {
        let request = DeleteSecurityGroupRequest { id: id.to_owned() };
        let card = &card;
        async move {
            let deleted = card.networks().await.delete_security_group(request).await;
            deleted.map(drop).map_err(Error::from)
        }
    };
    refused(delete("web").await, ErrorReason::SecurityGroupInUse);
    refused(delete("new").await, ErrorReason::SecurityGroupNotFound);
    let request = DeleteDeviceRequest { id: "server".to_owned() };
    card.devices().await.delete_device(request).await.unwrap();
    // Its rule names it still.
    refused(delete("web").await, ErrorReason::SecurityGroupInUse);
    delete("other").await.unwrap();
    delete("web").await.unwrap();
    drop(pair);
    retry(|| if connections(&card, "server").exists() { Err("still there") } else { Ok(()) });
}
