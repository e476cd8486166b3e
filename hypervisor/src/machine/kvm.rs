//! Opening KVM and checking that it can do what is needed.

use kvm_ioctls::{Cap, Kvm};
use proto::error::{Error, ErrorReason};
use tonic::Code;

/// The only version of the API there is.
const API_VERSION: i32 = 12;

/// What nothing here works without.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

pub(super) fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|e| unavailable(e.errno()))?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(error(format!(
            "/dev/kvm speaks version {version} of the KVM API, {API_VERSION} is needed"
        ))
        .remedy("check what /dev/kvm is"));
    }
    for (cap, name) in NEEDED {
        if !kvm.check_extension(cap) {
            return Err(
                error(format!("the host's KVM lacks {name}")).remedy("use a newer kernel on the host")
            );
        }
    }
    Ok(kvm)
}

fn unavailable(errno: i32) -> Error {
    let (what, remedy) = match errno {
        libc::ENOENT => (
            "/dev/kvm does not exist".to_owned(),
            "enable virtualization in the firmware and load kvm_intel or kvm_amd; in a virtual machine, enable nested virtualization",
        ),
        libc::EACCES | libc::EPERM => {
            ("/dev/kvm may not be opened".to_owned(), "run the hypervisor as a user in group kvm")
        }
        _ => (
            format!("/dev/kvm cannot be opened: {}", std::io::Error::from_raw_os_error(errno)),
            "check that kvm_intel or kvm_amd is loaded and virtualization is enabled in the firmware",
        ),
    };
    error(what).with("errno", errno.to_string()).remedy(remedy)
}

fn error(message: String) -> Error {
    Error::new(Code::FailedPrecondition, ErrorReason::KvmUnavailable, message).resource("/dev/kvm")
}

/// An error of a call to KVM that works on a healthy host.
pub(super) fn failed(what: &str, e: impl Into<std::io::Error>) -> Error {
    let e = e.into();
    Error::new(Code::Internal, ErrorReason::Host, format!("{what} failed: {e}"))
        .with("errno", e.raw_os_error().unwrap_or(0).to_string())
        .remedy("see the host's kernel log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_kvm_is_said_with_a_remedy() {
        for (errno, what, remedy) in [
            (libc::ENOENT, "does not exist", "load kvm_intel"),
            (libc::EACCES, "may not be opened", "group kvm"),
            (libc::ENODEV, "cannot be opened", "loaded"),
        ] {
            let error = unavailable(errno);
            assert_eq!(error.reason(), ErrorReason::KvmUnavailable);
            assert!(error.to_string().contains(what) && error.to_string().contains(remedy), "{error}");
        }
    }
}
