//! The users' and administrators' command. See [`slurm_vm::cli`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    slurm_vm::cli::main().into()
}
