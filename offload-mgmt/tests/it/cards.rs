//! Cards that die, hang or refuse, and what is brought back or cleared away on them.

use std::time::{Duration, Instant};

use proto::error::ErrorReason;
use proto::v1::hypervisor_event::Event as E;
use proto::v1::{
    CreateNetworkRequest, DeleteVmRequest, DiskSpec, LinkChanged, LinkState, ListCardsRequest,
    ListNetworksRequest, NetworkSpec, StartVmRequest, StopVmRequest,
};
use tokio::sync::watch;

use crate::support::{Setup, error, reason, until};

fn lost(slot: &str) -> E {
    E::Link(LinkChanged { slot_id: slot.into(), state: LinkState::Lost.into(), reason: "gone".into() })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_link_has_the_card_looked_after() {
    let (mut setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    // The card dies with all it knew, and comes back a moment later.
    setup.blk.kill().await;
    let disks = std::mem::take(&mut setup.blk.state().devices);
    let lost = LinkChanged { slot_id: "disk0".into(), state: LinkState::Lost.into(), reason: "gone".into() };
    setup.runner.process(&id).emit(E::Link(lost));
    tokio::time::sleep(Duration::from_millis(250)).await;
    setup.blk.restart();
    until("the disks to be back", || setup.blk.state().devices == disks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_can_be_stopped_and_removed_while_its_card_is_dead() {
    let (mut setup, mut client) = Setup::new().await;
    client.create_vm(setup.request("web")).await.expect("create");
    setup.blk.kill().await;
    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: true }).await.expect("delete");
    assert_eq!(setup.blk.devices().len(), 2);
    // What could not be deleted is deleted when the card is back, also by another controller.
    setup.stop().await;
    let mut client = setup.start().await;
    setup.blk.restart();
    until("the disks to be deleted", || setup.blk.devices().is_empty()).await;
    setup.assert_nothing_left(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_card_is_named() {
    let (mut setup, mut client) = Setup::new().await;
    setup.blk.kill().await;
    let e = error(client.create_vm(setup.request("web")).await);
    assert_eq!(e.reason(), ErrorReason::CardUnreachable);
    assert!(e.message().contains("card blk") && e.message().contains("No such file"), "{e}");
    let cards = client.list_cards(ListCardsRequest {}).await.expect("list").into_inner().cards;
    assert_eq!(cards.iter().map(|c| c.info.is_some()).collect::<Vec<_>>(), [false, true]);
    setup.blk.restart();
    client.create_vm(setup.request("web")).await.expect("create");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_card_delays_the_end_of_a_vm_once() {
    let (mut setup, mut client) = Setup::new().await;
    let mut request = setup.request("web");
    let disk = |n| DiskSpec { path: format!("/images/{n}"), ..DiskSpec::default() };
    request.spec.as_mut().expect("spec").disks = (0..5).map(disk).collect();
    client.create_vm(request).await.expect("create");
    setup.blk.state().delay = Duration::from_secs(60);
    setup.net.state().delay = Duration::from_secs(60);
    let started = Instant::now();
    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: true }).await.expect("delete");
    // Both cards at once, each for its deadline: not six times, nor twice.
    let took = started.elapsed();
    assert!(took < setup.deadlines.card * 2, "{took:?}");
    assert_eq!((setup.blk.devices().len(), setup.net.devices().len()), (5, 1));
    for card in [&mut setup.blk, &mut setup.net] {
        card.kill().await;
        card.state().delay = Duration::ZERO;
        card.restart();
    }
    until("all devices to be deleted", || setup.blk.devices().is_empty() && setup.net.devices().is_empty())
        .await;
    setup.assert_nothing_left(&mut client).await;
}

/// A lost link has the card look whether its devices are there; meanwhile the VM is stopped and started.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_again_late_is_not_taken_from_who_made_it_meanwhile() {
    let (mut setup, _) = Setup::new().await;
    setup.stop().await;
    setup.deadlines.card = Duration::from_secs(6);
    let mut client = setup.start().await;
    let mut request = setup.request("web");
    request.spec.as_mut().expect("spec").disks.truncate(1);
    let id = client.create_vm(request).await.expect("create").into_inner().id;
    let hold = || {
        let (let_go, hold) = watch::channel(true);
        let mut state = setup.blk.state();
        (state.hold, state.changes) = (Some(hold), 0);
        let_go
    };
    let making = hold();
    setup.runner.process(&id).emit(lost("disk0"));
    until("the disk to be made again", || setup.blk.state().changes == 1).await;
    // What comes from now on is not held.
    setup.blk.state().hold = None;
    let mut other = client.clone();
    let stop = StopVmRequest { vm: "web".into(), ..StopVmRequest::default() };
    let stop = tokio::spawn(async move { other.stop_vm(stop).await.map(drop) });
    // Without a lock the disk is deleted now, only to be made again.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let deleting = hold();
    making.send_replace(false);
    until("the disk to be deleted", || setup.blk.state().changes == 1).await;
    setup.blk.state().hold = None;
    let mut other = client.clone();
    let start =
        tokio::spawn(async move { other.start_vm(StartVmRequest { vm: "web".into() }).await.map(drop) });
    // Without a lock the start is over now, and the deletion still to come.
    tokio::time::sleep(Duration::from_millis(300)).await;
    deleting.send_replace(false);
    stop.await.expect("task").expect("stop");
    start.await.expect("task").expect("start");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(setup.blk.devices(), [format!("{id}-disk0")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_card_refuses_to_make_again_is_tried_again() {
    let (setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    {
        let mut state = setup.blk.state();
        state.devices.clear();
        state.made.clear();
        state.refuse.insert("disk0".into());
    }
    setup.runner.process(&id).emit(lost("disk0"));
    // The other one does not have to wait for it.
    until("the disk that is not refused", || setup.blk.devices() == [format!("{id}-disk1")]).await;
    setup.blk.state().refuse.clear();
    until("both disks", || setup.blk.devices().len() == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_whose_creation_was_not_answered_does_not_stay() {
    let (mut setup, mut client) = Setup::new().await;
    let (let_go, hold) = watch::channel(true);
    setup.net.state().hold = Some(hold);
    let spec = NetworkSpec { id: "late".into(), ..NetworkSpec::default() };
    let request = CreateNetworkRequest { spec: Some(spec), ..CreateNetworkRequest::default() };
    assert_eq!(reason(client.create_network(request.clone()).await), ErrorReason::CardUnreachable);
    let listed = client.list_networks(ListNetworksRequest {}).await.expect("list").into_inner().networks;
    assert_eq!(listed.len(), 1, "{listed:?}");
    // The card has made it by the time another controller is there.
    setup.crash().await;
    {
        let mut state = setup.net.state();
        let made = NetworkSpec { id: "late".into(), ..NetworkSpec::default() };
        state.networks.insert("late".into(), made);
        state.hold = None;
    }
    drop(let_go);
    client = setup.start().await;
    until("the network to be deleted", || !setup.net.state().networks.contains_key("late")).await;
    // Nor does that stand in the way of making it.
    client.create_network(request).await.expect("create");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(setup.net.state().networks.contains_key("late"));
}
