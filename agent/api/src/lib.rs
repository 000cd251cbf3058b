//! Shared types.
#![forbid(unsafe_code)]

pub mod query;
pub mod session;
