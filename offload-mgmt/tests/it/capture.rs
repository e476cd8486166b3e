//! Captures: what the card says reaches the client as it is.

use proto::error::ErrorReason;
use proto::v1::{CaptureNicRequest, CapturePart, StopVmRequest};

use crate::support::{Setup, error};

fn request(nic: &str) -> CaptureNicRequest {
    CaptureNicRequest { vm: "web".into(), nic: nic.into(), snap_bytes: 96, frames: 3 }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_is_passed_on_to_its_end() {
    let (setup, mut client) = Setup::new().await;
    let vm = client.create_vm(setup.request("web")).await.expect("create").into_inner();
    for nic in ["", "nic0"] {
        let mut parts = client.capture_nic(request(nic)).await.expect("capture").into_inner();
        for frames in 1..=3 {
            let pcapng = format!("{frames} {}-nic0 96 3;", vm.id).into_bytes();
            let part = parts.message().await.expect("a part");
            assert_eq!(part, Some(CapturePart { pcapng, frames, lost: 0 }));
        }
        assert_eq!(parts.message().await.expect("the end"), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_captured_is_said_at_once() {
    let (setup, mut client) = Setup::new().await;
    let mut create = setup.request("web");
    let spec = create.spec.as_mut().expect("spec");
    spec.nics.push(spec.nics[0].clone());
    client.create_vm(create).await.expect("create");
    let e = error(client.capture_nic(request("")).await);
    assert_eq!(e.reason(), ErrorReason::DeviceNotFound);
    assert!(e.fact("remedy").is_some_and(|r| r.contains("nic0, nic1")), "{e}");
    let e = error(client.capture_nic(request("disk0")).await);
    assert!(e.message().contains("disk0"), "{e}");
    client.stop_vm(StopVmRequest { vm: "web".into(), ..Default::default() }).await.expect("stop");
    let e = error(client.capture_nic(request("nic0")).await);
    assert_eq!(e.reason(), ErrorReason::WrongState);
}
