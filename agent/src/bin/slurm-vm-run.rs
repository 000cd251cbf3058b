//! slurm-vm-run
fn main() {}
