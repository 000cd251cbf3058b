//! The shim: a `--vm` job's batch script or step task becomes this program. See [`slurm_vm::shim`].
#![forbid(unsafe_code)]

fn main() {
    slurm_vm::shim::main()
}
