//! What a VM may do with its disks per second.

use proto::error::ErrorReason;
use proto::v1::{
    DeviceLimits, NetLimits, SetDiskLimitsRequest, SetNicLimitsRequest, StartVmRequest, StopVmRequest,
};

use crate::support::{Client, Setup, error, reason, show, until};

fn iops(operations_per_second: u64) -> DeviceLimits {
    DeviceLimits { operations_per_second, ..DeviceLimits::default() }
}

fn request(disk: &str, limits: DeviceLimits) -> SetDiskLimitsRequest {
    SetDiskLimitsRequest { vm: "web".into(), disk: disk.into(), limits: Some(limits) }
}

async fn shown(client: &mut Client) -> Vec<Option<DeviceLimits>> {
    let disks = show(client, "web").await.spec.expect("spec").disks;
    disks.into_iter().map(|d| d.limits).collect()
}

fn on_card(setup: &Setup) -> Vec<Option<DeviceLimits>> {
    setup.blk.state().devices.values().map(|d| d.limits).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_given_at_creation_changed_while_it_runs_and_kept() {
    let (mut setup, mut client) = Setup::new().await;
    let mut create = setup.request("web");
    create.spec.as_mut().expect("spec").disks[1].limits = Some(iops(100));
    client.create_vm(create).await.expect("create");
    assert_eq!(on_card(&setup), [None, Some(iops(100))]);
    client.set_disk_limits(request("disk0", iops(7))).await.expect("limit");
    let vm = client.set_disk_limits(request("disk1", iops(0))).await.expect("limit").into_inner();
    assert_eq!(vm.spec.expect("spec").disks[0].limits, Some(iops(7)));
    assert_eq!(on_card(&setup), [Some(iops(7)), None]);

    // They are the VM's: its next start has them, and so does the next controller.
    client.stop_vm(StopVmRequest { vm: "web".into(), ..Default::default() }).await.expect("stop");
    client.set_disk_limits(request("disk1", iops(9))).await.expect("limit a stopped one");
    setup.crash().await;
    let mut client = setup.start().await;
    assert_eq!(shown(&mut client).await, [Some(iops(7)), Some(iops(9))]);
    client.start_vm(StartVmRequest { vm: "web".into() }).await.expect("start");
    assert_eq!(on_card(&setup), [Some(iops(7)), Some(iops(9))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_forgot_them_is_told_again() {
    let (mut setup, mut client) = Setup::new().await;
    client.create_vm(setup.request("web")).await.expect("create");
    client.set_disk_limits(request("disk0", iops(7))).await.expect("limit");
    for device in setup.blk.state().devices.values_mut() {
        device.limits = None;
    }
    setup.crash().await;
    let _client = setup.start().await;
    until("the limits to be back", || on_card(&setup) == [Some(iops(7)), None]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_set_changes_nothing() {
    let (mut setup, mut client) = Setup::new().await;
    client.create_vm(setup.request("web")).await.expect("create");
    let bad = DeviceLimits { bytes_per_second: 1, ..DeviceLimits::default() };
    assert_eq!(reason(client.set_disk_limits(request("disk0", bad)).await), ErrorReason::InvalidField);
    let e = error(client.set_disk_limits(request("disk9", iops(1))).await);
    assert_eq!(e.reason(), ErrorReason::DeviceNotFound);
    assert!(e.message().contains("disk9") && e.fact("remedy").is_some(), "{e}");
    setup.blk.kill().await;
    let dead = client.set_disk_limits(request("disk0", iops(1))).await;
    assert_eq!(reason(dead), ErrorReason::CardUnreachable);
    assert_eq!(shown(&mut client).await, [None, None]);
    setup.crash().await;
    assert_eq!(shown(&mut setup.start().await).await, [None, None]);
}

fn rate_out(bits_per_second_out: u64) -> NetLimits {
    NetLimits { bits_per_second_out, ..NetLimits::default() }
}

fn nic_request(nic: &str, limits: NetLimits) -> SetNicLimitsRequest {
    SetNicLimitsRequest { vm: "web".into(), nic: nic.into(), limits: Some(limits) }
}

fn on_net_card(setup: &Setup) -> Vec<Option<NetLimits>> {
    setup.net.state().devices.values().map(|d| d.net_limits).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interface_has_its_limits_from_its_creation_on_and_keeps_new_ones() {
    let (mut setup, mut client) = Setup::new().await;
    let mut create = setup.request("web");
    create.spec.as_mut().expect("spec").nics[0].limits = Some(rate_out(1_000_000));
    client.create_vm(create).await.expect("create");
    assert_eq!(on_net_card(&setup), [Some(rate_out(1_000_000))]);
    let vm =
        client.set_nic_limits(nic_request("nic0", rate_out(2_000_000))).await.expect("limit").into_inner();
    assert_eq!(vm.spec.expect("spec").nics[0].limits, Some(rate_out(2_000_000)));
    assert_eq!(on_net_card(&setup), [Some(rate_out(2_000_000))]);

    // A disk is no interface, nor the other way round.
    let e = error(client.set_nic_limits(nic_request("disk0", rate_out(2_000_000))).await);
    assert_eq!(e.reason(), ErrorReason::DeviceNotFound);
    let e = error(client.set_disk_limits(request("nic0", iops(1))).await);
    assert_eq!(e.reason(), ErrorReason::DeviceNotFound);
    assert_eq!(
        reason(client.set_nic_limits(nic_request("nic0", rate_out(1))).await),
        ErrorReason::InvalidField
    );

    for device in setup.net.state().devices.values_mut() {
        device.net_limits = None;
    }
    setup.crash().await;
    let mut client = setup.start().await;
    until("the limits to be back", || on_net_card(&setup) == [Some(rate_out(2_000_000))]).await;
    let nics = show(&mut client, "web").await.spec.expect("spec").nics;
    assert_eq!(nics[0].limits, Some(rate_out(2_000_000)));
    client.set_nic_limits(nic_request("nic0", NetLimits::default())).await.expect("unlimit");
    assert_eq!(on_net_card(&setup), [None]);
}
