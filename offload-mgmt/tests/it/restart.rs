//! The controller ends, at any moment, and another one begins.

use std::time::Duration;

use proto::v1::{
    CreateVmRequest, DeleteVmRequest, EndReason, ListNetworksRequest, ListVmsRequest, StopVmRequest, VmState,
};

use crate::support::hypervisor::Behaviour;
use crate::support::{Setup, next_event, show, until, wait_for, watch};

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_goes_on_and_is_found_again() {
    let (mut setup, mut client) = Setup::new().await;
    let before = client.create_vm(setup.request("web")).await.expect("create").into_inner();
    client.create_vm(CreateVmRequest { no_start: true, ..setup.request("defined") }).await.expect("define");
    for graceful in [true, false] {
        if graceful {
            setup.stop().await;
        } else {
            setup.crash().await;
        }
        assert_eq!(setup.runner.processes(), std::slice::from_ref(&before.id));
        client = setup.start().await;
        let vms = client.list_vms(ListVmsRequest {}).await.expect("list").into_inner().vms;
        let states: Vec<_> = vms.iter().map(|v| (v.id == before.id, v.state())).collect();
        assert_eq!(states, [(false, VmState::Stopped), (true, VmState::Running)]);
        let now = show(&mut client, "web").await;
        assert_eq!((&now.spec, now.started_us, now.hypervisor_pid), (&before.spec, before.started_us, 4711));
    }
    // It is in the new controller's hands: events come, and it can be stopped.
    let mut events = watch(&mut client, "web").await;
    client.stop_vm(StopVmRequest { vm: "web".into(), graceful: true, timeout_ms: 0 }).await.expect("stop");
    assert_eq!(next_event(&mut events).await, "STOPPING");
    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: false }).await.expect("delete");
    client.delete_vm(DeleteVmRequest { vm: "defined".into(), force: false }).await.expect("delete");
    setup.assert_nothing_left(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_that_was_not_finished_is_undone() {
    let (mut setup, mut client) = Setup::new().await;
    setup.runner.behave(Behaviour { hangs: true, ..Behaviour::default() });
    let request = CreateVmRequest { client_token: "t".into(), ..setup.request("web") };
    let (mut creator, first) = (client.clone(), request.clone());
    let creation = tokio::spawn(async move { creator.create_vm(first).await });
    until("a process", || !setup.runner.processes().is_empty()).await;
    until("its disks", || setup.blk.devices().len() == 2).await;
    setup.crash().await;
    assert!(creation.await.expect("task").is_err());

    client = setup.start().await;
    setup.assert_nothing_left(&mut client).await;
    // The client that repeats its request gets its VM.
    setup.runner.behave(Behaviour::default());
    client.create_vm(request).await.expect("create");
}

/// Crashes at moments spread over a creation: afterwards there is all of the VM or nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_moment_of_a_creation_leaves_all_or_nothing() {
    let (mut setup, mut client) = Setup::new().await;
    let (mut whole, mut nothing) = (0, 0);
    for round in 0..24_u64 {
        setup.blk.state().delay = Duration::from_millis(1);
        let (request, mut creator) = (setup.request("web"), client.clone());
        let creation = tokio::spawn(async move { creator.create_vm(request).await });
        tokio::time::sleep(Duration::from_millis(round * 2)).await;
        setup.crash().await;
        let answered = creation.await.expect("task").is_ok();
        client = setup.start().await;
        let vms = client.list_vms(ListVmsRequest {}).await.expect("list").into_inner().vms;
        match vms.as_slice() {
            [] => {
                assert!(!answered, "round {round}: a VM that was promised is gone");
                setup.assert_nothing_left(&mut client).await;
                nothing += 1;
            }
            [vm] => {
                assert_eq!(vm.state(), VmState::Running, "round {round}: {}", vm.detail);
                assert_eq!(setup.runner.processes(), std::slice::from_ref(&vm.id), "round {round}");
                assert_eq!(setup.blk.devices().len(), 2, "round {round}");
                client.delete_vm(DeleteVmRequest { vm: "web".into(), force: true }).await.expect("delete");
                setup.assert_nothing_left(&mut client).await;
                whole += 1;
            }
            vms => panic!("round {round}: {vms:?}"),
        }
    }
    assert!(nothing > 0, "{whole} whole, {nothing} undone: the crashes came too late to show anything");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ended_meanwhile_is_not_shown_running() {
    let (mut setup, mut client) = Setup::new().await;
    let off = client.create_vm(setup.request("off")).await.expect("create").into_inner().id;
    let dead = client.create_vm(setup.request("dead")).await.expect("create").into_inner().id;
    setup.crash().await;
    setup.runner.process(&off).end(EndReason::GuestPowerOff, "");
    setup.runner.process(&dead).die();
    client = setup.start().await;
    assert_eq!(show(&mut client, "off").await.state(), VmState::Stopped);
    let vm = show(&mut client, "dead").await;
    assert_eq!(vm.state(), VmState::Failed);
    assert!(vm.detail.contains("while the controller was not running"), "{}", vm.detail);
    assert!(setup.blk.devices().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hypervisor_that_does_not_answer_is_not_given_up() {
    let (mut setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    setup.runner.process(&id).behave(|b| b.hangs = true);
    setup.crash().await;
    client = setup.start().await;
    let vm = show(&mut client, "web").await;
    assert_eq!((vm.state(), setup.runner.processes()), (VmState::Running, vec![id.clone()]));
    setup.runner.process(&id).behave(|b| b.hangs = false);
    let deadline = std::time::Instant::now() + crate::support::SOON;
    while show(&mut client, "web").await.hypervisor_pid == 0 {
        assert!(std::time::Instant::now() < deadline, "not found again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let vm = wait_for(&mut client, "web", VmState::Running).await;
    assert_eq!(vm.detail, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_cards_have_lost_is_made_again() {
    let (mut setup, mut client) = Setup::new().await;
    client.create_vm(setup.request("web")).await.expect("create");
    setup.crash().await;
    let disks = std::mem::take(&mut setup.blk.state().devices);
    let (nics, networks) = {
        let mut net = setup.net.state();
        (std::mem::take(&mut net.devices), std::mem::take(&mut net.networks))
    };
    client = setup.start().await;
    until("the disks to be back", || setup.blk.state().devices == disks).await;
    until("the network and the NIC to be back", || {
        let net = setup.net.state();
        net.devices == nics && net.networks == networks
    })
    .await;
    let listed = client.list_networks(ListNetworksRequest {}).await.expect("list").into_inner().networks;
    assert_eq!(listed.iter().map(|n| n.devices.len()).collect::<Vec<_>>(), [1]);
}
