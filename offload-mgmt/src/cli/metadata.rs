//! What a VM's guest is to be told: keys and files that are named on the command line.

use std::io::Read;
use std::path::Path;

use proto::metadata::{NAME_MAX, USER_DATA_MAX};
use proto::v1::{GuestMetadata, SshPublicKey};

use super::args::{Create, Tokens};
use super::failure::Failure;

/// More than all keys together may be.
const KEYS_FILE_MAX: usize = 64 << 10;

/// Reads what `outboard vm create` names.
///
/// # Errors
/// A file that cannot be read, or no key in it.
pub(super) fn of(options: &Create) -> Result<GuestMetadata, Failure> {
    let mut metadata = GuestMetadata {
        disabled: options.no_metadata,
        tokens_optional: options.metadata_tokens == Tokens::Optional,
        ..Default::default()
    };
    for given in &options.ssh_keys {
        add_keys(given, &mut metadata.ssh_keys)?;
    }
    if let Some(path) = &options.user_data {
        metadata.user_data = read(path, USER_DATA_MAX, "compress it, which cloud-init understands")?;
    }
    Ok(metadata)
}

/// A key, or a file with one per line.
fn add_keys(given: &str, keys: &mut Vec<SshPublicKey>) -> Result<(), Failure> {
    let remedy = "give a public key or the file that ssh-keygen wrote one to, e.g. ~/.ssh/id_ed25519.pub";
    // A type and a key have a blank between them, and names of files that begin like a type are rare.
    let is_key = ["ssh-", "ecdsa-", "sk-"].iter().any(|t| given.starts_with(t)) && given.contains(' ');
    let text = if is_key {
        given.to_owned()
    } else {
        let bytes = read(Path::new(given), KEYS_FILE_MAX, remedy)?;
        String::from_utf8(bytes).map_err(|_| Failure::Local(format!("{given} is no text"), remedy.into()))?
    };
    let before = keys.len();
    if text.contains("PRIVATE KEY") {
        let what = format!("{given} is a private key, which nobody else is to have");
        return Err(Failure::Local(what, remedy.into()));
    }
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let key = SshPublicKey { name: name(line, keys), key: line.to_owned() };
        key.check().map_err(|e| Failure::Local(format!("{given}: {}", e.message()), remedy.into()))?;
        keys.push(key);
    }
    if keys.len() == before {
        return Err(Failure::Local(format!("there is no key in {given}"), remedy.into()));
    }
    Ok(())
}

/// What a key is called: as its comment says, as far as it can be, and as no other.
fn name(line: &str, others: &[SshPublicKey]) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".-@_+".contains(c);
    let comment = line.splitn(3, ' ').nth(2).unwrap_or_default();
    // Room for a number behind it.
    let plain: String = comment.chars().filter(|c| allowed(*c)).take(NAME_MAX - 4).collect();
    let taken = |name: &str| others.iter().any(|k| k.name == name);
    if !plain.is_empty() && !taken(&plain) {
        return plain;
    }
    let stem = if plain.is_empty() { "key" } else { plain.as_str() };
    // One of them is free: there is one more than others.
    (0..=others.len()).map(|n| format!("{stem}{n}")).find(|n| !taken(n)).unwrap_or_default()
}

fn read(path: &Path, most: usize, remedy: &str) -> Result<Vec<u8>, Failure> {
    let shown = path.display();
    let mut bytes = Vec::new();
    let file =
        std::fs::File::open(path).and_then(|f| f.take(most as u64 + 1).read_to_end(&mut bytes)).map_err(
            |e| Failure::Local(format!("cannot read {shown}: {e}"), "name a file that you may read".into()),
        );
    file?;
    if bytes.len() > most {
        return Err(Failure::Local(format!("{shown} is longer than {most} bytes"), remedy.into()));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHUTq9vy7AmBqPcqvXG8Ho5Wn2cJ0y7b3lRnVf1dJkXq";

    fn keys(given: &[&str]) -> Result<Vec<SshPublicKey>, String> {
        let mut keys = Vec::new();
        for g in given {
            add_keys(g, &mut keys).map_err(|e| match e {
                Failure::Local(what, _) => what,
                _ => "another failure".into(),
            })?;
        }
        Ok(keys)
    }

    fn names(given: &[&str]) -> Vec<String> {
        keys(given).expect("keys").into_iter().map(|k| k.name).collect()
    }

    #[test]
    fn keys_are_given_as_they_are_and_in_files() {
        let dir = tempfile::tempdir().expect("directory");
        let file = dir.path().join("authorized_keys");
        std::fs::write(&file, format!("# mine\n{KEY} anna@home\n\n{KEY} anna@home\n")).expect("write");
        let file = file.to_str().expect("UTF-8");
        assert_eq!(
            names(&[file, KEY, KEY, &format!("{KEY} a b=c")]),
            ["anna@home", "anna@home0", "key0", "key1", "abc"]
        );
        assert_eq!(keys(&[file]).expect("keys")[0].key, format!("{KEY} anna@home"));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let dir = tempfile::tempdir().expect("directory");
        let path = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).expect("write");
            path.to_str().expect("UTF-8").to_owned()
        };
        let refused = |given: &str| keys(&[given]).expect_err("no key");
        assert!(refused("/nowhere/key.pub").contains("cannot read /nowhere/key.pub"));
        assert!(refused(&path("empty", "# nothing\n")).contains("no key in"));
        assert!(refused(&path("private", "-----BEGIN OPENSSH PRIVATE KEY-----\n")).contains("private key"));
        assert!(refused(&path("text", "hello\n")).contains("no public key"));
        assert!(refused(&path("long", &"x".repeat(KEYS_FILE_MAX + 1))).contains("longer than"));
        assert!(refused("ssh-rsa nonsense").contains("no public key"));
    }
}
