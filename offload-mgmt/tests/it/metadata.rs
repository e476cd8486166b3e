//! What a guest is to be told: from the command line to the network card.

use std::process::{Command, Output};

use crate::support::{Setup, error, show, text};
use proto::v1::{
    CreateNetworkRequest, GetVmRequest, GuestMetadata, ListVmsRequest, Metadata, NetworkSpec, NicSpec,
};

const KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHUTq9vy7AmBqPcqvXG8Ho5Wn2cJ0y7b3lRnVf1dJkXq anna@home";

async fn with_network() -> (Setup, crate::support::Client) {
    let (setup, mut client) = Setup::new().await;
    let spec = NetworkSpec { id: "vpc".into(), ipv4_prefix: "10.0.0.0/24".into(), ..NetworkSpec::default() };
    let request = CreateNetworkRequest { spec: Some(spec), ..CreateNetworkRequest::default() };
    client.create_network(request).await.expect("network");
    (setup, client)
}

/// What the network card was told to tell by a NIC.
fn told(setup: &Setup, vm: &str, slot: &str) -> Option<Metadata> {
    let spec = setup.net.state().devices.get(&format!("{vm}-{slot}")).expect("device").clone();
    let Some(proto::v1::device_spec::Kind::Net(net)) = spec.kind else { panic!("no NIC") };
    net.metadata
}

async fn create(setup: &Setup, name: &str, options: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
    command
        .arg("--socket")
        .arg(setup.api_socket())
        .args(["vm", "create", name, "--memory", "64M", "--kernel"]);
    command.arg(setup.kernel()).args(options).env_remove("OUTBOARD_SOCKET");
    tokio::task::spawn_blocking(move || command.output()).await.expect("task").expect("run")
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_user_data_reach_the_card() {
    let (setup, mut client) = with_network().await;
    let file = |name: &str, bytes: &[u8]| {
        let path = setup.dir.path().join(name);
        std::fs::write(&path, bytes).expect("write");
        text(&path)
    };
    let (keys, data) = (file("keys", format!("{KEY}\n").as_bytes()), file("data", b"#!/bin/sh\n\xff"));
    let options = [
        "--nic",
        "default",
        "--nic",
        "vpc",
        "--ssh-key",
        &keys,
        "--user-data",
        &data,
        "--metadata-tokens",
        "optional",
    ];
    let output = create(&setup, "web", &options).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let vm = show(&mut client, "web").await;
    assert_eq!(told(&setup, &vm.id, "nic0"), None);
    let metadata = told(&setup, &vm.id, "nic1").expect("metadata");
    assert_eq!((metadata.user_data.as_slice(), metadata.tokens_optional), (&b"#!/bin/sh\n\xff"[..], true));
    let key = &metadata.ssh_keys[0];
    assert_eq!((key.name.as_str(), key.key.as_str(), metadata.device_number), ("anna@home", KEY, 1));
    assert!(metadata.instance_id.starts_with("i-") && metadata.instance_id.len() == 19);
    // A list of all VMs is not the place for what may be long and secret.
    let listed = client.list_vms(ListVmsRequest {}).await.expect("list").into_inner().vms.swap_remove(0);
    let listed = listed.spec.and_then(|s| s.metadata).expect("metadata");
    assert!(listed.user_data.is_empty() && listed.ssh_keys.len() == 1);
    let shown = vm.spec.and_then(|s| s.metadata).expect("metadata");
    assert!(!shown.user_data.is_empty());

    let output = create(&setup, "plain", &["--nic", "vpc"]).await;
    assert!(output.status.success());
    let plain = show(&mut client, "plain").await;
    let other = told(&setup, &plain.id, "nic0").expect("metadata");
    assert!(!other.tokens_optional && other.ssh_keys.is_empty() && other.instance_id != metadata.instance_id);
    let output = create(&setup, "silent", &["--nic", "vpc", "--no-metadata"]).await;
    assert!(output.status.success());
    let silent = show(&mut client, "silent").await;
    assert_eq!(told(&setup, &silent.id, "nic0"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_told_is_refused_before_anything_is_made() {
    let (setup, mut client) = with_network().await;
    let private = setup.dir.path().join("private");
    std::fs::write(&private, "-----BEGIN OPENSSH PRIVATE KEY-----\n").expect("write");
    for (options, status, says) in [
        (&["--ssh-key", &text(&private)][..], 1, "private key"),
        (&["--ssh-key", "/nowhere"], 1, "cannot read /nowhere"),
        (&["--user-data", "/dev/zero"], 1, "longer than 16384 bytes"),
        (&["--no-metadata", "--ssh-key", KEY], 2, "cannot be used with"),
    ] {
        let output = create(&setup, "web", &[&["--nic", "vpc"][..], options].concat()).await;
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(status) && err.contains(says), "{options:?}: {err}");
    }
    let mut request = setup.request("web");
    let spec = request.spec.as_mut().expect("spec");
    spec.nics = vec![NicSpec { network: "vpc".into(), ..NicSpec::default() }];
    spec.metadata = Some(GuestMetadata { user_data: vec![0; 16385], ..Default::default() });
    let e = error(client.create_vm(request).await);
    assert_eq!(e.fact("field"), Some("metadata.user_data"), "{e}");
    assert!(client.get_vm(GetVmRequest { vm: "web".into() }).await.is_err());
    setup.assert_nothing_left(&mut client).await;
}
