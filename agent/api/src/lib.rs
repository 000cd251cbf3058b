//! What the plugin, the shim, the guest helper and the agent share: the grammar of the options, the wire formats
//! between each two of them, and the outcomes that users see. Types and parsers only; no input or output but through
//! readers and writers that the caller brings.
#![forbid(unsafe_code)]

pub mod constraint;
pub mod frame;
pub mod guest;
pub mod hooks;
pub mod message;
pub mod mount;
pub mod outcome;
pub mod overhead;
pub mod query;
pub mod session;
pub mod shim;
pub mod size;
pub mod spec;
pub mod time;
