//! slurm-vmd
fn main() {}
