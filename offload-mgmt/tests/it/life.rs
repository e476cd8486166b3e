//! A VM's life once it is made, and that nobody's trouble is anybody else's.

use std::time::{Duration, Instant};

use proto::error::ErrorReason;
use proto::v1::hypervisor_event::Event as E;
use proto::v1::{
    ConsoleInput, DeleteVmRequest, EndReason, GetVmRequest, HypervisorState, LinkChanged, LinkState,
    ListVmsRequest, RebootVmRequest, StartVmRequest, StopVmRequest, VmState,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::support::hypervisor::Behaviour;
use crate::support::{Setup, error, next_event, reason, show, wait_for, watch};

fn stop(vm: &str, graceful: bool, timeout_ms: u64) -> StopVmRequest {
    StopVmRequest { vm: vm.into(), graceful, timeout_ms }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_stop_is_the_guests() {
    let (setup, mut client) = Setup::new().await;
    let vm = client.create_vm(setup.request("web")).await.expect("create").into_inner();
    let mut events = watch(&mut client, "web").await;
    let stopped = client.stop_vm(stop("web", true, 10_000)).await.expect("stop").into_inner();
    assert_eq!((stopped.state(), stopped.detail.as_str()), (VmState::Stopped, "the guest powered off"));
    assert_eq!(stopped.hypervisor_pid, 0);
    for expected in ["STOPPING", "ended GuestPowerOff", "STOPPED"] {
        assert_eq!(next_event(&mut events).await, expected);
    }
    assert!(setup.blk.devices().is_empty() && setup.net.devices().is_empty());
    assert!(setup.runner.processes().is_empty());

    // Stopping a stopped VM is no error; starting it again gives it its devices back.
    client.stop_vm(stop("web", true, 0)).await.expect("stop");
    let again = client.start_vm(StartVmRequest { vm: "web".into() }).await.expect("start").into_inner();
    assert_eq!((again.state(), &again.id), (VmState::Running, &vm.id));
    assert_eq!(again.spec, vm.spec);
    assert_eq!(setup.blk.devices().len(), 2);
    assert_eq!(reason(client.start_vm(StartVmRequest { vm: "web".into() }).await), ErrorReason::WrongState);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_ignores_its_button_is_ended_in_time() {
    let (setup, mut client) = Setup::new().await;
    setup.runner.behave(Behaviour { ignores_button: true, ..Behaviour::default() });
    client.create_vm(setup.request("web")).await.expect("create");
    let started = Instant::now();
    let stopped = client.stop_vm(stop("web", true, 300)).await.expect("stop").into_inner();
    assert_eq!(stopped.state(), VmState::Stopped);
    assert!(stopped.detail.contains("did not power off in time"), "{}", stopped.detail);
    assert!((Duration::from_millis(300)..Duration::from_secs(5)).contains(&started.elapsed()));
}

#[tokio::test(flavor = "multi_thread")]
async fn ending_at_once_overtakes_a_graceful_stop() {
    let (setup, mut client) = Setup::new().await;
    setup.runner.behave(Behaviour { ignores_button: true, ..Behaviour::default() });
    client.create_vm(setup.request("web")).await.expect("create");
    let mut other = client.clone();
    let graceful = tokio::spawn(async move { other.stop_vm(stop("web", true, 60_000)).await });
    wait_for(&mut client, "web", VmState::Stopping).await;
    client.stop_vm(stop("web", false, 0)).await.expect("stop");
    let stopped = graceful.await.expect("task").expect("stop").into_inner();
    assert_eq!(stopped.state(), VmState::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hypervisor_that_does_not_end_is_killed() {
    let (setup, mut client) = Setup::new().await;
    client.create_vm(setup.request("web")).await.expect("create");
    let id = show(&mut client, "web").await.id;
    setup.runner.process(&id).behave(|b| b.ignores_shutdown = true);
    client.stop_vm(stop("web", false, 0)).await.expect("stop");
    assert!(setup.runner.processes().is_empty());

    // Nor does one that answers nothing at all.
    client.start_vm(StartVmRequest { vm: "web".into() }).await.expect("start");
    setup.runner.process(&id).behave(|b| b.hangs = true);
    assert_eq!(reason(client.stop_vm(stop("web", true, 1000)).await), ErrorReason::HypervisorUnreachable);
    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: true }).await.expect("delete");
    setup.assert_nothing_left(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_cannot_be_ended_is_not_forgotten() {
    let (mut setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    let process = setup.runner.process(&id);
    process.behave(|b| (b.ignores_shutdown, b.unkillable) = (true, true));
    let delete = DeleteVmRequest { vm: "web".into(), force: true };
    let start = StartVmRequest { vm: "web".into() };
    assert_eq!(reason(client.stop_vm(stop("web", false, 0)).await), ErrorReason::HypervisorUnreachable);
    // Neither is there a second process (the runner would not have it), nor is the first one orphaned; also under another
    // controller. What it may use is kept from others.
    for _ in 0..2 {
        let vm = show(&mut client, "web").await;
        assert_eq!(vm.state(), VmState::Failed);
        assert_eq!(setup.runner.processes(), std::slice::from_ref(&id));
        assert_eq!(setup.blk.devices().len(), 2, "the process may use its disks");
        assert_eq!(reason(client.start_vm(start.clone()).await), ErrorReason::HypervisorUnreachable);
        assert_eq!(reason(client.delete_vm(delete.clone()).await), ErrorReason::HypervisorUnreachable);
        let mut same_disks = setup.request("other");
        same_disks.spec.as_mut().expect("spec").disks = setup.spec("web").disks;
        assert_eq!(reason(client.create_vm(same_disks).await), ErrorReason::DiskInUse);
        setup.stop().await;
        client = setup.start().await;
    }
    process.behave(|b| b.unkillable = false);
    client.start_vm(start).await.expect("start");
    assert_eq!(setup.runner.processes(), std::slice::from_ref(&id));
    setup.runner.process(&id).behave(|b| (b.ignores_shutdown, b.unkillable) = (true, true));
    assert_eq!(reason(client.delete_vm(delete.clone()).await), ErrorReason::HypervisorUnreachable);
    setup.runner.process(&id).behave(|b| b.unkillable = false);
    client.delete_vm(delete).await.expect("delete");
    setup.assert_nothing_left(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_does_not_forget_its_process_either() {
    let (mut setup, mut client) = Setup::new().await;
    let unkillable = Behaviour { refuse_boot: true, unkillable: true, ..Behaviour::default() };
    setup.runner.behave(unkillable.clone());
    let delete = DeleteVmRequest { vm: "web".into(), force: false };
    assert_eq!(reason(client.create_vm(setup.request("web")).await), ErrorReason::KernelInvalid);
    let id = show(&mut client, "web").await.id;
    assert_eq!(reason(client.delete_vm(delete.clone()).await), ErrorReason::HypervisorUnreachable);
    setup.stop().await;
    client = setup.start().await;
    assert_eq!(show(&mut client, "web").await.state(), VmState::Failed);
    setup.runner.process(&id).behave(|b| b.unkillable = false);
    client.delete_vm(delete.clone()).await.expect("delete");
    setup.assert_nothing_left(&mut client).await;

    setup.runner.behave(Behaviour::default());
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    client.stop_vm(stop("web", true, 0)).await.expect("stop");
    setup.runner.behave(unkillable);
    let start = StartVmRequest { vm: "web".into() };
    assert_eq!(reason(client.start_vm(start.clone()).await), ErrorReason::KernelInvalid);
    let vm = show(&mut client, "web").await;
    assert_eq!(vm.state(), VmState::Failed);
    assert!(vm.detail.contains("Boot was refused; and it does not end"), "{}", vm.detail);
    setup.runner.process(&id).behave(|b| b.unkillable = false);
    setup.runner.behave(Behaviour::default());
    client.start_vm(start).await.expect("start");
    client.delete_vm(DeleteVmRequest { force: true, ..delete }).await.expect("delete");
    setup.assert_nothing_left(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_off_leaves_a_stopped_vm() {
    let (setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    setup.runner.process(&id).end(EndReason::GuestPowerOff, "");
    let vm = wait_for(&mut client, "web", VmState::Stopped).await;
    assert_eq!(vm.detail, "the guest powered off");
    assert!(setup.blk.devices().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_told_with_what_is_known() {
    let (setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    setup.runner.process(&id).end(EndReason::Failure, "KVM said no");
    let vm = wait_for(&mut client, "web", VmState::Failed).await;
    assert_eq!(vm.detail, "KVM said no");

    client.start_vm(StartVmRequest { vm: "web".into() }).await.expect("start");
    setup.runner.process(&id).die();
    let vm = wait_for(&mut client, "web", VmState::Failed).await;
    assert!(vm.detail.contains("signal 11") && vm.detail.contains("something terrible"), "{}", vm.detail);
    assert!(setup.blk.devices().is_empty());
    let console = client.get_vm_stats(GetVmRequest { vm: "web".into() }).await;
    assert_eq!(reason(console), ErrorReason::WrongState);
    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: false }).await.expect("delete");
    setup.assert_nothing_left(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_hypervisor_tells_is_passed_on_in_order() {
    let (setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    let mut events = watch(&mut client, &id).await;
    let process = setup.runner.process(&id);
    let link = |state: LinkState| {
        E::Link(LinkChanged { slot_id: "disk0".into(), state: state.into(), reason: String::new() })
    };
    process.emit(link(LinkState::Lost));
    process.emit(link(LinkState::Active));
    process.emit(E::State(HypervisorState::Paused.into()));
    process.emit(E::State(HypervisorState::Running.into()));
    process.emit(E::ConfigChangedSlot("disk1".into()));
    client.reboot_vm(RebootVmRequest { vm: "web".into() }).await.expect("reboot");
    let expected =
        ["link disk0 Lost", "link disk0 Active", "PAUSED", "RUNNING", "config disk1", "reset Requested"];
    for expected in expected {
        assert_eq!(next_event(&mut events).await, expected);
    }
    assert_eq!(show(&mut client, "web").await.resets, 1);
    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: true }).await.expect("delete");
    let mut last = String::new();
    while last != "deleted" {
        last = next_event(&mut events).await;
    }
    // The stream of a VM that is gone ends.
    assert_eq!(next_event(&mut events).await, "end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_guest_can_be_stopped() {
    let (setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    setup.runner.process(&id).emit(E::State(HypervisorState::Paused.into()));
    wait_for(&mut client, "web", VmState::Paused).await;
    let stopped = client.stop_vm(stop("web", true, 10_000)).await.expect("stop").into_inner();
    assert_eq!(stopped.detail, "the guest powered off");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_card_or_vm_holds_up_nobody_else() {
    let (mut setup, _) = Setup::new().await;
    setup.stop().await;
    // Long enough that everything else is over before, however busy the machine is.
    setup.deadlines.card = Duration::from_secs(6);
    let mut client = setup.start().await;
    let id = client.create_vm(setup.request("hung")).await.expect("create").into_inner().id;
    setup.runner.process(&id).behave(|b| b.hangs = true);
    setup.blk.state().delay = Duration::from_secs(60);
    // Waits for the card, until its deadline.
    let (request, mut other) = (setup.request("web"), client.clone());
    let slow = tokio::spawn(async move { other.create_vm(request).await });

    let mut diskless = setup.request("diskless");
    diskless.spec.as_mut().expect("spec").disks.clear();
    client.create_vm(diskless).await.expect("create");
    client.list_vms(ListVmsRequest {}).await.expect("list");
    client.stop_vm(stop("diskless", true, 0)).await.expect("stop");
    assert!(!slow.is_finished(), "all this was to be done while the other waits");

    let e = error(slow.await.expect("task"));
    assert_eq!(e.reason(), ErrorReason::CardUnreachable);
    assert!(e.message().contains("no answer within 6 s"), "{e}");
    setup.blk.state().delay = Duration::ZERO;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_goes_both_ways() {
    let (setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    let (tx, rx) = mpsc::channel(4);
    let first = ConsoleInput { vm: "web".into(), data: b"hello".to_vec(), skip_history: false };
    tx.send(first).await.expect("send");
    let mut output = client.console(ReceiverStream::new(rx)).await.expect("console").into_inner();
    let mut next =
        async || output.message().await.map(|m| m.map(|m| String::from_utf8_lossy(&m.data).into_owned()));
    assert_eq!(next().await.expect("output"), Some("history\n".into()));
    assert_eq!(next().await.expect("output"), Some("hello".into()));
    tx.send(ConsoleInput { data: b"again".to_vec(), ..ConsoleInput::default() }).await.expect("send");
    assert_eq!(next().await.expect("output"), Some("again".into()));
    // The end of the input is not the end of the output; the end of the VM is.
    drop(tx);
    setup.runner.process(&id).end(EndReason::GuestPowerOff, "");
    assert_eq!(next().await.expect("the end"), None);

    wait_for(&mut client, "web", VmState::Stopped).await;
    for (vm, expected) in
        [("web", ErrorReason::WrongState), ("nope", ErrorReason::VmNotFound), ("", ErrorReason::InvalidField)]
    {
        let input = tokio_stream::once(ConsoleInput { vm: vm.into(), ..ConsoleInput::default() });
        assert_eq!(reason(client.console(input).await), expected);
    }
}
