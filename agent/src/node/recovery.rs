//! Ledger, libvirt and Slurm are brought together after a start.
use std::{collections::BTreeMap, sync::Arc};

use super::{Node, Registry, domains_of};
use crate::{
    core::{
        Record,
        registry::{Domain, Found},
    },
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
        let there: Option<Vec<Domain>> = domains.as_deref().map(domains_of);
        let (now_ms, keep_ms) = (self.world.clock.now_ms(), self.keep_ms());
        let mut lives = BTreeMap::new();
        let mut known = Vec::new();
        for record in records {
            let record = match record {
                Ok(record) => record,
                Err(e) => {
                    log::error!("{}", crate::text::chain(&e));
                    // Another version's record, perhaps: its domain is not ours to end.
                    if let Some(domain) = e.domain() {
                        known.push(domain.clone());
                        self.vms().foreign(domain);
                    }
                    continue;
                }
            };
            known.push(record.domain());
            match Registry::found(record, there.as_deref(), now_ms, keep_ms) {
                Found::Old(record) => {
                    let _ = self.world.store.remove(&record.domain());
                }
                Found::Over { record, left } => {
                    if left {
                        self.clear_after(&record);
                    }
                    self.vms().over(record);
                }
                Found::Goes { record, domain_here } => {
                    let job = record.job;
                    lives.insert(job, record.clone());
                    self.go_on(record, domain_here);
                }
            }
        }
        self.vms().all_found();
        let strays = there.map(|there| self.vms().strays(&there, &lives)).unwrap_or_default();
        for name in strays {
            log::warn!("domain {name} is ours and in no record: ending it");
            if let Err(e) = self.world.hypervisor.destroy(&name) {
                log::error!("cannot end {name}: {e}");
            }
        }
        vm::moving::clear_left_sockets(&self.world, &self.config, &known);
    }

    fn go_on(self: &Arc<Self>, record: Record, domain_here: Option<bool>) {
        let job = record.job;
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
        let mut vms = self.vms();
        let way = vm::spawn(self.clone(), job, |_| Some(found));
        vms.begun(job, way, user);
    }

    /// An agent that died right after it had recorded a VM's end may have left something of it here.
    fn clear_after(&self, record: &Record) {
        let domain = record.domain();
        log::warn!("job {}: {domain} is {} and still here: ending it", record.job, record.life.name());
        if let Err(e) = self.world.hypervisor.destroy(&domain) {
            log::error!("cannot end {domain}: {e}");
        }
        vm::moving::clear_here(self, record);
    }
}
