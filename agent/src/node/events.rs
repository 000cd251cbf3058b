//! libvirt's events and Slurm's notices on their way to the owners of the VMs.
use std::{collections::HashMap, sync::Arc};

use crossbeam_channel::{Receiver, Sender};

use super::{Entry, Node};
use crate::{
    core::Life,
    hypervisor::{DomainEvent, StateReason, StopReason},
    vm::Request,
};

impl Node {
    /// Slurm's notice reached a shim. What moves the VM is the controller's own poll.
    pub fn notice(&self, job: u32) {
        log::info!("job {job}: preemption notice");
        // Also where no controller says so: a script that ends from here on is not to run again.
        if let Some(owner) = self.owner(job) {
            let _ = owner.send(Request::Grace);
        }
    }

    /// Passes libvirt's events on to the owners; runs on its own thread until the hypervisor goes away.
    pub fn watch_domains(self: &Arc<Self>, events: &Receiver<DomainEvent>) {
        let mut panicked: HashMap<String, &'static str> = HashMap::new();
        for event in events {
            match event {
                DomainEvent::Panicked { name, .. } => {
                    panicked.insert(name, "its kernel panicked");
                }
                DomainEvent::Stopped { name, reason, .. } => {
                    let how = panicked.remove(&name).unwrap_or(match reason {
                        StopReason::Shutdown => "it powered off or rebooted",
                        StopReason::Destroyed => "its domain was destroyed",
                        StopReason::Crashed => "QEMU died",
                        StopReason::Failed => "QEMU was ended",
                        StopReason::Migrated | StopReason::Saved => continue,
                        StopReason::Other => "its domain ended",
                    });
                    self.tell(&name, crate::core::Event::DomainEnded { how: how.into() });
                }
                DomainEvent::Resumed {
                    name,
                    reason: StateReason::Migrated,
                    ..
                } => self.tell(&name, crate::core::Event::Arrived),
                DomainEvent::ConnectionBack => self.recheck(),
                DomainEvent::ConnectionLost => log::warn!("the connection to libvirt is lost"),
                other => log::debug!("{other:?}"),
            }
        }
    }

    fn tell(&self, domain: &str, event: crate::core::Event) {
        let job = domain
            .strip_prefix("slurm-")
            .and_then(|r| r.split('-').next())
            .and_then(|j| j.parse::<u32>().ok());
        if let Some(tx) = job.and_then(|j| self.owner(j)) {
            let _ = tx.send(Request::Core(event));
        }
    }

    /// Events may have been lost while libvirt was away: compare.
    fn recheck(self: &Arc<Self>) {
        let Ok(domains) = self.world.hypervisor.list() else { return };
        let owners: Vec<Sender<Request>> = self
            .vms()
            .values()
            .filter_map(|e| if let Entry::Live(live) = e { Some(live.tx.clone()) } else { None })
            .collect();
        for tx in owners {
            let Some(record) = self.ask(&tx, Request::Record) else { continue };
            if matches!(record.life, Life::Running | Life::AwaitingJob { .. }) && !domains.iter().any(|d| d.name == record.domain()) {
                let _ = tx.send(Request::Core(crate::core::Event::DomainEnded {
                    how: "it ended while libvirt was away".into(),
                }));
            }
        }
        log::info!("libvirt is back, {} domains", domains.len());
        // A start that libvirt was busy with when it went away may have come through after its VM was given up.
        let given_up: Vec<String> = self
            .vms()
            .values()
            .filter_map(|e| match e {
                Entry::Over(r) if matches!(r.life, Life::Stopped { .. }) => Some(r.domain()),
                _ => None,
            })
            .filter(|name| domains.iter().any(|d| d.name == *name))
            .collect();
        for name in given_up {
            log::warn!("domain {name} runs though its VM was given up: ending it");
            if let Err(e) = self.world.hypervisor.destroy(&name) {
                log::error!("cannot end {name}: {e}");
            }
        }
    }
}
