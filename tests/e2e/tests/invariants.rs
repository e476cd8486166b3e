//! The invariants of ARCHITECTURE.md that can be read off the source.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("workspace root").to_owned()
}

/// Dependencies of a member on other members, as its manifest has them.
fn members_it_uses(member: &str) -> BTreeSet<String> {
    let members =
        ["hypervisor", "offload-blk", "offload-card", "offload-mgmt", "offload-net", "proto", "e2e", "guest"];
    let manifest = std::fs::read_to_string(root().join(member).join("Cargo.toml")).expect("manifest");
    let names = manifest.lines().filter_map(|l| l.split(['.', '=', ' ']).next());
    names.filter(|n| members.contains(n) && *n != member).map(str::to_owned).collect()
}

#[test]
fn the_dependency_rule_holds() {
    let allowed = [
        ("proto", vec![]),
        ("hypervisor", vec!["proto"]),
        ("offload-card", vec!["proto"]),
        ("offload-blk", vec!["offload-card", "proto"]),
        ("offload-net", vec!["offload-card", "proto"]),
        ("offload-mgmt", vec!["proto"]),
    ];
    for (member, allowed) in allowed {
        let used = members_it_uses(member);
        let extra: Vec<_> = used.iter().filter(|u| !allowed.contains(&u.as_str())).collect();
        assert!(extra.is_empty(), "{member} must not depend on {extra:?}");
    }
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("source directory") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Invariant 2: neither a slot nor the platform around it knows a device type.
#[test]
fn the_slot_code_names_no_device_type() {
    let mut files = Vec::new();
    for part in ["slot", "platform"] {
        let before = files.len();
        rust_files(&root().join("hypervisor/src").join(part), &mut files);
        assert!(files.len() > before, "{part} has no source");
    }
    for file in files {
        let source = std::fs::read_to_string(&file).expect("source").to_lowercase().replace("unix::net", "");
        let words = source.split(|c: char| !c.is_ascii_alphanumeric());
        let found: Vec<_> =
            words.filter(|w| ["blk", "net", "disk", "nic", "storage", "network"].contains(w)).collect();
        assert!(found.is_empty(), "{} says {found:?}", file.display());
    }
}
