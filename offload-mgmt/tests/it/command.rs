//! The command `outboard` as people and scripts use it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::termios::tcgetattr;
use proto::v1::EndReason;

use crate::support::{SOON, Setup, text};

struct Ran {
    status: i32,
    out: String,
    err: String,
}

fn outboard(socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
    command.arg("--socket").arg(socket).env_remove("OUTBOARD_SOCKET");
    command
}

fn ran(output: Output) -> Ran {
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Ran {
        status: output.status.code().expect("an exit status"),
        out: text(output.stdout),
        err: text(output.stderr),
    }
}

/// Runs the command to its end, while the controller goes on in this process.
async fn run(socket: &Path, args: &[&str]) -> Ran {
    let mut command = outboard(socket);
    command.args(args).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output()).await;
    ran(output.expect("task").expect("run"))
}

fn json(ran: &Ran) -> serde_json::Value {
    assert_eq!(ran.status, 0, "{}", ran.err);
    serde_json::from_str(&ran.out).expect("one JSON document")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_from_create_to_rm() {
    let (setup, _) = Setup::new().await;
    let (socket, kernel) = (setup.api_socket(), setup.kernel());
    let disk = format!("path={},id=root,readonly", text(&setup.dir.path().join("root.img")));
    let created = run(
        &socket,
        &["vm", "create", "web", "--kernel", &kernel, "--memory", "64M", "--disk", &disk, "--nic", "default"],
    )
    .await;
    assert_eq!((created.status, created.err.as_str()), (0, ""));
    assert!(created.out.starts_with("web "), "{}", created.out);

    let list = run(&socket, &["vm", "ls"]).await.out;
    let mut lines = list.lines();
    let columns =
        |line: Option<&str>| line.expect("a line").split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(columns(lines.next()), ["NAME", "ID", "STATE", "VCPUS", "MEMORY", "UPTIME"]);
    let row = columns(lines.next());
    assert_eq!((row[0].as_str(), &row[2..5]), ("web", ["running", "1", "64M"].map(String::from).as_slice()));

    let vms = json(&run(&socket, &["vm", "ls", "-o", "json"]).await);
    assert_eq!(
        (&vms[0]["name"], &vms[0]["state"], &vms[0]["memory_bytes"]),
        (&"web".into(), &"running".into(), &(64 << 20).into())
    );
    let vm = json(&run(&socket, &["vm", "show", "web", "-o", "json"]).await);
    assert_eq!((&vm["disks"][0]["id"], &vm["disks"][0]["read_only"]), (&"root".into(), &true.into()));
    assert_eq!(vm["slots"][1]["link"], "active");
    let shown = run(&socket, &["vm", "show", "web"]).await.out;
    assert!(shown.contains("root") && shown.contains("active") && shown.contains("running"), "{shown}");

    let stats = json(&run(&socket, &["vm", "stats", "web", "-o", "json"]).await);
    assert_eq!(
        (&stats["userspace_exits_total"], &stats["devices"][0]["connections"]),
        (&11.into(), &7.into())
    );
    let cards = json(&run(&socket, &["card", "ls", "-o", "json"]).await);
    assert_eq!(cards[1]["kind"], "offload-net");
    let networks = json(&run(&socket, &["network", "ls", "-o", "json"]).await);
    assert_eq!((&networks[0]["id"], &networks[0]["mtu"]), (&"default".into(), &1500.into()));

    let busy = run(&socket, &["vm", "rm", "web"]).await;
    assert_eq!(busy.status, 1);
    assert!(busy.err.contains("error: VM web runs\nhint: stop it first"), "{}", busy.err);
    assert_eq!(run(&socket, &["vm", "reboot", "web"]).await.out, "web is running\n");
    assert_eq!(run(&socket, &["vm", "stop", "web"]).await.out, "web is stopped: the guest powered off\n");
    assert_eq!(run(&socket, &["vm", "start", "web"]).await.out, "web is running\n");
    assert_eq!(run(&socket, &["vm", "rm", "web", "--force"]).await.out, "web is removed\n");
    assert_eq!(run(&socket, &["network", "rm", "default"]).await.status, 0);
    assert_eq!(json(&run(&socket, &["vm", "ls", "-o", "json"]).await), serde_json::json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn security_groups_from_create_to_rm() {
    let (setup, _) = Setup::new().await;
    let (socket, kernel) = (setup.api_socket(), setup.kernel());
    let group = |args: &[&'static str]| {
        let args: Vec<_> = [&["security-group"][..], args].concat();
        let socket = socket.clone();
        async move { run(&socket, &args).await }
    };
    let created = group(&["create", "web", "--ingress", "tcp,ports=443", "--ingress", "icmp"]).await;
    assert_eq!((created.out.as_str(), created.err.as_str()), ("web\n", ""));
    let db = group(&["create", "db", "--no-egress", "--ingress", "tcp,ports=5432,from=web"]).await;
    assert_eq!(db.status, 0, "{}", db.err);
    let changed = group(&["allow", "web", "--ingress", "udp,ports=8000-8080,from=10.88.0.0/24"]).await;
    assert!(changed.out.contains("8000-8080") && changed.out.contains("10.88.0.0/24"), "{}", changed.out);
    assert_eq!(group(&["revoke", "web", "--ingress", "tcp,ports=443"]).await.status, 0);
    let gone = group(&["revoke", "web", "--ingress", "tcp,ports=443"]).await;
    assert_eq!(gone.status, 1);
    assert!(gone.err.contains("no such rule\nhint: see which"), "{}", gone.err);
    // The two that were given and left, and what a new group allows its devices.
    let shown = json(&group(&["show", "web", "-o", "json"]).await);
    let rules: Vec<_> = shown["rules"]
        .as_array()
        .expect("rules")
        .iter()
        .map(|r| format!("{} {} {} {}", r["direction"], r["protocol"], r["port_first"], r["peer"]))
        .collect();
    assert_eq!(
        rules,
        [
            r#""ingress" "icmp" 0 "0.0.0.0/0""#,
            r#""egress" "any" 0 "0.0.0.0/0""#,
            r#""egress" "any" 0 "::/0""#,
            r#""ingress" "udp" 8000 "10.88.0.0/24""#
        ]
    );
    let nic = "network=default,security-group=web,connections=100";
    let vm = run(&socket, &["vm", "create", "a", "--kernel", &kernel, "--nic", nic]).await;
    assert_eq!(vm.status, 0, "{}", vm.err);
    let vm = json(&run(&socket, &["vm", "show", "a", "-o", "json"]).await);
    assert_eq!(vm["nics"][0]["security_groups"], serde_json::json!(["web"]));
    let list = group(&["ls"]).await.out;
    assert!(list.contains("INGRESS") && list.lines().count() == 3, "{list}");
    let busy = group(&["rm", "web"]).await;
    assert!(busy.status == 1 && busy.err.contains("VMs a have it\nhint: remove these"), "{}", busy.err);
    assert_eq!(group(&["rm", "db"]).await.out, "db is removed\n");
    assert_eq!(group(&["show", "db"]).await.status, 3);
    assert_eq!(group(&["allow", "web"]).await.status, 1);
    assert_eq!(group(&["allow", "web", "--ingress", "sctp"]).await.status, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_statuses_tell_failures_apart() {
    let (setup, _) = Setup::new().await;
    let socket = setup.api_socket();
    let missing = run(&socket, &["vm", "show", "nope"]).await;
    assert_eq!((missing.status, missing.out.as_str()), (3, ""));
    assert_eq!(missing.err, "error: there is no VM nope\nhint: see which there are with: outboard vm ls\n");
    let kernel = run(&socket, &["vm", "create", "a", "--kernel", "/no/kernel"]).await;
    assert_eq!(kernel.status, 1);
    assert!(kernel.err.contains("error: kernel /no/kernel does not exist\nhint:"), "{}", kernel.err);
    assert_eq!(run(&socket, &["vm", "create", "a", "--kernel", "k", "--nic", "a,b=c"]).await.status, 2);
    assert_eq!(run(&socket, &["vm", "stop", "a", "--timeout", "soon"]).await.status, 2);

    let nowhere = setup.dir.path().join("nowhere.sock");
    let unreachable = run(&nowhere, &["vm", "ls"]).await;
    assert_eq!(unreachable.status, 4);
    assert!(
        unreachable.err.contains("nowhere.sock does not exist\nhint: start it with"),
        "{}",
        unreachable.err
    );
    assert_eq!(run(&nowhere, &["completion", "bash"]).await.status, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_works_in_a_pipe() {
    let (setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    let mut command = outboard(&setup.api_socket());
    command
        .args(["vm", "console", "web"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut console = command.spawn().expect("spawn");
    let mut input = console.stdin.take().expect("stdin");
    input.write_all(b"typed\n\x1dmore\n").expect("write");
    // The end of the input does not end it; the end of the VM does.
    drop(input);
    crate::support::until("what was typed to arrive", || {
        setup.runner.process(&id).typed().ends_with(b"more\n")
    })
    .await;
    assert!(console.try_wait().expect("wait").is_none());
    setup.runner.process(&id).end(EndReason::GuestPowerOff, "");
    let output = tokio::task::spawn_blocking(move || console.wait_with_output()).await;
    let ran = ran(output.expect("task").expect("wait"));
    assert_eq!((ran.status, ran.out.as_str(), ran.err.as_str()), (0, "history\ntyped\n\x1dmore\n", ""));
}

/// Reads from a terminal's other side until `end` has been seen.
async fn read_until(terminal: &File, end: &str) -> String {
    let (mut terminal, end) = (terminal.try_clone().expect("clone"), end.to_owned());
    let read = tokio::task::spawn_blocking(move || {
        let (mut seen, mut buffer) = (String::new(), [0; 256]);
        while !seen.contains(&end) {
            let n = terminal.read(&mut buffer).unwrap_or_else(|e| panic!("{e} after {seen:?}"));
            seen += &String::from_utf8_lossy(&buffer[..n]);
        }
        seen
    });
    tokio::time::timeout(SOON, read).await.expect("in time").expect("task")
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_terminal_every_key_but_one_is_the_guests() {
    let (setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    let pty = nix::pty::openpty(None, None).expect("pty");
    let before = tcgetattr(&pty.slave).expect("terminal");
    let terminal = File::from(pty.master);
    for ends_with_vm in [false, true] {
        let mut command = outboard(&setup.api_socket());
        let side = || Stdio::from(pty.slave.try_clone().expect("clone"));
        command.args(["vm", "console", "web", "--new"]).stdin(side()).stdout(side()).stderr(side());
        let mut console = command.spawn().expect("spawn");
        let greeting = read_until(&terminal, "Leave with Ctrl-].").await;
        assert!(greeting.contains("Connected to web"), "{greeting}");
        // Ctrl-C is a key like any other.
        (&terminal).write_all(b"ls\x03").expect("write");
        read_until(&terminal, "ls\x03").await;
        assert_ne!(tcgetattr(&pty.slave).expect("terminal"), before);
        let farewell = if ends_with_vm {
            setup.runner.process(&id).end(EndReason::GuestPowerOff, "");
            "web's console has ended."
        } else {
            (&terminal).write_all(b"\x1d").expect("write");
            "Left web; it runs on."
        };
        read_until(&terminal, farewell).await;
        let status = tokio::task::spawn_blocking(move || console.wait()).await.expect("task").expect("wait");
        assert!(status.success());
        assert_eq!(tcgetattr(&pty.slave).expect("terminal"), before);
    }
    assert_eq!(setup.runner.processes(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_controller_is_not_the_end_of_a_vm() {
    let (mut setup, mut client) = Setup::new().await;
    let id = client.create_vm(setup.request("web")).await.expect("create").into_inner().id;
    let spawn = |args: &[&str]| {
        let mut command = outboard(&setup.api_socket());
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("spawn")
    };
    let mut watchers =
        [spawn(&["vm", "console", "web"]), spawn(&["vm", "events", "web"]), spawn(&["vm", "events"])];
    // Both kinds are at it once they have printed something.
    let mut first = [0];
    watchers[0].stdout.as_mut().expect("stdout").read_exact(&mut first).expect("history");
    let reboot = proto::v1::RebootVmRequest { vm: "web".into() };
    for watcher in &mut watchers[1..] {
        let mut stdout = watcher.stdout.take().expect("stdout");
        let saw = tokio::task::spawn_blocking(move || stdout.read_exact(&mut [0]).map(|()| stdout));
        while !saw.is_finished() {
            client.reboot_vm(reboot.clone()).await.expect("reboot");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        watcher.stdout = Some(saw.await.expect("task").expect("an event"));
    }
    setup.stop().await;
    for watcher in watchers {
        let output = tokio::task::spawn_blocking(move || watcher.wait_with_output()).await;
        let ran = ran(output.expect("task").expect("wait"));
        assert_eq!(ran.status, 4, "{} {}", ran.out, ran.err);
        assert!(ran.err.contains("the controller is ending; VMs run on\nhint: "), "{}", ran.err);
    }
    assert_eq!(setup.runner.processes(), [id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_lines_of_json() {
    let (setup, mut client) = Setup::new().await;
    client.create_vm(setup.request("web")).await.expect("create");
    let mut command = outboard(&setup.api_socket());
    command.args(["vm", "events", "web", "-o", "json"]).stdout(Stdio::piped());
    let events = command.spawn().expect("spawn");
    // Told apart from a watcher that has not subscribed yet by repeating until it has seen something.
    let output = tokio::task::spawn_blocking(move || events.wait_with_output());
    let reboot = proto::v1::RebootVmRequest { vm: "web".into() };
    for _ in 0..40 {
        client.reboot_vm(reboot.clone()).await.expect("reboot");
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    client.delete_vm(proto::v1::DeleteVmRequest { vm: "web".into(), force: true }).await.expect("delete");
    let ran = ran(output.await.expect("task").expect("wait"));
    let events: Vec<serde_json::Value> =
        ran.out.lines().map(|l| serde_json::from_str(l).expect("a JSON object")).collect();
    assert_eq!(events.first().map(|e| e["reason"].clone()), Some("requested".into()));
    assert_eq!(events.last().map(|e| e["event"].clone()), Some("deleted".into()));
    assert!(events.windows(2).all(|w| w[0]["sequence"].as_u64() < w[1]["sequence"].as_u64()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_goes_to_standard_output_and_its_counts_to_standard_error() {
    let (setup, mut client) = Setup::new().await;
    let vm = client.create_vm(setup.request("web")).await.expect("create").into_inner();
    let captured = run(&setup.api_socket(), &["vm", "capture", "web", "-c", "3", "-s", "96"]).await;
    let parts: String = (1..=3).map(|i| format!("{i} {}-nic0 96 3;", vm.id)).collect();
    assert_eq!((captured.status, captured.out), (0, parts));
    assert_eq!(captured.err, "3 frames captured\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_of_a_disk_or_of_an_interface() {
    let (setup, mut client) = Setup::new().await;
    client.create_vm(setup.request("web")).await.expect("create");
    let socket = setup.api_socket();
    let limit = |args: &[&str]| {
        let args = [&["vm", "limit", "web"], args].concat();
        let socket = socket.clone();
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        async move { run(&socket, &args.iter().map(String::as_str).collect::<Vec<_>>()).await }
    };
    let set = limit(&["nic0", "--rate-out", "1G", "--pps-in", "100k", "--pps-in-burst", "2k"]).await;
    assert_eq!(set.out, "nic0 of web may do 1G bit/s out, 100K packets/s in (burst 2K)\n", "{}", set.err);
    assert_eq!(limit(&["disk0", "--iops", "500"]).await.out, "disk0 of web may do 500 IOPS\n");
    let shown = run(&socket, &["vm", "show", "web"]).await.out;
    assert!(shown.contains("1G bit/s out, 100K packets/s in (burst 2K)"), "{shown}");

    let wrong = limit(&["nic0", "--iops", "5"]).await;
    assert_eq!(wrong.status, 1);
    assert!(
        wrong.err.contains("nic0 is a network interface") && wrong.err.contains("--rate-out"),
        "{}",
        wrong.err
    );
    let wrong = limit(&["disk0", "--rate-in", "1G"]).await;
    assert!(wrong.err.contains("disk0 is a disk") && wrong.err.contains("--iops"), "{}", wrong.err);
    let missing = limit(&["nic9", "--rate-in", "1G"]).await;
    assert!(missing.err.contains("no network interface \"nic9\""), "{}", missing.err);
    assert_eq!(limit(&["nic0"]).await.out, "nic0 of web has no limits\n");
    assert_eq!(on_card(&setup), [None]);
}

fn on_card(setup: &Setup) -> Vec<Option<proto::v1::NetLimits>> {
    setup.net.state().devices.values().map(|d| d.net_limits).collect()
}
