use proptest::prelude::*;
use proto::v1::{Metadata, NetworkSpec};

use super::*;
use crate::mac::MacAddr;
use crate::subnet::{Interface, Subnet};

struct Service {
    metadata: Metadata,
    interface: Interface,
    subnet: Subnet,
    tokens: Tokens,
    now: Instant,
}

impl Service {
    fn new() -> Self {
        let spec =
            NetworkSpec { id: "n".to_owned(), ipv4_prefix: "10.88.0.0/24".to_owned(), ..Default::default() };
        Self {
            metadata: Metadata { instance_id: "i-1".to_owned(), ..Default::default() },
            interface: Interface {
                ipv4: vec![[10, 88, 0, 7].into()],
                ..Interface::plain(MacAddr([0x52, 0x54, 0, 0, 0, 7]))
            },
            subnet: Subnet::check(&spec, 1500, &[]).unwrap().unwrap(),
            tokens: Tokens::default(),
            now: Instant::now(),
        }
    }

    /// Asks; the answer, and whether the connection stays.
    fn ask(&mut self, request: &str) -> (String, bool) {
        let view = View { metadata: &self.metadata, interface: &self.interface, subnet: &self.subnet };
        let (mut body, mut to) = (Vec::new(), Vec::new());
        let stays = match parse(request.as_bytes()) {
            Ok(Some(r)) => respond(&r, &view, &mut self.tokens, self.now, &mut body, &mut to),
            Ok(None) => panic!("{request} is not whole"),
            Err(status) => {
                refuse(status, &mut to);
                false
            }
        };
        (String::from_utf8(to).unwrap(), stays)
    }

    fn status(&mut self, request: &str) -> u16 {
        self.ask(request).0[9..12].parse().unwrap()
    }

    fn token(&mut self, ttl: &str) -> String {
        let (answer, _) = self.ask(&format!(
            "PUT /latest/api/token HTTP/1.1\r\nHost: x\r\nX-AWS-EC2-Metadata-Token-TTL-Seconds: {ttl}\r\n\r\n"
        ));
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains(&format!("X-aws-ec2-metadata-token-ttl-seconds: {ttl}\r\n")), "{answer}");
        body(&answer).to_owned()
    }
}

fn body(answer: &str) -> &str {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{answer}");
    body
}

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{headers}\r\n")
}

const ID: &str = "/latest/meta-data/instance-id";

#[test]
fn without_a_good_token_nothing_is_told() {
    let mut s = Service::new();
    for path in [ID, "/", "/latest", "/nowhere"] {
        assert_eq!(s.status(&get(path, "")), 401, "{path}");
    }
    let token = s.token("60");
    let with = |token: &str| get(ID, &format!("X-aws-ec2-metadata-token: {token}\r\n"));
    let (answer, stays) = s.ask(&with(&token));
    assert_eq!((body(&answer), stays), ("i-1", true));
    assert_eq!(s.status(&with(&token[1..])), 401);
    assert_eq!(s.status(&with(&token.replace(&token[..1], "x"))), 401);
    s.now += Duration::from_secs(60);
    assert_eq!(s.status(&with(&token)), 401);
    // Nor is one of another device's.
    let mut other = Service::new();
    let token = other.token("60");
    assert_eq!((other.status(&with(&token)), s.status(&with(&token))), (200, 401));
}

#[test]
fn where_tokens_are_optional_only_wrong_ones_are_refused() {
    let mut s = Service::new();
    s.metadata.tokens_optional = true;
    assert_eq!(s.status(&get(ID, "")), 200);
    assert_eq!(s.status(&get(ID, "X-aws-ec2-metadata-token: abc\r\n")), 401);
    let token = s.token("1");
    assert_eq!(s.status(&get(ID, &format!("x-aws-ec2-metadata-token:{token}\r\n"))), 200);
}

#[test]
fn a_token_is_given_for_a_time_and_to_nobody_behind_a_proxy() {
    let mut s = Service::new();
    let put = |headers: &str| format!("PUT /latest/api/token HTTP/1.1\r\n{headers}\r\n");
    let ttl = |seconds: &str| put(&format!("X-aws-ec2-metadata-token-ttl-seconds: {seconds}\r\n"));
    for bad in ["0", "21601", "-1", "", "abc", "1.5", "99999999999999999999"] {
        assert_eq!(s.status(&ttl(bad)), 400, "{bad}");
    }
    assert_eq!(s.status(&put("")), 400);
    let twice = "X-aws-ec2-metadata-token-ttl-seconds: 1\r\nX-aws-ec2-metadata-token-ttl-seconds: 2\r\n";
    assert_eq!(s.status(&put(twice)), 400);
    let proxy = "X-Forwarded-For: 10.0.0.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
    assert_eq!(s.status(&put(proxy)), 403);
    for good in ["1", "21600"] {
        assert_eq!(s.token(good).len(), super::super::token::TEXT);
    }
    // As `curl -X PUT` and as a client that sends an empty body.
    assert_eq!(s.status(&put("Content-Length: 0\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n")), 200);
}

#[test]
fn methods_paths_and_bodies_are_told_apart() {
    let mut s = Service::new();
    s.metadata.tokens_optional = true;
    assert_eq!(s.status(&get("/latest/meta-data/nothing", "")), 404);
    let (answer, _) = s.ask(&get("/latest/api/token", ""));
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("\r\nAllow: PUT\r\n"), "{answer}");
    for method in ["PUT", "POST", "DELETE", "OPTIONS", "XYZ"] {
        let (answer, _) = s.ask(&format!("{method} {ID} HTTP/1.1\r\n\r\n"));
        assert!(
            answer.starts_with("HTTP/1.1 405 ") && answer.contains("\r\nAllow: GET, HEAD\r\n"),
            "{answer}"
        );
    }
    let (answer, _) = s.ask(&format!("HEAD {ID} HTTP/1.1\r\n\r\n"));
    assert!(answer.contains("Content-Length: 3\r\n") && answer.ends_with("\r\n\r\n"), "{answer}");
    for bad in ["Content-Length: 1\r\n", "Transfer-Encoding: chunked\r\n"] {
        assert_eq!(s.status(&get(ID, bad)), 400);
    }
    for nonsense in ["\0\0\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/2.0\r\n\r\n", "GET / HTTP/1.1\r\n: x\r\n\r\n"]
    {
        assert_eq!(s.ask(nonsense), {
            let mut to = Vec::new();
            refuse(Status::BadRequest, &mut to);
            (String::from_utf8(to).unwrap(), false)
        });
    }
    assert_eq!(s.status(&get(ID, &"X: y\r\n".repeat(40))), 431);
    assert_eq!(s.status(&get("/latest/meta-data/instance-id?x=1", "")), 200);
}

#[test]
fn connections_stay_as_long_as_their_clients_want() {
    let mut s = Service::new();
    s.metadata.tokens_optional = true;
    assert!(s.ask(&get(ID, "")).1 && s.ask(&get(ID, "Connection: keep-alive\r\n")).1);
    assert!(!s.ask(&get(ID, "Connection: Close\r\n")).1);
    let (answer, stays) = s.ask(&format!("GET {ID} HTTP/1.0\r\n\r\n"));
    assert!(!stays && answer.contains("\r\nConnection: close\r\n"), "{answer}");
}

#[test]
fn a_request_is_taken_when_it_is_whole() {
    let whole = get(ID, "");
    for cut in 0..whole.len() {
        assert_eq!(parse(&whole.as_bytes()[..cut]), Ok(None), "{cut}");
    }
    let two = whole.repeat(2);
    assert_eq!(parse(two.as_bytes()).unwrap().unwrap().length, whole.len());
    assert_eq!(
        parse(get("/", &format!("X: {}", "y".repeat(REQUEST_MAX))).as_bytes()),
        Err(Status::HeadersTooLarge)
    );
}

proptest! {
    /// Whatever comes is answered by one whole answer, or is no request yet.
    #[test]
    fn any_request_is_borne(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        method in "(GET|PUT|HEAD|[A-Z]{1,9})", path in "/(latest/(api/token|meta-data/[^ ]{0,20})?)?",
        names in prop::collection::vec(
            (prop::sample::select(vec![TOKEN, TTL, "Content-Length", "Connection"]), "[^\r\n]{0,70}"), 0..4,
        ),
        sensible: bool,
    ) {
        let mut s = Service::new();
        let text = names.iter().map(|(n, v)| format!("{n}: {v}\r\n")).collect::<String>();
        let bytes = if sensible { format!("{method} {path} HTTP/1.1\r\n{text}\r\n").into_bytes() } else { bytes };
        let view = View { metadata: &s.metadata, interface: &s.interface, subnet: &s.subnet };
        let (mut body, mut to) = (Vec::new(), Vec::new());
        match parse(&bytes) {
            Ok(Some(r)) => {
                prop_assert!(r.length <= bytes.len());
                respond(&r, &view, &mut s.tokens, s.now, &mut body, &mut to);
            }
            Ok(None) => return Ok(()),
            Err(status) => refuse(status, &mut to),
        }
        let text = String::from_utf8(to).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let length = format!("Content-Length: {}\r\n", body.len());
        let right = head.starts_with("HTTP/1.1 ") && (body.is_empty() || head.contains(&length));
        prop_assert!(right, "{}", head);
    }
}
