//! The agent.

pub mod shim;
