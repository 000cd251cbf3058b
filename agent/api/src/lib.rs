//! Shared types.
pub mod frame;
pub mod guest;
