//! The real process with tiny guests: it boots, tells what happens, and ends in every way there is.

mod guest;
mod service_manager;
mod vm;

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use guest::Code;
use proto::error::ErrorReason;
use proto::v1::hypervisor_event::Event;
use proto::v1::{
    BootRequest, EndReason, GetInfoRequest, GetStatsRequest, HypervisorState, PauseRequest, ResetReason,
    ResetRequest, ResumeRequest, ShutdownMode, ShutdownRequest, SlotConfig, VmReset,
};
use vm::{Process, SOON, Vm, binary, config};

#[tokio::test]
async fn a_guest_prints_and_powers_off() {
    let kernel = Code::default().print("hello\n").power_off().kernel();
    let mut vm = Vm::boot(kernel.path(), 1).await;
    let mut console = vm.console().await;
    console.drain().await;
    assert_eq!(console.seen, b"hello\n");
    let (ended, status) = vm.end().await;
    assert_eq!(ended.reason(), EndReason::GuestPowerOff);
    assert_eq!(status.code(), Some(0));
}

/// A guest that asks for a reset, over and over, and what it is told to have asked for.
async fn resets_over_and_over(code: Code, reason: ResetReason) {
    let kernel = code.kernel();
    let mut vm = Vm::boot(kernel.path(), 2).await;
    for _ in 0..3 {
        assert_eq!(vm.next_event().await, Some(Event::Reset(VmReset { reason: reason.into() })));
    }
    let mut console = vm.console().await;
    console.read_until(|seen| seen.len() >= 12).await;
    assert!(console.seen.starts_with(b"clean\nclean\n"), "{:?}", String::from_utf8_lossy(&console.seen));
    assert!(vm.client.get_info(GetInfoRequest {}).await.unwrap().into_inner().resets >= 3);
    vm.process.signal(libc::SIGTERM);
    assert_eq!(vm.process.end().code(), Some(0));
}

#[tokio::test]
async fn a_reset_by_acpi_boots_anew_with_clean_memory() {
    let code = Code::default().print_whether_memory_is_clean().acpi_reset();
    resets_over_and_over(code, ResetReason::Guest).await;
}

#[tokio::test]
async fn a_reset_by_port_0xcf9_boots_anew() {
    let code = Code::default().print_whether_memory_is_clean().out(0xcf9, 6).halt();
    resets_over_and_over(code, ResetReason::Guest).await;
}

#[tokio::test]
async fn a_reset_by_the_keyboard_controller_boots_anew() {
    let code = Code::default().print_whether_memory_is_clean().out(0x64, 0xfe).halt();
    resets_over_and_over(code, ResetReason::Guest).await;
}

#[tokio::test]
async fn a_restart_through_the_bios_boots_anew() {
    let code = Code::default().print_whether_memory_is_clean().restart_by_bios();
    resets_over_and_over(code, ResetReason::Guest).await;
}

#[tokio::test]
async fn a_triple_fault_boots_anew() {
    let code = Code::default().print_whether_memory_is_clean().triple_fault();
    resets_over_and_over(code, ResetReason::TripleFault).await;
}

#[tokio::test]
async fn a_reset_on_request_boots_anew_and_a_paused_guest_stays_paused() {
    let kernel = Code::default().print_whether_memory_is_clean().halt().kernel();
    let mut vm = Vm::boot(kernel.path(), 2).await;
    let mut console = vm.console().await;
    console.read_until(|seen| seen == b"clean\n").await;
    vm.client.reset(ResetRequest {}).await.unwrap();
    let requested = Some(Event::Reset(VmReset { reason: ResetReason::Requested.into() }));
    assert_eq!(vm.next_event().await, requested);
    console.read_until(|seen| seen == b"clean\nclean\n").await;
    vm.client.pause(PauseRequest {}).await.unwrap();
    vm.expect_state(HypervisorState::Paused).await;
    vm.client.reset(ResetRequest {}).await.unwrap();
    assert_eq!(vm.next_event().await, requested);
    console.drain().await;
    assert_eq!(console.seen, b"clean\nclean\n");
    vm.client.resume(ResumeRequest {}).await.unwrap();
    console.read_until(|seen| seen == b"clean\nclean\nclean\n").await;
}

#[tokio::test]
async fn a_guest_that_kvm_cannot_run_fails_with_its_registers() {
    let kernel = Code::default().print("x").jump_into_nothing().kernel();
    let vm = Vm::boot(kernel.path(), 1).await;
    let (ended, status) = vm.end().await;
    assert_eq!(ended.reason(), EndReason::Failure);
    assert!(ended.detail.contains("rip 0xd0000000"), "{}", ended.detail);
    assert!(ended.detail.contains("KVM"), "{}", ended.detail);
    assert_eq!(status.code(), Some(1));
}

#[tokio::test]
async fn sigterm_ends_the_vm_in_every_state() {
    let kernel = Code::default().print_dots().kernel();
    for state in ["unconfigured", "configured", "running", "paused"] {
        let mut vm = Vm::spawn().await;
        if state != "unconfigured" {
            vm.configure(config(kernel.path(), 2)).await.unwrap();
            vm.expect_state(HypervisorState::Configured).await;
        }
        if matches!(state, "running" | "paused") {
            vm.client.boot(BootRequest {}).await.unwrap();
            vm.expect_state(HypervisorState::Running).await;
        }
        if state == "paused" {
            vm.client.pause(PauseRequest {}).await.unwrap();
            vm.expect_state(HypervisorState::Paused).await;
        }
        vm.process.signal(libc::SIGTERM);
        let (ended, status) = vm.end().await;
        assert_eq!(ended.reason(), EndReason::Signal, "{state}");
        assert_eq!(status.code(), Some(0), "{state}");
    }
}

#[tokio::test]
async fn shutdown_ends_the_vm_at_once() {
    let kernel = Code::default().print_dots().kernel();
    let mut vm = Vm::boot(kernel.path(), 1).await;
    let unspecified = vm.client.shutdown(ShutdownRequest { mode: 0 }).await.unwrap_err();
    assert_eq!(unspecified.code(), tonic::Code::InvalidArgument);
    vm.client.shutdown(ShutdownRequest { mode: ShutdownMode::Immediate.into() }).await.unwrap();
    let (ended, status) = vm.end().await;
    assert_eq!(ended.reason(), EndReason::Shutdown);
    assert_eq!(status.code(), Some(0));
}

#[tokio::test]
async fn the_power_button_can_be_pressed_but_not_without_a_guest() {
    let kernel = Code::default().halt().kernel();
    let mut vm = Vm::spawn().await;
    let press = ShutdownRequest { mode: ShutdownMode::PowerButton.into() };
    assert_eq!(vm.client.shutdown(press).await.unwrap_err().code(), tonic::Code::FailedPrecondition);
    vm.configure(config(kernel.path(), 1)).await.unwrap();
    vm.client.boot(BootRequest {}).await.unwrap();
    vm.client.shutdown(press).await.unwrap();
}

#[tokio::test]
async fn a_paused_guest_does_nothing_and_a_resumed_one_goes_on() {
    let kernel = Code::default().print_dots().kernel();
    let mut vm = Vm::boot(kernel.path(), 2).await;
    let mut console = vm.console().await;
    console.read_until(|seen| seen.len() > 3).await;
    // Idempotent.
    vm.client.pause(PauseRequest {}).await.unwrap();
    vm.client.pause(PauseRequest {}).await.unwrap();
    vm.expect_state(HypervisorState::Paused).await;
    console.drain().await;
    let before = console.seen.len();
    tokio::time::sleep(Duration::from_millis(100)).await;
    console.drain().await;
    assert_eq!(console.seen.len(), before);
    vm.client.resume(ResumeRequest {}).await.unwrap();
    vm.client.resume(ResumeRequest {}).await.unwrap();
    vm.expect_state(HypervisorState::Running).await;
    console.read_until(|seen| seen.len() > before + 3).await;
}

#[tokio::test]
async fn two_subscribers_see_and_type_on_the_same_console() {
    let kernel = Code::default().print("ready\n").echo().kernel();
    let mut vm = Vm::boot(kernel.path(), 1).await;
    let mut first = vm.console().await;
    first.read_until(|seen| seen == b"ready\n").await;
    let mut second = vm.console().await;
    second.read_until(|seen| seen == b"ready\n").await;
    first.write(b"one").await;
    second.read_until(|seen| seen == b"ready\none").await;
    second.write(b" two").await;
    first.read_until(|seen| seen == b"ready\none two").await;
    // More than all queues hold: it arrives as the guest takes it, and all of it.
    let long = vec![b'x'; 10_000];
    first.write(&long).await;
    second.read_until(|seen| seen.len() == 13 + long.len()).await;
    let stats = vm.client.get_stats(GetStatsRequest {}).await.unwrap().into_inner();
    assert_eq!((stats.console_bytes, stats.console_dropped_bytes), (10_013, 0));
}

#[tokio::test]
async fn exits_are_counted_by_reason() {
    let kernel = Code::default().print("0123456789").out(0x80, 1).out(0x80, 2).halt().kernel();
    let mut vm = Vm::boot(kernel.path(), 2).await;
    let start = Instant::now();
    let stats = loop {
        let stats = vm.client.get_stats(GetStatsRequest {}).await.unwrap().into_inner();
        if stats.userspace_exits.get("io:unclaimed") == Some(&2) {
            break stats;
        }
        assert!(start.elapsed() < SOON, "{stats:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(stats.userspace_exits["io:serial"], 10);
    assert_eq!((stats.userspace_exits_total, stats.data_path_exits), (12, 0));
    assert_eq!(stats.vcpu_userspace_exits, [12, 0]);
    assert!(0 < stats.first_entry_us && stats.first_entry_us < stats.first_console_byte_us);
}

#[tokio::test]
async fn what_cannot_work_is_refused_and_leaves_nothing_behind() {
    let kernel = Code::default().print("!").halt().kernel();
    let directory = tempfile::tempdir().unwrap();
    let no_kernel = directory.path().join("no-kernel");
    std::fs::write(&no_kernel, "#!/bin/sh\n").unwrap();
    let missing = directory.path().join("missing");
    let hung = directory.path().join("hung.sock");
    let _hung = UnixListener::bind(&hung).unwrap();
    let good = config(kernel.path(), 1);
    let with = |change: &dyn Fn(&mut proto::v1::HypervisorConfig)| {
        let mut config = good.clone();
        change(&mut config);
        config
    };
    let slot = |path: &std::path::Path| SlotConfig {
        id: "disk0".into(),
        socket_path: path.to_str().unwrap().into(),
        virtio_device_id: 2,
        ..Default::default()
    };

    let mut vm = Vm::spawn().await;
    let descriptors = open_files(&vm);
    for (config, reason, names) in [
        (config(&missing, 1), ErrorReason::KernelNotFound, missing.to_str().unwrap()),
        (config(&no_kernel, 1), ErrorReason::KernelInvalid, "is a script"),
        (
            with(&|c| c.boot.as_mut().unwrap().initramfs_path = missing.to_str().unwrap().into()),
            ErrorReason::InitramfsNotFound,
            missing.to_str().unwrap(),
        ),
        (with(&|c| c.memory_bytes = 1 << 50), ErrorReason::NotEnoughMemory, "the host has"),
        (with(&|c| c.memory_bytes += 4096), ErrorReason::InvalidField, "2 MiB"),
        (with(&|c| c.vcpus = 0), ErrorReason::InvalidField, "vCPUs"),
        (
            with(&|c| c.slots = vec![slot(&missing)]),
            ErrorReason::DeviceUnreachable,
            missing.to_str().unwrap(),
        ),
        (with(&|c| c.slots = vec![slot(&hung)]), ErrorReason::DeviceUnreachable, hung.to_str().unwrap()),
    ] {
        let error = vm.configure(config).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        let text = format!("{error}");
        assert!(text.contains(names), "{text:?} does not say {names:?}");
        assert!(text.contains(';'), "{text:?} has no remedy");
    }
    assert_eq!(vm.client.boot(BootRequest {}).await.unwrap_err().code(), tonic::Code::FailedPrecondition);
    assert_eq!(vm.client.reset(ResetRequest {}).await.unwrap_err().code(), tonic::Code::FailedPrecondition);
    assert_eq!(open_files(&vm), descriptors);

    // And then it still works, once.
    assert_eq!(vm.configure(good.clone()).await.unwrap().state(), HypervisorState::Configured);
    assert_eq!(vm.configure(good).await.unwrap_err().reason(), ErrorReason::WrongState);
    vm.client.boot(BootRequest {}).await.unwrap();
    assert_eq!(vm.client.boot(BootRequest {}).await.unwrap_err().code(), tonic::Code::FailedPrecondition);
    let mut console = vm.console().await;
    console.read_until(|seen| seen == b"!").await;
}

/// What the descriptors of the process point to, without the numbers of sockets, as clients come and go.
fn open_files(vm: &Vm) -> Vec<String> {
    let directory = format!("/proc/{}/fd", vm.process.pid());
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .map(|target| target.to_str().unwrap().to_owned())
        .collect();
    files.sort();
    files
}

#[tokio::test]
async fn a_kernel_that_vanishes_boots_again() {
    let kernel = Code::default().print("x").halt().kernel();
    let path = kernel.path().to_owned();
    let mut vm = Vm::boot(&path, 1).await;
    let mut console = vm.console().await;
    console.read_until(|seen| seen == b"x").await;
    drop(kernel);
    vm.client.reset(ResetRequest {}).await.unwrap();
    console.read_until(|seen| seen == b"xx").await;
}

#[tokio::test]
async fn a_kernel_that_is_spoilt_fails_the_reset_with_its_name() {
    let kernel = Code::default().halt().kernel();
    let path = kernel.path().to_owned();
    let mut vm = Vm::boot(&path, 1).await;
    kernel.as_file().set_len(1).unwrap();
    let error = proto::error::Error::from(vm.client.reset(ResetRequest {}).await.unwrap_err());
    assert_eq!(error.reason(), ErrorReason::KernelInvalid);
    let (ended, status) = vm.end().await;
    assert_eq!(ended.reason(), EndReason::Failure);
    assert!(ended.detail.contains(path.to_str().unwrap()), "{}", ended.detail);
    assert_eq!(status.code(), Some(1));
}

/// Runs the process to its end, without a control socket.
fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let child =
        binary().args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut process = Process(child.unwrap());
    let status = process.end();
    let (mut out, mut err) = (String::new(), String::new());
    process.0.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    process.0.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    (status.code(), out, err)
}

#[test]
fn the_direct_mode_prints_to_standard_output() {
    let kernel = Code::default().print("hello\n").power_off().kernel();
    let (status, out, err) =
        run(&["--kernel", kernel.path().to_str().unwrap(), "--memory", "16M", "--vcpus", "2"]);
    assert_eq!((status, out.as_str(), err.as_str()), (Some(0), "hello\n", ""));
    let (status, out, _) =
        run(&["--kernel", kernel.path().to_str().unwrap(), "--memory", "16M", "--console", "none"]);
    assert_eq!((status, out.as_str()), (Some(0), ""));
}

#[test]
fn the_direct_mode_takes_input() {
    let kernel = Code::default().echo().kernel();
    let child = binary()
        .args(["--kernel", kernel.path().to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut process = Process(child);
    let mut input = process.0.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, b"ping").unwrap();
    let mut echoed = [0; 4];
    process.0.stdout.as_mut().unwrap().read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"ping");
    // The end of input is not the end of the VM.
    drop(input);
    std::thread::sleep(Duration::from_millis(50));
    assert!(process.0.try_wait().unwrap().is_none());
    process.signal(libc::SIGINT);
    assert_eq!(process.end().code(), Some(0));
}

#[test]
fn mistakes_on_the_command_line_are_explained() {
    let (status, _, err) = run(&[]);
    assert_eq!(status, Some(1));
    assert!(err.contains("--kernel") && err.contains("--control"), "{err}");
    let (status, _, err) = run(&["--speed", "11"]);
    assert_eq!(status, Some(2));
    assert!(err.contains("--speed"), "{err}");
    let (status, _, err) = run(&["--kernel", "/nonexistent/vmlinuz"]);
    assert_eq!(status, Some(1));
    assert!(err.contains("/nonexistent/vmlinuz does not exist"), "{err}");
    let (status, _, err) = run(&["--control", "/nonexistent/x.sock"]);
    assert_eq!(status, Some(1));
    assert!(err.contains("/nonexistent/x.sock"), "{err}");
    let (status, out, _) = run(&["--help"]);
    assert_eq!(status, Some(0));
    assert!(out.contains("Examples:"));
    let (status, out, _) = run(&["--version"]);
    assert_eq!(
        (status, out.as_str()),
        (Some(0), concat!("outboard-hypervisor ", env!("CARGO_PKG_VERSION"), "\n"))
    );
}
