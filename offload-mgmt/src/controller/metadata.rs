//! What a VM's guest is told about itself.

use proto::error::Error;
use proto::v1::{GuestMetadata, Metadata, NicSpec, VmSpec};

/// Checks what a client wants a guest to be told. A VM of which nothing was said has nothing more to tell than who it is; one
/// that was made before there was anything to tell has none, and keeps it so: its devices stay as they are.
///
/// # Errors
/// INVALID_FIELD with the field's name.
pub(super) fn complete(spec: &mut VmSpec) -> Result<(), Error> {
    let asked = spec.metadata.get_or_insert_default();
    if asked.disabled && *asked != (GuestMetadata { disabled: true, ..Default::default() }) {
        return Err(Error::invalid_field(
            "spec.metadata.disabled",
            "a guest to be told nothing has keys or user data",
        )
        .remedy("leave out one or the other"));
    }
    if asked.disabled {
        return Ok(());
    }
    of_instance("", spec, 0).check().map_err(|e| e.resource(spec.name.clone()))
}

/// What is told by one of a VM's NICs; `None`: nothing.
pub(super) fn of_nic(vm: &str, spec: &VmSpec, number: usize, nic: &NicSpec) -> Option<Metadata> {
    let told = spec.metadata.as_ref().is_some_and(|m| !m.disabled);
    // In a network without a prefix nobody is asked.
    (told && !nic.addresses.is_empty()).then(|| of_instance(vm, spec, number))
}

fn of_instance(vm: &str, spec: &VmSpec, number: usize) -> Metadata {
    let told = spec.metadata.clone().unwrap_or_default();
    Metadata {
        instance_id: instance_id(vm),
        ssh_keys: told.ssh_keys,
        user_data: told.user_data,
        tokens_optional: told.tokens_optional,
        // There are few.
        device_number: number.try_into().unwrap_or(u32::MAX),
        instance_type: format!("outboard.{}c{}m", spec.vcpus, spec.memory_bytes >> 20),
        ..Default::default()
    }
}

/// The VM's id, which is up to 12 digits to the base of 36, as clients know them: `i-` and 17 hexadecimal digits.
fn instance_id(vm: &str) -> String {
    format!("i-{:017x}", u64::from_str_radix(vm, 36).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use proto::v1::SshPublicKey;

    use super::*;

    fn spec(metadata: Option<GuestMetadata>) -> VmSpec {
        VmSpec { name: "web".into(), vcpus: 2, memory_bytes: 1 << 30, metadata, ..VmSpec::default() }
    }

    fn nic(address: &str) -> NicSpec {
        let addresses = if address.is_empty() { vec![] } else { vec![address.to_owned()] };
        NicSpec { addresses, ..NicSpec::default() }
    }

    #[test]
    fn an_instance_id_is_one_vms() {
        assert_eq!(instance_id("000000000010"), "i-00000000000000024");
        // The last of all ids still has its own.
        assert_eq!(instance_id("zzzzzzzzzzzz"), format!("i-{:017x}", 36_u64.pow(12) - 1));
        assert_ne!(instance_id("a00000000000"), instance_id("a00000000001"));
    }

    #[test]
    fn what_is_told_is_told_where_there_are_addresses() {
        let mut asked = spec(None);
        complete(&mut asked).expect("nothing is wrong with nothing");
        let told = of_nic("a1", &asked, 1, &nic("10.0.0.5")).expect("metadata");
        assert_eq!((told.device_number, told.instance_type.as_str()), (1, "outboard.2c1024m"));
        told.check().expect("as the card checks it");
        assert_eq!(of_nic("a1", &asked, 0, &nic("")), None);
        let mut nothing = spec(Some(GuestMetadata { disabled: true, ..Default::default() }));
        complete(&mut nothing).expect("may be");
        assert_eq!(of_nic("a1", &nothing, 0, &nic("10.0.0.5")), None);
        // Made before there was anything to be told.
        assert_eq!(of_nic("a1", &spec(None), 0, &nic("10.0.0.5")), None);
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
        let key = SshPublicKey { name: "k".into(), key: "no key".into() };
        let with_key = GuestMetadata { ssh_keys: vec![key], ..Default::default() };
        let refused = |m: GuestMetadata| complete(&mut spec(Some(m))).expect_err("refused").to_string();
        assert!(refused(with_key.clone()).contains("no public key"));
        assert!(refused(GuestMetadata { disabled: true, ..with_key }).contains("told nothing"));
        assert!(refused(GuestMetadata { user_data: vec![0; 16385], ..Default::default() }).contains("16385"));
    }
}
