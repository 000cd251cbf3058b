//! Where in its guest a VM's programs run, and what is there for them.
use slurm_vm_api::guest;

use crate::core::{Record, directories::Directory};

/// Where in the guest programs run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// Directories of the host that are to be there first.
    pub mounts: Vec<guest::GuestMount>,
    /// The directory that the user named.
    pub workdir: Option<String>,
    /// The guest has a network.
    pub network: bool,
}

impl Place {
    /// Of a VM that is prepared.
    #[must_use]
    pub fn of_record(record: &Record) -> Self {
        let directories = record.plan.as_ref().map_or(&[][..], |plan| &plan.directories);
        let mount = |d: &Directory| guest::GuestMount {
            tag: d.tag.clone(),
            target: d.target.as_os_str().as_encoded_bytes().into(),
            readonly: d.readonly,
        };
        Self {
            mounts: directories.iter().map(mount).collect(),
            workdir: record.spec.workdir.clone(),
            network: record.plan.as_ref().is_some_and(|plan| !plan.network.is_none()),
        }
    }

    /// What is started there.
    #[must_use]
    pub fn of(&self, spec: &guest::StartSpec) -> guest::StartSpec {
        let mut spec = spec.clone();
        spec.mounts.clone_from(&self.mounts);
        if let Some(dir) = &self.workdir {
            spec.cwd = dir.as_str().into();
        }
        spec.wait_network = self.network;
        // Where directories are given, what a program writes is meant to stay.
        spec.cwd_required = self.workdir.is_some() || !self.mounts.is_empty();
        spec
    }
}
