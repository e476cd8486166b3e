use proptest::prelude::*;
use proto::error::ErrorReason;

use super::*;

fn minimal() -> VmSpec {
    VmSpec {
        name: "web".into(),
        boot: Some(BootSource { kernel_path: "/boot/vmlinuz".into(), ..BootSource::default() }),
        ..VmSpec::default()
    }
}

fn disk(path: &str) -> DiskSpec {
    DiskSpec { path: path.into(), ..DiskSpec::default() }
}

fn nic(network: &str) -> NicSpec {
    NicSpec { network: network.into(), ..NicSpec::default() }
}

/// The field an error is about.
fn field(result: Result<VmSpec, Error>) -> String {
    let e = result.expect_err("must be refused");
    assert_eq!(e.reason(), ErrorReason::InvalidField);
    assert!(e.fact("remedy").is_some_and(|r| !r.is_empty()), "no remedy: {e}");
    e.fact("field").expect("a field").to_owned()
}

#[test]
fn defaults_are_filled_in() {
    let spec = complete_vm(VmSpec {
        vcpus: 4,
        disks: vec![disk("/a"), disk("/b")],
        nics: vec![nic("default")],
        ..minimal()
    })
    .expect("valid");
    assert_eq!(spec.memory_bytes, 512 << 20);
    assert_eq!(
        spec.disks.iter().map(|d| (d.id.as_str(), d.queues)).collect::<Vec<_>>(),
        [("disk0", 4), ("disk1", 4)]
    );
    assert_eq!((spec.nics[0].id.as_str(), spec.nics[0].queue_pairs), ("nic0", 1));
    assert_eq!(complete_vm(spec.clone()), Ok(spec));
}

#[test]
fn every_bad_field_is_named() {
    let with = |change: fn(&mut VmSpec)| {
        let mut spec = minimal();
        change(&mut spec);
        field(complete_vm(spec))
    };
    assert_eq!(with(|s| s.name.clear()), "spec.name");
    assert_eq!(with(|s| s.name = "Web".into()), "spec.name");
    assert_eq!(with(|s| s.name = "-web".into()), "spec.name");
    assert_eq!(with(|s| s.name = "x".repeat(64)), "spec.name");
    assert_eq!(with(|s| s.vcpus = 5000), "spec.vcpus");
    assert_eq!(with(|s| s.memory_bytes = 3 << 20), "spec.memory_bytes");
    assert_eq!(with(|s| s.memory_bytes = (64 << 20) + 1), "spec.memory_bytes");
    assert_eq!(with(|s| s.boot = None), "spec.boot.kernel_path");
    assert_eq!(
        with(|s| s.boot.as_mut().expect("boot").kernel_path = "vmlinuz".into()),
        "spec.boot.kernel_path"
    );
    assert_eq!(
        with(|s| s.boot.as_mut().expect("boot").initramfs_path = "i".into()),
        "spec.boot.initramfs_path"
    );
    assert_eq!(with(|s| s.boot.as_mut().expect("boot").cmdline = "x".repeat(2048)), "spec.boot.cmdline");
    assert_eq!(with(|s| s.boot.as_mut().expect("boot").cmdline = "a\0b".into()), "spec.boot.cmdline");
    assert_eq!(with(|s| s.disks = vec![disk("a.img")]), "spec.disks[0].path");
    assert_eq!(with(|s| s.disks = vec![disk("/a"), disk("/a")]), "spec.disks");
    assert_eq!(with(|s| s.disks = vec![DiskSpec { queues: 65, ..disk("/a") }]), "spec.disks[0].queues");
    assert_eq!(with(|s| s.nics = vec![nic("")]), "spec.nics[0].network");
    assert_eq!(
        with(|s| s.nics = vec![NicSpec { mac: "01:00:00:00:00:00".into(), ..nic("n") }]),
        "spec.nics[0].mac"
    );
    assert_eq!(with(|s| s.nics = vec![NicSpec { mtu: 20, ..nic("n") }]), "spec.nics[0].mtu");
    assert_eq!(with(|s| s.nics = vec![NicSpec { queue_pairs: 33, ..nic("n") }]), "spec.nics[0].queue_pairs");
    assert_eq!(with(|s| s.nics = vec![NicSpec { id: "a".into(), ..nic("n") }; 2]), "spec");
    assert_eq!(with(|s| s.nics = vec![nic("n"); 32]), "spec");
    let twice = NicSpec { mac: "02:00:00:00:00:01".into(), ..nic("n") };
    assert_eq!(
        field(complete_vm(VmSpec {
            nics: vec![NicSpec { mac: "02:00:00:00:00:01".into(), ..nic("n") }, twice],
            ..minimal()
        })),
        "spec.nics"
    );
}

#[test]
fn an_image_may_be_used_twice_read_only() {
    let read_only = DiskSpec { read_only: true, ..disk("/a") };
    assert!(complete_vm(VmSpec { disks: vec![read_only.clone(), read_only], ..minimal() }).is_ok());
}

struct Names;

impl CardNames for Names {
    fn default_storage(&self) -> &str {
        "blk"
    }
    fn card_of_network(&self, network: &str) -> Option<String> {
        (network == "default").then(|| "net".into())
    }
}

#[test]
fn devices_are_placed_on_their_cards() {
    let mut spec = VmSpec {
        disks: vec![disk("/a"), DiskSpec { card: "fast".into(), ..disk("/b") }],
        nics: vec![nic("default")],
        ..minimal()
    };
    place(&mut spec, &Names).expect("placed");
    assert_eq!(spec.disks.iter().map(|d| d.card.as_str()).collect::<Vec<_>>(), ["blk", "fast"]);
    assert_eq!(spec.nics[0].card, "net");

    let mut unknown = VmSpec { nics: vec![nic("other")], ..minimal() };
    assert_eq!(place(&mut unknown, &Names).expect_err("unknown").reason(), ErrorReason::NetworkNotFound);
    let mut elsewhere = VmSpec { nics: vec![NicSpec { card: "blk".into(), ..nic("default") }], ..minimal() };
    assert_eq!(
        place(&mut elsewhere, &Names).expect_err("elsewhere").fact("field"),
        Some("spec.nics[0].card")
    );
}

#[test]
fn networks_are_checked() {
    let network = |change: fn(&mut NetworkSpec)| {
        let mut spec = NetworkSpec { id: "default".into(), ..NetworkSpec::default() };
        change(&mut spec);
        complete_network(spec).map_err(|e| {
            assert!(e.fact("remedy").is_some_and(|r| !r.is_empty()), "no remedy: {e}");
            e.fact("field").map(str::to_owned)
        })
    };
    assert_eq!(network(|_| ()).expect("valid").mtu, 1500);
    assert!(
        network(
            |s| (s.tap, s.host_addresses) = ("tap0".into(), vec!["10.88.0.1/24".into(), "fd00::1/64".into()])
        )
        .is_ok()
    );
    let field = |change| network(change).expect_err("refused").expect("field");
    assert_eq!(field(|s| s.id = "a_b".into()), "spec.id");
    assert_eq!(field(|s| s.tap = "sixteen-letters-".into()), "spec.tap");
    assert_eq!(field(|s| s.tap = "a/b".into()), "spec.tap");
    assert_eq!(field(|s| s.interface = "a/b".into()), "spec.interface");
    assert_eq!(field(|s| (s.tap, s.interface) = ("t".into(), "eth1".into())), "spec.interface");
    assert_eq!(field(|s| s.host_addresses = vec!["10.0.0.1/24".into()]), "spec.host_addresses");
    assert_eq!(
        field(|s| (s.tap, s.host_addresses) = ("t".into(), vec!["10.0.0.1".into()])),
        "spec.host_addresses"
    );
    assert_eq!(
        field(|s| (s.tap, s.host_addresses) = ("t".into(), vec!["10.0.0.1/33".into()])),
        "spec.host_addresses"
    );
    assert_eq!(field(|s| s.mtu = 67), "spec.mtu");
}

proptest! {
    /// What is accepted is complete: completing it again changes nothing, and every device has an id.
    #[test]
    fn completing_is_idempotent(
        name in "[a-z0-9-]{0,8}", vcpus in 0u32..80, memory in 0u64..64, paths in proptest::collection::vec("/[a-d]", 0..4),
        networks in proptest::collection::vec("[a-z-]{0,3}", 0..4),
    ) {
        let spec = VmSpec {
            name, vcpus, memory_bytes: memory << 20,
            disks: paths.iter().map(|p| disk(p)).collect(),
            nics: networks.iter().map(|n| nic(n)).collect(),
            ..minimal()
        };
        if let Ok(done) = complete_vm(spec) {
            prop_assert!(done.disks.iter().all(|d| !d.id.is_empty() && d.queues > 0));
            prop_assert!(done.nics.iter().all(|n| !n.id.is_empty() && n.queue_pairs > 0));
            prop_assert_eq!(complete_vm(done.clone()), Ok(done));
        }
    }
}
