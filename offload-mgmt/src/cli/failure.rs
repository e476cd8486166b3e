//! Why a command failed, and the exit status that says so.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use proto::error::{Error, ErrorReason};

use super::render::plain;

/// What to do about what cannot happen.
pub(crate) const BUG: &str = "this is a bug of outboard; please report it with the command you ran";

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The controller said no.
    Refused(Error),
    /// The controller cannot be reached, or went away: what is wrong, and what to do.
    Unreachable(String, String),
    /// Something here: what is wrong, and what to do.
    Local(String, String),
    /// Whoever reads our output has gone away; not worth a word.
    NobodyReads,
}

impl Failure {
    /// The socket cannot be connected to.
    pub(crate) fn connecting(socket: &Path, e: &io::Error) -> Self {
        let path = socket.display();
        let start = "start it with: systemctl start outboard-mgmt; or name another socket with --socket or \
                     OUTBOARD_SOCKET";
        let (message, hint) = match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                (format!("the controller's socket {path} does not exist"), start.to_owned())
            }
            io::ErrorKind::ConnectionRefused => {
                (format!("nobody listens on the controller's socket {path}"), start.to_owned())
            }
            io::ErrorKind::PermissionDenied => (
                format!("you may not use the controller's socket {path}"),
                "join its group: sudo usermod -aG outboard $USER, and log in again; or use sudo".to_owned(),
            ),
            _ => (
                format!("the controller's socket {path} cannot be used: {e}"),
                "see: systemctl status outboard-mgmt".to_owned(),
            ),
        };
        Self::Unreachable(message, hint)
    }

    /// The connection broke, or there was no answer.
    pub(crate) fn broken(socket: &Path, why: &str) -> Self {
        Self::Unreachable(
            format!("the controller on {} does not answer: {why}", socket.display()),
            "VMs run on without it; see: systemctl status outboard-mgmt".to_owned(),
        )
    }

    /// What to print on standard error; empty for nothing.
    pub(crate) fn text(&self) -> String {
        let with = |message: &str, hint: &str| {
            let hint = if hint.is_empty() { String::new() } else { format!("hint: {hint}\n") };
            plain(&format!("error: {message}\n{hint}"))
        };
        match self {
            Self::Refused(e) => with(e.message(), e.fact("remedy").unwrap_or_default()),
            Self::Unreachable(message, hint) | Self::Local(message, hint) => with(message, hint),
            Self::NobodyReads => String::new(),
        }
    }

    /// The exit status, as `outboard --help` documents it.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Refused(e)
                if matches!(
                    e.reason(),
                    ErrorReason::VmNotFound
                        | ErrorReason::NetworkNotFound
                        | ErrorReason::SecurityGroupNotFound
                ) =>
            {
                ExitCode::from(3)
            }
            Self::Refused(_) | Self::Local(..) => ExitCode::FAILURE,
            Self::Unreachable(..) => ExitCode::from(4),
            Self::NobodyReads => ExitCode::SUCCESS,
        }
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::Refused(e)
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Self::NobodyReads,
            _ => Self::Local(
                format!("input or output fails: {e}"),
                "check where the output goes: its file system may be full, its terminal gone".to_owned(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_says_what_to_do() {
        for e in [io::ErrorKind::StorageFull, io::ErrorKind::Other, io::ErrorKind::WriteZero] {
            assert!(Failure::from(io::Error::from(e)).text().contains("\nhint: "), "{e}");
        }
        assert!(Failure::broken(Path::new("/x.sock"), "gone").text().contains("\nhint: "));
        assert_eq!(Failure::from(io::Error::from(io::ErrorKind::BrokenPipe)).text(), "");
    }

    #[test]
    fn an_unreachable_socket_says_which_why_and_what_to_do() {
        let text = |kind: io::ErrorKind| Failure::connecting(Path::new("/x.sock"), &kind.into()).text();
        assert!(text(io::ErrorKind::NotFound).contains("/x.sock does not exist\nhint: start it"));
        assert!(text(io::ErrorKind::ConnectionRefused).contains("nobody listens"));
        assert!(text(io::ErrorKind::PermissionDenied).contains("usermod -aG outboard"));
    }
}
