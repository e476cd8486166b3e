//! Requests to the service (HTTP/1.1, RFC 9112) and what they are answered.

use std::io::Write;
use std::time::{Duration, Instant};

use super::token::{TTL_SECONDS, Tokens};
use super::tree::View;

/// Longest request in bytes: a client's own headers are a few hundred.
pub const REQUEST_MAX: usize = 2048;
/// Most headers in a request.
const HEADERS_MAX: usize = 32;

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: &str = "X-aws-ec2-metadata-token";
const TTL: &str = "X-aws-ec2-metadata-token-ttl-seconds";

/// What an answer begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Here it is.
    Ok,
    /// The request is not what it should be.
    BadRequest,
    /// No token, or one that is not good, or not any more.
    Unauthorized,
    /// A token is not given to somebody behind a proxy.
    Forbidden,
    /// Nothing is at this path.
    NotFound,
    /// Not with this method.
    MethodNotAllowed,
    /// The request's head is too long.
    HeadersTooLarge,
    /// The host has no random numbers.
    Unavailable,
}

impl Status {
    fn text(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::Unauthorized => "401 Unauthorized",
            Self::Forbidden => "403 Forbidden",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::HeadersTooLarge => "431 Request Header Fields Too Large",
            Self::Unavailable => "503 Service Unavailable",
        }
    }
}

/// A request's head, as far as the answer depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// Its length in bytes; the next request begins behind it.
    pub length: usize,
    method: &'a str,
    path: &'a str,
    token: Option<&'a [u8]>,
    ttl: Option<&'a [u8]>,
    /// Somebody has forwarded it.
    forwarded: bool,
    keep_alive: bool,
}

/// Reads the request that `bytes` begin with. `Ok(None)`: it is not all there.
///
/// # Errors
/// What to answer before the connection is closed.
pub fn parse(bytes: &[u8]) -> Result<Option<Request<'_>>, Status> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Request::new(&mut headers);
    let length = match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() >= REQUEST_MAX => return Err(Status::HeadersTooLarge),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Status::HeadersTooLarge),
        Err(_) => return Err(Status::BadRequest),
    };
    let (Some(method), Some(path), Some(minor)) = (head.method, head.path, head.version) else {
        return Err(Status::BadRequest);
    };
    let mut request = Request {
        length,
        method,
        path: path.split(['?', '#']).next().unwrap_or_default(),
        token: None,
        ttl: None,
        forwarded: false,
        keep_alive: minor >= 1,
    };
    for httparse::Header { name, value } in head.headers.iter() {
        let is = |known: &str| name.eq_ignore_ascii_case(known);
        let value = value.trim_ascii();
        if is(TOKEN) {
            once(&mut request.token, value)?;
        } else if is(TTL) {
            once(&mut request.ttl, value)?;
        } else if is("X-Forwarded-For") {
            request.forwarded = true;
        } else if is("Connection") && value.eq_ignore_ascii_case(b"close") {
            request.keep_alive = false;
        // No request has a body.
        } else if is("Transfer-Encoding") || is("Content-Length") && value != b"0" {
            return Err(Status::BadRequest);
        }
    }
    Ok(Some(request))
}

/// Which of two a proxy meant nobody can tell.
fn once<'a>(to: &mut Option<&'a [u8]>, value: &'a [u8]) -> Result<(), Status> {
    if to.replace(value).is_some() { Err(Status::BadRequest) } else { Ok(()) }
}

/// Writes the answer to a request behind what is in `to`, with `body` for room; false: close the connection after it.
pub fn respond(
    request: &Request<'_>,
    view: &View<'_>,
    tokens: &mut Tokens,
    now: Instant,
    body: &mut Vec<u8>,
    to: &mut Vec<u8>,
) -> bool {
    body.clear();
    let mut answer = Answer { keep_alive: request.keep_alive, ..Answer::default() };
    let status = if request.path == TOKEN_PATH {
        match request.method {
            "PUT" => put_token(request, tokens, now, body, &mut answer),
            _ => {
                answer.allow = Some("PUT");
                Status::MethodNotAllowed
            }
        }
    } else if matches!(request.method, "GET" | "HEAD") {
        get(request, view, tokens, now, body)
    } else {
        answer.allow = Some("GET, HEAD");
        Status::MethodNotAllowed
    };
    answer.head_only = request.method == "HEAD";
    answer.write(status, body, to);
    request.keep_alive
}

/// Writes the answer to what is no request; the connection is to be closed after it.
pub fn refuse(status: Status, to: &mut Vec<u8>) {
    Answer::default().write(status, &[], to);
}

fn put_token(
    request: &Request<'_>,
    tokens: &mut Tokens,
    now: Instant,
    body: &mut Vec<u8>,
    answer: &mut Answer,
) -> Status {
    if request.forwarded {
        return Status::Forbidden;
    }
    let seconds = request.ttl.and_then(|t| std::str::from_utf8(t).ok()).and_then(|t| t.parse().ok());
    let Some(seconds) = seconds.filter(|s| TTL_SECONDS.contains(s)) else { return Status::BadRequest };
    let Some(token) = tokens.issue(Duration::from_secs(seconds.into()), now) else {
        return Status::Unavailable;
    };
    body.extend(token.as_bytes());
    answer.ttl = Some(seconds);
    Status::Ok
}

fn get(request: &Request<'_>, view: &View<'_>, tokens: &Tokens, now: Instant, body: &mut Vec<u8>) -> Status {
    let allowed = match request.token {
        Some(token) => tokens.left(token, now).is_some(),
        None => view.metadata.tokens_optional,
    };
    if !allowed {
        return Status::Unauthorized;
    }
    if view.get(request.path, body) { Status::Ok } else { Status::NotFound }
}

/// What an answer's head says beside its status.
#[derive(Debug, Default)]
struct Answer {
    keep_alive: bool,
    head_only: bool,
    allow: Option<&'static str>,
    ttl: Option<u32>,
}

impl Answer {
    fn write(&self, status: Status, body: &[u8], to: &mut Vec<u8>) {
        let text = status.text();
        let failed = status != Status::Ok;
        let body = if failed { text.as_bytes() } else { body };
        // A vector takes everything.
        let _ =
            write!(to, "HTTP/1.1 {text}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n", body.len());
        if let Some(methods) = self.allow {
            let _ = write!(to, "Allow: {methods}\r\n");
        }
        if let Some(seconds) = self.ttl {
            let _ = write!(to, "{TTL}: {seconds}\r\n");
        }
        let _ = write!(to, "Connection: {}\r\n\r\n", if self.keep_alive { "keep-alive" } else { "close" });
        if !self.head_only {
            to.extend(body);
        }
    }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
