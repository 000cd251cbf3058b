//! Why a VM could not be saved, or restored, or its save be looked at.
use std::{io, path::PathBuf};

use crate::{
    effects::{DiskError, trusted::Distrust},
    hypervisor::HypervisorError,
    slurm::SlurmError,
};

/// Fragments for messages; the causes are in the text.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The site has none.
    #[error("there is no shared storage (shared_dir)")]
    NoSharedDir,
    /// There is too little room for the memory that the guest uses.
    #[error("a save needs {need_mib} MiB and {dir} has {free_mib} MiB free")]
    NoRoom {
        /// What is needed.
        need_mib: u64,
        /// What there is.
        free_mib: u64,
        /// Where.
        dir: PathBuf,
    },
    /// The record is not that of a VM that is being saved.
    #[error("the VM is not being saved")]
    NotSaving,
    /// A call of the file system failed.
    #[error("{path}: {why}")]
    File {
        /// With what.
        path: PathBuf,
        /// Why.
        why: io::Error,
    },
    /// Others than root could have written it.
    #[error("{0}")]
    Distrusted(Distrust),
    /// libvirt refused or failed.
    #[error("{0}")]
    Hypervisor(HypervisorError),
    /// An image or overlay.
    #[error("{0}")]
    Disk(DiskError),
    /// Slurm does not say whether the job runs here.
    #[error("Slurm does not say whether job {job} runs here: {why}")]
    NoWordOfSlurm {
        /// The job.
        job: u32,
        /// Why.
        why: SlurmError,
    },
    /// The base image was replaced: on another one the guest's disk would be damaged in silence.
    #[error(
        "no image on {node} is the one that the VM stands on (image {image}, SHA-256 {sha256}): its disk was replaced; put it back under any name"
    )]
    BaseReplaced {
        /// Which node.
        node: String,
        /// The image's name.
        image: String,
        /// Digest of the disk that is wanted.
        sha256: String,
    },
    /// The memory was saved, the rest was not, and the guest cannot be brought back either.
    #[error("{why}; and the guest could not be brought back from {memory}: {again}")]
    Lost {
        /// Why the save failed.
        why: Box<SaveError>,
        /// The guest's memory.
        memory: PathBuf,
        /// Why it cannot be restored.
        again: HypervisorError,
    },
    /// Everything else that stands against this save.
    #[error("{0}")]
    Unfit(String),
}

impl SaveError {
    /// Of a call of the file system.
    pub(super) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |why| Self::File { path, why }
    }
}

impl From<HypervisorError> for SaveError {
    fn from(e: HypervisorError) -> Self {
        Self::Hypervisor(e)
    }
}

impl From<DiskError> for SaveError {
    fn from(e: DiskError) -> Self {
        Self::Disk(e)
    }
}

impl From<Distrust> for SaveError {
    fn from(e: Distrust) -> Self {
        Self::Distrusted(e)
    }
}
