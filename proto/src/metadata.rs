//! What a guest may be told about itself: the same to whoever asks for it and to whoever tells it.

use crate::error::Error;
use crate::v1::{Metadata, SshPublicKey};

/// Most public keys.
pub const KEYS_MAX: usize = 16;
/// Longest public key in bytes: RSA of 8192 bits is 1400 bytes, and there is a comment.
pub const KEY_MAX: usize = 2048;
/// Longest name: of a key, an instance, its type, its place.
pub const NAME_MAX: usize = 64;
/// Most user data in bytes; EC2 has the same limit.
pub const USER_DATA_MAX: usize = 16 << 10;

impl Metadata {
    /// Whether it can be told.
    ///
    /// # Errors
    /// INVALID_FIELD, by name.
    pub fn check(&self) -> Result<(), Error> {
        named("instance_id", &self.instance_id, "")?;
        for (field, text) in
            [("instance_type", &self.instance_type), ("availability_zone", &self.availability_zone)]
        {
            if !text.is_empty() {
                named(field, text, "")?;
            }
        }
        if self.ssh_keys.len() > KEYS_MAX {
            let what = format!("{} public keys are more than {KEYS_MAX}", self.ssh_keys.len());
            return Err(Error::invalid_field("metadata.ssh_keys", what)
                .remedy("let the guest fetch the others, e.g. by user data"));
        }
        for (i, key) in self.ssh_keys.iter().enumerate() {
            key.check()?;
            if self.ssh_keys.iter().take(i).any(|other| other.name == key.name) {
                let what = format!("two public keys are called {}", key.name);
                return Err(Error::invalid_field("metadata.ssh_keys.name", what)
                    .remedy("give each key a name of its own"));
            }
        }
        if self.user_data.len() > USER_DATA_MAX {
            let what = format!("{} bytes of user data are more than {USER_DATA_MAX}", self.user_data.len());
            return Err(Error::invalid_field("metadata.user_data", what)
                .remedy("compress it, which cloud-init understands, or let the guest fetch what is large"));
        }
        Ok(())
    }
}

impl SshPublicKey {
    /// Whether it is a line of an `authorized_keys` file as to its form: a type, base64 that begins as a key of any type
    /// does, and perhaps a comment. Whether it is a key that anybody has the other half of, only the guest's SSH server
    /// will tell.
    ///
    /// # Errors
    /// INVALID_FIELD, by name.
    pub fn check(&self) -> Result<(), Error> {
        named("ssh_keys.name", &self.name, "@_+")?;
        let bad = |why: &str| {
            Err(Error::invalid_field("metadata.ssh_keys.key", format!("SSH key {}: {why}", self.name))
                .remedy(
                    "give a public key as ssh-keygen writes it, e.g. the contents of ~/.ssh/id_ed25519.pub",
                ))
        };
        if self.key.contains("PRIVATE KEY") {
            return bad("this is a private key, which nobody else is to have");
        }
        if self.key.len() > KEY_MAX || self.key.chars().any(char::is_control) {
            return bad("it is not one line of up to 2048 bytes");
        }
        let mut words = self.key.split(' ');
        let in_type = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '@');
        let has_type = words.next().is_some_and(|t| t.contains('-') && t.chars().all(in_type));
        // Its first four bytes are the length of the type's name, which is short.
        let in_base64 = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '=');
        let has_key = words.next().is_some_and(|k| {
            k.starts_with("AAAA") && k.len() >= 32 && k.len() % 4 == 0 && k.chars().all(in_base64)
        });
        if has_type && has_key { Ok(()) } else { bad("it is no public key of OpenSSH's") }
    }
}

fn named(field: &str, text: &str, more: &str) -> Result<(), Error> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".-".contains(c) || more.contains(c);
    if (1..=NAME_MAX).contains(&text.len()) && text.chars().all(allowed) {
        return Ok(());
    }
    let what = format!("{text:?} is not 1 to {NAME_MAX} characters of A-Z, a-z, 0-9 and .-{more}");
    Err(Error::invalid_field(&format!("metadata.{field}"), what)
        .remedy("choose another, of these characters"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHUTq9vy7AmBqPcqvXG8Ho5Wn2cJ0y7b3lRnVf1dJkXq anna@example.org";

    fn key(name: &str, key: &str) -> SshPublicKey {
        SshPublicKey { name: name.to_owned(), key: key.to_owned() }
    }

    fn good() -> Metadata {
        let ssh_keys = vec![key("anna", KEY), key("b@c_d+e", KEY.trim_end_matches(" anna@example.org"))];
        Metadata { instance_id: "i-0123456789abcdef0".to_owned(), ssh_keys, ..Default::default() }
    }

    #[test]
    fn what_cannot_be_told_is_refused_by_name() {
        good().check().unwrap();
        let refused = |edit: fn(&mut Metadata)| {
            let mut metadata = good();
            edit(&mut metadata);
            let e = metadata.check().unwrap_err();
            format!("{} {}", e.fact("field").unwrap(), e.message())
        };
        assert!(refused(|m| m.instance_id.clear()).contains("metadata.instance_id"));
        assert!(refused(|m| m.instance_id = "i\n".to_owned()).contains("metadata.instance_id"));
        assert!(refused(|m| m.instance_type = "a b".to_owned()).contains("metadata.instance_type"));
        assert!(refused(|m| m.availability_zone = "x".repeat(65)).contains("metadata.availability_zone"));
        assert!(refused(|m| m.ssh_keys[1].name = "anna".to_owned()).contains("two public keys"));
        assert!(refused(|m| m.ssh_keys[1].name = "a=b".to_owned()).contains("metadata.ssh_keys.name"));
        assert!(refused(|m| m.user_data = vec![0; USER_DATA_MAX + 1]).contains("16385 bytes"));
        let many = refused(|m| m.ssh_keys = (0..17).map(|i| key(&format!("k{i}"), KEY)).collect());
        assert!(many.contains("17 public keys"), "{many}");
    }

    #[test]
    fn public_keys_are_told_from_what_is_none() {
        for good in [
            KEY,
            "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQ==",
            "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29t",
        ] {
            key("k", good).check().unwrap();
        }
        let private = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk=";
        assert!(key("k", private).check().unwrap_err().message().contains("private key"));
        let long = format!("{KEY} {}", "x".repeat(KEY_MAX));
        let two_lines = format!("{KEY}\n{KEY}");
        for bad in [
            "",
            "ssh-ed25519",
            "ssh-ed25519 AAAA",
            "hello AAAAC3NzaC1lZDI1NTE5AAAAIHUTq9vy7AmB",
            "ssh-rsa BBBBB3NzaC1yc2EAAAADAQABAAABAQ==",
            "ssh-rsa AAAAB3NzaC1yc2E_AAADAQABAAABAQ==",
            &long,
            &two_lines,
        ] {
            assert!(key("k", bad).check().is_err(), "{bad}");
        }
    }
}
