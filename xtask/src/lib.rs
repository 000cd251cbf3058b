//! The project's own commands, as a library: the development lab, the test image, staging and machine setup.
//!
//! `cargo xtask` is a thin command line over this crate; the tests of the root package use [`lab::Lab`] as a dev-dependency.
#![forbid(unsafe_code)]

pub mod apt;
pub mod bench;
mod debian;
pub mod demo;
pub mod error;
pub mod image;
pub mod lab;
pub mod machines;
pub mod mutants;
pub mod package;
pub mod paths;
pub mod proc;
pub mod say;
pub mod setup;
pub mod stage;
pub mod test;
mod tools;

pub use error::{Error, Result};
pub use lab::{Lab, Options, Slurm};
