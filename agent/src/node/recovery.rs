//! Ledger, libvirt and Slurm are brought together after a start.
use std::sync::Arc;

use super::{Entry, Live, Node};
use crate::{
    core::Record,
    vm::{self, Birth},
};

impl Node {
    /// Brings ledger, libvirt and Slurm together after a start: each VM goes on where it was, or is ended.
    pub fn recover(self: &Arc<Self>) {
        let records = match self.world.store.load() {
            Ok(records) => records,
            Err(e) => {
                log::error!("the ledger cannot be read: {}", crate::text::chain(&e));
                return;
            }
        };
        // No answer is not "none": a VM must not be taken for lost because libvirt is away.
        let domains = self
            .world
            .hypervisor
            .list()
            .inspect_err(|e| log::error!("libvirt cannot be asked for its domains: {e}"))
            .ok();
        let keep_ms = u64::from(self.config.node.keep_days) * 86_400_000;
        let now = self.world.clock.now_ms();
        let mut known = Vec::new();
        for record in records {
            let record = match record {
                Ok(record) => record,
                Err(e) => {
                    log::error!("{}", crate::text::chain(&e));
                    // Another version's record, perhaps: its domain is not ours to end.
                    known.extend(e.domain());
                    continue;
                }
            };
            known.push(record.domain());
            let job = record.job;
            if record.life.is_over_here() {
                self.clear_after(&record, domains.as_deref().unwrap_or_default());
                if record.ended_ms.is_some_and(|ended| ended + keep_ms < now) {
                    let _ = self.world.store.remove(&record.domain());
                } else {
                    self.vms().insert(job, Entry::Over(Box::new(record)));
                }
                continue;
            }
            let domain_here = domains
                .as_ref()
                .map(|all| all.iter().any(|d| d.name == record.domain() && d.uuid == record.uuid()));
            let job_here = self.job_here(job);
            log::info!(
                "job {job}: found {} in the ledger (domain here: {domain_here:?}, job here: {job_here:?})",
                record.life.name()
            );
            let user = record.user.clone();
            let found = Birth::Recovered {
                record,
                domain_here,
                job_here,
            };
            let tx = vm::spawn(self.clone(), job, |_| Some(found));
            self.vms().insert(job, Entry::Live(Live { tx, user }));
        }
        for d in domains.iter().flatten().filter(|d| !known.contains(&d.name)) {
            log::warn!("domain {} is ours and in no record: ending it", d.name);
            if let Err(e) = self.world.hypervisor.destroy(&d.name) {
                log::error!("cannot end {}: {e}", d.name);
            }
        }
        vm::moving::clear_left_sockets(&self.config, &known);
    }

    /// An agent that died right after it had recorded a VM's end may have left something of it here.
    fn clear_after(&self, record: &Record, domains: &[crate::hypervisor::DomainInfo]) {
        let domain = record.domain();
        if !domains.iter().any(|d| d.name == domain) {
            return;
        }
        log::warn!("job {}: {domain} is {} and still here: ending it", record.job, record.life.name());
        if let Err(e) = self.world.hypervisor.destroy(&domain) {
            log::error!("cannot end {domain}: {e}");
        }
        vm::moving::clear_here(self, record);
    }
}
