//! The agent.
pub mod hypervisor;
