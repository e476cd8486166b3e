use std::io::Write;

use proptest::prelude::*;

use super::*;

impl Image for Vec<u8> {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let end = start.checked_add(buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(self.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

fn program_header(kind: u32, offset: u64, gpa: u64, file_size: u64, memory_size: u64) -> Vec<u8> {
    let mut h = Vec::new();
    h.extend(kind.to_le_bytes());
    h.extend(7u32.to_le_bytes());
    for v in [offset, gpa, gpa, file_size, memory_size, 4] {
        h.extend(v.to_le_bytes());
    }
    h
}

fn note(owner: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut n = Vec::new();
    n.extend((owner.len() as u32).to_le_bytes());
    n.extend((desc.len() as u32).to_le_bytes());
    n.extend(kind.to_le_bytes());
    for part in [owner, desc] {
        n.extend(part);
        n.resize(n.len().next_multiple_of(4), 0);
    }
    n
}

/// An ELF with `code` at `gpa` (with 4096 bytes of BSS behind it) and `notes`.
fn elf_with(code: &[u8], gpa: u64, notes: &[u8]) -> Vec<u8> {
    let (notes_at, code_at) = (64 + 2 * 56, 64 + 2 * 56 + notes.len() as u64);
    let mut e = vec![0; 64];
    e[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    e[16..20].copy_from_slice(&[2, 0, 62, 0]);
    e[32..40].copy_from_slice(&64u64.to_le_bytes());
    e[54..58].copy_from_slice(&[56, 0, 2, 0]);
    e.extend(program_header(4, notes_at, 0, notes.len() as u64, notes.len() as u64));
    e.extend(program_header(1, code_at, gpa, code.len() as u64, code.len() as u64 + 4096));
    e.extend(notes);
    e.extend(code);
    e
}

fn elf(code: &[u8], gpa: u64) -> Vec<u8> {
    let mut notes = note(b"Linux\0", 257, b"6.12");
    notes.extend(note(b"Xen\0", 18, &gpa.to_le_bytes()));
    elf_with(code, gpa, &notes)
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut b = vec![0; 1024];
    b[0x1f1] = 1;
    b[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    b[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    b[0x202..0x206].copy_from_slice(b"HdrS");
    b[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    b[0x211] = 1;
    b[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    b[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes());
    b[0x234] = 1;
    b[0x236] = 1;
    b[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    b[0x260..0x264].copy_from_slice(&0x100_0000u32.to_le_bytes());
    b.extend(payload);
    b
}

fn invalid(bytes: &[u8]) -> String {
    Kernel::parse(&bytes.to_vec()).unwrap_err().0
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut f = tempfile::NamedTempFile::new().unwrap();
    f.write_all(bytes).unwrap();
    f
}

fn source(kernel: &Path, initramfs: Option<&Path>) -> BootSource {
    BootSource {
        kernel: kernel.to_owned(),
        initramfs: initramfs.map(Path::to_owned),
        cmdline: "console=ttyS0".to_owned(),
    }
}

fn u32_in(ram: &GuestRam, address: u64) -> u32 {
    ram.memory().read_obj(GuestAddress(address)).unwrap()
}

fn u64_in(ram: &GuestRam, address: u64) -> u64 {
    ram.memory().read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn a_pvh_kernel_is_loaded_with_its_start_info() {
    let kernel = file(&elf(b"code", 0x20_0000));
    let initramfs = file(&[7; 5000]);
    let source = source(kernel.path(), Some(initramfs.path()));
    let ram = GuestRam::new(16 << 20).unwrap();
    let entry = BootFiles::open(source).unwrap().load(&ram, 0xe_0000).unwrap();
    assert_eq!(entry, Entry::Pvh { eip: 0x20_0000, start_info: layout::PVH_START_INFO });
    let mut code = [0; 4];
    ram.memory().read_slice(&mut code, GuestAddress(0x20_0000)).unwrap();
    assert_eq!(&code, b"code");
    let info = layout::PVH_START_INFO;
    assert_eq!([0, 4, 12].map(|o| u32_in(&ram, info + o)), [0x336e_c578, 1, 1]);
    assert_eq!(u64_in(&ram, info + 32), 0xe_0000);
    let mut cmdline = [0; 14];
    ram.memory().read_slice(&mut cmdline, GuestAddress(u64_in(&ram, info + 24))).unwrap();
    assert_eq!(&cmdline, b"console=ttyS0\0");
    let (map, entries) = (u64_in(&ram, info + 40), u32_in(&ram, info + 48));
    assert_eq!(entries as usize, memory_map(16 << 20).len());
    assert_eq!((u64_in(&ram, map), u64_in(&ram, map + 8), u32_in(&ram, map + 16)), (0, 0x9_fc00, 1));
    let module = u64_in(&ram, info + 16);
    let (at, size) = (u64_in(&ram, module), u64_in(&ram, module + 8));
    assert_eq!((at, size), ((16 << 20) - 8192, 5000));
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(at + 4999)).unwrap(), 7);
}

#[test]
fn a_bzimage_is_loaded_with_its_zero_page() {
    let kernel = file(&bzimage(&[0x90; 4096]));
    let initramfs = file(&[7; 100]);
    let source = source(kernel.path(), Some(initramfs.path()));
    let ram = GuestRam::new(64 << 20).unwrap();
    let entry = BootFiles::open(source).unwrap().load(&ram, 0xe_0000).unwrap();
    assert_eq!(entry, Entry::Linux64 { rip: 0x10_0200, zero_page: layout::ZERO_PAGE });
    assert_eq!(u32_in(&ram, 0x10_0000), 0x9090_9090);
    let page = layout::ZERO_PAGE;
    assert_eq!(u32_in(&ram, page + 0x202), u32::from_le_bytes(*b"HdrS"));
    assert_eq!(u64::from(u32_in(&ram, page + 0x228)), layout::CMDLINE);
    assert_eq!(u64_in(&ram, page + 0x70), 0xe_0000);
    assert_eq!((u32_in(&ram, page + 0x218), u32_in(&ram, page + 0x21c)), ((64 << 20) - 4096, 100));
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(page + 0x1e8)).unwrap(), 4);
    assert_eq!(u64_in(&ram, page + 0x2d0 + 2 * 20), layout::HIGH_MEMORY_START);
}

#[test]
fn what_is_no_kernel_is_named() {
    for (bytes, what) in [
        (&b""[..], "is an empty file"),
        (b"hello, kernel\n", "is a text file"),
        (b"#!/bin/sh\n", "is a script"),
        (b"\x1f\x8b\x08aaaaaaaa", "is a gzip-compressed file"),
        (b"QFI\xfb\0\0\0\x03\0\0\0", "is a qcow2 disk image"),
        (b"\x01\x02\x03\x04", "is neither an ELF nor a bzImage"),
    ] {
        assert_eq!(invalid(bytes), what);
    }
}

#[test]
fn damaged_and_foreign_elfs_are_refused() {
    let good = elf(b"code", 0x20_0000);
    assert!(Kernel::parse(&good).is_ok());
    assert!(invalid(&good[..good.len() - 1]).contains("cut off"));
    assert!(invalid(&good[..70]).contains("cut off"));
    assert!(invalid(&elf(b"code", 0x1000)).contains("0x1000"));
    assert!(invalid(&elf(b"code", u64::MAX - 10)).contains("outside"));
    assert!(
        invalid(&elf_with(b"code", 0x20_0000, &note(b"Xen\0", 17, &[0; 8]))).contains("without a PVH entry")
    );
    assert!(invalid(&elf_with(b"code", 0x20_0000, &note(b"Xen\0", 18, &[0; 2]))).contains("no address"));
    assert!(invalid(&elf_with(b"code", 0x20_0000, &note(b"Xen\0", 18, &[0; 8]))).contains("entry point 0x0"));
    let mut arm = good;
    arm[18] = 183;
    assert!(invalid(&arm).contains("another architecture"));
}

#[test]
fn unfit_bzimages_are_refused() {
    let good = bzimage(&[0; 4096]);
    assert!(Kernel::parse(&good).is_ok());
    let changed = |at: usize, value: u8| {
        let mut b = good.clone();
        b[at] = value;
        invalid(&b)
    };
    assert!(changed(0x206, 0x0b).contains("2.11"));
    assert!(changed(0x211, 0).contains("zImage"));
    assert!(changed(0x236, 0).contains("32-bit"));
    assert!(changed(0x1f1, 30).contains("cut off"));
    assert!(changed(0x263, 0xff).contains("3 GiB"));
}

#[test]
fn files_that_are_missing_or_no_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("vmlinuz");
    let error = BootFiles::open(source(&missing, None)).unwrap_err();
    assert_eq!(error.reason(), ErrorReason::KernelNotFound);
    assert!(error.to_string().contains(missing.to_str().unwrap()));
    let error = BootFiles::open(source(dir.path(), None)).unwrap_err();
    assert_eq!(error.reason(), ErrorReason::KernelInvalid);
    assert!(error.to_string().contains("is a directory"));
    // A FIFO without a writer, which a plain open would wait for.
    let fifo = dir.path().join("fifo");
    let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
    // SAFETY: the name is a C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let error = BootFiles::open(source(&fifo, None)).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
    let kernel = file(&elf(b"code", 0x20_0000));
    let error = BootFiles::open(source(kernel.path(), Some(&missing))).unwrap_err();
    assert_eq!(error.reason(), ErrorReason::InitramfsNotFound);
    let text = file(b"no kernel");
    let error = BootFiles::open(source(text.path(), None)).unwrap().check(16 << 20).unwrap_err();
    assert_eq!(error.reason(), ErrorReason::KernelInvalid);
    assert!(error.to_string().contains("is a text file"), "{error}");
}

#[test]
fn a_vm_boots_again_from_the_files_it_was_given() {
    let dir = tempfile::tempdir().unwrap();
    let (kernel, initramfs) = (dir.path().join("kernel"), dir.path().join("initramfs"));
    std::fs::write(&kernel, elf(b"old!", 0x20_0000)).unwrap();
    std::fs::write(&initramfs, b"old!").unwrap();
    let files = BootFiles::open(source(&kernel, Some(&initramfs))).unwrap();
    files.check(16 << 20).unwrap();
    let old = u32::from_le_bytes(*b"old!");
    for round in 0..2 {
        let ram = GuestRam::new(16 << 20).unwrap();
        let Entry::Pvh { start_info, .. } = files.load(&ram, 0).unwrap() else { panic!("no PVH kernel") };
        let module = u64_in(&ram, start_info + 16);
        assert_eq!((u32_in(&ram, 0x20_0000), u32_in(&ram, u64_in(&ram, module))), (old, old), "{round}");
        // As package managers replace files.
        for (path, new) in [(&kernel, &b"no kernel"[..]), (&initramfs, b"new")] {
            std::fs::remove_file(path).unwrap();
            std::fs::write(path, new).unwrap();
        }
    }
}

#[test]
fn too_little_ram_is_said_with_what_is_needed() {
    let kernel = file(&bzimage(&[0; 4096]));
    let initramfs = file(&vec![0; 3 << 20]);
    let source = source(kernel.path(), Some(initramfs.path()));
    let files = BootFiles::open(source).unwrap();
    assert!(files.check(36 << 20).is_ok());
    let error = files.check(34 << 20).unwrap_err();
    assert_eq!(error.reason(), ErrorReason::InvalidField);
    assert!(error.to_string().contains("at least 36 MiB"), "{error}");
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let _ = Kernel::parse(&bytes);
    }

    /// Near-valid files reach deeper than random ones.
    #[test]
    fn damaged_kernels_do_no_harm(
        pvh in any::<bool>(),
        damage in proptest::collection::vec((0usize..1100, any::<u8>()), 0..8),
        cut in 0usize..6000,
    ) {
        let mut bytes = if pvh { elf(b"code", 0x20_0000) } else { bzimage(&[0; 4096]) };
        for (at, value) in damage {
            if let Some(b) = bytes.get_mut(at) {
                *b = value;
            }
        }
        bytes.truncate(cut);
        if let Ok(kernel) = Kernel::parse(&bytes) {
            prop_assert!(kernel.end() <= layout::PCI_HOLE.start);
            // What was accepted can be loaded, or is refused for lack of RAM.
            let kernel = file(&bytes);
            let source = source(kernel.path(), None);
            let ram = GuestRam::new(16 << 20).unwrap();
            let _ = BootFiles::open(source).unwrap().load(&ram, 0);
        }
    }
}
