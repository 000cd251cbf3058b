//! Shared types.
#![forbid(unsafe_code)]

pub mod constraint;
pub mod hooks;
pub mod outcome;
pub mod overhead;
pub mod query;
pub mod session;
pub mod shim;
pub mod size;
pub mod spec;
pub mod time;
