//! What is at which path: the part of EC2's tree that is true here.
//!
//! What a client finds in a list it may ask for; cloud-init does so with everything, and gives up when it is told that
//! something is not there. So whatever has no value is in no list.

use std::fmt::Display;
use std::io::Write;

use proto::v1::Metadata;

use crate::subnet::{Interface, Subnet};

/// Versions of the tree. What has been added since the first is there in all of them.
const VERSIONS: [&str; 6] = ["1.0", "2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest"];
/// Longest path, in names: /latest/meta-data/network/interfaces/macs/MAC/local-ipv4s.
const DEPTH: usize = 7;
/// What may be directly below `meta-data`.
const LEAVES: [&str; 7] =
    ["hostname", "instance-id", "instance-type", "ipv6", "local-hostname", "local-ipv4", "mac"];
/// What may be known of an interface.
const OF_INTERFACE: [&str; 11] = [
    "device-number",
    "ipv6s",
    "local-hostname",
    "local-ipv4s",
    "mac",
    "subnet-ipv4-cidr-block",
    "subnet-ipv6-cidr-blocks",
    "vpc-id",
    "vpc-ipv4-cidr-block",
    "vpc-ipv4-cidr-blocks",
    "vpc-ipv6-cidr-blocks",
];

/// Whose tree it is.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// What the control plane says.
    pub metadata: &'a Metadata,
    /// The device.
    pub interface: &'a Interface,
    /// Its network.
    pub subnet: &'a Subnet,
}

impl View<'_> {
    /// Writes what is at `path` to `to`; false: nothing is there.
    pub fn get(&self, path: &str, to: &mut Vec<u8>) -> bool {
        let mut names = [""; DEPTH];
        let mut depth = 0;
        for name in path.split('/').filter(|n| !n.is_empty()) {
            match names.get_mut(depth) {
                Some(to) => *to = name,
                None => return false,
            }
            depth += 1;
        }
        match names.get(..depth) {
            Some([]) => list(VERSIONS, to),
            Some([version, rest @ ..]) if VERSIONS.contains(version) => self.below_version(rest, to),
            _ => false,
        }
    }

    fn below_version(&self, names: &[&str], to: &mut Vec<u8>) -> bool {
        let user_data = &self.metadata.user_data;
        match names {
            [] => {
                let has = !user_data.is_empty();
                list(["dynamic", "meta-data"].into_iter().chain(has.then_some("user-data")), to)
            }
            ["meta-data", rest @ ..] => self.meta_data(rest, to),
            ["user-data"] if !user_data.is_empty() => {
                to.extend(user_data);
                true
            }
            ["dynamic"] => list(["instance-identity/"], to),
            ["dynamic", "instance-identity"] => list(["document"], to),
            ["dynamic", "instance-identity", "document"] => self.document(to),
            _ => false,
        }
    }

    fn meta_data(&self, names: &[&str], to: &mut Vec<u8>) -> bool {
        let Self { metadata, interface, .. } = self;
        let keys = &metadata.ssh_keys;
        let zone = &metadata.availability_zone;
        match names {
            [] => {
                let leaves = LEAVES.into_iter().filter(|name| self.leaf(name).is_some());
                let placement = (!zone.is_empty()).then_some("placement/");
                let public_keys = (!keys.is_empty()).then_some("public-keys/");
                list(leaves.chain(["network/"]).chain(placement).chain(public_keys), to)
            }
            ["placement"] if !zone.is_empty() => list(["availability-zone"], to),
            ["placement", "availability-zone"] if !zone.is_empty() => value(zone, to),
            ["public-keys"] if !keys.is_empty() => {
                list(keys.iter().enumerate().map(|(i, key)| format!("{i}={}", key.name)), to)
            }
            ["public-keys", index, rest @ ..] => {
                let key = index.parse().ok().and_then(|i: usize| keys.get(i));
                match (key, rest) {
                    (Some(_), []) => list(["openssh-key"], to),
                    (Some(key), ["openssh-key"]) => value(&key.key, to),
                    _ => false,
                }
            }
            ["network"] => list(["interfaces/"], to),
            ["network", "interfaces"] => list(["macs/"], to),
            ["network", "interfaces", "macs"] => list([format!("{}/", interface.mac)], to),
            ["network", "interfaces", "macs", mac] if self.is_mac(mac) => {
                list(OF_INTERFACE.into_iter().filter(|name| self.of_interface(name).is_some()), to)
            }
            ["network", "interfaces", "macs", mac, name] if self.is_mac(mac) => {
                self.of_interface(name).is_some_and(|text| value(text, to))
            }
            [name] => self.leaf(name).is_some_and(|text| value(text, to)),
            _ => false,
        }
    }

    fn is_mac(&self, text: &str) -> bool {
        text.eq_ignore_ascii_case(&self.interface.mac.to_string())
    }

    /// What is directly below `meta-data`, and has a value.
    fn leaf(&self, name: &str) -> Option<String> {
        let Self { metadata, interface, .. } = self;
        let given = |text: &String| (!text.is_empty()).then(|| text.clone());
        match name {
            "hostname" | "local-hostname" => given(&interface.hostname),
            "instance-id" => given(&metadata.instance_id),
            "instance-type" => given(&metadata.instance_type),
            "local-ipv4" => interface.ipv4.first().map(ToString::to_string),
            "ipv6" => interface.ipv6.first().map(ToString::to_string),
            "mac" => Some(interface.mac.to_string()),
            _ => None,
        }
    }

    /// What is known of the interface.
    fn of_interface(&self, name: &str) -> Option<String> {
        let Self { metadata, interface, subnet } = self;
        match name {
            "device-number" => Some(metadata.device_number.to_string()),
            "ipv6s" => lines(&interface.ipv6),
            "local-hostname" | "mac" => self.leaf(name),
            "local-ipv4s" => lines(&interface.ipv4),
            "subnet-ipv4-cidr-block" | "vpc-ipv4-cidr-block" | "vpc-ipv4-cidr-blocks" => {
                Some(subnet.ipv4.to_string())
            }
            "subnet-ipv6-cidr-blocks" | "vpc-ipv6-cidr-blocks" => subnet.ipv6.map(|net| net.to_string()),
            "vpc-id" => Some(subnet.network.clone()),
            _ => None,
        }
    }

    /// The instance identity document. Nobody signs it here, so there is no signature beside it.
    fn document(&self, to: &mut Vec<u8>) -> bool {
        let address = self.interface.ipv4.first().map(ToString::to_string).unwrap_or_default();
        let of = |name: &'static str, value: &str| (name, value.to_owned());
        let all = [
            of("architecture", std::env::consts::ARCH),
            of("availabilityZone", &self.metadata.availability_zone),
            of("instanceId", &self.metadata.instance_id),
            of("instanceType", &self.metadata.instance_type),
            of("privateIp", &address),
            of("version", "2017-09-30"),
        ];
        // No value has a character that JSON would write in another way: the specification has been checked.
        let pairs =
            all.into_iter().filter(|(_, v)| !v.is_empty()).map(|(n, v)| format!("  \"{n}\" : \"{v}\""));
        value(format!("{{\n{}\n}}", pairs.collect::<Vec<_>>().join(",\n")), to)
    }
}

fn value(text: impl Display, to: &mut Vec<u8>) -> bool {
    // A vector takes everything.
    let _ = write!(to, "{text}");
    true
}

fn lines<T: Display>(values: &[T]) -> Option<String> {
    let text = values.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    (!text.is_empty()).then_some(text)
}

/// One name per line.
fn list<T: Display>(names: impl IntoIterator<Item = T>, to: &mut Vec<u8>) -> bool {
    for (i, name) in names.into_iter().enumerate() {
        let _ = write!(to, "{}{name}", if i == 0 { "" } else { "\n" });
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::v1::{NetworkSpec, SshPublicKey};

    use super::*;
    use crate::mac::MacAddr;

    fn subnet() -> Subnet {
        let spec = NetworkSpec {
            id: "vpc".to_owned(),
            ipv4_prefix: "10.88.0.0/24".to_owned(),
            ipv6_prefix: "fd00:88::/64".to_owned(),
            ..Default::default()
        };
        Subnet::check(&spec, 1500, &[]).unwrap().unwrap()
    }

    fn metadata(everything: bool) -> Metadata {
        let mut metadata = Metadata { instance_id: "i-1".to_owned(), ..Default::default() };
        if everything {
            metadata.instance_type = "outboard-2-1024".to_owned();
            metadata.availability_zone = "host-1".to_owned();
            metadata.user_data = b"#!/bin/sh\n".to_vec();
            let key = |name: &str| SshPublicKey { name: name.to_owned(), key: format!("ssh-x AAAA {name}") };
            metadata.ssh_keys = vec![key("anna"), key("berta")];
        }
        metadata
    }

    fn interface(everything: bool) -> Interface {
        let mut interface = Interface::plain(MacAddr([0x52, 0x54, 0, 0, 0, 0xaa]));
        interface.ipv4 = vec![[10, 88, 0, 7].into()];
        if everything {
            interface.ipv4.push([10, 88, 0, 8].into());
            interface.ipv6 = vec!["fd00:88::7".parse().unwrap()];
            interface.hostname = "web".to_owned();
        }
        interface
    }

    fn with_view<T>(everything: bool, f: impl FnOnce(&dyn Fn(&str) -> Option<String>) -> T) -> T {
        let (metadata, interface, subnet) = (metadata(everything), interface(everything), subnet());
        let view = View { metadata: &metadata, interface: &interface, subnet: &subnet };
        f(&|path| {
            let mut to = Vec::new();
            view.get(path, &mut to).then(|| String::from_utf8(to).unwrap())
        })
    }

    #[test]
    fn values_are_those_of_the_device() {
        with_view(true, |get| {
            let meta = |name: &str| get(&format!("/latest/meta-data/{name}"));
            let is = |name: &str, text: &str| assert_eq!(meta(name).as_deref(), Some(text), "{name}");
            is("instance-id", "i-1");
            is("local-hostname", "web");
            is("local-ipv4", "10.88.0.7");
            is("ipv6", "fd00:88::7");
            is("mac", "52:54:00:00:00:aa");
            is("placement/availability-zone", "host-1");
            is("public-keys/", "0=anna\n1=berta");
            is("public-keys/1/openssh-key", "ssh-x AAAA berta");
            is("network/interfaces/macs/52:54:00:00:00:AA/local-ipv4s", "10.88.0.7\n10.88.0.8");
            is("network/interfaces/macs/52:54:00:00:00:aa/subnet-ipv4-cidr-block", "10.88.0.0/24");
            is("network/interfaces/macs/52:54:00:00:00:aa/vpc-id", "vpc");
            for nothing in [
                "public-keys/2",
                "public-keys/x",
                "public-keys/0/x",
                "x",
                "mac/x",
                "placement/x",
                "network/interfaces/macs/52:54:00:00:00:ab",
                "network/interfaces/macs/52:54:00:00:00:aa/x/y",
            ] {
                assert_eq!(meta(nothing), None, "{nothing}");
            }
            assert_eq!(get("//2021-03-23/meta-data//mac/").as_deref(), Some("52:54:00:00:00:aa"));
            assert_eq!(get("/latest/user-data").as_deref(), Some("#!/bin/sh\n"));
            assert_eq!((get("/1999-01-01/meta-data"), get("/latest/dynamic/x")), (None, None));
            assert!(
                get("/latest/dynamic/instance-identity/document")
                    .unwrap()
                    .contains("\"instanceId\" : \"i-1\"")
            );
        });
        with_view(false, |get| {
            assert_eq!((get("/latest/user-data"), get("/latest/meta-data/public-keys")), (None, None));
            assert_eq!(get("/latest").as_deref(), Some("dynamic\nmeta-data"));
        });
    }

    /// As cloud-init walks the tree (`MetadataMaterializer`): what ends in a slash is a list, "0=name" is a key.
    fn walk(get: &dyn Fn(&str) -> Option<String>, list: &str, seen: &mut Vec<String>) {
        for name in get(list).unwrap_or_else(|| panic!("no list {list}")).lines() {
            let path = match name.split_once('=') {
                Some((index, _)) => format!("{list}{index}/openssh-key"),
                None => format!("{list}{name}"),
            };
            if name.ends_with('/') {
                walk(get, &path, seen);
            } else {
                assert!(get(&path).is_some_and(|text| !text.is_empty()), "{path} is listed and has no value");
            }
            seen.push(path);
        }
    }

    #[test]
    fn whatever_is_listed_is_there() {
        for everything in [false, true] {
            with_view(everything, |get| {
                for version in get("/").unwrap().lines() {
                    let mut seen = Vec::new();
                    walk(get, &format!("/{version}/meta-data/"), &mut seen);
                    assert_eq!(seen.len(), if everything { 27 } else { 16 }, "{seen:#?}");
                    for name in get(&format!("/{version}")).unwrap().lines() {
                        assert!(get(&format!("/{version}/{name}")).is_some());
                    }
                }
            });
        }
    }

    proptest! {
        #[test]
        fn any_path_is_borne(path in "(/?(latest|meta-data|network|interfaces|macs|public-keys|0|[^/]{0,9})/?){0,9}") {
            with_view(true, |get| get(&path));
        }
    }
}
