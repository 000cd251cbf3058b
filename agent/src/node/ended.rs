//! Records of VMs that are over: how long they are kept, and what becomes of those that were saved.
use std::path::PathBuf;

use crossbeam_channel::Sender;

use super::Node;
use crate::{
    core::{Life, registry::Entry},
    vm::Request,
};

impl Node {
    /// Removes records and logs of VMs that ended longer ago than they are kept.
    pub fn forget_old(&self) {
        let old = self.vms().forget_old(self.world.clock.now_ms(), self.keep_ms());
        for (job, domain) in old.iter().map(|r| (r.job, r.domain())) {
            // The job may have begun anew meanwhile.
            if self.vms().get(job).is_some() {
                continue;
            }
            if let Err(e) = self.world.store.remove(&domain) {
                log::warn!("job {job}: {}", crate::text::chain(&e));
            }
        }
    }

    /// Jobs whose VM was saved here, as their records have it, with the directories of their saves.
    pub fn saved(&self) -> Vec<(u32, PathBuf)> {
        let saved = |(job, entry): (u32, &Entry<Sender<Request>>)| match entry {
            Entry::Over(record) => match &record.life {
                Life::Saved { at } => Some((job, at.clone())),
                _ => None,
            },
            Entry::Live(_) => None,
        };
        self.vms().iter().filter_map(saved).collect()
    }

    /// The save of a VM waits for nobody any more: it was restored, here or elsewhere, or its job has ended.
    pub fn saved_for_nobody(&self, job: u32) {
        let Some(changed) = self.vms().saved_for_nobody(job) else { return };
        if let Err(e) = self.world.store.put(&changed) {
            log::warn!("job {job}: {}", crate::text::chain(&e));
        }
    }
}
