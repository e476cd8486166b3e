//! Compiles the .proto files without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=outboard");
    let files =
        ["controller", "hypervisor", "card", "console", "error"].map(|f| format!("outboard/v1/{f}.proto"));
    tonic_prost_build::configure()
        .build_client(std::env::var_os("CARGO_FEATURE_CLIENT").is_some())
        .build_transport(std::env::var_os("CARGO_FEATURE_CLIENT").is_some())
        .compile_fds(protox::compile(files, ["."])?)?;
    Ok(())
}
