//! Shared types.

pub mod constraint;
pub mod hooks;
pub mod outcome;
pub mod overhead;
pub mod shim;
pub mod size;
pub mod spec;
pub mod time;
