//! Where Prometheus finds the card's numbers: `GET /metrics` on a Unix socket, and on a loopback address if asked.
//!
//! Whoever can connect may read, and nothing else: a socket's permissions and the loopback interface are all the
//! protection there is. What a client can cost is bounded: a few connections at a time, each for a short time.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::metrics;

/// Connections at a time; others wait to be accepted.
const CONNECTIONS: usize = 8;
/// Longest life of a connection: a scraper makes another.
const LIFE: Duration = Duration::from_secs(60);
/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long accepting pauses when the host has no descriptors or memory for it.
const PAUSE: Duration = Duration::from_millis(200);

/// Makes the text.
type Encode = Arc<dyn Fn() -> String + Send + Sync>;

/// A loopback address with a port.
pub(super) fn loopback(s: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        s.parse().map_err(|_| format!("\"{s}\" is no address with a port; write it like 127.0.0.1:9601"))?;
    if address.ip().is_loopback() {
        return Ok(address);
    }
    Err(format!("{} is not a loopback address: the numbers are for this host's scraper only", address.ip()))
}

/// Answers on the listeners for as long as the runtime lives.
pub(super) fn serve(unix: UnixListener, tcp: Option<TcpListener>, encode: Encode) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let (encode_too, slots_too) = (encode.clone(), slots.clone());
    tokio::spawn(async move {
        loop {
            accept(unix.accept().await.map(|(stream, _)| stream), &slots, &encode).await;
        }
    });
    let Some(tcp) = tcp else { return };
    tokio::spawn(async move {
        loop {
            accept(tcp.accept().await.map(|(stream, _)| stream), &slots_too, &encode_too).await;
        }
    });
}

/// Serves a connection in a task of its own; returns when there may be another.
async fn accept<S>(stream: std::io::Result<S>, slots: &Arc<Semaphore>, encode: &Encode)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = match stream {
        Ok(stream) => stream,
        Err(e) => {
            warn!("cannot accept a reader of the metrics: {e}");
            return tokio::time::sleep(PAUSE).await;
        }
    };
    // It is never closed.
    let Ok(slot) = slots.clone().acquire_owned().await else { return };
    let encode = encode.clone();
    tokio::spawn(async move {
        let answer = service_fn(move |request| {
            let answer = answer(&request, &encode);
            async move { Ok::<_, Infallible>(answer) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(PATIENCE)
            .serve_connection(TokioIo::new(stream), answer);
        if let Ok(Err(e)) = tokio::time::timeout(LIFE, connection).await {
            debug!("a reader of the metrics went away: {e}");
        }
        drop(slot);
    });
}

fn answer(request: &Request<Incoming>, encode: &Encode) -> Response<String> {
    let mut response = Response::new(String::new());
    if request.uri().path() != "/metrics" {
        *response.status_mut() = StatusCode::NOT_FOUND;
        "the numbers are at /metrics\n".clone_into(response.body_mut());
    } else if !matches!(*request.method(), Method::GET | Method::HEAD) {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    } else {
        *response.body_mut() = encode();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(metrics::CONTENT_TYPE));
    }
    response
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn only_this_host_may_be_listened_to() {
        assert_eq!(loopback("127.0.0.1:9601").unwrap().port(), 9601);
        assert!(loopback("[::1]:9601").is_ok());
        for bad in ["0.0.0.0:9601", "[::]:9601", "10.0.0.1:9601"] {
            assert!(loopback(bad).unwrap_err().contains("loopback"), "{bad}");
        }
        assert!(loopback("9601").unwrap_err().contains("127.0.0.1:9601"));
    }

    fn ask(mut stream: impl Read + Write, request: &str) -> String {
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn a_scraper_is_answered_and_who_says_nothing_is_not_in_its_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.sock");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let address = runtime.block_on(async {
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = tcp.local_addr().unwrap();
            serve(UnixListener::bind(&path).unwrap(), Some(tcp), Arc::new(|| "a_number 1\n".to_owned()));
            address
        });
        let unix = || std::os::unix::net::UnixStream::connect(&path).unwrap();
        // One less than there may be.
        let _silent: Vec<_> = (1..CONNECTIONS).map(|_| unix()).collect();
        let get = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        for answer in [ask(unix(), get), ask(std::net::TcpStream::connect(address).unwrap(), get)] {
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(answer.contains("text/plain; version=0.0.4") && answer.ends_with("\r\n\r\na_number 1\n"));
        }
        assert!(ask(unix(), &get.replace("/metrics", "/")).starts_with("HTTP/1.1 404 "));
        assert!(ask(unix(), &get.replace("GET", "POST")).starts_with("HTTP/1.1 405 "));
        // Those who say nothing are sent away, even if they are as many as there may be.
        let _silent: Vec<_> = (0..2 * CONNECTIONS).map(|_| unix()).collect();
        assert!(ask(unix(), get).contains("a_number 1"));
    }
}
