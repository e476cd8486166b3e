//! The whole of it through the management API: `outboard`, the controller, both cards, hypervisors.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use e2e::guest::Reports;
use e2e::host::Host;
use e2e::{SOON, enter_new_network_namespace, image, patch, wait_until};
use nix::sys::signal::Signal;
use proto::v1::ConsoleInput;
use proto::v1::hypervisor_client::HypervisorClient;
use serde_json::Value;
use tokio_stream::wrappers::UnboundedReceiverStream;

const NOTHING: [PathBuf; 0] = [];

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
    assert_eq!(host.leftovers(), NOTHING);

    host.json(&["vm", "start", "web"]);
    host.wait_state("web", "running", SOON);
    host.json(&["vm", "rm", "web", "--force"]);
    assert_eq!(host.json(&["vm", "ls"]).as_array().map(Vec::len), Some(0));
    assert_eq!(host.hypervisors(), [0u32; 0]);
    assert_eq!(host.leftovers(), NOTHING);
    assert_ne!(host.network_leftovers(), NOTHING, "the network and its TAP are seen");
    host.json(&["network", "rm", "lan"]);
    assert_eq!(host.network_leftovers(), NOTHING);
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

/// `outboard vm events` of all VMs, as it prints them.
struct Events {
    command: std::process::Child,
    lines: Arc<Mutex<Vec<Value>>>,
}

impl Events {
    /// Returns when it is known to see what happens from now on.
    fn watch(host: &Host) -> Self {
        let mut command = host.command();
        command.args(["--output", "json", "vm", "events"]).stdout(Stdio::piped());
        let mut command = command.spawn().expect("outboard vm events");
        let stdout = BufReader::new(command.stdout.take().expect("stdout"));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = lines.clone();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let event =
                    serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?} is not JSON: {e}"));
                sink.lock().expect("events").push(event);
            }
        });
        let events = Self { command, lines };
        wait_until("a first event", SOON, || {
            host.create("probe", "job=idle", &["--no-start"]);
            host.json(&["vm", "rm", "probe"]);
            !events.of("probe", "deleted").is_empty()
        });
        events
    }

    /// What was told of a VM so far, of one kind.
    fn of(&self, vm: &str, kind: &str) -> Vec<Value> {
        let lines = self.lines.lock().expect("events");
        lines.iter().filter(|e| e["vm_name"] == vm && e["event"] == kind).cloned().collect()
    }

    /// Waits for the first.
    fn wait(&self, vm: &str, kind: &str) -> Value {
        wait_until(&format!("{vm} to be {kind}"), SOON, || !self.of(vm, kind).is_empty());
        self.of(vm, kind).swap_remove(0)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.command.kill();
        let _ = self.command.wait();
    }
}

/// Every way a guest's run comes to an end is told as what it was.
#[test]
fn what_happens_to_a_vm_is_told() {
    enter_new_network_namespace();
    let host = Host::start();
    let events = Events::watch(&host);

    host.create("off", "job=idle secs=0.2 end=poweroff", &[]);
    assert_eq!(events.wait("off", "ended")["reason"], "guest_power_off");
    host.wait_state("off", "stopped", SOON);
    assert_eq!(host.json(&["vm", "show", "off"])["detail"], "the guest powered off");
    assert!(events.of("off", "reset").is_empty());

    // The guest boots again after a reset, and again; it stays a running VM.
    for (vm, end, reason) in [("resets", "reset", "guest"), ("faults", "triple", "triple_fault")] {
        host.create(vm, &format!("job=idle secs=0.2 end={end}"), &[]);
        assert_eq!(events.wait(vm, "reset")["reason"], reason);
        assert_eq!(host.json(&["vm", "show", vm])["state"], "running");
        assert!(events.of(vm, "ended").is_empty());
        host.json(&["vm", "rm", vm, "--force"]);
        events.wait(vm, "deleted");
    }

    host.create("stopped", "job=idle", &[]);
    host.json(&["vm", "stop", "stopped", "--force"]);
    assert_eq!(events.wait("stopped", "ended")["reason"], "shutdown");
    assert_eq!(host.json(&["vm", "show", "stopped"])["detail"], "it was ended at once");

    let signalled = host.create("signalled", "job=idle", &[]);
    let pid = signalled["hypervisor_pid"].as_i64().and_then(|p| i32::try_from(p).ok()).expect("pid");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).expect("signal");
    assert_eq!(events.wait("signalled", "ended")["reason"], "signal");
    host.wait_state("signalled", "stopped", SOON);

    let killed = host.create("killed", "job=idle", &[]);
    let pid = killed["hypervisor_pid"].as_i64().and_then(|p| i32::try_from(p).ok()).expect("pid");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).expect("signal");
    host.wait_state("killed", "failed", SOON);
    assert!(events.of("killed", "ended").is_empty(), "nobody said so");
}

#[test]
fn a_guest_that_powers_off_while_no_controller_runs_is_stopped() {
    enter_new_network_namespace();
    let mut host = Host::start();
    let id = |vm: Value| vm["id"].as_str().expect("id").to_owned();
    let off = id(host.create("off", "job=serial-echo end=poweroff", &[]));
    let killed = host.create("killed", "job=idle", &[]);
    let pid = killed["hypervisor_pid"].as_i64().and_then(|p| i32::try_from(p).ok()).expect("pid");
    host.kill9_controller();

    // A line ends the guest's job, and with it the guest.
    let runtime = e2e::runtime();
    let mut hypervisor = HypervisorClient::new(e2e::card::channel(&runtime, &host.hypervisor_socket(&off)));
    let (keys, input) = tokio::sync::mpsc::unbounded_channel();
    keys.send(ConsoleInput::default()).expect("console");
    let console = runtime.block_on(hypervisor.console(UnboundedReceiverStream::new(input))).expect("console");
    wait_until("the guest to power off", SOON, || {
        // Bytes that come before the guest listens are lost.
        let _ = keys.send(ConsoleInput { data: b"\n".to_vec(), ..ConsoleInput::default() });
        host.hypervisors().len() == 1
    });
    drop(console);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).expect("signal");
    wait_until("the other to be gone", SOON, || host.hypervisors().is_empty());

    host.start_controller();
    let vm = host.json(&["vm", "show", "off"]);
    assert_eq!(
        (&vm["state"], &vm["detail"]),
        (&"stopped".into(), &"its hypervisor process ended while the controller was not running".into())
    );
    let vm = host.json(&["vm", "show", "killed"]);
    assert_eq!(vm["state"], "failed", "{vm:#}");
    host.json(&["vm", "start", "off"]);
    host.json(&["vm", "rm", "off", "--force"]);
    host.json(&["vm", "rm", "killed"]);
    assert_eq!(host.leftovers(), NOTHING);
}

#[test]
fn reboot_resets_the_guest_in_the_same_process() {
    enter_new_network_namespace();
    let host = Host::start();
    let disk = image(host.dir(), "disk.img", 8 << 20);
    let job = "job=blk-verify bytes=8M qd=8 job=idle";
    let before = host.create("web", job, &["--disk", disk.to_str().expect("path")]);
    let events = Events::watch(&host);
    let (reports, _console) = console(&host, "web");
    for boots in 1..=3 {
        // Also the disk works again each time.
        reports.wait_nth("io_end", boots, Duration::from_secs(60));
        assert_eq!(reports.all("boot").len(), boots);
        if boots < 3 {
            let answer = host.json(&["vm", "reboot", "web"]);
            assert_eq!(answer["state"], "running");
        }
    }
    let after = host.json(&["vm", "show", "web"]);
    assert_eq!((&after["hypervisor_pid"], &after["resets"]), (&before["hypervisor_pid"], &2.into()));
    assert_eq!(events.of("web", "reset").len(), 2);
    assert!(events.of("web", "reset").iter().all(|e| e["reason"] == "requested"));
    host.json(&["vm", "stop", "web", "--force"]);
    let said = host.error(&["vm", "reboot", "web"]);
    let wrong =
        "error: VM web does not run and cannot be rebooted\nhint: start it with: outboard vm start web\n";
    assert_eq!(said, wrong);
}

/// Invariant 9: a hung card, with several devices, holds its VM up once, and for good after that.
#[test]
fn a_vm_on_a_hung_card_is_removed() {
    enter_new_network_namespace();
    let mut host = Host::start();
    let images: Vec<_> = (0..5).map(|n| image(host.dir(), &format!("{n}.img"), 1 << 20)).collect();
    let disks: Vec<_> = images.iter().flat_map(|i| ["--disk", i.to_str().expect("path")]).collect();
    host.create("web", "job=idle", &disks);
    host.storage.process().signal(Signal::SIGSTOP);
    // It is continued before anything can fail.
    let started = Instant::now();
    let removed = host.outboard(&["vm", "rm", "web", "--force"]);
    let took = started.elapsed();
    host.storage.process().signal(Signal::SIGCONT);
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    // The deadline of a call to a card is 10 s.
    assert!(took < Duration::from_secs(25), "{took:?}");
    assert_eq!(host.hypervisors(), [0u32; 0]);
    wait_until("the card to delete the disks", SOON * 2, || host.leftovers().is_empty());
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
    let disk = image(host.dir(), "disk.img", 1 << 20);
    let disk = disk.to_str().expect("path");

    // What is asked for, and the whole of the answer.
    let base = ["vm", "create", "bad", "--memory", "128M"];
    let path = "check the path; it is a path on the controller's host";
    let kernels = "give an uncompressed vmlinux (ELF with a PVH note) or a bzImage, such as /boot/vmlinuz-*";
    let extend = format!("extend it with zeros: truncate -s %512 {odd}");
    let cases: [(&[&str], String, &str); 10] = [
        (&["--kernel", none], format!("kernel {none} does not exist"), path),
        (
            &["--kernel", no_kernel],
            format!("{no_kernel} is no kernel: it is neither ELF nor a bzImage"),
            kernels,
        ),
        (
            &["--kernel", no_pvh],
            format!(
                "kernel {no_pvh} is an ELF that wants to be loaded at 0x0, outside of 1 MiB to 3 GiB (a user program?)"
            ),
            "give a bzImage (Debian: /boot/vmlinuz-*) or an ELF kernel with a PVH entry point",
        ),
        (&["--kernel", kernel, "--initramfs", none], format!("initramfs {none} does not exist"), path),
        (
            &["--kernel", kernel, "--disk", none],
            format!("disk image {none} does not exist"),
            "check the path; the storage card must see it, too",
        ),
        (
            &["--kernel", kernel, "--disk", odd],
            format!("disk image {odd} is 1000 bytes long, which is not a multiple of 512"),
            &extend,
        ),
        (
            &["--kernel", kernel, "--disk", "/tmp"],
            "disk image /tmp is a directory".to_owned(),
            "give a raw image file or a block device",
        ),
        (
            &["--kernel", kernel, "--nic", "network=nowhere"],
            "there is no network nowhere".to_owned(),
            "make it with: outboard network create nowhere",
        ),
        (
            &["--kernel", kernel, "--vcpus", "100000"],
            "100000 vCPUs are more than 4096".to_owned(),
            "ask for fewer, at best no more than the host has CPUs",
        ),
        (
            &["--kernel", kernel, "--disk", &format!("path={disk},queues=65")],
            "disk disk0 has 65 queues, more than 64".to_owned(),
            "leave the number out to have one per vCPU",
        ),
    ];
    for (more, message, hint) in cases {
        let said = host.error(&[&base[..], more].concat());
        assert_eq!(said, format!("error: {message}\nhint: {hint}\n"), "{more:?}");
    }
    let said = host.error(&["vm", "create", "bad", "--kernel", kernel, "--memory", "900G"]);
    let (message, hint) = said.split_once("\nhint: ").expect("a hint");
    assert!(message.starts_with("error: the VM wants 921600 MiB of memory and the host has "), "{said}");
    assert!(hint.starts_with("ask for less than ") && hint.ends_with(" MiB\n"), "{said}");
    for call in ["show", "start", "stop", "reboot", "rm", "console"] {
        let said = host.error(&["vm", call, "ghost"]);
        let expected = "error: there is no VM ghost\nhint: see which there are with: outboard vm ls\n";
        assert_eq!(said, expected, "vm {call}");
    }

    assert_eq!(host.network_leftovers(), NOTHING);
    assert_eq!(host.json(&["vm", "ls"]).as_array().map(Vec::len), Some(0));
    assert_eq!(host.hypervisors(), [0u32; 0]);
    assert_eq!(host.leftovers(), NOTHING);
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
    let socket = host.storage.control_socket();
    let expected = format!(
        "error: card blk does not answer on {}: Connection refused (os error 111)\nhint: start the card \
         (systemctl start offload-blk offload-net) and look at: outboard card ls\n",
        socket.display()
    );
    assert_eq!(said, expected);
    assert_eq!(host.json(&["vm", "ls"]).as_array().map(Vec::len), Some(0));
    assert_eq!(host.hypervisors(), [0u32; 0]);
    // And everything else still works.
    host.create("good", "job=idle", &[]);
    host.json(&["vm", "rm", "good", "--force"]);
    assert_eq!(host.leftovers(), NOTHING);
}

#[test]
fn an_unreachable_controller_is_named() {
    let output = std::process::Command::new(e2e::binary("outboard"))
        .args(["--socket", "/nonexistent/api.sock", "vm", "ls"])
        .output()
        .expect("run outboard");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4));
    assert_eq!(
        said,
        "error: the controller's socket /nonexistent/api.sock does not exist\nhint: start it with: systemctl start \
         outboard-mgmt; or name another socket with --socket or OUTBOARD_SOCKET\n"
    );
}
