//! The agent.

pub mod cli;
pub mod shim;
pub mod slurm;
