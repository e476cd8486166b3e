//! Disks: good ones, broken ones, changed ones.

use crate::vm::{Accel, Vm, accels, counted, disk, field, one};
use guest::pattern;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Arguments of a virtio-blk disk on PCI.
fn pci_disk(image: &Path, queues: u32) -> Vec<String> {
    let drive = format!("if=none,id=d0,file={},format=raw,cache=writeback", image.display());
    let device = format!("virtio-blk-pci,drive=d0,disable-legacy=on,num-queues={queues},serial=DISK0001");
    ["-M", "q35", "-drive", &drive, "-device", &device].map(str::to_owned).to_vec()
}

#[test]
fn every_queue_of_a_disk_verifies() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 16 << 20);
        for mode in ["poll", "irq"] {
            let job = format!("end=triple job=blk-verify bytes=8M queues=2 qd=32 order=random mode={mode}");
            let events = Vm::start(accel, &pci_disk(&image, 2), &job).run();
            let device = one(&events, "device");
            assert_eq!((&device["bus"], &device["id"]), (&"pci".into(), &"DISK0001".into()));
            let result = one(&events, "result");
            assert_eq!(result["ok"], true, "{result}");
            assert_eq!(
                [field(result, "reads"), field(result, "writes"), field(result, "flushes")],
                [2048, 2048, 1]
            );
            for queue in result["per_queue"].as_array().expect("queues") {
                assert!(field(queue, "ops") >= 2048, "a queue was left out: {result}");
                assert_eq!(mode == "irq", field(queue, "irqs") > 0, "{result}");
            }
            assert_eq!(one(&events, "done")["ok"], true);
        }
        // What the guest says it wrote is what is on the disk.
        let mut sector = vec![0; pattern::SECTOR];
        let file = std::fs::File::open(&image).expect("image");
        file.read_exact_at(&mut sector, 1000 * 512).expect("sector");
        assert_eq!(pattern::check_sectors(1, 1000, 1, &sector), None);
    }
}

#[test]
fn nothing_is_printed_while_io_flows() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 4 << 20);
        let job = "end=triple job=blk-verify bytes=4M qd=8 also=spin secs=0.1";
        let events = Vm::start(accel, &pci_disk(&image, 1), job).run();
        let begin = events.iter().position(|event| event["event"] == "io_begin").expect("io_begin");
        assert_eq!(events[begin + 1]["event"], "io_end");
        assert_eq!(events.iter().filter(|event| event["event"] == "result").count(), 2);
    }
}

#[test]
fn a_disk_on_virtio_mmio() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 8 << 20);
        for mode in ["poll", "irq"] {
            let drive = format!("if=none,id=d0,file={},format=raw", image.display());
            let args = [
                "-M",
                "microvm,acpi=off",
                "-global",
                "virtio-mmio.force-legacy=false",
                "-drive",
                &drive,
                "-device",
                "virtio-blk-device,drive=d0,num-queues=2",
            ]
            .map(str::to_owned);
            let job = format!("end=triple job=blk-verify bytes=8M queues=2 qd=8 mode={mode}");
            let events = Vm::start(accel, &args, &job).run();
            assert_eq!(one(&events, "device")["bus"], "mmio");
            let result = one(&events, "result");
            assert_eq!((&result["ok"], field(result, "reads")), (&true.into(), 2048), "{result}");
            assert_eq!(mode == "irq", field(result, "irqs") > 0, "{result}");
        }
    }
}

#[test]
fn registers_above_4_gib() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 4 << 20);
        let mut args = pci_disk(&image, 1);
        // A BAR that does not fit below makes the firmware move all 64-bit BARs up.
        args.extend(["-device", "pci-testdev,membar=8G"].map(str::to_owned));
        let events = Vm::start(accel, &args, "end=triple job=blk-verify bytes=1M mode=irq").run();
        assert_eq!(one(&events, "done")["ok"], true, "{events:#?}");
    }
}

#[test]
fn a_mixed_load_for_a_time() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 8 << 20);
        let job =
            "end=triple job=blk-verify verify=mixed secs=0.5 bytes=2M queues=2 qd=16 no=indirect,eventidx";
        let events = Vm::start(accel, &pci_disk(&image, 2), job).run();
        let result = one(&events, "result");
        assert_eq!(result["ok"], true, "{result}");
        assert!(field(result, "ops") > 1024, "{result}");
        assert!(field(result, "us") >= 500_000, "{result}");
        assert!(field(result, "max_gap_us") > 0 && field(result, "p50_ns") > 0, "{result}");
    }
}

#[test]
fn changed_bytes_are_found() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 4 << 20);
        let run = |job: &str| Vm::start(accel, &pci_disk(&image, 1), job).run();
        let written = run("end=triple job=blk-verify verify=write bytes=4M seed=7 gen=3 qd=8");
        assert_eq!(one(&written, "done")["ok"], true);
        let read = "end=triple job=blk-verify verify=read bytes=4M seed=7 gen=3 qd=8";
        assert_eq!(one(&run(read), "done")["ok"], true);

        // One bit.
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&image).expect("image");
        let mut byte = [0];
        file.read_exact_at(&mut byte, 1234 * 512 + 77).expect("byte");
        file.write_all_at(&[byte[0] ^ 4], 1234 * 512 + 77).expect("byte");
        // A write that was lost: the block still holds what was there before.
        let mut block = vec![0; 4096];
        pattern::fill_sectors(7, 80, 2, &mut block);
        file.write_all_at(&block, 80 * 512).expect("block");

        let events = run(read);
        let result = one(&events, "result");
        assert_eq!(
            (&result["ok"], field(result, "mismatches"), field(result, "stale")),
            (&false.into(), 2, 1),
            "{result}"
        );
        assert!(
            result["first_mismatch"].as_str().is_some_and(|text| text.contains("holds generation 2")),
            "{result}"
        );
        assert_eq!(one(&events, "done")["ok"], false);
    }
}

#[test]
fn io_errors_are_reported() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 4 << 20);
        let rules = dir.path().join("rules");
        std::fs::write(&rules, "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\nsector = \"2048\"\n")
            .expect("rules");
        let node = format!(
            "driver=raw,node-name=d0,file.driver=blkdebug,file.config={},file.image.driver=file,file.image.filename={}",
            rules.display(),
            image.display()
        );
        let device =
            "virtio-blk-pci,drive=d0,disable-legacy=on,rerror=report,werror=report,request-merging=off";
        let args = ["-M", "q35", "-blockdev", &node, "-device", device].map(str::to_owned);
        let events = Vm::start(accel, &args, "end=triple job=blk-verify bytes=4M qd=4").run();
        let result = one(&events, "result");
        assert!(result["ok"] == false && field(result, "errors") > 0, "{result}");
        assert!(
            result["first_error"].as_str().is_some_and(|text| text.contains("sector 2048: status 1")),
            "{result}"
        );
    }
}

#[test]
fn malformed_requests_get_answers() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 4 << 20);
        let events = Vm::start(accel, &pci_disk(&image, 1), "end=triple job=blk-malformed").run();
        let status = |name: &str| {
            let case =
                events.iter().find(|event| event["case"] == name).unwrap_or_else(|| panic!("no case {name}"));
            (field(case, "status"), case["needs_reset"] == true)
        };
        assert_eq!(status("past-end"), (1, false));
        assert_eq!(status("unknown-type"), (2, false));
        assert_eq!(status("write"), (0, false));
        assert_eq!(status("bad-head"), (255, true));
        let result = one(&events, "result");
        assert_eq!((&result["ok"], field(result, "not_alive")), (&true.into(), 0), "{result}");
    }
}

#[test]
fn a_resize_is_noticed() {
    for (accel, dir) in accels() {
        for mode in ["poll", "irq"] {
            let image = disk(&dir, 4 << 20);
            let qmp = dir.path().join("qmp");
            let mut args = pci_disk(&image, 1);
            args.extend(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", qmp.display())]);
            let job = format!("end=triple job=blk-watch secs=20 mode={mode}");
            let mut vm = Vm::start(accel, &args, &job);
            let mut events = vm.until("io_begin");
            let mut monitor = UnixStream::connect(&qmp).expect("monitor");
            let resize = r#"{"execute":"block_resize","arguments":{"device":"d0","size":8388608}}"#;
            write!(monitor, r#"{{"execute":"qmp_capabilities"}}{resize}"#).expect("monitor");
            events.extend(vm.run());
            let result = one(&events, "result");
            assert_eq!(result["ok"], true, "{result}");
            assert_eq!([field(result, "before"), field(result, "after")], [8192, 16384], "{result}");
        }
    }
}

#[test]
fn configuration_by_ports() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let image = disk(&dir, 4 << 20);
    for (accel, _) in accels() {
        let job = "end=triple pci=cf8 job=blk-verify bytes=1M mode=irq";
        let events = Vm::start(accel, &pci_disk(&image, 1), job).run();
        assert_eq!(one(&events, "done")["ok"], true);
        if accel == Accel::Tcg {
            assert_ne!(one(&events, "boot")["tsc_source"], "guess");
        }
    }
}

#[test]
fn a_read_only_disk_is_only_read() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 1 << 20);
        let mut content = vec![0; 1 << 20];
        pattern::fill_sectors(5, 0, 1, &mut content);
        std::fs::write(&image, &content).expect("image");
        let mut args = pci_disk(&image, 1);
        args[3].push_str(",readonly=on");
        let events =
            Vm::start(accel, &args, "end=triple job=blk-verify seed=5 job=blk-malformed cases=write").run();
        assert_eq!(one(&events, "device")["readonly"], true);
        let result = one(&events, "result");
        assert_eq!((&result["ok"], field(result, "writes")), (&true.into(), 0), "{result}");
        assert_eq!(field(one(&events, "case"), "status"), 1);
        assert_eq!(std::fs::read(&image).expect("image"), content);
    }
}

#[test]
fn a_warm_up_counts_only_in_totals() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 4 << 20);
        let job = "end=triple job=blk-bench mode=irq qd=4 warmup=0.3 secs=0.3 hist=1";
        let events = Vm::start(accel, &pci_disk(&image, 1), job).run();
        let result = one(&events, "result");
        assert_eq!(result["ok"], true, "{result}");
        for key in ["ops", "kicks", "irqs"] {
            let (part, whole) = (field(result, key), field(result, &format!("total_{key}")));
            // Half of it is the warm-up on an even machine.
            assert!(part > 0 && part < whole - whole / 16, "{key}: {result}");
        }
        assert_eq!(field(result, "ops") * 4096, field(result, "bytes"));
        assert_eq!(counted(result), field(result, "ops"), "{result}");
    }
}

#[test]
fn the_first_read_is_announced() {
    for (accel, dir) in accels() {
        for mode in ["poll", "irq"] {
            let image = disk(&dir, 4 << 20);
            let job = format!("end=triple job=blk-first mode={mode} job=idle secs=0.01");
            let events = Vm::start(accel, &pci_disk(&image, 1), &job).run();
            let names: Vec<&str> = events.iter().filter_map(|event| event["event"].as_str()).collect();
            let stages = ["io_begin", "first_io", "io_end", "result", "io_begin", "io_end", "result", "done"];
            assert_eq!(names[3..], stages, "{events:#?}");
            let result = one(&events, "result");
            assert_eq!((&result["ok"], field(result, "status")), (&true.into(), 0), "{result}");
            assert_eq!(field(one(&events, "first_io"), "us"), field(result, "first_io_us"), "{result}");
        }
    }
}

#[test]
fn a_paced_load_keeps_its_rate() {
    for (accel, dir) in accels() {
        for mode in ["poll", "irq"] {
            let image = disk(&dir, 4 << 20);
            let job = format!("end=triple job=blk-bench mode={mode} rate=1000 qd=8 warmup=0.2 secs=0.5");
            let events = Vm::start(accel, &pci_disk(&image, 1), &job).run();
            let result = one(&events, "result");
            let (ops, late) = (field(result, "ops"), field(result, "late"));
            assert_eq!(result["ok"], true, "{result}");
            // Nothing comes too early. What falls behind on a slow machine is late.
            assert!(field(result, "total_ops") <= field(result, "us") / 1000 + 2, "{result}");
            assert!(ops >= 490 || late > 0, "{result}");
            assert_eq!(mode == "irq", field(result, "irqs") > 0, "{result}");
            let (sum, longest) = (field(result, "kick_us"), field(result, "max_kick_ns"));
            assert!(longest > 0 && longest / 1000 <= sum + 1, "{result}");
        }
    }
}

#[test]
fn computing_goes_on_beside_a_load() {
    for (accel, dir) in accels() {
        for mode in ["poll", "irq"] {
            let image = disk(&dir, 4 << 20);
            let job = format!("end=triple job=blk-bench mode={mode} qd=2 secs=0.4 also=compute");
            let events = Vm::start(accel, &pci_disk(&image, 1), &job).run();
            let results: Vec<_> = events.iter().filter(|event| event["event"] == "result").collect();
            assert_eq!(results.len(), 2, "{events:#?}");
            let (disk, compute) = (results[0], results[1]);
            assert!(disk["ok"] == true && field(disk, "ops") > 0, "{disk}");
            assert_eq!(mode == "irq", field(disk, "irqs") > 0, "{disk}");
            let [slices, work, lost, us] =
                ["slices", "work_us", "lost_us", "us"].map(|key| field(compute, key));
            assert!(slices > 0 && work > 0 && work + lost <= us, "{compute}");
            assert!(field(compute, "max_gap_ns") / 1000 <= lost + 1, "{compute}");
            assert!((us - field(disk, "us")).abs() < 50_000, "it ends with the disk's job: {disk} {compute}");
        }
    }
}

#[test]
fn computing_alone_ends() {
    for (accel, _dir) in accels() {
        let args = ["-M", "q35"].map(str::to_owned);
        let events = Vm::start(accel, &args, "end=triple job=compute secs=0.2 also=compute secs=0.1").run();
        let result = one(&events, "result");
        assert!(field(result, "us") >= 200_000 && field(result, "slices") > 1, "{result}");
        assert_eq!(one(&events, "done")["ok"], true);
    }
}

#[test]
fn who_waits_for_interrupts_sleeps() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 4 << 20);
        let job = "end=triple job=blk-watch secs=2 mode=irq";
        let events = Vm::start(accel, &pci_disk(&image, 1), job).run();
        let result = one(&events, "result");
        assert!(result["changed"] == false && field(result, "us") >= 2_000_000, "{result}");
        // The end, and again if the timer's clock and the TSC do not agree on it.
        assert!((1..=5).contains(&field(result, "wakeups")), "{result}");
    }
}

#[test]
fn a_request_that_never_comes_back_ends_the_sleep() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 4 << 20);
        let mut args = pci_disk(&image, 1);
        // One request per second: the second one waits longer than the guest does.
        args[3].push_str(",throttling.iops-total=1");
        let job = "end=triple job=blk-bench mode=irq qd=4 timeout=0.3 secs=30";
        let events = Vm::start(accel, &args, job).run();
        let result = one(&events, "result");
        assert!(result["ok"] == false && result["timed_out"] == true, "{result}");
        assert!((300_000..20_000_000).contains(&field(result, "us")), "{result}");
    }
}

#[test]
fn a_little_memory_is_enough() {
    for (accel, dir) in accels() {
        let image = disk(&dir, 4 << 20);
        let mut args = pci_disk(&image, 1);
        args.extend(["-m", "32"].map(str::to_owned));
        let job = "end=triple job=blk-bench mode=irq qd=8 bs=4K secs=0.2";
        let events = Vm::start(accel, &args, job).run();
        assert!(field(one(&events, "boot"), "mem") < 32 << 20, "{events:#?}");
        assert_eq!(one(&events, "result")["ok"], true, "{events:#?}");
    }
}
