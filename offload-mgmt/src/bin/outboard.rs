//! `outboard`: the command.

fn main() -> std::process::ExitCode {
    offload_mgmt::cli::main()
}
