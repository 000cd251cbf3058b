//! Records of VMs that are over: how long they are kept, and what becomes of those that were saved.
use std::path::PathBuf;

use super::{Entry, Node};
use crate::core::{End, Life};

impl Node {
    /// Removes records and logs of VMs that ended longer ago than they are kept.
    pub fn forget_old(&self) {
        let keep_ms = u64::from(self.config.node.keep_days) * 86_400_000;
        let now = self.world.clock.now_ms();
        let mut old = Vec::new();
        self.vms().retain(|job, entry| match entry {
            Entry::Over(record) if record.ended_ms.unwrap_or(record.created_ms) + keep_ms < now => {
                old.push((*job, record.domain()));
                false
            }
            _ => true,
        });
        for (job, domain) in old {
            // The job may have begun anew meanwhile.
            if self.vms().contains_key(&job) {
                continue;
            }
            if let Err(e) = self.world.store.remove(&domain) {
                log::warn!("job {job}: {}", crate::text::chain(&e));
            }
        }
    }

    /// Jobs whose VM was saved here, as their records have it, with the directories of their saves.
    pub fn saved(&self) -> Vec<(u32, PathBuf)> {
        let saved = |(job, entry): (&u32, &Entry)| match entry {
            Entry::Over(record) => match &record.life {
                Life::Saved { at } => Some((*job, at.clone())),
                _ => None,
            },
            Entry::Live(_) => None,
        };
        self.vms().iter().filter_map(saved).collect()
    }

    /// The save of a VM waits for nobody any more: it was restored, here or elsewhere, or its job has ended.
    pub fn saved_for_nobody(&self, job: u32) {
        let changed = {
            let mut vms = self.vms();
            let Some(Entry::Over(record)) = vms.get_mut(&job) else { return };
            if !matches!(record.life, Life::Saved { .. }) {
                return;
            }
            record.life = Life::Stopped { why: End::Released };
            record.clone()
        };
        if let Err(e) = self.world.store.put(&changed) {
            log::warn!("job {job}: {}", crate::text::chain(&e));
        }
    }
}
