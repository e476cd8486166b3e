//! Errors as every service answers them: a gRPC status code, a sentence for a person, and a `google.rpc.ErrorInfo`
//! detail for a program.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

pub use crate::v1::ErrorReason;

/// `ErrorInfo.domain` of every error.
pub const DOMAIN: &str = "outboard";

/// An error on its way to a caller. Build it with [`Error::new`], add what is known, and turn it into a [`Status`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    code: Code,
    reason: ErrorReason,
    message: String,
    metadata: HashMap<String, String>,
}

impl Error {
    /// `message` names the thing and what is wrong with it, in one sentence without a final full stop.
    pub fn new(code: Code, reason: ErrorReason, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), metadata: HashMap::new() }
    }

    /// A field of the request has a value that is not allowed.
    pub fn invalid_field(field: &str, message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, ErrorReason::InvalidField, message).with("field", field)
    }

    /// The thing the error is about: a path, an id.
    #[must_use]
    pub fn resource(self, resource: impl Into<String>) -> Self {
        self.with("resource", resource)
    }

    /// What the user can do about it, as a sentence without a final full stop.
    #[must_use]
    pub fn remedy(self, remedy: impl Into<String>) -> Self {
        self.with("remedy", remedy)
    }

    /// Any other machine-readable fact.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<String>) -> Self {
        self.metadata.insert(key.to_owned(), value.into());
        self
    }

    /// The gRPC status code it travels with.
    pub fn code(&self) -> Code {
        self.code
    }

    /// A machine-readable fact about it: "resource", "remedy", "field", ...
    pub fn fact(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// Why, for a program.
    pub fn reason(&self) -> ErrorReason {
        self.reason
    }

    /// Why, for a person.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        match self.metadata.get("remedy") {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

impl From<Error> for Status {
    fn from(e: Error) -> Self {
        let reason = e.reason.as_str_name().trim_start_matches("ERROR_REASON_");
        let details = ErrorDetails::with_error_info(reason, DOMAIN, e.metadata);
        Status::with_error_details(e.code, e.message, details)
    }
}

/// What another process answered, taken apart again; a status without our detail becomes `Internal` (or, for a
/// transport that failed, keeps its code and message).
impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let info = status.get_details_error_info().filter(|i| i.domain == DOMAIN);
        let (reason, metadata) = match info {
            Some(i) => (
                ErrorReason::from_str_name(&format!("ERROR_REASON_{}", i.reason))
                    .unwrap_or(ErrorReason::Unspecified),
                i.metadata,
            ),
            None => (ErrorReason::Internal, HashMap::new()),
        };
        Self { code: status.code(), reason, message: status.message().to_owned(), metadata }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_wire() {
        let e = Error::new(Code::NotFound, ErrorReason::KernelNotFound, "kernel /boot/x does not exist")
            .resource("/boot/x")
            .remedy("check the path");
        assert_eq!(Error::from(Status::from(e.clone())), e);
        assert_eq!(e.to_string(), "kernel /boot/x does not exist; check the path");
    }

    #[test]
    fn a_foreign_status_keeps_its_code_and_message() {
        let e = Error::from(Status::unavailable("connection refused"));
        assert_eq!(
            (e.code, e.reason, e.message()),
            (Code::Unavailable, ErrorReason::Internal, "connection refused")
        );
    }
}
