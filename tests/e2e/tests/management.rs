//! The whole of it through the management API: `outboard`, the controller, both cards, hypervisors.

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use e2e::guest::Reports;
use e2e::host::Host;
use e2e::{SOON, enter_new_network_namespace, image, patch, wait_until};

/// Reads a VM's console by `outboard vm console`, from the start of its history.
fn console(host: &Host, vm: &str) -> (Reports, impl Drop + use<>) {
    struct Ended(std::process::Child);
    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let mut command = host.command();
    command.args(["vm", "console", vm]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().expect("outboard vm console");
    let mut stdout = child.stdout.take().expect("stdout");
    let reports = Reports::default();
    let feed = reports.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = std::io::Read::read(&mut stdout, &mut buffer) {
            feed.feed(&buffer[..n]);
        }
        feed.close();
    });
    (reports, Ended(child))
}

#[test]
fn a_vm_lives_its_life() {
    enter_new_network_namespace();
    let host = Host::start();
    let disk = image(host.dir(), "disk.img", 32 << 20);
    let disk = disk.to_str().expect("path");
    host.json(&["network", "create", "lan", "--tap", "obtest2", "--address", "10.9.0.254/24"]);

    let job = "job=blk-verify bytes=32M queues=2 qd=16 job=net-echo ip=10.9.0.1";
    let vm = host.create("web", job, &["--disk", &format!("path={disk},queues=2"), "--nic", "network=lan"]);
    assert_eq!((&vm["name"], &vm["state"]), (&"web".into(), &"running".into()), "{vm:#}");
    let (reports, _console) = console(&host, "web");
    reports.wait("result", Duration::from_secs(60));
    assert_eq!(reports.all("result")[0]["ok"], true);
    let listed = host.json(&["vm", "ls"]);
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed:#}");

    // The guest answers a ping on its network.
    let ping =
        || std::process::Command::new("ping").args(["-c1", "-W1", "10.9.0.1"]).stdout(Stdio::null()).status();
    wait_until("an answer to ping", SOON, || ping().expect("run ping (iputils-ping)").success());

    // Stopping a guest that ignores the power button ends it when the time is up.
    host.json(&["vm", "stop", "web", "--timeout", "1s"]);
    host.wait_state("web", "stopped", SOON);
    assert_eq!(host.hypervisors(), [0u32; 0]);
    assert!(host.leftovers().is_empty(), "{:?}", host.leftovers());

    host.json(&["vm", "start", "web"]);
    host.wait_state("web", "running", SOON);
    host.json(&["vm", "rm", "web", "--force"]);
    assert_eq!(host.json(&["vm", "ls"]).as_array().map(Vec::len), Some(0));
    assert_eq!(host.hypervisors(), [0u32; 0]);
    assert!(host.leftovers().is_empty(), "{:?}", host.leftovers());
    host.json(&["network", "rm", "lan"]);
}

#[test]
fn a_killed_controller_finds_its_vms_again_and_nothing_stops() {
    enter_new_network_namespace();
    let mut host = Host::start();
    let disk = image(host.dir(), "disk.img", 32 << 20);
    let job = "job=blk-verify bytes=32M qd=16 verify=mixed secs=8 timeout=30";
    host.create("db", job, &["--disk", disk.to_str().expect("path")]);
    let before = host.json(&["vm", "show", "db"]);
    let (reports, attached) = console(&host, "db");
    reports.wait("io_begin", SOON);
    host.kill9_controller_and_restart();
    drop(attached);
    let after = host.json(&["vm", "show", "db"]);
    assert_eq!(after["state"], "running", "{after:#}");
    assert_eq!((&after["id"], &after["hypervisor_pid"]), (&before["id"], &before["hypervisor_pid"]));
    // The console still has all of it, and the job goes on to its end.
    let (reports, _attached) = console(&host, "db");
    let results = reports.finish(Duration::from_secs(60));
    assert_eq!((&results[0]["errors"], &results[0]["mismatches"]), (&0.into(), &0.into()));
    host.json(&["vm", "rm", "db", "--force"]);
}

#[test]
fn what_happens_to_a_vm_is_told() {
    enter_new_network_namespace();
    let host = Host::start();
    let mut watch = host.command();
    watch.args(["--output", "json", "vm", "events"]).stdout(Stdio::piped());
    let mut watch = watch.spawn().expect("outboard vm events");
    let mut stdout = watch.stdout.take().expect("stdout");
    let text = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let sink = text.clone();
    let reader = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = std::io::Read::read(&mut stdout, &mut buffer) {
            sink.lock().expect("events").push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    });
    std::thread::sleep(Duration::from_millis(500));
    host.create("once", "job=idle secs=0.2 end=triple", &[]);
    wait_until("the event of a reset", SOON, || text.lock().expect("events").contains("reset"));
    // The guest boots again after the triple fault, and again; it stays a running VM.
    assert_eq!(host.json(&["vm", "show", "once"])["state"], "running");
    host.json(&["vm", "rm", "once", "--force"]);
    wait_until("the event of the deletion", SOON, || text.lock().expect("events").contains("deleted"));
    let _ = watch.kill();
    let _ = watch.wait();
    reader.join().expect("reader");
    let lines: Vec<_> = text.lock().expect("events").lines().map(str::to_owned).collect();
    for line in &lines {
        serde_json::from_str::<serde_json::Value>(line)
            .unwrap_or_else(|e| panic!("{line:?} is not JSON: {e}"));
    }
}

#[test]
fn bad_input_is_named_and_leaves_nothing_behind() {
    enter_new_network_namespace();
    let host = Host::start();
    let kernel = e2e::binary("bench-guest");
    let kernel = kernel.to_str().expect("path");
    let no_kernel = host.dir().join("text");
    std::fs::File::create(&no_kernel).and_then(|mut f| f.write_all(&[b'x'; 4096])).expect("file");
    let no_kernel = no_kernel.to_str().expect("path");
    // An ELF, but no kernel: passes a glance at its first bytes.
    let no_pvh = host.dir().join("elf");
    std::fs::copy(e2e::binary("outboard"), &no_pvh).expect("copy");
    patch(&no_pvh, 0, b"\x7fELF");
    let no_pvh = no_pvh.to_str().expect("path");
    let odd = image(host.dir(), "odd.img", 1000);
    let odd = odd.to_str().expect("path");
    let none = "/nonexistent/thing";

    // What is asked for, and what the error must name.
    let base = ["vm", "create", "bad", "--memory", "128M"];
    let cases: [(&[&str], &str); 9] = [
        (&["--kernel", none], none),
        (&["--kernel", no_kernel], no_kernel),
        (&["--kernel", no_pvh], no_pvh),
        (&["--kernel", kernel, "--initramfs", none], none),
        (&["--kernel", kernel, "--disk", none], none),
        (&["--kernel", kernel, "--disk", odd], odd),
        (&["--kernel", kernel, "--disk", "/tmp"], "/tmp"),
        (&["--kernel", kernel, "--nic", "network=nowhere"], "nowhere"),
        (&["--kernel", kernel, "--vcpus", "100000"], "100000 vCPUs"),
    ];
    for (more, named) in cases {
        let said = host.error(&[&base[..], more].concat());
        assert!(said.contains(named), "{more:?} is answered without naming {named}: {said}");
        assert!(said.contains("hint:"), "{more:?} is answered without saying what to do: {said}");
    }
    let said = host.error(&["vm", "create", "bad", "--kernel", kernel, "--memory", "900G"]);
    assert!(said.contains("memory") && said.contains("hint:"), "{said}");
    for call in ["show", "start", "stop", "reboot", "rm", "console"] {
        let said = host.error(&["vm", call, "ghost"]);
        assert!(said.contains("ghost"), "vm {call}: {said}");
    }

    assert_eq!(host.json(&["vm", "ls"]).as_array().map(Vec::len), Some(0));
    assert_eq!(host.hypervisors(), [0u32; 0]);
    assert!(host.leftovers().is_empty(), "{:?}", host.leftovers());
}

#[test]
fn a_dead_card_is_named_and_leaves_nothing_behind() {
    enter_new_network_namespace();
    let mut host = Host::start();
    let disk = image(host.dir(), "disk.img", 1 << 20);
    let kernel = e2e::binary("bench-guest");
    host.storage.kill9();
    let args = [
        "vm",
        "create",
        "bad",
        "--kernel",
        kernel.to_str().expect("path"),
        "--disk",
        disk.to_str().expect("path"),
    ];
    let said = host.error(&args);
    assert!(said.contains("blk") && said.contains("hint:"), "{said}");
    assert_eq!(host.json(&["vm", "ls"]).as_array().map(Vec::len), Some(0));
    assert_eq!(host.hypervisors(), [0u32; 0]);
    // And everything else still works.
    host.create("good", "job=idle", &[]);
    host.json(&["vm", "rm", "good", "--force"]);
}

#[test]
fn an_unreachable_controller_is_named() {
    let output = std::process::Command::new(e2e::binary("outboard"))
        .args(["--socket", "/nonexistent/api.sock", "vm", "ls"])
        .output()
        .expect("run outboard");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("/nonexistent/api.sock") && said.contains("hint:"),
        "{said}"
    );
}
