//! The agent.
pub mod guest;
