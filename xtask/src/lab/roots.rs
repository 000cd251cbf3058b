//! The trees below the hosts' overlays: the machine itself, or another Debian release made once by mmdebstrap.

use super::options::Slurm;
use crate::Result;
use std::path::PathBuf;

/// The tree for a Slurm release.
pub fn lower(slurm: Slurm) -> Result<PathBuf> {
    match slurm {
        Slurm::Native => Ok(PathBuf::from("/")),
        other => Err(format!("Slurm {other} is not available yet").into()),
    }
}

/// Makes that tree if it is not there.
pub fn make(slurm: Slurm) -> Result<()> {
    lower(slurm).map(drop)
}
