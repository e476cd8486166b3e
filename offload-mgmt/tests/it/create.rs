//! CreateVm: everything or nothing, once per token.

use std::time::Duration;

use crate::support::card::FakeCard;
use crate::support::hypervisor::Behaviour;
use crate::support::{Setup, error, next_event, reason, show, watch};
use proto::error::ErrorReason;
use proto::v1::{
    CreateNetworkRequest, CreateVmRequest, DeleteNetworkRequest, DeleteVmRequest, DiskSpec, GetVmRequest,
    ListVmsRequest, NetworkSpec, NicSpec, StartVmRequest, StopVmRequest, VmState,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_gets_its_devices_and_slots_and_runs() {
    let (setup, mut client) = Setup::new().await;
    let vm = client.create_vm(setup.request("web")).await.expect("create").into_inner();
    assert_eq!((vm.state(), vm.hypervisor_pid, vm.id.len()), (VmState::Running, 4711, 12));
    assert!(vm.started_us >= vm.created_us && vm.created_us > 0);
    assert_eq!(vm.slots.iter().map(|s| s.id.as_str()).collect::<Vec<_>>(), ["disk0", "disk1", "nic0"]);
    assert_eq!(setup.blk.devices(), [format!("{}-disk0", vm.id), format!("{}-disk1", vm.id)]);
    assert_eq!(setup.net.devices(), [format!("{}-nic0", vm.id)]);

    let config = setup.runner.process(&vm.id).config();
    assert_eq!((config.vm_id.as_str(), config.vcpus, config.memory_bytes), (vm.id.as_str(), 1, 64 << 20));
    let slots: Vec<_> = config.slots.iter().map(|s| (s.virtio_device_id, s.queues, s.config_size)).collect();
    assert_eq!(slots, [(2, 1, 60), (2, 1, 60), (1, 2, 12)]);
    assert_eq!(config.slots[0].socket_path, format!("/devices/{}-disk0.sock", vm.id));

    // By id as by name; the MAC that was chosen is told.
    let shown = show(&mut client, &vm.id).await;
    assert_eq!(shown.spec, vm.spec);
    assert!(shown.spec.expect("spec").nics[0].mac.starts_with("02:"));

    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: true }).await.expect("delete");
    setup.assert_nothing_left(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_at_any_step_leaves_nothing_and_is_told_as_it_was() {
    let (mut setup, mut client) = Setup::new().await;
    let died = || Some("no /dev/kvm here".to_owned());
    type Step = (&'static str, fn(&Setup), Behaviour, ErrorReason, &'static str);
    let steps: [Step; 8] = [
        (
            "validation",
            |s| assert!(s.blk.state().refuse_validation.insert("disk1".into())),
            Behaviour::default(),
            ErrorReason::DiskInvalid,
            "disk1 was refused",
        ),
        (
            "the second disk",
            |s| assert!(s.blk.state().refuse.insert("disk1".into())),
            Behaviour::default(),
            ErrorReason::DiskInvalid,
            "disk1 was refused",
        ),
        (
            "the NIC",
            |s| assert!(s.net.state().refuse.insert("nic0".into())),
            Behaviour::default(),
            ErrorReason::DiskInvalid,
            "nic0 was refused",
        ),
        (
            "the process",
            |_| (),
            Behaviour { exits_at_once: died(), ..Behaviour::default() },
            ErrorReason::HypervisorUnreachable,
            "no /dev/kvm here",
        ),
        (
            "its socket",
            |_| (),
            Behaviour { never_listens: true, ..Behaviour::default() },
            ErrorReason::HypervisorUnreachable,
            "does not listen",
        ),
        (
            "Configure",
            |_| (),
            Behaviour { refuse_configure: true, ..Behaviour::default() },
            ErrorReason::KernelInvalid,
            "Configure was refused",
        ),
        (
            "the process in Configure",
            |_| (),
            Behaviour { dies_in_configure: true, ..Behaviour::default() },
            ErrorReason::HypervisorUnreachable,
            "something terrible",
        ),
        (
            "Boot",
            |_| (),
            Behaviour { refuse_boot: true, ..Behaviour::default() },
            ErrorReason::KernelInvalid,
            "Boot was refused",
        ),
    ];
    for (step, prepare, behaviour, reason, says) in steps {
        prepare(&setup);
        setup.runner.behave(behaviour);
        let e = error(client.create_vm(setup.request("web")).await);
        assert_eq!(e.reason(), reason, "{step}: {e}");
        assert!(e.message().contains(says), "{step}: {e}");
        setup.assert_nothing_left(&mut client).await;
        for card in [&setup.blk, &setup.net] {
            let mut state = card.state();
            state.refuse.clear();
            state.refuse_validation.clear();
        }
        setup.runner.behave(Behaviour::default());
    }
    // Nor in the database; and the name is free.
    setup.stop().await;
    let mut client = setup.start().await;
    setup.assert_nothing_left(&mut client).await;
    client.create_vm(setup.request("web")).await.expect("create");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_work_is_refused_before_anything_is_done() {
    let (setup, mut client) = Setup::new().await;
    let refused = |change: fn(&mut CreateVmRequest)| {
        let mut request = setup.request("web");
        change(&mut request);
        let mut client = client.clone();
        async move { reason(client.create_vm(request).await) }
    };
    macro_rules! spec {
        ($r:ident) => {
            $r.spec.as_mut().expect("spec")
        };
    }
    assert_eq!(refused(|r| r.spec = None).await, ErrorReason::InvalidField);
    assert_eq!(
        refused(|r| spec!(r).boot.as_mut().expect("boot").kernel_path = "/no/kernel".into()).await,
        ErrorReason::KernelNotFound
    );
    assert_eq!(
        refused(|r| spec!(r).boot.as_mut().expect("boot").kernel_path = "/etc/passwd".into()).await,
        ErrorReason::KernelInvalid
    );
    assert_eq!(
        refused(|r| spec!(r).boot.as_mut().expect("boot").initramfs_path = "/no/initrd".into()).await,
        ErrorReason::InitramfsNotFound
    );
    assert_eq!(refused(|r| spec!(r).memory_bytes = 1 << 50).await, ErrorReason::NotEnoughMemory);
    assert_eq!(refused(|r| spec!(r).nics[0].network = "other".into()).await, ErrorReason::NetworkNotFound);
    assert_eq!(refused(|r| spec!(r).disks[0].card = "other".into()).await, ErrorReason::InvalidField);
    assert_eq!(refused(|r| spec!(r).disks[0].card = "net".into()).await, ErrorReason::InvalidField);
    assert_eq!(refused(|r| r.client_token = "x".repeat(65)).await, ErrorReason::InvalidField);
    setup.assert_nothing_left(&mut client).await;
    assert_eq!(setup.blk.state().made, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_makes_one_vm() {
    let (mut setup, mut client) = Setup::new().await;
    setup.runner.behave(Behaviour { configure_takes: Duration::from_millis(200), ..Behaviour::default() });
    let request = CreateVmRequest { client_token: "t1".into(), ..setup.request("web") };
    // Also while the first is being made.
    let (mut one, mut two) = (client.clone(), client.clone());
    let (first, second) = tokio::join!(one.create_vm(request.clone()), two.create_vm(request.clone()));
    let id = first.expect("first").into_inner().id;
    assert_eq!(second.expect("second").into_inner().id, id);
    // And after a restart of the controller.
    setup.stop().await;
    let mut client2 = setup.start().await;
    assert_eq!(client2.create_vm(request).await.expect("third").into_inner().id, id);
    client = client2;
    assert_eq!(client.list_vms(ListVmsRequest {}).await.expect("list").into_inner().vms.len(), 1);

    let other = CreateVmRequest { client_token: "t1".into(), ..setup.request("other") };
    assert_eq!(reason(client.create_vm(other).await), ErrorReason::TokenReused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_whose_vm_failed_may_be_used_again() {
    let (setup, mut client) = Setup::new().await;
    let request = CreateVmRequest { client_token: "t1".into(), ..setup.request("web") };
    setup.runner.behave(Behaviour { refuse_boot: true, ..Behaviour::default() });
    assert_eq!(reason(client.create_vm(request.clone()).await), ErrorReason::KernelInvalid);
    setup.runner.behave(Behaviour::default());
    client.create_vm(request).await.expect("create");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_macs_and_images_are_used_once() {
    let (setup, mut client) = Setup::new().await;
    let nic = NicSpec { network: "default".into(), mac: "02:00:00:00:00:01".into(), ..NicSpec::default() };
    let mut first = setup.request("web");
    first.spec.as_mut().expect("spec").nics = vec![nic.clone()];
    client.create_vm(first).await.expect("create");

    assert_eq!(reason(client.create_vm(setup.request("web")).await), ErrorReason::VmExists);
    let mut same_mac = setup.request("db");
    same_mac.spec.as_mut().expect("spec").nics = vec![nic];
    assert_eq!(reason(client.create_vm(same_mac).await), ErrorReason::InvalidField);
    let mut same_image = setup.request("db");
    same_image.spec.as_mut().expect("spec").disks =
        vec![DiskSpec { path: "/images/web-0".into(), read_only: true, ..DiskSpec::default() }];
    assert_eq!(reason(client.create_vm(same_image.clone()).await), ErrorReason::DiskInUse);

    // Defining it is no conflict, starting it is, until the other one is stopped.
    client.create_vm(CreateVmRequest { no_start: true, ..same_image }).await.expect("define");
    let start = StartVmRequest { vm: "db".into() };
    assert_eq!(reason(client.start_vm(start.clone()).await), ErrorReason::DiskInUse);
    assert_eq!(show(&mut client, "db").await.state(), VmState::Stopped);
    client.stop_vm(StopVmRequest { vm: "web".into(), ..StopVmRequest::default() }).await.expect("stop");
    client.start_vm(start).await.expect("start");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_are_made_at_once() {
    let (setup, client) = Setup::new().await;
    let made: Vec<_> = (0..20)
        .map(|n| {
            let (request, mut client) = (setup.request(&format!("vm{n}")), client.clone());
            tokio::spawn(async move { client.create_vm(request).await.map(|r| r.into_inner().id) })
        })
        .collect();
    let mut ids = std::collections::HashSet::new();
    for id in made {
        ids.insert(id.await.expect("task").expect("create"));
    }
    assert_eq!(ids.len(), 20);
    assert_eq!(setup.blk.devices().len(), 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn ending_a_vm_interrupts_its_creation() {
    let (setup, mut client) = Setup::new().await;
    setup.runner.behave(Behaviour { hangs: true, ..Behaviour::default() });
    let (request, mut creator) = (setup.request("web"), client.clone());
    let creation = tokio::spawn(async move { creator.create_vm(request).await });
    crate::support::until("a process", || !setup.runner.processes().is_empty()).await;
    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: true }).await.expect("delete");
    let e = error(creation.await.expect("task"));
    assert!(e.message().contains("was stopped while it started"), "{e}");
    setup.assert_nothing_left(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_leaves_no_half_made_vm() {
    let (setup, mut client) = Setup::new().await;
    setup.runner.behave(Behaviour { configure_takes: Duration::from_millis(300), ..Behaviour::default() });
    let (request, mut creator) = (setup.request("web"), client.clone());
    let creation = tokio::spawn(async move { creator.create_vm(request).await });
    crate::support::until("a process", || !setup.runner.processes().is_empty()).await;
    creation.abort();
    crate::support::wait_for(&mut client, "web", VmState::Running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn creation_is_told_in_order() {
    let (setup, mut client) = Setup::new().await;
    let mut events = watch(&mut client, "").await;
    client.create_vm(setup.request("web")).await.expect("create");
    for expected in ["created", "STARTING", "RUNNING"] {
        assert_eq!(next_event(&mut events).await, expected);
    }
    setup.runner.behave(Behaviour { refuse_boot: true, ..Behaviour::default() });
    assert!(client.create_vm(setup.request("db")).await.is_err());
    for expected in ["created", "STARTING", "deleted"] {
        assert_eq!(next_event(&mut events).await, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_in_use_stays() {
    let (setup, mut client) = Setup::new().await;
    client.create_vm(CreateVmRequest { no_start: true, ..setup.request("web") }).await.expect("define");
    let delete = DeleteNetworkRequest { id: "default".into() };
    assert_eq!(reason(client.delete_network(delete.clone()).await), ErrorReason::NetworkInUse);
    client.delete_vm(DeleteVmRequest { vm: "web".into(), force: false }).await.expect("delete");
    client.delete_network(delete.clone()).await.expect("delete");
    assert_eq!(reason(client.delete_network(delete).await), ErrorReason::NetworkNotFound);
    assert!(setup.net.state().networks.is_empty());
    assert_eq!(reason(client.get_vm(GetVmRequest { vm: "web".into() }).await), ErrorReason::VmNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_come_from_the_networks_prefix_and_stay() {
    let (mut setup, mut client) = Setup::new().await;
    let network = |id: &str, ipv4_prefix: &str| {
        let spec = NetworkSpec { id: id.into(), ipv4_prefix: ipv4_prefix.into(), ..NetworkSpec::default() };
        CreateNetworkRequest { spec: Some(spec), ..CreateNetworkRequest::default() }
    };
    assert_eq!(reason(client.create_network(network("bad", "10.0.0.0")).await), ErrorReason::InvalidField);
    client.create_network(network("vpc", "10.0.0.0/29")).await.expect("network");
    let vm = |name: &str, nics: &[(&str, &[&str])]| {
        let mut request = setup.request(name);
        let nic = |(network, addresses): &(&str, &[&str])| NicSpec {
            network: (*network).into(),
            addresses: addresses.iter().map(|a| (*a).into()).collect(),
            ..NicSpec::default()
        };
        request.spec.as_mut().expect("spec").nics = nics.iter().map(nic).collect();
        request
    };
    // What is asked for is not given to another, whatever the order.
    let both = vm("web", &[("vpc", &[]), ("vpc", &["10.0.0.2"]), ("default", &[])]);
    let web = client.create_vm(both).await.expect("create").into_inner();
    let nics = web.spec.expect("spec").nics;
    let addresses: Vec<_> = nics.iter().map(|n| n.addresses.join(" ")).collect();
    assert_eq!(addresses, ["10.0.0.3", "10.0.0.2", ""]);
    let told = |card: &FakeCard, slot: &str| {
        let spec = card.state().devices.iter().find(|(id, _)| id.ends_with(slot)).expect("device").1.clone();
        let Some(proto::v1::device_spec::Kind::Net(net)) = spec.kind else { panic!("no NIC") };
        (net.addresses, net.hostname)
    };
    assert_eq!(told(&setup.net, "nic0"), (vec!["10.0.0.3".to_owned()], "web".to_owned()));
    assert_eq!(told(&setup.net, "nic2"), (vec![], String::new()));

    for (addresses, says) in [
        (&["10.0.0.2"][..], "is another NIC's or the gateway's"),
        (&["10.0.0.1"], "is another NIC's or the gateway's"),
        (&["10.0.0.4/29"], "no IP address"),
    ] {
        let e = error(client.create_vm(vm("db", &[("vpc", addresses)])).await);
        assert!(e.message().contains(says) && e.fact("remedy").is_some(), "{e}");
    }
    let e = error(client.create_vm(vm("db", &[("default", &["10.0.0.4"])])).await);
    assert!(e.message().contains("has no prefix"), "{e}");

    // Another controller knows who has what.
    let more = [vm("a", &[("vpc", &[])]), vm("b", &[("vpc", &[]), ("vpc", &[])]), vm("c", &[("vpc", &[])])];
    setup.stop().await;
    let mut client = setup.start().await;
    let mut given = Vec::new();
    let [a, b, c] = more;
    for request in [a, b] {
        let vm = client.create_vm(request).await.expect("create").into_inner();
        given.extend(vm.spec.expect("spec").nics.into_iter().flat_map(|n| n.addresses));
    }
    assert_eq!(given, ["10.0.0.4", "10.0.0.5", "10.0.0.6"]);
    let e = error(client.create_vm(c.clone()).await);
    assert!(e.message().contains("no address left"), "{e}");
    client.delete_vm(DeleteVmRequest { vm: "a".into(), force: true }).await.expect("delete");
    let vm = client.create_vm(c).await.expect("create").into_inner();
    assert_eq!(vm.spec.expect("spec").nics[0].addresses, ["10.0.0.4"]);
}
