//! Names for files that are no kernel, so that an error message can say what was given instead.

use super::Image;

/// Magic numbers of what people give by mistake: offset, bytes, what it is.
const KNOWN: &[(u64, &[u8], &str)] = &[
    (0, b"\x1f\x8b", "a gzip-compressed file"),
    (0, b"\xfd7zXZ\0", "an xz-compressed file"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd-compressed file"),
    (0, b"BZh", "a bzip2-compressed file"),
    (0, b"07070", "a cpio archive (an initramfs?)"),
    (257, b"ustar", "a tar archive"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"MZ", "an EFI or Windows program without a Linux setup header"),
    (0, b"!<arch>\n", "an ar archive (a Debian package?)"),
    (0x8001, b"CD001", "a CD image"),
    (510, b"\x55\xaa", "a boot sector or disk image"),
    (0, b"#!", "a script"),
];

/// What the file seems to be, with its article.
pub(super) fn what_is(image: &impl Image) -> &'static str {
    if image.size().unwrap_or(0) == 0 {
        return "an empty file";
    }
    for (offset, magic, name) in KNOWN {
        let mut bytes = [0u8; 8];
        let bytes = &mut bytes[..magic.len()];
        if image.read_at(bytes, *offset).is_ok() && bytes == *magic {
            return name;
        }
    }
    let mut start = [0u8; 256];
    let length = image.size().map_or(0, |s| s.min(256)) as usize;
    if image.read_at(&mut start[..length], 0).is_ok()
        && start[..length].iter().all(|&b| b.is_ascii_graphic() || b.is_ascii_whitespace())
    {
        return "a text file";
    }
    "neither an ELF nor a bzImage"
}
