//! Links `bench-guest` as a static ELF at a fixed address without start files, a C library or an unwinder.

fn main() {
    let dir = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| ".".to_owned());
    println!("cargo::rerun-if-changed=bench-guest/link.ld");
    println!("cargo::rerun-if-changed=bench-guest/boot.s");
    for arg in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,nognustack",
    ] {
        println!("cargo::rustc-link-arg-bin=bench-guest={arg}");
    }
    println!("cargo::rustc-link-arg-bin=bench-guest=-Wl,-T,{dir}/bench-guest/link.ld");
}
