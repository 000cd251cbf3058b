//! The agent.

pub mod peer;
pub mod slurm;
