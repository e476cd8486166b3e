//! Security groups: kept by the controller, on the card before what needs them, and changed while VMs run.

use std::time::Duration;

use proto::error::ErrorReason;
use proto::v1::hypervisor_event::Event as E;
use proto::v1::security_group_rule::Peer;
use proto::v1::{
    ChangeSecurityGroupRequest, CreateNetworkRequest, CreateSecurityGroupRequest, CreateVmRequest,
    DeleteSecurityGroupRequest, DeleteVmRequest, LinkChanged, LinkState, ListSecurityGroupsRequest,
    NetworkSpec, RuleProtocol, SecurityGroupRule, SecurityGroupSpec, TrafficDirection,
};

use crate::support::{Client, Setup, reason, until};

fn tcp_in(port: u32, peer: Peer) -> SecurityGroupRule {
    SecurityGroupRule {
        direction: TrafficDirection::Ingress.into(),
        protocol: RuleProtocol::Tcp.into(),
        port_first: port,
        port_last: port,
        peer: Some(peer),
    }
}

fn all() -> Peer {
    Peer::Prefix("0.0.0.0/0".into())
}

fn of(id: &str) -> Peer {
    Peer::Group(id.into())
}

fn create(id: &str, rules: Vec<SecurityGroupRule>) -> CreateSecurityGroupRequest {
    let spec = SecurityGroupSpec { id: id.into(), rules };
    CreateSecurityGroupRequest { spec: Some(spec), no_egress: true, card: String::new() }
}

fn add(id: &str, rule: SecurityGroupRule) -> ChangeSecurityGroupRequest {
    ChangeSecurityGroupRequest { id: id.into(), add: vec![rule], remove: vec![] }
}

fn remove(id: &str, rule: SecurityGroupRule) -> ChangeSecurityGroupRequest {
    ChangeSecurityGroupRequest { id: id.into(), add: vec![], remove: vec![rule] }
}

fn delete(id: &str) -> DeleteSecurityGroupRequest {
    DeleteSecurityGroupRequest { id: id.into() }
}

async fn list(client: &mut Client) -> Vec<SecurityGroupSpec> {
    let answer = client.list_security_groups(ListSecurityGroupsRequest {}).await.expect("list").into_inner();
    answer.groups.into_iter().filter_map(|g| g.spec).collect()
}

/// A VM in a network with a prefix, with these groups.
async fn vm(setup: &Setup, client: &mut Client, name: &str, groups: &[&str]) -> CreateVmRequest {
    let spec = NetworkSpec { id: "lan".into(), ipv4_prefix: "10.9.0.0/24".into(), ..NetworkSpec::default() };
    let request = CreateNetworkRequest { spec: Some(spec), ..CreateNetworkRequest::default() };
    client.create_network(request).await.expect("network");
    let mut request = setup.request(name);
    let spec = request.spec.as_mut().expect("spec");
    spec.disks.truncate(1);
    spec.nics[0].network = "lan".into();
    spec.nics[0].security_groups = groups.iter().map(|g| (*g).to_owned()).collect();
    spec.nics[0].max_connections = 100;
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_made_changed_used_and_deleted() {
    let (setup, mut client) = Setup::new().await;
    let made = client.create_security_group(create("web", vec![tcp_in(80, all())])).await.expect("create");
    let web = made.into_inner().spec.expect("spec");
    assert_eq!(setup.net.state().groups["web"], web);
    // The same once more is no error; another one is.
    client.create_security_group(create("web", vec![tcp_in(80, all())])).await.expect("again");
    assert_eq!(
        reason(client.create_security_group(create("web", vec![])).await),
        ErrorReason::SecurityGroupExists
    );
    client.create_security_group(create("db", vec![tcp_in(5432, of("web"))])).await.expect("create");

    let request = vm(&setup, &mut client, "a", &["web"]).await;
    client.create_vm(request).await.expect("create");
    let device = setup.net.state().devices.values().next().expect("NIC").clone();
    let Some(proto::v1::device_spec::Kind::Net(net)) = device.kind.clone() else { panic!("{device:?}") };
    assert_eq!((net.security_groups, net.max_connections), (vec!["web".to_owned()], 100));
    let answer = client.list_security_groups(ListSecurityGroupsRequest {}).await.expect("list").into_inner();
    assert_eq!(answer.groups[1].devices, [device.id]);

    let rules = |id: &str| setup.net.state().groups[id].rules.clone();
    client.change_security_group(add("web", tcp_in(443, all()))).await.expect("allow");
    client.change_security_group(add("web", tcp_in(443, all()))).await.expect("allow again");
    assert_eq!(rules("web"), [tcp_in(80, all()), tcp_in(443, all())]);
    client.change_security_group(remove("web", tcp_in(80, all()))).await.expect("revoke");
    assert_eq!(rules("web"), [tcp_in(443, all())]);
    assert_eq!(list(&mut client).await[1].rules, rules("web"));
    assert_eq!(
        reason(client.change_security_group(remove("web", tcp_in(80, all()))).await),
        ErrorReason::InvalidField
    );

    // A VM has it, and a rule names it.
    assert_eq!(reason(client.delete_security_group(delete("web")).await), ErrorReason::SecurityGroupInUse);
    client.delete_vm(DeleteVmRequest { vm: "a".into(), force: true }).await.expect("delete");
    assert_eq!(reason(client.delete_security_group(delete("web")).await), ErrorReason::SecurityGroupInUse);
    client.delete_security_group(delete("db")).await.expect("delete");
    client.delete_security_group(delete("web")).await.expect("delete");
    assert_eq!(reason(client.delete_security_group(delete("web")).await), ErrorReason::SecurityGroupNotFound);
    assert!(setup.net.state().groups.is_empty());
    assert!(list(&mut client).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_and_changes_nothing() {
    let (setup, mut client) = Setup::new().await;
    let bad = create("db", vec![tcp_in(5432, of("nobody"))]);
    assert_eq!(reason(client.create_security_group(bad).await), ErrorReason::SecurityGroupNotFound);
    let bad = create("db", vec![tcp_in(5432, Peer::Prefix("10.0.0.1/8".into()))]);
    assert_eq!(reason(client.create_security_group(bad).await), ErrorReason::InvalidField);
    let request = vm(&setup, &mut client, "a", &["nobody"]).await;
    assert_eq!(reason(client.create_vm(request).await), ErrorReason::SecurityGroupNotFound);
    assert!(list(&mut client).await.is_empty() && setup.net.devices().is_empty());

    // What only the card knows to be wrong: before anything is changed, and when it does it.
    for set in [true, false] {
        let refuse = |groups: &[&str]| {
            let mut state = setup.net.state();
            let set = if set { &mut state.refuse_validation } else { &mut state.refuse };
            *set = groups.iter().map(|g| (*g).to_owned()).collect();
        };
        refuse(&["web"]);
        let created = client.create_security_group(create("web", vec![])).await;
        assert_eq!(reason(created), ErrorReason::DiskInvalid);
        assert!(list(&mut client).await.is_empty());
        refuse(&[]);
        client.create_security_group(create("web", vec![tcp_in(80, all())])).await.expect("create");
        refuse(&["web"]);
        let changed = client.change_security_group(add("web", tcp_in(81, all()))).await;
        assert_eq!(reason(changed), ErrorReason::DiskInvalid);
        assert_eq!(list(&mut client).await[0].rules, [tcp_in(80, all())]);
        refuse(&[]);
        client.delete_security_group(delete("web")).await.expect("delete");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_has_lost_its_groups_gets_them_before_the_devices() {
    let (mut setup, mut client) = Setup::new().await;
    // Each names the other: neither can be made alone.
    client.create_security_group(create("web", vec![])).await.expect("create");
    client.create_security_group(create("db", vec![tcp_in(5432, of("web"))])).await.expect("create");
    client.change_security_group(add("web", tcp_in(80, of("db")))).await.expect("allow");
    let request = vm(&setup, &mut client, "a", &["web"]).await;
    let id = client.create_vm(request).await.expect("create").into_inner().id;
    let lose = |setup: &Setup| {
        let mut state = setup.net.state();
        state.networks.clear();
        state.devices.clear();
        std::mem::take(&mut state.groups)
    };
    let groups = lose(&setup);
    let lost = LinkChanged { slot_id: "nic0".into(), state: LinkState::Lost.into(), reason: "gone".into() };
    setup.runner.process(&id).emit(E::Link(lost));
    let whole = |setup: &Setup| {
        let state = setup.net.state();
        state.groups == groups && state.devices.len() == 1
    };
    until("the groups and the NIC", || whole(&setup)).await;

    // Another controller knows them, too.
    setup.stop().await;
    lose(&setup);
    let mut client = setup.start().await;
    until("the groups and the NIC", || whole(&setup)).await;
    assert_eq!(list(&mut client).await, groups.into_values().collect::<Vec<_>>());
    assert_eq!(reason(client.delete_security_group(delete("web")).await), ErrorReason::SecurityGroupInUse);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_was_not_answered_is_undone() {
    let (mut setup, mut client) = Setup::new().await;
    client.create_security_group(create("web", vec![tcp_in(80, all())])).await.expect("create");
    setup.net.kill().await;
    let changed = client.change_security_group(add("web", tcp_in(81, all()))).await;
    assert_eq!(reason(changed), ErrorReason::CardUnreachable);
    assert_eq!(list(&mut client).await[0].rules, [tcp_in(80, all())]);
    // As if the card had done it, and its answer been lost.
    let done = SecurityGroupSpec { id: "web".into(), rules: vec![tcp_in(81, all())] };
    setup.net.state().groups.insert("web".into(), done);
    setup.stop().await;
    setup.net.restart();
    let mut client = setup.start().await;
    until("the rules as they were", || setup.net.state().groups["web"].rules == [tcp_in(80, all())]).await;

    // One whose creation was not answered does not stay.
    let (let_go, hold) = tokio::sync::watch::channel(true);
    setup.net.state().hold = Some(hold);
    let made = client.create_security_group(create("late", vec![])).await;
    assert_eq!(reason(made), ErrorReason::CardUnreachable);
    {
        let mut state = setup.net.state();
        state.groups.insert("late".into(), SecurityGroupSpec { id: "late".into(), rules: vec![] });
        state.hold = None;
    }
    let_go.send_replace(false);
    until("the group to be deleted", || !setup.net.state().groups.contains_key("late")).await;
    client.create_security_group(create("late", vec![])).await.expect("create");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(setup.net.state().groups.contains_key("late"));
}
