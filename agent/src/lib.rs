//! The agent.

pub mod slurm;
